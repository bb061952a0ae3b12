"""Sketches of what each choice changes: what a planner needs to know of interactions. Plain data, no torch.

With ``D_i`` the change of the guided prediction that choice ``i`` makes alone, weighted so that ``|D_i|^2`` is its
loss, the loss of a plan is about ``|sum D_i|^2``: choices add up, or cancel out. A count sketch keeps inner products:
every coordinate of ``D_i`` (sample, token, channel) is added, with a random sign, to one bucket of ``size``. The
coordinates of one band of the timestep go to buckets of that band alone, so a slice of a row is the sketch of a band.

A checkpoint holds two independent sketches: one to plan with, and one to score plans with, whose errors the planner
cannot have exploited. Rows are stored with unit norm, since float16 could not hold their range; catalogs hold the
losses that scale them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np

from ppcl_rt.planning.catalog import Catalog
from ppcl_rt.planning.interval import Interval
from ppcl_rt.planning.legal import LegalWidths
from ppcl_rt.planning.plan import Plan

# Names of the tensors ``[choices, size]`` of a checkpoint, float16 with rows of norm 1.
PLAN, SCORE = TENSORS = ("sketches.plan", "sketches.score")


class Choice(NamedTuple):
    """One choice of a catalog, and so one row of a sketch.

    Attributes:
        kind: what is changed; a narrower count of a student's group is a choice of the student.
        interval: of the block, the student or the text run.
        group: the group that is narrowed; empty for a student at full width and for a text run.
        units: the count that the group is narrowed to, with ``group`` alone.
    """

    kind: Literal["block", "student", "text_run"]
    interval: Interval
    group: str = ""
    units: int = 0


class Measured(NamedTuple):
    """A choice with its loss, and the parts of it in each band of the timestep."""

    choice: Choice
    loss: float
    bands: tuple[float, ...]


def measured(catalog: Catalog) -> Iterator[Measured]:
    """Yield all choices of a catalog in the order of the rows, with their losses.

    First come the narrower counts of every block, group by group; then every student at full width, followed by its
    own narrower counts; then the text runs.
    """

    def narrower(kind: Literal["block", "student"], interval: Interval, widths: LegalWidths) -> Iterator[Measured]:
        for group in widths.groups:
            for count in widths.of(group)[1:]:
                yield Measured(Choice(kind, interval, group, count.units), count.loss, count.bands)

    for number, widths in enumerate(catalog.blocks):
        yield from narrower("block", Interval(number, number), widths)
    for student in catalog.students:
        yield Measured(Choice("student", student.interval), student.loss, student.bands)
        yield from narrower("student", student.interval, student.widths)
    for run in catalog.text_runs:
        yield Measured(Choice("text_run", run.interval), run.loss, run.bands)


def choices(catalog: Catalog) -> Iterator[Choice]:
    """Yield all choices of a catalog in the order of the rows (`measured`)."""
    return (each.choice for each in measured(catalog))


def taken(catalog: Catalog, plan: Plan) -> list[int]:
    """Find the rows of the choices that a plan takes, rising.

    Raises:
        ValueError: the plan takes what no row is there for: a count that was not measured, or blocks that it skips.
    """
    rows = {choice: number for number, choice in enumerate(choices(catalog))}
    wanted = [Choice("text_run", run) for run in plan.text_runs]
    for planned in plan.blocks:
        kind: Literal["block", "student"] = "student" if planned.student else "block"
        if planned.student:
            wanted.append(Choice("student", planned.interval))
        spec = catalog.spec(planned.interval.first)
        for group in spec.groups_without(plan.not_updated(planned)):
            if planned.width[group] != spec.full[group]:
                wanted.append(Choice(kind, planned.interval, group, planned.width[group]))
    missing = next((choice for choice in wanted if choice not in rows), None)
    if missing is not None or plan.skipped:
        raise ValueError(f"the plan takes {missing or 'skipped blocks'}, which was not measured")
    return sorted(rows[choice] for choice in wanted)


@dataclass(frozen=True)
class Sketches:
    """Rows whose squared norms are the losses of choices, in the order of `choices`.

    Attributes:
        rows: ``[choices, size]`` float64.
    """

    rows: np.ndarray

    def loss(self, taken: Sequence[int]) -> float:
        """Predict the loss of choices taken together, ``|sum D_i|^2``."""
        return float(np.square(self.rows[list(taken)].sum(0)).sum())

    @classmethod
    def of(cls, unit_rows: np.ndarray, catalog: Catalog, band: int | None = None) -> Sketches:
        """Scale the rows of a checkpoint by the losses of its catalog.

        Args:
            unit_rows: ``[choices, size]``, as stored.
            band: keep only this band of the timestep, whose part of the loss a row's squared norm then is.

        Raises:
            ValueError: there are more or fewer rows than choices, or the catalog knows of no sketch.
        """
        found = list(measured(catalog))
        sketch = catalog.sketch
        if sketch is None or unit_rows.shape != (len(found), sketch.size):
            wanted = None if sketch is None else (len(found), sketch.size)
            raise ValueError(f"the catalog's sketches are {wanted}, not {unit_rows.shape}")
        rows = unit_rows.astype(np.float64)
        losses = np.array([each.loss if band is None else each.bands[band] for each in found])
        if band is not None:
            rows = rows[:, sketch.slice(band)]
        norms = np.linalg.norm(rows, axis=1)
        # Rounding to float16 moved the norms by up to 5e-4.
        return cls(rows * (np.sqrt(losses) / np.where(norms > 0, norms, 1.0))[:, None])


def select(rows: np.ndarray, old: Catalog, new: Catalog) -> np.ndarray:
    """Keep the rows of the choices that a smaller catalog has, in its order.

    Args:
        rows: ``[choices of the old catalog, size]``.

    Raises:
        KeyError: the new catalog has a choice that the old one had not.
    """
    places = {choice: number for number, choice in enumerate(choices(old))}
    return rows[[places[choice] for choice in choices(new)]]
