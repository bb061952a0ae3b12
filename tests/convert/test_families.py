"""Every family exports whole blocks: lists are counted, kinds keep their places, original names are read back."""

from __future__ import annotations

import diffusers
import pytest
import tiny_flux
import tiny_sd3
import torch
from safetensors.torch import load_file

import ppcl_rt
from ppcl_rt.convert.convert import convert
from ppcl_rt.convert.export import export


def build(name):
    """A stock model and inputs for it."""
    if name == "flux":
        return tiny_flux.build_stock(), tiny_flux.build_inputs()
    return tiny_sd3.build_stock(name), tiny_sd3.build_inputs()


CASES = {"flux": "flux", **dict.fromkeys(tiny_sd3.VARIANTS, "sd3")}


@pytest.fixture(params=CASES, scope="module")
def exported(request, tmp_path_factory):
    """The model with its second block left out, and the folder that is exported of it."""
    stock, inputs = build(request.param)
    folder = tmp_path_factory.mktemp("families")
    stock.save_pretrained(folder / "stock")
    model = ppcl_rt.load(folder / "stock")
    catalog = model.catalog
    kept = [n for n in range(catalog.architecture.depth) if n != 1]
    model.set_plan(catalog.compose([(n, catalog.spec(n).full) for n in kept]))
    export(model, folder / "out", "diffusers")
    return CASES[request.param], model, inputs, folder


def test_the_stock_class_runs_it(exported, run, same):
    _, model, inputs, folder = exported
    theirs = getattr(diffusers, model.stock_name).from_pretrained(folder / "out")
    wanted = run(model, inputs)
    same(run(theirs, inputs), wanted)
    assert sum(len(theirs.get_submodule(path)) for path in model.block_lists) == len(model.plan.blocks)


def test_a_single_file_has_the_original_names(exported):
    """SD3's is read back; the converter of FLUX.1 knows width 3072 alone (`test_original`)."""
    family, model, _, folder = exported
    export(model, folder / "one.safetensors", "single-file")
    assert not any("transformer_blocks" in name for name in load_file(folder / "one.safetensors"))
    if family == "sd3":
        convert(folder / "one.safetensors", folder / "again")
        stock = getattr(diffusers, model.stock_name)
        read, wanted = (stock.from_pretrained(folder / name).state_dict() for name in ("again", "out"))
        assert set(read) == set(wanted) and all(torch.equal(read[name], wanted[name]) for name in wanted)
