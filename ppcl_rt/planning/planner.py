"""The planner: the plan with the least predicted loss within budgets.

A multiple-choice knapsack with interval students and text runs, solved as a mixed-integer program. Without sketches of
what choices change, the predicted loss is the sum of what each choice alone was measured to lose, and the plan is the
best there is. With sketches it is |sum of changes|^2 (`Interactions`), a quadratic form that the solver cannot minimise
at these sizes: it solves linear programs on marginal losses, one after the other, and then exchanges counts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cached_property, lru_cache

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array, hstack

from ppcl_rt.planning import sketch
from ppcl_rt.planning.architecture import Tokens
from ppcl_rt.planning.bands import near
from ppcl_rt.planning.budget import Budget, Limit, check_ratio, ratio_limits
from ppcl_rt.planning.catalog import Catalog
from ppcl_rt.planning.choices import Choices
from ppcl_rt.planning.costs import Bytes, Cost
from ppcl_rt.planning.interactions import Interactions
from ppcl_rt.planning.milliseconds import Times
from ppcl_rt.planning.plan import Plan
from ppcl_rt.planning.solver import minimise

# HiGHS meets a row up to 1e-6 of its scale, so a plan may come out that much over budget; then it is asked for less.
_ROW_TOLERANCE = 1e-6
_TRIES = 8
# Linear programs on marginal losses that are solved for one plan. They stand still or go round after two or three.
_MARGINAL_PROGRAMS = 4
# How exactly a linear program is solved, as a share of the loss: to the end up to so many choices. Beyond them (60
# blocks have some 5,000) a proof that nothing is better takes seconds. Programs on marginal losses are only steps,
# after which counts are exchanged: they go without a proof.
_EXACT_CHOICES = 2000
_GAP = 5e-3
_STEP_GAP = 2e-2
# Further starts for one plan. Small catalogs have fewer good ways down, and each start takes milliseconds there.
_MOST_STARTS = 12
_STARTS_TIMES_CHOICES = 2000
# A budget is often a product of floats, such as a ratio of the dense cost: equal within rounding is within it.
_ROUNDING = 1e-12


class Planner:
    """Plans for one catalog; answers are remembered, so asking twice costs a look-up.

    Args:
        catalog: what there is to choose from.
        sketches: returns the two sketches as stored (`sketch.TENSORS`); called when they are needed. Without it, losses
            add up.
        band: go by the losses in this band of the timestep; None for those over all.
    """

    def __init__(
        self, catalog: Catalog, sketches: Callable[[], Sequence[np.ndarray]] | None = None, band: int | None = None
    ) -> None:
        self.catalog = catalog if band is None else near(catalog, band)
        # Rows are scaled by the losses of the whole catalog.
        self._whole, self._sketches, self._band = catalog, sketches, band
        self._choices = Choices(self.catalog)
        self._remembered = lru_cache(maxsize=1024)(self._plan)
        self._near: dict[int, Planner] = {}

    def plan(self, budget: float | tuple[Limit, ...], timestep: float | None = None) -> Plan:
        """The plan with the least predicted loss within a budget; the dense plan wherever it fits, and the only
        plan of a checkpoint that holds one.

        A checkpoint whose frontier was measured (`Catalog.frontier`) answers with the best plan of it that fits: a
        larger budget never gets a worse plan. Where none fits, and for other checkpoints, the plan is made here.

        Args:
            budget: a ratio, or limits (`Budget.limits`), which hold all at once.
            timestep: in [0, 1], 1 is noise: go by the losses near it, not by those over all (`Catalog.band`).

        Raises:
            ValueError: a ratio is not in (0, 1], or no plan is within the budget; or as `Catalog.band`.
        """
        if timestep is not None:
            return self.near(self.catalog.band(timestep)).plan(budget)
        if not isinstance(budget, tuple):
            ratio = check_ratio(budget)
            try:
                return self._remembered(ratio_limits(self.catalog, ratio))
            except _NoneFits:
                raise ValueError(
                    f"ratio {ratio:g} is below the smallest plan of this checkpoint, {self.smallest_in_digits:.4f}"
                ) from None
        try:
            return self._remembered(budget)
        except _NoneFits:
            raise ValueError(self._why_none(budget)) from None

    def plan_within(self, budget: Budget, weights: Callable[[], Bytes], times: Callable[[Tokens], Times]) -> Plan:
        """The plan with the least predicted loss within a budget; arguments as of `Budget.limits`.

        Raises:
            ValueError: as `plan`, or as ``times`` does.
        """
        if budget.only_ratio and budget.ratio is not None:
            # By itself it is refused in its own words.
            return self.plan(budget.ratio)
        return self.plan(budget.limits(self.catalog, weights, times))

    def near(self, band: int) -> Planner:
        """The planner of a band of the timestep."""
        if band not in self._near:
            # Of two threads that are here at once, both get the planner of one: it remembers its answers.
            self._near.setdefault(band, Planner(self.catalog, self._sketches, band))
        return self._near[band]

    def among(self, catalog: Catalog) -> Planner:
        """The planner of a smaller catalog, all of whose choices this one has."""
        given = self._sketches
        return Planner(catalog, given and (lambda: [sketch.select(rows, self._whole, catalog) for rows in given()]))

    def loss(self, plan: Plan) -> float:
        """Predicted loss of a plan: |sum of changes|^2 where there are sketches, else the sum of losses.

        NaN where the plan takes what was not measured.
        """
        if self._scaled is None:
            return self.catalog.loss(plan)
        try:
            return self._scaled[1].loss(sketch.taken(self.catalog, plan))
        except ValueError:
            return math.nan

    def measured_loss(self, plan: Plan) -> float | None:
        """The loss of the dense plan, or of one that was measured as a whole (`Catalog.frontier`); None of others."""
        if plan == self.catalog.dense:
            return 0.0
        return next((m.loss for m, each in zip(self.catalog.frontier, self._frontier_plans) if each == plan), None)

    # Many plans.

    def plans(self, spacing: float, least_ratio: float = 0.0) -> list[Plan]:
        """The best plans at evenly spaced ratios: first the smallest plan, then one at each multiple of ``spacing``.

        Args:
            spacing: between ratios.
            least_ratio: take no ratio below this; the first plan is then the best one at this ratio.
        """
        smallest = max(self.smallest_in_digits, least_ratio)
        multiples = (n * spacing for n in range(1, round(1 / spacing) + 1))
        return [self.plan(ratio) for ratio in [smallest, *(ratio for ratio in multiples if smallest < ratio <= 1)]]

    def frontier(self, spacing: float, others: float, least_share: float = 0.0, candidates: int = 1) -> list[Plan]:
        """Plans for every budget, made without a look at `Catalog.frontier`: what is measured to become it.

        Args:
            spacing: between ratios.
            others: between shares of the dense parameters alone, and of the dense FLOPs alone.
            least_share: make no plan for less than this, of the ratio or of either.
            candidates: the most plans for one budget, the best by their predicted losses: measuring tells them apart.
        """
        if self.catalog.only is not None:
            return [self.catalog.largest]
        params, flops = ratio_limits(self.catalog, 1.0)
        found: dict[Plan, None] = {}
        for step, dense in ((spacing, (params, flops)), (others, (params,)), (others, (flops,))):
            least, before = max(self._least_share(dense), least_share), None
            for share in (least, *(n * step for n in range(1, round(1 / step)) if n * step > least)):
                limits = tuple(Limit(cost, share * whole) for cost, whole in dense)
                solved = self._solve_within(limits, before)
                found.update(dict.fromkeys(map(self._choices.plan, solved[:candidates])))
                before = solved[0] if solved else before
        found.setdefault(self.catalog.dense)
        return list(found)

    # The least that can be.

    @property
    def smallest_in_digits(self) -> float:
        """`smallest`, rounded up to four digits: a ratio that a message can name and `plan` can meet."""
        return math.ceil(self.smallest * 1e4) / 1e4

    @cached_property
    def smallest(self) -> float:
        """The least ratio that a plan has."""
        return self._least_share(ratio_limits(self.catalog, 1.0))

    def least(self, cost: Cost) -> float:
        """The least that a plan costs."""
        return self._least_share([Limit(cost, 1.0)])

    def _least_share(self, limits: Sequence[Limit]) -> float:
        """The least share of several limits that a plan needs: the larger of its shares."""
        architecture = self.catalog.architecture
        if self.catalog.only is not None:
            return max(cost.of(architecture, self.catalog.largest) / whole for cost, whole in limits)
        # One more variable, the share, which no cost exceeds.
        rows, outer = [], []
        for cost, whole in limits:
            rows.append([*(self._choices.costs(cost) / whole), -1.0])
            outer.append(-cost.outer(self.catalog.architecture) / whole)
        rules = self._choices.rules
        none = csr_array((rules.A.shape[0], 1))
        count = len(self._choices)
        answer = milp(
            np.array([*np.zeros(count), 1.0]),
            constraints=[
                LinearConstraint(hstack([rules.A, none]), rules.lb, rules.ub),
                LinearConstraint(np.array(rows), -np.inf, np.array(outer)),
            ],
            integrality=np.array([*np.ones(count), 0.0]),
            bounds=Bounds(np.array([*np.zeros(count), -np.inf]), np.array([*np.ones(count), np.inf])),
            options={"mip_rel_gap": 0.0},
        )
        assert answer.x is not None, "without a budget there is always a plan"
        plan = self._choices.plan(np.flatnonzero(answer.x[:-1] > 0.5))
        return max(cost.of(architecture, plan) / whole for cost, whole in limits)

    def _why_none(self, limits: tuple[Limit, ...]) -> str:
        for cost, most in limits:
            if most < (least := self.least(cost)) * (1 - _ROUNDING):
                return f"no plan of this checkpoint keeps within {most:.6g} {cost.unit}: the least is {least:.6g}"
        wanted = " and ".join(f"{most:.6g} {cost.unit}" for cost, most in limits)
        share = self._least_share(limits)
        return f"no plan of this checkpoint keeps within {wanted} at once: the least is {share:.4g} times all of them"

    # One plan.

    def _plan(self, limits: tuple[Limit, ...]) -> Plan:
        architecture = self.catalog.architecture
        if all(_within(cost.of(architecture, self.catalog.largest), most) for cost, most in limits):
            return self.catalog.largest
        if self.catalog.only is not None:
            raise _NoneFits
        if (measured := self._of_frontier(limits)) is not None:
            return measured
        solved = self._solve_within(limits)
        if not solved:
            raise _NoneFits
        return self._choices.plan(solved[0])

    def _of_frontier(self, limits: tuple[Limit, ...]) -> Plan | None:
        """The plan of the measured frontier that loses least within limits."""
        fits = np.ones(len(self.catalog.frontier), dtype=bool)
        for cost, most in limits:
            fits &= self._frontier_costs(cost) <= most * (1 + _ROUNDING)
        if not fits.any():
            return None
        losses = np.where(fits, [measured.loss for measured in self.catalog.frontier], np.inf)
        return self._frontier_plans[int(losses.argmin())]

    @cached_property
    def _frontier_plans(self) -> list[Plan]:
        try:
            return [self._choices.of_rows(each.choices) for each in self.catalog.frontier]
        except (ValueError, IndexError) as error:
            said = str(error).splitlines()[0]
            raise ValueError(f"the frontier of the catalog holds a plan that cannot be: {said}") from None

    @cached_property
    def _frontier_costs(self) -> Callable[[Cost], np.ndarray]:
        def costs(cost: Cost) -> np.ndarray:
            return np.array(cost.of_all(self.catalog.architecture, self._frontier_plans))

        return lru_cache(maxsize=64)(costs)

    def _solve_within(self, limits: tuple[Limit, ...], known: np.ndarray | None = None) -> list[np.ndarray]:
        """Different sets of choices that were found within limits, the best first; none where there is none.

        Args:
            known: a set within the limits, which the first is no worse than.
        """
        choices = self._choices
        linear = self._linear(choices.losses, limits, 0.0 if len(choices) <= _EXACT_CHOICES else _GAP)
        if linear is None or self._forms is None:
            return [each for each in (linear, known) if each is not None][:1]
        planning, scoring = self._forms
        costs = np.array([choices.costs(cost) for cost, _ in limits])
        outer = np.array([cost.outer(self.catalog.architecture) for cost, _ in limits])
        room = np.array([most for _, most in limits]) * (1 + _ROUNDING) - outer
        found = [linear, *(planning.improve(start, costs, room) for start in (linear, known) if start is not None)]
        best = min(found, key=planning.loss)
        for _ in range(_MARGINAL_PROGRAMS):
            step = self._linear(planning.marginal(best), limits, _STEP_GAP, proof=False)
            if step is None or any(np.array_equal(step, other) for other in found):
                break
            found += [step, planning.improve(step, costs, room)]
            if planning.loss(found[-1]) >= planning.loss(best):
                break
            best = found[-1]
        # Other starts: the linear program with losses that are off at random.
        rng = np.random.default_rng(0)
        for _ in range(min(_MOST_STARTS, _STARTS_TIMES_CHOICES // len(choices))):
            start = self._linear(choices.losses * np.exp(rng.normal(size=len(choices))), limits, _STEP_GAP, proof=False)
            if start is not None:
                found.append(planning.improve(start, costs, room))
        if known is not None:
            found.append(known)
        # Different starts often end in one set.
        distinct = {each.tobytes(): each for each in found}
        return sorted(distinct.values(), key=scoring.loss)

    def _linear(
        self, objective: np.ndarray, limits: tuple[Limit, ...], gap: float, proof: bool = True
    ) -> np.ndarray | None:
        """The set of choices with the least sum of ``objective`` within limits; None where there is none."""
        architecture = self.catalog.architecture
        rows, most, scales = [], [], []
        for cost, budget in limits:
            row = self._choices.costs(cost)
            # Scaled, so that the solver's absolute tolerances mean the same for any model.
            scales.append(np.abs(row).max())
            rows.append(row / scales[-1])
            most.append((budget - cost.outer(architecture)) / scales[-1])
        room = np.array(most)
        for _ in range(_TRIES):
            taken = minimise(objective, self._choices.rules, np.array(rows), room, gap, proof)
            if taken is None:
                return None
            excess = np.array([row[taken].sum() for row in rows]) - most
            if (excess <= _ROUNDING * np.maximum(np.abs(most), 1.0)).all():
                return taken
            room = room - np.where(excess > 0, np.maximum(2 * excess, 2 * _ROW_TOLERANCE), 0.0)
        return None

    @cached_property
    def _scaled(self) -> tuple[sketch.Sketches, sketch.Sketches] | None:
        """The sketches to plan by and to score by; None where there are none."""
        if self._sketches is None:
            return None
        planning, scoring = (sketch.Sketches.of(rows, self._whole, self._band) for rows in self._sketches())
        return planning, scoring

    @cached_property
    def _forms(self) -> tuple[Interactions, Interactions] | None:
        """What plans are improved by, and what they are scored by; None where there are no sketches."""
        if self._scaled is None:
            return None
        rows = self._choices.rows
        planning, scoring = (
            Interactions(self._choices, np.where(rows[:, None] >= 0, scaled.rows[rows], 0.0)) for scaled in self._scaled
        )
        return planning, scoring


class _NoneFits(Exception):
    """No plan is within the limits."""


def _within(cost: float, most: float) -> bool:
    return cost <= most * (1 + _ROUNDING)
