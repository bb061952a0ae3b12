"""``latency`` of models with several kinds of blocks: each kind is timed by itself, and plans go by all of them."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import pytest
import tiny_sd3
import tiny_z_image
from random_checkpoint import RandomCheckpoint
from tiny_flux import build_stock

import ppcl_rt
from ppcl_rt import Tokens
from ppcl_rt.families.flux import PPCLFluxTransformer2DModel
from ppcl_rt.model import times
from ppcl_rt.planning.budget import Limit
from ppcl_rt.planning.costs import Milliseconds
from ppcl_rt.planning.milliseconds import Times
from ppcl_rt.planning.time_table import TimeTable

SHAPE = Tokens(6, 4, 2)
COUNTS = {
    "double": {"heads": (3, 1), "image": (50, 0), "text": (64, 0), "modulation": (7, 3)},
    "single": {"heads": (3, 2), "mlp": (100, 0), "modulation": (7, 3)},
}


def flux(folder):
    runs = {"students": ((0, 1), (3, 4)), "text_runs": ((0, 1), (0, 2))}
    RandomCheckpoint.make(folder, PPCLFluxTransformer2DModel, build_stock(), COUNTS, **runs)


# name -> how its checkpoint is made, and the kinds of its blocks
MADE = {
    "flux": (flux, ["double", "single"]),
    "sd3": (lambda folder: tiny_sd3.make_checkpoint(folder, "medium"), ["dual-attention", "two-stream", "last"]),
    "z-image": (tiny_z_image.make_checkpoint, ["image", "text", "joint"]),
}


class Timed(NamedTuple):
    """A checkpoint whose blocks were timed once.

    Attributes:
        kinds: of its blocks.
        cache: where the times are kept.
        asked: the kinds of blocks that were in each forward.
    """

    folder: Path
    kinds: list[str]
    cache: Path
    asked: set[frozenset[str]]


@pytest.fixture(scope="module", params=list(MADE))
def timed(request, tmp_path_factory):
    """Timed by few forwards: this is no test of speed."""
    make, kinds = MADE[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    make(folder / "checkpoint")
    model, asked, clock = ppcl_rt.load(folder / "checkpoint"), set(), times._Clock.__call__

    def counted(self, plan):
        asked.add(frozenset(model.catalog.architecture.kind(block.interval.first) for block in plan.blocks))
        return clock(self, plan)

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PPCL_CACHE", str(folder / "cache"))
        patch.delenv("PPCL_TIMES", raising=False)
        patch.setattr(times._Clock, "__call__", counted)
        for name, few in (("_REPEATS", 1), ("_TRIALS", 3), ("_ROUNDS", 1)):
            patch.setattr(times, name, few)
        model.times(SHAPE)
    return Timed(folder / "checkpoint", kinds, folder / "cache", asked)


@pytest.fixture
def model(timed, monkeypatch):
    """Another model of the checkpoint, which finds the times."""
    monkeypatch.setenv("PPCL_CACHE", str(timed.cache))
    monkeypatch.delenv("PPCL_TIMES", raising=False)
    monkeypatch.setattr(times, "measure", lambda *_: pytest.fail("it was measured again"))
    return ppcl_rt.load(timed.folder)


def test_each_kind_is_timed_and_remembered(timed, model):
    found, catalog = model.times(SHAPE), model.catalog
    assert list(found.kinds) == timed.kinds
    # Forwards are over blocks of one kind, over none, or over all: those of whole plans.
    assert timed.asked == {frozenset(), *(frozenset([kind]) for kind in timed.kinds), frozenset(timed.kinds)}
    for n, widths in enumerate(catalog.blocks):
        of_kind = found.of(catalog.architecture.kind(n))
        for group in widths.groups:
            assert {count.units for count in widths.of(group)} <= set(of_kind.counts(group))
    # A full block takes what it takes: no part of the dense plan is narrower, or leaves its text.
    parts = found.parts(catalog.architecture, catalog.dense)
    assert all(ms == pytest.approx(0, abs=1e-9) for (kind, name), ms in parts.items() if kind and name != "full")
    not_updating = {row.block_kind for row in found.rows if row.kind == "text_not_updated"}
    assert not_updating == {catalog.architecture.kind(run.interval.first) for run in catalog.text_runs}
    [file] = timed.cache.glob("times-*.json")
    assert TimeTable.read(file).at(*SHAPE) == found


def test_latency_is_a_budget(model):
    """What is granted takes no longer than what was asked for, by the table that whole plans have scaled."""
    cost, catalog = Milliseconds(model.times(SHAPE)), model.catalog
    dense, least = cost.of(catalog.architecture, catalog.dense), model.planner.least(cost)
    for share in (0.3, 0.8):
        asked = least + share * (dense - least)
        if asked > 0:
            model.set_budget(latency=asked, shape=SHAPE)
            assert model.costs(shape=SHAPE, latency=True)["latency"] <= asked * (1 + 1e-9)


@pytest.mark.parametrize("slow", [0, -1], ids=["first", "last"])
def test_plans_narrow_the_kind_that_takes_the_time(timed, model, slow):
    """With times that are made up: of other kinds, narrow blocks take as long as full ones, so they stay full."""
    kinds = timed.kinds
    catalog, real = model.catalog, model.times(SHAPE)

    def ms(row):
        if row.block_kind is None:
            return {"outer": 0.5, "map": 1e-6}[row.kind]
        full = catalog.architecture.kinds[row.block_kind].full
        share = sum(row.width[group] / full[group] for group in row.width) / len(full)
        return 1.0 + share if row.block_kind == kinds[slow] else 1.0

    rows = [row.model_copy(update={"ms": ms(row), "full_ms": ms_of_full(row, kinds[slow])}) for row in real.rows]
    specs = {kind: each.spec for kind, each in real.kinds.items()}
    said = Times.of_rows(specs, rows, real.shape)
    architecture, cost = catalog.architecture, Milliseconds(said)
    many = sum(architecture.kind(n) == kinds[slow] for n in range(architecture.depth))
    dense = cost.of(architecture, catalog.dense)
    assert dense == pytest.approx(0.5 + architecture.depth + many)
    parts = said.parts(architecture, catalog.dense)
    assert parts[kinds[slow], "full"] == pytest.approx(2 * many) and sum(parts.values()) == pytest.approx(dense)
    # Each slow block has to give up a tenth of a millisecond on average.
    plan = model.planner.plan((Limit(cost, dense - 0.1 * many),))
    assert cost.of(architecture, plan) <= dense - 0.1 * many + 1e-9
    narrower = {
        architecture.kind(block.interval.first)
        for block in plan.blocks
        if block.student or block.width != architecture.spec(block.interval.first).full
    }
    assert narrower == {kinds[slow]}


def ms_of_full(row, slow):
    """Milliseconds of the full block of a row's kind."""
    return 2.0 if row.block_kind == slow else 1.0


def test_a_table_without_one_of_the_kinds_is_refused(timed, model, monkeypatch, tmp_path):
    [file] = timed.cache.glob("times-*.json")
    table, kinds = TimeTable.read(file), timed.kinds
    specs = {kind: spec for kind, spec in table.specs.items() if kind != kinds[-1]}
    rows = tuple(row for row in table.rows if row.block_kind != kinds[-1])
    (tmp_path / "mine.json").write_text(table.model_copy(update={"specs": specs, "rows": rows}).model_dump_json())
    monkeypatch.setenv("PPCL_TIMES", str(tmp_path / "mine.json"))
    with pytest.raises(ValueError, match=f"no blocks of kind {kinds[-1]} were measured; there are: ") as caught:
        model.set_budget(latency=1.0, shape=SHAPE)
    assert "\n" not in str(caught.value)
