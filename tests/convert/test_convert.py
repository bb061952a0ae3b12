"""What others publish becomes a folder of diffusers with the same weights, or is refused in one line."""

from __future__ import annotations

import json

import pytest
import torch
from diffusers import QwenImageTransformer2DModel
from safetensors.torch import load_file, save_file

import ppcl_rt
from ppcl_rt.checkpoint.card import CARD, Origin, read_origin
from ppcl_rt.convert import naming
from ppcl_rt.convert.convert import convert
from ppcl_rt.families import registry

FLOAT8 = torch.float8_e4m3fn


@pytest.fixture(scope="module")
def stock(build_stock, tmp_path_factory):
    """A stock model, its folder, and its weights as a single file."""
    folder = tmp_path_factory.mktemp("convert")
    model = build_stock(5)
    model.save_pretrained(folder / "stock")
    (folder / "stock" / CARD).write_text("---\nlicense: apache-2.0\nbase_model: a/b\n---\n")
    save_file({name: t.contiguous() for name, t in model.state_dict().items()}, folder / "one.safetensors")
    return model, folder


def weights(folder):
    return QwenImageTransformer2DModel.from_pretrained(folder).state_dict()


def equal(one, other):
    assert set(one) == set(other)
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_a_single_file(stock, ppcl, tmp_path, build_inputs, run, same, prefix):
    """Of the transformer alone, or of a whole pipeline, whose other parts are left out."""
    model, folder = stock
    held = {prefix + name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    if prefix:
        held["first_stage_model.decoder.conv_in.weight"] = torch.zeros(3)
    save_file(held, tmp_path / "tune.safetensors")
    status, _, err = ppcl("convert", tmp_path / "tune.safetensors", tmp_path / "out", "--config", folder / "stock")
    assert status == 0, err
    equal(weights(tmp_path / "out"), model.state_dict())
    assert read_origin(tmp_path / "out") == Origin("a/b", "apache-2.0")
    given = build_inputs(0)
    same(run(ppcl_rt.load(tmp_path / "out"), given), run(model, given))


def test_a_file_of_ours_says_its_config(stock, ppcl, tmp_path):
    """stock -> single file -> stock: nothing else is needed, and the origin comes along."""
    model, folder = stock
    assert ppcl("export", folder / "stock", tmp_path / "x.safetensors", "--format", "single-file")[0] == 0
    convert(tmp_path / "x.safetensors", tmp_path / "out")
    equal(weights(tmp_path / "out"), model.state_dict())
    assert read_origin(tmp_path / "out") == Origin("a/b", "apache-2.0")


def test_families_of_other_packages_are_passed_over(monkeypatch):
    """Their classes are not diffusers'."""
    mine = registry.Registered(model="mine:Mine", stock="MineTransformer")
    monkeypatch.setattr(registry, "_FAMILIES", {"mine": mine, **registry._FAMILIES})
    with pytest.raises(ValueError, match="--config FOLDER"):
        naming.guessed_config({"x": torch.zeros(1)}, "a file")


def test_default_settings_are_found_by_the_tensors(stock, monkeypatch):
    """A file without a config is of the family whose class has these tensors; the real defaults are 60 wide blocks."""
    family = ppcl_rt.PPCLQwenImageTransformer2DModel
    config = {"_class_name": family.stock_name, "num_layers": 2}
    empty = {name: torch.empty(shape, device="meta") for name, shape in naming.stock_shapes(family, config).items()}
    found = naming.guessed_config(empty, "x")
    assert found["num_layers"] == 2 and found["_class_name"] == family.stock_name
    with pytest.raises(ValueError, match="--config FOLDER"):
        naming.guessed_config(stock[0].state_dict(), "x")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, FLOAT8])
def test_folders_in_other_floats(stock, tmp_path, build_inputs, run, dtype):
    """They load as they are, too; eight bits are only how weights are stored."""
    model, folder = stock
    held = {n: t.to(dtype if t.ndim == 2 else torch.bfloat16).contiguous() for n, t in model.state_dict().items()}
    (tmp_path / "stored").mkdir()
    save_file(held, tmp_path / "stored" / "diffusion_pytorch_model.safetensors")
    (tmp_path / "stored" / "config.json").write_bytes((folder / "stock" / "config.json").read_bytes())
    loaded = ppcl_rt.load(tmp_path / "stored", dtype=torch.float32)
    wanted = QwenImageTransformer2DModel.from_pretrained(folder / "stock")
    wanted.load_state_dict({name: tensor.float() for name, tensor in held.items()})
    given = build_inputs(1)
    torch.testing.assert_close(run(loaded, given), run(wanted, given), atol=1e-5, rtol=1e-5)
    assert ppcl_rt.load(tmp_path / "stored").dtype == (dtype if dtype.itemsize > 1 else torch.bfloat16)
    convert(tmp_path / "stored", tmp_path / "out")
    written = load_file(tmp_path / "out" / "diffusion_pytorch_model.safetensors")
    kept = {name: tensor.bfloat16() if tensor.itemsize == 1 else tensor for name, tensor in held.items()}
    equal(written, kept)
    convert(tmp_path / "stored", tmp_path / "wide", dtype=torch.float32)
    equal(weights(tmp_path / "wide"), wanted.state_dict())


def lora(model, layers, rank=3, seed=0, style="peft", alpha=None):
    """Factors for some layers, as a file would hold them."""
    generator = torch.Generator().manual_seed(seed)
    state, added = {}, {}
    for layer in layers:
        rows, columns = model.get_submodule(layer).weight.shape
        down, up = torch.randn(rank, columns, generator=generator), torch.randn(rows, rank, generator=generator)
        if style == "peft":
            state |= {f"transformer.{layer}.lora_A.weight": down, f"transformer.{layer}.lora_B.weight": up}
        else:
            flat = f"lora_unet_{layer.replace('.', '_')}"
            state |= {f"{flat}.lora_down.weight": down, f"{flat}.lora_up.weight": up}
            state[f"{flat}.alpha"] = torch.tensor(float(alpha))
        added[f"{layer}.weight"] = up @ down * (alpha / rank if alpha else 1)
    return state, added


LAYERS = ("transformer_blocks.0.attn.to_q", "transformer_blocks.3.img_mlp.net.2", "transformer_blocks.1.attn.to_out.0")


@pytest.mark.parametrize("style", ["peft", "kohya"])
def test_a_lora_is_fused(stock, ppcl, tmp_path, style):
    model, folder = stock
    state, added = lora(model, LAYERS, style=style, alpha=None if style == "peft" else 6.0)
    save_file(state, tmp_path / "style.safetensors")
    status, _, err = ppcl(
        *("convert", folder / "stock", tmp_path / "out", "--fuse", f"{tmp_path / 'style.safetensors'}:0.5")
    )
    assert status == 0, err
    for name, tensor in weights(tmp_path / "out").items():
        wanted = model.state_dict()[name] + (0.5 * added[name] if name in added else 0)
        torch.testing.assert_close(tensor, wanted, atol=1e-6, rtol=1e-6)
    assert "style.safetensors at 0.5" in (tmp_path / "out" / CARD).read_text()


def test_two_loras_and_the_settings_of_peft(stock, tmp_path):
    model, folder = stock
    (one, first), (two, second) = (lora(model, LAYERS[:2], seed=n) for n in (1, 2))
    settings = {"transformer.r": 3, "transformer.lora_alpha": 12, "transformer.alpha_pattern": {"to_q": 6}}
    save_file(one, tmp_path / "one.safetensors")
    save_file(two, tmp_path / "two.safetensors", {"format": "pt", "lora_adapter_metadata": json.dumps(settings)})
    adapters = [(tmp_path / "one.safetensors", 1.0), (tmp_path / "two.safetensors", -1.0)]
    convert(folder / "stock", tmp_path / "out", fuse=adapters)
    written = weights(tmp_path / "out")
    for name, times in ((f"{LAYERS[0]}.weight", 2), (f"{LAYERS[1]}.weight", 4)):
        wanted = model.state_dict()[name] + first[name] - times * second[name]
        torch.testing.assert_close(written[name], wanted, atol=1e-5, rtol=1e-5)


def spoil(model, folder, what):
    """Write a bad source or adapter; returns the arguments of convert and what the message has to say."""
    held = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    bad, config = folder / "bad.safetensors", ("--config", "{stock}")
    name, source = "transformer_blocks.1.attn.to_q.weight", ("{stock}", "{out}")
    fuse = (*source, "--fuse", bad)
    tensor = torch.zeros(3, 3)
    content, arguments, message = {
        "another model": ({"double_blocks.0.img_attn.qkv.weight": tensor}, (bad, "{out}", *config), "it holds no"),
        "no config": (held, (bad, "{out}"), "--config FOLDER"),
        "a tensor less": ({n: t for n, t in held.items() if n != name}, (bad, "{out}", *config), f"no {name}"),
        "a tensor more": (held | {"extra": tensor}, (bad, "{out}", *config), "also holds extra"),
        "another width": (held | {name: tensor}, (bad, "{out}", *config), f"{name} is [3, 3]"),
        "factors": (held | {"img_in.scale_weight": tensor}, (bad, "{out}", *config), "img_in.scale_weight"),
        "a lora of another family": (
            {"transformer.single_transformer_blocks.0.proj_mlp.lora_A.weight": tensor}
            | {"transformer.single_transformer_blocks.0.proj_mlp.lora_B.weight": tensor},
            fuse,
            "is for another model",
        ),
        "a lora of another width": (
            {f"transformer.{LAYERS[0]}.lora_A.weight": tensor, f"transformer.{LAYERS[0]}.lora_B.weight": tensor},
            fuse,
            "for another model",
        ),
        "half a lora": ({f"transformer.{LAYERS[0]}.lora_A.weight": tensor}, fuse, "the other factor"),
        "a dora": ({f"transformer.{LAYERS[0]}.dora_scale": tensor}, fuse, "a plain LoRA"),
        "no lora": (held, fuse, "a plain LoRA"),
        "no scale": (held, (*fuse[:-1], f"{bad}:much"), "a number as the scale"),
        "the source itself": (held, ("{stock}", "{stock}"), "or around it"),
        "a folder around the source": (held, (bad, folder, *config), "or around it"),
        "a file in place of the folder": (held, ("{stock}", bad), "is a file"),
        "no file": (held, (folder / "none.safetensors", "{out}"), "no file"),
        "a file as a checkpoint": (held, None, "ppcl convert"),
    }[what]
    save_file({each: t.clone() for each, t in content.items()}, bad)
    return arguments, message


@pytest.mark.parametrize(
    "what",
    [
        *("another model", "no config", "a tensor less", "a tensor more", "another width", "factors"),
        *("a lora of another family", "a lora of another width", "half a lora", "a dora", "no lora", "no scale"),
        *("the source itself", "a folder around the source", "a file in place of the folder", "no file"),
        "a file as a checkpoint",
    ],
)
def test_bad_input_is_one_line_and_status_2(stock, ppcl, tmp_path, what):
    model, folder = stock
    arguments, message = spoil(model, tmp_path, what)
    if arguments is None:
        with pytest.raises(ValueError, match=message):
            ppcl_rt.load(tmp_path / "bad.safetensors")
        return
    places = {"stock": str(folder / "stock"), "out": str(tmp_path / "out")}
    status, _, err = ppcl("convert", *(str(argument).format(**places) for argument in arguments))
    assert status == 2 and err.count("\n") == 1 and message in err, err
    assert {path.name for path in tmp_path.iterdir()} == {"bad.safetensors"}


def test_a_folder_of_another_family_is_refused(stock, ppcl, tmp_path):
    (tmp_path / "other").mkdir()
    save_file({"x": torch.zeros(1)}, tmp_path / "other" / "diffusion_pytorch_model.safetensors")
    (tmp_path / "other" / "config.json").write_text('{"_class_name": "UNet2DConditionModel"}')
    status, _, err = ppcl("convert", tmp_path / "other", tmp_path / "out")
    assert status == 2 and err.count("\n") == 1 and "is a UNet2DConditionModel; the families here are" in err
    status, _, err = ppcl("convert", stock[1] / "one.safetensors", tmp_path / "out", "--config", tmp_path / "other")
    assert status == 2 and "UNet2DConditionModel" in err
    assert {path.name for path in tmp_path.iterdir()} == {"other"}


def test_a_pluggable_folder_is_refused(made, ppcl, tmp_path):
    status, _, err = ppcl("convert", made.folder, tmp_path / "out")
    assert status == 2 and "`ppcl export`" in err and not list(tmp_path.iterdir())
