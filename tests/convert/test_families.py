"""Every family exports whole blocks: lists are counted, kinds keep their places, original names are read back."""

from __future__ import annotations

import diffusers
import pytest
import tiny_flux
import tiny_sd3
import tiny_z_image
import torch
from safetensors.torch import load_file

import ppcl_rt
from ppcl_rt.convert.convert import convert
from ppcl_rt.convert.export import export


def build(name):
    """A stock model and inputs for it."""
    if name == "flux":
        return tiny_flux.build_stock(), tiny_flux.build_inputs()
    if name == "z-image":
        return tiny_z_image.build_stock(), tiny_z_image.build_inputs()
    return tiny_sd3.build_stock(name), tiny_sd3.build_inputs()


CASES = {"flux": "flux", "z-image": "z-image", **dict.fromkeys(tiny_sd3.VARIANTS, "sd3")}


@pytest.fixture(params=CASES, scope="module")
def exported(request, tmp_path_factory):
    """The model with a block left out, and the folder that is exported of it."""
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
    return CASES[request.param], model, inputs, folder


def test_the_stock_class_runs_it(exported, run, same):
    _, model, inputs, folder = exported
    theirs = getattr(diffusers, model.stock_name).from_pretrained(folder / "out")
    wanted = run(model, inputs)
    # Z-Image gives an image for each sample.
    for got, expected in zip(run(theirs, inputs), wanted, strict=True):
        same(got, expected)
    assert sum(len(theirs.get_submodule(path)) for path in model.block_lists) == len(model.plan.blocks)


def test_a_single_file_has_the_original_names(exported):
    """They are read back, but for FLUX.1: its converter knows width 3072 alone (`test_original`)."""
    family, model, _, folder = exported
    export(model, folder / "one.safetensors", "single-file")
    assert not any("transformer_blocks" in name or "to_q" in name for name in load_file(folder / "one.safetensors"))
    if family != "flux":
        convert(folder / "one.safetensors", folder / "again")
        stock = getattr(diffusers, model.stock_name)
        read, wanted = (stock.from_pretrained(folder / name).state_dict() for name in ("again", "out"))
        assert set(read) == set(wanted) and all(torch.equal(read[name], wanted[name]) for name in wanted)


def test_lists_that_one_setting_counts_stay_of_one_length(tmp_path):
    tiny_z_image.build_stock().save_pretrained(tmp_path / "stock")
    model = ppcl_rt.load(tmp_path / "stock")
    catalog = model.catalog
    model.set_plan(catalog.compose([(n, catalog.spec(n).full) for n in range(1, catalog.architecture.depth)]))
    with pytest.raises(ValueError, match=r"context_refiner has 2 blocks left"):
        export(model, tmp_path / "out", "diffusers")
    assert not (tmp_path / "out").exists()
