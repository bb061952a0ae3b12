"""Adaptive LayerNorm: ``y = norm(x) * (1 + scale) + shift``, and the gated residual ``x + gate * h`` that precedes it.

B batch, S tokens, D width. `norm` has no affine part; statistics are taken in float32.
"""

import torch
import torch.nn.functional as F


def ada_layer_norm_reference(
    x: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor, eps: float = 1e-6
) -> torch.Tensor:
    """Normalise and modulate ``x [B, S, D]`` with ``scale`` and ``shift``, ``[B, 1, D]`` or per token ``[B, S, D]``."""
    return F.layer_norm(x, x.shape[-1:], eps=eps) * (1 + scale) + shift


def gated_residual_reference(x: torch.Tensor, gate: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
    """Add ``gate * h`` to the residual stream ``x [B, S, D]``; ``gate`` as ``scale`` above."""
    return x + gate * h
