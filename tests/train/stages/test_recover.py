"""Which plans are trained."""

import random
from collections import Counter

import pytest

from ppcl_rt import Planner
from ppcl_train.config.stages import EndToEndConfig
from ppcl_train.stages.recover import Plans


def drawn(catalog, planned, **settings):
    config = EndToEndConfig(steps=1, **{"planned": 1.0, "smallest": 0.0, **settings})
    plans, rng = Plans(catalog, planned, config), random.Random(0)
    return [plans.draw(rng, dense=False) for _ in range(3000)]


def test_small_plans_are_drawn_in_proportion_to_a_power_of_their_ratio(made):
    """Only those up to the largest ratio; the dense plan never."""
    catalog = made.catalog
    planned = list(dict.fromkeys(Planner(catalog).plans(0.05)))
    found = Counter(catalog.ratio(plan) for plan in drawn(catalog, planned, most_ratio=0.9, towards_small=3.0))
    inside = sorted({catalog.ratio(plan) for plan in planned if catalog.ratio(plan) <= 0.9 and plan != catalog.dense})
    assert sorted(found) == inside and len(inside) > 3
    wanted = inside[0] ** -3 / inside[-1] ** -3
    assert 0.7 * wanted < found[inside[0]] / found[inside[-1]] < 1.4 * wanted
    even = Counter(catalog.ratio(plan) for plan in drawn(catalog, planned, most_ratio=0.9))
    assert 0.7 < even[inside[0]] / even[inside[-1]] < 1.4


def test_the_smallest_plan_has_steps_of_its_own(made):
    catalog = made.catalog
    planned = list(dict.fromkeys(Planner(catalog).plans(0.05)))
    smallest = min(map(catalog.ratio, planned))
    found = Counter(catalog.ratio(plan) for plan in drawn(catalog, planned, smallest=0.5))
    assert found[smallest] > 0.5 * 3000


def test_ratios_without_a_plan_are_refused(made):
    planned = Planner(made.catalog).plans(0.2)
    with pytest.raises(ValueError, match="raise most_ratio"):
        drawn(made.catalog, planned, most_ratio=0.01)
