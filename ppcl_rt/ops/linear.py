"""Linear layers of both streams, and what follows the matrix product: GELU or SwiGLU, gate, residual.

Implementations: one launch of `ppcl_kernels.grouped_linear` for both streams; cuBLAS, followed by one small kernel that
adds the gated residual; cuBLASLt, whose matrix product has the GELU in its epilogue (``torch._addmm_activation``);
plain torch.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

import ppcl_kernels as kernels
from ppcl_kernels.gated_residual import Tile as ResidualTile
from ppcl_kernels.gated_residual import prepare_gated_residual
from ppcl_kernels.launch import Target
from ppcl_kernels.linear import Activation, prepare_linear
from ppcl_kernels.matmul import Tile, takes_tma
from ppcl_rt.ops import eager
from ppcl_rt.ops.implementation import CUBLAS, CUBLASLT, TORCH, Implementation, Key, backend
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
from ppcl_rt.ops.stacked import let_go, reads_stacks, stacked


class Linears(NamedTuple):
    """One linear layer or two (one of each stream), and the activation that follows them."""

    groups: tuple[kernels.Linear, ...]
    activation: Activation = "none"


class _Linears(Operation[Linears, list[torch.Tensor]]):
    name = "linear"

    def main_input(self, call: Linears) -> torch.Tensor:
        return call.groups[0].x

    def tensors(self, call: Linears) -> Sequence[torch.Tensor | None]:
        return [t for g in call.groups for t in (g.x, g.weight, g.bias, g.gate, *g[6:])]

    def signature(self, call: Linears) -> Hashable:
        parts: list[Hashable] = [call.activation]
        for g in call.groups:
            parts += [g.out_features, layout_signature(g.x), weight_signature(g.weight), vector_signature(g.bias)]
            parts += [layout_signature(g.gate), layout_signature(g.index), layout_signature(g.residual)]
            if g.silu_weight is not None:
                parts += [weight_signature(g.silu_weight), vector_signature(g.silu_bias)]
            if g.down is not None or g.silu_down is not None:
                parts.append(weight_signature(*g[9:]))
        return tuple(parts)

    def fits(self, call: Linears) -> bool:
        return all(g.x.stride(-1) == 1 for g in call.groups)

    def key(self, call: Linears) -> Key:
        x = call.groups[0].x
        gelu = flag(call.activation == "gelu", "gelu")
        activation = call.activation if call.activation == "swiglu" else gelu
        words, sizes = [self.name, dtype_name(x.dtype), activation], [x.shape[0]]
        target = Target.of(x.device)
        for g in call.groups:
            flags = {
                "bias": g.bias is not None,
                "gate": g.gate is not None,
                "index": g.index is not None,
                "residual": g.residual is not None,
                "tma": takes_tma(target, g.x, g.weight, *(() if g.silu_weight is None else (g.silu_weight,))),
                "contiguous": g.x.is_contiguous(),
            }
            words.append("+".join(flag(on, name) for name, on in flags.items()))
            if g.rank:
                words.append(f"rank {g.rank}")
            sizes += [g.x.shape[1], g.x.shape[2], g.out_features or g.weight.shape[0], g.weight.shape[1]]
        return Key(" ".join(words), tuple(sizes))

    def implementations(self, call: Linears) -> list[Implementation]:
        x = call.groups[0].x
        target = Target.of(x.device)
        rank = max(g.rank for g in call.groups)
        tiles = Tile.candidates(target, x.dtype, call.activation == "swiglu", rank)
        triton = [Implementation("triton", tuple(tile)) for tile in tiles]
        if any(g.gate is not None and g.residual is not None for g in call.groups):
            return [*triton, *([CUBLAS] if ResidualTile.candidates(target, x.dtype) else []), TORCH]
        # Without a gated residual no small kernel follows, and cuBLAS is the same as plain torch: it is not offered.
        # cuBLASLt needs a bias. On a CPU torch's epilogue is another form of GELU.
        if call.activation == "gelu" and x.is_cuda and not rank and all(g.bias is not None for g in call.groups):
            return [CUBLASLT, *triton, TORCH]
        # Plain torch takes two more products for an adapter.
        return [TORCH, *triton] if call.activation == "none" and not rank else [*triton, TORCH]

    def run(self, call: Linears, implementation: Implementation) -> list[torch.Tensor]:
        if implementation == TORCH and eager.suits(call.groups[0].x) and not any(g.rank for g in call.groups):
            return [eager.linear(g, call.activation) for g in call.groups]
        if implementation == TORCH:
            return [g.reference(call.activation) for g in call.groups]
        if implementation == CUBLAS:
            return [_cublas(g, kernels.gated_residual) for g in call.groups]
        if implementation == CUBLASLT:
            return [_cublaslt(g) for g in call.groups]
        groups = [g if g.residual is None else g._replace(residual=g.residual.contiguous()) for g in call.groups]
        return kernels.grouped_linear(groups, activation=call.activation, tile=implementation.tile_as(Tile))

    def checked(self, call: Linears) -> Linears:
        """Return the call with residuals of zeros: a residual is so large that a wrong product would pass under it."""
        return call._replace(
            groups=tuple(
                g if g.residual is None else g._replace(residual=torch.zeros_like(g.residual)) for g in call.groups
            )
        )

    def prepare(self, call: Linears, implementation: Implementation) -> Callable[[Linears], list[torch.Tensor]]:
        if implementation == CUBLAS:
            adds = [_prepare_add(g) for g in call.groups]
            return lambda call: [_cublas(g, add) for g, add in zip(call.groups, adds)]
        # The kernel reads residuals that are contiguous; `run` copies others.
        contiguous = all(g.residual is None or g.residual.is_contiguous() for g in call.groups)
        if implementation.kind != "triton" or not contiguous:
            return super().prepare(call, implementation)
        prepared = prepare_linear(call.groups, activation=call.activation, tile=implementation.tile_as(Tile))
        return lambda call: prepared(call.groups)

    def run_custom_op(self, call: Linears) -> list[torch.Tensor]:
        # One list for each field of the groups.
        return _OP(*map(list, zip(*call.groups, strict=True)), call.activation)


LINEARS = _Linears()


def _cublas(g: kernels.Linear, add_gated_residual: Callable[..., torch.Tensor]) -> torch.Tensor:
    y = kernels.linear_reference(*g[:4], down=g.down, up=g.up)
    if g.gate is None or g.residual is None:
        return y if g.residual is None else g.residual + y
    return add_gated_residual(g.residual, g.gate, y, g.index)


def _prepare_add(g: kernels.Linear) -> Callable[..., torch.Tensor]:
    if g.gate is None or g.residual is None:
        return kernels.gated_residual
    return prepare_gated_residual(g.residual, g.gate, g.residual.new_empty(g.residual.shape), g.index)


def _cublaslt(g: kernels.Linear) -> torch.Tensor:
    n, k = g.out_features, g.x.shape[-1]
    assert g.bias is not None, "cuBLASLt is offered only where there is a bias"
    y = torch._addmm_activation(g.bias[:n], g.x.flatten(0, 1), g.weight[:n, :k].t(), use_gelu=True)
    return y.unflatten(0, g.x.shape[:2])


def _run(*arguments: Any) -> list[torch.Tensor]:
    *fields, activation = arguments
    return LINEARS(Linears(tuple(kernels.Linear(*group) for group in zip(*fields, strict=True)), activation))


def _fake(x: Any, weight: Any, bias: Any, out_features: Any, *_: Any) -> list[torch.Tensor]:
    widths = [w.shape[0] if n is None else n for w, n in zip(weight, out_features, strict=True)]
    return [each.new_empty(*each.shape[:2], n) for each, n in zip(x, widths, strict=True)]


_OP = define_op(
    "linear",
    "(Tensor[] x, Tensor[] weight, Tensor?[] bias, int[] out_features, Tensor?[] gate, Tensor?[] index, "
    "Tensor?[] residual, Tensor?[] silu_weight, Tensor?[] silu_bias, Tensor?[] down, Tensor?[] up, "
    "Tensor?[] silu_down, Tensor?[] silu_up, str activation) -> Tensor[]",
    _run,
    _fake,
)


class Layer(NamedTuple):
    """A linear module, its input, and what follows the matrix product.

    Attributes:
        module: a linear layer, or what wraps one.
        x: ``[B, S, k]``; the product is over the first ``k`` columns of the weight.
        out_features: the number of rows of the weight that are computed, from the first; None for all.
        gate: ``[B, out_features]``, or ``[2 B, out_features]`` with a ``token_index``; multiplies the product.
        token_index: ``[B, S]``, which of two gates a token takes (`ppcl_kernels.modulation`).
        residual: ``[B, S, out_features]``, added last.
        silu_module: with SwiGLU, the linear layer whose product goes through SiLU and multiplies that of ``module``.
        adapter: the layer that ``module`` stands in for, whose adapters are added to it; None where it has none.
    """

    module: Any
    x: torch.Tensor
    out_features: int | None = None
    gate: torch.Tensor | None = None
    token_index: torch.Tensor | None = None
    residual: torch.Tensor | None = None
    silu_module: Any = None
    adapter: Any = None

    def apart(self) -> tuple[Layer, tuple[Branch, ...], tuple[Branch, ...]]:
        """The layer over modules without adapters, and what adapters add to the product and to that through SiLU."""
        module, branches = adapted(self.module)
        if self.adapter is not None:
            branches += adapted(self.adapter)[1]
        silu_module, silu_branches = (None, ()) if self.silu_module is None else adapted(self.silu_module)
        return self._replace(module=module, silu_module=silu_module, adapter=None), branches, silu_branches


def linears(layers: Sequence[Layer], *, activation: Activation = "none") -> list[torch.Tensor]:
    """Apply linear layers, one of each stream, each followed by the activation, ``* gate`` and ``+ residual`` if given.

    Returns:
        ``[B, S, out_features]`` of each layer.

    Raises:
        ValueError: an unknown activation; SwiGLU without a ``silu_module``, or a ``silu_module`` without SwiGLU.
    """
    # Adapters are looked for where there is something: taking layers apart takes microseconds.
    if all(layer.adapter is None for layer in layers) and _readable(layers):
        return LINEARS(Linears(tuple([_group(layer) for layer in layers]), activation))
    in_passes = eager.suits(layers[0].x) and backend() != "triton"
    if in_passes or reads_stacks(layers[0].x):
        bases, branches, silu_branches = zip(*[layer.apart() for layer in layers], strict=True)
        added = [branch for each in (*branches, *silu_branches) for branch in each]
        if _readable(bases, added):
            groups = zip(map(_group, bases), branches, silu_branches, strict=True)
            if in_passes:
                return [eager.linear(group, activation, *more) for group, *more in groups]
            if all(branch.down.dtype == layers[0].x.dtype for branch in added):
                return LINEARS(Linears(_with_stacks(layers, groups), activation))
    let_go([module for layer in layers for module in (layer.module, layer.silu_module, layer.adapter)])
    return [_through_module(layer, activation) for layer in layers]


def _with_stacks(
    layers: Sequence[Layer], groups: Iterable[tuple[kernels.Linear, tuple[Branch, ...], tuple[Branch, ...]]]
) -> tuple[kernels.Linear, ...]:
    """The tensors of layers, with what their adapters add as matrices."""
    parts, of = [], []
    for layer, (group, branches, silu_branches) in zip(layers, groups, strict=True):
        parts.append(group)
        of += [(layer.adapter or layer.module, branches), (layer.silu_module, silu_branches)]
    pairs = stacked(of)
    both = zip(parts, pairs[::2], pairs[1::2], strict=True)
    return tuple(g._replace(down=d, up=u, silu_down=sd, silu_up=su) for g, (d, u), (sd, su) in both)


def _readable(layers: Sequence[Layer], branches: Sequence[Branch] = ()) -> bool:
    """Whether an operation may read the weights of all these layers and branches."""
    others = [t for layer in layers for t in (layer.x, layer.gate, layer.residual)]
    others += [t for branch in branches for t in branch[:2]]
    modules = [module for layer in layers for module in (layer.module, layer.silu_module)]
    return readable(layers[0].x, *modules, others=tuple(others))


def _group(layer: Layer) -> kernels.Linear:
    """The layer's tensors; its modules are plain."""
    return kernels.Linear(
        layer.x,
        parameter(layer.module, "weight"),
        parameter(layer.module, "bias"),
        layer.out_features or layer.module.out_features,
        *layer[3:6],
        parameter(layer.silu_module, "weight"),
        parameter(layer.silu_module, "bias"),
    )


def _through_module(layer: Layer, activation: Activation) -> torch.Tensor:
    y = linear(layer.module, layer.x, layer.out_features)
    if layer.adapter is not None:
        for branch in adapted(layer.adapter)[1]:
            y = y + branch(layer.x, y.shape[-1])
    if activation == "gelu":
        y = F.gelu(y, approximate="tanh")
    if activation == "swiglu":
        y = F.silu(linear(layer.silu_module, layer.x, layer.out_features)) * y
    if layer.gate is not None:
        y = kernels.per_token(layer.gate, layer.token_index) * y
    return y if layer.residual is None else layer.residual + y
