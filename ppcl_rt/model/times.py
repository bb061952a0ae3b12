"""Milliseconds of a model's blocks on its device, as `Budget.latency` needs them: read, remembered or measured.

A table (`ppcl_rt.planning.time_table.TimeTable`) is of the blocks of each kind, at one shape, in one dtype. It is
looked for in the file that ``PPCL_TIMES`` names (`make gpu` writes one), then in the user's cache folder, and else
measured: forwards over a few blocks of one kind of the checkpoint, all at one width, against forwards over none, by
turns with the full width. That takes less than a minute and holds a few blocks of each kind.

A planner for milliseconds takes what the table makes too cheap, so a plan takes longer than the sum of its parts says.
Where all blocks were held, whole plans that the planner makes are timed as well, and each part is scaled as explains
them best.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any, Literal, NamedTuple

import numpy as np
import torch

from ppcl_rt.files import write_json
from ppcl_rt.ops.table import cache_folder
from ppcl_rt.planning.architecture import Tokens
from ppcl_rt.planning.block_spec import TEXT_NOT_UPDATED
from ppcl_rt.planning.budget import Limit
from ppcl_rt.planning.catalog import Catalog
from ppcl_rt.planning.costs import Milliseconds
from ppcl_rt.planning.interval import Interval
from ppcl_rt.planning.legal import LegalWidths
from ppcl_rt.planning.milliseconds import LEAST_MS, Kind, PartName, TimeRow, Times
from ppcl_rt.planning.plan import Plan, PlannedBlock
from ppcl_rt.planning.planner import Planner
from ppcl_rt.planning.time_table import TimeTable
from ppcl_rt.planning.width import Width

# Blocks that a forward is timed over: their weights do not stay in a cache. All blocks, where they take few bytes.
_BLOCKS = 4
_ALL_BLOCKS_BYTES = 1e9
# Timings of each width, by turns with the full one; fewer where a forward is so long that a minute would not do.
_REPEATS = 15
_SECONDS = 30.0
# Whole plans that are timed, spread between the least and the dense milliseconds, and rounds of planning them: with the
# table as it was measured, then with the table that explains the first.
_TRIALS, _ROUNDS = 12, 2
# A trial is off by some 3 %, a part of the table by some 20 %: parts move from what was measured as far as that pays.
_RIDGE = (0.03 / 0.2) ** 2


def block_times(model: Any, tokens: Tokens) -> Times:
    """The milliseconds of a model's blocks at a shape.

    Raises:
        ValueError: the model has no checkpoint to read blocks from or one of one plan, or ``PPCL_TIMES`` names a file
            that is no such table.
    """
    given = os.environ.get("PPCL_TIMES")
    if given:
        return TimeTable.read(given).at(*tokens)
    path = cache_folder() / f"times-{_name(model, tokens)}.json"
    if path.is_file():
        return TimeTable.read(path).at(*tokens)
    table = measure(model, tokens)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, table.model_dump(mode="json"))
    return table.at(*tokens)


def _name(model: Any, tokens: Tokens) -> str:
    """A name of all that times depend on, and of the counts that are measured."""
    about = {
        "specs": {kind: spec.model_dump(mode="json") for kind, spec in model.catalog.architecture.kinds.items()},
        "widths": [(probe.kind, dict(probe.width)) for probe in _probes(model.catalog, 1)],
        "tokens": list(tokens),
        "dtype": str(model.dtype),
        "device": _device_name(model.device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "backend": os.environ.get("PPCL_BACKEND", "auto"),
    }
    if model._quantisation is not None:
        about["quantised"] = model._quantisation.model_dump(mode="json")
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:16]


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


class _Probe(NamedTuple):
    """What is timed for a row: a plan over a few blocks of one kind, all others skipped.

    Attributes:
        kind: of its blocks.
        width: of the row.
        plan: that is timed.
        blocks: of the row's width in the plan.
        run: the text run that the plan is of; its first block is full and the others do not update the text.
    """

    kind: str
    width: Width
    plan: Plan
    blocks: int
    run: Interval | None = None


def _probes(catalog: Catalog, most: int) -> Iterator[_Probe]:
    """Of each kind the full block, every count of every group alone, and blocks that do not update the text.

    Args:
        most: blocks to a plan.
    """
    architecture = catalog.architecture
    for kind in dict.fromkeys(each.kind for each in architecture.lists):
        spec = architecture.kinds[kind]
        legal = [widths for _, number, widths in catalog.prefixed if architecture.kind(number) == kind]
        yield _alone(catalog, kind, spec.full, most)
        for group in spec.full:
            counts = {count.units for widths in legal for count in widths.of(group)[1:]}
            for count in sorted(counts, reverse=True):
                yield _alone(catalog, kind, spec.full.replace(**{group: count}), most)
        runs = [run.interval for run in catalog.text_runs if architecture.kind(run.interval.first) == kind]
        for run in sorted(runs, key=len)[:1]:
            width = spec.full.without(set(spec.full) - set(spec.groups_without(TEXT_NOT_UPDATED)))
            plan = catalog.compose(dict.fromkeys(run, spec.full).items(), text_runs=(run,))
            yield _Probe(kind, width, plan, len(run) - 1, run)


def _alone(catalog: Catalog, kind: str, width: Width, most: int) -> _Probe:
    """Blocks of a kind that may run at a width, or a student where no block may."""

    def may(number: int, widths: LegalWidths) -> bool:
        return catalog.architecture.kind(number) == kind and all(widths.has(*each) for each in width.items())

    blocks = [number for number, widths in enumerate(catalog.blocks) if may(number, widths)][:most]
    if blocks:
        return _Probe(kind, width, catalog.compose(dict.fromkeys(blocks, width).items()), len(blocks))
    student = next(each for each in catalog.students if may(each.interval.first, each.widths))
    planned = PlannedBlock(interval=student.interval, width=width, student=True)
    return _Probe(kind, width, catalog.compose((), (planned,)), 1)


class _Clock:
    """Times forwards of a model."""

    def __init__(self, model: Any, call: dict[str, Any]) -> None:
        self._model, self._call = model, call

    @torch.no_grad()
    def __call__(self, plan: Plan) -> float:
        """Milliseconds of one forward of a plan, from an idle device until its result is there."""
        self._model.set_plan(plan)
        self._wait()
        start = time.perf_counter()
        self._model(**self._call)
        self._wait()
        return 1e3 * (time.perf_counter() - start)

    def _wait(self) -> None:
        if self._model.device.type == "cuda":
            torch.cuda.synchronize(self._model.device)

    def map(self, tokens: Tokens, dim: int) -> float:
        """Milliseconds of one map ``[D, D]`` over the text tokens."""
        like = next(self._model.parameters())
        x = torch.randn(tokens.batch, tokens.text, dim, device=like.device, dtype=like.dtype)
        weight, bias = torch.randn(dim, dim).to(x) / dim**0.5, torch.randn(dim).to(x)
        found = []
        for _ in range(_REPEATS):
            self._wait()
            start = time.perf_counter()
            x + torch.nn.functional.linear(x, weight, bias)
            self._wait()
            found.append(1e3 * (time.perf_counter() - start))
        return statistics.median(found)


def measure(model: Any, tokens: Tokens) -> TimeTable:
    """Time forwards over a few blocks of a model's checkpoint at every count of its catalog.

    Raises:
        ValueError: the model was not loaded from a checkpoint, or from one of one plan.
    """
    if model._source is None:
        raise ValueError("there is no checkpoint to time blocks of: load the model from a folder")
    catalog = model.catalog
    if catalog.only is not None:
        raise ValueError("this checkpoint holds one plan, so latency has nothing to choose: leave it out")
    architecture = catalog.architecture
    everything = model.dtype.itemsize * architecture.dense_params <= _ALL_BLOCKS_BYTES
    probes = list(_probes(catalog, architecture.depth if everything else _BLOCKS))
    how = {"dtype": model.dtype, "device": model.device, "quantize": model._quantisation}
    alone = type(model).load(model._source.folder, plan=probes[0].plan, **how)
    clock = _Clock(alone, alone.example(tokens))
    empty = Plan(checkpoint=catalog.fingerprint, depth=architecture.depth, blocks=())
    for plan in (empty, *(probe.plan for probe in probes)):
        # Reads, chooses implementations, warms up.
        clock(plan)
    once = clock(probes[0].plan) / 1e3
    repeats = max(3, min(_REPEATS, int(_SECONDS / (3 * once * len(probes)))))
    rows = []
    map_ms = clock.map(tokens, architecture.dim)
    outers = []
    for _, of_kind in groupby(probes, key=lambda probe: probe.kind):
        whole, *narrower = of_kind
        for probe in (whole, *narrower):
            # By turns, so that a change of the clock rate or of other load meets all three alike.
            turns = [(clock(probe.plan), clock(whole.plan), clock(empty)) for _ in range(repeats)]
            outers += [outer for *_, outer in turns]
            mine = statistics.median(own - outer for own, _, outer in turns)
            full = statistics.median(of_whole - outer for _, of_whole, outer in turns) / whole.blocks
            if probe is whole:
                # The other turns are of the same plan: noise between them is no change.
                full = mine / whole.blocks
            if probe.run is not None:
                mine -= full + map_ms * len(architecture.run_maps(probe.run))
            rows.append(_row(probe, tokens, mine / probe.blocks, full, repeats))
    rows.append(_row("outer", tokens, statistics.median(outers), statistics.median(outers), repeats))
    rows.append(_row("map", tokens, map_ms, map_ms, _REPEATS))
    specs = {probe.kind: architecture.kinds[probe.kind] for probe in probes}
    times = Times.of_rows(specs, rows, (tokens.image, tokens.text, tokens.batch))
    return _table(model, _explained(model, clock, times, repeats) if everything else times)


def _explained(model: Any, clock: Callable[[Plan], float], times: Times, repeats: int) -> Times:
    """Scale what was measured so that it explains whole plans."""
    found, timed, architecture = times, dict[Plan, float](), model.catalog.architecture
    for _ in range(_ROUNDS):
        trials = {plan: None for plan in _trials(model.planner, found) if plan not in timed}
        for plan in trials:
            clock(plan)
        # One round of all plans after another, so that a change of the clock rate meets them all alike.
        turns = [[clock(plan) for plan in trials] for _ in range(repeats)]
        timed |= {plan: statistics.median(each) for plan, each in zip(trials, zip(*turns, strict=True), strict=True)}
        found = times.scaled(_factors([times.parts(architecture, plan) for plan in timed], list(timed.values())))
    return found


def _trials(planner: Planner, times: Times) -> Iterator[Plan]:
    """Plans of a planner at milliseconds spread evenly from the least to those of the dense plan, which is the last."""
    cost, dense = Milliseconds(times), planner.catalog.largest
    least, most = planner.least(cost), cost.of(planner.catalog.architecture, dense)
    for n in range(1, _TRIALS):
        yield planner.plan((Limit(cost, least + (most - least) * n / _TRIALS),))
    yield dense


def _factors(parts: Sequence[Mapping[PartName, float]], measured_ms: Sequence[float]) -> dict[PartName, float]:
    """Find the factor of each part that explains the milliseconds of plans: ridge regression towards factors of 1.

    Args:
        parts: of each plan.
        measured_ms: of each plan as a whole.
    """
    names, measured = list(parts[0]), np.array(measured_ms)
    # In shares of each plan's milliseconds, so that short plans count as much as long ones.
    shares = np.array([[each[name] for name in names] for each in parts]) / measured[:, None]
    normal = shares.T @ shares + _RIDGE * np.eye(len(names))
    found = np.linalg.solve(normal, shares.T @ (1 - shares.sum(1)))
    return {name: float(max(1 + change, 0.0)) for name, change in zip(names, found, strict=True)}


def _row(of: _Probe | Literal["outer", "map"], tokens: Tokens, ms: float, full_ms: float, repeats: int) -> TimeRow:
    probe = of if isinstance(of, _Probe) else None
    kind: Kind = of if not isinstance(of, _Probe) else "block" if of.run is None else "text_not_updated"
    # A difference of medians may come out below nothing where the clock is coarser than the block.
    ms, full_ms = max(ms, LEAST_MS), max(full_ms, LEAST_MS)
    return TimeRow(
        kind=kind,
        block_kind=None if probe is None else probe.kind,
        image_tokens=tokens.image,
        text_tokens=tokens.text,
        batch=tokens.batch,
        width=None if probe is None else probe.width,
        ms=ms,
        full_ms=full_ms,
        # From an idle device until the result is there: the host's time is in it.
        host_ms=ms,
        repeats=repeats,
        agrees=True,
    )


def _table(model: Any, times: Times) -> TimeTable:
    return TimeTable(
        format=3,
        device=_device_name(model.device),
        versions={"torch": torch.__version__, "cuda": torch.version.cuda},
        commit=None,
        dirty=None,
        date=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        command="ppcl_rt.model.times.measure",
        dtype=str(model.dtype).removeprefix("torch."),
        backend=os.environ.get("PPCL_BACKEND", "auto"),
        specs={kind: each.spec for kind, each in times.kinds.items()},
        blocks=min(_BLOCKS, model.catalog.architecture.depth),
        complete=True,
        rows=times.rows,
    )
