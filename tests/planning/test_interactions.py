"""Plans by |sum of changes|^2: within every budget, no worse than random plans; what a measured frontier answers."""

from __future__ import annotations

import numpy as np
import pytest
from catalogs import random_catalog, seeded
from hypothesis import given, settings
from hypothesis import strategies as st

from ppcl_rt import Catalog, Planner, Tokens
from ppcl_rt.planning import sketch
from ppcl_rt.planning.budget import Limit
from ppcl_rt.planning.catalog import MeasuredPlan
from ppcl_rt.planning.choices import Choices
from ppcl_rt.planning.costs import Bytes, Flops, Params
from ppcl_rt.planning.interactions import Interactions
from ppcl_rt.planning.legal import Sketch

SIZE = 32


def with_sketches(catalog: Catalog, rng: np.random.Generator) -> tuple[Catalog, list[np.ndarray]]:
    """Changes that point in a few common directions, so that they add up or cancel out."""
    count = len(list(sketch.choices(catalog)))
    common = rng.normal(size=(3, SIZE))
    rows = common[rng.integers(0, 3, count)] * rng.choice([-1, 1], count)[:, None] + 0.7 * rng.normal(
        size=(count, SIZE)
    )
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    described = catalog.model_copy(update={"sketch": Sketch(seed=0, size=SIZE, bands=1)})
    return described, [rows.astype(np.float16)] * 2


def random_sets(choices: Choices, rng: np.random.Generator, count: int) -> list[np.ndarray]:
    """Random sets of choices that make a plan."""
    catalog, found = choices.catalog, []
    for _ in range(count):
        covered, students, runs = set[int](), [], []
        for student in rng.permutation(len(catalog.students)):
            interval = catalog.students[student].interval
            if rng.random() < 0.4 and not covered & set(interval):
                covered |= set(interval)
                students.append(interval)
        in_runs = set[int]()
        for number in rng.permutation(len(catalog.text_runs)):
            interval = catalog.text_runs[number].interval
            if rng.random() < 0.4 and not (covered | in_runs) & set(interval):
                in_runs |= set(interval)
                runs.append(interval)
        # How much is cut differs from plan to plan.
        cut = rng.random()
        taken = []
        for owner, group in choices._numbers:
            inside = {
                "block": owner.blocks.first not in covered
                and not any(owner.blocks.first in run and owner.blocks.first != run.first for run in runs),
                "text not updated": any(owner.blocks.first in run and owner.blocks.first != run.first for run in runs),
                "student": owner.blocks in students,
                "run": owner.blocks in runs,
            }[owner.kind]
            if inside:
                numbers = choices._numbers[owner, group]
                taken.append(rng.choice(numbers) if rng.random() < cut else numbers[0])
        found.append(np.array(sorted(taken)))
    return found


@settings(seeded, max_examples=4)
@given(seed=st.integers(0, 10**6), depth=st.integers(3, 6), students=st.integers(0, 3))
def test_no_worse_than_random_plans_and_within_every_budget(seed, depth, students):
    rng = np.random.default_rng(seed)
    catalog, rows = with_sketches(random_catalog(rng, depth, students), rng)
    planner, choices = Planner(catalog, lambda: rows), Choices(catalog)
    linear = Planner(catalog)
    scores = Interactions(
        choices, np.where(choices.rows[:, None] >= 0, sketch.Sketches.of(rows[1], catalog).rows[choices.rows], 0)
    )
    sets = random_sets(choices, rng, 1000)
    losses = np.array([scores.loss(taken) for taken in sets])
    architecture, reference = catalog.architecture, catalog.reference
    params, flops = Params(), Flops(reference)
    costs = {
        cost: np.array([choices.costs(cost)[taken].sum() for taken in sets]) + cost.outer(architecture)
        for cost in (params, flops)
    }
    least = {cost: planner.least(cost) for cost in costs}
    dense = {params: architecture.dense_params, flops: architecture.dense_flops(reference)}
    for share in rng.uniform(0.1, 0.9, 2):
        for asked in ((params,), (flops,)):
            limits = tuple(Limit(c, least[c] + share * (dense[c] - least[c])) for c in asked)
            plan = planner.plan(limits)
            image, text, _ = reference
            real = {params: architecture.params(plan), flops: architecture.flops(plan, image, text)}
            assert all(real[cost] <= most for cost, most in limits)
            fits = np.all([costs[cost] <= most for cost, most in limits], axis=0)
            score = planner.loss(plan)
            assert score == pytest.approx(sketch.Sketches.of(rows[1], catalog).loss(sketch.taken(catalog, plan)))
            assert score <= planner.loss(linear.plan(limits)) * (1 + 1e-6)
            if fits.any():
                assert score <= losses[fits].min() * (1 + 1e-6)


@settings(seeded, max_examples=3)
@given(seed=st.integers(0, 10**6))
def test_a_measured_frontier_answers_every_budget(seed):
    """A larger budget never gets a worse plan, in any currency; what no measured plan fits is planned anew."""
    rng = np.random.default_rng(seed)
    catalog, rows = with_sketches(random_catalog(rng, 3, 2), rng)
    plans = Planner(catalog, lambda: rows).frontier(0.2, 0.34)
    assert catalog.dense in plans and len(set(plans)) == len(plans)
    measured = [
        MeasuredPlan(
            choices=tuple(sketch.taken(catalog, plan)), loss=0.0 if plan == catalog.dense else rng.uniform(0.1, 1)
        )
        for plan in plans
    ]
    catalog = Catalog.model_validate({**catalog.model_dump(), "frontier": [each.model_dump() for each in measured]})
    losses = dict(zip(plans, (each.loss for each in measured), strict=True))
    planner, architecture = Planner(catalog, lambda: rows), catalog.architecture
    for cost in (Params(), Flops(catalog.reference), Bytes(2)):
        dense, least = cost.of(architecture, catalog.dense), min(cost.of(architecture, plan) for plan in plans)
        answers = [planner.plan((Limit(cost, most),)) for most in np.linspace(least, dense, 25)]
        assert answers[-1] == catalog.dense
        found = [losses[plan] for plan in answers]
        assert found == sorted(found, reverse=True)
        # The very best of those that fit.
        for most, plan in zip(np.linspace(least, dense, 25), answers, strict=True):
            fits = [losses[other] for other in plans if cost.of(architecture, other) <= most]
            assert losses[plan] == min(fits)
    with pytest.raises(ValueError, match="the least is"):
        planner.plan((Limit(Params(), planner.least(Params()) - 1),))
    broken = catalog.model_copy(update={"frontier": (MeasuredPlan(choices=(10**6,), loss=0.5),)})
    with pytest.raises(ValueError, match="frontier"):
        Planner(broken).plan(0.9)


def test_budgets_that_only_together_cannot_be_met_say_so():
    catalog = random_catalog(np.random.default_rng(3), 4, 2)
    planner = Planner(catalog)
    params, flops = Params(), Flops(catalog.reference)
    tight = tuple(Limit(cost, planner.least(cost)) for cost in (params, flops))
    smallest = planner.plan(tight[:1]), planner.plan(tight[1:])
    if smallest[0] != smallest[1]:
        with pytest.raises(ValueError, match="at once: the least is"):
            planner.plan(tight)


@pytest.mark.parametrize("cost", [Params(), Bytes(4), Flops(Tokens(16, 7)), Flops(Tokens(5, 9, 3))])
def test_costs_are_those_of_the_architecture(cost):
    """A sum over blocks and groups is what the architecture counts as a whole, and what choices add up to."""
    catalog = random_catalog(np.random.default_rng(5), 5, 3)
    choices, architecture = Choices(catalog), catalog.architecture
    for taken in random_sets(choices, np.random.default_rng(1), 30):
        plan = choices.plan(taken)
        if isinstance(cost, Flops):
            wanted = architecture.flops(plan, *cost.tokens)
        else:
            wanted = architecture.params(plan) * (cost.each if isinstance(cost, Bytes) else 1)
        assert cost.of(architecture, plan) == wanted
        assert choices.costs(cost)[taken].sum() + cost.outer(architecture) == wanted
        assert choices.of_rows(sketch.taken(catalog, plan)) == plan


def test_what_a_choice_excludes():
    """Counts of one group, a student and its blocks, and a text run and what it leaves out exclude one another."""
    catalog = random_catalog(np.random.default_rng(7), 5, 4)
    choices = Choices(catalog)
    everything = np.arange(len(choices))
    excluded = choices.excluded(everything)
    assert np.array_equal(excluded, excluded.T) and excluded.diagonal().all()
    for taken in random_sets(choices, np.random.default_rng(2), 50):
        inside = excluded[np.ix_(taken, taken)]
        assert np.array_equal(inside, np.eye(len(taken), dtype=bool))
