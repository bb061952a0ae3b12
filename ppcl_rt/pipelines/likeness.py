"""How alike two pictures are: PSNR, and SSIM (Wang, Bovik, Sheikh and Simoncelli 2004)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

# As published: a Gaussian window of 11 x 11 with a deviation of 1.5, and the constants of the two ratios.
_WINDOW, _DEVIATION = 11, 1.5
_C1, _C2 = 0.01**2, 0.03**2


def pixels_of(picture: Image.Image) -> np.ndarray:
    """Pixels ``[rows, columns, 3]`` in [0, 1]."""
    return np.asarray(picture.convert("RGB"), dtype=np.float64) / 255


def likeness_of(ones: Sequence[Image.Image], others: Sequence[Image.Image]) -> dict[str, Any]:
    """Mean PSNR and SSIM of pictures to others: how near they stay, which is not how good they are.

    Returns:
        ``psnr`` in dB, of the pairs that differ, or None where all are the same; ``ssim``; and both by ``pictures``.
    """
    pairs = [(pixels_of(one), pixels_of(other)) for one, other in zip(ones, others, strict=True)]
    decibels, alike = [psnr(*pair) for pair in pairs], [ssim(*pair) for pair in pairs]
    differ = [value for value in decibels if value is not None]
    return {
        "psnr": float(np.mean(differ)) if differ else None,
        "ssim": float(np.mean(alike)),
        "pictures": [{"psnr": one, "ssim": other} for one, other in zip(decibels, alike)],
    }


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
