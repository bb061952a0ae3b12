"""What others publish goes through every door: it is loaded, made slim, exported and trained from, with its licence."""

from __future__ import annotations

import pytest
import torch
from diffusers import QwenImageTransformer2DModel
from safetensors.torch import save_file

import ppcl_rt
from ppcl_rt.checkpoint.card import CARD, Origin, read_origin
from ppcl_rt.convert.convert import convert
from ppcl_rt.convert.export import export
from ppcl_rt.convert.slim import Slimming, slim
from ppcl_train.config.presets import PRESETS
from ppcl_train.config.settings import with_changes
from ppcl_train.data.teacher_file import load_teacher
from ppcl_train.stages import assembly, teacher

ORIGIN = Origin("a/b", "apache-2.0")


def in_eight_bits(model, folder):
    """Matrices of blocks as floats of eight bits."""
    stored = {
        name: tensor.to(torch.float8_e4m3fn if tensor.ndim == 2 and "blocks" in name else torch.bfloat16).contiguous()
        for name, tensor in model.state_dict().items()
    }
    model.save_config(folder)
    save_file(stored, folder / "diffusion_pytorch_model.safetensors")
    return {name: tensor.float() for name, tensor in stored.items()}


@pytest.fixture(scope="module", params=["single file", "gguf", "float8", "float8 as it is"])
def source(request, build_stock, tmp_path_factory):
    """A folder that a source of this kind became, and diffusers' model with its weights."""
    root, stock = tmp_path_factory.mktemp("sources"), build_stock(4)
    stock.save_pretrained(root / "stock")
    (root / "stock" / CARD).write_text("---\nlicense: apache-2.0\nbase_model: a/b\n---\n")
    weights = stock.state_dict()
    if request.param == "single file":
        export(ppcl_rt.load(root / "stock"), root / "x.safetensors", "single-file")
        convert(root / "x.safetensors", root / "in")
    elif request.param == "gguf":
        pytest.importorskip("gguf")
        # F32, so that the weights are those of the model; Q8_0 is in `test_ggufs`.
        export(ppcl_rt.load(root / "stock"), root / "x.gguf", "gguf", "F32")
        convert(root / "x.gguf", root / "in")
    else:
        weights = in_eight_bits(stock, root / "stored")
        (root / "stored" / CARD).write_text((root / "stock" / CARD).read_text())
        if request.param == "float8":
            convert(root / "stored", root / "in")
    wanted = QwenImageTransformer2DModel.from_config(stock.config).eval()
    wanted.load_state_dict(weights)
    return (root / "in" if (root / "in").exists() else root / "stored"), wanted


def test_it_is_loaded(source, build_inputs, run, same):
    folder, wanted = source
    model, given = ppcl_rt.load(folder, dtype=torch.float32), build_inputs(2)
    assert (model.catalog.base_model, model.catalog.license) == ORIGIN
    same(run(model, given), run(wanted, given))


def test_it_is_made_slim_and_exported(source, tmp_path, build_inputs, run, same):
    folder, wanted = source
    # Factors of a model that is as narrow as this one are smaller at a coarse error alone.
    slim(folder, tmp_path / "slim", Slimming(error=1e-2))
    less, given = ppcl_rt.load(tmp_path / "slim", dtype=torch.float32), build_inputs(2)
    export(less, tmp_path / "out", "ppcl")
    again, expected = ppcl_rt.load(tmp_path / "out"), run(wanted, given)
    assert (run(less, given) - expected).square().mean() < 1e-2 * expected.square().mean()
    same(run(again, given), run(less, given))
    for model in (less, again):
        assert (model.catalog.base_model, model.catalog.license) == ORIGIN
    assert read_origin(tmp_path / "out") == ORIGIN
    assert any(block.width["modulation"] < less.catalog.spec(0).full["modulation"] for block in less.plan.blocks)


def test_it_is_trained_from(source, tmp_path, build_inputs, run, same):
    """The teacher of a run is the model, and the catalog that the run goes on with has its origin."""
    folder, wanted = source
    run_of = with_changes(PRESETS["qwen-image"], {"teacher.pretrained": str(folder), "storage": "float32"})
    run_of = with_changes(run_of, {"base_model": None, "license": None})
    teacher.train(run_of, tmp_path)
    # It computes in bfloat16, as large ones do.
    rounded = {name: tensor.bfloat16() for name, tensor in wanted.state_dict().items()}
    held = load_teacher(run_of, tmp_path).state_dict()
    assert set(held) == set(rounded) and all(torch.equal(held[name], rounded[name]) for name in rounded)
    catalog = assembly.assembled(run_of, tmp_path, {}).catalog
    assert (catalog.base_model, catalog.license) == ORIGIN
