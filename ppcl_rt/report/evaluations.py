"""What ``ppcl eval --json`` writes: budgets, what each costs and how good it is."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import Field, model_validator

from ppcl_rt.planning.budget import Budget
from ppcl_rt.report.parts import Curve, Plot, Section, Table, estimate
from ppcl_rt.report.stored import Stored, rows_of

# What a budget says besides how much: one value for all budgets of a command.
_HOW = ("shape", "pipeline", "offload")
RATIO = "ratio: the larger share of parameters and FLOPs"
STRICT, SOFT, PSNR, SSIM = "strict score", "soft score", "PSNR to the dense model, dB", "SSIM to the dense model"


class Scores(Stored):
    """Mean scores with their 95 % intervals."""

    strict: float
    strict_ci: tuple[float, float]
    soft: float
    soft_ci: tuple[float, float]


class Row(Stored):
    """A budget: costs, and the scores of a judge, or how near pictures are to those of the dense model."""

    asked: Budget
    ratio: float
    params: int
    flops: float
    bytes: int
    ms: float
    batch: int | None = None
    strict: float | None = None
    strict_ci: tuple[float, float] | None = None
    soft: float | None = None
    soft_ci: tuple[float, float] | None = None
    kinds: dict[str, Scores] = Field(default_factory=dict)
    psnr: float | None = None
    ssim: float | None = None

    @model_validator(mode="after")
    def _whole(self) -> Row:
        if self.ssim is None and None in (self.strict, self.strict_ci, self.soft, self.soft_ci):
            raise ValueError("neither scores with intervals nor a likeness is there")
        return self

    @property
    def scores(self) -> Scores | None:
        """The scores of a judge; None where there was none."""
        if self.strict is None or self.strict_ci is None or self.soft is None or self.soft_ci is None:
            return None
        return Scores(strict=self.strict, strict_ci=self.strict_ci, soft=self.soft, soft_ci=self.soft_ci)


class Evaluation(Stored):
    """A file of such rows."""

    rows: tuple[Row, ...] = Field(min_length=1)

    @classmethod
    def fits(cls, path: Path, content: Any) -> bool:
        """Whether it is a list of rows that say what was asked for."""
        return isinstance(content, list) and any("asked" in row for row in rows_of(content))

    @classmethod
    def read(cls, path: Path, content: Any) -> Evaluation:
        """Check the rows."""
        return super().read(path, {"rows": content})


def command(rows: tuple[Row, ...], file: str) -> str:
    """Return the command, as far as budgets tell it."""
    options: dict[str, list[str]] = {}
    for row in rows:
        for name, amount in row.asked.model_dump(mode="json", exclude_none=True).items():
            # Amounts are whole where they are counts: 6000000, not 6000000.0.
            shown = "{}+{}x{}".format(*amount) if name == "shape" else f"{amount}".removesuffix(".0")
            values = options.setdefault("ratios" if name == "ratio" else name, [])
            if name not in _HOW or shown not in values:
                values.append(shown)
    budgets = " ".join(f"--{name} {','.join(values)}" for name, values in options.items())
    return f"ppcl eval CHECKPOINT {budgets} --json {Path(file).name}"


def curves(evaluation: Evaluation, name: str) -> dict[str, Curve]:
    """Return what an evaluation adds to the plots of quality against ratio, by what is measured."""
    rows = sorted(evaluation.rows, key=lambda row: row.ratio)
    found = _of_scores({row.ratio: scores for row in rows if (scores := row.scores) is not None}, name)
    for what, points in (
        (PSNR, [(row.ratio, row.psnr) for row in rows if row.psnr is not None]),
        (SSIM, [(row.ratio, row.ssim) for row in rows if row.ssim is not None]),
    ):
        if points:
            found[what] = Curve(name, [x for x, _ in points], [y for _, y in points])
    return found


def _of_scores(scores: Mapping[float, Scores], name: str) -> dict[str, Curve]:
    """The curves of both scores, by ratio."""
    if not scores:
        return {}
    ratios, every = list(scores), list(scores.values())

    def curve(means: list[float], intervals: list[tuple[float, float]]) -> Curve:
        return Curve(name, ratios, means, [low for low, _ in intervals], [high for _, high in intervals])

    return {
        STRICT: curve([each.strict for each in every], [each.strict_ci for each in every]),
        SOFT: curve([each.soft for each in every], [each.soft_ci for each in every]),
    }


def section(evaluation: Evaluation, file: str) -> Section:
    """Show an evaluation: what budgets cost and score, and the scores of each kind of prompt."""
    rows = evaluation.rows
    judged = all(row.scores is not None for row in rows)
    parts: list[Plot | Table] = [_costs(rows, judged)]
    kinds = dict.fromkeys(kind for row in rows for kind in row.kinds)
    if kinds:
        parts.append(_by_kind(rows, list(kinds)))
        if len(rows) > 1:
            by_ratio = sorted(rows, key=lambda row: row.ratio)
            drawn = [
                _of_scores({row.ratio: row.kinds[kind] for row in by_ratio if kind in row.kinds}, kind)[STRICT]
                for kind in kinds
            ]
            parts.append(Plot("strict score of each kind of prompt", RATIO, STRICT, drawn))
    notes = ["Strict: the share of pictures in which everything is right; soft: the mean share of what was asked for."]
    if not judged:
        notes = ["Likeness to what the dense model draws from the same noise, which is not how good a picture is."]
    return Section("Evaluation", parts, file, command(rows, file), notes)


def _costs(rows: tuple[Row, ...], judged: bool) -> Table:
    scored = ("strict (95 %)", "soft (95 %)") if judged else ("PSNR to dense", "SSIM to dense")
    batches = "/".join(dict.fromkeys(str(row.batch) for row in rows if row.batch is not None))
    lines = []
    for row in rows:
        scores = row.scores
        if judged and scores is not None:
            said = [estimate(scores.strict, *scores.strict_ci), estimate(scores.soft, *scores.soft_ci)]
        else:
            psnr = "the same" if row.psnr is None else f"{row.psnr:.1f} dB"
            said = ["", ""] if row.ssim is None else [psnr, f"{row.ssim:.3f}"]
        costs = f"{row.ratio:.3f}", f"{row.params:,}", f"{row.flops / 1e6:.1f}", f"{row.bytes:,}", f"{row.ms:.1f}"
        lines.append([str(row.asked), *costs, *said])
    time = f"ms a forward of {batches}" if batches else "ms a forward"
    columns = ("budget", "ratio", "parameters", "MFLOPs a sample", "bytes held", time, *scored)
    return Table("what budgets cost and score", columns, lines)


def _by_kind(rows: tuple[Row, ...], kinds: list[str]) -> Table:
    lines = []
    for row in rows:
        cells = [row.kinds.get(kind) for kind in kinds]
        lines.append([f"{row.ratio:.3f}", *("" if s is None else estimate(s.strict, *s.strict_ci) for s in cells)])
    return Table("strict score (95 %) of each kind of prompt", ("ratio", *kinds), lines, folded=True)
