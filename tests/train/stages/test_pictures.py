"""The grid that a run ends with: scenes of the shipped checkpoint, a tiny pipeline, and where nothing can be drawn."""

import base64
import io
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import ppcl_rt
from ppcl_train.config.presets import PRESETS
from ppcl_train.config.settings import with_changes
from ppcl_train.engine.files import read_content
from ppcl_train.stages import pictures

EXAMPLE = Path(__file__).parents[3] / "examples" / "scenes"


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "checkpoint").symlink_to(EXAMPLE)
    return tmp_path


def test_scenes(folder):
    run = with_changes(PRESETS["scenes"], {"pictures.ratios": [0.01, 0.5], "sampler.steps": 2})
    pictures.draw(run, folder)
    content = read_content(folder / pictures.OUTPUT)
    smallest = ppcl_rt.Planner(ppcl_rt.Checkpoint(EXAMPLE).catalog).smallest
    assert [row["ratio"] for row in content["ratios"]] == [0.5, pytest.approx(smallest)]
    near, far = ([s for _, s in row["psnr_and_ssim"]] for row in content["ratios"])
    assert len(near) == 5 and all(0.9 < a <= 1 for a in near) and np.mean(far) < np.mean(near)
    grid = Image.open(folder / pictures.GRID)
    # Five prompts, and the teacher next to two ratios; a pixel is six.
    assert grid.size == (3 * 100 - 4, 5 * 100 - 4)
    text = (folder / pictures.PAGE).read_text()
    shown = [Image.open(io.BytesIO(base64.b64decode(each))) for each in re.findall(r"base64,([^\"]+)\"", text)]
    assert len(shown) == 15 and np.array_equal(np.asarray(shown[0]), np.asarray(grid)[:96, :96])
    assert "the text &quot;FAIL&quot; on grey" in text and not re.findall(r"(?:src|href)=\"(?!data:)", text)


def test_a_pipeline_of_a_family(qwen_folder, qwen_cache, made, tmp_path):
    shutil.copytree(made.folder, tmp_path / "checkpoint")
    places = {"data.cache": str(qwen_cache), "teacher.pretrained": str(qwen_folder)}
    small = {"pictures.prompts": ["a cat", "a dog"], "pictures.ratios": [0.7], "sampler.steps": 2}
    pictures.draw(with_changes(PRESETS["qwen-image"], {**places, **small}), tmp_path)
    (row,) = read_content(tmp_path / pictures.OUTPUT)["ratios"]
    assert len(row["psnr_and_ssim"]) == 2 and all(s < 1 for _, s in row["psnr_and_ssim"])
    # Most of the cache is 32 x 32; enlarged three times.
    assert Image.open(tmp_path / pictures.GRID).size == (2 * 100 - 4, 2 * 100 - 4)


@pytest.mark.parametrize(
    "changes, because",
    [
        ({"pictures.ratios": []}, "pictures.ratios is empty"),
        ({"task": "qwen-image"}, "latents cannot be decoded without a pipeline: set pictures.pipeline"),
        ({"task": "qwen-image", "pictures.pipeline": "nowhere"}, r"nowhere cannot be opened as a Qwen-Image pipeline"),
    ],
)
def test_where_nothing_can_be_drawn_it_is_said(folder, changes, because):
    pictures.draw(with_changes(PRESETS["scenes"], changes), folder)
    assert re.match(because, read_content(folder / pictures.OUTPUT)["left_out"])
    assert not (folder / "pictures").exists()
