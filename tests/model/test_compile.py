"""`torch.compile` and `torch.export`: one graph without a break at any plan, and none anew for one that ran before."""

from __future__ import annotations

import asyncio
import copy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from fixtures import CONFIG
from loras import make_lora, merged

import ppcl_rt

sys.path.insert(0, str(Path(__file__).parents[1] / "families"))
sys.path.insert(0, str(Path(__file__).parents[1] / "adapters"))
from test_lora_families import make_flux, make_sd3, make_z_image


class Graphs:
    """A backend that counts graphs and runs them as they are."""

    def __init__(self):
        torch._dynamo.reset()
        self.count = 0

    def __call__(self, graph, _):
        self.count += 1
        return graph.forward

    def of(self, model, fullgraph=True):
        return torch.compile(model, backend=self, fullgraph=fullgraph)


@pytest.fixture
def graphs():
    """A backend that counts; Dynamo forgets all before and afterwards."""
    yield Graphs()
    torch._dynamo.reset()


@pytest.fixture(scope="module")
def plans(mapped):
    """Two plans of two blocks, a student among those of the first."""
    rng = np.random.default_rng(3)
    some = [mapped.random_plan(rng, skip=0.6, legal=True) for _ in range(60)]
    some = [plan for plan in some if len(plan.blocks) == 2 and any(each.student for each in plan.blocks)]
    return some[0], next(plan for plan in some if plan.blocks != some[0].blocks)


def test_the_model_is_one_graph_a_plan(mapped, plans, build_inputs, run, same, graphs):
    """Going back compiles nothing, whichever way a plan is chosen; nor does an image of another size, once two came."""
    model, eager = ppcl_rt.load(mapped.folder, resident="all"), ppcl_rt.load(mapped.folder, plan=plans[0])
    compiled, given = graphs.of(model), build_inputs()
    for plan in (*plans, *plans):
        model.set_plan(plan)
        eager.set_plan(plan)
        same(run(compiled, given), run(eager, given))
    assert graphs.count == 2
    with model.at(plan=plans[0]), eager.at(plan=plans[0]):
        same(run(compiled, given), run(eager, given))
    count = graphs.count
    for plan in plans:
        with model.at(plan=plan):
            run(compiled, given)
        run(compiled, given)
    # What `at` chose and what was set are two places for the same plan.
    assert count <= graphs.count <= count + 1


@pytest.mark.parametrize("mask", ["random", pytest.param("none", marks=pytest.mark.slow)])
def test_other_shapes_compile_once(mapped, plans, build_inputs, run, same, graphs, mask):
    model = ppcl_rt.load(mapped.folder, plan=plans[0])
    compiled = graphs.of(model)
    for images, text in (((1, 3, 5), 7), ((1, 4, 6), 9), ((1, 2, 5), 5), ((1, 3, 5), 7)):
        given = build_inputs(images=[images], text=text, mask=mask)
        same(run(compiled, given), run(model, given))
    assert graphs.count == 2


def test_a_model_built_by_hand(build_inputs, run, same, graphs):
    model, given = ppcl_rt.PPCLQwenImageTransformer2DModel(**{**CONFIG, "num_layers": 1}), build_inputs()
    same(run(graphs.of(model), given), run(copy.deepcopy(model), given))
    assert graphs.count == 1


def test_a_schedule_breaks_the_graph(mapped, plans, build_inputs, run, same, graphs):
    """It goes by the timestep's value: refused with ``fullgraph``, which says what to do; right without."""
    model = ppcl_rt.load(mapped.folder, plan=plans[0])
    schedule = ppcl_rt.Schedule(phases=((0, plans[0]), (1, plans[1])))
    model.set_schedule(schedule)
    with pytest.raises(Exception, match="compile_repeated_blocks"):
        run(graphs.of(model), build_inputs())
    torch._dynamo.reset()
    compiled, eager = graphs.of(model, fullgraph=False), ppcl_rt.load(mapped.folder, plan=plans[0])
    eager.set_schedule(schedule)
    for timestep in (1.0, 0.5):
        given = {**build_inputs(), "timestep": torch.full((3,), timestep)}
        same(run(compiled, given), run(eager, given))
    assert model.plan == plans[1]


@pytest.mark.slow
def test_tasks_do_not_see_each_other(mapped, plans, build_inputs, run, same, graphs):
    """Tasks take turns in a thread, in which compiled code alone would look."""
    model, given = ppcl_rt.load(mapped.folder, plan=plans[0]), build_inputs()
    wanted = [run(ppcl_rt.load(mapped.folder, plan=plan), given) for plan in plans]
    compiled = graphs.of(model, fullgraph=False)

    async def sample(plan):
        with model.at(plan=plan):
            await asyncio.sleep(0)
            result = run(compiled, given)
            await asyncio.sleep(0)
            return result

    async def both():
        return await asyncio.gather(*map(sample, plans))

    for got, each in zip(asyncio.run(both()), wanted, strict=True):
        same(got, each)


def test_repeated_blocks(mapped, plans, build_inputs, run, same, graphs):
    """One graph a width, also of blocks that are read later or grow, also under a schedule."""
    model, eager = (ppcl_rt.load(mapped.folder, plan=plans[0]) for _ in range(2))
    model.compile_repeated_blocks(backend=graphs, fullgraph=True)
    given = build_inputs()
    same(run(model, given), run(eager, given))
    for each in (model, eager):
        each.set_schedule(ppcl_rt.Schedule(phases=((0, plans[0]), (1, plans[1]))))
    assert all("_compiled_call_impl" in block.__dict__ for block in model.resident_blocks())
    for timestep in (1.0, 0.5, 1.0, 0.5):
        given = {**build_inputs(), "timestep": torch.full((3,), timestep)}
        same(run(model, given), run(eager, given))
        counts = graphs.count
    run(model, given)
    assert graphs.count == counts


def test_more_widths_than_torch_compiles(mapped, build_inputs, run, same, graphs):
    """torch compiles a function eight times, then runs it as it is: a plan may have more widths than that."""
    catalog, given = mapped.catalog, build_inputs(batch=1)
    widths = [catalog.spec(0).full.replace(heads=heads, image=50, text=31) for heads in (1, 2, 3)]
    plan = catalog.compose(list(enumerate(widths)))
    model = ppcl_rt.load(mapped.folder, plan=plan)
    wanted = run(model, given)
    model.compile_repeated_blocks(backend=graphs, fullgraph=True)
    with torch._dynamo.config.patch(recompile_limit=2):
        same(run(model, given), wanted)
    assert graphs.count == 3


def test_adapters_are_swapped_without_compiling(mapped, plans, build_inputs, run, same, graphs):
    pytest.importorskip("peft")
    model, given = ppcl_rt.load(mapped.folder, plan=plans[0]), build_inputs()
    model.enable_lora_hotswap(target_rank=4)
    for number, rank in enumerate((3, 2, 3)):
        state = make_lora(mapped.stock, rank=rank, seed=number)
        fresh = ppcl_rt.load(mapped.folder, plan=plans[0])
        fresh.load_lora_adapter(dict(state), adapter_name="one")
        model.load_lora_adapter(state, adapter_name="one", hotswap=number > 0)
        if number == 0:
            compiled = graphs.of(model)
        same(run(compiled, given), run(fresh, given))
    assert graphs.count == 1


@pytest.mark.slow
def test_an_adapter_at_ratio_one(made, build_inputs, run, same, graphs):
    pytest.importorskip("peft")
    state, given = make_lora(made.stock), build_inputs()
    model = ppcl_rt.load(made.folder)
    model.load_lora_adapter(dict(state), adapter_name="one")
    same(run(graphs.of(model), given), run(merged(made.stock, state), given))


@pytest.mark.parametrize("strict", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_export(mapped, plans, build_inputs, run, same, strict):
    """A plan exports as one program, as diffusers' class does."""
    model, given = ppcl_rt.load(mapped.folder, plan=plans[0]), build_inputs()
    wanted = run(model, given)
    with torch.no_grad():
        exported = torch.export.export(model, (), kwargs={**given, "return_dict": False}, strict=strict)
    same(run(exported.module(), given), wanted)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.slow
def test_training(mapped, plans, build_inputs, graphs, checkpointing):
    """Compiled gradients are those of a forward that is not."""
    model, given = ppcl_rt.load(mapped.folder, plan=plans[0]).train(), build_inputs()
    model.requires_grad_(True)
    if checkpointing:
        model.enable_gradient_checkpointing()
    gradients = []
    for each in (torch.compile(model, backend="aot_eager", fullgraph=True), model):
        model.zero_grad()
        each(**given, return_dict=False)[0].square().sum().backward()
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    assert len(gradients[0]) == len(gradients[1]) > 30
    for got, wanted in zip(*gradients, strict=True):
        assert (got - wanted).abs().max() <= 1e-4 * wanted.abs().max() + 1e-6


@pytest.mark.parametrize("quantize", ["int8", "float8", "float8-dynamic"])
@pytest.mark.slow
def test_quantised(mapped, plans, build_inputs, run, same, graphs, quantize):
    model, given = ppcl_rt.load(mapped.folder, plan=plans[0], quantize=quantize), build_inputs()
    # Inputs in float8 may be rounded the other way.
    same(run(graphs.of(model), given), run(model, given), 0.02 if quantize == "float8-dynamic" else 1e-5)


@pytest.mark.parametrize("make", [make_flux, make_sd3, make_z_image], ids=["flux", "sd3", "z-image"])
@pytest.mark.slow
def test_other_families(make, tmp_path, run, same, graphs):
    folder, _, given = make(tmp_path / "checkpoint")
    model = ppcl_rt.load(folder, resident="all")
    # As with diffusers' class: Z-Image makes its rotations in the first forward, which cannot be traced.
    run(model, given)
    compiled = graphs.of(model)
    for ratio in (1.0, 0.8, 1.0, 0.8):
        model.set_ratio(ratio)
        for got, wanted in zip(run(compiled, given), run(model, given), strict=True):
            same(got, wanted)
    assert graphs.count == 2


@pytest.mark.parametrize("make", [make_flux, make_sd3, make_z_image], ids=["flux", "sd3", "z-image"])
@pytest.mark.slow
def test_blocks_and_export_of_other_families(make, tmp_path, run, same, graphs):
    folder, _, given = make(tmp_path / "checkpoint")
    model = ppcl_rt.load(folder, 0.8)
    wanted = run(model, given)
    with torch.no_grad():
        exported = torch.export.export(model, (), kwargs={**given, "return_dict": False})
    model.compile_repeated_blocks(backend=graphs, fullgraph=True)
    for got in (run(exported.module(), given), run(model, given)):
        for one, other in zip(got, wanted, strict=True):
            same(one, other)
