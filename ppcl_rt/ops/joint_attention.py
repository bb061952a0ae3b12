"""Attention over text and image: our kernel, cuDNN's or FlashAttention by name, or whatever torch's SDPA prefers."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry, dispatch_attention_fn
from torch.nn.attention import SDPBackend, sdpa_kernel

import ppcl_kernels as kernels
from ppcl_kernels.heads import MAX_HEAD_DIM
from ppcl_kernels.joint_attention import Tile, prepare_joint_attention
from ppcl_kernels.launch import Target
from ppcl_rt.ops.modules import readable
from ppcl_rt.ops.operation import Operation, define_op, flag, form, name_of
from ppcl_rt.ops.table import CUDNN, FLASH, TORCH, Key, Way


class Attention(NamedTuple):
    """q, k and v ``[B, S, H, E]`` of both streams, and a boolean ``[B, S]``, true on keys that count, or None."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    key_mask: torch.Tensor | None = None


class _JointAttention(Operation[Attention, torch.Tensor]):
    name = "joint_attention"

    def like(self, call: Attention) -> torch.Tensor:
        return call.q

    def tensors(self, call: Attention) -> Sequence[torch.Tensor | None]:
        return call[:3]

    def signature(self, call: Attention) -> Hashable:
        return tuple(map(form, call))

    def fits(self, call: Attention) -> bool:
        return call.q.shape[3] <= MAX_HEAD_DIM and all(t.stride(-1) == 1 for t in call[:3])

    def key(self, call: Attention) -> Key:
        batch, tokens, heads, head_dim = call.q.shape
        contiguous = all(t.is_contiguous() for t in call[:3])
        words = (self.name, name_of(call.q.dtype), flag(call.key_mask is not None, "mask"))
        return Key(
            f"{' '.join(words)} {flag(contiguous, 'contiguous')} {head_dim}", (batch, tokens, call.k.shape[1], heads)
        )

    def implementations(self, call: Attention) -> list[Way]:
        q = call.q
        ours = [Way("triton", tuple(t)) for t in Tile.candidates(Target.of(q.device), q.dtype, q.shape[3])]
        if not q.is_cuda or torch.version.hip or q.dtype == torch.float32 or q.shape[3] % 8:
            return [TORCH, *ours]
        flash = [FLASH] if call.key_mask is None else []
        # The fastest by far on Hopper and Blackwell, where torch may prefer another.
        return [CUDNN, TORCH, *flash, *ours] if Target.of(q.device).capability >= 90 else [TORCH, *flash, CUDNN, *ours]

    def run(self, call: Attention, way: Way) -> torch.Tensor:
        if way.kind == "triton":
            return kernels.joint_attention(*call, tile=None if way.tile is None else Tile(*way.tile))
        q, k, v = (t.transpose(1, 2) for t in call[:3])
        if way == CUDNN and call.key_mask is None:
            # The operator itself: the context manager below sets flags of the whole process.
            y = torch.ops.aten._scaled_dot_product_cudnn_attention(q, k, v, None, False)[0]
        elif way == FLASH:
            y = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v)[0]
        else:
            mask = None if call.key_mask is None else call.key_mask[:, None, None, :]
            if way == CUDNN:
                with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
                    y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
            else:
                y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return y.transpose(1, 2)

    def prepare(self, call: Attention, way: Way) -> Callable[[Attention], torch.Tensor]:
        if way.kind != "triton":
            return super().prepare(call, way)
        prepared = prepare_joint_attention(*call, tile=None if way.tile is None else Tile(*way.tile))
        return lambda call: prepared(*call)

    def opaque(self, call: Attention) -> torch.Tensor:
        return _OP(*call)


JOINT_ATTENTION = _JointAttention()


def _run(*arguments: Any) -> torch.Tensor:
    # An op's result has the strides that its fake says.
    return JOINT_ATTENTION(Attention(*arguments)).contiguous()


_OP = define_op(
    "joint_attention",
    "(Tensor q, Tensor k, Tensor v, Tensor? key_mask) -> Tensor",
    _run,
    lambda q, *_: q.new_empty(q.shape),
)


def joint_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, key_mask: torch.Tensor | None, backend: object = None
) -> torch.Tensor:
    """Attend over text and image together.

    Args:
        q, k, v: ``[B, S, H, E]``, both streams.
        key_mask: ``[B, S]``, true on keys that count, or None.
        backend: a diffusers attention backend, None for the one that diffusers' context manager chose, if any, or else
            the fastest implementation.

    Returns:
        ``[B, S, H * E]``.
    """
    if backend is not None or _chosen_by_user() or not readable(q, moving=(k, v)):
        mask = None if key_mask is None else key_mask[:, None, None, :]
        return dispatch_attention_fn(q, k, v, attn_mask=mask, backend=backend).to(q.dtype).flatten(2)
    return JOINT_ATTENTION(Attention(q, k, v, key_mask)).flatten(2)


def _chosen_by_user() -> bool:
    """Whether ``attention_backend(...)`` or ``DIFFUSERS_ATTN_BACKEND`` asks for another than diffusers' default."""
    return _AttentionBackendRegistry._active_backend is not AttentionBackendName.NATIVE
