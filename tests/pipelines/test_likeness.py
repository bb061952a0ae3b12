"""PSNR and SSIM of pictures."""

import numpy as np
import pytest

from ppcl_rt.pipelines.likeness import psnr, ssim


def test_psnr_by_hand():
    picture = np.full((4, 5, 3), 0.5)
    assert psnr(picture, picture) is None
    assert psnr(picture, picture + 0.1) == pytest.approx(20)


def by_hand(x, y, size):
    """The definition, window by window."""
    place = np.arange(size) - (size - 1) / 2
    weights = np.exp(-(place[:, None] ** 2 + place**2) / (2 * 1.5**2))
    weights /= weights.sum()
    found = []
    for row in range(x.shape[0] - size + 1):
        for column in range(x.shape[1] - size + 1):
            for channel in range(x.shape[2]):
                a, b = (each[row : row + size, column : column + size, channel] for each in (x, y))
                m, n = (weights * a).sum(), (weights * b).sum()
                s, u = (weights * (a - m) ** 2).sum(), (weights * (b - n) ** 2).sum()
                both = (weights * (a - m) * (b - n)).sum()
                top = (2 * m * n + 1e-4) * (2 * both + 9e-4)
                found.append(top / ((m**2 + n**2 + 1e-4) * (s + u + 9e-4)))
    return np.mean(found)


@pytest.mark.parametrize("side, window", [(16, 11), (13, 11), (8, 8)])
def test_ssim_is_its_definition(side, window):
    rng = np.random.default_rng(side)
    x = rng.random((side, side, 3))
    y = np.clip(x + rng.normal(0, 0.2, x.shape), 0, 1)
    assert ssim(x, y) == pytest.approx(by_hand(x, y, window), abs=1e-12)
    assert ssim(x, y) == pytest.approx(ssim(y, x)) and ssim(x, x) == pytest.approx(1)
    assert ssim(x, 1 - x) < 0 < ssim(x, y) < 1
    # Flat pictures differ in luminance alone: (2 a b + C1) / (a^2 + b^2 + C1).
    flat = np.full_like(x, 0.25), np.full_like(x, 0.5)
    assert ssim(*flat) == pytest.approx((0.25 + 1e-4) / (0.3125 + 1e-4))
