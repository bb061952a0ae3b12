"""Compression by error, and the choices that are kept."""

import pytest
import torch

from ppcl_rt import Interval, Planner
from ppcl_train.closed_form.compression import moments, output_error, truncated, truncated_map
from ppcl_train.closed_form.least_squares import LeastSquares
from ppcl_train.stages.taken import listed, taken
from tests.train.stages.test_width import catalog_of


@pytest.mark.parametrize(("rows", "columns"), [(12, 20), (20, 12)])
def test_the_rank_is_the_least_that_meets_its_error(rows, columns):
    torch.manual_seed(0)
    matrix = torch.randn(rows, 3) @ torch.randn(3, columns) + 0.05 * torch.randn(rows, columns)
    x = torch.randn(500, columns) @ torch.randn(columns, columns)
    second = x.double().T @ x.double() / len(x)
    for share in (0.3, 0.05, 0.001):
        most = share * output_error(matrix, second)
        factors = truncated(matrix, second, most, torch.float64)
        assert factors is not None
        up, down = factors
        left = output_error(matrix.double() - up @ down, second)
        # What is left over is exactly what was promised; one rank less would break the promise.
        assert left <= most * (1 + 1e-9)
        spectrum = torch.linalg.svdvals(matrix.double() @ torch.linalg.cholesky(second)).square()
        rank = up.shape[1]
        assert left == pytest.approx(float(spectrum[rank:].sum()), rel=1e-6)
        assert rank == 1 or spectrum[rank - 1 :].sum() > most


def test_factors_that_are_not_smaller_are_not_made():
    torch.manual_seed(1)
    assert truncated(torch.randn(8, 8), None, 1e-6, torch.float32) is None


def test_a_map_loses_a_share_of_its_own_error():
    torch.manual_seed(2)
    x = torch.randn(800, 10) + 1
    y = x @ torch.randn(10, 2) @ torch.randn(2, 10) + torch.randn(800, 10)
    weights = torch.rand(800)
    fit = LeastSquares(10, 10)
    fit.add(x, y, weights)
    weight, bias = fit.solve(1e-9)
    wanted = float(((x @ weight.T + bias - y).square().sum(1) * weights).sum() / weights.sum())
    assert fit.error(weight, bias) == pytest.approx(wanted, rel=1e-5)
    factors = truncated_map(fit, slice(None), weight, bias, 0.05, torch.float64)
    assert factors is not None
    second, _ = moments(fit.gram, centred=True)
    up, down = factors
    assert output_error(weight.double() - up @ down, second) <= 0.05 * wanted * (1 + 1e-6)


def test_only_what_plans_take_is_kept_and_a_neighbour():
    catalog = catalog_of(6)
    plans = Planner(catalog).plans(0.02)
    alone, near = taken(catalog, plans, 0), taken(catalog, plans, 1)
    used = {planned.interval for plan in plans for planned in plan.blocks if planned.student}
    assert {student.interval for student in alone.students} == used < {s.interval for s in catalog.students}
    for n in range(6):
        for group in ("heads", "image", "text"):
            counts = {
                planned.width[group]
                for plan in plans
                for planned in plan.blocks
                if planned.interval == Interval(n, n) and group in planned.width
            }
            full = catalog.spec(n).groups[group].count
            assert {legal.units for legal in alone.blocks[n].of(group)} == counts | {full}
            assert {legal.units for legal in near.blocks[n].of(group)} >= counts
    # All that plans need is still there: they lose what they lost.
    for plan in plans:
        assert alone.loss(plan) == catalog.loss(plan)


def test_tensors_of_choices_that_are_gone_are_left_out():
    whole = catalog_of(6)
    catalog = taken(whole, Planner(whole).plans(0.02), 0)
    kept, gone = catalog.students[0].interval, "0-5"
    assert all(student.interval.key != gone for student in catalog.students)
    legal = catalog.blocks[0].of("image")[-1].units
    names = [
        "img_in.weight",
        f"students.{kept.key}.order.heads",
        f"students.{gone}.order.heads",
        "transformer_blocks.0.replacements.mlp_image_17.weight",
        f"transformer_blocks.0.replacements.mlp_image_{legal}.up",
        "text_runs.0.z_1.up",
    ]
    full = catalog.spec(0).full["image"]
    wanted = [names[0], names[1], *([names[4]] if legal != full else [])]
    assert listed(catalog, names) == (wanted if legal != full else [names[0], names[1], names[4]])
