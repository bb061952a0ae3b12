"""The one seam between models and kernels: every operation of a block goes through here, on modules and on counts.

Modules hold their heads and channels in rank order, so a count means a prefix. Each function knows the ways to run its
operation and lets `ppcl_rt.ways` pick. What no kernel can read (adapters, hooks, quantised weights, gradients,
autocast) goes through the modules themselves, in plain torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.normalization import RMSNorm
from torch import nn

import ppcl_kernels as kernels
from ppcl_kernels.ada_layer_norm import Tile as NormTile
from ppcl_kernels.joint_attention import Tile as AttentionTile
from ppcl_kernels.matmul import Tile
from ppcl_kernels.qkv_projection import MAX_HEAD_DIM, tile_candidates
from ppcl_rt import ways
from ppcl_rt.ways import CUBLAS, TORCH, Way


class Streams(NamedTuple):
    """The image and the text half of something; diffusers swaps the order from place to place, this never does."""

    image: torch.Tensor
    text: torch.Tensor


def _is_plain(module: Any) -> bool:
    """Whether a kernel may read the weights: adapters, hooks and quantised tensors are to be called instead."""
    # Look-ups in dictionaries: this runs for every layer of every forward, and hasattr on a module takes microseconds.
    return (
        type(module) in (nn.Linear, nn.LayerNorm, RMSNorm)
        and not (module._forward_hooks or module._forward_pre_hooks)
        and "_hf_hook" not in module.__dict__
        and "_diffusers_hook" not in module.__dict__
        and type(module._parameters["weight"]) in (nn.Parameter, type(None))
    )


def _kernels_can(x: torch.Tensor, *modules: Any, beside: Sequence[torch.Tensor | None] = ()) -> bool:
    """Whether kernels give what the modules would.

    They do for plain weights, and what is read ``beside`` them, of the dtype of ``x``; without gradient and autocast.
    """
    if not kernels.can_run(x) or torch.is_autocast_enabled(x.device.type):
        return False
    used = [module for module in modules if module is not None]
    if not all(map(_is_plain, used)):
        return False
    read = [x, *beside, *(parameter for module in used for parameter in module._parameters.values())]
    graded = torch.is_grad_enabled()
    return all(t is None or (t.dtype == x.dtype and not (graded and t.requires_grad)) for t in read)


def linear(module: Any, x: torch.Tensor, out_features: int | None = None) -> torch.Tensor:
    """Apply the first ``out_features`` rows of a linear module to ``x [..., k]``, over its first ``k`` columns."""
    if _is_plain(module):
        return kernels.linear_reference(x, module.weight, module.bias, out_features)
    # Correct for whatever wraps a linear layer, and as slow as the full width.
    return module(F.pad(x, (0, module.in_features - x.shape[-1])))[..., :out_features]


def ada_layer_norm(
    x: torch.Tensor, norm: nn.LayerNorm, scale: torch.Tensor, shift: torch.Tensor, index: torch.Tensor | None = None
) -> torch.Tensor:
    """Normalise ``x [B, S, D]`` and modulate it; ``scale`` and ``shift`` as in `ppcl_kernels.modulation`."""

    def call(way: Way) -> torch.Tensor:
        if way == TORCH:
            return kernels.ada_layer_norm_reference(x, scale, shift, index, norm.eps)
        tile = None if way.tile is None else NormTile(*way.tile)
        return kernels.ada_layer_norm(x, scale, shift, index, norm.eps, tile=tile)

    batch, tokens, width = x.shape
    return ways.run(
        "ada_layer_norm",
        x,
        able=lambda: _kernels_can(x, norm, beside=(scale, shift)) and not norm.elementwise_affine,
        shape=lambda: (batch, ways.bucket(tokens), width, index is not None),
        others=(TORCH,),
        tiles=lambda: NormTile.candidates(kernels.Target.of(x.device), x.dtype, width),
        call=call,
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


def qkv_projection(
    streams: Sequence[ProjectedStream], heads: int, head_dim: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Project streams (text first) to joint q, k, v ``[B, S, heads, head_dim]``, q and k normalised and rotated."""
    x = streams[0].x
    eps: float = getattr(streams[0].projection.norm_q, "eps", 1e-6)

    def raw() -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        return [
            tuple(linear(m, s.x, heads * head_dim).unflatten(-1, (heads, head_dim)) for m in s.projection[:3])
            for s in streams
        ]

    def call(way: Way) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        if way == TORCH:
            joint: tuple[list[torch.Tensor], ...] = ([], [], [])
            for s, (q, k, v) in zip(streams, raw(), strict=True):
                q = q if s.projection.norm_q is None else s.projection.norm_q(q)
                k = k if s.projection.norm_k is None else s.projection.norm_k(k)
                if s.rope is not None:
                    q, k = kernels.apply_rope_reference(q, s.rope), kernels.apply_rope_reference(k, s.rope)
                for parts, part in zip(joint, (q, k, v), strict=True):
                    parts.append(part)
            return tuple(torch.cat(parts, dim=1) for parts in joint)  # type: ignore[return-value]
        norms = [tuple(None if m is None else m.weight for m in s.projection[3:]) for s in streams]
        if way == CUBLAS:
            return kernels.norm_rope(raw(), norms, [s.rope for s in streams], eps)  # type: ignore[arg-type]
        return kernels.qkv_projection(
            [
                kernels.Stream(
                    s.x,
                    tuple(m.weight for m in s.projection[:3]),  # type: ignore[arg-type]
                    tuple(m.bias for m in s.projection[:3]),  # type: ignore[arg-type]
                    norm,  # type: ignore[arg-type]
                    s.rope,
                )
                for s, norm in zip(streams, norms, strict=True)
            ],
            heads,
            head_dim,
            eps,
            tile=None if way.tile is None else Tile(*way.tile),
        )

    return ways.run(
        "qkv_projection",
        x,
        able=lambda: (
            head_dim <= MAX_HEAD_DIM
            and all(_kernels_can(s.x, *s.projection) for s in streams)
            and all(m is None or m.eps == eps for s in streams for m in s.projection[3:])
        ),
        shape=lambda: (x.shape[0], *(ways.bucket(s.x.shape[1]) for s in streams), x.shape[2], heads, head_dim),
        others=(CUBLAS, TORCH),
        tiles=lambda: tile_candidates(kernels.Target.of(x.device), x.dtype, head_dim),
        call=call,
    )


def joint_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, key_mask: torch.Tensor | None, backend: object = None
) -> torch.Tensor:
    """Attend over text and image together.

    Args:
        q, k, v: ``[B, S, H, E]``, both streams.
        key_mask: ``[B, S]``, true on keys that count, or None.
        backend: a diffusers attention backend, None for the fastest way.

    Returns:
        ``[B, S, H * E]``.
    """

    def call(way: Way) -> torch.Tensor:
        if way == TORCH:
            mask = None if key_mask is None else key_mask[:, None, None, :]
            return dispatch_attention_fn(q, k, v, attn_mask=mask, backend=backend).to(q.dtype)
        tile = None if way.tile is None else AttentionTile(*way.tile)
        return kernels.joint_attention(q, k, v, key_mask, tile=tile)

    batch, tokens, heads, head_dim = q.shape
    return ways.run(
        "joint_attention",
        q,
        able=lambda: backend is None and head_dim <= MAX_HEAD_DIM and _kernels_can(q, beside=(k, v)),
        shape=lambda: (batch, ways.bucket(tokens), heads, head_dim, key_mask is not None),
        others=(TORCH,),
        tiles=lambda: AttentionTile.candidates(kernels.Target.of(q.device), q.dtype, head_dim),
        call=call,
    ).flatten(2)


class Layer(NamedTuple):
    """A linear module on ``x [B, S, k]``, its first ``out_features`` rows, and what follows the product.

    ``gate`` and ``index`` as in `ppcl_kernels.modulation`, ``residual [B, S, out_features]``.
    """

    module: Any
    x: torch.Tensor
    out_features: int | None = None
    gate: torch.Tensor | None = None
    index: torch.Tensor | None = None  # type: ignore[assignment]  # hides tuple.index, which nobody calls
    residual: torch.Tensor | None = None


def linears(layers: Sequence[Layer], *, gelu: bool = False) -> list[torch.Tensor]:
    """Apply linear layers of both streams, each followed by tanh-GELU, ``* gate`` and ``+ residual`` as asked for."""

    def one(layer: Layer, fused: bool) -> torch.Tensor:
        y = linear(layer.module, layer.x, layer.out_features)
        if gelu:
            y = F.gelu(y, approximate="tanh")
        if layer.gate is None:
            return y if layer.residual is None else layer.residual + y
        if layer.residual is None:
            return kernels.per_token(layer.gate, layer.index) * y
        add = kernels.gated_residual if fused else kernels.gated_residual_reference
        return add(layer.residual, layer.gate, y, layer.index)

    def call(way: Way) -> list[torch.Tensor]:
        if way in (TORCH, CUBLAS):
            return [one(layer, fused=way == CUBLAS) for layer in layers]
        groups = [
            kernels.Linear(
                layer.x,
                layer.module.weight,
                layer.module.bias,
                layer.out_features,
                layer.gate,
                layer.index,
                None if layer.residual is None else layer.residual.contiguous(),
            )
            for layer in layers
        ]
        return kernels.grouped_linear(groups, gelu=gelu, tile=None if way.tile is None else Tile(*way.tile))

    x = layers[0].x
    # Without a gated residual cuBLAS has no kernel to go with it, and is the same as plain torch.
    gated = any(layer.gate is not None and layer.residual is not None for layer in layers)
    return ways.run(
        "linear",
        x,
        able=lambda: all(_kernels_can(each.x, each.module, beside=(each.gate, each.residual)) for each in layers),
        shape=lambda: (
            x.shape[0],
            *(ways.bucket(layer.x.shape[1]) for layer in layers),
            *(layer.x.shape[2] for layer in layers),
            *(layer.out_features or layer.module.out_features for layer in layers),
            "gelu" if gelu else "gate" if gated else "plain",
            layers[0].index is not None,
        ),
        others=(CUBLAS, TORCH) if gated else (TORCH,),
        tiles=lambda: Tile.candidates(kernels.Target.of(x.device), x.dtype),
        call=call,
    )
