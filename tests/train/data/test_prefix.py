"""The model from a block on: what it puts out is what whole forwards put out, for every kind of choice and family."""

import pytest
import test_latency
import tiny_flux
import tiny_sd3
import tiny_z_image
import torch

import ppcl_rt
from ppcl_rt.planning.sketch import choices
from ppcl_train.data.calibration import Inputs
from ppcl_train.data.prefix import HeldStreams
from ppcl_train.stages.sensitivities import entry, plan_with

# Makes a checkpoint with students, text runs where blocks can have them and narrower counts; and inputs of a forward.
FAMILIES = {
    "flux": (test_latency.flux, tiny_flux.build_inputs),
    "sd3": (lambda folder: tiny_sd3.make_checkpoint(folder, "medium"), tiny_sd3.build_inputs),
    "z-image": (tiny_z_image.make_checkpoint, tiny_z_image.build_inputs),
}


@pytest.mark.parametrize("family", ["qwen-image", *FAMILIES])
@torch.no_grad()
def test_choices_from_their_block_on_are_those_of_whole_forwards(family, tmp_path, mapped, build_inputs):
    if family == "qwen-image":
        folder, inputs = mapped.folder, build_inputs
    else:
        folder, (make, inputs) = tmp_path / "checkpoint", FAMILIES[family]
        make(folder)
    model = ppcl_rt.load(folder, dtype=torch.float32, resident="all")
    nothing = torch.zeros(1)
    batches = [Inputs(nothing, nothing, inputs()) for _ in range(2)]
    held, kinds = HeldStreams(model, batches), set()
    # One count of each block and student, and students and text runs themselves: enough, and a third of the time.
    some = {(choice.kind, choice.interval, bool(choice.group)): choice for choice in choices(model.catalog)}
    for choice in sorted(some.values(), key=entry):
        plan, block = plan_with(model.catalog, choice), entry(choice)
        held.hold(*([block] if block else []))
        assert list(held._held) == ([block] if block else [])
        mine = held.run(plan, block, 1)
        with model.at(plan=plan):
            whole = model(**batches[1].call)[0]
        pairs = zip(mine, whole) if isinstance(mine, list) else [(mine, whole)]
        # The same operations on the same bits.
        assert all(torch.equal(*pair) for pair in pairs), choice
        kinds.add(choice.kind)
    assert kinds >= {"block", "student"} and ("text_run" in kinds) == bool(model.catalog.text_runs)
    # Back to where nothing is kept, and after the last block, where a plan has nothing left to run.
    depth = model.catalog.architecture.depth
    held.hold(1, depth)
    outputs = [held.run(model.catalog.dense, block, 0) for block in (0, 1, depth)]
    firsts = [output[0] if isinstance(output, list) else output for output in outputs]
    assert all(torch.equal(firsts[0], each) for each in firsts[1:])
    assert not any(block._forward_pre_hooks or block._forward_hooks for block in model.resident_blocks())
