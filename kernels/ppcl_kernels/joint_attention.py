"""Attention over text and image tokens together, forward only: ``softmax(q k^T * scale) v``.

B batch, S queries, T keys, H heads kept, E head dimension. This is flash attention: a tile of queries keeps its running
maximum, sum and output in registers while tiles of keys pass, so the ``[S, T]`` scores are never written to memory.

Keys may be cut off for each sample (``key_lengths``) or masked in any pattern (``key_mask``). Tiles before the first
unmasked key and after the last one are skipped. The longest run of tiles without a masked key takes a loop that does
not look at the mask. So a mask costs time only in its ragged tiles, those with masked and unmasked keys.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from ppcl_kernels._check import check_like, check_shape, wants_gradient
from ppcl_kernels._op import define_op
from ppcl_kernels._triton import jit, tl
from ppcl_kernels.allowed import is_allowed
from ppcl_kernels.heads import MAX_HEAD_DIM, head_cols
from ppcl_kernels.launch import Launch, Target, register_limit
from ppcl_kernels.matmul import operand, takes_tma
from ppcl_kernels.prepared import Bound
from ppcl_kernels.tiles import cheapest, offered


def joint_attention_reference(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    key_mask: torch.Tensor | None = None,
    key_lengths: torch.Tensor | None = None,
    scale: float | None = None,
) -> torch.Tensor:
    """Attend; q is ``[B, S, H, E]``, k and v are ``[B, T, H, E]``, the rest is as in `joint_attention`."""
    mask = _joint_mask(k, key_mask, key_lengths)
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    y = F.scaled_dot_product_attention(
        q, k, v, attn_mask=None if mask is None else mask[:, None, None, :], scale=scale
    ).transpose(1, 2)
    if mask is None:
        return y
    # Not every backend of SDPA returns zeros where all keys are masked.
    return torch.where(mask.any(dim=1)[:, None, None, None], y, 0.0)


def _joint_mask(
    k: torch.Tensor, key_mask: torch.Tensor | None, key_lengths: torch.Tensor | None
) -> torch.Tensor | None:
    if key_lengths is None:
        return key_mask
    within = torch.arange(k.shape[1], device=k.device) < key_lengths[:, None]
    return within if key_mask is None else within & key_mask


class Tile(NamedTuple):
    """How attention is divided among thread blocks.

    Attributes:
        queries, keys: of a tile.
        warps: warps of a thread block.
        stages: tiles of keys and values in flight.
        resident: thread blocks that share a multiprocessor.
    """

    queries: int
    keys: int
    warps: int
    stages: int
    resident: int = 1

    def shared_bytes(self, head_dim: int, itemsize: int) -> int:
        """Return the shared memory of the queries, which stay, and of the keys and values in flight."""
        return (self.queries + 2 * self.stages * self.keys) * head_cols(head_dim) * itemsize

    @property
    def registers(self) -> int | None:
        """Registers for each thread at which ``resident`` thread blocks fit, None for no limit."""
        return register_limit(self.warps, self.resident)

    @property
    def cost(self) -> float:
        """Time of one thread block over all keys: its queries, over the guessed speed of such tiles."""
        return self.queries / _SPEED_GUESSES.get((self.queries, self.keys), 0.4)

    @classmethod
    def candidates(cls, target: Target, dtype: torch.dtype, head_dim: int) -> tuple[Tile, ...]:
        """Return the tiles worth measuring on a target, best guess first (`ppcl_kernels.tiles.offered`)."""
        tiles: tuple[Tile, ...]
        if dtype == torch.float32:
            tiles = (cls(32, 32, 4, 1),)
        elif target.amd:
            tiles = (cls(128, 32, 8, 1), cls(64, 64, 4, 1))
        elif target.wgmma:
            tiles = (cls(128, 128, 8, 3), cls(128, 64, 8, 2, 2), cls(128, 128, 8, 2), cls(64, 64, 4, 3))
        elif target.tcgen05:
            tiles = (cls(128, 128, 8, 2), cls(64, 64, 4, 2))
        else:
            tiles = (cls(128, 64, 8, 3), cls(128, 64, 8, 2), cls(64, 64, 4, 2))
        # With a mask, a launch of `_key_ranges_kernel` with the same keys comes first.
        tiles = tuple(tile for tile in tiles if is_allowed("key_ranges", (tile.keys,)))
        return offered("joint_attention", tiles, target, lambda tile: tile.shared_bytes(head_dim, dtype.itemsize))

    @classmethod
    def choose(cls, target: Target, dtype: torch.dtype, batch: int, queries: int, heads: int, head_dim: int) -> Tile:
        """Pick the tile that is cheapest in waves."""
        tiles = cls.candidates(target, dtype, head_dim)
        return cheapest("joint_attention", tiles, target, lambda tile: batch * heads * -(-queries // tile.queries))


# Guesses until they are measured: speed of a tile of queries x keys, relative to the fastest tile, when all
# multiprocessors are busy.
_SPEED_GUESSES = {(128, 128): 1.0, (128, 64): 0.95, (128, 32): 0.9, (64, 64): 0.7}


@jit()
def _later(a, b):
    return tl.maximum(a, b)


@jit(do_not_specialize=["T"])
def _key_ranges_kernel(mask, ranges, T, TILES: tl.constexpr, KEYS: tl.constexpr):
    """Write which tiles of keys to visit, for each sample.

    Four tile numbers: the first tile with an unmasked key, begin and end of the longest run of tiles without a masked
    key, and the last tile with an unmasked key + 1.
    """
    b = tl.program_id(0).to(tl.int64)
    tiles = tl.arange(0, TILES)
    at = tiles[:, None] * KEYS + tl.arange(0, KEYS)[None, :]
    counts = tl.sum(tl.load(mask + b * T + at, mask=at < T, other=0).to(tl.int32), axis=1)
    # A tile that reaches beyond the last key is never full.
    full = counts == KEYS
    last_ragged = tl.associative_scan(tl.where(full, -1, tiles), 0, _later)
    run = tiles - last_ragged
    longest = tl.max(run, axis=0)
    end = tl.max(tl.where(run == longest, tiles + 1, 0), axis=0)
    tl.store(ranges + b * 4, tl.min(tl.where(counts > 0, tiles, TILES), axis=0))
    tl.store(ranges + b * 4 + 1, end - longest)
    tl.store(ranges + b * 4 + 2, end)
    tl.store(ranges + b * 4 + 3, tl.max(tl.where(counts > 0, tiles + 1, 0), axis=0))


@jit()
def _load_tile(x, b, head, row, S, strides, E: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, TMA: tl.constexpr):
    """Load ``x[b, row : row + ROWS, head]``; zeros beyond E, arbitrary finite values beyond S."""
    if TMA:
        return x.load([b, head, row, 0]).reshape(ROWS, COLS)
    else:
        stride_batch, stride_row, stride_head = strides
        start = x + b.to(tl.int64) * stride_batch + row.to(tl.int64) * stride_row + head.to(tl.int64) * stride_head
        rows = tl.minimum(tl.arange(0, ROWS), S - 1 - row)
        cols = tl.arange(0, COLS)
        offsets = rows[:, None] * stride_row + cols[None, :]
        if COLS == E:
            return tl.load(start + offsets)
        else:
            return tl.load(start + offsets, mask=cols[None, :] < E, other=0.0)


@jit()
def _online_softmax(qk, v_tile, m_i, l_i, acc, qk_scale):
    """Add a tile of scores ``qk`` to the running maximum ``m_i`` (base 2), sum ``l_i`` and output ``acc``.

    The first tile that a thread block visits has an unmasked key, and keys are masked for all rows alike: ``m_ij`` is
    finite from that tile on.
    """
    m_ij = tl.maximum(m_i, tl.max(qk, 1) * qk_scale)
    p = tl.exp2(qk * qk_scale - m_ij[:, None])
    alpha = tl.exp2(m_i - m_ij)
    l_i = l_i * alpha + tl.sum(p, 1)
    acc = acc * alpha[:, None]
    # [QUERIES, KEYS] x [KEYS, COLS]
    acc = tl.dot(p.to(v_tile.dtype), v_tile, acc, input_precision="ieee")
    return m_ij, l_i, acc


_COUNTS = ("H", "S", "T")


# Counts of heads and tokens change with the plan and the prompt, so the kernel must not be specialised on any of them.
@jit(do_not_specialize=list(_COUNTS))
def _joint_attention_kernel(
    q,
    k,
    v,
    y,
    mask,
    ranges,
    lengths,
    H,
    S,
    T,
    stride_q_batch,
    stride_q_row,
    stride_q_head,
    stride_k_batch,
    stride_k_row,
    stride_k_head,
    stride_v_batch,
    stride_v_row,
    stride_v_head,
    qk_scale,
    E: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    COLS: tl.constexpr,
    RAGGED_STAGES: tl.constexpr,
    TMA: tl.constexpr,
):
    # The thread blocks of one head follow each other, so its keys and values stay in L2.
    blocks = tl.cdiv(S, QUERIES)
    row = tl.program_id(0) % blocks * QUERIES
    head = tl.program_id(0) // blocks % H
    b = tl.program_id(0) // blocks // H
    if ranges is not None:
        begin = tl.load(ranges + b * 4)
        full_begin = tl.load(ranges + b * 4 + 1)
        full_end = tl.load(ranges + b * 4 + 2)
        end = tl.load(ranges + b * 4 + 3)
    else:
        length = T
        if lengths is not None:
            length = tl.maximum(tl.minimum(tl.load(lengths + b), T), 0).to(tl.int32)
        begin = 0
        full_begin = 0
        full_end = length // KEYS
        end = tl.cdiv(length, KEYS)

    q_strides = (stride_q_batch, stride_q_row, stride_q_head)
    k_strides = (stride_k_batch, stride_k_row, stride_k_head)
    v_strides = (stride_v_batch, stride_v_row, stride_v_head)
    q_tile = _load_tile(q, b, head, row, S, q_strides, E, QUERIES, COLS, TMA)
    m_i = tl.full((QUERIES,), float("-inf"), tl.float32)
    l_i = tl.zeros((QUERIES,), tl.float32)
    acc = tl.zeros((QUERIES, COLS), tl.float32)
    for tile in range(full_begin, full_end):
        key = (b * 0 + tile) * KEYS
        k_tile = _load_tile(k, b, head, key, T, k_strides, E, KEYS, COLS, TMA)
        v_tile = _load_tile(v, b, head, key, T, v_strides, E, KEYS, COLS, TMA)
        # [QUERIES, COLS] x [COLS, KEYS]
        qk = tl.dot(q_tile, k_tile.T, input_precision="ieee")
        m_i, l_i, acc = _online_softmax(qk, v_tile, m_i, l_i, acc, qk_scale)
    # The ragged tiles: those before the run, then those after it.
    before = tl.maximum(tl.minimum(full_begin, end) - begin, 0)
    for step in tl.range(0, before + tl.maximum(end - full_end, 0), num_stages=RAGGED_STAGES):
        key = (b * 0 + tl.where(step < before, begin + step, full_end + step - before)) * KEYS
        k_tile = _load_tile(k, b, head, key, T, k_strides, E, KEYS, COLS, TMA)
        v_tile = _load_tile(v, b, head, key, T, v_strides, E, KEYS, COLS, TMA)
        keys = key + tl.arange(0, KEYS)
        if mask is not None:
            counted = tl.load(mask + b.to(tl.int64) * T + keys, mask=keys < T, other=0) != 0
        else:
            counted = keys < T
            if lengths is not None:
                # Reload it: keeping it live across the loop before spills.
                counted = counted & (keys < tl.load(lengths + b))
        # [QUERIES, COLS] x [COLS, KEYS]
        qk = tl.dot(q_tile, k_tile.T, input_precision="ieee")
        qk = tl.where(counted[None, :], qk, float("-inf"))
        m_i, l_i, acc = _online_softmax(qk, v_tile, m_i, l_i, acc, qk_scale)
    # Rows without an unmasked key have sum 0 and output 0.
    acc = acc / tl.where(l_i == 0.0, 1.0, l_i)[:, None]
    rows, cols = tl.arange(0, QUERIES), tl.arange(0, COLS)
    corner = ((b.to(tl.int64) * S + row) * H + head) * E
    inside = (row + rows[:, None] < S) & (cols[None, :] < E)
    tl.store(y + corner + rows[:, None] * (H * E) + cols[None, :], acc.to(y.dtype.element_ty), mask=inside)


def launch_key_ranges(key_mask: torch.Tensor, ranges: torch.Tensor, keys: int) -> Launch:
    """Return the launch that writes ``ranges [B, 4]`` of ``key_mask [B, T]`` (bytes), for tiles of ``keys`` keys."""
    batch, length = key_mask.shape
    # A tensor in a kernel has to have a power of two of elements.
    tiles = 1 << (-(-length // keys) - 1).bit_length()
    arguments = {"mask": key_mask, "ranges": ranges, "T": length, "TILES": tiles, "KEYS": keys}
    return Launch(_key_ranges_kernel, (batch,), arguments, 8, 1)


def launch_joint_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    y: torch.Tensor,
    key_mask: torch.Tensor | None,
    ranges: torch.Tensor | None,
    key_lengths: torch.Tensor | None,
    scale: float,
    tile: Tile,
    target: Target,
) -> Launch:
    """Return the launch that writes ``y``, contiguous ``[B, S, H, E]``."""
    batch, tokens, heads, head_dim = q.shape
    cols = head_cols(head_dim)
    tma = takes_tma(target, q, k, v)

    def rows_of(x: torch.Tensor, rows: int) -> Any:
        # Dimensions of size 1 have to come first, or the compiler moves the tile through registers.
        return operand(x.transpose(1, 2), (1, 1, rows, cols), tma) if tma else x

    arguments = {
        "q": rows_of(q, tile.queries),
        "k": rows_of(k, tile.keys),
        "v": rows_of(v, tile.keys),
        "y": y,
        "mask": key_mask,
        "ranges": ranges,
        "lengths": key_lengths,
        "H": heads,
        "S": tokens,
        "T": k.shape[1],
        **{
            f"stride_{name}_{axis}": t.stride(dim)
            for name, t in (("q", q), ("k", k), ("v", v))
            for dim, axis in enumerate(("batch", "row", "head"))
        },
        # GPUs have an instruction for exp2, not for exp.
        "qk_scale": scale * math.log2(math.e),
        "E": head_dim,
        "QUERIES": tile.queries,
        "KEYS": tile.keys,
        "COLS": cols,
        # Few tiles are ragged. Where tensor cores read operands from shared memory, leaving ragged tiles unpipelined
        # saves registers; elsewhere it needs more of them (sm_80 spills).
        "RAGGED_STAGES": 1 if target.wgmma or target.tcgen05 else tile.stages,
        "TMA": tma,
    }
    grid = (batch * heads * -(-tokens // tile.queries),)
    return Launch(_joint_attention_kernel, grid, arguments, tile.warps, tile.stages, tile.registers)


def _check(q, k, v, key_mask, key_lengths, scale) -> None:
    if q.dim() != 4 or not 0 < q.shape[3] <= MAX_HEAD_DIM:
        raise ValueError(f"q is {list(q.shape)}, wanted [B, S, H, E] with E up to {MAX_HEAD_DIM}")
    if not scale > 0:
        raise ValueError(f"scale is {scale}, wanted above 0")
    if k.dim() != 4:
        raise ValueError(f"k is {list(k.shape)}, wanted [B, T, H, E]")
    check_shape("k", k, (q.shape[0], k.shape[1], *q.shape[2:]))
    check_shape("v", v, k.shape)
    check_like(q, q=q, k=k, v=v)
    if key_mask is not None:
        check_shape("key_mask", key_mask, k.shape[:2])
        if key_mask.dtype != torch.bool or key_mask.device != q.device:
            raise ValueError(f"key_mask is {key_mask.dtype} on {key_mask.device}, wanted bool on {q.device}")
    if key_lengths is not None:
        check_shape("key_lengths", key_lengths, k.shape[:1])
        if key_lengths.dtype not in (torch.int32, torch.int64) or key_lengths.device != q.device:
            raise ValueError(f"key_lengths is {key_lengths.dtype} on {key_lengths.device}, wanted int32 on {q.device}")


@define_op(
    "joint_attention",
    "(Tensor q, Tensor k, Tensor v, Tensor? key_mask, Tensor? key_lengths, float scale, int[]? tile) -> Tensor",
)
def _attention_op(q, k, v, key_mask, key_lengths, scale, tile):
    _check(q, k, v, key_mask, key_lengths, scale)
    target = Target.of(q.device)
    y = q.new_empty(q.shape)
    if not q.numel():
        return y
    if not k.shape[1]:
        return y.zero_()
    tile = Tile.choose(target, q.dtype, *q.shape) if tile is None else Tile(*tile)
    ranges = None
    if key_mask is not None:
        key_mask = key_mask.contiguous().view(torch.uint8)
        ranges = torch.empty(q.shape[0], 4, dtype=torch.int32, device=q.device)
        launch_key_ranges(key_mask, ranges, tile.keys).run()
    if key_lengths is not None:
        key_lengths = key_lengths.contiguous()
    launch_joint_attention(q, k, v, y, key_mask, ranges, key_lengths, scale, tile, target).run()
    return y


@_attention_op.register_fake
def _(q, k, v, key_mask, key_lengths, scale, tile):
    _check(q, k, v, key_mask, key_lengths, scale)
    return q.new_empty(q.shape)


def joint_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    key_mask: torch.Tensor | None = None,
    key_lengths: torch.Tensor | None = None,
    scale: float | None = None,
    *,
    tile: Tile | None = None,
) -> torch.Tensor:
    """Attend over text and image tokens together; where a gradient is needed, the reference computes the result.

    Args:
        q: ``[B, S, H, E]``, E up to 128, for the streams whose output is read.
        k, v: ``[B, T, H, E]``, for all streams.
        key_mask: bool ``[B, T]``, False on masked keys, in any pattern; or None.
        key_lengths: int32 or int64 ``[B]``, the number of keys that are not masked, counted from the first; or None.
            Not together with ``key_mask``.
        scale: factor of the scores, above 0; None for ``E ** -0.5``.
        tile: None to choose by shape and device.

    Returns:
        ``[B, S, H, E]``, contiguous, in the dtype of ``q``; zeros where all keys are masked.

    Raises:
        ValueError: wrong device, dtype, shape or stride.
    """
    if key_mask is not None and key_lengths is not None:
        raise ValueError("key_mask and key_lengths were both given: put the lengths into the mask")
    scale = max(q.shape[-1], 1) ** -0.5 if scale is None else scale
    if wants_gradient(q, k, v):
        return joint_attention_reference(q, k, v, key_mask, key_lengths, scale)
    return _attention_op(q, k, v, key_mask, key_lengths, scale, tile)


class PreparedAttention:
    """Attention whose shapes and tile are fixed (`prepare_joint_attention`)."""

    def __init__(self, q: torch.Tensor, k: torch.Tensor, masked: bool, scale: float, tile: Tile) -> None:
        self._size, self._empty, self._keys = q.shape, not q.numel(), k.shape[1]
        self._target, self._tile, self._scale = Target.of(q.device), tile, scale
        self.ranges = Bound((("mask",), ("ranges",))) if masked else None
        self.launch = Bound((("q",), ("k",), ("v",), ("y",), ("mask",), ("ranges",)))

    def __call__(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, key_mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Attend over tensors of the same shapes, strides and dtypes as those given to preparation."""
        y = q.new_empty(self._size)
        if self._empty:
            return y
        if not self._keys:
            return y.zero_()
        assert (key_mask is None) == (self.ranges is None), "this attention was prepared with a mask, or without one"
        ranges = None
        if self.ranges is not None and key_mask is not None:
            key_mask = key_mask.contiguous().view(torch.uint8)
            ranges = torch.empty((self._size[0], 4), dtype=torch.int32, device=q.device)
            self.ranges((key_mask, ranges), lambda: launch_key_ranges(key_mask, ranges, self._tile.keys))
        self.launch(
            (q, k, v, y, key_mask, ranges),
            lambda: launch_joint_attention(q, k, v, y, key_mask, ranges, None, self._scale, self._tile, self._target),
        )
        return y


def prepare_joint_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    key_mask: torch.Tensor | None = None,
    scale: float | None = None,
    *,
    tile: Tile | None = None,
) -> PreparedAttention:
    """Check what `joint_attention` checks, once for all later calls with tensors like these.

    `ppcl_kernels.prepared.Bound` lists what the caller must then guarantee. There is no gradient.
    """
    scale = max(q.shape[-1], 1) ** -0.5 if scale is None else scale
    _check(q, k, v, key_mask, None, scale)
    tile = Tile.choose(Target.of(q.device), q.dtype, *q.shape) if tile is None else tile
    return PreparedAttention(q, k, key_mask is not None, scale, tile)
