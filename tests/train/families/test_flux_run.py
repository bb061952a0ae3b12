"""The preset for FLUX.1, scaled down, on a tiny random stand-in of its pipeline: every stage, in bfloat16."""

from importlib.util import find_spec

import pytest
import torch
from diffusers import FluxPipeline, FluxTransformer2DModel
from PIL import Image
from test_qwen_run import SMALL
from tiny_flux import build_stock, pipeline_parts

import ppcl_rt
from ppcl_train import pipeline
from ppcl_train.config.presets import PRESETS
from ppcl_train.config.settings import with_changes
from ppcl_train.data import caching, captioned
from ppcl_train.data.calibration import CHECK, inputs
from ppcl_train.engine.files import read_tensors
from ppcl_train.families import base, pooled
from ppcl_train.families.flux import Flux
from ppcl_train.selectors import selection

if find_spec("webdataset") is None or find_spec("datasets") is None:
    pytest.skip("needs the train extra", allow_module_level=True)

TOKENS, SETTINGS = 8, {**SMALL, "batch": 3, "table.lengths": [2, 3], "measure.samples": 3}


@pytest.fixture(scope="module", autouse=True)
def short_text():
    """Prompts of 8 tokens in place of 512."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Flux, "text_tokens", TOKENS)
        yield


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    return pipeline_parts(tmp_path_factory.mktemp("tokenizers"))


@pytest.fixture(scope="module")
def folder(parts, tmp_path_factory):
    """A whole pipeline, as diffusers saves it."""
    path = tmp_path_factory.mktemp("pipeline")
    FluxPipeline(**parts, transformer=build_stock(pooled_projection_dim=768)).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def encoder(folder):
    return base.of("flux").open(str(folder), device="cpu", dtype=torch.float32, draws=True)


@pytest.fixture(scope="module")
def cache(encoder, captioned_folder, tmp_path_factory):
    path = tmp_path_factory.mktemp("cache")
    more = {"settings": {}, "dtype": torch.float32, "area": 12 * 12, "per_shard": 3}
    caching.cache("flux", encoder, captioned.Folder(captioned_folder), path, **more)
    return path


@pytest.fixture(scope="module")
def config(folder, cache):
    places = {"data.cache": str(cache), "teacher.pretrained": str(folder)}
    return with_changes(PRESETS["flux"], {**places, **SETTINGS})


@pytest.fixture(scope="module")
def finished(config, tmp_path_factory):
    """A complete run."""
    path = tmp_path_factory.mktemp("flux") / "run"
    pipeline.begin(config, path)
    pipeline.run_stages(config, path)
    return path


def test_the_preset_makes_a_checkpoint_that_draws_in_the_pipeline(finished, parts):
    model = ppcl_rt.load(finished / "checkpoint", dtype=torch.float32)
    catalog = model.catalog
    assert catalog.family == "flux" and catalog.compensated
    # Closed forms save as much at these ratios: no student is trained for nothing.
    assert {each.interval for each in selection.read(finished)} >= {each.interval for each in catalog.students}
    # Of random weights no plan may take one: they are made and measured all the same.
    assert any(name.startswith("text_runs.") for name in read_tensors(finished / "width.json"))
    pipe = FluxPipeline(**parts, transformer=model)
    pipe.set_progress_bar_config(disable=True)
    more = {"height": 16, "width": 16, "num_inference_steps": 2, "max_sequence_length": TOKENS, "output_type": "pt"}
    pictures = []
    for ratio in (1.0, 0.75, 0.6):
        model.set_ratio(ratio)
        assert catalog.ratio(model.plan) <= ratio
        pictures.append(pipe("a cat", generator=torch.Generator().manual_seed(0), **more).images)
        assert pictures[-1].isfinite().all()
    assert not torch.equal(pictures[0], pictures[2])


def test_ratio_1_is_the_pretrained_teacher(finished, folder):
    """Bit for bit, rounded to what is stored."""
    stock, packed = ppcl_rt.Checkpoint(folder / "transformer"), ppcl_rt.Checkpoint(finished / "checkpoint")
    for name in stock.names:
        assert torch.equal(packed.read(name), stock.read(name).to(torch.bfloat16)), name


def test_a_narrow_single_block_runs_its_fitted_columns(finished):
    """The layer that reads heads and channels has fitted columns for each count of either, a map and two factors."""
    model = ppcl_rt.load(finished / "checkpoint", dtype=torch.float32, resident="all")
    block = model.single_transformer_blocks[1]
    torch.manual_seed(0)
    call = {"hidden_states": torch.randn(4, 9, 32), "encoder_hidden_states": torch.randn(4, 8, 32)}
    call["temb"] = torch.randn(4, 32)
    assert {"out_heads_2", "out_mlp_64", "out_mlp_0", "modulation_down"} <= set(block.replacements._modules)
    for name, width in (("out_heads_2", {"heads": 2}), ("out_mlp_64", {"mlp": 64})):
        with torch.no_grad():
            fitted = block(**call, width=block.spec.full.replace(**width))
            del block.replacements[name]
            cut = block(**call, width=block.spec.full.replace(**width))
        assert all((one - other).abs().max() > 1e-4 for one, other in zip(fitted, cut, strict=True))


def test_the_teacher_is_called_as_the_pipeline_calls_it(config, folder, encoder):
    """Text, pooled text, positions and guidance of a batch: those that `FluxPipeline` gives its transformer."""
    stock = FluxTransformer2DModel.from_pretrained(folder / "transformer", torch_dtype=torch.bfloat16)
    batch = inputs(with_changes(config, {"teacher.dtype": "bfloat16"}), 3, CHECK)
    call = batch.call
    assert call["encoder_hidden_states"].shape[1:] == (TOKENS, 20) and call["pooled_projections"].shape == (3, 768)
    assert torch.equal(call["guidance"], torch.full((3,), 3.5)) and batch.mask.all()
    frames, rows, columns = 1, call["img_ids"][0, -1, 1] + 1, call["img_ids"][0, -1, 2] + 1
    wanted = FluxPipeline._prepare_latent_image_ids(1, int(rows), int(columns), "cpu", torch.float32)
    assert frames * rows * columns == batch.x.shape[1] and torch.equal(call["img_ids"][1], wanted)
    embedded = encoder.embed("a red square at a1")
    with torch.no_grad():
        *wanted, ids = encoder.pipe.encode_prompt(["a red square at a1"], max_sequence_length=TOKENS)
    for got, each in zip(pooled.apart(embedded[None], 768), wanted, strict=True):
        assert torch.equal(got, each)
    assert ids.shape == call["txt_ids"][0].shape
    with torch.no_grad():
        assert stock(**call)[0].isfinite().all()
    part = batch.part(slice(1, 3)).call
    assert all(len(value) == 2 for value in part.values() if torch.is_tensor(value))


def test_the_other_published_model_takes_no_guidance():
    embeddings = pooled.with_pooled(torch.randn(5, 20), torch.randn(768), 768, "FLUX.1")[None]
    x, t, mask = torch.zeros(1, 6, 16), torch.zeros(1), torch.ones(1, 5, dtype=torch.bool)
    call = base.of("flux-schnell").arguments(x, t, embeddings, mask, (1, 2, 3))
    assert call["guidance"] is None and call["encoder_hidden_states"].shape == (1, 5, 20)
    with pytest.raises(ValueError, match="39 rows with 768 numbers of pooled text"):
        pooled.apart(embeddings[:, :39], 768)


def test_pictures_are_encoded_and_drawn_as_the_pipeline_packs_them(encoder):
    """What the encoder returns decodes to the picture that the VAE makes of its own latents."""
    picture = Image.effect_noise((8, 12), 50).convert("RGB")
    latents, shape = encoder.encode(picture)
    assert latents.shape == (6, 16) and shape == (1, 3, 2)
    pipe = encoder.pipe
    with torch.no_grad():
        pixels = pipe.image_processor.preprocess(picture, height=12, width=8)
        wanted = pipe.vae.encode(pixels).latent_dist.mode()
    unpacked = pipe._unpack_latents(latents[None], 12, 8, pipe.vae_scale_factor)
    torch.testing.assert_close(unpacked / pipe.vae.config.scaling_factor + pipe.vae.config.shift_factor, wanted)
    drawn, shape = encoder.draw("a cat", (8, 12), 0, 2, 1.0, "")
    assert drawn.shape == (6, 16) and shape == (1, 3, 2) and drawn.isfinite().all()
