"""A LoRA is fused under every name that people's files have for a layer, and refused by a model of another family."""

from __future__ import annotations

import json
from itertools import permutations

import pytest
import torch
from diffusers import FluxTransformer2DModel
from diffusers.loaders import FluxLoraLoaderMixin, ZImageLoraLoaderMixin
from safetensors.torch import load_file, save_file
from tiny_stock import build

import ppcl_rt
from ppcl_rt.convert.adapters import read_adapters
from ppcl_rt.convert.convert import convert
from ppcl_rt.families import registry

RANK, ALPHA = 3, 6.0
# Layers by their original names; what lies in several layers of diffusers', or with its halves swapped, among them.
LAYERS = {
    "qwen-image": ("transformer_blocks.3.img_mlp.net.2", "transformer_blocks.0.attn.to_out.0", "proj_out"),
    "flux": (
        *("double_blocks.1.img_attn.qkv", "double_blocks.0.txt_attn.qkv", "double_blocks.2.txt_mlp.2"),
        *(
            "single_blocks.0.linear1",
            "single_blocks.2.linear2",
            "final_layer.adaLN_modulation.1",
            "guidance_in.in_layer",
        ),
    ),
    "medium": (
        *("joint_blocks.0.x_block.attn.qkv", "joint_blocks.6.context_block.adaLN_modulation.1"),
        *("joint_blocks.1.x_block.attn2.qkv", "joint_blocks.3.context_block.mlp.fc1", "final_layer.linear"),
    ),
    "z-image": (
        *("layers.3.attention.qkv", "context_refiner.1.attention.out", "noise_refiner.0.feed_forward.w1"),
        *("layers.0.adaLN_modulation.0", "final_layer.linear"),
    ),
}


@pytest.fixture(scope="module")
def stock(tmp_path_factory):
    """Of a family: the pluggable class, stock weights, and the folder that they lie in."""
    made = {}

    def of(name):
        if name not in made:
            model, _ = build(name)
            folder = tmp_path_factory.mktemp("adapters") / "stock"
            model.save_pretrained(folder)
            made[name] = registry.of_stock(type(model).__name__), model.state_dict(), folder
        return made[name]

    return of


def shapes_of(tensors):
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def factors(layers, shapes, seed=0):
    """Of each layer ``[r, columns]`` and ``[rows, r]``; ``shapes`` are those of its weights."""
    generator = torch.Generator().manual_seed(seed)
    sizes = {layer: shapes[f"{layer}.weight"] for layer in layers}
    return {
        layer: (torch.randn(RANK, columns, generator=generator), torch.randn(rows, RANK, generator=generator))
        for layer, (rows, columns) in sizes.items()
    }


# How files name a layer and its two factors; whether they say alpha.
STYLES = {
    "peft": (lambda layer: f"transformer.{layer}", "lora_A", "lora_B", False),
    "diffusion_model": (lambda layer: f"diffusion_model.{layer}", "lora_A", "lora_B", True),
    "kohya": (lambda layer: f"lora_unet_{layer.replace('.', '_')}", "lora_down", "lora_up", True),
}


def file_of(path, held, style):
    name, down, up, alpha = STYLES[style]
    state = {}
    for layer, (first, second) in held.items():
        state |= {f"{name(layer)}.{down}.weight": first, f"{name(layer)}.{up}.weight": second}
        if alpha:
            state[f"{name(layer)}.alpha"] = torch.tensor(ALPHA)
    save_file(state, path)
    return path


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("name", LAYERS)
def test_it_is_fused_under_original_names(stock, tmp_path, name, style):
    """What it adds to the original's weights, it adds to the layers that lie in them."""
    family, weights, folder = stock(name)
    wanted = family.to_original(weights)
    held = factors(LAYERS[name], shapes_of(wanted))
    for layer, (down, up) in held.items():
        share = ALPHA / RANK if STYLES[style][3] else 1
        wanted[f"{layer}.weight"] = wanted[f"{layer}.weight"] + 0.5 * share * up @ down
    convert(folder, tmp_path / "out", fuse=[(file_of(tmp_path / "x.safetensors", held, style), 0.5)])
    written = family.to_original(load_file(tmp_path / "out" / "diffusion_pytorch_model.safetensors"))
    assert set(written) == set(wanted)
    for each, tensor in wanted.items():
        torch.testing.assert_close(written[each], tensor, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", LAYERS)
def test_every_layer_is_known_by_diffusers_name(stock, tmp_path, name, style="kohya"):
    family, weights, _ = stock(name)
    shapes = shapes_of(weights)
    layers = [n.removesuffix(".weight") for n, s in shapes.items() if n.endswith(".weight") and len(s) == 2]
    held = factors(layers, shapes)
    found = read_adapters(file_of(tmp_path / "x.safetensors", held, style), family, shapes, 1.0)
    assert set(found) == {f"{layer}.weight" for layer in layers}
    for layer, (down, up) in held.items():
        adapter = found[f"{layer}.weight"]
        assert torch.equal(adapter.down, down) and torch.equal(adapter.up, up)
        assert adapter.scale == (ALPHA / RANK if STYLES[style][3] else 1)


def test_fused_outputs_are_those_of_an_adapter_that_diffusers_loads(stock, tmp_path, run):
    """The words of the file format are diffusers': its pipelines' loader and ours add the same."""
    _, _, folder = stock("flux")
    model, inputs = build("flux")
    held = factors(
        ("single_transformer_blocks.1.proj_mlp", "transformer_blocks.0.attn.to_k"), shapes_of(model.state_dict())
    )
    file = file_of(tmp_path / "x.safetensors", held, "peft")
    convert(folder, tmp_path / "out", fuse=[(file, 1.0)])
    before = run(model, inputs)
    model.load_lora_adapter(load_file(file), prefix="transformer")
    got, wanted = run(ppcl_rt.load(tmp_path / "out"), inputs), run(model, inputs)
    torch.testing.assert_close(got, wanted, atol=2e-5, rtol=1e-5)
    assert (wanted - before).abs().max() > 0.1


def same_as_theirs(found, theirs):
    """diffusers multiplies the first factor with alpha over rank."""
    assert {f"transformer.{name.removesuffix('.weight')}.lora_A.weight" for name in found} | {
        f"transformer.{name.removesuffix('.weight')}.lora_B.weight" for name in found
    } == set(theirs)
    for name, adapter in found.items():
        down, up = (theirs[f"transformer.{name.removesuffix('weight')}lora_{which}.weight"] for which in "AB")
        assert torch.equal(adapter.down * adapter.scale, down) and torch.equal(adapter.up, up)


def test_diffusers_reads_kohyas_files_of_flux_alike(tmp_path):
    """At width 3072, which alone its converter knows. No weights are needed."""
    with torch.device("meta"):
        model = FluxTransformer2DModel(num_layers=1, num_single_layers=1)
    family, shapes = registry.of_stock("FluxTransformer2DModel"), shapes_of(model.state_dict())
    layers = ("double_blocks.0.img_attn.qkv", "double_blocks.0.txt_mod.lin", "single_blocks.0.linear1")
    original = {
        name: (sum(shapes[each][0] for each in home.stock), shapes[home.stock[0]][-1])
        for name, home in family.originals(shapes).items()
    }
    file = file_of(tmp_path / "x.safetensors", factors(layers, original), "kohya")
    same_as_theirs(read_adapters(file, family, shapes, 1.0), FluxLoraLoaderMixin.lora_state_dict(load_file(file)))


def test_diffusers_reads_kohyas_files_of_z_image_alike(stock, tmp_path):
    family, weights, _ = stock("z-image")
    layers = ("layers.3.attention.qkv", "layers.0.feed_forward.w2")
    held = factors(layers, shapes_of(family.to_original(weights)))
    file = file_of(tmp_path / "x.safetensors", held, "kohya")
    theirs = ZImageLoraLoaderMixin.lora_state_dict(load_file(file))
    same_as_theirs(read_adapters(file, family, shapes_of(weights), 1.0), theirs)


def test_other_layouts_are_left_to_diffusers(stock, tmp_path):
    """Of XLabs: q, k and v in one, under names of its own."""
    family, weights, _ = stock("flux")
    down, up, prefix = torch.randn(RANK, 32), torch.randn(96, RANK), "double_blocks.1.processor.qkv_lora1"
    save_file({f"{prefix}.down.weight": down, f"{prefix}.up.weight": up}, tmp_path / "x.safetensors")
    found = read_adapters(tmp_path / "x.safetensors", family, shapes_of(weights), 1.0)
    assert set(found) == {f"transformer_blocks.1.attn.to_{which}.weight" for which in "qkv"}
    assert torch.equal(found["transformer_blocks.1.attn.to_k.weight"].up, up[32:64])


def test_alpha_that_peft_keeps_beside_its_file(stock, tmp_path):
    family, weights, _ = stock("flux")
    layer, shapes = "transformer_blocks.1.attn.to_q", shapes_of(weights)
    ((down, up),) = factors([layer], shapes).values()
    names = (f"base_model.model.{layer}.lora_{which}.weight" for which in "AB")
    save_file(dict(zip(names, (down, up), strict=True)), tmp_path / "adapter_model.safetensors")
    for settings, scale in (
        ({"lora_alpha": 12}, 12 / RANK),
        ({"lora_alpha": 12, "use_rslora": True}, 12 / RANK**0.5),
        ({"lora_alpha": 12, "alpha_pattern": {"to_k|to_q": 9}}, 9 / RANK),
    ):
        (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
        found = read_adapters(tmp_path / "adapter_model.safetensors", family, shapes, 1.0)
        assert found[f"{layer}.weight"].scale == pytest.approx(scale)


# A layer of each kind that trainers add to, in every block, by diffusers' names.
TARGETS = {
    "qwen-image": ("attn.to_q", "attn.add_k_proj", "img_mlp.net.2"),
    "flux": ("attn.to_q", "attn.to_k", "proj_mlp", "ff.net.2"),
    "medium": ("attn.to_q", "attn.add_k_proj", "ff.net.2"),
    "z-image": ("attention.to_q", "feed_forward.w1"),
}


@pytest.mark.parametrize(("of", "to"), permutations(TARGETS, 2))
def test_one_of_another_family_is_refused(stock, ppcl, tmp_path, of, to):
    """By the layers that are not there, or by the number of blocks; shapes differ only between published models."""
    (family, weights, _), (other, there, folder) = stock(of), stock(to)
    layers = [name.removesuffix(".weight") for name in weights if name.removesuffix(".weight").endswith(TARGETS[of])]
    files = [file_of(tmp_path / f"{style}.safetensors", factors(layers, shapes_of(weights)), style) for style in STYLES]
    if of != "qwen-image":
        held = factors(LAYERS[of], shapes_of(family.to_original(weights)))
        files.append(file_of(tmp_path / "original.safetensors", held, "kohya"))
    for file in files:
        with pytest.raises(ValueError, match=r"for another model|is no LoRA for") as refused:
            read_adapters(file, other, shapes_of(there), 1.0)
        assert "\n" not in str(refused.value)
    status, _, err = ppcl("convert", folder, tmp_path / "out", "--fuse", files[0])
    assert status == 2 and err.count("\n") == 1 and str(files[0]) in err, err
    assert {path.name for path in tmp_path.iterdir()} == {file.name for file in files}


def spoilt(name, tensor):
    layer = "transformer.transformer_blocks.0.attn.to_q"
    good = {f"{layer}.lora_A.weight": torch.zeros(RANK, 32), f"{layer}.lora_B.weight": torch.zeros(32, RANK)}
    return {**good, name.format(layer): tensor}


BAD = {
    "a text encoder's too": ("lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_up.weight", "none of a text encoder"),
    "a bias too": ("{}.lora_B.bias", "a plain LoRA"),
    "a difference too": ("{}.diff_b", "a plain LoRA"),
    "one factor twice": ("{}.lora_down.weight", "twice"),
    "a layer twice": ("lora_unet_transformer_blocks_0_attn_to_q.alpha", "no down factor"),
    "a layer of nobody's": ("transformer.nobody.alpha", "no down factor"),
    "alpha of two numbers": ("{}.alpha", "is no number"),
}


@pytest.mark.parametrize("what", BAD)
def test_more_than_products_is_refused(stock, tmp_path, what):
    name, said = BAD[what]
    family, weights, _ = stock("flux")
    save_file(spoilt(name, torch.zeros(2)), tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match=said) as refused:
        read_adapters(tmp_path / "x.safetensors", family, shapes_of(weights), 1.0)
    assert "\n" not in str(refused.value)


def test_a_layer_that_is_added_to_by_two_names(stock, tmp_path):
    family, weights, _ = stock("flux")
    shapes = shapes_of(weights)
    one = factors(["transformer_blocks.0.attn.to_q"], shapes)
    two = factors(["double_blocks.0.img_attn.qkv"], shapes_of(family.to_original(weights)))
    file = file_of(tmp_path / "x.safetensors", one | two, "peft")
    with pytest.raises(ValueError, match="twice"):
        read_adapters(file, family, shapes, 1.0)
    nobody = {"transformer_blocks.0.nobody": tuple(each.clone() for each in one["transformer_blocks.0.attn.to_q"])}
    file = file_of(tmp_path / "y.safetensors", one | nobody, "peft")
    with pytest.raises(ValueError, match=r"there is no transformer\.transformer_blocks\.0\.nobody"):
        read_adapters(file, family, shapes, 1.0)


@pytest.mark.parametrize(
    "settings", [{"transformer.alpha_pattern": {"(": 1}}, {"transformer.lora_alpha": [1]}, [1], "x"]
)
def test_settings_that_make_no_sense(stock, tmp_path, settings):
    family, weights, _ = stock("flux")
    held = factors(["transformer_blocks.0.attn.to_q"], shapes_of(weights))
    state = load_file(file_of(tmp_path / "x.safetensors", held, "peft"))
    save_file(state, tmp_path / "x.safetensors", {"lora_adapter_metadata": json.dumps(settings)})
    with pytest.raises(ValueError, match=r"x\.safetensors.* (no sense|no object)"):
        read_adapters(tmp_path / "x.safetensors", family, shapes_of(weights), 1.0)
