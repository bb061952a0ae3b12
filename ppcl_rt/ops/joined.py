"""A linear layer of several inputs that lie next to each other, without writing them next to each other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

import ppcl_kernels as kernels
from ppcl_rt.ops.linear import LINEARS, Linears
from ppcl_rt.ops.modules import adapted, has_hooks, is_plain, parameter, readable
from ppcl_rt.ops.quantised import QuantisedLinear
from ppcl_rt.ops.stacked import let_go, reads_stacks, stacked


class Columns(NamedTuple):
    """One of several inputs that lie next to each other in what a linear module reads.

    Attributes:
        x: ``[B, S, k]``.
        first: the first of the ``k`` columns of the module's weight that the product is over.
        replacement: a linear module without a bias that multiplies ``x`` in place of these columns, or None.
    """

    x: torch.Tensor
    first: int = 0
    replacement: Any = None


def joined(module: Any, inputs: Sequence[Columns], gate: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
    """Apply a linear module to several inputs next to each other, then ``* gate`` and ``+ residual``.

    Inputs are never written next to each other: each is multiplied by its own columns, and added to what is there.

    Args:
        module: a linear layer, or what wraps one.
        inputs: in the order of their columns; columns that no input names are not multiplied.
        gate: ``[B, N]``.
        residual: ``[B, S, N]``.

    Returns:
        ``[B, S, N]``, N the rows of the module.
    """
    base, branches = adapted(module) if reads_stacks(residual) else (module, ())
    replacements = [each.replacement for each in inputs]
    others = (*(each.x for each in inputs), gate, *(t for branch in branches for t in branch[:2]))
    of_one_dtype = all(branch.down.dtype == residual.dtype for branch in branches)
    if not of_one_dtype or not readable(residual, base, *replacements, others=others):
        let_go([module])
        return _joined_through_modules(module, inputs, gate, residual)
    weight, bias = parameter(base, "weight"), parameter(base, "bias")
    [(down, up)] = stacked([(module, branches)])
    for each in inputs:
        own = weight[:, each.first :] if each.replacement is None else parameter(each.replacement, "weight")
        layer = kernels.Linear(each.x, own, bias, base.out_features, gate, None, residual)
        if down is not None:
            # Of all inputs: what stands in for columns does so without the adapter.
            layer = layer._replace(down=down[:, each.first :], up=up)
        [residual] = LINEARS(Linears((layer,)))
        # With the first product alone.
        bias = None
    return residual


def _joined_through_modules(
    module: Any, inputs: Sequence[Columns], gate: torch.Tensor, residual: torch.Tensor
) -> torch.Tensor:
    """As `joined`, for gradients, and for modules that have to be called, on all inputs at once: what is replaced, or
    left out, is zero there."""
    own = [each for each in inputs if each.replacement is None]
    base, branches = adapted(module)
    is_quantised = type(base) is QuantisedLinear and not has_hooks(base)
    if is_quantised or is_plain(base):
        y = inputs[0].x.new_zeros(()) if base.bias is None else base.bias
        for each in own:
            if is_quantised:
                y = y + base.product(each.x, None, each.first)
            else:
                y = y + kernels.linear_reference(each.x, base.weight[:, each.first :])
        for branch in branches:
            # Of all inputs: what stands in for columns does so without the adapter.
            y = sum((branch(each.x, len(base.weight), each.first) for each in inputs), y)
    else:
        pieces, end = [], 0
        for each in own:
            pieces += [_zeros(each.x, each.first - end), each.x]
            end = each.first + each.x.shape[-1]
        pieces.append(_zeros(inputs[0].x, module.in_features - end))
        y = module(torch.cat([piece for piece in pieces if piece.shape[-1]], dim=-1))
    for each in inputs:
        if each.replacement is not None:
            y = y + each.replacement(each.x)
    return residual + kernels.per_token(gate, None) * y


def _zeros(like: torch.Tensor, columns: int) -> torch.Tensor:
    return like.new_zeros(*like.shape[:-1], columns)
