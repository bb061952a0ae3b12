"""Linear layers of both streams and what follows them: one launch of ours, or torch's products.

cuBLASLt puts the GELU into its product's epilogue (``torch._addmm_activation``); after a product of cuBLAS one small
kernel of ours adds the gated residual.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

import ppcl_kernels as kernels
from ppcl_kernels.gated_residual import Tile as ResidualTile
from ppcl_kernels.gated_residual import prepare_gated_residual
from ppcl_kernels.launch import Target
from ppcl_kernels.linear import prepare_linear
from ppcl_kernels.matmul import Tile, takes_tma
from ppcl_rt.ops.modules import linear, parameter, readable
from ppcl_rt.ops.operation import Operation, address, define_op, flag, form, name_of, vectors
from ppcl_rt.ops.table import CUBLAS, CUBLASLT, TORCH, Key, Way


class Linears(NamedTuple):
    """One or two linear layers, and whether tanh-GELU follows them."""

    groups: tuple[kernels.Linear, ...]
    gelu: bool = False


class _Linears(Operation[Linears, list[torch.Tensor]]):
    name = "linear"

    def like(self, call: Linears) -> torch.Tensor:
        return call.groups[0].x

    def tensors(self, call: Linears) -> Sequence[torch.Tensor | None]:
        return [t for g in call.groups for t in (g.x, g.weight, g.bias, g.gate, g.residual)]

    def signature(self, call: Linears) -> Hashable:
        parts: list[Hashable] = [call.gelu]
        for g in call.groups:
            parts += [g.out_features, form(g.x), address(g.weight), vectors(g.bias)]
            parts += [form(g.gate), form(g.index), form(g.residual)]
        return tuple(parts)

    def fits(self, call: Linears) -> bool:
        return all(g.x.stride(-1) == 1 for g in call.groups)

    def key(self, call: Linears) -> Key:
        words = [self.name, name_of(call.groups[0].x.dtype), flag(call.gelu, "gelu")]
        sizes = [call.groups[0].x.shape[0]]
        target = Target.of(call.groups[0].x.device)
        for g in call.groups:
            words.append(
                "+".join(
                    (
                        flag(g.bias is not None, "bias"),
                        flag(g.gate is not None, "gate"),
                        flag(g.index is not None, "index"),
                        flag(g.residual is not None, "residual"),
                        flag(takes_tma(target, g.x, g.weight), "tma"),
                        flag(g.x.is_contiguous(), "contiguous"),
                    )
                )
            )
            sizes += [g.x.shape[1], g.x.shape[2], g.out_features or g.weight.shape[0], g.weight.shape[1]]
        return Key(" ".join(words), tuple(sizes))

    def implementations(self, call: Linears) -> list[Way]:
        x = call.groups[0].x
        ours = [Way("triton", tuple(tile)) for tile in Tile.candidates(Target.of(x.device), x.dtype)]
        # Without a gated residual cuBLAS has no kernel to go with it, and is the same as plain torch.
        gated = any(g.gate is not None and g.residual is not None for g in call.groups)
        if gated:
            added = bool(ResidualTile.candidates(Target.of(x.device), x.dtype))
            return [*ours, *([CUBLAS] if added else []), TORCH]
        # cuBLASLt wants a bias; on a CPU torch's epilogue is another GELU.
        if call.gelu and x.is_cuda and all(g.bias is not None for g in call.groups):
            return [CUBLASLT, *ours, TORCH]
        return [*ours, TORCH] if call.gelu else [TORCH, *ours]

    def run(self, call: Linears, way: Way) -> list[torch.Tensor]:
        if way == TORCH:
            return [kernels.linear_reference(*g[:4], gelu=call.gelu, **_after(g)) for g in call.groups]
        if way == CUBLAS:
            return [_cublas(g, kernels.gated_residual) for g in call.groups]
        if way == CUBLASLT:
            return [_cublaslt(g) for g in call.groups]
        groups = [g if g.residual is None else g._replace(residual=g.residual.contiguous()) for g in call.groups]
        return kernels.grouped_linear(groups, gelu=call.gelu, tile=None if way.tile is None else Tile(*way.tile))

    def prepare(self, call: Linears, way: Way) -> Callable[[Linears], list[torch.Tensor]]:
        if way == CUBLAS:
            adds = [_prepare_add(g) for g in call.groups]
            return lambda call: [_cublas(g, add) for g, add in zip(call.groups, adds)]
        if way.kind != "triton" or not all(g.residual is None or g.residual.is_contiguous() for g in call.groups):
            return super().prepare(call, way)
        tile = None if way.tile is None else Tile(*way.tile)
        prepared = prepare_linear(call.groups, gelu=call.gelu, tile=tile)
        return lambda call: prepared(call.groups)

    def opaque(self, call: Linears) -> list[torch.Tensor]:
        return _OP(*map(list, zip(*call.groups, strict=True)), call.gelu)


LINEARS = _Linears()


def _after(g: kernels.Linear) -> dict[str, Any]:
    return {"gate": g.gate, "index": g.index, "residual": g.residual}


def _cublas(g: kernels.Linear, add: Callable[..., torch.Tensor]) -> torch.Tensor:
    y = kernels.linear_reference(*g[:4])
    if g.gate is None or g.residual is None:
        return y if g.residual is None else g.residual + y
    return add(g.residual, g.gate, y, g.index)


def _prepare_add(g: kernels.Linear) -> Callable[..., torch.Tensor]:
    if g.gate is None or g.residual is None:
        return kernels.gated_residual
    return prepare_gated_residual(g.residual, g.gate, g.residual.new_empty(g.residual.shape), g.index)


def _cublaslt(g: kernels.Linear) -> torch.Tensor:
    n, k = g.out_features, g.x.shape[-1]
    assert g.bias is not None, "offered where there is a bias"
    y = torch._addmm_activation(g.bias[:n], g.x.flatten(0, 1), g.weight[:n, :k].t(), use_gelu=True)
    return y.unflatten(0, g.x.shape[:2])


def _run(*arguments: Any) -> list[torch.Tensor]:
    *columns, gelu = arguments
    return LINEARS(Linears(tuple(kernels.Linear(*group) for group in zip(*columns, strict=True)), gelu))


def _fake(x: Any, weight: Any, bias: Any, out_features: Any, *_: Any) -> list[torch.Tensor]:
    widths = [w.shape[0] if n is None else n for w, n in zip(weight, out_features, strict=True)]
    return [part.new_empty(*part.shape[:2], n) for part, n in zip(x, widths, strict=True)]


_OP = define_op(
    "linear",
    "(Tensor[] x, Tensor[] weight, Tensor?[] bias, int[] out_features, Tensor?[] gate, Tensor?[] index, "
    "Tensor?[] residual, bool gelu) -> Tensor[]",
    _run,
    _fake,
)


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
    moving = [t for layer in layers for t in (layer.x, layer.gate, layer.residual)]
    if not readable(layers[0].x, *(layer.module for layer in layers), moving=tuple(moving)):
        return [_through_module(layer, gelu) for layer in layers]
    return LINEARS(
        Linears(
            tuple(
                kernels.Linear(
                    layer.x,
                    parameter(layer.module, "weight"),
                    parameter(layer.module, "bias"),
                    layer.out_features or layer.module.out_features,
                    *layer[3:],
                )
                for layer in layers
            ),
            gelu,
        )
    )


def _through_module(layer: Layer, gelu: bool) -> torch.Tensor:
    y = linear(layer.module, layer.x, layer.out_features)
    if gelu:
        y = F.gelu(y, approximate="tanh")
    if layer.gate is not None:
        y = kernels.per_token(layer.gate, layer.index) * y
    return y if layer.residual is None else layer.residual + y
