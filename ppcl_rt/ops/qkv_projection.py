"""Queries, keys and values of both streams, for the first heads in rank order, ready for attention.

Implementations: one launch of `ppcl_kernels.qkv_projection` for both streams; torch's matrix products, one each of q, k
and v or one batched product where their weights lie side by side (`ppcl_rt.ops.packing`), followed by the small kernel
`ppcl_kernels.norm_rope`; plain torch.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

import ppcl_kernels as kernels
from ppcl_kernels.heads import MAX_HEAD_DIM
from ppcl_kernels.launch import Target
from ppcl_kernels.matmul import Tile, takes_tma
from ppcl_kernels.norm_rope import Tile as NormRopeTile
from ppcl_kernels.norm_rope import prepare_norm_rope
from ppcl_kernels.qkv_projection import prepare_qkv_projection, streams_of, tile_candidates
from ppcl_kernels.rope import rope_tables
from ppcl_rt.ops import eager
from ppcl_rt.ops.implementation import CUBLAS, PACKED, TORCH, Implementation, Key, backend
from ppcl_rt.ops.modules import Branch, adapted, linear, parameter, readable
from ppcl_rt.ops.operation import (
    Operation,
    define_op,
    dtype_name,
    flag,
    layout_signature,
    vector_signature,
    weight_signature,
)
from ppcl_rt.ops.packing import side_by_side
from ppcl_rt.ops.stacked import let_go, reads_stacks, stacked

# q, k and v [B, S, heads, E] of all streams, their tokens one stream after the other.
JointQKV = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


class QKV(NamedTuple):
    """Arguments of `ppcl_kernels.qkv_projection`.

    Attributes:
        streams: text first.
        heads: how many heads are computed, the first in rank order.
        head_dim: E.
        eps: of the norms of q and k.
    """

    streams: tuple[kernels.Stream, ...]
    heads: int
    head_dim: int
    eps: float = 1e-6


class _QKVProjection(Operation[QKV, JointQKV]):
    name = "qkv_projection"

    def main_input(self, call: QKV) -> torch.Tensor:
        return call.streams[0].x

    def tensors(self, call: QKV) -> Sequence[torch.Tensor | None]:
        return [t for s in call.streams for t in (s.x, *s.weights, *s.biases, *s.norms, *s.downs, *s.ups)]

    def signature(self, call: QKV) -> Hashable:
        parts: list[Hashable] = [call.heads, call.head_dim, call.eps]
        for s in call.streams:
            parts += [s.queries, layout_signature(s.x), weight_signature(*s.weights)]
            parts += [vector_signature(*s.biases, *s.norms), _rope_signature(s.rope)]
            if s.downs[0] is not None or s.downs[1] is not None or s.downs[2] is not None:
                parts.append(weight_signature(*s.downs, *s.ups))
        return tuple(parts)

    def fits(self, call: QKV) -> bool:
        return call.head_dim <= MAX_HEAD_DIM and all(s.x.stride(-1) == 1 for s in call.streams)

    def key(self, call: QKV) -> Key:
        x = call.streams[0].x
        words, sizes = [self.name, dtype_name(x.dtype)], [x.shape[0]]
        target = Target.of(x.device)
        for s in call.streams:
            flags = {
                "bias": s.biases[0] is not None,
                "norm": s.norms[0] is not None,
                "rope": s.rope is not None,
                "queries": s.queries,
                "packed": side_by_side(s.weights) is not None,
                "tma": takes_tma(target, s.x, *s.weights),
                "contiguous": s.x.is_contiguous(),
            }
            words.append("+".join(flag(on, name) for name, on in flags.items()))
            if s.rank:
                words.append(f"rank {s.rank}")
            sizes.append(s.x.shape[1])
        return Key(f"{' '.join(words)} {call.head_dim}", (*sizes, x.shape[2], call.heads))

    def implementations(self, call: QKV) -> list[Implementation]:
        x = call.streams[0].x
        target = Target.of(x.device)
        rank = max(s.rank for s in call.streams)
        tiles = tile_candidates(target, x.dtype, call.head_dim, rank)
        triton = [Implementation("triton", tuple(tile)) for tile in tiles]
        if not NormRopeTile.candidates(target, x.dtype):
            return [*triton, TORCH]
        # The batched product leaves no room for adapters.
        packed = [PACKED] if not rank and all(map(_can_batch, call.streams)) else []
        return [*packed, *triton, CUBLAS, TORCH]

    def run(self, call: QKV, implementation: Implementation) -> JointQKV:
        in_passes = eager.suits(call.streams[0].x) and not any(s.rank for s in call.streams)
        if implementation == TORCH and in_passes and eager.takes_qkv(*call[:3]):
            return eager.qkv_projection(*call)
        if implementation == TORCH:
            return kernels.qkv_projection_reference(*call)
        if implementation in (CUBLAS, PACKED):
            return kernels.norm_rope(*_norm_rope_arguments(call, implementation))
        return kernels.qkv_projection(*call, tile=implementation.tile_as(Tile))

    def prepare(self, call: QKV, implementation: Implementation) -> Callable[[QKV], JointQKV]:
        if implementation == TORCH:
            return super().prepare(call, implementation)
        if implementation in (CUBLAS, PACKED):
            norm_rope = prepare_norm_rope(*_norm_rope_arguments(call, implementation))

            def run(call: QKV) -> JointQKV:
                products, norms, ropes, _, biases = _norm_rope_arguments(call, implementation)
                return norm_rope(products, norms, ropes, biases)

            return run
        project = prepare_qkv_projection(*call, tile=implementation.tile_as(Tile))
        return lambda call: project(call.streams, call.heads)

    def run_custom_op(self, call: QKV) -> JointQKV:
        streams, heads, head_dim, eps = call
        return _OP(
            [s.x for s in streams],
            [w for s in streams for w in s.weights],
            [b for s in streams for b in s.biases],
            [n for s in streams for n in s.norms],
            [t for s in streams for t in rope_tables(s.rope, head_dim)],
            [s.queries for s in streams],
            [down for s in streams for down in s.downs],
            [up for s in streams for up in s.ups],
            heads,
            head_dim,
            eps,
        )


QKV_PROJECTION = _QKVProjection()


def _rope_signature(rope: Any) -> Hashable:
    return tuple(map(layout_signature, rope)) if isinstance(rope, tuple) else layout_signature(rope)


def _can_batch(s: kernels.Stream) -> bool:
    """Whether one batched product can make q, k and v of a stream."""
    return s.queries and side_by_side(s.weights) is not None


def _norm_rope_arguments(call: QKV, implementation: Implementation) -> Any:
    """Compute the matrix products of each stream with torch.

    Returns:
        The arguments of `ppcl_kernels.norm_rope`: products of each stream, norms, rotations, eps, and the biases that
        the products do not contain yet.
    """
    product = _three_products if implementation == CUBLAS else _batched_product
    products = [product(s, call.heads, call.head_dim) for s in call.streams]
    biases = [s.biases for s in call.streams] if implementation == PACKED else None
    return products, [s.norms for s in call.streams], [s.rope for s in call.streams], call.eps, biases


def _three_products(s: kernels.Stream, heads: int, head_dim: int) -> Any:
    q, k, v = (
        kernels.linear_reference(s.x, w, b, heads * head_dim, down=down, up=up).unflatten(-1, (heads, head_dim))
        for w, b, down, up in zip(s.weights, s.biases, s.downs, s.ups, strict=True)
    )
    return (q if s.queries else None), k, v


def _batched_product(s: kernels.Stream, heads: int, head_dim: int) -> Any:
    """Compute ``[3, B S, D] x [3, D, h E]``, where the first factor is x three times, without a copy.

    Biases are left to `ppcl_kernels.norm_rope`: ``baddbmm`` would write them to the result first, and read them back.
    """
    x, weight = s.x.flatten(0, 1), side_by_side(s.weights)
    assert weight is not None, "the batched product is offered only where the weights lie side by side"
    y = torch.bmm(x.expand(3, *x.shape), weight[:, : heads * head_dim, : x.shape[1]].mT)
    return tuple(y.view(3, *s.x.shape[:2], heads, head_dim))


def _run(*arguments: Any) -> JointQKV:
    return QKV_PROJECTION(QKV(tuple(streams_of(*arguments[:8])), *arguments[8:]))


def _fake(*arguments: Any) -> JointQKV:
    (x, _, _, _, _, queries, _, _), (heads, head_dim, _) = arguments[:8], arguments[8:]
    tokens = [part.shape[1] for part in x]
    query_tokens = sum(count for count, wanted in zip(tokens, queries, strict=True) if wanted)
    q = x[0].new_empty(x[0].shape[0], query_tokens, heads, head_dim)
    k, v = (x[0].new_empty(x[0].shape[0], sum(tokens), heads, head_dim) for _ in range(2))
    return q, k, v


_OP = define_op(
    "qkv_projection",
    "(Tensor[] x, Tensor[] weights, Tensor?[] biases, Tensor?[] norms, Tensor?[] tables, bool[] queries, "
    "Tensor?[] downs, Tensor?[] ups, int heads, int head_dim, float eps) -> (Tensor, Tensor, Tensor)",
    _run,
    _fake,
)


class Projection(NamedTuple):
    """The modules that make q, k and v of one stream."""

    q: nn.Module
    k: nn.Module
    v: nn.Module
    norm_q: nn.Module | None
    norm_k: nn.Module | None


class ProjectedStream(NamedTuple):
    """A stream ``x [B, S, D]``, the modules that project it, and its rotation ``[S, E / 2, 2]`` or None."""

    x: torch.Tensor
    projection: Projection
    rope: torch.Tensor | None


def qkv_projection(streams: Sequence[ProjectedStream], heads: int, head_dim: int) -> JointQKV:
    """Project the streams to q, k and v, and normalise and rotate q and k.

    Args:
        streams: text first.
        heads: how many heads are computed, the first in rank order.
        head_dim: E.

    Returns:
        q, k and v ``[B, S, heads, E]``, the tokens of one stream after those of the other.
    """
    inputs = tuple([s.x for s in streams])
    # The operation has one eps: norms that differ in it are called.
    all_eps = {m.eps for s in streams for m in s.projection[3:] if m is not None}
    if len(all_eps) > 1:
        return _through_modules(streams, heads, head_dim)
    eps: Any = all_eps.pop() if all_eps else 1e-6
    if readable(inputs[0], *[module for s in streams for module in s.projection], others=inputs):
        return QKV_PROJECTION(QKV(tuple(map(_stream, streams)), heads, head_dim, eps))
    in_passes = eager.suits(inputs[0]) and backend() != "triton"
    if in_passes or reads_stacks(inputs[0]):
        bases, branches = zip(*[_apart(s) for s in streams], strict=True)
        added = [t for stream in branches for each in stream for branch in each for t in branch[:2]]
        if readable(inputs[0], *[module for s in bases for module in s.projection], others=(*inputs, *added)):
            call = QKV(tuple(map(_stream, bases)), heads, head_dim, eps)
            if not in_passes and all(factor.dtype == inputs[0].dtype for factor in added):
                return QKV_PROJECTION(call._replace(streams=_with_stacks(call.streams, streams, branches)))
            if in_passes and eager.takes_qkv(*call[:3]):
                return eager.qkv_projection(*call, branches)
    let_go([module for s in streams for module in s.projection[:3]])
    return _through_modules(streams, heads, head_dim)


def _with_stacks(
    bases: Sequence[kernels.Stream],
    streams: Sequence[ProjectedStream],
    branches: Sequence[tuple[tuple[Branch, ...], ...]],
) -> tuple[kernels.Stream, ...]:
    """The streams over layers without adapters, with what adapters add to q, k and v as matrices."""
    pairs = stacked(
        [each for s, added in zip(streams, branches, strict=True) for each in zip(s.projection[:3], added, strict=True)]
    )
    with_adapters = []
    for base, q, k, v in zip(bases, pairs[::3], pairs[1::3], pairs[2::3], strict=True):
        with_adapters.append(base._replace(downs=(q[0], k[0], v[0]), ups=(q[1], k[1], v[1])))
    return tuple(with_adapters)


def _apart(s: ProjectedStream) -> tuple[ProjectedStream, tuple[tuple[Branch, ...], ...]]:
    """The stream over layers without adapters, and what adapters add to q, k and v."""
    q, k, v = map(adapted, s.projection[:3])
    return s._replace(projection=s.projection._replace(q=q[0], k=k[0], v=v[0])), (q[1], k[1], v[1])


def _stream(s: ProjectedStream) -> kernels.Stream:
    q, k, v, norm_q, norm_k = s.projection
    # The modules are plain. Access to their parameters as attributes would take half a microsecond each.
    of_q: dict[str, Any] = q._parameters
    of_k: dict[str, Any] = k._parameters
    of_v: dict[str, Any] = v._parameters
    return kernels.Stream(
        s.x,
        (of_q["weight"], of_k["weight"], of_v["weight"]),
        (of_q["bias"], of_k["bias"], of_v["bias"]),
        (parameter(norm_q, "weight"), parameter(norm_k, "weight")),
        s.rope,
    )


def _through_modules(streams: Sequence[ProjectedStream], heads: int, head_dim: int) -> JointQKV:
    joint: tuple[list[torch.Tensor], list[torch.Tensor], list[torch.Tensor]] = ([], [], [])
    for s in streams:
        q, k, v = (linear(m, s.x, heads * head_dim).unflatten(-1, (heads, head_dim)) for m in s.projection[:3])
        q = q if s.projection.norm_q is None else s.projection.norm_q(q)
        k = k if s.projection.norm_k is None else s.projection.norm_k(k)
        if s.rope is not None:
            q, k = kernels.apply_rope_reference(q, s.rope), kernels.apply_rope_reference(k, s.rope)
        for parts, part in zip(joint, (q, k, v), strict=True):
            parts.append(part)
    q, k, v = (torch.cat(parts, dim=1) for parts in joint)
    return q, k, v
