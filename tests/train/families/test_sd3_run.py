"""The preset for Stable Diffusion 3.5, scaled down, on a tiny random stand-in of its pipeline: every stage."""

from importlib.util import find_spec

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from PIL import Image
from test_qwen_run import SMALL
from tiny_sd3 import build_stock, pipeline_parts

import ppcl_rt
from ppcl_train import pipeline
from ppcl_train.config.presets import PRESETS
from ppcl_train.config.settings import with_changes
from ppcl_train.data import caching, calibration, captioned
from ppcl_train.data.calibration import inputs
from ppcl_train.families import base, pooled
from ppcl_train.families.sd3 import SD3
from ppcl_train.stages.width import modulation_inputs

if find_spec("webdataset") is None or find_spec("datasets") is None:
    pytest.skip("needs the train extra", allow_module_level=True)

# 5 tokens of CLIP and 4 of T5, in place of 77 and 256. Blocks 0 and 1 have dual attention, 2 and 3 have not.
T5_TOKENS, TOKENS, DEPTH = 4, 9, 5
# Channels alone hardly make it smaller: plans take students.
SETTINGS = {**SMALL, "width.channels": [0.9], "width.maps": False, "batch": 3, "measure.samples": 3}


@pytest.fixture(scope="module", autouse=True)
def short_text():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SD3, "t5_tokens", T5_TOKENS)
        yield


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    return pipeline_parts(tmp_path_factory.mktemp("tokenizers"))


@pytest.fixture(scope="module")
def folder(parts, tmp_path_factory):
    """A whole pipeline, as diffusers saves it."""
    path = tmp_path_factory.mktemp("pipeline")
    stock = build_stock("medium", num_layers=DEPTH, dual_attention_layers=(0, 1), pooled_projection_dim=2048)
    StableDiffusion3Pipeline(**parts, transformer=stock).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def encoder(folder):
    return base.of("sd3").open(str(folder), device="cpu", dtype=torch.float32, draws=False)


@pytest.fixture(scope="module")
def cache(encoder, captioned_folder, tmp_path_factory):
    path = tmp_path_factory.mktemp("cache")
    more = {"settings": {}, "dtype": torch.float32, "area": 12 * 12, "per_shard": 3}
    caching.cache("sd3", encoder, captioned.Folder(captioned_folder), path, **more)
    return path


@pytest.fixture(scope="module")
def config(folder, cache):
    places = {"data.cache": str(cache), "teacher.pretrained": str(folder)}
    return with_changes(PRESETS["sd3"], {**places, **SETTINGS})


@pytest.fixture(scope="module")
def finished(config, tmp_path_factory):
    """A complete run."""
    path = tmp_path_factory.mktemp("sd3") / "run"
    pipeline.begin(config, path)
    pipeline.run_stages(config, path)
    return path


def test_the_preset_makes_a_checkpoint_that_draws_in_the_pipeline(finished, parts):
    """Several ratios in the stock pipeline, with guidance and with layers skipped; students stay within a kind."""
    model = ppcl_rt.load(finished / "checkpoint", dtype=torch.float32)
    catalog = model.catalog
    assert catalog.family == "sd3" and catalog.compensated and catalog.students and catalog.text_runs
    assert {student.interval.key for student in catalog.students} <= {"0-1", "2-3"}
    assert {run.interval.key for run in catalog.text_runs} == {"0-1", "2-3"}
    pipe = StableDiffusion3Pipeline(**parts, transformer=model)
    pipe.set_progress_bar_config(disable=True)
    more = {"height": 16, "width": 16, "num_inference_steps": 3, "max_sequence_length": T5_TOKENS, "output_type": "pt"}
    skipping = {"skip_guidance_layers": [1], "skip_layer_guidance_start": 0.0, "skip_layer_guidance_stop": 0.9}
    pictures = []
    for ratio, extra in ((1.0, {}), (1.0, skipping), (0.75, {}), (0.6, {}), (0.6, skipping)):
        model.set_ratio(ratio)
        assert catalog.ratio(model.plan) <= ratio
        pictures.append(pipe("a cat", generator=torch.Generator().manual_seed(0), **more, **extra).images)
        assert pictures[-1].isfinite().all()
    assert not any(torch.equal(pictures[a], pictures[b]) for a, b in ((0, 1), (0, 3), (3, 4)))


def test_the_pipeline_draws_the_same_with_the_stock_transformer(folder, parts):
    """The dense plan in place of diffusers' class: the same picture."""
    stock = SD3Transformer2DModel.from_pretrained(folder / "transformer")
    more = {"height": 16, "width": 24, "num_inference_steps": 2, "max_sequence_length": T5_TOKENS, "output_type": "pt"}
    pictures = []
    for transformer in (stock, ppcl_rt.load(folder / "transformer")):
        pipe = StableDiffusion3Pipeline(**parts, transformer=transformer)
        pipe.set_progress_bar_config(disable=True)
        pictures.append(pipe("a cat", generator=torch.Generator().manual_seed(0), **more).images)
    # Pixels in [0, 1]; latents differ by 1e-5.
    torch.testing.assert_close(pictures[0], pictures[1], atol=1e-4, rtol=0)


def test_ratio_1_is_the_pretrained_teacher(finished, folder):
    """Bit for bit, rounded to what is stored."""
    stock, packed = ppcl_rt.Checkpoint(folder / "transformer"), ppcl_rt.Checkpoint(finished / "checkpoint")
    for name in stock.names:
        assert torch.equal(packed.read(name), stock.read(name).to(torch.bfloat16)), name


def test_the_teacher_is_called_as_the_pipeline_calls_it(config, encoder):
    """Tokens and pooled text are the pipeline's; timesteps go to 1000; latents are images."""
    batch = inputs(config, 3, calibration.CHECK)
    call = batch.call
    assert call["encoder_hidden_states"].shape[1:] == (TOKENS, 16) and call["pooled_projections"].shape == (3, 2048)
    assert torch.equal(call["timestep"], 1000 * batch.t) and batch.x.shape[:2] == (3, 4) and batch.x.ndim == 4
    embedded = encoder.embed("a red square at a1")
    more = {"device": "cpu", "max_sequence_length": T5_TOKENS}
    with torch.no_grad():
        wanted = encoder.pipe.encode_prompt(["a red square at a1"], None, None, **more)
    tokens, pooled_text = pooled.apart(embedded[None], 2048)
    assert torch.equal(tokens, wanted[0]) and torch.equal(pooled_text, wanted[2])


def test_what_modulations_read_covers_timesteps_and_texts(config, folder):
    """Fits of modulations see the pooled text of many captions, at timesteps as the transformer is given them."""
    model = ppcl_rt.load(folder / "transformer", dtype=torch.bfloat16)
    read = modulation_inputs(config, model)
    assert set(read) == {"dual-attention", "two-stream", "last"} and len(read["last"]) == 512
    texts = set()
    for number, t in enumerate(torch.linspace(0, 1, 512).split(3)[:20]):
        call = inputs(config, len(t), calibration.WIDTH + number, t).call
        with torch.no_grad():
            temb = model.time_text_embed(1000 * t, call["pooled_projections"])
        assert torch.equal(read["last"][3 * number : 3 * number + 3], F.silu(temb))
        texts |= {tuple(text[:8].tolist()) for text in call["pooled_projections"]}
    # Two captions begin with the same three letters, which is all that this CLIP reads; and the empty one.
    assert len(texts) >= 6


def test_pictures_are_encoded_and_drawn_as_the_pipeline_has_them(folder, encoder):
    """Latents that the VAE decodes to what it makes of its own; one more dtype of the transformer for drawing."""
    picture = Image.effect_noise((8, 12), 50).convert("RGB")
    latents, shape = encoder.encode(picture)
    assert latents.shape == (4, 6, 4) and shape == (1, 3, 2)
    pipe = encoder.pipe
    with torch.no_grad():
        wanted = pipe.vae.encode(pipe.image_processor.preprocess(picture, height=12, width=8)).latent_dist.mode()[0]
    torch.testing.assert_close(latents / pipe.vae.config.scaling_factor + pipe.vae.config.shift_factor, wanted)
    drawer = base.of("sd3").open(str(folder), device="cpu", dtype=torch.float32, draws=True)
    drawn, shape = drawer.draw("a cat", (8, 12), 0, 2, 3.0, "")
    assert drawn.shape == (4, 6, 4) and shape == (1, 3, 2) and drawn.isfinite().all()


def test_the_preset_has_the_timesteps_of_its_pipeline():
    """scheduler/scheduler_config.json of the published model: a shift of 3, and nothing that depends on the size."""
    scheduler, sampler = FlowMatchEulerDiscreteScheduler(shift=3.0), PRESETS["sd3"].sampler
    scheduler.set_timesteps(sampler.steps)
    # Its grid has another form: 0.0013 apart.
    assert np.abs(np.array(sampler.times()) - scheduler.sigmas.numpy()).max() < 2e-3


def test_what_is_no_such_pipeline_is_refused(folder, tmp_path):
    """An empty folder; a folder without a VAE; pooled text of another model."""
    (tmp_path / "transformer").symlink_to(folder / "transformer")
    for place in (tmp_path, folder / "vae"):
        with pytest.raises(ValueError, match="cannot be opened as an SD3 pipeline"):
            base.of("sd3").open(str(place), device="cpu", dtype=torch.float32, draws=False)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(ValueError, match="has 2048 channels, SD3 has 768"):
        patch.setattr(SD3, "pooled_channels", 768)
        base.of("sd3").open(str(folder), device="cpu", dtype=torch.float32, draws=False).embed("a cat")
