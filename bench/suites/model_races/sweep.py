"""The sweep: milliseconds of a block at every width."""

from __future__ import annotations

import contextlib
import functools
import statistics
import time
from typing import Any, NamedTuple

import torch

from model_races.device import Call, CallClock, backend, end_if_lost
from model_races.machine import machine
from model_races.models import Models
from model_races.operations import stamped_operations
from model_races.plans import PLANS, narrowed
from model_races.presets import RATIOS, Levels, Preset, inputs
from model_races.report import InjectedFaults, Report
from ppcl_rt.files import one_line
from ppcl_rt.ops.agreement import agree
from ppcl_rt.ops.implementation import backend as asked_backend
from ppcl_rt.planning.block_spec import TEXT_NOT_UPDATED
from ppcl_rt.planning.costs import Milliseconds
from ppcl_rt.planning.milliseconds import Kind, TimeRow
from ppcl_rt.planning.time_table import TimeTable
from ppcl_rt.planning.width import Width


class Point(NamedTuple):
    """A row to be measured.

    Attributes:
        level: order of the measurement; level 0 comes first, at every size.
        size: pixels a side.
        kind: ``block``; ``text_not_updated``: a block that does not update the text; ``map``: a linear map; ``outer``:
            everything but the blocks.
        width: of a block, None for other kinds.
    """

    level: int
    size: int
    kind: Kind
    width: Width | None

    @property
    def name(self) -> str:
        return f"{self.kind} {'-'.join(map(str, (self.width or Width()).values()))} at {self.size}".replace("  ", " ")


def points(preset: Preset) -> list[Point]:
    """List the rows of the sweep: each group alone, and a few widths that test whether the groups add up."""
    full, made = preset.full, list[Point]()
    alone: tuple[Kind, ...] = ("outer", "map")
    for size in preset.sizes:
        made += [Point(0, size, kind, None) for kind in alone]
        swept: tuple[tuple[Kind, Width, dict[str, Levels]], ...] = (
            ("block", full, preset.counts),
            ("text_not_updated", _without_text(full, preset), preset.text_not_updated),
        )
        for kind, base, levels in swept:
            made.append(Point(0, size, kind, base))
            made += [
                Point(level, size, kind, base.replace(**{group: count}))
                for group, by_level in levels.items()
                for level, counts in enumerate(by_level)
                for count in counts
            ]
        for ratio in RATIOS:
            narrow = narrowed(preset, ratio)
            made.append(Point(1, size, "block", narrow))
            made.append(Point(1, size, "text_not_updated", _without_text(narrow, preset)))
    # Python's sort keeps the order within a level. The full block of a size comes before what is compared with it.
    return sorted(
        made, key=lambda point: (point.level, point.width not in (None, full), point.size != max(preset.sizes))
    )


def _without_text(width: Width, preset: Preset) -> Width:
    """Leave out the groups that a block which does not update the text has not."""
    groups = preset.spec.groups_without(TEXT_NOT_UPDATED)
    return Width({group: width[group] for group in groups})


class Sweep:
    """Measures blocks by kind, width and shape, for `ppcl_rt.planning.milliseconds.TimeTable`."""

    def __init__(self, job: dict[str, Any], models: Models, report: Report) -> None:
        self.job, self.models, self.report, self.preset = job, models, report, models.preset
        self.clock, self.faults = CallClock(self.preset.device), InjectedFaults(job["inject"])
        self.call = {size: inputs(self.preset, size, self.preset.text) for size in self.preset.sizes}
        self.block_call = {size: self._block_call(call) for size, call in self.call.items()}
        # The sweep is of a model with one kind of block.
        [self.block_kind] = models.catalog.architecture.kinds
        about = machine()
        self.table: dict[str, Any] = report.content.get("table") or {
            "format": 3,
            **{name: about[name] for name in ("device", "versions", "commit", "dirty", "date")},
            "command": job["command"],
            "dtype": str(self.preset.dtype).removeprefix("torch."),
            "backend": asked_backend(),
            "specs": {self.block_kind: self.preset.spec.model_dump(mode="json")},
            "blocks": self.preset.blocks,
            "complete": False,
            "left_out": {},
            "rows": [],
        }
        report.content["table"] = self.table

    def run(self, deadline: float) -> None:
        """Measure the rows that are missing until the deadline."""
        done = {name_of(row, self.preset) for row in self.table["rows"]}
        self.table["left_out"] |= self.job["leave_out"]
        for point in points(self.preset):
            if point.name in done or point.name in self.table["left_out"]:
                continue
            if time.monotonic() > deadline:
                break
            self.report.running(point.name)
            try:
                self.faults.meet(point.name)
                self.table["rows"].append(self._measure(point).model_dump(mode="json"))
                self.clock.wait()
            except Exception as error:
                self.table["left_out"][point.name] = f"{type(error).__name__}: {one_line(error)}"[:400]
                self.report.save()
                end_if_lost(self.clock)
            self.report.running("")
            self.report.save()
        else:
            self.table["complete"] = True
        self.report.content["predicted"] = self._predicted()
        self.report.save()

    def _predicted(self) -> dict[str, dict[str, float]]:
        """Return the milliseconds that the table predicts for each plan: size -> plan -> ms, where it can."""
        table = TimeTable.model_validate(self.table)
        predicted: dict[str, dict[str, float]] = {}
        for size, (rows, columns) in self.preset.sizes.items():
            predicted[str(size)] = of_size = {}
            for name in PLANS:
                # A plan may need a row for which there was no time.
                with contextlib.suppress(ValueError):
                    plan = self.models.plan(name).plan
                    cost = Milliseconds(table.at(rows * columns, self.preset.text))
                    of_size[name] = round(cost.of(self.models.catalog.architecture, plan), 4)
        return predicted

    def _block_call(self, call: dict[str, Any]) -> dict[str, Any]:
        """Record the arguments of the first block in a forward."""
        caught: dict[str, Any] = {}
        model = self.models.ours(self.models.catalog.dense)
        hook = self.models.blocks[0].register_forward_pre_hook(
            lambda _, __, kwargs: caught.update(kwargs) if not caught else None, with_kwargs=True
        )
        with backend("torch"):
            model(**call)
        hook.remove()
        return caught

    def _chain(self, point: Point) -> Call:
        """Make the call that runs every block or every linear map once, or one forward without blocks."""
        models, call = self.models, self.block_call[point.size]
        if point.kind == "outer":
            return functools.partial(models.ours(models.catalog.compose(())), **self.call[point.size])
        text, more = call["encoder_hidden_states"], {}
        if point.kind == "map":
            return lambda: [text + layer(text) for layer in models.maps]
        assert point.width is not None
        if point.kind == "text_not_updated":
            more["text_input"] = models.blocks[0].text_input(text, call["temb"], self.preset.full)

        def chain() -> tuple[torch.Tensor, ...]:
            streams = text, call["hidden_states"]
            for block in models.blocks:
                moving = {"encoder_hidden_states": streams[0], "hidden_states": streams[1], "width": point.width}
                streams = block(**{**call, **moving, **more})
            return streams

        return chain

    def _measure(self, point: Point) -> TimeRow:
        chain, full = self._chain(point), self._chain(point._replace(kind="block", width=self.preset.full))
        with backend("torch"):
            wanted = chain()
        agrees = agree(chain(), wanted)
        full()
        _, host_ms = self.clock.timed(chain)
        _, full_host_ms = self.clock.timed(full)
        pairs = [
            (self.clock.timed(chain, 1.2 * host_ms)[0], self.clock.timed(full, 1.2 * full_host_ms)[0])
            for _ in range(self.preset.repeats)
        ]
        ms, full_ms = map(statistics.median, zip(*pairs, strict=True))
        agrees = agrees and agree(chain(), wanted)
        units = {"outer": 1, "map": len(self.models.maps)}.get(point.kind, self.preset.blocks)
        rows, columns = self.preset.sizes[point.size]
        return TimeRow(
            kind=point.kind,
            block_kind=self.block_kind if point.width else None,
            image_tokens=rows * columns,
            text_tokens=self.preset.text,
            batch=1,
            width=point.width,
            ms=ms / units,
            full_ms=full_ms / self.preset.blocks,
            host_ms=host_ms / units,
            repeats=len(pairs),
            operations=self._operations(chain, 1.5 * host_ms) if point.width else {},
            agrees=agrees,
        )

    def _operations(self, chain: Call, ahead_ms: float) -> dict[str, float]:
        """Measure the milliseconds of each operation of a block, by stamps before and after it."""
        found: dict[str, list[float]] = {}
        for _ in range(min(3, self.preset.repeats)):
            with stamped_operations(self.clock) as seen:
                self.clock.timed(chain, ahead_ms)
            sums: dict[str, float] = {}
            for name, start, end in seen:
                sums[name] = sums.get(name, 0.0) + self.clock.between(start, end) / self.preset.blocks
            for name, value in sums.items():
                found.setdefault(name, []).append(value)
        return {name: round(statistics.median(values), 5) for name, values in found.items()}


def name_of(row: dict[str, Any], preset: Preset) -> str:
    """Return the name of the point that a row was measured for."""
    [size] = (size for size, (rows, columns) in preset.sizes.items() if rows * columns == row["image_tokens"])
    return Point(0, size, row["kind"], row["width"] and Width(row["width"])).name
