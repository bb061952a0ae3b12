"""Checkpoints of older formats load, and run as they did."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from formats import as_format_1

import ppcl_rt
from ppcl_rt.checkpoint import migration
from ppcl_rt.checkpoint.names import CATALOG_KEY, CONFIG
from ppcl_rt.planning.budget import Limit
from ppcl_rt.planning.catalog import FORMAT
from ppcl_rt.planning.costs import Params


@pytest.fixture
def old(tmp_path, make_checkpoint):
    """A checkpoint of today, and the same in format 1."""
    groups = {"heads": (3, 1), "image": (96, 0), "text": (31, 0), "modulation": (7, 1)}
    made = make_checkpoint(tmp_path / "new", compensated=True, groups=groups, text_runs=((0, 1), (2, 3)))
    shutil.copytree(tmp_path / "new", tmp_path / "old")
    as_format_1(tmp_path / "old")
    return made, tmp_path / "old"


def test_format_1_runs_as_it_did(old, build_inputs, run):
    """Every plan gives the same bits, and costs and loses the same; a plan file names the old fingerprint."""
    made, folder = old
    new, migrated = ppcl_rt.load(made.folder), ppcl_rt.load(folder)
    assert migrated.catalog.architecture == new.catalog.architecture
    assert migrated.catalog.fingerprint != new.catalog.fingerprint
    inputs = build_inputs()
    for ratio in (1.0, 0.8, 0.6, 0.4, new.planner.smallest):
        new.set_ratio(ratio)
        # Format 1 names no reference shape: a ratio bounds FLOPs at the family's, the new checkpoint at its own.
        migrated.set_plan(new.plan.model_copy(update={"checkpoint": migrated.catalog.fingerprint}))
        assert migrated.catalog.loss(migrated.plan) == new.catalog.loss(new.plan)
        assert torch.equal(run(migrated, inputs), run(new, inputs))


def test_format_1_is_saved_in_the_current_format(old, tmp_path):
    """Saving is how a checkpoint is converted: new names, and the same tensors."""
    made, folder = old
    ppcl_rt.load(folder).save_pretrained(tmp_path / "saved")
    content = json.loads((tmp_path / "saved" / CONFIG).read_text())[CATALOG_KEY]
    assert content["format"] == FORMAT and "shape" not in content
    saved = ppcl_rt.Checkpoint(tmp_path / "saved")
    assert set(saved.names) == set(made.tensors) and any(".replacements." in name for name in saved.names)
    assert all(torch.equal(saved.read(name), tensor) for name, tensor in made.tensors.items())


@pytest.mark.parametrize(
    ("share", "params", "flops"),
    [(0.7, 2858120, 45944832), (0.5, 2042024, 42433536), (0.35, 1424992, 33114560), (0.2, 813080, 17394496)],
)
def test_the_catalog_of_the_first_shipped_checkpoint_still_plans(share, params, flops):
    """`format_1_catalog.json` is that catalog (checksums left out); plans are those of its table of scores."""
    content = json.loads(Path(__file__).with_name("format_1_catalog.json").read_text())
    version, migrated = migration.up_to_date(content, "broken")
    catalog = ppcl_rt.Catalog.model_validate(migrated)
    assert version == 1 and catalog.format == FORMAT
    architecture = catalog.architecture
    plan = ppcl_rt.Planner(catalog).plan((Limit(Params(), share * architecture.dense_params),))
    assert (architecture.params(plan), architecture.flops(plan, 16, 7)) == (params, flops)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"shape": None}, "shape"),
        ({"shape": {"depth": 4}}, "shape"),
        ({"shape": {"depth": 4, "dim": 32, "head_dim": 8, "width": [4, 128, 128], "outer_params": 1}}, "shape"),
        ({"shape": {"depth": 4, "dim": 30, "head_dim": 8, "width": [4, 128, 128, 32], "outer_params": 1}}, "shape"),
        ({"shape": {"depth": "4", "dim": 32, "head_dim": 8, "width": "wide", "outer_params": 1}}, "shape"),
        ({"shape": {"depth": 4, "dim": 32, "head_dim": 8, "width": [], "outer_params": 1}}, "shape"),
        # Nothing is computed with it: that took all memory.
        ({"shape": {"depth": 4, "dim": 32, "head_dim": 2 * 10**9, "width": ["a"], "outer_params": 1}}, "shape"),
        ({"shape": {"depth": 4, "dim": 32, "head_dim": 8, "width": [4, 128, 128, 32], "outer_params": 1, "x": 1}}, "x"),
        ({"family": "unheard-of"}, "unheard-of"),
        ({"family": 1}, "family"),
        ({"format": FORMAT + 1}, f"formats 1 to {FORMAT}"),
        ({"format": True}, "formats 1"),
        ({"surprise": 1}, "surprise"),
    ],
)
def test_broken_catalogs_of_format_1_are_refused_in_one_line(old, change, said):
    _, folder = old
    config = json.loads((folder / CONFIG).read_text())
    config[CATALOG_KEY].update(change)
    (folder / CONFIG).write_text(json.dumps(config))
    with pytest.raises(ValueError) as refused:
        ppcl_rt.load(folder)
    assert said in str(refused.value) and "\n" not in str(refused.value)


def test_names_of_tensors():
    assert (
        migration.current_name("students.0-1.narrow.mlp_image_0.bias", 1)
        == "students.0-1.replacements.mlp_image_0.bias"
    )
    assert migration.current_name("transformer_blocks.11.narrow.modulation_down.weight", 1) == (
        "transformer_blocks.11.replacements.modulation_down.weight"
    )
    # Only where blocks are: a layer of the stock model may be called anything.
    assert migration.current_name("proj.narrow.weight", 1) == "proj.narrow.weight"
    assert migration.current_name("transformer_blocks.0.narrow.x", 2) == "transformer_blocks.0.narrow.x"
