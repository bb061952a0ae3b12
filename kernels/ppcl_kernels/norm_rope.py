"""The epilogue of `qkv_projection` alone, after products by cuBLAS: bias, RMSNorm and RoPE of q and k, joint layout.

B batch, S tokens, h heads kept, H heads of the weights, E head dimension. The kernel reads and writes each element
once. Eager reads and writes q and k six times, and then copies everything to join the streams.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch

from ppcl_kernels._check import check_like, check_shape, wants_gradient
from ppcl_kernels._op import define_op
from ppcl_kernels._triton import jit, tl
from ppcl_kernels.head_norm import Norms, check_norms
from ppcl_kernels.heads import (
    MAX_HEAD_DIM,
    NO_BIASES,
    Biases,
    Raw,
    finish_head,
    head_cols,
    joint_outputs,
    norm_rope_reference,
)
from ppcl_kernels.launch import Launch, Target
from ppcl_kernels.prepared import Bound
from ppcl_kernels.rope import Rope, check_rope, rope_arguments, rope_tables, rope_tensors
from ppcl_kernels.tiles import cheapest, offered

_COUNTS = ("S", "q_first", "kv_first", "q_tokens", "kv_tokens", "heads")


class Tile(NamedTuple):
    """How tokens are divided among thread blocks: tokens of one head for each, and its warps."""

    rows: int
    warps: int

    @property
    def resident(self) -> int:
        """Thread blocks that share a multiprocessor: 1,024 threads together, at up to 64 registers a thread."""
        return 32 // self.warps

    @property
    def cost(self) -> float:
        """Time of one thread block: the tokens that it moves."""
        return self.rows

    @classmethod
    def candidates(cls, target: Target, dtype: torch.dtype) -> tuple[Tile, ...]:
        """Return the tiles worth measuring on a target (`ppcl_kernels.tiles.offered`)."""
        # At E = 128 a thread holds 16 elements: few enough registers for resident thread blocks that hide latency.
        return offered("norm_rope", (cls(16, 4),), target)

    @classmethod
    def choose(cls, target: Target, dtype: torch.dtype, batch: int, tokens: int, heads: int) -> Tile:
        """Pick the tile that is cheapest in waves."""
        tiles = cls.candidates(target, dtype)
        return cheapest("norm_rope", tiles, target, lambda tile: batch * heads * -(-tokens // tile.rows))


@jit()
def _move(raw, arguments, b, row, head, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Read one head of some tokens and finish it; ``arguments`` are those of `finish_head`."""
    _, _, _, _, S, _, _, heads, _, E = arguments
    corner = ((b.to(tl.int64) * S + row) * heads + head) * E
    rows, cols = tl.arange(0, ROWS), tl.arange(0, COLS)
    inside = (row + rows[:, None] < S) & (cols[None, :] < E)
    acc = tl.load(raw + corner + rows[:, None] * (heads * E) + cols[None, :], mask=inside, other=0.0).to(tl.float32)
    finish_head(acc, arguments, (b, row, head, head * E), ROWS, COLS, 1)


# fmt: off
@jit(do_not_specialize=list(_COUNTS))
def _norm_rope_kernel(
    raw_q, raw_k, raw_v, bias_q, bias_k, bias_v, norm_q, norm_k, cos, sin, q, k, v,
    S, q_first, kv_first, q_tokens, kv_tokens, heads, stride_rope_row, stride_rope_pair, eps,
    E: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):
    # fmt: on
    row_tiles = tl.cdiv(S, ROWS)
    b = tl.program_id(0) // row_tiles
    row = tl.program_id(0) % row_tiles * ROWS
    head = tl.program_id(1)
    rope = (cos, sin, stride_rope_row, stride_rope_pair)
    if raw_q is not None:
        _move(raw_q, (bias_q, norm_q, rope, q, S, q_tokens, q_first, heads, eps, E), b, row, head, ROWS, COLS)
    _move(raw_k, (bias_k, norm_k, rope, k, S, kv_tokens, kv_first, heads, eps, E), b, row, head, ROWS, COLS)
    unrotated = (None, None, 0, 0)
    _move(raw_v, (bias_v, None, unrotated, v, S, kv_tokens, kv_first, heads, eps, E), b, row, head, ROWS, COLS)


def launch_norm_rope(
    raw: Raw,
    norms: Norms,
    rope: Rope | None,
    outputs: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    q_first: int,
    kv_first: int,
    eps: float,
    tile: Tile,
    biases: Biases = NO_BIASES,
) -> Launch:
    """Return the launch of one stream; its tokens start at ``q_first`` of joint q, at ``kv_first`` of joint k and v."""
    batch, tokens, heads, head_dim = raw[1].shape
    cos, sin = rope_tables(rope, head_dim)
    arguments: dict[str, Any] = {
        "raw_q": raw[0],
        "raw_k": raw[1],
        "raw_v": raw[2],
        "bias_q": biases[0],
        "bias_k": biases[1],
        "bias_v": biases[2],
        "norm_q": norms[0],
        "norm_k": norms[1],
        "cos": cos,
        "sin": sin,
        "q": outputs[0],
        "k": outputs[1],
        "v": outputs[2],
        "S": tokens,
        "q_first": q_first,
        "kv_first": kv_first,
        "q_tokens": outputs[0].shape[1],
        "kv_tokens": outputs[1].shape[1],
        "heads": heads,
        "stride_rope_row": 0 if cos is None else cos.stride(0),
        "stride_rope_pair": 0 if cos is None else cos.stride(1),
        "eps": eps,
        "E": head_dim,
        "ROWS": tile.rows,
        "COLS": head_cols(head_dim),
    }
    grid = (batch * -(-tokens // tile.rows), heads)
    return Launch(_norm_rope_kernel, grid, arguments, tile.warps, 1)


@define_op(
    "norm_rope",
    "(Tensor?[] q, Tensor[] k, Tensor[] v, Tensor?[] norms, Tensor?[] tables, Tensor?[] biases, float eps) "
    "-> (Tensor, Tensor, Tensor)",
)
def _norm_rope_op(q, k, v, norms, tables, biases, eps):
    _check(q, k, v, norms, tables, biases)
    outputs = _make_room(q, k)
    target = Target.of(k[0].device)
    q_first = kv_first = 0
    for n, (part_q, part_k, part_v) in enumerate(zip(q, k, v, strict=True)):
        rope = None if tables[2 * n] is None else (tables[2 * n], tables[2 * n + 1])
        if part_k.numel():
            norms_of = (norms[2 * n], norms[2 * n + 1])
            tile = Tile.choose(target, part_k.dtype, *part_k.shape[:3])
            biases_of = tuple(biases[3 * n : 3 * n + 3])
            raw = part_q, part_k, part_v
            launch_norm_rope(raw, norms_of, rope, outputs, q_first, kv_first, eps, tile, biases_of).run()
        q_first += 0 if part_q is None else part_k.shape[1]
        kv_first += part_k.shape[1]
    return outputs


def _check(q, k, v, norms, tables, biases) -> None:
    like = k[0]
    if like.dim() != 4 or not 0 < like.shape[3] <= MAX_HEAD_DIM or like.shape[3] % 2:
        raise ValueError(f"k is {list(like.shape)}, wanted [B, S, h, E] with an even E up to {MAX_HEAD_DIM}")
    if all(part is None for part in q):
        raise ValueError("no stream has queries: give q of one")
    for n, parts in enumerate(zip(q, k, v, strict=True)):
        tokens = parts[1].shape[1]
        for name, part in zip("qkv", parts, strict=True):
            if part is not None:
                check_shape(name, part, (like.shape[0], tokens, *like.shape[2:]))
                check_like(like, **{name: part})
                if not part.is_contiguous():
                    raise ValueError(f"{name} has strides {part.stride()}, wanted contiguous: .contiguous()")
        for bias in biases[3 * n : 3 * n + 3]:
            check_like(like, bias=bias)
            if bias is not None and (bias.dim() != 1 or bias.numel() < like.shape[2:].numel()):
                raise ValueError(f"bias is {list(bias.shape)}, wanted [H * E] of at least {like.shape[2:].numel()}")
        check_norms((norms[2 * n], norms[2 * n + 1]), like, like.shape[3])
        rope = None if tables[2 * n] is None else (tables[2 * n], tables[2 * n + 1])
        check_rope(rope, tokens, like.shape[3], like.device)


def _make_room(q, k):
    tokens, asked = [part.shape[1] for part in k], [part is not None for part in q]
    return joint_outputs(k[0], tokens, asked, *k[0].shape[2:])


@_norm_rope_op.register_fake
def _(q, k, v, norms, tables, biases, eps):
    _check(q, k, v, norms, tables, biases)
    return _make_room(q, k)


def _check_counts(raw, norms, ropes, biases) -> None:
    if not len(raw) == len(norms) == len(ropes):
        raise ValueError(
            f"got {len(raw)} streams, {len(norms)} pairs of norms, {len(ropes)} rotations: give one for each stream"
        )
    if biases is not None and len(biases) != len(raw):
        raise ValueError(f"got {len(raw)} streams, biases of {len(biases)}: give those of each stream, or none")


def _flat(raw, norms, ropes, biases) -> tuple[list, list, list, list, list, list]:
    """Turn streams into the flat lists of an op's schema."""
    q, k, v = (list(part) for part in zip(*raw, strict=True))
    tables = [table for rope in ropes for table in rope_tables(rope, k[0].shape[-1])]
    biases = [NO_BIASES] * len(raw) if biases is None else biases
    return q, k, v, [norm for pair in norms for norm in pair], tables, [bias for three in biases for bias in three]


def norm_rope(
    raw: Sequence[Raw],
    norms: Sequence[Norms],
    ropes: Sequence[Rope | None],
    eps: float = 1e-6,
    biases: Sequence[Biases] | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Add biases, normalise and rotate q and k of each stream, and join the streams; one launch for each stream.

    Where a gradient is needed, the reference computes the result.

    Args:
        raw: q, k and v of each stream, ``[B, S, h, E]``, contiguous; q is None for a stream without queries.
        norms: RMSNorm weights of q and k for each stream, ``[E]``, both or neither.
        ropes: rotation of each stream (`ppcl_kernels.rope.Rope`), or None.
        eps: of the norms.
        biases: biases that the products left out, of q, k and v of each stream: ``[H * E]``, of which the first h * E
            elements are used, or None.

    Returns:
        q, k, v in the layout of `ppcl_kernels.qkv_projection`.

    Raises:
        ValueError: wrong device, dtype, shape or stride, or not one pair of norms and one rotation for each stream.
    """
    _check_counts(raw, norms, ropes, biases)
    if wants_gradient(*(t for part in (*raw, *norms, *(biases or ())) for t in part)):
        return norm_rope_reference(raw, norms, ropes, eps, biases)
    return _norm_rope_op(*_flat(raw, norms, ropes, biases), eps)


class PreparedNormRope:
    """Norm and rotation of one stream or more whose shapes and norms are fixed (`prepare_norm_rope`)."""

    def __init__(self, raw: Sequence[Raw], ropes: Sequence[Rope | None], eps: float) -> None:
        self._tokens, self._queries = [k.shape[1] for _, k, _ in raw], [q is not None for q, _, _ in raw]
        self._heads, self._eps = raw[0][1].shape[2:], eps
        names = ("raw_q", "raw_k", "raw_v", "q", "k", "v")
        self.launches = [
            Bound([*((name,) for name in names), *rope_arguments(rope)]) if k.numel() else None
            for (_, k, _), rope in zip(raw, ropes, strict=True)
        ]

    def __call__(
        self,
        raw: Sequence[Raw],
        norms: Sequence[Norms],
        ropes: Sequence[Rope | None],
        biases: Sequence[Biases] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Normalise and rotate tensors of the same shapes, strides and dtypes as those given to preparation."""
        outputs = joint_outputs(raw[0][1], self._tokens, self._queries, *self._heads)
        firsts, biases = [0, 0], [NO_BIASES] * len(raw) if biases is None else biases
        for launch, parts, norm, rope, bias in zip(self.launches, raw, norms, ropes, biases, strict=True):
            if launch is not None:
                describe = partial(self._describe, parts, norm, rope, bias, outputs, *firsts)
                launch((*parts, *outputs, *rope_tensors(rope)), describe)
            firsts[0] += 0 if parts[0] is None else parts[1].shape[1]
            firsts[1] += parts[1].shape[1]
        return outputs

    def _describe(
        self, parts: Raw, norm: Norms, rope: Rope | None, bias: Biases, outputs: Any, q_first: int, kv_first: int
    ) -> Launch:
        tile = Tile.choose(Target.of(parts[1].device), parts[1].dtype, *parts[1].shape[:3])
        return launch_norm_rope(parts, norm, rope, outputs, q_first, kv_first, self._eps, tile, bias)


def prepare_norm_rope(
    raw: Sequence[Raw],
    norms: Sequence[Norms],
    ropes: Sequence[Rope | None],
    eps: float = 1e-6,
    biases: Sequence[Biases] | None = None,
) -> PreparedNormRope:
    """Check what `norm_rope` checks, once for all later calls with the same norms and biases and tensors like these.

    `ppcl_kernels.prepared.Bound` lists what the caller must then guarantee. There is no gradient.
    """
    _check_counts(raw, norms, ropes, biases)
    _check(*_flat(raw, norms, ropes, biases))
    # Raises on a device where kernels cannot run.
    Target.of(raw[0][1].device)
    return PreparedNormRope(raw, ropes, eps)
