"""The way back from diffusers' converters: what is called as it was first is read by them as it was here."""

from __future__ import annotations

import pytest
import torch
from diffusers import FluxTransformer2DModel, SD3Transformer2DModel, ZImageTransformer2DModel
from diffusers.loaders import single_file_utils as theirs
from safetensors.torch import save_file

from ppcl_rt.families import original


def equal(got, wanted):
    assert set(got) == set(wanted)
    assert all(torch.equal(got[name], wanted[name]) for name in wanted)


def random_state(model, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.randint(-100, 100, t.shape, generator=generator, dtype=torch.int8).to(dtype)
        for name, t in model.state_dict().items()
    }


@pytest.mark.parametrize("dual", [(), (0, 1)], ids=["3", "3.5-medium"])
def test_sd3(tmp_path, dual):
    model = SD3Transformer2DModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        num_layers=3,
        attention_head_dim=8,
        num_attention_heads=4,
        joint_attention_dim=16,
        caption_projection_dim=32,
        pooled_projection_dim=16,
        pos_embed_max_size=8,
        dual_attention_layers=dual,
        qk_norm="rms_norm",
    )
    state = random_state(model)
    model.load_state_dict(state)
    model.save_pretrained(tmp_path / "stock")
    named = original.to_original(state, original.SD3)
    assert not any(name.startswith("transformer_blocks") for name in named)
    save_file(named, tmp_path / "one.safetensors")
    read = SD3Transformer2DModel.from_single_file(str(tmp_path / "one.safetensors"), config=str(tmp_path / "stock"))
    equal(read.state_dict(), state)


@pytest.mark.parametrize("guidance", [False, True])
def test_flux(guidance):
    """The converter knows width 3072 alone; bytes, so that it takes half a gigabyte."""
    with torch.device("meta"):
        model = FluxTransformer2DModel(
            in_channels=16,
            num_layers=1,
            num_single_layers=1,
            joint_attention_dim=16,
            pooled_projection_dim=16,
            guidance_embeds=guidance,
        )
    state = random_state(model, torch.int8)
    named = original.to_original(state, original.FLUX)
    assert "double_blocks.0.img_attn.qkv.weight" in named and not any("transformer" in name for name in named)
    equal(theirs.convert_flux_transformer_checkpoint_to_diffusers(named), state)


def test_z_image():
    with torch.device("meta"):
        model = ZImageTransformer2DModel(
            in_channels=4,
            dim=32,
            n_layers=2,
            n_refiner_layers=1,
            n_heads=4,
            n_kv_heads=4,
            cap_feat_dim=16,
            axes_dims=[2, 2, 4],
        )
    state = random_state(model)
    named = original.to_original(state, original.Z_IMAGE)
    assert {"layers.1.attention.qkv.weight", "final_layer.linear.weight", "x_embedder.weight"} <= set(named)
    assert not any("to_q" in name or name.startswith("all_") for name in named)
    equal(theirs.convert_z_image_transformer_checkpoint_to_diffusers(named), state)


def test_a_part_that_is_missing_is_an_error():
    with pytest.raises(KeyError, match="to_k"):
        original.to_original({"transformer_blocks.0.attn.to_q.weight": torch.zeros(1, 1)}, original.SD3)
