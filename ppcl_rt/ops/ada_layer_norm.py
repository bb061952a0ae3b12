"""Adaptive LayerNorm: `ppcl_kernels.ada_layer_norm`, or plain torch."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

import ppcl_kernels as kernels
from ppcl_kernels.ada_layer_norm import MAX_WIDTH, Tile, prepare_ada_layer_norm
from ppcl_rt.ops.modules import readable
from ppcl_rt.ops.operation import Operation, define_op, flag, form, name_of
from ppcl_rt.ops.table import TORCH, Key, Way


class AdaLayerNorm(NamedTuple):
    """Arguments of `ppcl_kernels.ada_layer_norm`."""

    x: torch.Tensor
    scale: torch.Tensor
    shift: torch.Tensor
    index: torch.Tensor | None = None  # type: ignore[assignment]  # hides tuple.index, which nobody calls
    eps: float = 1e-6


class _AdaLayerNorm(Operation[AdaLayerNorm, torch.Tensor]):
    name = "ada_layer_norm"

    def like(self, call: AdaLayerNorm) -> torch.Tensor:
        return call.x

    def tensors(self, call: AdaLayerNorm) -> Sequence[torch.Tensor | None]:
        return call[:3]

    def signature(self, call: AdaLayerNorm) -> Hashable:
        return form(call.x), form(call.scale), form(call.shift), form(call.index), call.eps

    def fits(self, call: AdaLayerNorm) -> bool:
        return call.x.shape[-1] <= MAX_WIDTH and call.x.stride(-1) == 1

    def key(self, call: AdaLayerNorm) -> Key:
        words = (self.name, name_of(call.x.dtype), flag(call.index is not None, "index"))
        return Key(" ".join(words), tuple(call.x.shape))

    def implementations(self, call: AdaLayerNorm) -> list[Way]:
        target = kernels.Target.of(call.x.device)
        return [
            *(Way("triton", tuple(tile)) for tile in Tile.candidates(target, call.x.dtype, call.x.shape[-1])),
            TORCH,
        ]

    def run(self, call: AdaLayerNorm, way: Way) -> torch.Tensor:
        if way == TORCH:
            return kernels.ada_layer_norm_reference(*call)
        return kernels.ada_layer_norm(*call, tile=None if way.tile is None else Tile(*way.tile))

    def prepare(self, call: AdaLayerNorm, way: Way) -> Callable[[AdaLayerNorm], torch.Tensor]:
        if way == TORCH:
            return super().prepare(call, way)
        prepared = prepare_ada_layer_norm(*call, tile=None if way.tile is None else Tile(*way.tile))
        return lambda call: prepared(*call[:4])

    def opaque(self, call: AdaLayerNorm) -> torch.Tensor:
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
    x: torch.Tensor, norm: nn.LayerNorm, scale: torch.Tensor, shift: torch.Tensor, index: torch.Tensor | None = None
) -> torch.Tensor:
    """Normalise ``x [B, S, D]`` and modulate it; ``scale`` and ``shift`` as in `ppcl_kernels.modulation`."""
    call = AdaLayerNorm(x, scale, shift, index, norm.eps)
    if norm.elementwise_affine or not readable(x, norm, moving=(scale, shift)):
        return norm(x) * (1 + kernels.per_token(scale, index)) + kernels.per_token(shift, index)
    return ADA_LAYER_NORM(call)
