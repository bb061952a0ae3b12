"""The matrix product that `linear` and `qkv_projection` share: tiles, operands, persistent loop, and epilogue.

B batch, S tokens, K inputs, N outputs. The operands are ``x [B, S, K]`` and ``weight [N, K]``. A tile of the result is
``rows`` tokens of one sample by ``cols`` outputs, so a tile needs one vector of each modulation. The operations after
the product are a jit function that `work_off` is given.

An adapter of rank R adds ``(x down^T) up^T``, ``down [R, K]`` and ``up [N, R]`` with its scale in it. Each tile
computes ``x down^T`` of its rows in the loop that computes its product, from the rows that are there already: R more
columns of products, and one product over R after the loop. So an adapter takes no launch of its own, and
R / cols + R / K more FLOPs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from ppcl_kernels._check import check_weight
from ppcl_kernels._triton import TensorDescriptor, jit, tl
from ppcl_kernels.launch import Target, register_limit
from ppcl_kernels.tiles import cheapest, offered

# A tile of 256 columns multiplies an eighth more at this rank. At larger ones two thin products of their own take less
# time, and the registers of a tile do not suffice.
MOST_RANK = 32


class Tile(NamedTuple):
    """How a matrix product is divided among thread blocks.

    Attributes:
        rows, cols, depth: of the product that one iteration of the loop computes.
        warps: warps of a thread block.
        stages: operand tiles in flight.
        parts: pieces of columns that the epilogue finishes one after the other: a whole wide tile and its residual
            would spill.
        resident: thread blocks on each multiprocessor; with two, one multiplies during the epilogue of the other.
        flat: 1 to merge the loops over tiles and depth into one, so that the first copies of a tile start before the
            epilogue of the previous tile.
    """

    rows: int
    cols: int
    depth: int
    warps: int
    stages: int
    parts: int = 1
    resident: int = 1
    flat: int = 0

    def shared_bytes(self, itemsize: int, rank: int = 0) -> int:
        """Return the shared memory of operand tiles in flight; ``rank`` is the sum of those of the tile's adapters."""
        in_flight = self.stages * (self.rows + self.cols + rank) * self.depth
        return (in_flight + self.cols * rank) * itemsize

    @property
    def registers(self) -> int | None:
        """Registers for each thread at which ``resident`` thread blocks fit, None for no limit."""
        return register_limit(self.warps, self.resident)

    @property
    def cost(self) -> float:
        """Time of one tile: its area, over the guessed speed of tiles of that area."""
        return self.rows * self.cols / _SPEED_GUESSES.get(self.rows * self.cols, 0.4)

    @classmethod
    def candidates(
        cls, target: Target, dtype: torch.dtype, two_weights: bool = False, rank: int = 0
    ) -> tuple[Tile, ...]:
        """Return the tiles of `linear` worth measuring on a target, best guess first (`ppcl_kernels.tiles.offered`).

        Args:
            two_weights: half of the columns of a tile are products with a second weight (`product_tiles`).
            rank: of adapters, 0 for none.
        """
        tiles: Sequence[Tile]
        if rank > MOST_RANK:
            return ()
        if dtype == torch.float32:
            # Exact float32 products use no tensor cores and many registers.
            tiles = (cls(64, 64, 32, 4, 2), cls(32, 32, 32, 4, 2))
        elif target.amd:
            tiles = (cls(128, 128, 64, 8, 2), cls(64, 64, 64, 4, 2, resident=2))
        else:
            tiles = _TILES_WGMMA if target.wgmma else _TILES_TCGEN05 if target.tcgen05 else _TILES_MMA
            if (two_weights or rank) and tiles is _TILES_MMA:
                # On sm_80 the largest spills 112 bytes where its two products become one, and 48 with an adapter.
                tiles = tiles[1:]
            if rank and target.tcgen05:
                # With an adapter triton 3.9 makes a kernel without instructions of the tile of 256 columns with merged
                # loops; without them SwiGLU spills 40 bytes at 128 columns.
                tiles = [tile for tile in tiles if bool(tile.flat) != (tile.cols == 256)]
        # Without TMA one tile less than stages is in flight, which leaves room for the few rows of adapters.
        ranks = rank * (1 + two_weights) if target.tma else 0
        return offered("linear", tiles, target, lambda tile: tile.shared_bytes(dtype.itemsize, ranks))

    @classmethod
    def choose(
        cls,
        target: Target,
        dtype: torch.dtype,
        tokens: Sequence[int],
        batch: int,
        cols: int,
        two_weights: bool = False,
        rank: int = 0,
    ) -> Tile:
        """Pick the tile of `linear` that is cheapest in waves, given the tokens of each stream and the outputs.

        With ``two_weights``, each output takes two of its columns; ``rank`` is that of adapters.
        """
        columns = 2 * cols if two_weights else cols

        def blocks(tile: Tile) -> int:
            return batch * sum(-(-s // tile.rows) for s in tokens) * -(-columns // tile.cols)

        return cheapest("linear", cls.candidates(target, dtype, two_weights, rank), target, blocks)


# Guesses until they are measured: speed of a tile of rows x columns, relative to the fastest tile, when all
# multiprocessors are busy. A 32 x 32 tile reads twice the bytes per product of a 64 x 64 tile, and starts four times as
# often.
_SPEED_GUESSES = {128 * 256: 1.0, 128 * 128: 0.93, 64 * 128: 0.8, 64 * 64: 0.65, 32 * 32: 0.2}

# Hopper and datacentre Blackwell copy operands by TMA.
_TILES_WGMMA = (
    Tile(128, 256, 64, 8, 4, parts=4, flat=1),
    Tile(128, 256, 64, 8, 3, parts=4),
    Tile(128, 128, 64, 8, 3, parts=4, resident=2, flat=1),
    Tile(128, 128, 64, 8, 3, parts=4, resident=2),
    Tile(64, 64, 64, 4, 4, resident=2),
)
# Without merged loops the smallest spills 24 bytes there where nothing follows the product.
_TILES_TCGEN05 = (*_TILES_WGMMA[:-1], _TILES_WGMMA[-1]._replace(flat=1))
_TILES_MMA = (
    Tile(128, 256, 64, 8, 3, parts=4),
    Tile(128, 128, 64, 8, 3, parts=2),
    Tile(64, 64, 64, 4, 3, resident=2),
)


def operand(tensor: torch.Tensor, block: Sequence[int], tma: bool) -> Any:
    """Return a tensor as a kernel's argument: a descriptor of blocks if TMA copies it, otherwise the tensor itself."""
    if not tma:
        return tensor
    return TensorDescriptor(tensor, list(tensor.shape), list(tensor.stride()), list(block))


def padded_rank(rank: int) -> int:
    """Return the rank that factors have to be padded to with zeros, a power of two that tensor cores can multiply.

    More than `MOST_RANK` is refused (`check_factors`).
    """
    return max(16, 1 << (rank - 1).bit_length())


def check_factors(
    n: int, k: int, rank: int, downs: Sequence[torch.Tensor | None], ups: Sequence[torch.Tensor | None]
) -> None:
    """Refuse factors of adapters that hold less than ``n`` outputs of ``k`` inputs, or have not the launch's rank.

    Raises:
        ValueError: one of a pair is missing, or has another shape or other strides than the kernel reads.
    """
    first = next((down for down in downs if down is not None), None)
    if any(first is not None and down is not None and down.stride(0) != first.stride(0) for down in downs):
        raise ValueError("the factors down of a launch differ in stride: .contiguous()")
    for down, up in zip(downs, ups, strict=True):
        if down is None or up is None:
            if down is not up:
                raise ValueError("an adapter is two factors, down and up: one is missing")
            continue
        check_weight("down", down)
        check_weight("up", up)
        if len(down) != rank or up.shape[1] != rank or down.shape[1] < k or len(up) < n:
            raise ValueError(
                f"factors are {list(down.shape)} and {list(up.shape)}, wanted {[rank, k]} and {[n, rank]}, or more "
                "inputs and outputs"
            )
        if rank != padded_rank(rank) or rank > MOST_RANK:
            raise ValueError(
                f"the rank of adapters is {rank}, wanted a power of two from 16 to {MOST_RANK}: pad the factors with "
                "zeros, or call the reference"
            )
        if not up.is_contiguous():
            raise ValueError(f"up has strides {up.stride()}, wanted contiguous: .contiguous()")


def takes_tma(target: Target, *tensors: torch.Tensor) -> bool:
    """Return whether TMA can copy tiles of these tensors: starts and strides of 16 bytes, and no expanded dimension."""
    return target.tma and all(
        tensor.data_ptr() % 16 == 0
        and tensor.stride(-1) == 1
        and all(stride > 0 and stride * tensor.itemsize % 16 == 0 for stride in tensor.stride()[:-1])
        for tensor in tensors
    )


@jit()
def locate_tile(tile, rows, cols, BAND: tl.constexpr):
    """Return row and column of a tile. Tiles go band of rows by band of rows, so the weights of a band stay in L2."""
    band = tile // (BAND * cols)
    height = tl.minimum(rows - band * BAND, BAND)
    inside = tile % (BAND * cols)
    return band * BAND + inside % height, inside // height


@jit()
def load_rows(x, b, row, k, S, K, strides, ROWS: tl.constexpr, DEPTH: tl.constexpr, TMA: tl.constexpr):
    """Load ``x[b, row : row + ROWS, k : k + DEPTH]``; zeros beyond K, arbitrary finite values beyond S."""
    if TMA:
        return x.load([b, row, k]).reshape(ROWS, DEPTH)
    else:
        stride_x_batch, stride_x_row = strides
        start = x + b.to(tl.int64) * stride_x_batch + row.to(tl.int64) * stride_x_row
        # Rows beyond the end repeat the last row: this needs no mask, and no stored result depends on them.
        rows = tl.minimum(tl.arange(0, ROWS), S - 1 - row)
        cols = k + tl.arange(0, DEPTH)
        return tl.load(start + rows[:, None] * stride_x_row + cols[None, :], mask=cols[None, :] < K, other=0.0)


@jit()
def load_weight(w, col, k, N, K, stride_w_row, COLS: tl.constexpr, DEPTH: tl.constexpr, TMA: tl.constexpr):
    """Load ``w[col : col + COLS, k : k + DEPTH]``; zeros beyond K, arbitrary finite values beyond N."""
    if TMA:
        return w.load([col, k])
    else:
        start = w + tl.cast(col, tl.int64) * stride_w_row
        rows = tl.minimum(tl.arange(0, COLS), N - 1 - col)
        cols = k + tl.arange(0, DEPTH)
        return tl.load(start + rows[:, None] * stride_w_row + cols[None, :], mask=cols[None, :] < K, other=0.0)


@jit()
def adapted_product(acc, thin, up, col, N, COLS: tl.constexpr, TMA: tl.constexpr, RANK: tl.constexpr):
    """Add ``thin @ up[col :]^T`` to a tile; ``thin`` is ``x down^T`` of its rows, ``[ROWS, RANK]`` in float32."""
    up_tile = load_weight(up, col, 0, N, RANK, RANK, COLS, RANK, TMA)
    return tl.dot(thin.to(up_tile.dtype), up_tile.T, acc, input_precision="ieee")


@jit()
def product_tile(
    x, w, adapter, at, sizes, strides,
    ROWS: tl.constexpr, COLS: tl.constexpr, DEPTH: tl.constexpr, TMA: tl.constexpr, RANK: tl.constexpr,
):  # fmt: skip
    """Compute one tile of ``x[b, row :, :K] @ w[col :, :K]^T`` in float32, with what an adapter adds.

    ``at`` is (b, row, col), ``sizes`` is (S, N, K), ``strides`` is (those of x for batch and row, that of w for rows).
    ``adapter`` is (down, up, stride of the rows of down), or None three times; RANK is R, if there is one.
    With TMA the strides are not read.
    """
    b, row, col = at
    S, N, K = sizes
    x_strides, stride_w_row = strides
    down, up, stride_down_row = adapter
    acc = tl.zeros((ROWS, COLS), tl.float32)
    if down is not None:
        thin = tl.zeros((ROWS, RANK), tl.float32)
    for k in range(0, K, DEPTH):
        x_tile = load_rows(x, b, row, k, S, K, x_strides, ROWS, DEPTH, TMA)
        w_tile = load_weight(w, col, k, N, K, stride_w_row, COLS, DEPTH, TMA)
        # [ROWS, DEPTH] x [DEPTH, COLS]. "ieee" matters only for float32: TF32 has to be asked for.
        acc = tl.dot(x_tile, w_tile.T, acc, input_precision="ieee")
        if down is not None:
            down_tile = load_weight(down, 0, k, RANK, K, stride_down_row, RANK, DEPTH, TMA)
            thin = tl.dot(x_tile, down_tile.T, thin, input_precision="ieee")
    if down is not None:
        acc = adapted_product(acc, thin, up, col, N, COLS, TMA, RANK)
    return acc


@jit()
def product_tiles(
    x, w, adapter, at, sizes, strides,
    ROWS: tl.constexpr, COLS: tl.constexpr, DEPTH: tl.constexpr, TMA: tl.constexpr, RANK: tl.constexpr,
):  # fmt: skip
    """Compute the same tile of the products with two weights of one shape, reading x once.

    As `product_tile`, but ``w`` and its stride, and ``adapter``, are pairs; returns a pair.
    """
    b, row, col = at
    S, N, K = sizes
    x_strides, (stride_first, stride_second) = strides
    first, second = w
    (down, up, stride_down_row), (other_down, other_up, stride_other_down_row) = adapter
    acc = tl.zeros((ROWS, COLS), tl.float32)
    other = tl.zeros((ROWS, COLS), tl.float32)
    if down is not None:
        thin = tl.zeros((ROWS, RANK), tl.float32)
    if other_down is not None:
        other_thin = tl.zeros((ROWS, RANK), tl.float32)
    for k in range(0, K, DEPTH):
        x_tile = load_rows(x, b, row, k, S, K, x_strides, ROWS, DEPTH, TMA)
        w_tile = load_weight(first, col, k, N, K, stride_first, COLS, DEPTH, TMA)
        acc = tl.dot(x_tile, w_tile.T, acc, input_precision="ieee")
        w_tile = load_weight(second, col, k, N, K, stride_second, COLS, DEPTH, TMA)
        other = tl.dot(x_tile, w_tile.T, other, input_precision="ieee")
        if down is not None:
            down_tile = load_weight(down, 0, k, RANK, K, stride_down_row, RANK, DEPTH, TMA)
            thin = tl.dot(x_tile, down_tile.T, thin, input_precision="ieee")
        if other_down is not None:
            down_tile = load_weight(other_down, 0, k, RANK, K, stride_other_down_row, RANK, DEPTH, TMA)
            other_thin = tl.dot(x_tile, down_tile.T, other_thin, input_precision="ieee")
    if down is not None:
        acc = adapted_product(acc, thin, up, col, N, COLS, TMA, RANK)
    if other_down is not None:
        other = adapted_product(other, other_thin, other_up, col, N, COLS, TMA, RANK)
    return acc, other


@jit()
def by_parts(acc, finish, arguments, place, first_col, ROWS: tl.constexpr, COLS: tl.constexpr, PARTS: tl.constexpr):
    """Split a tile of the result into PARTS pieces of columns, and finish them one after the other.

    Args:
        acc: ``[ROWS, COLS]``, float32.
        finish: jit function of (piece, arguments, place, first column of the piece, ROWS, columns of the piece).
        first_col: first column of the tile.
        PARTS: a power of two.
    """
    if PARTS == 1:
        finish(acc, arguments, place, first_col, ROWS, COLS)
    else:
        left, right = acc.reshape(ROWS, 2, COLS // 2).permute(0, 2, 1).split()
        by_parts(left, finish, arguments, place, first_col, ROWS, COLS // 2, PARTS // 2)
        by_parts(right, finish, arguments, place, first_col + COLS // 2, ROWS, COLS // 2, PARTS // 2)


@jit()
def work_off(
    start,
    x,
    w,
    adapter,
    sizes,
    strides,
    B,
    col_tiles,
    chosen,
    product,
    epilogue,
    arguments,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    DEPTH: tl.constexpr,
    PARTS: tl.constexpr,
    FLAT: tl.constexpr,
    TMA: tl.constexpr,
    RANK: tl.constexpr,
):
    """Compute and finish the tiles of one product that belong to this thread block.

    Args:
        start: number of the thread block's first tile.
        x, w: the operands (`operand`).
        adapter, sizes, strides: as in `product_tile`.
        B: samples.
        col_tiles: number of tiles of columns.
        chosen: which tile of the weight is at each tile of columns, int32; None for the first ones in order.
        product: `product_tile` or `product_tiles`; the latter takes pairs for ``w``, its stride and ``adapter``.
        epilogue: jit function of (acc, arguments, place, ROWS, COLS, PARTS), where acc is what the product returns, and
            place is (sample, first token, tile of columns, first row of the weight). To triton both functions are
            constants.
        arguments: a tuple of arguments for the epilogue.
        WIDTH: rows of the weight from one tile of columns to the next.
        RANK: of the adapter, 0 where there is none.

    Returns:
        The number of the thread block's first tile in the next product.
    """
    row_tiles = tl.cdiv(sizes[0], ROWS)
    total = B * row_tiles * col_tiles
    for tile in tl.range(start, total, tl.num_programs(0), flatten=FLAT):
        at, col_tile = locate_tile(tile, B * row_tiles, col_tiles, 8)
        b = at // row_tiles
        row = at % row_tiles * ROWS
        col = col_tile * WIDTH
        if chosen is not None:
            col = tl.load(chosen + col_tile) * WIDTH
        acc = product(x, w, adapter, (b, row, col), sizes, strides, ROWS, COLS, DEPTH, TMA, RANK)
        epilogue(acc, arguments, (b, row, col_tile, col), ROWS, COLS, PARTS)
    # The tiles start, start + programs, ... below the total are done.
    programs = tl.num_programs(0)
    return start + tl.cdiv(tl.maximum(total - start, 0), programs) * programs - total
