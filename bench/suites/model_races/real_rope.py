"""diffusers' rotation by real numbers instead of complex ones, for torch.compile."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.transformers import transformer_qwenimage
from torch import nn

from ppcl_rt.families.qwen_image import as_real

_STOCK_ROTATE = transformer_qwenimage.apply_rotary_emb_qwen


class RealRope(nn.Module):
    """Gives rotations as cosines and sines: the compiler leaves complex numbers to eager kernels."""

    def __init__(self, rope: nn.Module) -> None:
        super().__init__()
        self.rope = rope

    def forward(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, ...]:
        return tuple(as_real(rotation).contiguous() for rotation in self.rope(*args, **kwargs))


def rotate(x: torch.Tensor, freqs_cis: torch.Tensor, use_real: bool = False) -> torch.Tensor:
    """Rotate ``x [B, S, H, E]`` by complex numbers, as diffusers does, or by real ones ``[S, E / 2, 2]``."""
    if freqs_cis.is_complex():
        return _STOCK_ROTATE(x, freqs_cis, use_real=use_real)
    a, b = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = freqs_cis[:, None].unbind(-1)
    return torch.stack((a * cos - b * sin, a * sin + b * cos), dim=-1).flatten(-2).type_as(x)
