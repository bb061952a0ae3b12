"""Queries, keys and values of both streams: one launch of ours, or torch's products and the small kernel after them.

Where q, k and v of a stream lie side by side in memory (`side_by_side`), torch makes all three in one batched product.
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
from ppcl_rt.ops.modules import linear, parameter, readable
from ppcl_rt.ops.operation import Operation, address, define_op, flag, form, name_of, vectors
from ppcl_rt.ops.table import CUBLAS, PACKED, TORCH, Key, Way

Joint = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


class QKV(NamedTuple):
    """Arguments of `ppcl_kernels.qkv_projection`: streams (text first), heads kept, head dim, eps of the norms."""

    streams: tuple[kernels.Stream, ...]
    heads: int
    head_dim: int
    eps: float = 1e-6


class _QKVProjection(Operation[QKV, Joint]):
    name = "qkv_projection"

    def like(self, call: QKV) -> torch.Tensor:
        return call.streams[0].x

    def tensors(self, call: QKV) -> Sequence[torch.Tensor | None]:
        return [t for s in call.streams for t in (s.x, *s.weights, *s.biases, *s.norms)]

    def signature(self, call: QKV) -> Hashable:
        parts: list[Hashable] = [call.heads, call.head_dim, call.eps]
        for s in call.streams:
            parts += [s.queries, form(s.x), address(*s.weights), vectors(*s.biases, *s.norms), _rope_form(s.rope)]
        return tuple(parts)

    def fits(self, call: QKV) -> bool:
        return call.head_dim <= MAX_HEAD_DIM and all(s.x.stride(-1) == 1 for s in call.streams)

    def key(self, call: QKV) -> Key:
        x = call.streams[0].x
        words, sizes = [self.name, name_of(x.dtype)], [x.shape[0]]
        target = Target.of(x.device)
        for s in call.streams:
            words.append(
                "+".join(
                    (
                        flag(s.biases[0] is not None, "bias"),
                        flag(s.norms[0] is not None, "norm"),
                        flag(s.rope is not None, "rope"),
                        flag(s.queries, "queries"),
                        flag(side_by_side(s.weights) is not None, "packed"),
                        flag(takes_tma(target, s.x, *s.weights), "tma"),
                        flag(s.x.is_contiguous(), "contiguous"),
                    )
                )
            )
            sizes.append(s.x.shape[1])
        return Key(f"{' '.join(words)} {call.head_dim}", (*sizes, x.shape[2], call.heads))

    def implementations(self, call: QKV) -> list[Way]:
        x = call.streams[0].x
        tiles = tile_candidates(Target.of(x.device), x.dtype, call.head_dim)
        ours = [Way("triton", tuple(tile)) for tile in tiles]
        if not NormRopeTile.candidates(Target.of(x.device), x.dtype):
            return [*ours, TORCH]
        packed = [PACKED] if all(map(_can_pack, call.streams)) else []
        return [*packed, *ours, CUBLAS, TORCH]

    def run(self, call: QKV, way: Way) -> Joint:
        if way == TORCH:
            return kernels.qkv_projection_reference(*call)
        if way in (CUBLAS, PACKED):
            return kernels.norm_rope(*_raw(call, way))
        return kernels.qkv_projection(*call, tile=None if way.tile is None else Tile(*way.tile))

    def prepare(self, call: QKV, way: Way) -> Callable[[QKV], Joint]:
        if way == TORCH:
            return super().prepare(call, way)
        if way in (CUBLAS, PACKED):
            finish = prepare_norm_rope(*_raw(call, way))

            def run(call: QKV) -> Joint:
                raw, norms, ropes, _, biases = _raw(call, way)
                return finish(raw, norms, ropes, biases)

            return run
        project = prepare_qkv_projection(*call, tile=None if way.tile is None else Tile(*way.tile))
        return lambda call: project(call.streams, call.heads)

    def opaque(self, call: QKV) -> Joint:
        streams, heads, head_dim, eps = call
        return _OP(
            [s.x for s in streams],
            [w for s in streams for w in s.weights],
            [b for s in streams for b in s.biases],
            [n for s in streams for n in s.norms],
            [t for s in streams for t in rope_tables(s.rope, head_dim)],
            [s.queries for s in streams],
            heads,
            head_dim,
            eps,
        )


QKV_PROJECTION = _QKVProjection()


def _rope_form(rope: Any) -> Hashable:
    return tuple(map(form, rope)) if isinstance(rope, tuple) else form(rope)


def side_by_side(parts: Sequence[torch.Tensor | None]) -> torch.Tensor | None:
    """See tensors of one shape that lie at equal steps in one storage as one tensor ``[parts, ...]``, or return None.

    Nothing is copied. What loads or moves a block packs q, k and v so (`pack`); whatever replaces one of them unpacks
    them, and this says so.
    """
    first, *others = parts
    if first is None or any(t is None for t in others):
        return None
    step = others[0].data_ptr() - first.data_ptr()  # type: ignore[union-attr]
    if step < first.numel() * first.itemsize or step % first.itemsize:
        return None
    storage = first.untyped_storage().data_ptr()
    for number, t in enumerate(others, 1):
        assert t is not None
        if (
            t.data_ptr() - first.data_ptr() != number * step
            or t.shape != first.shape
            or t.stride() != first.stride()
            or t.dtype != first.dtype
            or t.untyped_storage().data_ptr() != storage
        ):
            return None
    return first.as_strided((len(parts), *first.shape), (step // first.itemsize, *first.stride()))


def pack(*modules: nn.Module) -> None:
    """Lay the weights of linear modules of one shape side by side in memory, where they are not yet.

    The modules keep their parameters, which become views: names, state dicts, optimizers and adapters see no
    difference. Nothing happens where no kernel could run, or where a module holds anything but plain parameters of one
    shape; those made in inference mode cannot change what they are views of.
    """
    parts: list[Any] = [getattr(module, "weight", None) for module in modules]
    if (
        any(type(p) is not nn.Parameter or not kernels.can_run(p) or p.shape != parts[0].shape for p in parts)
        or any(p.is_inference() for p in parts)
        or len({(p.dtype, p.device) for p in parts}) > 1
        or side_by_side(parts) is not None
    ):
        return
    with torch.inference_mode(False):
        for old, part in zip(parts, torch.stack([p.detach() for p in parts]), strict=True):
            old.data = part


def _can_pack(s: kernels.Stream) -> bool:
    """Whether a stream's three products are one."""
    return s.queries and side_by_side(s.weights) is not None


def _raw(call: QKV, way: Way) -> Any:
    """What torch's products leave for `norm_rope`: q, k and v of each stream, norms, rotations, eps, and biases."""
    product = _one_by_one if way == CUBLAS else _batched
    raw = [product(s, call.heads, call.head_dim) for s in call.streams]
    biases = [s.biases for s in call.streams] if way == PACKED else None
    return raw, [s.norms for s in call.streams], [s.rope for s in call.streams], call.eps, biases


def _one_by_one(s: kernels.Stream, heads: int, head_dim: int) -> Any:
    parts = [
        kernels.linear_reference(s.x, w, b, heads * head_dim).unflatten(-1, (heads, head_dim))
        for w, b in zip(s.weights, s.biases, strict=True)
    ]
    return (parts[0] if s.queries else None, *parts[1:])


def _batched(s: kernels.Stream, heads: int, head_dim: int) -> Any:
    """One product ``[3, B S, D] x [3, D, h E]``; x is read three times, without a copy.

    Without biases, which `norm_rope` adds: ``baddbmm`` would write them to the result first, and read them back.
    """
    x, weight = s.x.flatten(0, 1), side_by_side(s.weights)
    assert weight is not None, "offered where they lie so"
    y = torch.bmm(x.expand(3, *x.shape), weight[:, : heads * head_dim, : x.shape[1]].mT)
    return tuple(y.view(3, *s.x.shape[:2], heads, head_dim))


def _run(x: Any, weights: Any, biases: Any, norms: Any, tables: Any, queries: Any, *rest: Any) -> Joint:
    return QKV_PROJECTION(QKV(tuple(streams_of(x, weights, biases, norms, tables, queries)), *rest))


def _fake(
    x: Any, weights: Any, biases: Any, norms: Any, tables: Any, queries: Any, heads: int, dim: int, _: Any
) -> Joint:
    tokens = [part.shape[1] for part in x]
    asked = sum(count for count, wanted in zip(tokens, queries, strict=True) if wanted)
    q = x[0].new_empty(x[0].shape[0], asked, heads, dim)
    k, v = (x[0].new_empty(x[0].shape[0], sum(tokens), heads, dim) for _ in range(2))
    return q, k, v


_OP = define_op(
    "qkv_projection",
    "(Tensor[] x, Tensor[] weights, Tensor?[] biases, Tensor?[] norms, Tensor?[] tables, bool[] queries, int heads, "
    "int head_dim, float eps) -> (Tensor, Tensor, Tensor)",
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
    """A stream ``x [B, S, D]``, what projects it, and its rotation ``[S, E / 2, 2]`` or None."""

    x: torch.Tensor
    projection: Projection
    rope: torch.Tensor | None


def qkv_projection(streams: Sequence[ProjectedStream], heads: int, head_dim: int) -> Joint:
    """Project streams (text first) to joint q, k, v ``[B, S, heads, head_dim]``, q and k normalised and rotated."""
    modules = [module for s in streams for module in s.projection]
    moving = tuple([s.x for s in streams])
    # One eps for all: norms of different eps are called.
    each = {m.eps for s in streams for m in s.projection[3:] if m is not None}
    if len(each) > 1 or not readable(moving[0], *modules, moving=moving):
        return _through_modules(streams, heads, head_dim)
    eps: Any = each.pop() if each else 1e-6
    return QKV_PROJECTION(QKV(tuple(map(_stream, streams)), heads, head_dim, eps))


def _stream(s: ProjectedStream) -> kernels.Stream:
    q, k, v, norm_q, norm_k = s.projection
    # Of plain modules, past their attributes: each would take half a microsecond.
    of_q, of_k, of_v = q._parameters, k._parameters, v._parameters
    return kernels.Stream(
        s.x,
        (of_q["weight"], of_k["weight"], of_v["weight"]),  # type: ignore[arg-type]
        (of_q["bias"], of_k["bias"], of_v["bias"]),
        (parameter(norm_q, "weight"), parameter(norm_k, "weight")),
        s.rope,
    )


def _through_modules(streams: Sequence[ProjectedStream], heads: int, head_dim: int) -> Joint:
    joint: tuple[list[torch.Tensor], ...] = ([], [], [])
    for s in streams:
        q, k, v = (linear(m, s.x, heads * head_dim).unflatten(-1, (heads, head_dim)) for m in s.projection[:3])
        q = q if s.projection.norm_q is None else s.projection.norm_q(q)
        k = k if s.projection.norm_k is None else s.projection.norm_k(k)
        if s.rope is not None:
            q, k = kernels.apply_rope_reference(q, s.rope), kernels.apply_rope_reference(k, s.rope)
        for parts, part in zip(joint, (q, k, v), strict=True):
            parts.append(part)
    return tuple(torch.cat(parts, dim=1) for parts in joint)  # type: ignore[return-value]
