"""``fit`` of the families after the first: the formula against what forwards hold, and what the VAE decodes."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import tiny_flux
import tiny_sd3
import tiny_z_image
import torch
from torch.utils._pytree import tree_leaves

import ppcl_rt
from ppcl_rt import Tokens
from ppcl_rt.families.flux import PPCLFluxTransformer2DModel
from ppcl_rt.families.sd3 import PPCLSD3Transformer2DModel
from ppcl_rt.families.z_image import PPCLZImageTransformer2DModel
from ppcl_rt.model.fitting import LiveBytes, Vae, decode_bytes
from ppcl_rt.ops import eager

FLUX = {**tiny_flux.CONFIG, "num_layers": 2, "num_single_layers": 2}
WIDE_SD3 = {
    **{"attention_head_dim": 64, "num_attention_heads": 4, "caption_projection_dim": 256},
    **{"num_layers": 2, "dual_attention_layers": (0,), "qk_norm": "rms_norm"},
}
# name -> class, config
MODELS = {
    "flux": (PPCLFluxTransformer2DModel, FLUX),
    "flux-wide": (
        PPCLFluxTransformer2DModel,
        {**FLUX, "attention_head_dim": 64, "num_attention_heads": 4, "axes_dims_rope": (16, 24, 24)},
    ),
    **{
        f"sd3-{name}": (PPCLSD3Transformer2DModel, {**tiny_sd3.CONFIG, **variant, "num_layers": 3})
        for name, variant in tiny_sd3.VARIANTS.items()
    },
    "sd3-wide": (
        PPCLSD3Transformer2DModel,
        {**tiny_sd3.CONFIG, **WIDE_SD3},
    ),
    "z-image": (PPCLZImageTransformer2DModel, tiny_z_image.CONFIG),
    "z-image-wide": (
        PPCLZImageTransformer2DModel,
        {**tiny_z_image.CONFIG, "dim": 256, "n_heads": 4, "n_kv_heads": 4, "axes_dims": (16, 24, 24)},
    ),
}


def build(name, dtype=torch.float32):
    torch.manual_seed(0)
    kind, config = MODELS[name]
    return kind(**config).to(dtype).eval()


def held(model, tokens) -> int:
    """Bytes of the inputs of a dense forward and of the tensors that it makes, those that live at once."""
    inputs = model.example(tokens)
    with torch.no_grad():
        # Caches are filled first.
        model(**inputs)
        with LiveBytes() as live:
            model(**inputs)
    return live.peak + sum(value.nbytes for value in tree_leaves(inputs) if isinstance(value, torch.Tensor))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tokens", [(15, 7, 3), (128, 32, 2), (32, 128)], ids=str)
@pytest.mark.parametrize("name", list(MODELS))
def test_a_forward_holds_what_the_formula_says(name, tokens, dtype, monkeypatch):
    """Plain torch as on a GPU: on a CPU, float32 is computed in place."""
    model, tokens = build(name, dtype), Tokens(*tokens)
    said = model.activation_bytes(model.config, tokens, dtype.itemsize)
    if dtype == torch.float32:
        assert held(model, tokens) <= said
        monkeypatch.setattr(eager, "suits", lambda x: False)
    here = held(model, tokens)
    # It counts what the first block of a text run read, which the dense plan has not, and what is small twice: 1.16
    # times at 15 + 7 tokens, 1.13 times with more text than image, elsewhere 1.00 to 1.09 times.
    most = 1.16 if tokens.image == 15 else 1.14 if tokens.image < tokens.text else 1.1
    assert here <= said <= most * here


PARTS = {"flux": tiny_flux.pipeline_parts, "sd3-sd3": tiny_sd3.pipeline_parts, "z-image": tiny_z_image.pipeline_parts}


@pytest.mark.parametrize("name", list(PARTS))
def test_a_pipeline_leaves_room(name, tmp_path):
    """Each part of it counts, and what the VAE decodes of 6 x 4 tokens has their pixels: 2 x 2 latents a token."""
    model, parts = build(name), PARTS[name](tmp_path)
    tokens, vae = Tokens(24, 8, 2), parts["vae"]
    latents = model.latents_of(vae.config, tokens)
    with torch.no_grad():
        pixels = vae.decode(torch.zeros(latents)).sample
    scale = 2 ** (len(vae.config["block_out_channels"]) - 1)
    assert pixels.shape == (2, 3, 4 * 2 * scale, 6 * 2 * scale)
    room = model.room("100MB", pipeline=SimpleNamespace(components={**parts, "transformer": model}), shape=tokens)
    modules = {part: module for part, module in parts.items() if isinstance(module, torch.nn.Module)}
    assert room.parts.keys() == modules.keys() and all(room.parts.values())
    assert room.decode == decode_bytes(Vae(type(vae), vae.config, torch.float32, {}), type(model), tokens) > 0
    assert room.activations == model.activation_bytes(model.config, tokens, 4)
    assert room.left == 1e8 - sum(room.parts.values()) - max(room.activations, room.decode)


@pytest.mark.parametrize("family", ["sd3", "z-image"])
def test_fit_is_a_budget(family, tmp_path):
    """A checkpoint that is loaded to fit holds no more than what its own activations leave."""
    folder = tmp_path / "checkpoint"
    if family == "sd3":
        tiny_sd3.make_checkpoint(folder, "medium")
    else:
        tiny_z_image.make_checkpoint(folder)
    dense = ppcl_rt.load(folder)
    shape = Tokens(24, 8, 2)
    rest = dense.room(1e9, shape=shape).rest
    assert rest == dense.activation_bytes(dense.config, shape, 4)
    model = ppcl_rt.load(folder, fit=rest + 0.85 * dense.resident_bytes, shape=shape)
    assert model.resident_bytes <= 0.85 * dense.resident_bytes
    assert model.plan == dense.plan_of(ppcl_rt.Budget.of(memory=0.85 * dense.resident_bytes))
