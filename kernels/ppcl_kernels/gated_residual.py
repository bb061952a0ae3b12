"""Gated residual ``y = x + gate * h``: the end of each half of an MMDiT block, after a matrix product by cuBLAS.

B batch, S tokens, D model dimension. Eager writes ``gate * h`` to memory and reads it again. (`ppcl_kernels.linear`
computes the gated residual in the epilogue of its own product.)
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from ppcl_kernels._check import check_index, check_like, check_modulation, check_shape, wants_gradient
from ppcl_kernels._op import define_op
from ppcl_kernels._triton import jit, tl
from ppcl_kernels.launch import Launch, Target
from ppcl_kernels.modulation import per_token
from ppcl_kernels.prepared import Bound
from ppcl_kernels.tiles import cheapest, offered


def gated_residual_reference(
    x: torch.Tensor, gate: torch.Tensor, h: torch.Tensor, index: torch.Tensor | None = None
) -> torch.Tensor:
    """Add ``gate * h`` to ``x [B, S, D]``; `ppcl_kernels.modulation` gives the shape of ``gate``."""
    return x + per_token(gate, index) * h


class Tile(NamedTuple):
    """How the work is divided among thread blocks: channels of one token for each, and its warps."""

    cols: int
    warps: int

    @property
    def resident(self) -> int:
        """Thread blocks that share a multiprocessor: 1,024 threads together, at up to 64 registers a thread."""
        return 32 // self.warps

    @property
    def cost(self) -> float:
        """Time of one thread block: the channels that it moves."""
        return self.cols

    @classmethod
    def candidates(cls, target: Target, dtype: torch.dtype) -> tuple[Tile, ...]:
        """Return the tiles worth measuring on a target (`ppcl_kernels.tiles.offered`)."""
        # 8 elements a thread: one 16-byte access in bf16.
        return offered("gated_residual", (cls(1024, 4),), target)

    @classmethod
    def choose(cls, target: Target, dtype: torch.dtype, batch: int, tokens: int, dim: int) -> Tile:
        """Pick the tile that is cheapest in waves."""
        tiles = cls.candidates(target, dtype)
        return cheapest("gated_residual", tiles, target, lambda tile: batch * tokens * -(-dim // tile.cols))


@jit(do_not_specialize=["B", "S"])
def _gated_residual_kernel(
    x,
    gate,
    h,
    index,
    y,
    B,
    S,
    D,
    stride_x_batch,
    stride_x_row,
    stride_h_batch,
    stride_h_row,
    stride_gate_sample,
    COLS: tl.constexpr,
):
    b = (tl.program_id(0) // S).to(tl.int64)
    row = (tl.program_id(0) % S).to(tl.int64)
    cols = tl.program_id(1) * COLS + tl.arange(0, COLS)
    inside = cols < D
    sample = b
    if index is not None:
        sample += B * (tl.load(index + b * S + row) != 0)
    scale = tl.load(gate + sample * stride_gate_sample + cols, mask=inside, other=0.0).to(tl.float32)
    part = tl.load(h + b * stride_h_batch + row * stride_h_row + cols, mask=inside, other=0.0).to(tl.float32)
    total = tl.load(x + b * stride_x_batch + row * stride_x_row + cols, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + (b * S + row) * D + cols, (total + scale * part).to(y.dtype.element_ty), mask=inside)


def launch_gated_residual(
    x: torch.Tensor, gate: torch.Tensor, h: torch.Tensor, index: torch.Tensor | None, y: torch.Tensor, tile: Tile
) -> Launch:
    """Return the launch that writes ``y``, contiguous ``[B, S, D]``."""
    batch, tokens, dim = x.shape
    arguments = {
        "x": x,
        "gate": gate,
        "h": h,
        "index": index,
        "y": y,
        "B": batch,
        "S": tokens,
        "D": dim,
        "stride_x_batch": x.stride(0),
        "stride_x_row": x.stride(1),
        "stride_h_batch": h.stride(0),
        "stride_h_row": h.stride(1),
        "stride_gate_sample": gate.stride(0),
        "COLS": tile.cols,
    }
    return Launch(_gated_residual_kernel, (batch * tokens, -(-dim // tile.cols)), arguments, tile.warps, 1)


def check_gated_residual(x: torch.Tensor, gate: torch.Tensor, h: torch.Tensor, index: torch.Tensor | None) -> None:
    """Refuse arguments that the kernel cannot handle.

    Raises:
        ValueError: wrong device, dtype, shape or stride.
    """
    if x.dim() != 3:
        raise ValueError(f"x is {list(x.shape)}, wanted [B, S, D]")
    check_like(x, x=x, h=h, gate=gate)
    check_index(index, x)
    check_modulation("gate", gate, x, x.shape[-1], index)
    check_shape("h", h, x.shape)


@define_op("gated_residual", "(Tensor x, Tensor gate, Tensor h, Tensor? index, int[]? tile) -> Tensor")
def _gated_residual_op(x, gate, h, index, tile):
    check_gated_residual(x, gate, h, index)
    y = x.new_empty(x.shape)
    target = Target.of(x.device)
    if x.numel():
        tile = Tile.choose(target, x.dtype, *x.shape) if tile is None else Tile(*tile)
        launch_gated_residual(x, gate, h, index, y, tile).run()
    return y


@_gated_residual_op.register_fake
def _(x, gate, h, index, tile):
    check_gated_residual(x, gate, h, index)
    return x.new_empty(x.shape)


def gated_residual(
    x: torch.Tensor, gate: torch.Tensor, h: torch.Tensor, index: torch.Tensor | None = None, *, tile: Tile | None = None
) -> torch.Tensor:
    """Add ``gate * h`` to ``x`` in one pass; where a gradient is needed, the reference computes the result.

    Args:
        x, h: ``[B, S, D]``, rows contiguous.
        gate: ``[B, D]``, or ``[2 B, D]`` with ``index``.
        index: ``[B, S]`` of zeros and ones (`ppcl_kernels.modulation`), or None.
        tile: None to choose by shape and device.

    Returns:
        ``[B, S, D]``, contiguous, in the dtype of ``x``.

    Raises:
        ValueError: wrong device, dtype, shape or stride.
    """
    if wants_gradient(x, gate, h):
        return gated_residual_reference(x, gate, h, index)
    return _gated_residual_op(x, gate, h, index, tile)


class PreparedGatedResidual:
    """A gated residual whose shapes and tile are fixed (`prepare_gated_residual`)."""

    def __init__(self, x: torch.Tensor, tile: Tile) -> None:
        self._size, self._tile = x.shape, tile
        self.launch = Bound([(name,) for name in ("x", "gate", "h", "index", "y")]) if x.numel() else None

    def __call__(
        self, x: torch.Tensor, gate: torch.Tensor, h: torch.Tensor, index: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Add tensors of the same shapes, strides and dtypes as those given to preparation."""
        y = x.new_empty(self._size)
        if self.launch is not None:
            self.launch((x, gate, h, index, y), lambda: launch_gated_residual(x, gate, h, index, y, self._tile))
        return y


def prepare_gated_residual(
    x: torch.Tensor, gate: torch.Tensor, h: torch.Tensor, index: torch.Tensor | None = None, *, tile: Tile | None = None
) -> PreparedGatedResidual:
    """Check what `gated_residual` checks, once for all later calls with tensors like these.

    `ppcl_kernels.prepared.Bound` lists what the caller must then guarantee. There is no gradient.
    """
    check_gated_residual(x, gate, h, index)
    tile = Tile.choose(Target.of(x.device), x.dtype, *x.shape) if tile is None else tile
    return PreparedGatedResidual(x, tile)
