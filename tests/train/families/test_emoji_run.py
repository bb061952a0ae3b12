"""Emoji end to end on a tiny stand-in: a pipeline folder, a cache, a teacher from nothing, a checkpoint that draws."""

import json
import shutil
from collections import Counter

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLQwenImage, QwenImagePipeline
from PIL import Image

import ppcl_rt
from ppcl_rt.pipelines.task import JudgedTask, task_of
from ppcl_train import emoji_cli, pipeline
from ppcl_train.config.presets import PRESETS
from ppcl_train.config.settings import with_changes
from ppcl_train.data.caching import cache
from ppcl_train.data.captioned import Folder
from ppcl_train.emoji import notice
from ppcl_train.emoji.task import chosen
from ppcl_train.families import base, emoji_autoencoder
from ppcl_train.stages import autoencoder as making

TINY = {
    "tracker": "none",
    "teacher.compile": False,
    "teacher.phases": [{"until": 4, "horizon": 4}],
    "teacher.judge_every": 4,
    "teacher.judge_prompts": 3,
    "teacher.batch": 4,
    "teacher.architecture": {
        **PRESETS["emoji"].teacher.architecture,
        "num_layers": 3,
        "num_attention_heads": 2,
    },
    "batch": 8,
    "table.steps": 3,
    "table.trial_steps": 1,
    "table.batches": 1,
    "table.samples": 4,
    "table.lengths": [2],
    "table.least_ratio": 0.5,
    "students.steps": 2,
    "students.batch": 4,
    "width.samples": 16,
    "width.heads": [0.5],
    "width.channels": [0.5],
    "width.longest_text_run": 2,
    "recover.steps": 2,
    "recover.batch": 4,
    "compress.student_share": 1e-6,
    "recover.muon_lr": 0.01,
    "refine.muon_lr": 0.01,
    "refine.steps": 2,
    "refine.batch": 4,
    "measure.samples": 4,
    "measure.spacing": 0.25,
    "measure.other_spacing": 0.5,
    "measure.candidates": 1,
    "sampler.steps": 2,
    "pictures.ratios": [0.6],
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run folder, and the pipeline folder with its checkpoint inside."""
    home = tmp_path_factory.mktemp("emoji")
    torch.manual_seed(0)
    vae = AutoencoderKLQwenImage(**{**emoji_autoencoder.ARCHITECTURE, "base_dim": 4})
    making.write(PRESETS["emoji"], vae.float(), home / "pipeline")
    pictures = home / "pictures"
    emoji_cli.pictures(pictures)
    lines = (pictures / "metadata.jsonl").read_text().splitlines()
    (pictures / "metadata.jsonl").write_text("\n".join(lines[::100]) + "\n")
    encoder = base.of("emoji").open(str(home / "pipeline"), device="cpu", dtype=torch.float32, draws=False)
    cache("emoji", encoder, Folder(pictures), home / "cache", settings={}, dtype=torch.float32)
    places = {"data.cache": str(home / "cache"), "pictures.pipeline": str(home / "pipeline")}
    config = with_changes(PRESETS["emoji"], {**TINY, **places})
    pipeline.begin(config, home / "run")
    pipeline.run_stages(config, home / "run")
    shutil.copytree(home / "run" / "checkpoint", home / "pipeline" / "transformer")
    return home


def test_what_is_written_says_whose_pictures_they_are(finished):
    lines = (finished / "pictures" / "metadata.jsonl").read_text().splitlines()
    captions = [json.loads(line)["text"] for line in lines]
    held_out = {caption.text for caption in chosen(10**6, True, 0)}
    assert captions and not held_out & set(captions)
    for name in ("pictures", "pipeline"):
        assert "OpenMoji" in (finished / name / notice.FILE).read_text()
    assert ppcl_rt.load(finished / "pipeline" / "transformer").catalog.license == "cc-by-sa-4.0"
    # Others may read what is written for them.
    files = [path for path in (finished / "pipeline").rglob("*") if path.is_file()]
    assert files and {path.stat().st_mode for path in files} == {(finished / "pictures" / notice.FILE).stat().st_mode}


def test_what_there_is_one_of_can_be_listed_more_often(tmp_path):
    emoji_cli.pictures(tmp_path / "pictures", singles=3)
    lines = (tmp_path / "pictures" / "metadata.jsonl").read_text().splitlines()
    times = Counter(json.loads(line)["text"] for line in lines)
    assert times["owl"] == 3 and times["woman firefighter: dark skin tone"] == 1
    assert len(times) == len(list((tmp_path / "pictures").glob("*.png"))) == len({*lines})


def test_the_teacher_was_judged_and_pictures_were_drawn(finished):
    log = [json.loads(line) for line in (finished / "run" / "log.jsonl").read_text().splitlines()]
    assert any(line.get("judged") == 4 and 0 <= line["strict"] <= line["soft"] <= 1 for line in log)
    assert (finished / "run" / "pictures" / "grid.png").exists()


def test_the_stock_pipeline_draws_the_same(finished):
    """`ppcl sample` and `QwenImagePipeline` with our class; with its own, it draws the teacher."""
    folder = finished / "pipeline"
    model = ppcl_rt.load(folder / "transformer", 0.7, dtype=torch.float32)
    task = task_of(model.catalog, folder)
    assert isinstance(task, JudgedTask) and model.catalog.task["size"] == 64
    table = task.drawing(model).table
    (embeddings, mask), (negative, negative_mask) = table.batch(["red apple"]), table.batch([""])

    def draw(pipe):
        noise = torch.Generator().manual_seed(5)
        how = {"width": 64, "height": 64, "num_inference_steps": 2, "true_cfg_scale": 1.5, "generator": noise}
        how |= {"negative_prompt_embeds": negative, "negative_prompt_embeds_mask": negative_mask}
        return pipe(prompt_embeds=embeddings, prompt_embeds_mask=mask, output_type="np", **how).images[0]

    ours = QwenImagePipeline.from_pretrained(folder, transformer=model, text_encoder=None, tokenizer=None)
    [picture] = task.sample(model, ["red apple"], 5)
    np.testing.assert_allclose(np.asarray(picture) / 255, draw(ours), atol=1 / 255)
    dense = ppcl_rt.load(folder / "transformer", 1.0, dtype=torch.float32)
    [teacher] = task.sample(dense, ["red apple"], 5)
    stock = QwenImagePipeline.from_pretrained(folder, text_encoder=None, tokenizer=None)
    np.testing.assert_allclose(np.asarray(teacher) / 255, draw(stock), atol=2 / 255)


def test_the_program_samples_and_judges_the_folder(finished, ppcl, tmp_path):
    folder, out = finished / "pipeline", tmp_path / "a.png"
    status, _, err = ppcl("sample", folder, "--prompt", "red apple", "--ratios", "1,0.7", "--out", out)
    assert status == 0 and Image.open(out).width > 192, err
    status, _, err = ppcl("eval", folder, "--ratios", "1", "--prompts", 3, "--json", tmp_path / "e.json")
    assert status == 0, err
    [row] = json.loads((tmp_path / "e.json").read_text())
    assert row["kinds"]["trained"]["prompts"] == 3 == row["kinds"]["held out"]["prompts"]
    assert set(row["kinds"]["trained"]) > {"exact", "exact_ci", "top_5", "role", "tone"}
    # Without its pipeline there is nothing to draw with.
    status, _, err = ppcl("sample", finished / "run" / "checkpoint", "--prompt", "owl", "--out", out)
    assert status == 2 and "draws through a pipeline" in err
