"""MLP over the first ``c`` hidden channels: ``y = gelu_tanh(x U[:c]^T + u[:c]) V[:, :c]^T + v``, gate and residual.

With a second up-projection S the hidden layer is SwiGLU's, ``silu(x S[:c]^T + s[:c]) * (x U[:c]^T + u[:c])``.

B batch, S tokens, D model dimension, C hidden channels of the weights, of which the first ``c`` are kept. An MLP takes
two launches of `linear`, each for both streams. Both products do not fit into one kernel: 128 rows of the hidden layer
are 3 MB.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from ppcl_kernels._check import wants_gradient
from ppcl_kernels._op import define_op
from ppcl_kernels.linear import Activation, Linear, check_linear, linear_reference, run_linear
from ppcl_kernels.matmul import Tile


class Mlp(NamedTuple):
    """The MLP of one stream, with the operations that follow it.

    Attributes:
        x: ``[B, S, D]``.
        up, up_bias: ``[C, D]`` in rank order, ``[C]`` or None.
        down, down_bias: ``[D, C]``, ``[D]`` or None.
        channels: c, None for all C channels.
        gate, index, residual: as in `ppcl_kernels.linear.Linear`, applied after the down-projection.
        silu, silu_bias: ``[C, D]`` and ``[C]``, the second up-projection of SwiGLU; None for GELU.
    """

    x: torch.Tensor
    up: torch.Tensor
    up_bias: torch.Tensor | None
    down: torch.Tensor
    down_bias: torch.Tensor | None
    channels: int | None = None
    gate: torch.Tensor | None = None
    # The field hides tuple.index, which nobody calls.
    index: torch.Tensor | None = None  # type: ignore[assignment]  # hides tuple.index, which nobody calls
    residual: torch.Tensor | None = None
    silu: torch.Tensor | None = None
    silu_bias: torch.Tensor | None = None


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
    silu: torch.Tensor | None = None,
    silu_bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """Apply the MLP to ``x [..., D]``; the arguments are those of `Mlp`."""
    activation: Activation = "gelu" if silu is None else "swiglu"
    hidden = linear_reference(x, up, up_bias, channels, activation=activation, silu_weight=silu, silu_bias=silu_bias)
    return linear_reference(hidden, down, down_bias, gate=gate, index=index, residual=residual)


def _downs(mlps: Sequence[Mlp], hidden: Sequence[torch.Tensor]) -> list[Linear]:
    return [
        Linear(h, each.down, each.down_bias, None, each.gate, each.index, each.residual)
        for each, h in zip(mlps, hidden, strict=True)
    ]


def _ups(mlps: Sequence[Mlp]) -> list[Linear]:
    return [
        Linear(each.x, each.up, each.up_bias, each.channels, silu_weight=each.silu, silu_bias=each.silu_bias)
        for each in mlps
    ]


def _activation(mlps: Sequence[Mlp]) -> Activation:
    """The activation of a launch; MLPs of which only one has SwiGLU's second weight are refused with the layers."""
    return "gelu" if mlps[0].silu is None else "swiglu"


@define_op(
    "mlp",
    "(Tensor[] x, Tensor[] up, Tensor?[] up_bias, Tensor[] down, Tensor?[] down_bias, int[] channels, "
    "Tensor?[] gate, Tensor?[] index, Tensor?[] residual, Tensor?[] silu, Tensor?[] silu_bias, "
    "int[]? up_tile, int[]? down_tile) -> Tensor[]",
)
def _mlp_op(*arguments):
    *fields, up_tile, down_tile = arguments
    mlps = [Mlp(*each) for each in zip(*fields, strict=True)]
    check_linear(_ups(mlps), _activation(mlps))
    hidden = run_linear(_ups(mlps), _activation(mlps), None if up_tile is None else Tile(*up_tile))
    check_linear(_downs(mlps, hidden), "none")
    return run_linear(_downs(mlps, hidden), "none", None if down_tile is None else Tile(*down_tile))


@_mlp_op.register_fake
def _(*arguments):
    *fields, _, _ = arguments
    mlps = [Mlp(*each) for each in zip(*fields, strict=True)]
    check_linear(_ups(mlps), _activation(mlps))
    check_linear(_downs(mlps, [each.x.new_empty(*each.x.shape[:2], each.channels) for each in mlps]), "none")
    return [each.x.new_empty(*each.x.shape[:2], each.down.shape[0]) for each in mlps]


def grouped_mlp(
    mlps: Sequence[Mlp], *, up_tile: Tile | None = None, down_tile: Tile | None = None
) -> list[torch.Tensor]:
    """Apply the MLPs of one or two streams, each over the channels that it keeps.

    Where a gradient is needed, the reference computes the result.

    Args:
        mlps: what to apply to which input; `Mlp` gives the shapes.
        up_tile, down_tile: None to choose by shape and device.

    Returns:
        ``[B, S, D]`` for each MLP, contiguous, in the dtype of ``x``.

    Raises:
        ValueError: wrong device, dtype, shape or stride, more channels than the weights hold, or not one or
            two MLPs.
    """
    if len(mlps) not in (1, 2):
        raise ValueError(f"one launch takes one or two MLPs (one for each stream of a block), got {len(mlps)}")
    if any(wants_gradient(*each[:5], each.gate, *each[8:]) for each in mlps):
        after: list[dict[str, Any]] = [dict(zip(Mlp._fields[6:], each[6:], strict=True)) for each in mlps]
        return [mlp_reference(*each[:6], **more) for each, more in zip(mlps, after, strict=True)]
    whole = [each._replace(channels=each.up.shape[0] if each.channels is None else each.channels) for each in mlps]
    return _mlp_op(*map(list, zip(*whole, strict=True)), up_tile, down_tile)


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
    silu: torch.Tensor | None = None,
    silu_bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """Apply the MLP of one stream to ``x [B, S, D]``; arguments and errors are those of `Mlp` and `grouped_mlp`."""
    return grouped_mlp([Mlp(x, up, up_bias, down, down_bias, channels, gate, index, residual, silu, silu_bias)])[0]
