"""The matrix product that `linear` and `qkv_projection` share: tiles, operands and the loop over the inner dimension.

B batch, S tokens, K inputs, N outputs. Operands are ``x [B, S, K]`` and ``weight [N, K]``; a tile of the result is
``rows`` tokens of one sample by ``cols`` outputs, so what modulates a sample is one vector a tile.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from ppcl_kernels._triton import TensorDescriptor, jit, tl
from ppcl_kernels.launch import Target, register_limit


class Tile(NamedTuple):
    """How a matrix product is cut up.

    Attributes:
        rows, cols, depth: of the tile that one step of the loop multiplies.
        warps, stages: per block, and tiles in flight.
        parts: pieces that the epilogue works off one by one; a residual beside a whole wide tile would spill.
        resident: blocks per multiprocessor of the persistent grid; two hide each other's epilogue.
        flat: 1 to make one loop of those over tiles and depth, so that a tile's first copies start before the epilogue
            of the one before it.
    """

    rows: int
    cols: int
    depth: int
    warps: int
    stages: int
    parts: int = 1
    resident: int = 1
    flat: int = 0

    def shared_bytes(self, itemsize: int) -> int:
        """Shared memory of the operand tiles in flight."""
        return self.stages * (self.rows + self.cols) * self.depth * itemsize

    @property
    def registers(self) -> int | None:
        """Registers a thread that let so many blocks be resident, None for no limit."""
        return register_limit(self.warps, self.resident)

    @property
    def speed(self) -> float:
        """Share of the fastest tile's speed where every multiprocessor is busy: guesses until measured."""
        return {128 * 256: 1.0, 128 * 128: 0.93, 64 * 64: 0.65}.get(self.rows * self.cols, 0.4)

    @classmethod
    def candidates(cls, target: Target, dtype: torch.dtype) -> tuple[Tile, ...]:
        """Tiles worth measuring on a target, best guess first; none spills (`ppcl_kernels.aot` checks)."""
        if dtype == torch.float32:
            # Exact products: no tensor cores, many registers.
            return (cls(64, 64, 32, 4, 2), cls(32, 32, 32, 4, 2))
        if target.amd:
            return (cls(128, 128, 64, 8, 2), cls(64, 64, 64, 4, 2, resident=2))
        tiles = _TILES_WGMMA if target.wgmma or target.tcgen05 else _TILES_MMA
        itemsize = dtype.itemsize
        return tuple(tile for tile in tiles if tile.resident * tile.shared_bytes(itemsize) <= target.shared_bytes)

    @classmethod
    def choose(cls, target: Target, dtype: torch.dtype, tokens: Sequence[int], batch: int, cols: int) -> Tile:
        """Pick the tile that keeps multiprocessors busiest: the last wave of large tiles may be nearly empty."""

        def rate(tile: Tile) -> float:
            tiles = batch * sum(-(-s // tile.rows) for s in tokens) * -(-cols // tile.cols)
            slots = target.multiprocessors * tile.resident
            return tile.speed * tiles / (slots * -(-tiles // slots))

        return max(cls.candidates(target, dtype), key=rate)


# Hopper and Blackwell: operands by TMA.
_TILES_WGMMA = (
    Tile(128, 256, 64, 8, 4, parts=4, flat=1),
    Tile(128, 256, 64, 8, 3, parts=4),
    Tile(128, 128, 64, 8, 3, parts=4, resident=2, flat=1),
    Tile(128, 128, 64, 8, 3, parts=4, resident=2),
    Tile(64, 64, 64, 4, 4, resident=2),
)
_TILES_MMA = (
    Tile(128, 256, 64, 8, 3, parts=4),
    Tile(128, 128, 64, 8, 3, parts=2),
    Tile(64, 64, 64, 4, 3, resident=2),
)


def operand(tensor: torch.Tensor, block: Sequence[int], tma: bool) -> Any:
    """Hand a tensor to a kernel: as a descriptor of blocks where TMA copies them, as it is elsewhere."""
    if not tma:
        return tensor
    return TensorDescriptor(tensor, list(tensor.shape), list(tensor.stride()), list(block))


def takes_tma(target: Target, *tensors: torch.Tensor) -> bool:
    """Whether TMA can copy tiles of all these: it wants 16-byte starts and steps, and no tensor that was expanded."""
    return target.tma and all(
        tensor.data_ptr() % 16 == 0
        and tensor.stride(-1) == 1
        and all(step > 0 and step * tensor.itemsize % 16 == 0 for step in tensor.stride()[:-1])
        for tensor in tensors
    )


@jit()
def locate_tile(tile, rows, cols, BAND: tl.constexpr):
    """Row and column of a tile, a band of rows at a time: the weights of a band stay in L2."""
    band = tile // (BAND * cols)
    height = tl.minimum(rows - band * BAND, BAND)
    inside = tile % (BAND * cols)
    return band * BAND + inside % height, inside // height


@jit()
def split_columns(tile, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Split a tile of COLS columns into its left and right half."""
    return tile.reshape(ROWS, 2, COLS // 2).permute(0, 2, 1).split()


@jit()
def next_start(start, total):
    """Where a program goes on in the next group after it took tiles start, start + programs, ... below total."""
    programs = tl.num_programs(0)
    return start + tl.cdiv(tl.maximum(total - start, 0), programs) * programs - total


@jit()
def load_rows(x, b, row, k, S, K, steps, ROWS: tl.constexpr, DEPTH: tl.constexpr, TMA: tl.constexpr):
    """Load ``x[b, row : row + ROWS, k : k + DEPTH]``; zeros beyond K, anything finite beyond S."""
    if TMA:
        return x.load([b, row, k]).reshape(ROWS, DEPTH)
    else:
        batch_step, row_step = steps
        start = x + b.to(tl.int64) * batch_step + row.to(tl.int64) * row_step
        # Rows beyond the end repeat the last one: no mask, and nothing that is stored reads them.
        rows = tl.minimum(tl.arange(0, ROWS), S - 1 - row)
        cols = k + tl.arange(0, DEPTH)
        return tl.load(start + rows[:, None] * row_step + cols[None, :], mask=cols[None, :] < K, other=0.0)


@jit()
def load_weight(w, col, k, N, K, step, COLS: tl.constexpr, DEPTH: tl.constexpr, TMA: tl.constexpr):
    """Load ``w[col : col + COLS, k : k + DEPTH]``, likewise."""
    if TMA:
        return w.load([col, k])
    else:
        start = w + col.to(tl.int64) * step
        rows = tl.minimum(tl.arange(0, COLS), N - 1 - col)
        cols = k + tl.arange(0, DEPTH)
        return tl.load(start + rows[:, None] * step + cols[None, :], mask=cols[None, :] < K, other=0.0)


@jit()
def product_tile(
    x, w, at, sizes, steps, ROWS: tl.constexpr, COLS: tl.constexpr, DEPTH: tl.constexpr, TMA: tl.constexpr
):
    """Compute ``x[b, row :, :K] @ w[col :, :K]^T`` of one tile, in float32.

    ``at`` is (b, row, col), ``sizes`` (S, N, K), ``steps`` those of x (batch, row) and w (row); TMA does not read them.
    """
    b, row, col = at
    S, N, K = sizes
    x_steps, w_step = steps
    total = tl.zeros((ROWS, COLS), tl.float32)
    for k in range(0, K, DEPTH):
        x_tile = load_rows(x, b, row, k, S, K, x_steps, ROWS, DEPTH, TMA)
        w_tile = load_weight(w, col, k, N, K, w_step, COLS, DEPTH, TMA)
        # "ieee" matters for float32 alone: no TF32 behind the caller's back.
        total = tl.dot(x_tile, w_tile.T, total, input_precision="ieee")
    return total
