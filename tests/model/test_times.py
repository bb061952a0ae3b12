"""Budgets in bytes and milliseconds of a loaded model."""

from __future__ import annotations

import json

import pytest
import torch

import ppcl_rt
from ppcl_rt import Budget, LegalWidths, Tokens
from ppcl_rt.model import times
from ppcl_rt.planning.budget import Limit
from ppcl_rt.planning.costs import Milliseconds
from ppcl_rt.planning.milliseconds import Times
from ppcl_rt.planning.time_table import TimeTable

SHAPE = Tokens(6, 4, 2)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache folder, and a clock that is not waited for: this is no test of speed."""
    monkeypatch.setenv("PPCL_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("PPCL_TIMES", raising=False)
    monkeypatch.setattr(times, "_REPEATS", 3)
    return tmp_path / "cache"


def test_times_are_measured_once_and_remembered(compensated, cache, monkeypatch):
    """Every count of the catalog has a row; another model of the same checkpoint finds them on disk."""
    model = ppcl_rt.load(compensated.folder)
    costs = model.times(SHAPE)
    catalog = model.catalog
    for n, widths in enumerate(catalog.blocks):
        of_kind = costs.of(catalog.architecture.kind(n))
        for group in widths.groups:
            assert {count.units for count in widths.of(group)} <= set(of_kind.counts(group))
        assert of_kind.ms(catalog.spec(n).full) > 0
    assert costs.outer_ms > 0
    [file] = cache.glob("times-*.json")
    assert TimeTable.read(file).at(*SHAPE) == costs
    monkeypatch.setattr(times, "measure", lambda *_: pytest.fail("it was measured again"))
    assert ppcl_rt.load(compensated.folder).times(SHAPE) == costs
    assert model.times(SHAPE) is costs
    # The model that asks is left as it was.
    assert model.plan == catalog.dense


def test_a_table_that_is_named_is_taken(compensated, cache, monkeypatch, tmp_path):
    model = ppcl_rt.load(compensated.folder)
    model.times(SHAPE)
    [file] = cache.glob("times-*.json")
    file.rename(tmp_path / "mine.json")
    monkeypatch.setenv("PPCL_TIMES", str(tmp_path / "mine.json"))
    monkeypatch.setattr(times, "measure", lambda *_: pytest.fail("it was measured again"))
    other = ppcl_rt.load(compensated.folder)
    assert other.times(SHAPE).shape == SHAPE
    with pytest.raises(ValueError, match="no full block of kind two-stream was measured"):
        other.times(Tokens(1, 1))
    (tmp_path / "mine.json").write_text(json.dumps({"format": 3}))
    with pytest.raises(ValueError, match="not a table of costs") as caught:
        ppcl_rt.load(compensated.folder).times(SHAPE)
    assert "\n" not in str(caught.value)


def test_latency_is_a_budget(compensated, cache):
    """What is granted takes no longer than what was asked for, by the table; too little says the least there is."""
    model = ppcl_rt.load(compensated.folder)
    cost, architecture = Milliseconds(model.times(SHAPE)), model.catalog.architecture
    dense, least = cost.of(architecture, model.catalog.dense), model.planner.least(cost)
    for share in (0.1, 0.5, 0.9):
        asked = least + share * (dense - least)
        if asked <= 0:
            continue
        model.set_budget(latency=asked, shape=SHAPE)
        assert model.costs(shape=SHAPE, latency=True)["latency"] <= asked * (1 + 1e-9)
        with model.at(latency=asked, params=architecture.dense_params * 0.9, shape=SHAPE):
            assert architecture.params(model.plan) <= architecture.dense_params * 0.9
    if least > 0:
        with pytest.raises(ValueError, match="milliseconds: the least is"):
            model.set_budget(latency=least / 2, shape=SHAPE)


def test_parts_are_scaled_as_explains_whole_plans(compensated, cache):
    """With a clock by which narrow heads save half of what the table says, the table says so afterwards."""
    model = ppcl_rt.load(compensated.folder)
    table, architecture = model.times(SHAPE), model.catalog.architecture
    full = model.catalog.spec(0).full
    saves = {"heads": 0.6, "image": 0.4, "text": 0.3, "modulation": 0.2}

    def ms(row):
        if row.width is None:
            return {"outer": 0.5, "map": 0.05}[row.kind]
        return 2.0 - sum(saves[group] * (1 - row.width[group] / full[group]) for group in row.width)

    rows = (row.model_copy(update={"ms": ms(row), "full_ms": 2.0}) for row in table.rows)
    said = Times.of_rows(architecture.kinds, tuple(rows), table.shape)
    parts = said.parts(architecture, model.catalog.dense)
    truth = said.scaled({**dict.fromkeys(parts, 1.0), ("two-stream", "heads"): 0.5})
    explained = times._explained(model, lambda plan: Milliseconds(truth).of(architecture, plan), said, repeats=1)
    cost = Milliseconds(said)
    least, dense = model.planner.least(cost), cost.of(architecture, model.catalog.dense)

    def off(times, plan):
        return abs(Milliseconds(times).of(architecture, plan) / Milliseconds(truth).of(architecture, plan) - 1)

    before, after = [], []
    for share in (0.3, 0.5, 0.7, 0.9):
        plan = model.planner.plan((Limit(Milliseconds(explained), least + share * (dense - least)),))
        before.append(off(said, plan))
        after.append(off(explained, plan))
    assert max(before) > 0.05 and max(after) < 0.02, (before, after)


def test_a_stock_model_has_no_blocks_to_time(compensated, cache):
    model = ppcl_rt.PPCLQwenImageTransformer2DModel(**compensated.stock.config)
    with pytest.raises(ValueError, match="no checkpoint to time blocks of"):
        model.times(SHAPE)


def test_a_checkpoint_of_one_plan_has_nothing_to_choose(compensated, cache, tmp_path):
    ppcl_rt.load(compensated.folder, 0.7).save_plan(tmp_path / "one")
    with pytest.raises(ValueError, match="holds one plan, so latency has nothing to choose"):
        ppcl_rt.load(tmp_path / "one", latency="1ms", shape=SHAPE)


def test_a_count_that_students_alone_have_is_timed_on_one(compensated, cache):
    """A catalog whose blocks lost a count in measuring; without a time for it, nothing could be planned."""
    model = ppcl_rt.load(compensated.folder)
    catalog = model.catalog
    dropped = catalog.blocks[0].of("heads")[-1].units

    def without(widths):
        return LegalWidths({**widths.root, "heads": tuple(c for c in widths.of("heads") if c.units != dropped)})

    model._catalog = catalog.model_copy(update={"blocks": tuple(map(without, catalog.blocks))})
    probes = list(times._probes(model.catalog, 4))
    [probe] = [each for each in probes if each.width["heads"] == dropped]
    [planned] = probe.plan.blocks
    assert planned.student and planned.width == catalog.spec(0).full.replace(heads=dropped)
    assert dropped in times.measure(model, SHAPE).at(*SHAPE).of("two-stream").counts("heads")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory_is_a_budget(compensated, dtype):
    """Resident bytes are never above it: after loading, and after coming from the dense plan."""
    model = ppcl_rt.load(compensated.folder, dtype=dtype)
    whole = model.resident_bytes
    assert whole == model.costs()["memory"] == dtype.itemsize * model.catalog.architecture.dense_params
    for share in (0.9, 0.7, 0.6):
        model.set_ratio(1.0)
        model.set_budget(memory=share * whole)
        assert model.resident_bytes <= share * whole
        assert model.resident_bytes == model.costs()["memory"]
        loaded = ppcl_rt.load(compensated.folder, memory=share * whole, dtype=dtype)
        assert loaded.plan == model.plan and loaded.resident_bytes == model.resident_bytes
    with pytest.raises(ValueError, match="bytes: the least is"):
        ppcl_rt.load(compensated.folder, memory="1b", dtype=dtype)


def test_at_takes_budgets_or_a_plan(compensated):
    model = ppcl_rt.load(compensated.folder)
    dense = model.catalog.architecture.dense_params
    with model.at(params=0.8 * dense):
        assert model.costs()["params"] <= 0.8 * dense
        with model.at(0.9, flops="1P"):
            assert model.plan == model.planner.plan(0.9)
    assert model.plan == model.catalog.dense
    for wrong in ({}, {"ratio": 0.9, "plan": model.plan}, {"params": 1e9, "plan": model.plan}):
        with pytest.raises(ValueError, match="give one of them"), model.at(**wrong):
            pass
    assert model.plan_of(Budget.of(0.9)) == model.planner.plan(0.9)
