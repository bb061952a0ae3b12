"""A binary program solved exactly by way of its relaxation: most variables are out of the question. No torch.

HiGHS (scipy) solves both. What is added here is the order: the relaxation first, which takes a tenth of the time; then
a program over the few variables that the relaxation is nearly indifferent about, whose solution bounds what can be
gained by any other variable. A variable whose reduced cost exceeds that gain keeps its value in every better solution.
"""

from __future__ import annotations

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, linprog, milp
from scipy.sparse import csr_array, vstack

# Variables of the first small program; a plan of 60 blocks has some 250 choices, and as many alternatives matter.
_FIRST = 400
# HiGHS takes solutions for equal whose objectives differ by less than 1e-6: objectives are scaled up to be told apart.
_OBJECTIVE_SCALE = 1e6


def minimise(
    objective: np.ndarray, rules: LinearConstraint, rows: np.ndarray, room: np.ndarray, gap: float, proof: bool = True
) -> np.ndarray | None:
    """Choose variables, each 0 or 1, with the least sum of the objective.

    Args:
        objective: ``[variables]``.
        rules: hold exactly; rows with equal bounds, and rows of at most so many.
        rows: costs ``[limits, variables]``, scaled to about 1.
        room: ``[limits]``: ``rows @ x <= room``.
        gap: share of the objective by which the answer may exceed the least.
        proof: whether that holds among all variables, or among those alone that the relaxation likes best.

    Returns:
        Numbers of the variables that are 1, or None where nothing fits.
    """
    objective = objective * (_OBJECTIVE_SCALE / max(np.abs(objective).max(), 1e-300))
    if len(objective) <= 2 * _FIRST:
        return _solve(objective, rules, rows, room, np.ones(len(objective), dtype=bool), gap)
    exact = rules.lb == rules.ub
    relaxed = linprog(
        objective,
        A_ub=vstack([rules.A[~exact], csr_array(rows)]),
        b_ub=np.concatenate([rules.ub[~exact], room]),
        A_eq=rules.A[exact],
        b_eq=rules.ub[exact],
        bounds=(0, 1),
        method="highs",
    )
    if relaxed.x is None:
        return None
    # What the objective rises by at least, for each variable that leaves its bound.
    reduced = relaxed.lower.marginals - relaxed.upper.marginals
    order, first = np.argsort(reduced, kind="stable"), _FIRST if proof else 2 * _FIRST
    free = relaxed.x > 0
    while True:
        free[order[:first]] = True
        found = _solve(objective, rules, rows, room, free, gap)
        if found is not None:
            if not proof:
                return found
            value = objective[found].sum()
            needed = reduced <= value - relaxed.fun - gap * abs(value)
            if (needed <= free).all():
                return found
            if needed.sum() <= 2 * free.sum():
                free |= needed
                continue
            # A better solution of a program twice as large costs less than all that this one leaves open.
        elif free.all():
            return None
        first *= 2


def _solve(
    objective: np.ndarray, rules: LinearConstraint, rows: np.ndarray, room: np.ndarray, free: np.ndarray, gap: float
) -> np.ndarray | None:
    """Solve over the free variables; the others are 0."""
    columns = np.flatnonzero(free)
    answer = milp(
        objective[columns],
        constraints=[
            LinearConstraint(rules.A[:, columns], rules.lb, rules.ub),
            LinearConstraint(csr_array(rows[:, columns]), -np.inf, room),
        ],
        integrality=np.ones(len(columns)),
        bounds=Bounds(0, 1),
        options={"mip_rel_gap": gap},
    )
    return None if answer.x is None else columns[answer.x > 0.5]
