"""The preset for Z-Image, scaled down, on a tiny random pipeline: a cache, every stage, a checkpoint that runs."""

from importlib.util import find_spec

import pytest
import torch
from diffusers import ZImagePipeline
from test_z_image import moved
from tiny_z_image import RAGGED, build_inputs, build_stock, pipeline_parts

import ppcl_rt
from ppcl_train import pipeline
from ppcl_train.config.presets import PRESETS
from ppcl_train.config.settings import with_changes
from ppcl_train.data import caching, captioned
from ppcl_train.families import base as families

if find_spec("webdataset") is None or find_spec("datasets") is None:
    pytest.skip("needs the train extra", allow_module_level=True)

# Sizes and steps alone: everything else is the preset's.
SMALL = {
    "tracker": "none",
    "pictures.prompts": ["a cat"],
    "pictures.ratios": [0.7],
    "batch": 4,
    "save_every": 2,
    "table.lengths": [2],
    "table.batches": 2,
    "table.batch": 2,
    "table.samples": 4,
    "table.steps": 3,
    "table.trial_steps": 1,
    "table.least_ratio": 0.75,
    "recover.least_ratio": 0.75,
    "students.steps": 4,
    "students.batch": 2,
    "width.samples": 16,
    "width.heads": [0.5],
    "width.channels": [0.5],
    "recover.steps": 4,
    "recover.batch": 2,
    "measure.samples": 4,
    "measure.spacing": 0.25,
    "measure.other_spacing": 0.5,
}


@pytest.fixture(scope="module")
def finished(captioned_folder, tmp_path_factory):
    """A complete run from a pretrained pipeline and a cache of captioned images."""
    folder = tmp_path_factory.mktemp("z_image")
    parts = pipeline_parts(folder)
    ZImagePipeline(**parts, transformer=build_stock(dim=64, n_heads=8, n_kv_heads=8)).save_pretrained(
        folder / "pipeline"
    )
    encoder = families.of("z-image").open(str(folder / "pipeline"), device="cpu", dtype=torch.float32, draws=False)
    more = {"settings": {}, "dtype": torch.float32, "area": 32 * 32, "per_shard": 3}
    caching.cache("z-image", encoder, captioned.Folder(captioned_folder), folder / "cache", **more)
    places = {"data.cache": str(folder / "cache"), "teacher.pretrained": str(folder / "pipeline")}
    config = with_changes(PRESETS["z-image"], {**places, **SMALL})
    pipeline.begin(config, folder / "run")
    pipeline.run_stages(config, folder / "run")
    return folder


def test_the_preset_makes_a_checkpoint_of_its_teacher(finished, run):
    """Ratio 1 is the teacher bit for bit; other ratios run, without biases in what stands in for parts."""
    stock = ppcl_rt.Checkpoint(finished / "pipeline" / "transformer")
    packed = ppcl_rt.Checkpoint(finished / "run" / "checkpoint")
    for name in stock.names:
        assert torch.equal(packed.read(name), stock.read(name).to(torch.bfloat16)), name
    assert packed.catalog is not None and packed.catalog.family == "z-image" and packed.catalog.compensated
    assert not [name for name in packed.names if ".replacements." in name and name.endswith(".bias")]
    model = ppcl_rt.load(finished / "run" / "checkpoint", dtype=torch.float32)
    inputs, outputs = build_inputs(RAGGED[:2]), []
    for ratio in (1.0, 0.9, 0.75):
        model.set_ratio(ratio)
        assert model.catalog.ratio(model.plan) <= ratio
        outputs.append(run(model, inputs))
        assert all(each.isfinite().all() for each in outputs[-1])
    assert moved(outputs[0], outputs[2]) > 1e-3


def test_the_encoder_draws_what_it_encodes(finished):
    """Latents of the shape that training takes, from the same prompt and seed the same."""
    encoder = families.of("z-image").open(str(finished / "pipeline"), device="cpu", dtype=torch.float32, draws=True)
    drawn, shape = encoder.draw("a cat", (32, 24), 0, 2, 1.0, "")
    assert drawn.shape == (4, 12, 16) and shape == (1, 6, 8)
    assert torch.equal(drawn, encoder.draw("a cat", (32, 24), 0, 2, 1.0, "")[0])


def test_what_training_calls_the_transformer_with():
    """Clean image = x + t (x_0 - noise): the transformer is given 1 - t, and its list becomes one tensor."""
    from ppcl_train.data.calibration import Inputs

    family, generator = families.of("z-image"), torch.Generator().manual_seed(0)
    clean, noise = torch.randn(2, 3, 4, 4, 4, generator=generator)
    t = torch.tensor([0.2, 0.5, 1.0])
    x = torch.lerp(clean, noise, t[:, None, None, None])
    mask = torch.arange(40) < torch.tensor([7, 32, 40])[:, None]
    call = family.arguments(x, t, torch.zeros(3, 40, 16), mask, (1, 2, 2))
    assert [len(text) for text in call["cap_feats"]] == [7, 32, 40] and call["x"][0].shape == (4, 1, 4, 4)
    assert torch.equal(call["t"], 1 - t)
    tokens = family.counted_tokens(mask)
    assert tokens.sum(1).tolist() == [32, 32, 64] and tokens.shape == (3, 64)
    given = Inputs(x, t, call, family.predicts, text_tokens=tokens)
    output = list((clean - noise).unsqueeze(2))
    torch.testing.assert_close(given.clean(output), clean)
    part = given.part(slice(1, 3))
    assert torch.equal(part.mask, tokens[1:]) and len(part.call["cap_feats"]) == 2
