"""Original names: what our table calls so, diffusers' converters and our own way back read as it was here."""

from __future__ import annotations

import pytest
import torch
from diffusers import FluxTransformer2DModel, SD3Transformer2DModel, ZImageTransformer2DModel
from diffusers.loaders import single_file_utils as theirs
from safetensors.torch import save_file

import ppcl_rt
from ppcl_rt.convert.convert import convert
from ppcl_rt.convert.export import export
from ppcl_rt.families.flux import PPCLFluxTransformer2DModel, positions
from ppcl_rt.families.sd3 import PPCLSD3Transformer2DModel
from ppcl_rt.families.z_image import PPCLZImageTransformer2DModel


def equal(got, wanted):
    assert set(got) == set(wanted)
    assert all(torch.equal(got[name], wanted[name]) for name in wanted)


def random_state(model, dtype=torch.float32):
    """Integers, so that an 8-bit dtype holds them; of a prime period, so that no two rows are alike."""
    period = torch.randint(-100, 100, (999_983,), generator=torch.Generator().manual_seed(0), dtype=torch.int8)
    state, begin = {}, 0
    for name, tensor in model.state_dict().items():
        count = tensor.numel()
        rolled = period.roll(-begin).repeat(-(-count // len(period)))[:count]
        state[name] = rolled.view(tensor.shape).to(dtype)
        begin = (begin + count + 1) % len(period)
    return state


def there_and_back(family, state):
    """What tensors were called, after our own table has found them all again."""
    named = family.to_original(state)
    equal(family.from_original(named, {name: tuple(tensor.shape) for name, tensor in state.items()}), state)
    return named


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
    named = there_and_back(PPCLSD3Transformer2DModel, state)
    assert not any(name.startswith("transformer_blocks") for name in named)
    save_file(named, tmp_path / "one.safetensors")
    read = SD3Transformer2DModel.from_single_file(str(tmp_path / "one.safetensors"), config=str(tmp_path / "stock"))
    equal(read.state_dict(), state)


@pytest.mark.parametrize("guidance", [pytest.param(False, marks=pytest.mark.slow), True])
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
    named = there_and_back(PPCLFluxTransformer2DModel, state)
    assert "double_blocks.0.img_attn.qkv.weight" in named and not any("transformer" in name for name in named)
    equal(theirs.convert_flux_transformer_checkpoint_to_diffusers(named), state)


@pytest.mark.slow
def test_flux_runs_from_a_single_file(tmp_path, run):
    """Width 3072, a block of each kind, bfloat16: 1 GB. From our file diffusers makes the model of our folder."""
    config = {"num_layers": 1, "num_single_layers": 1, "joint_attention_dim": 16, "pooled_projection_dim": 16}
    with torch.device("meta"):
        stock = FluxTransformer2DModel(in_channels=16, guidance_embeds=True, **config)
    state = random_state(stock, torch.bfloat16)
    for name, tensor in state.items():
        # Of a size that outputs can be compared at.
        tensor.mul_(2e-4).add_(1 if ".norm_" in name else 0)
    stock.load_state_dict(state, assign=True)
    stock.save_pretrained(tmp_path / "stock")
    model = ppcl_rt.load(tmp_path / "stock")
    export(model, tmp_path / "out", "diffusers")
    export(model, tmp_path / "one.safetensors", "single-file")
    generator = torch.Generator().manual_seed(0)
    noise = {"hidden_states": (1, 15, 16), "encoder_hidden_states": (1, 7, 16), "pooled_projections": (1, 16)}
    given = {name: torch.randn(shape, generator=generator).bfloat16() for name, shape in noise.items()}
    given |= {"timestep": torch.tensor([0.5]), "guidance": torch.tensor([3.5])}
    given |= {"img_ids": positions(3, 5), "txt_ids": torch.zeros(7, 3)}
    folder, file = str(tmp_path / "out"), str(tmp_path / "one.safetensors")
    wanted = run(FluxTransformer2DModel.from_pretrained(folder, torch_dtype=torch.bfloat16), given)
    got = run(FluxTransformer2DModel.from_single_file(file, config=folder, torch_dtype=torch.bfloat16), given)
    assert wanted.isfinite().all() and wanted.std() > 0.01 and torch.equal(got, wanted)
    convert(tmp_path / "one.safetensors", tmp_path / "again")
    equal(FluxTransformer2DModel.from_pretrained(tmp_path / "again", torch_dtype=torch.bfloat16).state_dict(), state)


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
    named = there_and_back(PPCLZImageTransformer2DModel, state)
    assert {"layers.1.attention.qkv.weight", "final_layer.linear.weight", "x_embedder.weight"} <= set(named)
    assert not any("to_q" in name or name.startswith("all_") for name in named)
    equal(theirs.convert_z_image_transformer_checkpoint_to_diffusers(named), state)


def test_a_part_that_is_missing_is_an_error():
    with pytest.raises(KeyError, match="to_k"):
        PPCLSD3Transformer2DModel.to_original({"transformer_blocks.0.attn.to_q.weight": torch.zeros(1, 1)})
