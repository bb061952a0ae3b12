"""Adaptive LayerNorm: a norm without weights of its own, scaled and shifted by the modulation.

Implementations: the kernel `ppcl_kernels.ada_layer_norm`, or plain torch.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

import ppcl_kernels as kernels
from ppcl_kernels.ada_layer_norm import MAX_WIDTH, Tile, prepare_ada_layer_norm
from ppcl_rt.ops import eager
from ppcl_rt.ops.implementation import TORCH, Implementation, Key
from ppcl_rt.ops.modules import readable
from ppcl_rt.ops.operation import Operation, define_op, dtype_name, flag, layout_signature


class AdaLayerNorm(NamedTuple):
    """Arguments of `ppcl_kernels.ada_layer_norm`.

    Attributes:
        x: ``[B, S, D]``.
        scale: ``[B, D]``, or ``[2 B, D]`` with a ``token_index``.
        shift: as ``scale``.
        token_index: ``[B, S]``, which of two modulations a token takes; None where there is one a sample.
        eps: added to the variance.
    """

    x: torch.Tensor
    scale: torch.Tensor
    shift: torch.Tensor
    token_index: torch.Tensor | None = None
    eps: float = 1e-6


class _AdaLayerNorm(Operation[AdaLayerNorm, torch.Tensor]):
    name = "ada_layer_norm"

    def main_input(self, call: AdaLayerNorm) -> torch.Tensor:
        return call.x

    def tensors(self, call: AdaLayerNorm) -> Sequence[torch.Tensor | None]:
        return call.x, call.scale, call.shift

    def signature(self, call: AdaLayerNorm) -> Hashable:
        return (
            layout_signature(call.x),
            layout_signature(call.scale),
            layout_signature(call.shift),
            layout_signature(call.token_index),
            call.eps,
        )

    def fits(self, call: AdaLayerNorm) -> bool:
        return call.x.shape[-1] <= MAX_WIDTH and call.x.stride(-1) == 1

    def key(self, call: AdaLayerNorm) -> Key:
        words = (self.name, dtype_name(call.x.dtype), flag(call.token_index is not None, "index"))
        return Key(" ".join(words), tuple(call.x.shape))

    def implementations(self, call: AdaLayerNorm) -> list[Implementation]:
        tiles = Tile.candidates(kernels.Target.of(call.x.device), call.x.dtype, call.x.shape[-1])
        return [*(Implementation("triton", tuple(tile)) for tile in tiles), TORCH]

    def run(self, call: AdaLayerNorm, implementation: Implementation) -> torch.Tensor:
        if implementation == TORCH:
            return (eager.ada_layer_norm if eager.suits(call.x) else kernels.ada_layer_norm_reference)(*call)
        return kernels.ada_layer_norm(*call, tile=implementation.tile_as(Tile))

    def prepare(self, call: AdaLayerNorm, implementation: Implementation) -> Callable[[AdaLayerNorm], torch.Tensor]:
        if implementation == TORCH:
            return super().prepare(call, implementation)
        prepared = prepare_ada_layer_norm(*call, tile=implementation.tile_as(Tile))
        # The kernel is bound to eps, the last argument.
        return lambda call: prepared(*call[:4])

    def run_custom_op(self, call: AdaLayerNorm) -> torch.Tensor:
        return _OP(*call)


ADA_LAYER_NORM = _AdaLayerNorm()


def _run(*arguments: Any) -> torch.Tensor:
    return ADA_LAYER_NORM(AdaLayerNorm(*arguments))


_OP = define_op(
    "ada_layer_norm",
    "(Tensor x, Tensor scale, Tensor shift, Tensor? index, float eps) -> Tensor",
    _run,
    lambda x, *_: x.new_empty(x.shape),
)


def ada_layer_norm(
    x: torch.Tensor,
    norm: nn.LayerNorm,
    scale: torch.Tensor,
    shift: torch.Tensor,
    token_index: torch.Tensor | None = None,
) -> torch.Tensor:
    """Normalise ``x [B, S, D]``, scale it by ``1 + scale`` and shift it.

    Args:
        x: ``[B, S, D]``.
        norm: the module; its eps is used. One with weights of its own is called.
        scale: ``[B, D]``, or ``[2 B, D]`` with a ``token_index`` (`ppcl_kernels.modulation`).
        shift: as ``scale``.
        token_index: ``[B, S]``, which of two modulations a token takes, or None.
    """
    call = AdaLayerNorm(x, scale, shift, token_index, norm.eps)
    if norm.elementwise_affine or not readable(x, norm, others=(scale, shift)):
        return norm(x) * (1 + kernels.per_token(scale, token_index)) + kernels.per_token(shift, token_index)
    return ADA_LAYER_NORM(call)
