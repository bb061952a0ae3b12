"""How alike two pictures are: PSNR, and SSIM (Wang, Bovik, Sheikh and Simoncelli 2004)."""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F

# As published: a Gaussian window of 11 x 11 with a deviation of 1.5, and the constants of the two ratios.
_WINDOW, _DEVIATION = 11, 1.5
_C1, _C2 = 0.01**2, 0.03**2


def psnr(one: np.ndarray, other: np.ndarray) -> float | None:
    """Return the peak signal-to-noise ratio in dB of pictures in [0, 1]; None where they are the same."""
    error = float(np.square(one - other).mean())
    return None if error == 0 else -10 * math.log10(error)


def ssim(one: np.ndarray, other: np.ndarray) -> float:
    """Return the structural similarity of pictures ``[rows, columns, channels]`` in [0, 1]: mean over channels and all
    places where the window lies inside; it is as large as the picture where that is smaller.

    ``(2 m n + C1) (2 s_xy + C2) / ((m^2 + n^2 + C1) (s_x^2 + s_y^2 + C2))``, m and n weighted means, s weighted
    covariances.
    """
    rows, columns, channels = one.shape
    window = _gaussian(min(rows, _WINDOW))[:, None] * _gaussian(min(columns, _WINDOW))
    x, y = (torch.as_tensor(each, dtype=torch.float64).permute(2, 0, 1)[:, None] for each in (one, other))
    means = F.conv2d(torch.cat([x, y, x * x, y * y, x * y]), window[None, None])
    m, n, xx, yy, xy = means.split(channels)
    values = (2 * m * n + _C1) * (2 * (xy - m * n) + _C2)
    values /= (m * m + n * n + _C1) * (xx - m * m + yy - n * n + _C2)
    return float(values.mean())


def _gaussian(size: int) -> torch.Tensor:
    place = torch.arange(size, dtype=torch.float64) - (size - 1) / 2
    weights = torch.exp(-place.square() / (2 * _DEVIATION**2))
    return weights / weights.sum()
