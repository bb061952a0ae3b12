"""A linear layer whose weight is held in eight bits, with one scale for each row, and read at any width.

``y = (x Q^T) * s + b``: Q ``[rows, columns]`` in eight bits, s ``[rows]``, the largest number of a row over the largest
that the format has. A number of either format is exact in bfloat16, so the product alone rounds. The first rows and any
columns of Q, with the scales of these rows, are a narrower layer.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ppcl_rt.planning.quantisation import Format

_FLOAT8 = torch.float8_e4m3fn
_LARGEST = {"int8": 127.0, "float8": torch.finfo(_FLOAT8).max, "float8-dynamic": torch.finfo(_FLOAT8).max}
# Of float8 tensors that `torch._scaled_mm` multiplies on a GPU: sizes and distances in memory are multiples of it.
_GPU_MULTIPLE = 16


class QuantisedLinear(nn.Linear):
    """Linear layer over a weight in eight bits; it has no weight until `hold`.

    ``weight`` ``[rows, columns]`` is int8 in all formats: the bits of float8, so that casts of a model to another dtype
    leave it as it is, and nothing takes that for a dtype to compute in. ``scale`` ``[rows]`` is float32.
    """

    def __init__(self, format: Format) -> None:
        nn.Module.__init__(self)
        self.format = format
        self.in_features = self.out_features = 0
        for name in ("weight", "scale"):
            self.register_buffer(name, None)
        self.register_parameter("bias", None)
        self.scale: torch.Tensor

    def hold(self, weight: torch.Tensor) -> None:
        """Round a weight ``[rows, columns]`` and hold that, where it lies."""
        with torch.no_grad():
            self.weight, self.scale = rounded(weight, self.format)
        self.out_features, self.in_features = weight.shape

    def forward(self, x: torch.Tensor, out_features: int | None = None, first: int = 0) -> torch.Tensor:
        """``[..., out_features]``, the first rows, of ``x [..., k]``, which stands at the columns from ``first`` on."""
        y = self.product(x, out_features, first)
        return y if self.bias is None else y + self.bias[:out_features]

    def product(self, x: torch.Tensor, out_features: int | None = None, first: int = 0) -> torch.Tensor:
        """As `forward`, without the bias."""
        weight = self.weight[:out_features, first : first + x.shape[-1]]
        scale = self.scale[:out_features]
        if self.format == "float8-dynamic" and can_multiply(x, weight):
            return _float8_product(x, weight.view(_FLOAT8), scale)
        if self.format != "int8":
            weight = weight.view(_FLOAT8)
        if x.dtype == torch.float16:
            # Its largest number is 65,504: sums of products with numbers up to 448 would leave it.
            return F.linear(x, (weight.float() * scale[:, None]).to(x.dtype))
        return F.linear(x, weight.to(x.dtype)) * scale.to(x.dtype)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """Move as any module does; of casts, the bias alone is cast."""
        scale = self.scale
        super()._apply(fn, recurse)
        if self.scale.dtype != scale.dtype:
            self.scale = scale.to(self.scale.device)
        return self

    def extra_repr(self) -> str:
        """Sizes and format."""
        return f"{super().extra_repr()}, format={self.format}"


def rounded(weight: torch.Tensor, format: Format) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight in eight bits, as int8, and the scale of each row in float32."""
    whole = weight.detach().float()
    largest = whole.abs().amax(1) if whole.shape[1] else whole.new_zeros(len(whole))
    # A row of zeros has a scale too: nothing is divided by zero.
    scale = largest.clamp_(min=torch.finfo(torch.float32).tiny * 1e3) / _LARGEST[format]
    whole = whole / scale[:, None]
    if format == "int8":
        return whole.round_().to(torch.int8), scale
    return whole.to(_FLOAT8).view(torch.int8), scale


def can_multiply(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether `torch._scaled_mm` takes these: it has no gradient, and on a GPU it wants sizes that are multiples."""
    if torch.is_grad_enabled() and x.requires_grad:
        return False
    sizes = (*weight.shape, weight.stride(0), weight.data_ptr())
    return x.device.type == "cpu" or not any(size % _GPU_MULTIPLE for size in sizes)


def _float8_product(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """``[..., rows]``: inputs are rounded with one scale for each token, sums are made in float32."""
    flat = x.flatten(0, -2).float()
    per_token = flat.abs().amax(1, keepdim=True).clamp_(min=torch.finfo(torch.float32).tiny * 1e3)
    per_token = per_token / _LARGEST["float8"]
    # On a GPU there are products with scales of rows in bfloat16 alone.
    y = torch._scaled_mm(
        (flat / per_token).to(_FLOAT8),
        weight.t(),
        scale_a=per_token,
        scale_b=scale[None],
        out_dtype=x.dtype if x.device.type == "cpu" else torch.bfloat16,
    )
    return y.to(x.dtype).unflatten(0, x.shape[:-1])
