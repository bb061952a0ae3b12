"""Queries, keys and values of both streams, for the heads that are kept, in the joint layout that attention reads.

Per stream and head: ``x W^T + b``, then for q and k ``rms_norm(.) * g`` and a rotation of interleaved pairs (RoPE).

B batch, S tokens, D width, H heads of the weights, h heads kept, E head dim. Eager makes three products a stream, reads
and writes q and k twice more for norm and rotation, and copies all three again to join the streams; here one launch of
both streams does it in the epilogue of the product, where one head is one tile.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from ppcl_kernels._check import check_like, check_shape, check_weight, wants_gradient
from ppcl_kernels._op import define_op
from ppcl_kernels._triton import jit, tl
from ppcl_kernels.launch import Launch, Target
from ppcl_kernels.linear import linear_reference
from ppcl_kernels.matmul import Tile, locate_tile, next_start, operand, product_tile, split_columns, takes_tma
from ppcl_kernels.prepared import Bound, suffixes, weak

# One head is one tile.
MAX_HEAD_DIM = 128
Rope = torch.Tensor | tuple[torch.Tensor, torch.Tensor]


class Stream(NamedTuple):
    """What makes q, k and v of one stream.

    Attributes:
        x: ``[B, S, D]``.
        weights: of q, k and v, ``[H * E, D]`` each.
        biases: beside them, ``[H * E]`` or None.
        norms: RMSNorm weights of q and k, ``[E]``, or None for no norm.
        rope: None, ``[S, E / 2, 2]`` (cosine, sine; Qwen-Image's complex table seen as real), or the pair (cosines,
            sines), ``[S, E / 2]`` each, or ``[S, E]`` with every value twice, as FLUX has them. float32.
        queries: False for a stream whose output nobody reads: its keys and values alone.
    """

    x: torch.Tensor
    weights: tuple[torch.Tensor, torch.Tensor, torch.Tensor]
    biases: tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None] = (None, None, None)
    norms: tuple[torch.Tensor | None, torch.Tensor | None] = (None, None)
    rope: Rope | None = None
    queries: bool = True


def rope_tables(rope: Rope | None, head_dim: int) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """See any form of ``rope`` (`Stream`) as cosines and sines of pairs, ``[S, E / 2]``, without a copy."""
    if rope is None:
        return None, None
    if isinstance(rope, torch.Tensor):
        return rope[..., 0], rope[..., 1]
    widths = tuple(table.shape[1] if table.dim() == 2 else None for table in rope)
    if widths not in ((head_dim // 2, head_dim // 2), (head_dim, head_dim)):
        shapes = " and ".join(str(list(table.shape)) for table in rope)
        raise ValueError(f"rope is {shapes}, wanted two of [S, {head_dim // 2}] or [S, {head_dim}]")
    return rope if widths[0] != head_dim else (rope[0][:, ::2], rope[1][:, ::2])


def check_rope(rope: Rope | None, tokens: int, head_dim: int, device: torch.device) -> None:
    """Refuse a rotation that the kernels cannot read.

    Raises:
        ValueError: wrong device, dtype or shape, or cosines and sines of different strides.
    """
    cos, sin = rope_tables(rope, head_dim)
    if cos is None or sin is None:
        return
    for table in (cos, sin):
        check_shape("rope (pairs)", table, (tokens, head_dim // 2))
        if table.device != device or table.dtype != torch.float32:
            raise ValueError(f"rope is {table.dtype} on {table.device}, wanted float32 on {device}")
    if cos.stride() != sin.stride():
        raise ValueError(f"rope's cosines have strides {cos.stride()}, its sines {sin.stride()}: make them alike")


def check_norms(norms: tuple[torch.Tensor | None, torch.Tensor | None], like: torch.Tensor, head_dim: int) -> None:
    """Refuse norms of q and k that the kernels cannot read.

    Raises:
        ValueError: wrong device, dtype or shape, or one of the two without the other.
    """
    check_like(like, norm_q=norms[0], norm_k=norms[1])
    if (norms[0] is None) != (norms[1] is None):
        raise ValueError("q or k alone has a norm: give both or none")
    for norm in norms:
        if norm is not None:
            check_shape("norm", norm, (head_dim,))


def apply_rope_reference(x: torch.Tensor, rope: Rope) -> torch.Tensor:
    """Rotate interleaved pairs of ``x [B, S, H, E]`` by ``rope`` (`Stream`), in float32.

    Real arithmetic on purpose: the complex form does not compile.
    """
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = rope_tables(rope, x.shape[-1])
    assert cos is not None and sin is not None
    cos, sin = cos[:, None], sin[:, None]
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2).to(x.dtype)


def rms_norm_reference(x: torch.Tensor, weight: torch.Tensor | None, eps: float) -> torch.Tensor:
    """Divide by the root mean square over E; the variance in float32, as diffusers does it."""
    if weight is None:
        return x
    normed = x * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + eps)
    return normed.to(weight.dtype) * weight


def norm_rope_reference(
    raw: Sequence[tuple[torch.Tensor | None, torch.Tensor, torch.Tensor]],
    norms: Sequence[tuple[torch.Tensor | None, torch.Tensor | None]],
    ropes: Sequence[Rope | None],
    eps: float = 1e-6,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Normalise and rotate q and k ``[B, S, h, E]`` of each stream, and join the streams; q may be None."""
    joint: list[list[torch.Tensor]] = [[], [], []]
    for (q, k, v), (norm_q, norm_k), rope in zip(raw, norms, ropes, strict=True):
        for out, x, norm in ((joint[0], q, norm_q), (joint[1], k, norm_k)):
            if x is not None:
                x = rms_norm_reference(x, norm, eps)
                out.append(x if rope is None else apply_rope_reference(x, rope))
        joint[2].append(v)
    if not joint[0]:
        raise ValueError("no stream has queries: set queries=True on one")
    return torch.cat(joint[0], 1), torch.cat(joint[1], 1), torch.cat(joint[2], 1)


def qkv_projection_reference(
    streams: Sequence[Stream], heads: int | torch.Tensor, head_dim: int, eps: float = 1e-6
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Project the streams to joint q, k, v ``[B, S, h, E]``, tokens in the order of the streams.

    Args:
        streams: text first, as attention wants it; `Stream` gives the shapes.
        heads: how many, the first in rank order; or which, integers ``[h]``.
        head_dim: E.
        eps: of the norms.
    """
    raw = []
    for stream in streams:
        parts: list[Any] = []
        for part, (weight, bias) in enumerate(zip(stream.weights, stream.biases, strict=True)):
            if part == 0 and not stream.queries:
                parts.append(None)
            elif isinstance(heads, torch.Tensor):
                weight = weight.unflatten(0, (-1, head_dim))[heads].flatten(0, 1)
                bias = None if bias is None else bias.unflatten(0, (-1, head_dim))[heads].flatten()
                parts.append(linear_reference(stream.x, weight, bias).unflatten(-1, (-1, head_dim)))
            else:
                out = linear_reference(stream.x, weight, bias, heads * head_dim)
                parts.append(out.unflatten(-1, (heads, head_dim)))
        raw.append((parts[0], parts[1], parts[2]))
    return norm_rope_reference(raw, [s.norms for s in streams], [s.rope for s in streams], eps)


@jit()
def _finish_columns(
    total, norm, table, place, b, row, head, heads, col, E: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr
):
    """Scale, rotate and write the columns of a head from ``col`` on."""
    cos, sin, rope_row_step, rope_pair_step = table
    out, S, tokens, first = place
    rows = row + tl.arange(0, ROWS)
    cols = col + tl.arange(0, COLS)
    if norm is not None:
        total *= tl.load(norm + cols, mask=cols < E, other=0.0).to(tl.float32)[None, :]
    if cos is not None:
        pairs = col // 2 + tl.arange(0, COLS // 2)
        at = rows[:, None] * rope_row_step + pairs[None, :] * rope_pair_step
        inside = (rows[:, None] < S) & (pairs[None, :] < E // 2)
        c = tl.load(cos + at, mask=inside, other=0.0)
        s = tl.load(sin + at, mask=inside, other=0.0)
        even, odd = total.reshape(ROWS, COLS // 2, 2).split()
        total = tl.join(even * c - odd * s, even * s + odd * c).reshape(ROWS, COLS)
    # 64-bit to the tile, 32-bit within it.
    corner = ((b.to(tl.int64) * tokens + first + row) * heads + head) * E
    offsets = tl.arange(0, ROWS)[:, None] * (heads * E) + cols[None, :]
    tl.store(out + corner + offsets, total.to(out.dtype.element_ty), mask=(rows[:, None] < S) & (cols[None, :] < E))


@jit()
def finish_head(
    total,
    norm,
    table,
    place,
    b,
    row,
    head,
    heads,
    eps,
    E: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    PARTS: tl.constexpr,
):
    """Normalise and rotate one head of some tokens, where it has norm and rotation, and write it to its joint place.

    Args:
        total: ``[ROWS, COLS]``, float32, zero in columns beyond E.
        norm: RMSNorm's weight or None.
        table: (cosines or None, sines, their step a token, their step a pair).
        place: (output, tokens of this stream, tokens a sample of the output, first of this stream among them).
    """
    if norm is not None:
        total *= tl.rsqrt(tl.sum(total * total, axis=1) / E + eps)[:, None]
    PART: tl.constexpr = COLS // PARTS
    if PARTS == 1:
        _finish_columns(total, norm, table, place, b, row, head, heads, 0, E, ROWS, PART)
    else:
        left, right = split_columns(total, ROWS, COLS)
        if PARTS == 2:
            _finish_columns(left, norm, table, place, b, row, head, heads, 0, E, ROWS, PART)
            _finish_columns(right, norm, table, place, b, row, head, heads, PART, E, ROWS, PART)
        else:
            one, two = split_columns(left, ROWS, COLS // 2)
            three, four = split_columns(right, ROWS, COLS // 2)
            _finish_columns(one, norm, table, place, b, row, head, heads, 0, E, ROWS, PART)
            _finish_columns(two, norm, table, place, b, row, head, heads, PART, E, ROWS, PART)
            _finish_columns(three, norm, table, place, b, row, head, heads, 2 * PART, E, ROWS, PART)
            _finish_columns(four, norm, table, place, b, row, head, heads, 3 * PART, E, ROWS, PART)


@jit()
def _work_off(
    start,
    x,
    w,
    bias,
    norm,
    table,
    place,
    sizes,
    steps,
    B,
    heads,
    chosen,
    eps,
    E: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    DEPTH: tl.constexpr,
    PARTS: tl.constexpr,
    TMA: tl.constexpr,
):
    """Work off a program's tiles of the queries, keys or values of one stream; return where it goes on in the next."""
    row_tiles = tl.cdiv(sizes[0], ROWS)
    for tile in range(start, B * row_tiles * heads, tl.num_programs(0)):
        at, head = locate_tile(tile, B * row_tiles, heads, 8)
        b = at // row_tiles
        row = at % row_tiles * ROWS
        col = head * E
        if chosen is not None:
            col = tl.load(chosen + head) * E
        total = product_tile(x, w, (b, row, col), sizes, steps, ROWS, COLS, DEPTH, TMA)
        cols = tl.arange(0, COLS)
        if bias is not None:
            total += tl.load(bias + col + cols, mask=cols < E, other=0.0).to(tl.float32)[None, :]
        if COLS != E:
            # The tile reaches into the next head.
            total = tl.where(cols[None, :] < E, total, 0.0)
        finish_head(total, norm, table, place, b, row, head, heads, eps, E, ROWS, COLS, PARTS)
    return next_start(start, B * row_tiles * heads)


_COUNTS = (
    *(f"{name}{number}" for number in range(2) for name in ("S", "q_first", "kv_first")),
    *("B", "heads", "q_tokens", "kv_tokens"),
)


# Counts of tokens and heads differ from prompt to prompt and plan to plan: none may specialise the kernel. Each of q, k
# and v has a loop of its own: one loop could not choose among descriptors, and a branch in it costs 100 registers.
# fmt: off
@jit(do_not_specialize=list(_COUNTS))
def _qkv_projection_kernel(
    x0, w_q0, w_k0, w_v0, bias_q0, bias_k0, bias_v0, norm_q0, norm_k0, cos0, sin0,
    S0, q_first0, kv_first0, N0, batch_step0, row_step0, w_step0, rope_row_step0, rope_pair_step0,
    x1, w_q1, w_k1, w_v1, bias_q1, bias_k1, bias_v1, norm_q1, norm_k1, cos1, sin1,
    S1, q_first1, kv_first1, N1, batch_step1, row_step1, w_step1, rope_row_step1, rope_pair_step1,
    q, k, v, chosen, B, D, heads, q_tokens, kv_tokens, eps,
    E: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, DEPTH: tl.constexpr, PARTS: tl.constexpr,
    TMA: tl.constexpr, QUERIES0: tl.constexpr, QUERIES1: tl.constexpr,
):
    start = tl.program_id(0)
    flat = (None, None, 0, 0)
    table = (cos0, sin0, rope_row_step0, rope_pair_step0)
    sizes, steps = (S0, N0, D), ((batch_step0, row_step0), w_step0)
    if QUERIES0:
        start = _work_off(
            start, x0, w_q0, bias_q0, norm_q0, table, (q, S0, q_tokens, q_first0), sizes, steps, B, heads, chosen, eps,
            E, ROWS, COLS, DEPTH, PARTS, TMA,
        )
    start = _work_off(
        start, x0, w_k0, bias_k0, norm_k0, table, (k, S0, kv_tokens, kv_first0), sizes, steps, B, heads, chosen, eps,
        E, ROWS, COLS, DEPTH, PARTS, TMA,
    )
    start = _work_off(
        start, x0, w_v0, bias_v0, None, flat, (v, S0, kv_tokens, kv_first0), sizes, steps, B, heads, chosen, eps,
        E, ROWS, COLS, DEPTH, PARTS, TMA,
    )
    if x1 is not None:
        table1 = (cos1, sin1, rope_row_step1, rope_pair_step1)
        sizes1, steps1 = (S1, N1, D), ((batch_step1, row_step1), w_step1)
        if QUERIES1:
            start = _work_off(
                start, x1, w_q1, bias_q1, norm_q1, table1, (q, S1, q_tokens, q_first1), sizes1, steps1, B, heads,
                chosen, eps, E, ROWS, COLS, DEPTH, PARTS, TMA,
            )
        start = _work_off(
            start, x1, w_k1, bias_k1, norm_k1, table1, (k, S1, kv_tokens, kv_first1), sizes1, steps1, B, heads,
            chosen, eps, E, ROWS, COLS, DEPTH, PARTS, TMA,
        )
        _work_off(
            start, x1, w_v1, bias_v1, None, flat, (v, S1, kv_tokens, kv_first1), sizes1, steps1, B, heads,
            chosen, eps, E, ROWS, COLS, DEPTH, PARTS, TMA,
        )
# fmt: on


# fmt: off
_GROUP_ARGUMENTS = (
    "x", "w_q", "w_k", "w_v", "bias_q", "bias_k", "bias_v", "norm_q", "norm_k", "cos", "sin",
    "S", "q_first", "kv_first", "N", "batch_step", "row_step", "w_step", "rope_row_step", "rope_pair_step",
)
# fmt: on


def head_cols(head_dim: int) -> int:
    """Columns of the tile that holds a head: a power of two, and no less than a tensor core takes."""
    return max(16, 1 << (head_dim - 1).bit_length())


def tile_candidates(target: Target, dtype: torch.dtype, head_dim: int) -> tuple[Tile, ...]:
    """Tiles worth measuring, best guess first; none spills (`ppcl_kernels.aot` checks)."""
    cols = head_cols(head_dim)
    if dtype == torch.float32:
        return (Tile(32, cols, 32, 4, 2),)
    if target.amd:
        return (Tile(128, cols, 64, 8, 2), Tile(64, cols, 64, 4, 2))
    parts = 4 if cols >= 64 else 1
    if target.wgmma:
        return (Tile(128, cols, 64, 8, 4, parts), Tile(64, cols, 64, 4, 4, parts, 2))
    if target.tcgen05:
        return (Tile(128, cols, 64, 8, 4, parts), Tile(128, cols, 64, 4, 3, parts, 2))
    return (Tile(128, cols, 64, 8, 3, parts), Tile(64, cols, 64, 4, 3, parts))


def choose_tile(
    target: Target, dtype: torch.dtype, tokens: Sequence[int], batch: int, heads: int, head_dim: int
) -> Tile:
    """Pick the first candidate that gives every multiprocessor a tile, or the one with most tiles."""
    tiles = tile_candidates(target, dtype, head_dim)
    for tile in tiles:
        if 3 * heads * batch * sum(-(-s // tile.rows) for s in tokens) >= target.multiprocessors:
            return tile
    return tiles[-1]


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
    """Describe the launch that writes joint q, k, v (contiguous ``[B, S, h, E]``) of one or two streams."""
    q, k, v = outputs
    tma = takes_tma(target, *(s.x for s in streams), *(w for s in streams for w in s.weights))
    batch, width = streams[0].x.shape[0], streams[0].x.shape[2]
    arguments: dict[str, Any] = {}
    tiles = q_first = kv_first = 0
    for number in range(2):
        values: Sequence[Any] = (None,) * 11 + (0,) * 9
        if number < len(streams):
            s, tokens = streams[number], streams[number].x.shape[1]
            cos, sin = rope_tables(s.rope, head_dim)
            values = (
                operand(s.x, (1, tile.rows, tile.depth), tma),
                *(operand(w[:, :width], (tile.cols, tile.depth), tma) for w in s.weights),
                *s.biases,
                *s.norms,
                cos,
                sin,
                tokens,
                q_first,
                kv_first,
                s.weights[0].shape[0],
                s.x.stride(0),
                s.x.stride(1),
                s.weights[0].stride(0),
                *((0, 0) if cos is None else cos.stride()),
            )
            tiles += batch * -(-tokens // tile.rows) * heads * (3 if s.queries else 2)
            q_first += tokens if s.queries else 0
            kv_first += tokens
        arguments[f"QUERIES{number}"] = number < len(streams) and streams[number].queries
        arguments |= {f"{name}{number}": value for name, value in zip(_GROUP_ARGUMENTS, values, strict=True)}
    arguments |= {
        "q": q,
        "k": k,
        "v": v,
        "chosen": chosen,
        "B": batch,
        "D": width,
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
    }
    grid = (min(tiles, target.multiprocessors * tile.resident),)
    return Launch(_qkv_projection_kernel, grid, arguments, tile.warps, tile.stages, tile.registers)


def joint_outputs(
    like: torch.Tensor, tokens: Sequence[int], queries: Sequence[bool], heads: int, head_dim: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Make room for q (of the streams that have queries), k and v, ``[B, S, h, E]`` each."""
    asked = sum(count for count, wanted in zip(tokens, queries, strict=True) if wanted)
    q = like.new_empty(like.shape[0], asked, heads, head_dim)
    k, v = (like.new_empty(like.shape[0], sum(tokens), heads, head_dim) for _ in range(2))
    return q, k, v


def describe_qkv_projection(
    streams: Sequence[Stream],
    outputs: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    heads: int,
    chosen: torch.Tensor | None,
    head_dim: int,
    eps: float,
    tile: Sequence[int] | None = None,
) -> Launch | None:
    """Describe the launch for streams that were checked, at the tile that suits; None where none has tokens."""
    like, work = streams[0].x, [s for s in streams if s.x.numel()]
    target = Target.of(like.device)
    if not work:
        return None
    if tile is None:
        tile = choose_tile(target, like.dtype, [s.x.shape[1] for s in work], like.shape[0], heads, head_dim)
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
        names = ("q", "k", "v", "bias_q", "bias_k", "bias_v")
        check_like(first, x=s.x, **dict(zip(names, (*s.weights, *s.biases), strict=True)))
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


def _streams(x, weights, biases, norms, tables, queries) -> list[Stream]:
    """Undo what an op's schema, which knows lists alone, does to streams."""
    return [
        Stream(
            part,
            tuple(weights[3 * n : 3 * n + 3]),
            tuple(biases[3 * n : 3 * n + 3]),
            tuple(norms[2 * n : 2 * n + 2]),
            None if tables[2 * n] is None else (tables[2 * n], tables[2 * n + 1]),
            queries[n],
        )
        for n, part in enumerate(x)
    ]


@define_op(
    "qkv_projection",
    "(Tensor[] x, Tensor[] weights, Tensor?[] biases, Tensor?[] norms, Tensor?[] tables, bool[] queries, "
    "int heads, Tensor? chosen, int head_dim, float eps, int[]? tile) -> (Tensor, Tensor, Tensor)",
)
def _qkv_op(x, weights, biases, norms, tables, queries, heads, chosen, head_dim, eps, tile):
    streams = _streams(x, weights, biases, norms, tables, queries)
    check_streams(streams, heads, chosen, head_dim)
    outputs = joint_outputs(x[0], [s.x.shape[1] for s in streams], queries, heads, head_dim)
    launch = describe_qkv_projection(streams, outputs, heads, chosen, head_dim, eps, tile)
    if launch is not None:
        launch.run()
    return outputs


@_qkv_op.register_fake
def _(x, weights, biases, norms, tables, queries, heads, chosen, head_dim, eps, tile):
    check_streams(_streams(x, weights, biases, norms, tables, queries), heads, chosen, head_dim)
    return joint_outputs(x[0], [part.shape[1] for part in x], queries, heads, head_dim)


def qkv_projection(
    streams: Sequence[Stream],
    heads: int | torch.Tensor,
    head_dim: int,
    eps: float = 1e-6,
    *,
    tile: Tile | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Project one or two streams to joint q, k, v in one launch; tokens in the order of the streams.

    Where a gradient is asked for, the reference computes it.

    Args:
        streams: text first, as attention wants it; `Stream` gives the shapes.
        heads: how many, the first in rank order; or which, int32 ``[h]`` on the device.
        head_dim: E, even, up to 128.
        eps: of the norms.
        tile: None to choose by shape and device.

    Returns:
        q ``[B, S of the streams with queries, h, E]``, k and v ``[B, S of all streams, h, E]``; contiguous, in the
        dtype of ``x``.

    Raises:
        ValueError: wrong device, dtype, shape or stride, more heads than the weights hold, or not one or two streams.
            (A list of heads is not read back to be checked.)
    """
    _check_count(streams)
    flat = [t for s in streams for t in (s.x, *s.weights, *s.biases, *s.norms)]
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
        heads if chosen is None else len(chosen),
        chosen,
        head_dim,
        eps,
        tile,
    )


def split_rope(rope: Rope | None) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Return the tensors of a rotation as two, the second (or both) None where there are fewer."""
    return rope if isinstance(rope, tuple) else (rope, None)


def join_rope(first: torch.Tensor | None, second: torch.Tensor | None) -> Rope | None:
    """Undo `split_rope`."""
    return first if first is None or second is None else (first, second)


def rope_arguments(rope: Rope | None, suffix: str = "") -> list[tuple[str, ...]]:
    """Name the arguments of a launch that lie in each of the two tensors of a rotation."""
    names = (f"cos{suffix}", f"sin{suffix}")
    return [names[:1], names[1:]] if isinstance(rope, tuple) else [names, ()]


class PreparedQkvProjection:
    """A projection of one or two streams whose weights, shapes and tile are known (`prepare_qkv_projection`)."""

    def __init__(
        self,
        streams: Sequence[Stream],
        heads: int,
        chosen: torch.Tensor | None,
        head_dim: int,
        eps: float,
        tile: Tile | None,
    ) -> None:
        self._batch, self._heads, self._head_dim = streams[0].x.shape[0], heads, head_dim
        self._asked = sum(s.x.shape[1] for s in streams if s.queries)
        self._tokens = sum(s.x.shape[1] for s in streams)
        self._streams = [weak((s.weights, s.biases, s.norms)) for s in streams]
        self._queries = [s.queries for s in streams]
        self._chosen, self._eps, self._tile = weak(chosen), eps, tile
        numbers = suffixes([s.x for s in streams])
        moving: list[tuple[str, ...]] = [("q",), ("k",), ("v",), *((f"x{n}",) if n else () for n in numbers)]
        for s, n in zip(streams, numbers, strict=True):
            moving += rope_arguments(s.rope, n) if n else [(), ()]
        self.launch = Bound(self._describe, moving) if any(numbers) else None

    def _describe(self, q: Any, k: Any, v: Any, *tensors: Any) -> Launch:
        count, streams = len(self._streams), []
        for n, fixed in enumerate(self._streams):
            weights, biases, norms = fixed()
            rope = join_rope(*tensors[count + 2 * n : count + 2 * n + 2])
            streams.append(Stream(tensors[n], weights, biases, norms, rope, self._queries[n]))
        launch = describe_qkv_projection(
            streams, (q, k, v), self._heads, self._chosen(), self._head_dim, self._eps, self._tile
        )
        assert launch is not None
        return launch

    def __call__(
        self, xs: Sequence[torch.Tensor], ropes: Sequence[Rope | None]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Project other tensors like those of `prepare_qkv_projection`, one entry a stream in each list."""
        x = xs[0]
        q = x.new_empty((self._batch, self._asked, self._heads, self._head_dim))
        size = (self._batch, self._tokens, self._heads, self._head_dim)
        k, v = x.new_empty(size), x.new_empty(size)
        if self.launch is not None:
            self.launch(q, k, v, *xs, *(table for rope in ropes for table in split_rope(rope)))
        return q, k, v


def prepare_qkv_projection(
    streams: Sequence[Stream],
    heads: int | torch.Tensor,
    head_dim: int,
    eps: float = 1e-6,
    *,
    tile: Tile | None = None,
) -> PreparedQkvProjection:
    """Check what `qkv_projection` checks, once for all calls with the same weights and tensors like these.

    `ppcl_kernels.prepared.Bound` says what the caller sees to from then on. No tensor is kept alive; no gradient.
    """
    _check_count(streams)
    chosen = heads if isinstance(heads, torch.Tensor) else None
    count = len(heads) if isinstance(heads, torch.Tensor) else heads
    check_streams(streams, count, chosen, head_dim)
    return PreparedQkvProjection(streams, count, chosen, head_dim, eps, tile)
