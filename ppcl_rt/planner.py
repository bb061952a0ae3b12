"""The planner: the plan with the least predicted loss within a budget of parameters, exactly.

A multiple-choice knapsack with interval students, solved as a mixed-integer program. For every block and group (heads,
image MLP, text MLP, modulations) one of its counts is taken, unless a student stands in for the block; a taken student
has counts of its own. The predicted loss is the sum of what each choice alone was measured to lose.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array

from ppcl_rt.catalog import Catalog
from ppcl_rt.plan import Interval, Plan, Step, Width

# HiGHS meets a row up to 1e-6 of its scale, so a plan may come out that much over budget; then it is asked for less.
_ROW_TOLERANCE = 1e-6
_TRIES = 8
# It also takes solutions for equal whose objectives differ by less than 1e-6: losses are scaled up to be told apart.
_OBJECTIVE_SCALE = 1e6


class _Choice(NamedTuple):
    """A binary variable: a student is plugged in (``group`` is empty), or ``owner`` runs a group at a count."""

    owner: int | Interval
    group: str
    count: int  # type: ignore[assignment]  # hides tuple.count
    params: int
    loss: float


class Planner:
    """Plans for one catalog; answers are remembered, so asking twice costs a look-up."""

    def __init__(self, catalog: Catalog) -> None:
        self.catalog = catalog
        self._choices = [*self._choices_of_blocks(), *self._choices_of_students()]
        self._rules = self._one_of_each()
        self._remembered = lru_cache(maxsize=1024)(self._plan)

    def plan(self, ratio: float) -> Plan:
        """The best plan of at most ``ratio`` times the dense model's parameters; ratio 1 is the dense plan.

        Raises:
            ValueError: ``ratio`` is not in (0, 1], or below what the smallest plan needs.
        """
        return self._remembered(check_ratio(ratio))

    def _plan(self, ratio: float) -> Plan:
        if ratio == 1:
            return self.catalog.dense
        losses = np.array([choice.loss for choice in self._choices])
        budget = room = ratio * self.catalog.shape.dense_params
        for _ in range(_TRIES):
            taken = self._solve(losses, room)
            if taken is None:
                break
            plan = self._assemble(taken)
            excess = self.catalog.shape.params(plan) - budget
            # The budget is a product of floats; the count of a plan is a whole number.
            if excess <= 0.5:
                return plan
            room -= max(2 * excess, 2 * _ROW_TOLERANCE * max(choice.params for choice in self._choices))
        # Rounded up, so that the ratio that is named can be had.
        smallest = math.ceil(self.smallest * 1e4) / 1e4
        raise ValueError(f"ratio {ratio:g} is below the smallest plan of this checkpoint, {smallest:.4f}")

    @property
    def smallest(self) -> float:
        """Ratio of the plan with the fewest parameters."""
        taken = self._solve(np.array([float(choice.params) for choice in self._choices]), math.inf)
        assert taken is not None, "without a budget there is always a plan"
        return self.catalog.ratio(self._assemble(taken))

    def _choices_of_blocks(self) -> list[_Choice]:
        shape = self.catalog.shape
        choices = []
        for block, widths in enumerate(self.catalog.blocks):
            for group in Width._fields:
                # What a block costs at any width is counted with its heads: exactly one count of them is taken.
                fixed = shape.fixed_params if group == "heads" else 0
                choices += [
                    _Choice(block, group, n, shape.group_params(group, n) + fixed, loss) for n, loss in widths.of(group)
                ]
        return choices

    def _choices_of_students(self) -> list[_Choice]:
        shape = self.catalog.shape
        choices = []
        for student in self.catalog.students:
            choices.append(_Choice(student.interval, "", 0, shape.fixed_params, student.loss))
            for group in Width._fields:
                choices += [
                    _Choice(student.interval, group, n, shape.group_params(group, n), loss)
                    for n, loss in student.widths.of(group)
                ]
        return choices

    def _one_of_each(self) -> LinearConstraint:
        """Rows ``sum of choices = right side``: a block runs or is stood in for; a plugged student has one width."""
        rows: list[list[tuple[int, float]]] = []
        right: list[float] = []
        plugged = {choice.owner: n for n, choice in enumerate(self._choices) if not choice.group}
        for owner in [*range(self.catalog.shape.depth), *plugged]:
            for group in Width._fields:
                row = [
                    (n, 1.0) for n, choice in enumerate(self._choices) if (choice.owner, choice.group) == (owner, group)
                ]
                if isinstance(owner, Interval):
                    row.append((plugged[owner], -1.0))
                else:
                    row += [(n, 1.0) for interval, n in plugged.items() if owner in interval]  # type: ignore[operator]
                rows.append(row)
                right.append(0.0 if isinstance(owner, Interval) else 1.0)
        entries = [(i, column, value) for i, row in enumerate(rows) for column, value in row]
        i, columns, values = zip(*entries, strict=True)
        matrix = csr_array((values, (i, columns)), shape=(len(rows), len(self._choices)))
        return LinearConstraint(matrix, right, right)

    def _solve(self, objective: np.ndarray, budget: float) -> list[_Choice] | None:
        params = np.array([[float(choice.params) for choice in self._choices]])
        room = budget - self.catalog.shape.outer_params
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
        widths: dict[int | Interval, dict[str, int]] = {}
        for choice in taken:
            if choice.group:
                widths.setdefault(choice.owner, {})[choice.group] = choice.count
        steps = [
            Step(
                blocks=owner if isinstance(owner, Interval) else Interval(owner, owner),
                width=Width(**counts),
                student=isinstance(owner, Interval),
            )
            for owner, counts in widths.items()
        ]
        catalog = self.catalog
        return catalog.check(Plan.of(catalog.fingerprint, catalog.shape.depth, (), steps))


def check_ratio(ratio: float) -> float:
    """Return the ratio as a float.

    Raises:
        ValueError: not a number in (0, 1].
    """
    if isinstance(ratio, bool) or not isinstance(ratio, (int, float)) or not 0 < ratio <= 1:
        raise ValueError(f"a ratio is a number above 0 and up to 1 (parameters kept / parameters), not {ratio!r}")
    return float(ratio)
