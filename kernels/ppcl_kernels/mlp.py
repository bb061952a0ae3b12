"""MLP over the first ``c`` hidden channels: ``y = gelu_tanh(x U[:c]^T + u[:c]) V[:, :c]^T + v``, and what follows it.

B batch, S tokens, D width, C hidden channels of the weights, ``c <= C`` kept. Two launches of `linear`, each for both
streams: a 128-row tile of the hidden layer is 3 MB, so up and down in one kernel does not fit.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from ppcl_kernels._check import wants_gradient
from ppcl_kernels._op import define_op
from ppcl_kernels.linear import Linear, check_linear, linear_reference, run_linear
from ppcl_kernels.matmul import Tile


class Mlp(NamedTuple):
    """One group: the MLP of one stream, and what follows it.

    Attributes:
        x: ``[B, S, D]``.
        up, up_bias: ``[C, D]`` in rank order, ``[C]`` or None.
        down, down_bias: ``[D, C]``, ``[D]`` or None.
        channels: c, None for all C.
        gate, index, residual: as in `ppcl_kernels.linear.Linear`, after the down-projection.
    """

    x: torch.Tensor
    up: torch.Tensor
    up_bias: torch.Tensor | None
    down: torch.Tensor
    down_bias: torch.Tensor | None
    channels: int | None = None
    gate: torch.Tensor | None = None
    index: torch.Tensor | None = None  # type: ignore[assignment]  # hides tuple.index, which nobody calls
    residual: torch.Tensor | None = None


def mlp_reference(
    x: torch.Tensor,
    up: torch.Tensor,
    up_bias: torch.Tensor | None,
    down: torch.Tensor,
    down_bias: torch.Tensor | None,
    channels: int | None = None,
    *,
    gate: torch.Tensor | None = None,
    index: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """Apply the MLP to ``x [..., D]``; arguments as in `Mlp`."""
    hidden = linear_reference(x, up, up_bias, channels, gelu=True)
    return linear_reference(hidden, down, down_bias, gate=gate, index=index, residual=residual)


def _downs(groups: Sequence[Mlp], hidden: Sequence[torch.Tensor]) -> list[Linear]:
    return [
        Linear(h, g.down, g.down_bias, None, g.gate, g.index, g.residual) for g, h in zip(groups, hidden, strict=True)
    ]


def _ups(groups: Sequence[Mlp]) -> list[Linear]:
    return [Linear(g.x, g.up, g.up_bias, g.channels) for g in groups]


@define_op(
    "mlp",
    "(Tensor[] x, Tensor[] up, Tensor?[] up_bias, Tensor[] down, Tensor?[] down_bias, int[] channels, "
    "Tensor?[] gate, Tensor?[] index, Tensor?[] residual, int[]? up_tile, int[]? down_tile) -> Tensor[]",
)
def _mlp_op(x, up, up_bias, down, down_bias, channels, gate, index, residual, up_tile, down_tile):
    groups = [Mlp(*g) for g in zip(x, up, up_bias, down, down_bias, channels, gate, index, residual, strict=True)]
    check_linear(_ups(groups))
    hidden = run_linear(_ups(groups), True, None if up_tile is None else Tile(*up_tile))
    check_linear(_downs(groups, hidden))
    return run_linear(_downs(groups, hidden), False, None if down_tile is None else Tile(*down_tile))


@_mlp_op.register_fake
def _(x, up, up_bias, down, down_bias, channels, gate, index, residual, up_tile, down_tile):
    groups = [Mlp(*g) for g in zip(x, up, up_bias, down, down_bias, channels, gate, index, residual, strict=True)]
    check_linear(_ups(groups))
    check_linear(_downs(groups, [g.x.new_empty(*g.x.shape[:2], g.channels) for g in groups]))
    return [part.new_empty(*part.shape[:2], weight.shape[0]) for part, weight in zip(x, down, strict=True)]


def grouped_mlp(
    groups: Sequence[Mlp], *, up_tile: Tile | None = None, down_tile: Tile | None = None
) -> list[torch.Tensor]:
    """Apply the MLPs of one or two streams over the channels that each keeps.

    Where a gradient is asked for, the reference computes it.

    Args:
        groups: what to apply to what; `Mlp` gives the shapes.
        up_tile, down_tile: None to choose by shape and device.

    Returns:
        ``[B, S, D]`` a group, contiguous, in the dtype of ``x``.

    Raises:
        ValueError: wrong device, dtype, shape or stride, more channels than the weights hold, or not one or
            two groups.
    """
    if len(groups) not in (1, 2):
        raise ValueError(f"one launch takes one or two groups (the streams of a block), got {len(groups)}")
    if any(wants_gradient(g.x, *g[1:5], g.gate, g.residual) for g in groups):
        return [mlp_reference(*g[:6], gate=g.gate, index=g.index, residual=g.residual) for g in groups]
    x, up, up_bias, down, down_bias, channels, gate, index, residual = map(list, zip(*groups, strict=True))
    channels = [g.up.shape[0] if g.channels is None else g.channels for g in groups]
    return _mlp_op(x, up, up_bias, down, down_bias, channels, gate, index, residual, up_tile, down_tile)


def mlp(
    x: torch.Tensor,
    up: torch.Tensor,
    up_bias: torch.Tensor | None,
    down: torch.Tensor,
    down_bias: torch.Tensor | None,
    channels: int | None = None,
    *,
    gate: torch.Tensor | None = None,
    index: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """Apply the MLP of one stream to ``x [B, S, D]``; arguments and errors as in `Mlp` and `grouped_mlp`."""
    return grouped_mlp([Mlp(x, up, up_bias, down, down_bias, channels, gate, index, residual)])[0]
