"""Adaptive LayerNorm: ``y = norm(x) * (1 + scale) + shift``.

B batch, S tokens, D model dimension. The norm has no affine part; its statistics are float32. Eager reads and writes
``[B, S, D]`` three times (norm, multiply, add); the kernel reads and writes each element once.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F

from ppcl_kernels._check import check_index, check_like, check_modulation, wants_gradient
from ppcl_kernels._op import define_op
from ppcl_kernels._triton import jit, tl
from ppcl_kernels.launch import Launch, Target
from ppcl_kernels.modulation import per_token
from ppcl_kernels.prepared import Bound
from ppcl_kernels.tiles import cheapest, offered

# The largest D: a row is held in registers.
MAX_WIDTH = 16384


def ada_layer_norm_reference(
    x: torch.Tensor,
    scale: torch.Tensor,
    shift: torch.Tensor,
    index: torch.Tensor | None = None,
    eps: float = 1e-6,
) -> torch.Tensor:
    """Normalise and modulate ``x [B, S, D]``; `ppcl_kernels.modulation` gives the shapes of ``scale`` and ``shift``."""
    return F.layer_norm(x, x.shape[-1:], eps=eps) * (1 + per_token(scale, index)) + per_token(shift, index)


class Tile(NamedTuple):
    """How tokens are divided among thread blocks.

    Attributes:
        rows: consecutive tokens of a sample that one thread block processes in turn, with one read of the modulation.
        warps: warps of a thread block.
    """

    rows: int
    warps: int

    @property
    def resident(self) -> int:
        """Thread blocks that share a multiprocessor: 1,024 threads together, at up to 64 registers a thread."""
        return max(32 // self.warps, 1)

    @property
    def cost(self) -> float:
        """Time of a thread block in rows moved: two for each of its rows, one for the modulation in L2 (a guess)."""
        return 2 * self.rows + 1

    @classmethod
    def candidates(cls, target: Target, dtype: torch.dtype, dim: int) -> tuple[Tile, ...]:
        """Return the tiles worth measuring on a target for rows of ``dim`` elements (`ppcl_kernels.tiles.offered`)."""
        # 16 elements a thread: two 16-byte accesses in bf16.
        warps = min(max(_power_of_2(dim) // 512, 1), 16)
        return offered("ada_layer_norm", (cls(1, warps), cls(4, warps), cls(16, warps)), target)

    @classmethod
    def choose(cls, target: Target, dtype: torch.dtype, batch: int, tokens: int, dim: int) -> Tile:
        """Pick the tile that is cheapest in waves."""
        tiles = cls.candidates(target, dtype, dim)
        return cheapest("ada_layer_norm", tiles, target, lambda tile: batch * -(-tokens // tile.rows))


def _power_of_2(n: int) -> int:
    return 1 << (n - 1).bit_length()


@jit(do_not_specialize=["B", "S"])
def _ada_layer_norm_kernel(
    x,
    scale,
    shift,
    index,
    y,
    B,
    S,
    D,
    stride_x_batch,
    stride_x_row,
    stride_scale_sample,
    stride_shift_sample,
    eps,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row_blocks = tl.cdiv(S, ROWS)
    b = tl.program_id(0) // row_blocks
    first = tl.program_id(0) % row_blocks * ROWS
    cols = tl.arange(0, BLOCK)
    inside = cols < D
    sample = b.to(tl.int64)
    if index is None:
        factor = 1 + tl.load(scale + sample * stride_scale_sample + cols, mask=inside, other=0.0).to(tl.float32)
        offset = tl.load(shift + sample * stride_shift_sample + cols, mask=inside, other=0.0).to(tl.float32)
    for step in range(0, tl.minimum(ROWS, S - first)):
        row = (first + step).to(tl.int64)
        value = tl.load(x + sample * stride_x_batch + row * stride_x_row + cols, mask=inside, other=0.0).to(tl.float32)
        if index is not None:
            chosen = (b + B * (tl.load(index + sample * S + row) != 0)).to(tl.int64)
            factor = 1 + tl.load(scale + chosen * stride_scale_sample + cols, mask=inside, other=0.0).to(tl.float32)
            offset = tl.load(shift + chosen * stride_shift_sample + cols, mask=inside, other=0.0).to(tl.float32)
        mean = tl.sum(value, axis=0) / D
        centred = tl.where(inside, value - mean, 0.0)
        deviation = tl.rsqrt(tl.sum(centred * centred, axis=0) / D + eps)
        out = y + (sample * S + row) * D + cols
        tl.store(out, (centred * deviation * factor + offset).to(y.dtype.element_ty), mask=inside)


def launch_ada_layer_norm(
    x: torch.Tensor,
    scale: torch.Tensor,
    shift: torch.Tensor,
    index: torch.Tensor | None,
    y: torch.Tensor,
    eps: float,
    tile: Tile,
) -> Launch:
    """Return the launch that writes ``y``, contiguous ``[B, S, D]``."""
    batch, tokens, dim = x.shape
    arguments = {
        "x": x,
        "scale": scale,
        "shift": shift,
        "index": index,
        "y": y,
        "B": batch,
        "S": tokens,
        "D": dim,
        "stride_x_batch": x.stride(0),
        "stride_x_row": x.stride(1),
        "stride_scale_sample": scale.stride(0),
        "stride_shift_sample": shift.stride(0),
        "eps": eps,
        "ROWS": tile.rows,
        "BLOCK": _power_of_2(dim),
    }
    return Launch(_ada_layer_norm_kernel, (batch * -(-tokens // tile.rows),), arguments, tile.warps, 1)


def check_ada_layer_norm(x: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor, index: torch.Tensor | None) -> None:
    """Refuse arguments that the kernel cannot handle.

    Raises:
        ValueError: wrong device, dtype, shape or stride.
    """
    if x.dim() != 3 or x.shape[-1] > MAX_WIDTH:
        raise ValueError(f"x is {list(x.shape)}, wanted [B, S, D] with D up to {MAX_WIDTH}")
    check_like(x, x=x, scale=scale, shift=shift)
    check_index(index, x)
    check_modulation("scale", scale, x, x.shape[-1], index)
    check_modulation("shift", shift, x, x.shape[-1], index)


@define_op(
    "ada_layer_norm",
    "(Tensor x, Tensor scale, Tensor shift, Tensor? index, float eps, int[]? tile) -> Tensor",
)
def _norm_op(x, scale, shift, index, eps, tile):
    check_ada_layer_norm(x, scale, shift, index)
    y = x.new_empty(x.shape)
    target = Target.of(x.device)
    if x.numel():
        tile = Tile.choose(target, x.dtype, *x.shape) if tile is None else Tile(*tile)
        launch_ada_layer_norm(x, scale, shift, index, y, eps, tile).run()
    return y


@_norm_op.register_fake
def _(x, scale, shift, index, eps, tile):
    check_ada_layer_norm(x, scale, shift, index)
    return x.new_empty(x.shape)


def ada_layer_norm(
    x: torch.Tensor,
    scale: torch.Tensor,
    shift: torch.Tensor,
    index: torch.Tensor | None = None,
    eps: float = 1e-6,
    *,
    tile: Tile | None = None,
) -> torch.Tensor:
    """Normalise and modulate in one pass; where a gradient is needed, the reference computes the result.

    Args:
        x: ``[B, S, D]``, rows contiguous.
        scale, shift: ``[B, D]``, or ``[2 B, D]`` with ``index``.
        index: ``[B, S]`` of zeros and ones (`ppcl_kernels.modulation`), or None.
        eps: added to the variance.
        tile: None to choose by shape and device.

    Returns:
        ``[B, S, D]``, contiguous, in the dtype of ``x``.

    Raises:
        ValueError: wrong device, dtype, shape or stride.
    """
    if wants_gradient(x, scale, shift):
        return ada_layer_norm_reference(x, scale, shift, index, eps)
    return _norm_op(x, scale, shift, index, eps, tile)


class PreparedAdaLayerNorm:
    """A modulated norm whose shapes and tile are fixed (`prepare_ada_layer_norm`)."""

    def __init__(self, x: torch.Tensor, eps: float, tile: Tile) -> None:
        self._size, self._eps, self._tile = x.shape, eps, tile
        self.launch = Bound([(name,) for name in ("x", "scale", "shift", "index", "y")]) if x.numel() else None

    def __call__(
        self, x: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor, index: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Normalise and modulate tensors of the same shapes, strides and dtypes as those given to preparation."""
        y = x.new_empty(self._size)
        if self.launch is not None:
            self.launch(
                (x, scale, shift, index, y),
                lambda: launch_ada_layer_norm(x, scale, shift, index, y, self._eps, self._tile),
            )
        return y


def prepare_ada_layer_norm(
    x: torch.Tensor,
    scale: torch.Tensor,
    shift: torch.Tensor,
    index: torch.Tensor | None = None,
    eps: float = 1e-6,
    *,
    tile: Tile | None = None,
) -> PreparedAdaLayerNorm:
    """Check what `ada_layer_norm` checks, once for all later calls with tensors like these.

    `ppcl_kernels.prepared.Bound` lists what the caller must then guarantee. There is no gradient.
    """
    check_ada_layer_norm(x, scale, shift, index)
    tile = Tile.choose(Target.of(x.device), x.dtype, *x.shape) if tile is None else tile
    return PreparedAdaLayerNorm(x, eps, tile)
