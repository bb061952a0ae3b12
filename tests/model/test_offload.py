"""Offload, casting for storage and placement, at any ratio and after changing it: the same result, nothing more moved.

A CPU offloads to itself. Files are real, and what is not in memory is NaN (torch fills empty memory with it), so that
whoever reads a weight that was not brought shows.
"""

from __future__ import annotations

import gc
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers.hooks import group_offloading as theirs

import ppcl_rt
from ppcl_rt.model.offloading import hook_of

sys.path.insert(0, str(Path(__file__).parent))
from test_quantised import make_flux, make_sd3, make_z_image

accelerate = pytest.importorskip("accelerate")
CPU = torch.device("cpu")
RATIOS = {"qwen": (0.6, 1.0, 0.5), "other": (0.8, 1.0, 0.8)}


@pytest.fixture(autouse=True)
def _empty_is_nan(monkeypatch):
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(before)


def group(type, disk=False):
    def put(model, folder):
        model.enable_group_offload(
            CPU, offload_type=type, num_blocks_per_group=1, offload_to_disk_path=str(folder) if disk else None
        )

    return put


HOW = {
    "leaf": group("leaf_level"),
    "block": group("block_level"),
    "leaf-disk": group("leaf_level", True),
    "block-disk": group("block_level", True),
    "sequential": lambda model, _: accelerate.cpu_offload(model, CPU, offload_buffers=True),
    "model": lambda model, _: accelerate.cpu_offload_with_hook(model, CPU),
}


def flat(output):
    return torch.cat([each.flatten() for each in output]) if isinstance(output, list) else output


def check(folder, given, ratios, how, at, run, same, **more):
    """Run at each ratio, trimmed in between, next to a model without offload that goes the same way."""
    model, plain = (ppcl_rt.load(folder, ratios[0], **more) for _ in range(2))
    how(model, at)
    for ratio in (*ratios, ratios[1]):
        for each in (model, plain):
            each.set_ratio(ratio)
            if ratio == ratios[2]:
                each.trim(to_width=True)
        same(flat(run(model, given)), flat(run(plain, given)))
    assert model.resident_bytes == plain.resident_bytes
    return model


@pytest.mark.parametrize(
    ("how", "quantize"),
    [
        *(("leaf", "int8"), ("block", None), ("leaf-disk", None), ("block-disk", "int8")),
        *(("sequential", "int8"), ("model", None)),
    ],
)
def test_every_ratio(mapped, how, quantize, build_inputs, run, same, tmp_path):
    check(mapped.folder, build_inputs(), RATIOS["qwen"], HOW[how], tmp_path, run, same, quantize=quantize)


FAMILIES = {"flux": make_flux, "sd3": make_sd3, "z-image": make_z_image}
# One or two of each family; the others are for `make full`.
USUAL = {("flux", "leaf-disk"), ("sd3", "block-disk"), ("z-image", "leaf-disk"), ("flux", "sequential")}


@pytest.mark.parametrize(
    ("family", "how"),
    [
        pytest.param(family, how, marks=() if (family, how) in USUAL else pytest.mark.slow)
        for family in FAMILIES
        for how in HOW
    ],
)
def test_other_families(family, how, run, same, tmp_path):
    folder, given = FAMILIES[family](tmp_path / "checkpoint")
    check(folder, given, RATIOS["other"], HOW[how], tmp_path / "files", run, same)


def moved(monkeypatch, model, given, run):
    """The modules that a forward moved."""
    seen = []
    onload = theirs.ModuleGroup.onload_

    def recorded(self):
        seen.extend(self.modules)
        onload(self)

    with monkeypatch.context() as patch:
        patch.setattr(theirs.ModuleGroup, "onload_", recorded)
        run(model, given)
    return seen


def test_what_a_plan_skips_is_not_moved(made, build_inputs, run, monkeypatch):
    """Blocks and students that are resident and do not run stay where they are."""
    given, model = build_inputs(), ppcl_rt.load(made.folder, resident="all")
    model.enable_group_offload(CPU, num_blocks_per_group=2)
    plan = made.catalog.compose([(n, made.catalog.spec(n).full) for n in (0, 2)])
    model.set_plan(plan)
    seen = {id(module) for module in moved(monkeypatch, model, given, run)}
    blocks = model.resident_blocks()
    assert len(model.students) and [id(block) in seen for block in model.blocks()][:3] == [True, False, True]
    assert sum(id(block) in seen for block in blocks) == 2
    model.trim()
    assert len(model.resident_blocks()) == 2


def test_streams_follow_the_plan(mapped, build_inputs, run, same, monkeypatch):
    """Groups are moved ahead in the order of the plan that runs, also after it changed. torch has streams for CPUs."""
    apply = theirs._apply_group_offloading
    monkeypatch.setattr(
        theirs, "_apply_group_offloading", lambda m, config: apply(m, replace(config, stream=torch.cpu.Stream()))
    )
    monkeypatch.setattr(torch.cpu.Stream, "synchronize", lambda self: None, raising=False)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: self)
    given = build_inputs()
    model = check(mapped.folder, given, RATIOS["qwen"], HOW["block"], None, run, same)
    for ratio in (1.0, 0.5):
        model.set_ratio(ratio)
        run(model, given)
        ran, order = {id(call.block) for call in model._program().calls}, []
        group = hook_of(model, "group_offloading")
        while group.next_group is not None:
            order.append(group.next_group.modules[0])
            group = hook_of(order[-1], "group_offloading")
        assert {id(each) for each in order if hasattr(each, "spec")} == ran


def test_a_folder_of_files_serves_several_models(made, build_inputs, run, same, tmp_path):
    """Files of one model are not taken for those of another, and go with it."""
    given = build_inputs()
    for ratio in (0.6, 1.0):
        model = ppcl_rt.load(made.folder, ratio)
        wanted = run(model, given)
        HOW["block-disk"](model, tmp_path)
        same(run(model, given), wanted)
    del model
    gc.collect()
    assert not list(tmp_path.iterdir())


def test_casting_goes_along(mapped, build_inputs, run, same, tmp_path):
    """Layers that are read later are cast too; group offload and weights in eight bits work next to it."""
    given = build_inputs()
    for quantize in (None, "int8"):
        model = ppcl_rt.load(mapped.folder, 0.5, quantize=quantize)
        model.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32)
        model.enable_group_offload(CPU, offload_type="leaf_level")
        model.set_ratio(1.0)
        fresh = ppcl_rt.load(mapped.folder, 1.0, quantize=quantize)
        fresh.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32)
        same(run(model, given), run(fresh, given))
        assert model.dtype == torch.float32 and model.costs()["memory"] > model.resident_bytes
        held = {name: p.dtype for name, p in model.named_parameters() if "img_mlp.net.2.weight" in name}
        assert set(held.values()) == {torch.float8_e4m3fn}
    # What is saved is what was read, not what was rounded.
    model.save_pretrained(tmp_path / "saved")
    again = ppcl_rt.load(tmp_path / "saved", 1.0)
    same(run(again, given), run(ppcl_rt.load(mapped.folder, 1.0), given))
    plain = ppcl_rt.load(mapped.folder, 1.0)
    plain.enable_layerwise_casting(torch.bfloat16, torch.float32)
    with pytest.raises(ValueError, match="cast for storage cannot be saved as a plan: load without layerwise casting"):
        plain.save_plan(tmp_path / "no")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.slow
def test_casting_of_other_families(family, run, same, tmp_path):
    folder, given = FAMILIES[family](tmp_path / "checkpoint")
    model, fresh = ppcl_rt.load(folder, 0.8), ppcl_rt.load(folder, 1.0)
    for each in (model, fresh):
        each.enable_layerwise_casting(torch.bfloat16, torch.float32)
        each.set_ratio(1.0)
    same(flat(run(model, given)), flat(run(fresh, given)))
    plain = flat(run(ppcl_rt.load(folder, 1.0), given))
    assert (flat(run(fresh, given)) - plain).abs().max() > 1e-4


@pytest.mark.parametrize("how", ["leaf", "sequential", "model"])
def test_saving(made, how, build_inputs, run, tmp_path):
    model = ppcl_rt.load(made.folder, 0.6)
    HOW[how](model, tmp_path)
    model.save_pretrained(tmp_path / "saved")
    wanted = run(ppcl_rt.load(made.folder, 0.6), build_inputs())
    assert torch.equal(run(ppcl_rt.load(tmp_path / "saved", 0.6), build_inputs()), wanted)


def test_what_lies_on_disk_is_not_saved_or_adapted(made, tmp_path):
    model = ppcl_rt.load(made.folder, 0.6)
    HOW["leaf-disk"](model, tmp_path)
    for call in (lambda: model.save_pretrained(tmp_path / "no"), lambda: model.save_plan(tmp_path / "no")):
        with pytest.raises(ValueError, match="keeps on disk cannot be saved: do that first, or offload without"):
            call()
    with pytest.raises(ValueError, match="keeps on disk cannot take adapters: do that first"):
        model.load_lora_adapter({})
    with pytest.raises(ValueError, match="group offload is on already: load the model again"):
        HOW["leaf"](model, tmp_path)


def test_device_map(made):
    """One device is a device; what would spread the model is refused with what to do."""
    load = ppcl_rt.PPCLQwenImageTransformer2DModel.from_pretrained
    for one in ("cpu", CPU, {"": "cpu"}):
        assert load(made.folder, ratio=0.6, device_map=one).device == CPU
    for given in ({"device_map": "auto"}, {"device_map": {"pos_embed": 0}}, {"max_memory": {0: "8GB"}}):
        with pytest.raises(ValueError, match=r"would spread a transformer over devices: .* enable_group_offload"):
            load(made.folder, **given)
    with pytest.raises(ValueError, match="say the same: give one of them"):
        load(made.folder, device_map="cpu", device="cpu")
