"""Attention modules that have to be called: those that others hook (caches of diffusers) or give a processor of theirs.

Blocks compute attention over the heads that a plan keeps and fuse its output layer with what follows. Neither a hook on
the attention module nor a processor would see any of that. Where there is one, blocks call the module as diffusers'
blocks do. A hook then gets the module's arguments and results, at any width; a processor computes over all heads, so
that it runs where none are left out.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

import torch
from diffusers.models.attention_processor import Attention
from torch import nn

from ppcl_rt import ops
from ppcl_rt.messages import say_once
from ppcl_rt.model.block import has_forward_around
from ppcl_rt.model.parallel import check_heads

_log = logging.getLogger(__name__)

Compute = Callable[[], Any]


class CalledAttention(nn.Module):
    """Mixin in front of a diffusers attention class: its forward gives what ``compute`` does, where that is given."""

    def forward(self, *args: Any, compute: Compute | None = None, **kwargs: Any) -> Any:
        """Call ``compute``, whatever the arguments, which are for hooks; without it, as diffusers does."""
        return super().forward(*args, **kwargs) if compute is None else compute()


class PPCLAttention(CalledAttention, Attention):
    """diffusers' `Attention`."""


def must_call(attn: Any, stock_processor: type) -> bool:
    """Whether an attention module has to be called: it has a hook, or a processor that is not the stock one."""
    return (
        type(attn.processor) is not stock_processor
        or bool(attn._forward_hooks or attn._forward_pre_hooks)
        or has_forward_around(attn)
    )


def call_attention(
    attn: Any,
    stock_processor: type,
    compute: Compute,
    arguments: Mapping[str, torch.Tensor],
    more: Callable[[], Mapping[str, Any]],
    narrow: str = "",
) -> Any:
    """Call an attention module that has to be called.

    Args:
        compute: what the stock processor would, over the heads that run; for hooks.
        arguments: hidden states as diffusers' block passes them.
        more: gives what else diffusers' block passes; for processors.
        narrow: what of the attention does not run, empty where all of it does.

    Raises:
        ValueError: there is a processor, and not all of the attention runs.
    """
    if type(attn.processor) is stock_processor:
        return attn(**arguments, compute=compute)
    name = type(attn.processor).__name__
    if narrow:
        raise ValueError(
            f"the attention processor {name} computes over all heads and both streams, the plan {narrow}: "
            f"run at ratio 1, or set_attn_processor({stock_processor.__name__}())"
        )
    if not torch.compiler.is_compiling():
        say_once(
            _log, f"attention calls the processor {name}: slower than set_attention_backend, and never a CUDA graph"
        )
    return attn(**arguments, **more())


def adopt_processor(attn: Any, other: Any, stock_processor: type) -> None:
    """Give an attention module the processor of another's, or the backend of its stock processor.

    Raises:
        ValueError: the processor has weights, which are for the block that has them.
    """
    if type(other.processor) is stock_processor:
        attn.processor._attention_backend = backend_of(other)
        attn.processor._parallel_config = parallel_of(other)
    elif isinstance(other.processor, nn.Module) and next(other.processor.parameters(), None) is not None:
        raise ValueError(
            f"the attention processor {type(other.processor).__name__} has weights for each block, and none for those "
            "that are read now: stay at ratio 1, or unload it first (unload_ip_adapter)"
        )
    else:
        attn.processor = other.processor


def backend_of(attn: Any) -> Any:
    """The attention backend that is set on a module; None for the default, and where a processor knows of none."""
    return getattr(attn.processor, "_attention_backend", None)


def parallel_of(attn: Any) -> Any:
    """How processes share the attention of a module (`ContextParallel`); None where they do not."""
    return getattr(attn.processor, "_parallel_config", None)


def attend(
    attn: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, key_mask: torch.Tensor | None = None
) -> torch.Tensor:
    """`ops.joint_attention` with the backend of a module, and among the processes that share its tokens.

    Raises:
        ValueError: these processes do not divide the heads of ``q [B, S, heads, E]``.
    """
    parallel = parallel_of(attn)
    if parallel is not None:
        check_heads(q.shape[2], parallel)
    return ops.joint_attention(q, k, v, key_mask=key_mask, backend=backend_of(attn), parallel=parallel)
