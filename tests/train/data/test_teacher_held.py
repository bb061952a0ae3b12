"""A teacher that is only read, in eight bits or offloaded: the same model, rounded as the runtime rounds it."""

import pytest
import torch

import ppcl_rt
from ppcl_train.config.presets import PRESETS
from ppcl_train.config.settings import with_changes
from ppcl_train.data import calibration, streams
from ppcl_train.data.teacher_file import load_teacher, note_pretrained, only_read
from ppcl_train.engine.log import Log


@pytest.fixture
def run_of(qwen_folder, qwen_cache, tmp_path):
    def made(**held):
        held = {f"teacher.{name}": value for name, value in held.items()}
        places = {"data.cache": str(qwen_cache), "teacher.pretrained": str(qwen_folder), "storage": "float32"}
        more = {"teacher.dtype": "float32", "students.shard_teacher": False}
        run = with_changes(PRESETS["qwen-image"], {**places, **more, **held})
        note_pretrained(run, tmp_path)
        return run

    return made


def passed(model, batch):
    """All streams of the teacher's pass."""
    return [stream for streams_ in streams.trace(model, batch).streams for stream in streams_]


def test_eight_bits_are_those_of_the_runtime(run_of, qwen_folder, tmp_path):
    run = run_of(quantize="int8")
    model, log = load_teacher(run, tmp_path), Log(tmp_path, "students")
    exact, batch = sum(t.nbytes for t in model.state_dict().values()), calibration.inputs(run, 2, calibration.CHECK)
    before = passed(model, batch)
    held = only_read(run, model, log)
    theirs = ppcl_rt.load(qwen_folder / "transformer", quantize="int8")
    for ours, wanted, whole in zip(passed(held, batch), passed(theirs, batch), before, strict=True):
        assert torch.equal(ours, wanted) and torch.allclose(ours, whole, atol=0.05 * whole.abs().max())
    assert sum(t.nbytes for t in held.state_dict().values()) < 0.75 * exact
    assert "int8" in (tmp_path / "log.jsonl").read_text()
    assert not all(map(torch.equal, passed(held, batch), before))


def test_offload_moves_blocks_and_changes_nothing(run_of, tmp_path):
    run = run_of(offload=True)
    batch = calibration.inputs(run, 2, calibration.CHECK)
    before = passed(load_teacher(run, tmp_path), batch)
    held = only_read(run, load_teacher(run, tmp_path), Log(tmp_path, "students"))
    assert all(block._diffusers_hook.get_hook("group_offloading") for block in held.blocks())
    assert all(map(torch.equal, passed(held, batch), before))


def test_what_needs_exact_weights_is_said(run_of):
    with pytest.raises(ValueError, match="shard_teacher spreads exact weights over processes: leave out"):
        with_changes(run_of(quantize="int8"), {"students.shard_teacher": True})
