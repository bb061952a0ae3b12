"""The planner: the plan with the least predicted loss within a budget of parameters, exactly.

A multiple-choice knapsack with interval students and text runs, solved as a mixed-integer program. For every group of
every block one of its counts is taken, unless a student stands in for the block. A student that is taken has counts of
its own, and so has a block that does not update the text stream. The predicted loss is the sum of what each choice
alone was measured to lose.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import lru_cache
from typing import Literal, NamedTuple

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array

from ppcl_rt.planning.block_spec import ALL_UPDATED, TEXT_NOT_UPDATED, Stream
from ppcl_rt.planning.catalog import Catalog
from ppcl_rt.planning.interval import Interval
from ppcl_rt.planning.legal import LegalWidths
from ppcl_rt.planning.plan import Plan, PlannedBlock
from ppcl_rt.planning.width import Width

# HiGHS meets a row up to 1e-6 of its scale, so a plan may come out that much over budget; then it is asked for less.
_ROW_TOLERANCE = 1e-6
_TRIES = 8
# It also takes solutions for equal whose objectives differ by less than 1e-6: losses are scaled up to be told apart.
_OBJECTIVE_SCALE = 1e6


class _Owner(NamedTuple):
    """What a choice is about: a block, a block that does not update the text, a student or a text run."""

    kind: Literal["block", "text not updated", "student", "run"]
    blocks: Interval

    @property
    def not_updated(self) -> frozenset[Stream]:
        return TEXT_NOT_UPDATED if self.kind == "text not updated" else ALL_UPDATED


class _Choice(NamedTuple):
    """A binary variable: ``owner`` runs a group at a count; or (``group`` is empty) a student or text run is taken."""

    owner: _Owner
    group: str
    units: int
    params: int
    loss: float


class Planner:
    """Plans for one catalog; answers are remembered, so asking twice costs a look-up."""

    def __init__(self, catalog: Catalog) -> None:
        self.catalog = catalog
        self._choices = list(self._list_choices())
        self._rules = self._one_of_each()
        self._remembered = lru_cache(maxsize=1024)(self._plan)
        self._near: dict[int, Planner] = {}

    def plan(self, ratio: float, timestep: float | None = None) -> Plan:
        """The best plan of at most ``ratio`` times the dense model's parameters; ratio 1 is the dense plan.

        Args:
            timestep: in [0, 1], 1 is noise: go by the losses near it, not by those over all (`Catalog.band`).

        Raises:
            ValueError: ``ratio`` is not in (0, 1], or below what the smallest plan needs; or as `Catalog.band`.
        """
        if timestep is None:
            return self._remembered(check_ratio(ratio))
        band = self.catalog.band(timestep)
        if band not in self._near:
            self._near[band] = Planner(self.catalog.near(band))
        return self._near[band].plan(ratio)

    def _plan(self, ratio: float) -> Plan:
        if ratio == 1:
            return self.catalog.dense
        losses = np.array([choice.loss for choice in self._choices])
        budget = room = ratio * self.catalog.architecture.dense_params
        for _ in range(_TRIES):
            taken = self._solve(losses, room)
            if taken is None:
                break
            plan = self._assemble(taken)
            excess = self.catalog.architecture.params(plan) - budget
            # The budget is a product of floats; the count of a plan is a whole number.
            if excess <= 0.5:
                return plan
            room -= max(2 * excess, 2 * _ROW_TOLERANCE * max(choice.params for choice in self._choices))
        raise ValueError(
            f"ratio {ratio:g} is below the smallest plan of this checkpoint, {self.smallest_in_digits:.4f}"
        )

    def plans(self, spacing: float, least_ratio: float = 0.0) -> list[Plan]:
        """The best plans at evenly spaced ratios: first the smallest plan, then one at each multiple of ``spacing``.

        Args:
            spacing: between ratios.
            least_ratio: take no ratio below this; the first plan is then the best one at this ratio.
        """
        smallest = max(self.smallest_in_digits, least_ratio)
        multiples = (n * spacing for n in range(1, round(1 / spacing) + 1))
        return [self.plan(ratio) for ratio in [smallest, *(ratio for ratio in multiples if smallest < ratio <= 1)]]

    @property
    def smallest_in_digits(self) -> float:
        """`smallest`, rounded up to four digits: a ratio that a message can name and `plan` can meet."""
        return math.ceil(self.smallest * 1e4) / 1e4

    @property
    def smallest(self) -> float:
        """Ratio of the plan with the fewest parameters."""
        taken = self._solve(np.array([float(choice.params) for choice in self._choices]), math.inf)
        assert taken is not None, "without a budget there is always a plan"
        return self.catalog.ratio(self._assemble(taken))

    def _list_choices(self) -> Iterator[_Choice]:
        catalog = self.catalog

        def counts(owner: _Owner, widths: LegalWidths) -> Iterator[_Choice]:
            spec = catalog.spec(owner.blocks.first)
            # What a block costs at any width is counted with its first group: exactly one count of it is taken.
            fixed = 0 if owner.kind == "student" else spec.fixed_params(owner.not_updated)
            groups = self._groups(owner)
            for group in groups:
                for units, loss, _ in widths.of(group):
                    params = spec.group_params(group, units, owner.not_updated)
                    yield _Choice(owner, group, units, params + (fixed if group == groups[0] else 0), loss)

        for n, widths in enumerate(catalog.blocks):
            yield from counts(_Owner("block", Interval(n, n)), widths)
        for n in sorted({n for run in catalog.text_runs for n in run.interval if n != run.interval.first}):
            yield from counts(_Owner("text not updated", Interval(n, n)), catalog.blocks[n])
        for student in catalog.students:
            owner = _Owner("student", student.interval)
            fixed = catalog.spec(student.interval.first).fixed_params()
            yield _Choice(owner, "", 0, fixed, student.loss)
            yield from counts(owner, student.widths)
        for run in catalog.text_runs:
            params = catalog.architecture.run_params(run.interval)
            yield _Choice(_Owner("run", run.interval), "", 0, params, run.loss)

    def _groups(self, owner: _Owner) -> tuple[str, ...]:
        return self.catalog.spec(owner.blocks.first).groups_without(owner.not_updated)

    def _one_of_each(self) -> LinearConstraint:
        """Rows ``low <= sum of choices <= high`` that make a set of choices a plan."""
        rows: list[list[tuple[int, float]]] = []
        bounds: list[tuple[float, float]] = []
        numbers: dict[tuple[_Owner, str], list[int]] = {}
        for n, choice in enumerate(self._choices):
            numbers.setdefault((choice.owner, choice.group), []).append(n)
        taken = {choice.owner: n for n, choice in enumerate(self._choices) if not choice.group}

        def over(kind: str, block: int) -> list[int]:
            """Students or runs that a block is part of; of runs, those in which it does not update the text."""
            return [
                n
                for owner, n in taken.items()
                if owner.kind == kind and block in owner.blocks and (kind == "student" or block != owner.blocks.first)
            ]

        for owner in dict.fromkeys(choice.owner for choice in self._choices if choice.group):
            block = owner.blocks.first
            for group in self._groups(owner):
                row = [(n, 1.0) for n in numbers[owner, group]]
                if owner.kind == "block":
                    # It runs at one count, unless a student stands in for it or it does not update the text.
                    row += [(n, 1.0) for n in (*over("student", block), *over("run", block))]
                elif owner.kind == "text not updated":
                    row += [(n, -1.0) for n in over("run", block)]
                else:
                    row.append((taken[owner], -1.0))
                rows.append(row)
                bounds.append((1.0, 1.0) if owner.kind == "block" else (0.0, 0.0))
        for run in self.catalog.text_runs:
            # The block that a run begins with computes its text: no student, and no other run over it.
            block, me = run.interval.first, taken[_Owner("run", run.interval)]
            for other in (*over("student", block), *over("run", block)):
                rows.append([(me, 1.0), (other, 1.0)])
                bounds.append((0.0, 1.0))
            for other_run in self.catalog.text_runs:
                if other_run.interval.first == block and other_run.interval > run.interval:
                    rows.append([(me, 1.0), (taken[_Owner("run", other_run.interval)], 1.0)])
                    bounds.append((0.0, 1.0))
        entries = [(i, column, value) for i, row in enumerate(rows) for column, value in row]
        i, columns, values = zip(*entries, strict=True)
        matrix = csr_array((values, (i, columns)), shape=(len(rows), len(self._choices)))
        return LinearConstraint(matrix, *map(np.array, zip(*bounds, strict=True)))

    def _solve(self, objective: np.ndarray, budget: float) -> list[_Choice] | None:
        params = np.array([[float(choice.params) for choice in self._choices]])
        room = budget - self.catalog.architecture.outer_params
        # Scaled, so that the solver's absolute tolerances mean the same for any model.
        scale = params.max()
        answer = milp(
            objective * (_OBJECTIVE_SCALE / max(objective.max(), 1e-300)),
            constraints=[self._rules, LinearConstraint(csr_array(params / scale), -np.inf, room / scale)],
            integrality=np.ones(len(self._choices)),
            bounds=Bounds(0, 1),
            options={"mip_rel_gap": 0.0},
        )
        if answer.x is None:
            return None
        return [choice for choice, value in zip(self._choices, answer.x, strict=True) if value > 0.5]

    def _assemble(self, taken: list[_Choice]) -> Plan:
        widths: dict[_Owner, dict[str, int]] = {}
        for choice in taken:
            if choice.group:
                widths.setdefault(choice.owner, {})[choice.group] = choice.units
        blocks = [
            PlannedBlock(interval=owner.blocks, width=Width(counts), student=owner.kind == "student")
            for owner, counts in widths.items()
        ]
        runs = [choice.owner.blocks for choice in taken if choice.owner.kind == "run"]
        catalog = self.catalog
        return catalog.check(Plan.of(catalog.fingerprint, catalog.architecture.depth, (), blocks, runs))


def check_ratio(ratio: float) -> float:
    """Return the ratio as a float.

    Raises:
        ValueError: not a number in (0, 1].
    """
    if isinstance(ratio, bool) or not isinstance(ratio, (int, float)) or not 0 < ratio <= 1:
        raise ValueError(f"a ratio is a number above 0 and up to 1 (parameters kept / parameters), not {ratio!r}")
    return float(ratio)
