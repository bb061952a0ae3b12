"""Checkpoints whose weights are stored as differences of low rank, and whose text maps lie there once."""

from __future__ import annotations

import json

import pytest
import torch
from formats import as_small

import ppcl_rt
from ppcl_rt.checkpoint.composed import ComposedCheckpoint
from ppcl_rt.checkpoint.names import CATALOG_KEY, CONFIG

GROUPS = {"heads": (3, 1), "image": (96, 50, 0), "text": (31, 0), "modulation": (7, 1)}
RUNS = ((0, 1), (0, 2), (2, 3))


@pytest.fixture(scope="module")
def twins(tmp_path_factory, make_checkpoint):
    """Folders of one checkpoint in the small form and whole."""
    root = tmp_path_factory.mktemp("composed")
    made = make_checkpoint(root / "made", compensated=True, groups=GROUPS, text_runs=RUNS)
    for name, tensors in zip(("small", "whole"), as_small(made), strict=True):
        ppcl_rt.write_checkpoint(root / name, made.config, made.catalog, tensors)
    return root / "small", root / "whole"


def plans_of(model):
    catalog, depth = model.catalog, model.catalog.architecture.depth
    yield from model.planner.plans(0.1)
    for run in catalog.text_runs:
        yield catalog.compose([(n, catalog.spec(n).full) for n in range(depth)], text_runs=[run.interval])


def outputs(model, inputs, run):
    for plan in plans_of(model):
        with model.at(plan=plan):
            yield run(model, inputs)


def test_a_composed_weight_is_its_base_plus_the_stored_product(twins, build_inputs, run):
    """Bit for bit what the same weights give when they are stored whole, at all widths, students and text runs."""
    small, whole = (ppcl_rt.load(folder) for folder in twins)
    inputs = build_inputs()
    for got, wanted in zip(outputs(small, inputs, run), outputs(whole, inputs, run), strict=True):
        assert torch.equal(got, wanted)
    assert set(small.full_state()) == set(whole.full_state())


def test_names_and_shapes_are_those_of_whole_weights(twins):
    small, whole = map(ComposedCheckpoint, twins)
    assert set(small.names) == set(whole.names)
    assert all(small.shape(name) == whole.shape(name) for name in whole.names)


def test_a_partially_resident_model_saves_the_small_form(twins, tmp_path, build_inputs, run):
    """What nobody changed keeps its factors, resident or not, and so does the file its size."""
    model = ppcl_rt.load(twins[0], ratio=0.6)
    model.trim()
    model.save_pretrained(tmp_path / "saved")
    before, after = ppcl_rt.Checkpoint(twins[0]), ppcl_rt.Checkpoint(tmp_path / "saved")
    assert set(after.names) == set(before.names)
    assert all(torch.equal(after.read(name), before.read(name)) for name in before.names)


def test_what_was_trained_is_saved_whole(twins, tmp_path, build_inputs, run):
    """A student's output that was trained, its layers at narrower counts, which differ from it, and a shared map."""
    model = ppcl_rt.load(twins[0], resident="all")
    student = model.catalog.students[0].interval
    with torch.no_grad():
        model.students[student.key].img_mlp.net[2].weight += 0.1
        model.text_runs["0-1"]["z_1"].weight += 0.1
    inputs = build_inputs()
    wanted = list(outputs(model, inputs, run))
    model.save_pretrained(tmp_path / "saved")
    saved = ppcl_rt.Checkpoint(tmp_path / "saved")
    assert f"students.{student.key}.img_mlp.net.2.weight" in saved
    assert f"students.{student.key}.replacements.mlp_image_50.weight" in saved
    assert f"students.{student.key}.txt_mlp.net.2.up" in saved
    assert "text_runs.0.z_1.weight" in saved and "text_runs.0.z_2.up" in saved
    for got, expected in zip(outputs(ppcl_rt.load(tmp_path / "saved"), inputs, run), wanted, strict=True):
        assert torch.equal(got, expected)


def test_runs_with_one_first_block_hold_one_map(twins):
    model = ppcl_rt.load(twins[0], resident="all")
    assert model.text_runs["0-1"]["z_1"] is model.text_runs["0-2"]["z_1"]
    # Stored apart, as older formats have them, they are two.
    apart = ppcl_rt.load(twins[1], resident="all")
    assert apart.text_runs["0-1"]["z_1"] is not apart.text_runs["0-2"]["z_1"]


def test_trim_reads_composed_weights_again(twins, build_inputs, run):
    model, inputs = ppcl_rt.load(twins[0], ratio=0.5), build_inputs()
    before = run(model, inputs)
    model.set_ratio(1.0)
    model.trim()
    model.set_ratio(0.5)
    assert torch.equal(run(model, inputs), before)


def test_factors_that_do_not_fit_are_refused_in_one_line(twins, tmp_path):
    source = ppcl_rt.Checkpoint(twins[0])
    tensors = {name: source.read(name) for name in source.names}
    name = "transformer_blocks.0.replacements.mlp_image_50.up"
    tensors[name] = tensors[name][:, :1].contiguous()
    ppcl_rt.write_checkpoint(tmp_path / "bad", source.config, source.catalog, tensors)
    with pytest.raises(ValueError, match=r"factors of .*mlp_image_50.weight .* no product"):
        ppcl_rt.load(tmp_path / "bad")


def test_older_formats_hold_whole_weights(twins, tmp_path):
    """A checkpoint without factors reads as it lies in the file, whatever its format."""
    for folder in (twins[1],):
        plain, composed = ppcl_rt.Checkpoint(folder), ComposedCheckpoint(folder)
        assert plain.names == composed.names
        assert all(torch.equal(plain.read(name), composed.read(name)) for name in plain.names)
    assert json.loads((twins[1] / CONFIG).read_text())[CATALOG_KEY]["format"] == 3
