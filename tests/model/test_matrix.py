"""What people have, all together: ratio x weights x hooks x compile, each cell against diffusers' classes.

The reference of a cell is an exported plan in diffusers' own class: its weights rounded where they are held in eight
bits, the adapter added to them, the same cache on it, nothing offloaded and nothing compiled.
"""

from __future__ import annotations

import copy
import itertools

import diffusers
import pytest
import torch
from diffusers import QwenImageTransformer2DModel
from fixtures import SPEC
from loras import LAYERS, make_lora, merged

import ppcl_rt
from ppcl_rt.convert.export import export

pytest.importorskip("peft")

RATIOS = ("ratio 1", "ratio 0.5", "schedule")
WEIGHTS = ("plain", "lora", "int8", "int8 and lora")
HOOKS = ("no hooks", "group offload", "first-block cache")
MODES = ("eager", "compiled")
CELLS = tuple(itertools.product(RATIOS, WEIGHTS, HOOKS, MODES))
# Every value of one with every value of each other.
PAIRS = tuple(
    (ratio, weights, HOOKS[(r + w) % 3], MODES[(w + r // 2) % 2])
    for r, ratio in enumerate(RATIOS)
    for w, weights in enumerate(WEIGHTS)
)
# Denoising steps: the cache answers for the second, of a schedule for the third.
TIMESTEPS = (1.0, 0.9, 0.8)


@pytest.fixture(scope="module")
def half(made):
    """A plan of whole blocks within ratio 0.5, a student among them."""
    student, block = made.catalog.students[0], 3
    plan = made.catalog.compose(
        [(block, SPEC.full)],
        [ppcl_rt.PlannedBlock(interval=student.interval, width=SPEC.full, student=True)],
    )
    assert made.catalog.ratio(plan) <= 0.5 + made.catalog.architecture.outer_params / made.catalog.architecture.params(
        plan
    )
    return plan


@pytest.fixture(scope="module")
def exported(made, half, tmp_path_factory):
    """The plans "dense" and "half" in diffusers' class."""
    folder = tmp_path_factory.mktemp("exported")
    for name, plan in (("dense", made.catalog.largest), ("half", half)):
        export(ppcl_rt.load(made.folder, plan=plan), folder / name, "diffusers")
    return {name: QwenImageTransformer2DModel.from_pretrained(folder / name) for name in ("dense", "half")}


@pytest.fixture(scope="module")
def adapters(made):
    """The adapter of the dense model, and what an exported half takes of it: block 3's, and 0's on the student."""
    dense = make_lora(made.stock, layers=LAYERS)
    half = {name: t for name, t in dense.items() if ".transformer_blocks." not in name}
    for place, block in ((0, 0), (1, 3)):
        at = f"transformer.transformer_blocks.{block}."
        half |= {
            f"transformer.transformer_blocks.{place}.{name.removeprefix(at)}": t
            for name, t in dense.items()
            if name.startswith(at)
        }
    return {"dense": dense, "half": half}


def reference(stock, weights, adapter, hooks, given):
    """The outputs of the steps, by diffusers' class alone."""
    model = copy.deepcopy(stock)
    if "int8" in weights:
        for block in model.transformer_blocks:
            for part in SPEC.parts:
                if not part.factored and part.name != "mlp_image":
                    weight = block.get_submodule(part.path).weight
                    scale = weight.detach().abs().amax(1, keepdim=True) / 127
                    weight.data = (weight.detach() / scale).round() * scale
    if "lora" in weights:
        model = merged(model, adapter)
    if hooks == "first-block cache":
        model.enable_cache(diffusers.FirstBlockCacheConfig(threshold=10.0))
    return [forward(model, inputs) for inputs in given]


def forward(model, inputs):
    with torch.no_grad(), getattr(model, "_orig_mod", model).cache_context("cond"):
        return model(**inputs, return_dict=False)[0]


def ours(made, half, ratio, weights, adapter, hooks, mode):
    """The model of a cell, set up in the order that a user of a pipeline does it."""
    plan = half if ratio == "ratio 0.5" else None
    model = ppcl_rt.load(made.folder, plan=plan, quantize="int8" if "int8" in weights else None)
    if "lora" in weights:
        model.load_lora_adapter(dict(adapter), adapter_name="one")
    if ratio == "schedule":
        model.set_schedule(ppcl_rt.Schedule(phases=((0, made.catalog.largest), (1, half))))
    if hooks == "group offload":
        model.enable_group_offload(
            onload_device=torch.device("cpu"), offload_type="block_level", num_blocks_per_group=1
        )
    if hooks == "first-block cache":
        model.enable_cache(diffusers.FirstBlockCacheConfig(threshold=10.0))
    if mode == "compiled" and (ratio == "schedule" or hooks != "no hooks"):
        # These break the graph of a whole model, which runs and is right, but takes a minute.
        model.compile_repeated_blocks(backend="aot_eager")
    elif mode == "compiled":
        return torch.compile(model, backend="aot_eager", fullgraph=True)
    return model


def test_the_cells_of_every_day_cover_every_pair():
    for first, second in itertools.combinations(range(4), 2):
        assert {(c[first], c[second]) for c in PAIRS} == {(c[first], c[second]) for c in CELLS}


@pytest.mark.parametrize(
    "cell",
    [pytest.param(c, marks=() if c in PAIRS else pytest.mark.slow, id=", ".join(c)) for c in CELLS],
)
def test_a_cell(made, half, exported, adapters, build_inputs, same, cell):
    ratio, weights, hooks, mode = cell
    # Without a schedule the second step shows all that a third would.
    runs = {"ratio 1": "dd", "ratio 0.5": "hh", "schedule": "dhh"}[ratio]
    timesteps = TIMESTEPS[: len(runs)]
    given = [{**build_inputs(seed=n), "timestep": torch.full((3,), t)} for n, t in enumerate(timesteps)]
    wanted = []
    for name, steps in itertools.groupby(zip(runs, given, strict=True), key=lambda each: each[0]):
        of = {"d": "dense", "h": "half"}[name]
        wanted += reference(exported[of], weights, adapters[of], hooks, [inputs for _, inputs in steps])
    torch._dynamo.reset()
    model = ours(made, half, ratio, weights, adapters["dense"], hooks, mode)
    for inputs, each in zip(given, wanted, strict=True):
        same(forward(model, inputs), each, 2e-5)
    torch._dynamo.reset()
