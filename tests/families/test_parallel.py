"""Context parallel by Ulysses on two processes gives what one process gives; what does not run is refused by name."""

from __future__ import annotations

import multiprocessing
from types import SimpleNamespace

import fixtures
import pytest
import tiny_flux
import torch
from diffusers import ContextParallelConfig
from random_checkpoint import RandomCheckpoint
from test_caches import MAKERS, narrow
from test_flux import COUNTS

import ppcl_rt


def of_flux(folder):
    stock = tiny_flux.build_stock()
    of_class = ppcl_rt.PPCLFluxTransformer2DModel
    made = RandomCheckpoint.make(folder, of_class, stock, COUNTS, ((3, 4),), ((0, 1),), True)
    return made, tiny_flux.build_inputs(text=6, rows=2, columns=5)


def of_qwen(folder):
    made, _ = MAKERS["qwen-image"](folder)
    return made, fixtures._build_inputs(text=6, images=((1, 2, 5),), mask="none")


def outputs(folder, plans, inputs, parallel):
    """Outputs at plans that are visited one after the other, or what was said instead."""
    model, found = ppcl_rt.load(folder, plan=plans[0]), []
    if parallel:
        model.enable_parallelism(config=ContextParallelConfig(ulysses_degree=2))
    for plan in plans:
        model.set_plan(plan)
        try:
            with torch.no_grad():
                found.append(model(**inputs, return_dict=False)[0])
        except ValueError as error:
            found.append(str(error))
    return found


def worker(rank, meeting, results, *arguments):
    """One of two processes."""
    torch.set_num_threads(1)
    # diffusers takes the rank modulo the accelerators, of which a CPU has none.
    torch.accelerator.device_count = lambda: 1
    torch.distributed.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)
    torch.save(outputs(*arguments, parallel=True), f"{results}{rank}")
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("make", [of_flux, of_qwen])
def test_two_processes(make, tmp_path, same):
    """At ratio 1, at a plan with an even number of heads and blocks left out, and refused at one with three."""
    made, inputs = make(tmp_path / "made")
    even = made.plan(
        *(block.model_copy(update={"width": block.width.replace(heads=2)}) for block in narrow(made).blocks)
    )
    # The first is narrow: the second reads blocks when processes share the tokens already.
    plans = [even, made.catalog.dense, narrow(made)]
    arguments = (made.folder, plans, inputs)
    context = multiprocessing.get_context("fork")
    started = [
        context.Process(target=worker, args=(rank, tmp_path / "meeting", tmp_path / "rank", *arguments))
        for rank in range(2)
    ]
    for process in started:
        process.start()
    for process in started:
        process.join(120)
        assert process.exitcode == 0
    wanted = outputs(*arguments, parallel=False)
    for rank in range(2):
        *got, refused = torch.load(tmp_path / f"rank{rank}", weights_only=True)
        for one, other in zip(got, wanted, strict=False):
            same(one, other, 2e-5)
        assert refused.startswith("a block of the plan runs 3 heads, which 2 processes do not divide: run at ratio 1")


def test_refusals(tmp_path):
    """Ring attention, tensor parallel, other families, plans of one's own, masks and residuals: by name."""
    made, inputs = of_qwen(tmp_path / "made")
    model = ppcl_rt.load(made.folder)
    for config, said in {
        ContextParallelConfig: "ring attention and ulysses_anything do not run here: take Context",
        SimpleNamespace: "tensor parallel does not run here, where a plan narrows the layers: take Context",
    }.items():
        given = config(ring_degree=2) if config is ContextParallelConfig else config(tp_degree=2)
        with pytest.raises(ValueError, match=said):
            model.enable_parallelism(config=given)
    ulysses = ContextParallelConfig(ulysses_degree=2)
    with pytest.raises(ValueError, match="cp_plan is the model's own here"):
        model.enable_parallelism(config=ulysses, cp_plan={})
    for family in ("sd3", "z-image"):
        other = ppcl_rt.load(MAKERS[family](tmp_path / family)[0].folder)
        with pytest.raises(ValueError, match=f"context parallel does not run on {type(other).__name__}: run one"):
            other.enable_parallelism(config=ulysses)
        with pytest.raises(ValueError, match=r"(ring attention|context parallel).* not run"):
            other.enable_parallelism(config=ContextParallelConfig(ring_degree=2))
        with pytest.raises(ValueError, match="tensor parallel does not run here"):
            other.enable_parallelism(config=SimpleNamespace(tp_degree=2))
    model._parallel_config = ulysses
    with pytest.raises(ValueError, match="with context parallel, the text has no mask"):
        model(**inputs | {"encoder_hidden_states_mask": torch.ones(3, 6)})
    with pytest.raises(ValueError, match="ControlNet residuals are of all tokens, and processes share them"):
        model(**inputs, controlnet_block_samples=[torch.zeros(3, 10, 32)])
