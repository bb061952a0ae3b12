"""Budgets as people write them."""

from __future__ import annotations

import json

import pytest

from ppcl_rt import Budget, Tokens
from ppcl_rt.planning.budget import ratio_limits
from ppcl_rt.planning.costs import Bytes


@pytest.mark.parametrize(
    ("given", "amount"),
    [
        ({"memory": "12GB"}, 12e9),
        ({"memory": "6 mb"}, 6e6),
        ({"memory": 1000}, 1000),
        ({"params": "10B"}, 1e10),
        ({"params": "1.5m"}, 1.5e6),
        ({"flops": "40T"}, 4e13),
        ({"flops": "2e3 gflops"}, 2e12),
        ({"latency": "400ms"}, 400),
        ({"latency": "1.5s"}, 1500),
        ({"latency": 7}, 7),
        ({"fit": "24GB"}, 24e9),
    ],
)
def test_amounts(given, amount):
    [(name, _)] = given.items()
    budget = Budget.of(**given)
    assert getattr(budget, name) == amount and not budget.only_ratio
    assert str(budget) == f"{name} {amount:,.10g}"


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"memory": "12"}, None),
        ({"memory": "12 bananas"}, "12GB"),
        ({"memory": ""}, "12GB"),
        ({"memory": True}, "12GB"),
        ({"latency": "3GB"}, "400ms"),
        ({"params": "10GB"}, "10B"),
        ({"params": 0}, "params"),
        ({"flops": float("nan")}, "flops"),
        ({"flops": float("inf")}, "flops"),
        ({"memory": -1}, "memory"),
        ({}, "give a ratio"),
        ({"fit": "24"}, None),
        ({"fit": "24 cards"}, "24GB"),
        ({"fit": 0}, "fit"),
        ({"memory": 1, "pipeline": "here"}, "go with fit"),
        ({"fit": 1, "offload": "sequential"}, "enable_model_cpu_offload"),
        ({"shape": (16, 7)}, "give a ratio"),
        ({"flops": 1, "shape": "16"}, "4096"),
        ({"flops": 1, "shape": (16,)}, "shape"),
        ({"flops": 1, "shape": (0, 7)}, "1 to"),
        ({"flops": 1, "shape": (2**30, 7)}, "1 to"),
        ({"ratio": 2}, "ratio"),
        ({"speed": 2}, "there is no budget speed"),
    ],
)
def test_what_is_no_budget_is_refused_in_one_line(given, said):
    if said is None:
        assert Budget.of(**given)
        return
    with pytest.raises(ValueError, match=said) as caught:
        Budget.of(**given)
    assert "\n" not in str(caught.value)


def test_shapes():
    assert Budget.of(flops=1, shape="4096+512").shape == Tokens(4096, 512)
    assert Budget.of(flops=1, shape=" 16+7x3 ").shape == Budget.of(flops=1, shape=(16, 7, 3)).shape == Tokens(16, 7, 3)
    assert str(Budget.of(0.5, flops="20M", shape=(16, 7, 3))) == "ratio 0.5, flops 20,000,000, shape 16+7x3"


def test_a_pipeline_is_written_by_its_name():
    budget = Budget.of(fit="8GB", pipeline=object(), offload="model")
    assert str(budget) == "fit 8,000,000,000, pipeline object, offload model"
    assert json.loads(budget.model_dump_json(exclude_none=True))["pipeline"] == "object"
    assert Budget.of(fit=1, pipeline="here").model_dump(exclude_none=True) == {"fit": 1, "pipeline": "here"}


def test_what_is_asked_for_is_what_is_limited(made):
    """Every budget becomes one limit, a ratio two; bytes and times are asked for only where they are needed."""

    def never(*_):
        raise AssertionError

    catalog = made.catalog
    budget = Budget.of(0.5, params=1000, flops=5e5, shape=(3, 4))
    limits = budget.limits(catalog, never, never)
    assert limits[:2] == ratio_limits(catalog, 0.5)
    assert [limit.most for limit in limits[2:]] == [1000, 5e5] and limits[3].cost.tokens == Tokens(3, 4)
    [memory] = Budget.of(memory="1kb").limits(catalog, lambda: Bytes(2), never)
    assert (memory.most, memory.cost.each) == (1000, 2)
    assert Budget.of(0.5).only_ratio and not Budget.of(0.5, shape=(3, 4)).only_ratio
