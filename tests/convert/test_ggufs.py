"""GGUF out and in again, and as diffusers reads it."""

from __future__ import annotations

import json

import pytest
import torch
from diffusers import QwenImageTransformer2DModel
from safetensors.torch import save_file

import ppcl_rt
from ppcl_rt.checkpoint.card import Origin, read_origin
from ppcl_rt.convert import ggufs
from ppcl_rt.convert.convert import convert
from ppcl_rt.convert.export import export

gguf = pytest.importorskip("gguf")


@pytest.fixture(scope="module")
def plain(made, tmp_path_factory):
    """A checkpoint with an origin, and its model at a plan with a student."""
    folder = tmp_path_factory.mktemp("gguf") / "source"
    catalog = made.catalog.model_copy(update={"base_model": "a/b", "license": "apache-2.0"})
    catalog = ppcl_rt.write_checkpoint(folder, made.config, catalog, made.tensors)
    full = catalog.spec(0).full
    student = ppcl_rt.PlannedBlock(interval=ppcl_rt.Interval(1, 2), width=full, student=True)
    return ppcl_rt.load(folder, plan=catalog.compose([(0, full), (3, full)], [student])), folder


@pytest.mark.parametrize("types", ["F32", "F16", "BF16", "Q8_0"])
def test_what_is_written_is_read(plain, tmp_path, types):
    model, _ = plain
    export(model, tmp_path / "x.gguf", "gguf", types)
    export(model, tmp_path / "stock", "diffusers")
    wanted = QwenImageTransformer2DModel.from_pretrained(tmp_path / "stock").state_dict()
    convert(tmp_path / "x.gguf", tmp_path / "out", dtype=torch.float32)
    read = QwenImageTransformer2DModel.from_pretrained(tmp_path / "out").state_dict()
    assert set(read) == set(wanted) and read_origin(tmp_path / "out") == Origin("a/b", "apache-2.0")
    for name, tensor in wanted.items():
        rounded = types if name.startswith("transformer_blocks") and tensor.ndim == 2 else "F32"
        if rounded == "Q8_0":
            # Half a step of 127 of the largest of 32, whose scale is a float16.
            assert (read[name] - tensor).abs().max() <= tensor.abs().max() * (0.5 / 127 + 2**-11), name
            assert not torch.equal(read[name], tensor)
        else:
            dtype = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[rounded]
            assert torch.equal(read[name], tensor.to(dtype).float()), name


@pytest.mark.parametrize("types", ["F32", "BF16", "Q8_0"])
def test_diffusers_reads_it(plain, tmp_path, build_inputs, run, types):
    from diffusers import GGUFQuantizationConfig

    model, _ = plain
    export(model, tmp_path / "x.gguf", "gguf", types)
    export(model, tmp_path / "stock", "diffusers")
    theirs = QwenImageTransformer2DModel.from_single_file(
        str(tmp_path / "x.gguf"),
        config=str(tmp_path / "stock"),
        quantization_config=GGUFQuantizationConfig(compute_dtype=torch.float32),
        torch_dtype=torch.float32,
    )
    convert(tmp_path / "x.gguf", tmp_path / "out", dtype=torch.float32)
    ours, given = ppcl_rt.load(tmp_path / "out"), build_inputs(1)
    if types == "Q8_0":
        # diffusers multiplies scales and integers in float16.
        with torch.no_grad():
            for block in ours.blocks():
                for parameter in block.parameters():
                    parameter.copy_(parameter.half() if parameter.ndim == 2 else parameter)
    got, wanted = run(theirs, given), run(ours, given)
    torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-5)


def test_its_header_names_the_architecture(plain, ppcl, tmp_path):
    _, folder = plain
    status, out, err = ppcl("export", folder, tmp_path / "x.gguf", "--format", "gguf", "--types", "Q8_0", "--json")
    assert status == 0, err
    fields = gguf.GGUFReader(tmp_path / "x.gguf").fields
    assert fields["general.architecture"].contents() == "qwen_image"
    assert fields["general.base_model.count"].contents() == 1
    assert json.loads(out)["bytes"] < 2 * json.loads(out)["params"]


def test_a_file_that_is_cut_short_is_refused(plain, ppcl, tmp_path):
    model, _ = plain
    export(model, tmp_path / "x.gguf", "gguf")
    (tmp_path / "x.gguf").write_bytes((tmp_path / "x.gguf").read_bytes()[:5000])
    status, _, err = ppcl("convert", tmp_path / "x.gguf", tmp_path / "out")
    assert status == 2 and err.count("\n") == 1 and "no whole GGUF" in err
    assert {path.name for path in tmp_path.iterdir()} == {"x.gguf"}


def test_without_the_package_it_says_what_to_install(plain, tmp_path, monkeypatch):
    model, _ = plain
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    with pytest.raises(ValueError, match=r"ppcl-rt\[gguf\]"):
        export(model, tmp_path / "x.gguf", "gguf")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("config", ["{", "[1]", "[" * 100_000])
def test_a_config_that_is_none_is_refused(tmp_path, monkeypatch, config):
    """In the header of a file of either kind; and an origin that is no name is none."""
    tensors = {"x": torch.zeros(1)}
    save_file(tensors, tmp_path / "x.safetensors", {"diffusers_config": config})
    monkeypatch.setattr(ggufs.json, "dumps", lambda _: config)
    ggufs.write_gguf(tmp_path / "x.gguf", "x", tensors, {}, {}, Origin("a\nb", "x"), "F32")
    for file in ("x.safetensors", "x.gguf"):
        with pytest.raises(
            ValueError, match=r"its diffusers_config (is no JSON object|cannot be read as JSON)"
        ) as refused:
            convert(tmp_path / file, tmp_path / "out")
        assert "\n" not in str(refused.value)
    monkeypatch.setattr(ggufs.json, "dumps", lambda _: "{}")
    ggufs.write_gguf(tmp_path / "x.gguf", "x", tensors, {}, {}, Origin("a\nb", "x"), "F32")
    assert ggufs.read_gguf(tmp_path / "x.gguf", torch.float32)[1:] == ({}, Origin(None, "x"))
