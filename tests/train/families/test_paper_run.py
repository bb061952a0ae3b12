"""The preset of the paper, scaled down, on a tiny random stand-in of its pipeline: every stage, in bfloat16."""

from importlib.util import find_spec

import pytest
import torch

import ppcl_rt
from ppcl_rt import LINEAR_MAP
from ppcl_train import pipeline
from ppcl_train.config.presets import PRESETS
from ppcl_train.config.settings import with_changes
from ppcl_train.data import calibration
from ppcl_train.data.teacher_file import load_teacher
from ppcl_train.engine.files import read_note, read_tensors
from ppcl_train.selectors import selection

if find_spec("webdataset") is None or find_spec("datasets") is None:
    pytest.skip("needs the train extra", allow_module_level=True)

# Sizes and steps alone: everything else is the preset's.
SMALL = {
    "tracker": "none",
    "batch": 4,
    "save_every": 2,
    "keep_all": True,
    "probes.samples": 8,
    "probes.steps": 2,
    "probes.batch": 2,
    "probes.cka_samples": 8,
    "students.steps": 2,
    "students.batch": 2,
    "width.samples": 8,
    "width.longest_text_run": 2,
    "recover.steps": 2,
    "recover.kept_steps": 2,
    "recover.batch": 2,
    "recover.spacing": 0.1,
    # The paper tunes once; here once more, after its stages, as `refine` may.
    "refine.kept_steps": 2,
    "refine.batch": 2,
    "refine.precision": "bf16",
    "refine.spacing": 0.25,
    "refine.other_spacing": 0.5,
    "measure.samples": 4,
    "measure.spacing": 0.25,
    "measure.other_spacing": 0.5,
    "sampler.steps": 4,
}
PAPER = PRESETS["paper"]


@pytest.fixture(scope="module")
def config(qwen_folder, qwen_cache):
    places = {"data.cache": str(qwen_cache), "teacher.pretrained": str(qwen_folder)}
    return with_changes(PAPER, {**places, **SMALL})


def test_the_preset_says_what_the_paper_states():
    assert (PAPER.students.steps, PAPER.recover.steps, PAPER.recover.kept_steps) == (6000, 2000, 1000)
    assert PAPER.select == "eq5" and PAPER.magnitude == 0 and PAPER.recover.flow_matching == 1
    assert {PAPER.students.weight_decay, PAPER.recover.weight_decay} == {0.02}
    assert {PAPER.probes.precision, PAPER.students.precision, PAPER.recover.precision} == {"bf16"}
    width = PAPER.width
    assert not width.heads and not width.channels and not width.ranks and width.maps and width.longest_text_run > 1
    assert not PAPER.refine.steps and not PAPER.compress.share and not PAPER.data.trajectory


@pytest.mark.slow
def test_the_preset_makes_a_checkpoint_of_what_the_paper_has(config, qwen_folder, tmp_path):
    pipeline.begin(config, tmp_path)
    pipeline.run_stages(config, tmp_path)
    catalog = ppcl_rt.load(tmp_path / "checkpoint", dtype=torch.float32).catalog
    for widths in catalog.blocks:
        for group in widths.groups:
            # Whole, or a linear map in place of an MLP.
            assert {choice.units for choice in widths.of(group)[1:]} <= {LINEAR_MAP}, group
    assert {start for _, start in selection.read(tmp_path)} <= {"first"}
    recovered = read_tensors(tmp_path / "recovered.safetensors")
    assert read_note(tmp_path / "recovered.safetensors")["kept"] == 2
    # Kept blocks are trained with the rest.
    stock = ppcl_rt.Checkpoint(qwen_folder / "transformer")
    moved = [name for name in stock.names if not torch.equal(recovered[name].float(), stock.read(name).float())]
    assert len(moved) > len(stock.names) // 2
    refined = read_tensors(tmp_path / "refined.safetensors")
    assert read_note(tmp_path / "refined.safetensors")["kept"] == 2
    # Most steps of a rate that warms up are below what bfloat16 resolves.
    assert any(not torch.equal(refined[name], recovered[name]) for name in stock.names)


def test_a_cached_teacher_of_few_steps_is_called_on_its_trajectory(config, tmp_path):
    """Prompts and shapes come from the cache, all else from the teacher."""
    run = with_changes(config, {"data.trajectory": True, "recover.flow_matching": 0.0})
    pipeline.begin(run, tmp_path)
    pipeline.run_stages(run, tmp_path, last="teacher")
    teacher = load_teacher(run, tmp_path)
    batch, again = (calibration.inputs(run, 3, calibration.CHECK + 5, teacher=teacher) for _ in range(2))
    mixed = calibration.inputs(config, 3, calibration.CHECK + 5)
    assert torch.equal(batch.x, again.x) and batch.x.isfinite().all() and batch.data is None
    assert torch.equal(batch.call["encoder_hidden_states"], mixed.call["encoder_hidden_states"])
    assert batch.x.shape == mixed.x.shape
    assert set(batch.t.tolist()) <= set(torch.tensor(run.sampler.times()).tolist())
    measured = list(calibration.measured(run, 4, calibration.CHECK, teacher=teacher))
    # Guided: two samples in the call for each.
    assert all(len(each.call["hidden_states"]) == 2 * len(each.x) for each in measured)
    assert float(sum(each.shares.sum() for each in measured)) == pytest.approx(1)
