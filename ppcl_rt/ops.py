"""The one seam between models and kernels: every operation of a block goes through here, on modules and on counts.

Modules hold their heads and channels in rank order, so a count means a prefix. Today each function calls the
plain-torch reference of `ppcl_kernels`; a faster way to do the same goes in here, and no model changes.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from diffusers.models.attention_dispatch import dispatch_attention_fn
from torch import nn

import ppcl_kernels as kernels


class Streams(NamedTuple):
    """The image and the text half of something; diffusers swaps the order from place to place, this never does."""

    image: torch.Tensor
    text: torch.Tensor


def _is_plain(module: Any) -> bool:
    """Whether a kernel may read the weights: adapters, hooks and quantised tensors are to be called instead."""
    return (
        type(module) is nn.Linear
        and type(module.weight) is nn.Parameter
        and not (module._forward_hooks or module._forward_pre_hooks)
        and not (hasattr(module, "_hf_hook") or hasattr(module, "_diffusers_hook"))
    )


def linear(module: Any, x: torch.Tensor, out_features: int | None = None) -> torch.Tensor:
    """Apply the first ``out_features`` rows of a linear module to ``x [..., k]``, over its first ``k`` columns."""
    if _is_plain(module):
        return kernels.linear_reference(x, module.weight, module.bias, out_features)
    # Correct for whatever wraps a linear layer, and as slow as the full width.
    return module(F.pad(x, (0, module.in_features - x.shape[-1])))[..., :out_features]


def ada_layer_norm(x: torch.Tensor, norm: nn.LayerNorm, scale: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
    """Normalise ``x [B, S, D]`` and modulate it by ``[B, 1 or S, D]``."""
    return kernels.ada_layer_norm_reference(x, scale, shift, norm.eps)


def gated_residual(x: torch.Tensor, gate: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
    """Add ``gate * h`` to the residual stream ``x [B, S, D]``."""
    return kernels.gated_residual_reference(x, gate, h)


class Projection(NamedTuple):
    """The modules that make q, k and v of one stream."""

    q: nn.Module
    k: nn.Module
    v: nn.Module
    norm_q: nn.Module | None
    norm_k: nn.Module | None


def qkv_projection(
    projection: Projection, x: torch.Tensor, rope: torch.Tensor | None, heads: int, head_dim: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Project ``x [B, S, D]`` to q, k, v ``[B, S, heads, head_dim]``, q and k normalised and rotated."""
    q, k, v = (linear(module, x, heads * head_dim).unflatten(-1, (heads, head_dim)) for module in projection[:3])
    q = q if projection.norm_q is None else projection.norm_q(q)
    k = k if projection.norm_k is None else projection.norm_k(k)
    if rope is not None:
        q, k = kernels.apply_rope_reference(q, rope), kernels.apply_rope_reference(k, rope)
    return q, k, v


def joint_attention(
    text: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    image: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    key_mask: torch.Tensor | None,
    backend: object = None,
) -> Streams:
    """Attend over text and image together.

    Args:
        text, image: q, k, v of the stream, ``[B, S, H, E]``.
        key_mask: ``[B, S_text + S_image]``, true on keys that count.
        backend: a diffusers attention backend, None for its default.

    Returns:
        Per stream ``[B, S, H * E]``.
    """
    tokens = text[0].shape[1]
    q, k, v = (torch.cat(pair, dim=1) for pair in zip(text, image, strict=True))
    mask = None if key_mask is None else key_mask[:, None, None, :]
    out = dispatch_attention_fn(q, k, v, attn_mask=mask, backend=backend).flatten(2).to(q.dtype)
    return Streams(image=out[:, tokens:], text=out[:, :tokens])


def mlp(up: nn.Module, down: nn.Module, x: torch.Tensor, channels: int) -> torch.Tensor:
    """Apply the first ``channels`` hidden channels of a tanh-GELU MLP to ``x [..., D]``."""
    return linear(down, F.gelu(linear(up, x, channels), approximate="tanh"))
