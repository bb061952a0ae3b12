"""Every family exports whole blocks in every format that holds them, and what is read again is what ran."""

from __future__ import annotations

import json
import re

import diffusers
import pytest
import tiny_z_image
import torch
from safetensors.torch import load_file, save_file
from tiny_stock import CASES, build

import ppcl_rt
from ppcl_rt.convert.convert import convert
from ppcl_rt.convert.export import export


@pytest.fixture(scope="module")
def ready():
    """What `exported` has made, by case: it is asked for in several orders."""
    return {}


@pytest.fixture(params=CASES)
def exported(request, ready, tmp_path_factory, run):
    """Family, the model with a block left out, inputs, its outputs, and the folder that is exported of it."""
    if request.param in ready:
        return ready[request.param]
    stock, inputs = build(request.param)
    folder = tmp_path_factory.mktemp("families")
    stock.save_pretrained(folder / "stock")
    model = ppcl_rt.load(folder / "stock")
    catalog = model.catalog
    # The second block, but for Z-Image: its refiners, which come first, are as many in either list.
    depth = catalog.architecture.depth
    left_out = depth - 2 if request.param == "z-image" else 1
    kept = [n for n in range(depth) if n != left_out]
    model.set_plan(catalog.compose([(n, catalog.spec(n).full) for n in kept]))
    export(model, folder / "out", "diffusers")
    ready[request.param] = CASES[request.param], model, inputs, run(model, inputs), folder
    return ready[request.param]


def stock_of(model):
    return getattr(diffusers, model.stock_name)


def all_same(same, got, wanted):
    """Z-Image gives an image for each sample."""
    for each, expected in zip(got, wanted, strict=True):
        same(each, expected)


def test_the_stock_class_runs_it(exported, run, same):
    _, model, inputs, wanted, folder = exported
    theirs = stock_of(model).from_pretrained(folder / "out")
    all_same(same, run(theirs, inputs), wanted)
    assert sum(len(theirs.get_submodule(path)) for path in model.block_lists) == len(model.plan.blocks)


# Variants of a class differ in the names of their tensors alone.
ROUND_TRIPS = [
    (name, format)
    for name in CASES
    for format in ("ppcl", "diffusers", "single-file", "gguf")
    if format == "single-file" or name not in ("sd3", "large")
]


@pytest.mark.parametrize(("exported", "format"), ROUND_TRIPS, indirect=["exported"])
def test_out_in_and_out_again(exported, run, same, tmp_path, format):
    """Load -> plan -> export -> convert -> load -> export: the weights bit for bit, and the outputs of the plan."""
    if format == "gguf":
        pytest.importorskip("gguf")
    _, model, inputs, wanted, folder = exported
    ends = {"single-file": "x.safetensors", "gguf": "x.gguf"}
    export(model, tmp_path / ends.get(format, "x"), format, "F32")
    if format in ends:
        convert(tmp_path / ends[format], tmp_path / "x")
    again = ppcl_rt.load(tmp_path / "x")
    all_same(same, run(again, inputs), wanted)
    export(again, tmp_path / "out", "diffusers")
    # `test_the_stock_class_runs_it` has what is compared with.
    settings = [json.loads((each / "out" / "config.json").read_text()) for each in (folder, tmp_path)]
    read, held = (load_file(each / "out" / "diffusion_pytorch_model.safetensors") for each in (folder, tmp_path))
    assert (
        settings[0] == settings[1]
        and set(read) == set(held)
        and all(torch.equal(read[name], held[name]) for name in held)
    )


def test_a_single_file_has_the_original_names_and_diffusers_reads_it(exported, run, tmp_path):
    """But for FLUX.1 of this width: its converter knows 3072 alone (`test_original`)."""
    family, model, inputs, _, folder = exported
    export(model, tmp_path / "one.safetensors", "single-file")
    by_diffusers = any("to_q" in name for name in load_file(tmp_path / "one.safetensors"))
    assert by_diffusers == (family == "qwen-image")
    if family != "flux":
        stock = stock_of(model)
        read = stock.from_single_file(str(tmp_path / "one.safetensors"), config=str(folder / "out"))
        wanted = stock.from_pretrained(folder / "out")
        for got, expected in zip(run(read, inputs), run(wanted, inputs), strict=True):
            assert torch.equal(got, expected)


# Name -> what readers of GGUF know it as, and a tensor that they tell it by.
GGUF = {
    "qwen-image": ("qwen_image", "transformer_blocks.0.attn.add_q_proj.weight"),
    "flux": ("flux", "double_blocks.0.img_attn.proj.weight"),
    "medium": ("sd3", "joint_blocks.0.context_block.attn.qkv.weight"),
    "z-image": ("lumina2", "context_refiner.0.attention.qkv.weight"),
}


@pytest.mark.parametrize(("exported", "known"), GGUF.items(), indirect=["exported"], ids=GGUF)
def test_readers_of_gguf_know_the_architecture(exported, run, tmp_path, known):
    """diffusers reads the file, too, but for FLUX.1 of this width; Qwen-Image's in `test_ggufs`."""
    gguf = pytest.importorskip("gguf")
    _, model, inputs, wanted, folder = exported
    export(model, tmp_path / "x.gguf", "gguf", "F32")
    reader = gguf.GGUFReader(tmp_path / "x.gguf")
    assert reader.fields["general.architecture"].contents() == known[0]
    assert known[1] in {tensor.name for tensor in reader.tensors}
    if known[0] in ("sd3", "lumina2"):
        how = diffusers.GGUFQuantizationConfig(compute_dtype=torch.float32)
        files, more = (str(tmp_path / "x.gguf"), str(folder / "out")), {"torch_dtype": torch.float32}
        read = stock_of(model).from_single_file(files[0], config=files[1], quantization_config=how, **more)
        for got, expected in zip(run(read, inputs), wanted, strict=True):
            torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


@pytest.fixture(scope="module")
def single_files(tmp_path_factory):
    """Of each family the folder of a model, and the tensors of its single file."""
    made = {}
    for name in ("qwen-image", "flux", "medium", "z-image"):
        folder = tmp_path_factory.mktemp("single") / name
        build(name)[0].save_pretrained(folder)
        made[name] = folder, ppcl_rt.load(folder).to_original(build(name)[0].state_dict())
    return made


@pytest.mark.parametrize("name", ["qwen-image", "flux", "medium", "z-image"])
def test_a_file_of_another_model_is_refused(single_files, ppcl, tmp_path, name):
    """Of every other family, and of the same one with a block less, or a tensor of another shape."""
    _, tensors = single_files[name]
    last = max((each for each in tensors if re.match(r"\w+\.\d+\.", each)), key=len)
    block = ".".join(last.split(".")[:2]) + "."
    cases = {other: (folder, tensors) for other, (folder, _) in single_files.items() if other != name}
    own = single_files[name][0]
    cases["a block less"] = own, {each: tensor for each, tensor in tensors.items() if not each.startswith(block)}
    cases["another shape"] = own, tensors | {last: torch.zeros(1, 1)}
    for config, content in cases.values():
        save_file({each: tensor.contiguous() for each, tensor in content.items()}, tmp_path / "x.safetensors")
        status, _, err = ppcl("convert", tmp_path / "x.safetensors", tmp_path / "out", "--config", config)
        assert status == 2 and err.count("\n") == 1 and str(tmp_path / "x.safetensors") in err, err
        assert f"it holds no {block}" in err or content is not cases["a block less"][1], err
    assert {path.name for path in tmp_path.iterdir()} == {"x.safetensors"}


def test_lists_that_one_setting_counts_stay_of_one_length(tmp_path):
    tiny_z_image.build_stock().save_pretrained(tmp_path / "stock")
    model = ppcl_rt.load(tmp_path / "stock")
    catalog = model.catalog
    model.set_plan(catalog.compose([(n, catalog.spec(n).full) for n in range(1, catalog.architecture.depth)]))
    with pytest.raises(ValueError, match=r"context_refiner has 2 blocks left"):
        export(model, tmp_path / "out", "diffusers")
    assert not (tmp_path / "out").exists()
