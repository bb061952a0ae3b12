"""A whole pipeline folder with a pluggable transformer: from diffusers, from the program, and with words of its own."""

import concurrent.futures
import json
import shutil

import numpy as np
import pytest
import torch
from diffusers import QwenImagePipeline, QwenImageTransformer2DModel
from PIL import Image

import ppcl_rt
from ppcl_rt.pipelines.drawing import Drawing, How
from ppcl_rt.pipelines.task import PipelineTask, places, task_of
from ppcl_rt.pipelines.words import WordTable

HOW = How(steps=2, guidance=3.0, size=(48, 32))


@pytest.fixture(scope="module")
def folder(made, parts, tmp_path_factory):
    """A tiny random pipeline whose transformer is pluggable."""
    folder = tmp_path_factory.mktemp("whole") / "pipeline"
    pipe = QwenImagePipeline(**parts, transformer=made.stock)
    pipe.save_pretrained(folder)
    shutil.rmtree(folder / "transformer")
    shutil.copytree(made.folder, folder / "transformer")
    return folder


@pytest.fixture(scope="module")
def wordy(folder, tmp_path_factory):
    """The same with a table of words in the place of the text encoder."""
    copy = tmp_path_factory.mktemp("words") / "pipeline"
    shutil.copytree(folder, copy)
    index = json.loads((copy / "model_index.json").read_text())
    index["text_encoder"] = index["tokenizer"] = [None, None]
    (copy / "model_index.json").write_text(json.dumps(index))
    for name in ("text_encoder", "tokenizer"):
        shutil.rmtree(copy / name)
    dim = json.loads((copy / "transformer" / "config.json").read_text())["joint_attention_dim"]
    WordTable.random(["a", "red", "owl"], dim).write(copy)
    return copy


def array(picture):
    return np.asarray(picture, dtype=np.float32) / 255


def test_it_draws_what_diffusers_draws(folder):
    """The noise of prompt ``i`` is that of a generator with seed ``seed + i``; several prompts change nothing."""
    model = ppcl_rt.load(folder / "transformer", 0.6)
    task = task_of(model.catalog, folder)
    assert isinstance(task, PipelineTask)
    seen = []
    drawn = task.sample(model, ["a red square", "an owl"], 7, HOW, lambda done, of: seen.append((done, of)))
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]
    pipe = QwenImagePipeline.from_pretrained(folder, transformer=model)
    wanted = pipe(
        "an owl",
        negative_prompt=" ",
        true_cfg_scale=3.0,
        width=48,
        height=32,
        num_inference_steps=2,
        generator=torch.Generator().manual_seed(8),
    ).images[0]
    np.testing.assert_allclose(array(drawn[1]), array(wanted), atol=1 / 255)


def test_words_are_handed_over_as_embeddings(wordy):
    """Stock pipeline and stock class, as the docs show it; one batch of prompts of several lengths."""
    stock = QwenImagePipeline.from_pretrained(wordy, text_encoder=None, tokenizer=None)
    assert type(stock.transformer) is QwenImageTransformer2DModel
    model = ppcl_rt.load(wordy / "transformer")
    drawing = Drawing.open(wordy, model, model.dtype, model.device)
    drawn = drawing.draw(["a red owl", "owl"], 3, HOW, negative="a")
    embeddings, mask = WordTable.read(wordy).batch(["owl"])
    negative, negative_mask = WordTable.read(wordy).batch(["a"])
    wanted = stock(
        prompt_embeds=embeddings,
        prompt_embeds_mask=mask,
        negative_prompt_embeds=negative,
        negative_prompt_embeds_mask=negative_mask,
        true_cfg_scale=3.0,
        width=48,
        height=32,
        num_inference_steps=2,
        generator=torch.Generator().manual_seed(4),
    ).images[0]
    np.testing.assert_allclose(array(drawn[1]), array(wanted), atol=1 / 255)
    assert drawing.notes(["a purple owl"]) == ["not known here, and left out: purple"]


def test_two_at_once_draw_what_each_draws_alone(wordy):
    model = ppcl_rt.load(wordy / "transformer", resident="all")
    task = task_of(model.catalog, wordy)

    def draw(ratio):
        with model.at(ratio=ratio):
            return array(task.sample(model, ["a red owl"], 0, HOW._replace(steps=6))[0])

    alone = [draw(1.0), draw(0.6)]
    assert not np.array_equal(*alone)
    with concurrent.futures.ThreadPoolExecutor(2) as threads:
        for _ in range(3):
            together = list(threads.map(draw, (1.0, 0.6)))
            assert all(np.array_equal(one, other) for one, other in zip(alone, together))


def test_an_example_is_what_the_pipeline_calls_the_transformer_with(wordy):
    model = ppcl_rt.load(wordy / "transformer", 0.6)
    task = task_of(model.catalog, wordy)
    task.usual = HOW
    call = task.example(model, 2)
    assert call["hidden_states"].shape[0] == 2 and torch.isfinite(model(**call)[0]).all()
    assert not model._forward_pre_hooks


def test_places(folder, made, tmp_path):
    whole = places(str(folder))
    assert whole == (str(folder / "transformer"), folder)
    assert places(str(folder), "other") == ("other", folder)
    assert places(str(folder / "transformer")).pipeline == folder
    assert places(str(made.folder)).pipeline is None
    with pytest.raises(ValueError, match="no folder of a pipeline"):
        places(str(tmp_path), "other")


def test_the_program_draws_and_compares(ppcl, wordy, tmp_path):
    out, prompts, size = tmp_path / "a.png", tmp_path / "prompts.txt", ("--size", "48x32", "--steps", 2)
    prompts.write_text("a red owl\n\nowl\n")
    status, said, err = ppcl("sample", wordy, "--prompts", prompts, "--ratios", "1,0.6", "--out", out, *size)
    assert status == 0 and "4 pictures" in said, err
    with Image.open(out) as picture:
        assert picture.text["prompt"] == "a red owl\nowl" and picture.text["seed"] == "0"
        assert picture.text["ratio"].startswith("1, 0.") and picture.text["checkpoint"] == str(wordy)
        assert [ppcl_rt.Plan.model_validate(plan).depth for plan in json.loads(picture.text["plan"])]
    # One picture alone is the picture, enlarged.
    alone = ("sample", wordy, "--prompt", "a purple owl", "--out", out, *size)
    status, _, err = ppcl(*alone, "--transformer", wordy / "transformer", "--schedule", "1x1,0.6")
    assert status == 0 and "left out: purple" in err
    with Image.open(out) as picture:
        assert picture.size == (192, 128)
    file = tmp_path / "eval.json"
    status, said, err = ppcl("eval", wordy, "--ratios", "1,0.6", "--prompt", "owl", "--json", file, *size)
    assert status == 0, err
    rows = json.loads(file.read_text())
    assert rows[0]["psnr"] is None and rows[0]["ssim"] == 1 and 5 < rows[1]["psnr"] < 100 and rows[1]["ssim"] < 1


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--prompt", " "), "a prompt is empty"),
        ((), "nothing to draw"),
        (("--prompts", "no-such-file"), "cannot be read as text"),
        (("--prompt", "owl", "--seed", -1), "seed"),
        (("--prompt", "owl", "--size", "big"), "a size is like 1024x768"),
        (("--prompt", "owl", "--schedule", "fast"), "a schedule is like"),
        (("--prompt", "owl", "--schedule", "1x2,0.6", "--dense-steps", 2), "give one of them"),
        (("--prompt", "owl", "--ratios", "1,half"), 'not "half"'),
        (("--prompt", "owl", "--ratios", "1", "--ratio", 0.6), "goes without"),
    ],
)
def test_bad_input_is_one_line(ppcl, wordy, tmp_path, options, said):
    status, _, err = ppcl("sample", wordy, *options, "--out", tmp_path / "a.png")
    assert status == 2 and said in err and len(err.strip().splitlines()) == 1 and not (tmp_path / "a.png").exists()
