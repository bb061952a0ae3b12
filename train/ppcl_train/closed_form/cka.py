"""Linear centred kernel alignment: how similar two representations of the same tokens are (PPCL eq. 3)."""

from __future__ import annotations

import torch


def linear_cka(x: torch.Tensor, y: torch.Tensor) -> float:
    """Compute the linear CKA of ``x [n, D]`` and ``y [n, D]``, in [0, 1]; 1 where one is a rotation of the other."""
    x, y = (x - x.mean(0)).double(), (y - y.mean(0)).double()
    return float((y.T @ x).square().sum() / ((x.T @ x).norm() * (y.T @ y).norm()))
