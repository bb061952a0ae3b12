"""What compares several things: ``ppcl train compare``, subsets of students, and any other file of rows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import Field

from ppcl_rt.messages import brief
from ppcl_rt.report.evaluations import SOFT, STRICT
from ppcl_rt.report.parts import Curve, Plot, Section, Table, estimate
from ppcl_rt.report.stored import Stored, rows_of

_TEACHER = "teacher"
# Rows and columns that are shown of a file of which nothing is known but that it has rows.
_MOST_ROWS, _MOST_COLUMNS = 200, 14


class Estimate(Stored):
    """A mean with its 95 % interval."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return estimate(self.mean, self.low, self.high)


class Quality(Stored):
    """Both scores."""

    strict: Estimate
    soft: Estimate


class Method(Stored):
    """A method at a ratio; ``share`` and ``flops`` are over the teacher's, ``less`` is by how much ours is better."""

    method: str
    ratio: float
    share: float
    flops: float
    quality: Quality
    soft: tuple[float, ...] = ()
    less: Quality | None = None


class Unreachable(Stored):
    """A method that has no model at a ratio."""

    method: str
    ratio: float
    why: str


class Comparison(Stored):
    """What ``ppcl train compare`` writes."""

    rows: tuple[Method, ...]
    unreachable: tuple[Unreachable, ...] = ()
    made_by: dict[str, Any] = Field(default_factory=dict)

    @classmethod
    def fits(cls, path: Path, content: Any) -> bool:
        """Whether its rows are of methods."""
        return any({"method", "quality"} <= row.keys() for row in rows_of(content))


class Subset(Stored):
    """A set of students at full width."""

    students: tuple[str, ...]
    blocks_gone: int
    ratio: float
    predicted: float
    velocity_error: float
    strict: float | None = None
    soft: float | None = None


class Subsets(Stored):
    """What ``bench/studies/subsets.py`` writes."""

    seed: int
    prompts: int
    rows: tuple[Subset, ...] = Field(min_length=1)

    @classmethod
    def fits(cls, path: Path, content: Any) -> bool:
        """Whether its rows count blocks that are gone."""
        return isinstance(content, dict) and any("blocks_gone" in row for row in rows_of(content))


class Rows(Stored):
    """Any other file of rows: a study's, for one."""

    rows: tuple[dict[str, Any], ...] = Field(min_length=1)
    about: dict[str, Any] = Field(default_factory=dict)

    @classmethod
    def fits(cls, path: Path, content: Any) -> bool:
        """Whether it has rows."""
        return bool(rows_of(content))

    @classmethod
    def read(cls, path: Path, content: Any) -> Rows:
        """Take the rows, and what stands next to them."""
        about = {key: value for key, value in content.items() if key != "rows"} if isinstance(content, dict) else {}
        return super().read(path, {"rows": rows_of(content), "about": about})


def curves(comparison: Comparison, suffix: str = "") -> tuple[dict[str, list[Curve]], dict[str, dict[str, float]]]:
    """Return what a comparison adds to the plots of quality against ratio: curves, and the teacher's levels."""
    found: dict[str, list[Curve]] = {STRICT: [], SOFT: []}
    levels: dict[str, dict[str, float]] = {STRICT: {}, SOFT: {}}
    for method in dict.fromkeys(row.method for row in comparison.rows):
        rows = sorted((row for row in comparison.rows if row.method == method), key=_ratio)
        for what, estimates in (
            (STRICT, [row.quality.strict for row in rows]),
            (SOFT, [row.quality.soft for row in rows]),
        ):
            if method == _TEACHER:
                levels[what][f"{_TEACHER}{suffix}"] = estimates[0].mean
                continue
            bounds = [e.low for e in estimates], [e.high for e in estimates]
            name, ratios = f"{method}{suffix}", [_ratio(row) for row in rows]
            found[what].append(Curve(name, ratios, [e.mean for e in estimates], *bounds))
    return found, levels


def _ratio(row: Method) -> float:
    """The ratio as `Catalog.ratio` counts it; a comparison says parameters and FLOPs apart."""
    return max(row.share, row.flops)


def comparison_section(comparison: Comparison, file: str) -> Section:
    """Show a comparison: every method at every ratio, and those that have no model there."""
    lines = []
    for row in comparison.rows:
        seeds = f" x{len(row.soft)}" if len(row.soft) > 1 else ""
        less = (str(row.less.strict), str(row.less.soft)) if row.less else ("", "")
        kept = f"{row.share:.3f}", f"{row.flops:.3f}"
        quality = str(row.quality.strict), str(row.quality.soft)
        lines.append([f"{row.ratio:g}", row.method + seeds, *kept, *quality, *less])
    columns = ("ratio", "method", "parameters", "FLOPs", "strict (95 %)", "soft (95 %)")
    parts = [Table("methods", (*columns, "ours is better by, strict", "by, soft"), lines)]
    if comparison.unreachable:
        left_out = [[f"{each.ratio:g}", each.method, brief(each.why)] for each in comparison.unreachable]
        parts.append(Table("ratios that a method cannot reach", ("ratio", "method", "why"), left_out, folded=True))
    return Section("Comparison", parts, file, _compare_command(comparison), [_made_by(comparison.made_by)])


def _compare_command(comparison: Comparison) -> str:
    config = comparison.made_by.get("config")
    asked = config.get("compare") if isinstance(config, dict) else None
    asked = asked if isinstance(asked, dict) else {}
    ratios = ",".join(f"{ratio:g}" for ratio in dict.fromkeys(r.ratio for r in comparison.rows if r.method != _TEACHER))
    known = "".join(f" --{name} {asked[name]}" for name in ("steps", "prompts", "seeds") if name in asked)
    return f"ppcl train compare --teacher TEACHER --ratios {ratios}{known} --out FOLDER"


def _made_by(made_by: dict[str, Any]) -> str:
    versions = made_by.get("versions")
    shown = [f"{name} {made_by[name]}" for name in ("seed", "commit") if made_by.get(name) is not None]
    shown += [f"{name} {version}" for name, version in versions.items()] if isinstance(versions, dict) else []
    return brief(f"Made by: {', '.join(shown)}.") if shown else ""


def subsets_section(subsets: Subsets, file: str) -> Section:
    """Show subsets of students: by the number of blocks that are gone, and how far errors are from predictions."""
    lines = []
    for gone in sorted({row.blocks_gone for row in subsets.rows}):
        here = [row for row in subsets.rows if row.blocks_gone == gone]
        soft = [row.soft for row in here if row.soft is not None]
        errors = [row.velocity_error for row in here]
        scores = f"{min(soft):.3f} to {max(soft):.3f}" if soft else ""
        lines.append([str(gone), str(len(here)), f"{min(errors):.4f} to {max(errors):.4f}", scores])
    # Zero has no logarithm: the empty set loses nothing.
    lossy = [row for row in subsets.rows if row.predicted > 0 and row.velocity_error > 0]
    predicted, measured = [row.predicted for row in lossy], [row.velocity_error for row in lossy]
    parts: list[Plot | Table] = [Table("students", ("blocks gone", "sets", "velocity error", "soft score"), lines)]
    if lossy:
        both = [Curve("a set of students", predicted, measured, joined=False), _diagonal([*predicted, *measured])]
        parts.append(Plot("velocity error", "predicted: sum of losses", "measured", both, logarithmic="xy"))
    script = "python bench/studies/subsets.py CHECKPOINT"
    options = f"--most {len(subsets.rows)} --prompts {subsets.prompts} --seed {subsets.seed} --json {Path(file).name}"
    return Section("Any subset of students", parts, file, f"{script} {options}")


def _diagonal(values: Sequence[float]) -> Curve:
    ends = [min(values), max(values)]
    return Curve("as predicted", ends, ends)


def rows_section(rows: Rows, file: str) -> Section:
    """Show rows that nothing more is known of."""
    plain = dict.fromkeys(key for row in rows.rows for key, value in row.items() if _is_plain(value))
    columns = list(plain)[:_MOST_COLUMNS]
    lines = [[_cell(row.get(column)) for column in columns] for row in rows.rows[:_MOST_ROWS]]
    notes = [
        brief(f"{key}: {_cell(value)}") for key, value in rows.about.items() if _is_plain(value) and key != "command"
    ]
    if len(rows.rows) > _MOST_ROWS or len(plain) > _MOST_COLUMNS:
        notes.append(f"Shown: {len(lines)} of {len(rows.rows)} rows, {len(columns)} of {len(plain)} columns.")
    command = rows.about.get("command")
    said = command if isinstance(command, str) else ""
    return Section("Other results", [Table(Path(file).stem, columns, lines, folded=len(lines) > 40)], file, said, notes)


def _is_plain(value: Any) -> bool:
    return value is None or isinstance(value, str | int | float)


def _cell(value: Any) -> str:
    if not _is_plain(value):
        return "..."
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else brief(str(value))
