"""The pipeline that the repository ships, `examples/emoji`: what README and docs say of it."""

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLQwenImage, QwenImagePipeline, QwenImageTransformer2DModel

import ppcl_rt
from ppcl_rt.pipelines.task import task_of
from ppcl_train.emoji.artwork import artwork
from ppcl_train.emoji.captions import Caption
from ppcl_train.emoji.judging import Judge
from ppcl_train.families.emoji_autoencoder import flattened
from ppcl_train.stages.autoencoder import reconstructed

FOLDER = Path(__file__).parents[3] / "examples" / "emoji"
PROMPT, SEED = "woman astronaut: light skin tone", 3


def loaded(ratio):
    return ppcl_rt.load(FOLDER / "transformer", ratio, dtype=torch.float32)


def opened(transformer):
    return QwenImagePipeline.from_pretrained(
        FOLDER, transformer=transformer, text_encoder=None, tokenizer=None, torch_dtype=torch.float32
    )


def drawn(pipe, table, how, output_type="np"):
    """What people would write: an array in [0, 1], or latents."""
    embeddings, mask = table.batch([PROMPT])
    none, none_mask = table.batch([""])
    return pipe(
        prompt_embeds=embeddings,
        prompt_embeds_mask=mask,
        negative_prompt_embeds=none,
        negative_prompt_embeds_mask=none_mask,
        width=how.size[0],
        height=how.size[1],
        num_inference_steps=how.steps,
        true_cfg_scale=how.guidance,
        generator=torch.Generator().manual_seed(SEED),
        output_type=output_type,
    ).images[0]


@pytest.mark.parametrize("ratio", [0.7, 0.35])
def test_the_stock_pipeline_draws_what_the_program_does(ratio):
    model = loaded(ratio)
    task = task_of(model.catalog, FOLDER)
    drawing = task.drawing(model)
    [ours] = drawing.draw([PROMPT], SEED, task.usual, as_latents=True)
    torch.testing.assert_close(ours, drawn(opened(model), drawing.table, task.usual, "latent"), rtol=0, atol=1e-3)
    stock = drawn(opened(model), drawing.table, task.usual)
    [picture] = task.sample(model, [PROMPT], SEED)
    # A picture of the program is rounded to whole numbers up to 255.
    np.testing.assert_allclose(np.asarray(picture), (stock * 255).round(), atol=1)
    assert np.abs(np.asarray(picture) / 255 - stock).mean() < 1e-3


def test_with_its_own_class_it_draws_the_dense_model():
    dense = loaded(1.0)
    task = task_of(dense.catalog, FOLDER)
    table = task.drawing(dense).table
    stock = QwenImageTransformer2DModel.from_pretrained(FOLDER / "transformer", torch_dtype=torch.float32)
    ours, theirs = (drawn(opened(model), table, task.usual) for model in (dense, stock))
    np.testing.assert_allclose(ours, theirs, atol=1e-3)
    # As it is opened without saying a class.
    alone = QwenImagePipeline.from_pretrained(FOLDER, text_encoder=None, tokenizer=None)
    assert type(alone.transformer) is QwenImageTransformer2DModel


def test_it_is_small_enough_to_be_shipped():
    assert sum(path.stat().st_size for path in FOLDER.rglob("*") if path.is_file()) <= 24e6
    assert "OpenMoji" in (FOLDER / "NOTICE").read_text()
    assert loaded(0.5).catalog.license == "cc-by-sa-4.0"


@pytest.mark.parametrize("count", [400, pytest.param(3953, marks=pytest.mark.slow)])
def test_the_judge_passes_what_the_autoencoder_makes_of_the_originals(count):
    art = artwork()
    # In two dimensions, which is what it computes of one frame, and three times as fast.
    vae = flattened(AutoencoderKLQwenImage.from_pretrained(FOLDER / "vae", torch_dtype=torch.float32))
    picks = np.random.default_rng(0).permutation(len(art.captions))[:count]
    verdicts = Judge(art).judge([art.captions[pick] for pick in picks], reconstructed(vae, art.pictures[picks]))
    assert verdicts.exact.mean() >= 0.99


@pytest.mark.parametrize("ratio", [1.0, 0.7, 0.5, 0.35])
def test_what_it_draws_can_be_told(ratio):
    """The prompts of README's sheet: people, whom training never saw so, at every ratio; the rest down to 0.7."""
    model = loaded(ratio)
    task = task_of(model.catalog, FOLDER)
    captions = [Caption(prompt) for prompt in task.demo_prompts]
    held_out = [caption.held_out for caption in captions]
    assert sum(held_out) == 4
    assert task.verdicts(model, captions, 0).role[held_out if ratio < 0.7 else slice(None)].all()
