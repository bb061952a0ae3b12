"""Modulation vectors: one a sample, or a choice of two a token (Qwen-Image-Edit's ``zero_cond_t``).

B batch, S tokens, D width. A modulation is ``[B, D]``; with an ``index [B, S]`` of zeros and ones it is ``[2 B, D]``,
and token ``s`` of sample ``b`` takes row ``b + B * index[b, s]``.
"""

from __future__ import annotations

import torch


def per_token(modulation: torch.Tensor, index: torch.Tensor | None = None) -> torch.Tensor:
    """Spread ``modulation`` over tokens: ``[B, 1, D]``, or ``[B, S, D]`` with an ``index [B, S]``."""
    if index is None:
        return modulation.unsqueeze(1)
    first, second = modulation.chunk(2)
    return torch.where(index.unsqueeze(-1) == 0, first.unsqueeze(1), second.unsqueeze(1))
