"""What diffusers' own tests ask of its transformers, asked of ours: seeds, variants, processors, caches, tracing."""

from __future__ import annotations

import logging

import diffusers
import pytest
import tiny_flux
import tiny_sd3
import tiny_z_image
import torch

import ppcl_rt

QWEN = {
    "patch_size": 2,
    "in_channels": 16,
    "out_channels": 4,
    "num_layers": 2,
    "attention_head_dim": 8,
    "num_attention_heads": 4,
    "joint_attention_dim": 12,
    "axes_dims_rope": (2, 2, 4),
}
CONFIGS = {
    "QwenImageTransformer2DModel": QWEN,
    "FluxTransformer2DModel": {**tiny_flux.CONFIG, "num_layers": 2, "num_single_layers": 2},
    "SD3Transformer2DModel": {**tiny_sd3.CONFIG, "num_layers": 3, **tiny_sd3.VARIANTS["medium"]},
    "ZImageTransformer2DModel": {**tiny_z_image.CONFIG, "n_layers": 2, "n_refiner_layers": 1},
}


def built(name, ours=True, seed=0):
    torch.manual_seed(seed)
    return getattr(ppcl_rt if ours else diffusers, ("PPCL" if ours else "") + name)(**CONFIGS[name]).eval()


@pytest.mark.parametrize("name", CONFIGS)
def test_a_seed_draws_the_weights_of_the_stock_class(name):
    """Built by hand under a seed, a model has the weights that diffusers' class has under it."""
    wanted, got = built(name, ours=False).state_dict(), built(name).state_dict()
    assert list(got) == list(wanted)
    assert all(torch.equal(got[key], wanted[key]) for key in wanted)


@pytest.mark.parametrize("size", ["10GB", "20KB"])
def test_variants(size, tmp_path):
    """`save_pretrained` names files as diffusers does for a variant; both classes read them, and only as that."""
    name = "QwenImageTransformer2DModel"
    model, folder = built(name), tmp_path / "saved"
    model.save_pretrained(folder, variant="fp16", max_shard_size=size)
    files = sorted(path.name for path in folder.glob("*.safetensors*"))
    if size == "10GB":
        assert files == ["diffusion_pytorch_model.fp16.safetensors"]
    else:
        assert files[0].startswith("diffusion_pytorch_model.fp16-00001-of-000")
        assert files[-1] == "diffusion_pytorch_model.safetensors.index.fp16.json"
    wanted = model.state_dict()
    stock = getattr(diffusers, name).from_pretrained(folder, variant="fp16")
    for read in (ppcl_rt.load(folder, variant="fp16"), type(model).from_pretrained(folder, variant="fp16"), stock):
        got = read.state_dict()
        assert all(torch.equal(got[key], wanted[key]) for key in wanted)
    # diffusers' callers catch OSError and look for these words; ours get a ValueError.
    for error in (OSError, ValueError):
        with pytest.raises(error, match=r'no file named diffusion_pytorch_model.bin found.*say variant="fp16"'):
            type(model).from_pretrained(folder)
    with pytest.raises(ValueError, match='say variant="fp16"'):
        ppcl_rt.load(folder, variant="bf16")
    with pytest.raises(ValueError, match="holds weights of variant fp16, weights without a variant need a folder of"):
        model.save_pretrained(folder)
    assert sorted(path.name for path in folder.glob("*.safetensors*")) == files


def test_a_stock_folder_with_two_variants(tmp_path):
    """A folder of diffusers may hold several: each is read by its name."""
    name = "QwenImageTransformer2DModel"
    plain, other = built(name, ours=False), built(name, ours=False, seed=1)
    plain.save_pretrained(tmp_path)
    other.save_pretrained(tmp_path, variant="ema")
    for variant, wanted in ((None, plain), ("ema", other)):
        got = ppcl_rt.load(tmp_path, variant=variant).state_dict()
        assert all(torch.equal(got[key], value) for key, value in wanted.state_dict().items())


def test_no_pickle(tmp_path, caplog):
    """`safe_serialization=False` writes safetensors all the same; the log says so once."""
    ppcl_rt.messages.say_once.cache_clear()
    with caplog.at_level(logging.WARNING):
        for again in ("first", "second"):
            built("QwenImageTransformer2DModel").save_pretrained(tmp_path / again, safe_serialization=False)
            assert [path.name for path in (tmp_path / again).glob("diffusion*")] == [
                "diffusion_pytorch_model.safetensors"
            ]
    assert [record.message for record in caplog.records if "safetensors" in record.message] == [
        "safe_serialization=False would write pickle: safetensors are written all the same"
    ]
