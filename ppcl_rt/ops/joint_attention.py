"""Attention over text and image together.

Implementations: the kernel `ppcl_kernels.joint_attention`, torch's attention with its cuDNN or FlashAttention backend,
or torch's attention with the backend that torch prefers.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry, dispatch_attention_fn

import ppcl_kernels as kernels
from ppcl_kernels.heads import MAX_HEAD_DIM
from ppcl_kernels.joint_attention import Tile, prepare_joint_attention
from ppcl_kernels.launch import Target
from ppcl_rt.ops.implementation import CUDNN, FLASH, TORCH, Implementation, Key
from ppcl_rt.ops.modules import readable
from ppcl_rt.ops.operation import Operation, define_op, dtype_name, flag, layout_signature


class Attention(NamedTuple):
    """Arguments of `ppcl_kernels.joint_attention`.

    Attributes:
        q, k, v: ``[B, S, H, E]``, the tokens of both streams.
        key_mask: boolean ``[B, S]``, true on keys that are attended to; None for all.
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    key_mask: torch.Tensor | None = None


class _JointAttention(Operation[Attention, torch.Tensor]):
    name = "joint_attention"

    def main_input(self, call: Attention) -> torch.Tensor:
        return call.q

    def tensors(self, call: Attention) -> Sequence[torch.Tensor | None]:
        return call.q, call.k, call.v

    def signature(self, call: Attention) -> Hashable:
        return tuple(map(layout_signature, call))

    def fits(self, call: Attention) -> bool:
        return call.q.shape[3] <= MAX_HEAD_DIM and all(t.stride(-1) == 1 for t in (call.q, call.k, call.v))

    def key(self, call: Attention) -> Key:
        batch, tokens, heads, head_dim = call.q.shape
        words = (
            self.name,
            dtype_name(call.q.dtype),
            flag(call.key_mask is not None, "mask"),
            flag(all(t.is_contiguous() for t in (call.q, call.k, call.v)), "contiguous"),
            str(head_dim),
        )
        return Key(" ".join(words), (batch, tokens, call.k.shape[1], heads))

    def implementations(self, call: Attention) -> list[Implementation]:
        q, target = call.q, Target.of(call.q.device)
        triton = [Implementation("triton", tuple(tile)) for tile in Tile.candidates(target, q.dtype, q.shape[3])]
        if not q.is_cuda or torch.version.hip or q.dtype == torch.float32 or q.shape[3] % 8:
            return [TORCH, *triton]
        # FlashAttention takes no mask.
        flash = [FLASH] if call.key_mask is None else []
        if target.capability >= 90:
            # On Hopper and Blackwell cuDNN is the fastest by far, and torch may prefer another backend.
            return [CUDNN, TORCH, *flash, *triton]
        return [TORCH, *flash, CUDNN, *triton]

    def run(self, call: Attention, implementation: Implementation) -> torch.Tensor:
        if implementation.kind == "triton":
            return kernels.joint_attention(*call, tile=implementation.tile_as(Tile))
        q, k, v = (t.transpose(1, 2) for t in (call.q, call.k, call.v))
        if implementation == CUDNN:
            # Called directly, because torch's context manager for backends sets flags of the whole process.
            y = torch.ops.aten._scaled_dot_product_cudnn_attention(q, k, v, _bias(call), False)[0]
        elif implementation == FLASH:
            y = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v)[0]
        else:
            mask = None if call.key_mask is None else call.key_mask[:, None, None, :]
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return y.transpose(1, 2)

    def prepare(self, call: Attention, implementation: Implementation) -> Callable[[Attention], torch.Tensor]:
        if implementation.kind != "triton":
            return super().prepare(call, implementation)
        prepared = prepare_joint_attention(*call, tile=implementation.tile_as(Tile))
        return lambda call: prepared(*call)

    def run_custom_op(self, call: Attention) -> torch.Tensor:
        return _OP(*call)


JOINT_ATTENTION = _JointAttention()

# What is added to the scores of masked keys: the value that torch passes to cuDNN (2.10), which had a fault with -inf;
# it is the least finite float16.
_MASKED = -65504.0


def _bias(call: Attention) -> torch.Tensor | None:
    """Return a key mask as cuDNN takes it, added to the scores: ``[B, 1, S, T]``, without a copy along S; or None."""
    mask = call.key_mask
    if mask is None:
        return None
    bias = torch.zeros(mask.shape, dtype=call.q.dtype, device=mask.device).masked_fill_(~mask, _MASKED)
    return bias[:, None, None, :].expand(-1, 1, call.q.shape[1], -1)


def _run(*arguments: Any) -> torch.Tensor:
    # The result has to have the strides that the fake of the op promises.
    return JOINT_ATTENTION(Attention(*arguments)).contiguous()


_OP = define_op(
    "joint_attention",
    "(Tensor q, Tensor k, Tensor v, Tensor? key_mask) -> Tensor",
    _run,
    lambda q, *_: q.new_empty(q.shape),
)


def joint_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    key_mask: torch.Tensor | None,
    backend: object = None,
    parallel: object = None,
) -> torch.Tensor:
    """Attend over text and image together.

    Args:
        q, k, v: ``[B, S, H, E]``, the tokens of both streams.
        key_mask: ``[B, S]``, true on keys that are attended to; None for all.
        backend: a diffusers attention backend. None: the one chosen by diffusers' context manager or environment
            variable, if any, else the fastest implementation.
        parallel: how processes share the tokens, as diffusers has it; None where they do not.

    Returns:
        ``[B, S, H * E]``.
    """
    if backend is not None or parallel is not None or _user_chose_backend() or not readable(q, others=(k, v)):
        mask = None if key_mask is None else key_mask[:, None, None, :]
        attended = dispatch_attention_fn(q, k, v, attn_mask=mask, backend=backend, parallel_config=parallel)
        return attended.to(q.dtype).flatten(2)
    return JOINT_ATTENTION(Attention(q, k, v, key_mask)).flatten(2)


def _user_chose_backend() -> bool:
    """Whether ``attention_backend(...)`` or ``DIFFUSERS_ATTN_BACKEND`` asks for another than diffusers' default."""
    return _AttentionBackendRegistry._active_backend is not AttentionBackendName.NATIVE
