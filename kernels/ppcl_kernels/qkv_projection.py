"""Queries, keys and values of both streams, for the heads that are kept, in the joint layout that attention reads.

For each stream and head: ``x W^T + b``, with ``(x down^T) up^T`` of an adapter, then for q and k ``rms_norm(.) * g``
and RoPE of interleaved pairs.

B batch, S tokens, D model dimension, H heads of the weights, h heads kept, E head dimension. Eager computes three
products for each stream, reads and writes q and k twice more for norm and rotation, and copies q, k and v to join the
streams. Here one launch for both streams does all of it in the epilogue of the product, where one head is one tile.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from ppcl_kernels._check import check_like, check_shape, check_weight, wants_gradient
from ppcl_kernels._op import define_op
from ppcl_kernels._triton import jit, tl
from ppcl_kernels.head_norm import Norms, check_norms
from ppcl_kernels.heads import MAX_HEAD_DIM, finish_head, head_cols, joint_outputs, norm_rope_reference
from ppcl_kernels.launch import Launch, Target
from ppcl_kernels.linear import adapted_product_reference
from ppcl_kernels.matmul import MOST_RANK, Tile, check_factors, operand, product_tile, takes_tma, work_off
from ppcl_kernels.prepared import Bound, described, suffixes
from ppcl_kernels.rope import Rope, check_rope, rope_arguments, rope_tables, rope_tensors
from ppcl_kernels.tiles import cheapest, offered


class Stream(NamedTuple):
    """Input, weights and rotation of one stream.

    Attributes:
        x: ``[B, S, D]``.
        weights: of q, k and v, ``[H * E, D]`` each.
        biases: of q, k and v, ``[H * E]`` each, or None.
        norms: RMSNorm weights of q and k, ``[E]``, or None for no norm.
        rope: the rotation in any form of `ppcl_kernels.rope.Rope`, or None.
        queries: False for a stream whose output is not read: only its keys and values are computed.
        downs, ups: of q, k and v, the factors ``[R, D]`` and ``[H * E, R]`` of an adapter, or None, as in
            `ppcl_kernels.linear.Linear`.
    """

    x: torch.Tensor
    weights: tuple[torch.Tensor, torch.Tensor, torch.Tensor]
    biases: tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None] = (None, None, None)
    norms: Norms = (None, None)
    rope: Rope | None = None
    queries: bool = True
    downs: tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None] = (None, None, None)
    ups: tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None] = (None, None, None)

    @property
    def rank(self) -> int:
        """R, 0 without adapters."""
        return max([len(down) for down in self.downs if down is not None], default=0)


def qkv_projection_reference(
    streams: Sequence[Stream], heads: int | torch.Tensor, head_dim: int, eps: float = 1e-6
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Project the streams to joint q, k, v ``[B, S, h, E]``, with tokens in the order of the streams.

    Args:
        streams: text first, as in attention; `Stream` gives the shapes.
        heads: the number of heads, the first in rank order; or a tensor of head numbers ``[h]``.
        head_dim: E.
        eps: of the norms.
    """
    raw = []
    for stream in streams:
        dim = stream.x.shape[-1]
        parts: list[Any] = []
        for weight, bias, down, up in zip(stream.weights, stream.biases, stream.downs, stream.ups, strict=True):
            if not parts and not stream.queries:
                parts.append(None)
                continue
            # Slices are views: the other heads are neither read nor multiplied.
            rows = weight[:, :dim].unflatten(0, (-1, head_dim))
            biases = None if bias is None else bias.unflatten(0, (-1, head_dim))
            ups = None if up is None else up.unflatten(0, (-1, head_dim))
            if isinstance(heads, torch.Tensor):
                rows, biases = rows[heads], None if biases is None else biases[heads]
                ups = None if ups is None else ups[heads]
            elif heads > len(rows):
                raise ValueError(f"wanted {heads} heads of {head_dim}, the weight holds {len(rows)}")
            else:
                rows, biases = rows[:heads], None if biases is None else biases[:heads]
            out = adapted_product_reference(
                *(stream.x, rows.flatten(0, 1), None if biases is None else biases.flatten()),
                *(len(rows) * head_dim, down, None if ups is None else ups.flatten(0, 1)),
            )
            parts.append(out.unflatten(-1, (-1, head_dim)))
        raw.append((parts[0], parts[1], parts[2]))
    return norm_rope_reference(raw, [s.norms for s in streams], [s.rope for s in streams], eps)


_COUNTS = (
    *(f"{name}{number}" for number in range(2) for name in ("S", "q_first", "kv_first")),
    *("B", "heads", "q_tokens", "kv_tokens"),
)


# Counts of tokens and heads change with the prompt and the plan, so the kernel must not be specialised on any of them.
# q, k and v have separate loops: one loop cannot choose among descriptors, and a branch in it costs 100 registers.
# fmt: off
@jit(do_not_specialize=list(_COUNTS))
def _qkv_projection_kernel(
    x0, w_q0, w_k0, w_v0, bias_q0, bias_k0, bias_v0, norm_q0, norm_k0, cos0, sin0, S0, q_first0, kv_first0, N0,
    stride_x_batch0, stride_x_row0, stride_w_row0, stride_rope_row0, stride_rope_pair0,
    down_q0, down_k0, down_v0, up_q0, up_k0, up_v0, stride_down_row0,
    x1, w_q1, w_k1, w_v1, bias_q1, bias_k1, bias_v1, norm_q1, norm_k1, cos1, sin1, S1, q_first1, kv_first1, N1,
    stride_x_batch1, stride_x_row1, stride_w_row1, stride_rope_row1, stride_rope_pair1,
    down_q1, down_k1, down_v1, up_q1, up_k1, up_v1, stride_down_row1,
    q, k, v, chosen, B, D, heads, q_tokens, kv_tokens, eps,
    E: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, DEPTH: tl.constexpr, PARTS: tl.constexpr,
    TMA: tl.constexpr, QUERIES0: tl.constexpr, QUERIES1: tl.constexpr, RANK: tl.constexpr,
):
    start = tl.program_id(0)
    unrotated = (None, None, 0, 0)
    rope = (cos0, sin0, stride_rope_row0, stride_rope_pair0)
    sizes, strides = (S0, N0, D), ((stride_x_batch0, stride_x_row0), stride_w_row0)
    if QUERIES0:
        start = work_off(
            start, x0, w_q0, (down_q0, up_q0, stride_down_row0), sizes, strides, B, heads, chosen,
            product_tile, finish_head,
            (bias_q0, norm_q0, rope, q, S0, q_tokens, q_first0, heads, eps, E),
            E, ROWS, COLS, DEPTH, PARTS, False, TMA, RANK,
        )
    start = work_off(
        start, x0, w_k0, (down_k0, up_k0, stride_down_row0), sizes, strides, B, heads, chosen,
        product_tile, finish_head,
        (bias_k0, norm_k0, rope, k, S0, kv_tokens, kv_first0, heads, eps, E),
        E, ROWS, COLS, DEPTH, PARTS, False, TMA, RANK,
    )
    start = work_off(
        start, x0, w_v0, (down_v0, up_v0, stride_down_row0), sizes, strides, B, heads, chosen,
        product_tile, finish_head,
        (bias_v0, None, unrotated, v, S0, kv_tokens, kv_first0, heads, eps, E),
        E, ROWS, COLS, DEPTH, PARTS, False, TMA, RANK,
    )
    if x1 is not None:
        rope1 = (cos1, sin1, stride_rope_row1, stride_rope_pair1)
        sizes1, strides1 = (S1, N1, D), ((stride_x_batch1, stride_x_row1), stride_w_row1)
        if QUERIES1:
            start = work_off(
                start, x1, w_q1, (down_q1, up_q1, stride_down_row1), sizes1, strides1, B, heads, chosen,
                product_tile, finish_head,
                (bias_q1, norm_q1, rope1, q, S1, q_tokens, q_first1, heads, eps, E),
                E, ROWS, COLS, DEPTH, PARTS, False, TMA, RANK,
            )
        start = work_off(
            start, x1, w_k1, (down_k1, up_k1, stride_down_row1), sizes1, strides1, B, heads, chosen,
            product_tile, finish_head,
            (bias_k1, norm_k1, rope1, k, S1, kv_tokens, kv_first1, heads, eps, E),
            E, ROWS, COLS, DEPTH, PARTS, False, TMA, RANK,
        )
        work_off(
            start, x1, w_v1, (down_v1, up_v1, stride_down_row1), sizes1, strides1, B, heads, chosen,
            product_tile, finish_head,
            (bias_v1, None, unrotated, v, S1, kv_tokens, kv_first1, heads, eps, E),
            E, ROWS, COLS, DEPTH, PARTS, False, TMA, RANK,
        )


_STREAM_ARGUMENTS = (
    "x", "w_q", "w_k", "w_v", "bias_q", "bias_k", "bias_v", "norm_q", "norm_k", "cos", "sin",
    "S", "q_first", "kv_first", "N",
    "stride_x_batch", "stride_x_row", "stride_w_row", "stride_rope_row", "stride_rope_pair",
    "down_q", "down_k", "down_v", "up_q", "up_k", "up_v", "stride_down_row",
)
# fmt: on


def tile_candidates(target: Target, dtype: torch.dtype, head_dim: int, rank: int = 0) -> tuple[Tile, ...]:
    """Return the tiles worth measuring on a target, best guess first; ``rank`` is that of adapters, 0 for none."""
    cols = head_cols(head_dim)
    parts = 4 if cols >= 64 else 1
    tiles: tuple[Tile, ...]
    if rank > MOST_RANK:
        return ()
    if dtype == torch.float32:
        tiles = (Tile(32, cols, 32, 4, 2),)
    elif target.amd:
        tiles = (Tile(128, cols, 64, 8, 2), Tile(64, cols, 64, 4, 2))
    elif target.wgmma:
        tiles = (Tile(128, cols, 64, 8, 4, parts), Tile(64, cols, 64, 4, 4, parts, 2))
    elif target.tcgen05:
        # 64 columns in four parts at 8 warps, and 128 rows at 4 warps, spill 8 bytes in some of the forms.
        tiles = (Tile(128, cols, 64, 8, 4, max(1, min(parts, cols // 32))), Tile(64, cols, 64, 4, 3, parts, 2))
    else:
        # 64 columns at 8 warps spill 16 bytes on sm_120.
        tiles = (Tile(128, cols, 64, 8 if cols > 64 else 4, 3, parts), Tile(64, cols, 64, 4, 3, parts))
    rank = rank if target.tma else 0
    return offered("qkv_projection", tiles, target, lambda tile: tile.shared_bytes(dtype.itemsize, rank))


def choose_tile(
    target: Target, dtype: torch.dtype, tokens: Sequence[int], batch: int, heads: int, head_dim: int, rank: int = 0
) -> Tile:
    """Pick the tile that is cheapest in waves, given the tokens of each stream; all streams have queries."""

    def blocks(tile: Tile) -> int:
        return 3 * heads * batch * sum(-(-s // tile.rows) for s in tokens)

    return cheapest("qkv_projection", tile_candidates(target, dtype, head_dim, rank), target, blocks)


def _stream_values(
    stream: Stream, q_first: int, kv_first: int, head_dim: int, tile: Tile, tma: bool, rank: int
) -> tuple[Any, ...]:
    """Return the values of `_STREAM_ARGUMENTS` for a stream; its tokens start at ``q_first`` and ``kv_first``."""
    x, weights = stream.x, stream.weights
    cos, sin = rope_tables(stream.rope, head_dim)
    return (
        operand(x, (1, tile.rows, tile.depth), tma),
        *(operand(w[:, : x.shape[2]], (tile.cols, tile.depth), tma) for w in weights),
        *stream.biases,
        *stream.norms,
        cos,
        sin,
        x.shape[1],
        q_first,
        kv_first,
        weights[0].shape[0],
        x.stride(0),
        x.stride(1),
        weights[0].stride(0),
        *((0, 0) if cos is None else cos.stride()),
        *(None if down is None else operand(down[:, : x.shape[2]], (rank, tile.depth), tma) for down in stream.downs),
        *(None if up is None else operand(up, (tile.cols, rank), tma) for up in stream.ups),
        next((down.stride(0) for down in stream.downs if down is not None), None),
    )


def launch_qkv_projection(
    streams: Sequence[Stream],
    outputs: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    heads: int,
    chosen: torch.Tensor | None,
    head_dim: int,
    eps: float,
    tile: Tile,
    target: Target,
) -> Launch:
    """Return the launch that writes joint q, k, v (contiguous ``[B, S, h, E]``) of one or two streams."""
    q, k, v = outputs
    factors = [factor for s in streams for factor in (*s.downs, *s.ups) if factor is not None]
    tma = takes_tma(target, *(s.x for s in streams), *(w for s in streams for w in s.weights), *factors)
    rank = max(s.rank for s in streams)
    batch, dim = streams[0].x.shape[0], streams[0].x.shape[2]
    arguments: dict[str, Any] = {}
    tiles = q_first = kv_first = 0
    for number in range(2):
        values: Sequence[Any] = (None,) * 11 + (0,) * 9 + (None,) * 7
        if number < len(streams):
            s, tokens = streams[number], streams[number].x.shape[1]
            values = _stream_values(s, q_first, kv_first, head_dim, tile, tma, rank)
            tiles += batch * -(-tokens // tile.rows) * heads * (3 if s.queries else 2)
            q_first += tokens if s.queries else 0
            kv_first += tokens
        arguments[f"QUERIES{number}"] = number < len(streams) and streams[number].queries
        arguments |= {f"{name}{number}": value for name, value in zip(_STREAM_ARGUMENTS, values, strict=True)}
    arguments |= {
        "q": q,
        "k": k,
        "v": v,
        "chosen": chosen,
        "B": batch,
        "D": dim,
        "heads": heads,
        "q_tokens": q.shape[1],
        "kv_tokens": k.shape[1],
        "eps": eps,
        "E": head_dim,
        "ROWS": tile.rows,
        "COLS": tile.cols,
        "DEPTH": tile.depth,
        "PARTS": tile.parts,
        "TMA": tma,
        "RANK": rank,
    }
    grid = (min(tiles, target.multiprocessors * tile.resident),)
    return Launch(_qkv_projection_kernel, grid, arguments, tile.warps, tile.stages, tile.registers)


def describe_qkv_projection(
    streams: Sequence[Stream],
    outputs: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    heads: int,
    chosen: torch.Tensor | None,
    head_dim: int,
    eps: float,
    tile: Sequence[int] | None = None,
) -> Launch | None:
    """Return the launch of streams that were checked, by default at the cheapest tile; None if no stream has tokens."""
    like, work = streams[0].x, [s for s in streams if s.x.numel()]
    target = Target.of(like.device)
    if not work:
        return None
    if tile is None:
        rank = max(s.rank for s in work)
        tile = choose_tile(target, like.dtype, [s.x.shape[1] for s in work], like.shape[0], heads, head_dim, rank)
    return launch_qkv_projection(work, outputs, heads, chosen, head_dim, eps, Tile(*tile), target)


def check_streams(streams: Sequence[Stream], heads: int, chosen: torch.Tensor | None, head_dim: int) -> None:
    """Refuse streams that the kernel cannot project.

    Raises:
        ValueError: wrong device, dtype, shape or stride, or more heads than the weights hold.
    """
    if not 0 < head_dim <= MAX_HEAD_DIM or head_dim % 2:
        raise ValueError(f"head_dim is {head_dim}, wanted an even number up to {MAX_HEAD_DIM}")
    if heads < 1:
        raise ValueError(f"heads is {heads}, wanted at least 1")
    if not any(stream.queries for stream in streams):
        raise ValueError("no stream has queries: set queries=True on one")
    first = streams[0].x
    for s in streams:
        if s.x.dim() != 3 or s.x.shape[0] != first.shape[0] or s.x.shape[2] != first.shape[2]:
            raise ValueError(f"x is {list(s.x.shape)}, wanted [B, S, D] with the same B and D in every stream")
        names = [f"{what}{which}" for what in ("", "bias_", "down_", "up_") for which in "qkv"]
        check_like(first, x=s.x, **dict(zip(names, (*s.weights, *s.biases, *s.downs, *s.ups), strict=True)))
        # A list may name any head that the weights hold.
        rows = s.weights[0].shape[0] if s.weights[0].dim() else 0
        check_factors(rows, first.shape[2], max(each.rank for each in streams), s.downs, s.ups)
        for weight, bias in zip(s.weights, s.biases, strict=True):
            check_weight("a weight", weight)
            if weight.shape[1] < first.shape[2] or weight.shape != s.weights[0].shape:
                raise ValueError(f"a weight is {list(weight.shape)}, wanted [H * E, {first.shape[2]}] for q, k and v")
            if weight.stride(0) != s.weights[0].stride(0):
                raise ValueError("the weights of q, k and v differ in stride: .contiguous()")
            if heads * head_dim > weight.shape[0]:
                raise ValueError(f"wanted {heads} heads of {head_dim}, the weight holds {weight.shape[0] // head_dim}")
            if bias is not None:
                check_shape("bias", bias, weight.shape[:1])
        check_norms(s.norms, first, head_dim)
        check_rope(s.rope, s.x.shape[1], head_dim, first.device)
    if chosen is not None and (chosen.dim() != 1 or chosen.dtype != torch.int32 or chosen.device != first.device):
        raise ValueError(f"heads is {chosen.dtype} {list(chosen.shape)} on {chosen.device}, wanted int32 [h] as x")


def _check_count(streams: Sequence[Stream]) -> None:
    if len(streams) not in (1, 2):
        raise ValueError(f"one launch takes one or two streams, got {len(streams)}")


def streams_of(x, weights, biases, norms, tables, queries, downs, ups) -> list[Stream]:
    """Make streams of the flat lists of an op's schema."""
    return [
        Stream(
            part,
            tuple(weights[3 * n : 3 * n + 3]),
            tuple(biases[3 * n : 3 * n + 3]),
            tuple(norms[2 * n : 2 * n + 2]),
            None if tables[2 * n] is None else (tables[2 * n], tables[2 * n + 1]),
            queries[n],
            tuple(downs[3 * n : 3 * n + 3]),
            tuple(ups[3 * n : 3 * n + 3]),
        )
        for n, part in enumerate(x)
    ]


@define_op(
    "qkv_projection",
    "(Tensor[] x, Tensor[] weights, Tensor?[] biases, Tensor?[] norms, Tensor?[] tables, bool[] queries, "
    "Tensor?[] downs, Tensor?[] ups, int heads, Tensor? chosen, int head_dim, float eps, int[]? tile) "
    "-> (Tensor, Tensor, Tensor)",
)
def _qkv_op(x, weights, biases, norms, tables, queries, downs, ups, heads, chosen, head_dim, eps, tile):
    streams = streams_of(x, weights, biases, norms, tables, queries, downs, ups)
    check_streams(streams, heads, chosen, head_dim)
    outputs = joint_outputs(x[0], [s.x.shape[1] for s in streams], queries, heads, head_dim)
    launch = describe_qkv_projection(streams, outputs, heads, chosen, head_dim, eps, tile)
    if launch is not None:
        launch.run()
    return outputs


@_qkv_op.register_fake
def _(x, weights, biases, norms, tables, queries, downs, ups, heads, chosen, head_dim, eps, tile):
    check_streams(streams_of(x, weights, biases, norms, tables, queries, downs, ups), heads, chosen, head_dim)
    return joint_outputs(x[0], [part.shape[1] for part in x], queries, heads, head_dim)


def qkv_projection(
    streams: Sequence[Stream],
    heads: int | torch.Tensor,
    head_dim: int,
    eps: float = 1e-6,
    *,
    tile: Tile | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Project one or two streams to joint q, k, v in one launch, with tokens in the order of the streams.

    Where a gradient is needed, the reference computes the result.

    Args:
        streams: text first, as in attention; `Stream` gives the shapes.
        heads: the number of heads, the first in rank order; or head numbers, int32 ``[h]`` on the device.
        head_dim: E, even, up to 128.
        eps: of the norms.
        tile: None to choose by shape and device.

    Returns:
        q ``[B, S of the streams with queries, h, E]``, k and v ``[B, S of all streams, h, E]``; contiguous, in the
        dtype of ``x``.

    Raises:
        ValueError: wrong device, dtype, shape or stride, more heads than the weights hold, or not one or two streams.
            Head numbers are not checked, since that would wait for the device.
    """
    _check_count(streams)
    flat = [t for s in streams for t in (s.x, *s.weights, *s.biases, *s.norms, *s.downs, *s.ups)]
    if wants_gradient(*flat):
        return qkv_projection_reference(streams, heads, head_dim, eps)
    chosen = heads if isinstance(heads, torch.Tensor) else None
    return _qkv_op(
        [s.x for s in streams],
        [w for s in streams for w in s.weights],
        [bias for s in streams for bias in s.biases],
        [norm for s in streams for norm in s.norms],
        [table for s in streams for table in rope_tables(s.rope, head_dim)],
        [s.queries for s in streams],
        [down for s in streams for down in s.downs],
        [up for s in streams for up in s.ups],
        heads if chosen is None else len(chosen),
        chosen,
        head_dim,
        eps,
        tile,
    )


class PreparedQkvProjection:
    """A projection of one or two streams whose weights, shapes and tile are fixed (`prepare_qkv_projection`)."""

    def __init__(
        self,
        streams: Sequence[Stream],
        heads: int,
        head_dim: int,
        eps: float,
        tile: Tile | None,
    ) -> None:
        batch = streams[0].x.shape[0]
        self._asked = (batch, sum(s.x.shape[1] for s in streams if s.queries), heads, head_dim)
        self._all = (batch, sum(s.x.shape[1] for s in streams), heads, head_dim)
        self._eps, self._tile = eps, tile
        numbers = suffixes([s.x for s in streams])
        moving: list[tuple[str, ...]] = [("q",), ("k",), ("v",), ("chosen",)]
        for s, n in zip(streams, numbers, strict=True):
            moving += [(f"x{n}",), *rope_arguments(s.rope, n)] if n else [(), (), ()]
        self.launch = Bound(moving) if any(numbers) else None

    def __call__(
        self, streams: Sequence[Stream], heads: int | torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Project tensors of the same shapes, strides and dtypes as those given to preparation."""
        x, chosen = streams[0].x, heads if isinstance(heads, torch.Tensor) else None
        k = x.new_empty(self._all)
        # `empty_like` takes half the time of `new_empty`.
        outputs = torch.empty_like(k) if self._asked == self._all else x.new_empty(self._asked), k, torch.empty_like(k)
        if self.launch is not None:
            tensors = [*outputs, chosen]
            for s in streams:
                tensors += [s.x, *rope_tensors(s.rope)]
            _, _, count, head_dim = self._all
            self.launch(
                tuple(tensors),
                lambda: described(
                    describe_qkv_projection(streams, outputs, count, chosen, head_dim, self._eps, self._tile)
                ),
            )
        return outputs


def prepare_qkv_projection(
    streams: Sequence[Stream],
    heads: int | torch.Tensor,
    head_dim: int,
    eps: float = 1e-6,
    *,
    tile: Tile | None = None,
) -> PreparedQkvProjection:
    """Check what `qkv_projection` checks, once for all later calls with the same weights and tensors like these.

    `ppcl_kernels.prepared.Bound` lists what the caller must then guarantee. There is no gradient.
    """
    _check_count(streams)
    chosen = heads if isinstance(heads, torch.Tensor) else None
    count = len(heads) if isinstance(heads, torch.Tensor) else heads
    check_streams(streams, count, chosen, head_dim)
    return PreparedQkvProjection(streams, count, head_dim, eps, tile)
