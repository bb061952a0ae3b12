"""The preset for Qwen-Image, scaled down, on a tiny random stand-in of its pipeline: every stage, in bfloat16."""

from importlib.util import find_spec

import pytest
import torch
from diffusers import QwenImagePipeline

import ppcl_rt
from ppcl_train import pipeline
from ppcl_train.config.presets import PRESETS
from ppcl_train.config.settings import with_changes
from ppcl_train.engine.files import read_note, read_tensors

if find_spec("webdataset") is None or find_spec("datasets") is None:
    pytest.skip("needs the train extra", allow_module_level=True)

# Sizes and steps alone: everything else is the preset's.
SMALL = {
    "tracker": "none",
    "pictures.prompts": ["a cat"],
    "pictures.ratios": [0.7],
    "batch": 4,
    "save_every": 2,
    "keep_all": True,
    "table.lengths": [2],
    "table.batches": 2,
    "table.batch": 2,
    "table.samples": 4,
    "table.steps": 3,
    "table.trial_steps": 1,
    "table.least_ratio": 0.6,
    "students.steps": 4,
    "students.batch": 2,
    "width.samples": 16,
    "width.heads": [0.5],
    "width.channels": [0.5],
    "width.ranks": [4, 2],
    "width.longest_text_run": 2,
    "recover.steps": 4,
    "recover.batch": 2,
    "measure.samples": 8,
    "measure.spacing": 0.25,
    "measure.other_spacing": 0.5,
}


@pytest.fixture(scope="module")
def finished(qwen_folder, qwen_cache, tmp_path_factory):
    """A complete run from a pretrained pipeline and a cache of captioned images."""
    places = {"data.cache": str(qwen_cache), "teacher.pretrained": str(qwen_folder)}
    config = with_changes(PRESETS["qwen-image"], {**places, **SMALL})
    folder = tmp_path_factory.mktemp("qwen") / "run"
    pipeline.begin(config, folder)
    pipeline.run_stages(config, folder)
    return folder


def test_the_preset_makes_a_checkpoint_that_draws_in_the_pipeline(finished, parts):
    """One checkpoint, several ratios, in the stock pipeline; no judge, so no task."""
    model = ppcl_rt.load(finished / "checkpoint", dtype=torch.float32)
    assert model.catalog.task is None and model.catalog.compensated and model.catalog.edges
    pipe = QwenImagePipeline(**parts, transformer=model)
    pipe.set_progress_bar_config(disable=True)
    pictures = []
    for ratio in (1.0, 0.75, 0.6):
        model.set_ratio(ratio)
        assert model.catalog.ratio(model.plan) <= ratio
        generator = torch.Generator().manual_seed(0)
        drawn = pipe("a cat", height=32, width=32, num_inference_steps=2, generator=generator, output_type="pt")
        pictures.append(drawn.images)
        assert drawn.images.isfinite().all()
    assert not torch.equal(pictures[0], pictures[2])


def test_ratio_1_is_the_pretrained_teacher(finished, qwen_folder):
    """Bit for bit, rounded to what is stored; nothing of it was copied into the run."""
    stock = ppcl_rt.Checkpoint(qwen_folder / "transformer")
    packed = ppcl_rt.Checkpoint(finished / "checkpoint")
    assert packed.catalog is not None
    for name in stock.names:
        assert torch.equal(packed.read(name), stock.read(name).to(torch.bfloat16)), name
    assert not read_tensors(finished / "teacher.safetensors")


def test_what_is_trained_is_trained_in_float32(finished):
    for name, tensor in read_tensors(finished / "students.safetensors").items():
        assert tensor.dtype == torch.float32, name
    before, after = (read_tensors(finished / name) for name in ("width.json", "recovered.safetensors"))
    # What no plan takes is left out before recovery.
    trained = [name for name in before if ".replacements." in name and name in after]
    moved = [name for name in trained if not torch.equal(before[name], after[name])]
    assert len(moved) > len(trained) // 4
    assert read_note(finished / "recovered.safetensors")["steps"] == 4
