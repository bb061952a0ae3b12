"""Modulation vectors: one for each sample, or one of two for each token.

B batch, S tokens, D model dimension. A modulation is ``[B, D]``. With an ``index [B, S]`` of zeros and ones it is
``[2 B, D]``, and token ``s`` of sample ``b`` takes row ``b + B * index[b, s]``. Image-editing models use the second
form: tokens of the reference image are modulated as at timestep 0 (``zero_cond_t`` in diffusers).
"""

from __future__ import annotations

import torch


def per_token(modulation: torch.Tensor, index: torch.Tensor | None = None) -> torch.Tensor:
    """Return ``modulation`` for each token: ``[B, 1, D]``, or ``[B, S, D]`` with an ``index [B, S]``."""
    if index is None:
        return modulation.unsqueeze(1)
    first, second = modulation.chunk(2)
    return torch.where(index.unsqueeze(-1) == 0, first.unsqueeze(1), second.unsqueeze(1))
