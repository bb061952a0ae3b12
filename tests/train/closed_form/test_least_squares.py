"""Sums in float64 of products in float32."""

import pytest
import torch

from ppcl_train.closed_form.least_squares import LeastSquares


def rows_of(mean, rows=9000):
    generator = torch.Generator().manual_seed(0)
    # Of a condition that leaves a solution without a ridge as many digits as the sums have, but for one.
    mix = torch.eye(24) + 0.1 * torch.randn(24, 24, generator=generator)
    x = torch.randn(rows, 24, generator=generator) @ mix + mean
    return x, torch.randn(rows, 3, generator=generator) + x[:, :3], torch.rand(rows, generator=generator)


def covariance(gram):
    mean = gram[:-1, -1] / gram[-1, -1]
    return gram[:-1, :-1] / gram[-1, -1] - torch.outer(mean, mean)


@pytest.mark.parametrize("mean", [0.0, 100.0])
def test_float32_rows_lose_no_more_than_rounding(mean):
    """Also of inputs whose mean is far larger than what they vary by; more rows than one product takes."""
    x, y, weight = rows_of(mean)
    fit = LeastSquares(24, 3)
    for portion in zip(x.split(8500), y.split(8500), weight.split(8500), strict=True):
        fit.add(*portion)
    held = torch.cat([x, torch.ones(len(x), 1)], 1).double()
    gram, cross = held.T @ (weight.double()[:, None] * held), y.double().T @ (weight.double()[:, None] * held)
    wanted = covariance(gram)
    deviation = wanted.diagonal().sqrt()
    # 6e-8 a product, and sums of 8,192 of them in blocks: a few roundings. Without the shift 3e-3 at a mean of 100.
    assert ((covariance(fit.gram) - wanted) / torch.outer(deviation, deviation)).abs().max() < 1e-6
    assert (fit.gram - gram).abs().max() < 1e-6 * gram.abs().max()
    assert (fit.cross - cross).abs().max() < 1e-6 * cross.abs().max()
    map_, bias = fit.solve(0.0)
    residual = y.double() - x.double() @ map_.double().T - bias.double()
    error = (weight.double()[:, None] * residual.square()).sum() / weight.double().sum()
    assert fit.error(map_, bias) == pytest.approx(float(error), rel=1e-5)


def test_rows_in_float64_are_summed_in_float64():
    x, y, _ = rows_of(100.0, 500)
    fit = LeastSquares(24, 3)
    fit.add(x.double(), y.double())
    held = torch.cat([x, torch.ones(len(x), 1)], 1).double()
    torch.testing.assert_close(fit.gram, held.T @ held, atol=0, rtol=1e-13)


def test_what_is_set_for_products_does_not_count():
    """Neither autocast nor a coarser precision of float32 products, which stays as it was."""
    x, y, weight = rows_of(1.0, 500)
    fits = [LeastSquares(24, 3), LeastSquares(24, 3)]
    fits[0].add(x, y, weight)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            fits[1].add(x, y, weight)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)
    assert torch.equal(fits[0].gram, fits[1].gram) and torch.equal(fits[0].cross, fits[1].cross)


def test_a_map_without_a_bias_ignores_means():
    x, y, weight = rows_of(2.0, 500)
    fit = LeastSquares(24, 3)
    fit.add(x.double(), y.double(), weight)
    root = weight.double().sqrt()[:, None]
    wanted = torch.linalg.lstsq(root * x.double(), root * y.double()).solution.T
    got, bias = fit.solve(0.0, biased=False)
    assert torch.allclose(got.double(), wanted, atol=1e-5) and not bias.any()


def test_no_rows_change_nothing():
    fit = LeastSquares(24, 3)
    fit.add(torch.empty(0, 24), torch.empty(0, 3))
    assert not fit.gram.any() and not fit.cross.any()
