"""What was measured on a device: the parts of a GPU run, and what blocks take."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import rich.table

from ppcl_kernels.tools import report as tables
from ppcl_kernels.tools.goals import goals
from ppcl_rt.planning.time_table import TimeTable
from ppcl_rt.report.parts import Curve, Plot, Section, Table
from ppcl_rt.report.stored import Stored

# Tables of more rows than this are folded.
_LONG = 30


class Part(Stored):
    """A part of a GPU run: ``fit.json``, ``choose.json``, ``model.json`` or ``tests.json``."""

    name: str
    content: dict[str, Any]

    @classmethod
    def fits(cls, path: Path, content: Any) -> bool:
        """Whether it says which part it is, and has results."""
        return isinstance(content, dict) and content.get("part") in tables.PARTS and "results" in content

    @classmethod
    def read(cls, path: Path, content: Any) -> Part:
        """Check what the tables are drawn from."""
        try:
            tables.check_part(content, content["part"])
            # Drawn once to see that they can be: a part that was cut lacks what no list of columns names.
            _plain_all(content["part"], content)
            goals({content["part"]: content})
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(f"{type(error).__name__}: {error}") from None
        return super().read(path, {"name": content["part"], "content": content})


class Sweep(Stored):
    """Times of blocks: ``sweep.json``."""

    times: TimeTable

    @classmethod
    def fits(cls, path: Path, content: Any) -> bool:
        """Whether it says what blocks are made of."""
        return isinstance(content, dict) and {"specs", "rows"} <= content.keys()

    @classmethod
    def read(cls, path: Path, content: Any) -> Sweep:
        """Check the table of times."""
        return super().read(path, {"times": content})


def sections(parts: Iterable[tuple[str, Part]]) -> list[Section]:
    """Show the parts, and by device which targets they meet."""
    found, devices = [], dict[str, dict[str, Any]]()
    for file, part in parts:
        found.append(_section(part, file))
        devices.setdefault(part.content["device"], {})[part.name] = part.content
    for device, contents in devices.items():
        if tables.has_goals(device):
            judged = tables.goals_table([goal.judged() for goal in goals(contents)], device)
            found.append(Section("Targets", [_plain(judged)], "", "ppcl bench report"))
    return found


def _section(part: Part, file: str) -> Section:
    content = part.content
    shown = _plain_all(part.name, content)
    said, _, command = tables.summary(part.name, content).partition("\n")
    return Section(f"GPU run: {part.name}", shown, file, command.strip(), [said])


def _plain_all(name: str, content: dict[str, Any]) -> list[Table]:
    return [_plain(table) for table in (tables.tables_of(name, content) if content["results"] else [])]


def _plain(table: rich.table.Table) -> Table:
    rows = list(zip(*([str(cell) for cell in column.cells] for column in table.columns), strict=True))
    columns = [str(column.header) for column in table.columns]
    return Table(str(table.title), columns, rows, folded=len(rows) > _LONG)


def sweep_section(sweep: Sweep, file: str) -> Section:
    """Show what a block takes as one group of it gets narrower, at the shape that was measured most."""
    times = sweep.times
    plots = [plot for kind in times.specs if (plot := _of_kind(times, kind)) is not None]
    notes = [f"{times.device}, {times.dtype}, commit {times.commit}, {times.date}"]
    return Section("Times of blocks", plots, file, times.command, notes)


def _of_kind(times: TimeTable, kind: str) -> Plot | None:
    full = times.specs[kind].full
    rows = [row for row in times.rows if row.kind == "block" and row.block_kind == kind and row.agrees]
    shapes = [(row.image_tokens, row.text_tokens, row.batch) for row in rows]
    if not rows:
        return None
    shape = max(shapes, key=shapes.count)
    curves = []
    for group, count in full.items():
        points = {1.0: 1.0}
        for row, at in zip(rows, shapes, strict=True):
            width = row.width
            if at == shape and width is not None and {g for g in full if width.get(g) != full[g]} == {group}:
                points[width.get(group, 0) / count] = row.ms / row.full_ms
        if len(points) > 1:
            curves.append(_curve(group, sorted(points.items())))
    title = f"{kind} at {shape[0]} image and {shape[1]} text tokens, batch {shape[2]}"
    return Plot(title, "share of the group that is kept", "time over that of the full block", curves)


def _curve(name: str, points: Sequence[tuple[float, float]]) -> Curve:
    return Curve(name, [x for x, _ in points], [y for _, y in points])
