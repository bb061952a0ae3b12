"""The adapters of a layer as two matrices that kernels read, at memory that stays where it is.

All adapters of a layer that are active now are one: their factors lie next to each other along the rank, scales are in
``up``, and zeros fill the rank that kernels take. What changes while the adapters stay, such as their scales, is
written into the same memory. So launches that were prepared, and graphs that were captured, go on reading it.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from ppcl_kernels.matmul import padded_rank
from ppcl_rt.ops.implementation import backend
from ppcl_rt.ops.modules import Branch, adapted

# The factors ``down [R, columns]`` and ``up [rows, R]`` of a layer, None for a layer without adapters.
Pair = tuple[torch.Tensor, torch.Tensor] | tuple[None, None]


class _Stack:
    """The two matrices of a layer, and what they were made of."""

    __slots__ = ("branches", "down", "up", "versions")

    def __init__(self, branches: Sequence[Branch], rank: int) -> None:
        down, up = branches[0].down, branches[0].up
        # A tensor that is made in inference mode could not be written to outside of it.
        with torch.inference_mode(False), torch.no_grad():
            self.down = down.new_zeros(rank, down.shape[1])
            self.up = up.new_zeros(len(up), rank)
        self.branches: tuple[Branch, ...] = ()
        self.versions: list[tuple[int, int]] = []

    def has_room(self, branches: Sequence[Branch]) -> bool:
        """Whether these can be written into it."""
        like = (self.down.shape[1], len(self.up), self.down.dtype, self.down.device)
        fit = all(like == (b.down.shape[1], len(b.up), b.down.dtype, b.down.device) for b in branches)
        return fit and sum(len(branch.down) for branch in branches) <= len(self.down)

    def update(self, branches: tuple[Branch, ...]) -> None:
        """Have it be made of these as they are now."""
        tensors = [t for branch in branches for t in branch if isinstance(t, torch.Tensor)]
        versions = [(0 if t.is_inference() else t._version, t.data_ptr()) for t in tensors]
        if (
            len(branches) == len(self.branches)
            and all(a.down is b.down and a.up is b.up for a, b in zip(branches, self.branches, strict=True))
            and all(is_as_large(a.scale, b.scale) for a, b in zip(branches, self.branches, strict=True))
            and versions == self.versions
        ):
            return
        first = 0
        with torch.no_grad():
            self.down.zero_()
            self.up.zero_()
            for branch in branches:
                end = first + len(branch.down)
                self.down[first:end].copy_(branch.down)
                self.up[:, first:end].copy_(branch.up).mul_(branch.scale)
                first = end
        self.branches, self.versions = branches, versions


_STACKS: WeakKeyDictionary[nn.Module, _Stack] = WeakKeyDictionary()


def is_as_large(scale: float | torch.Tensor, other: float | torch.Tensor) -> bool:
    """Whether two scales are the same: one that is multiplied for a call, and divided after it, loses a last place."""
    if isinstance(scale, torch.Tensor) or isinstance(other, torch.Tensor):
        # Its number is on the device, and written in place: its version says whether it is another.
        return scale is other
    return math.isclose(scale, other, rel_tol=1e-12)


def reads_stacks(x: torch.Tensor) -> bool:
    """Whether operations on a tensor read adapters as matrices: where kernels may run, and no code is compiled."""
    return not torch.compiler.is_compiling() and (x.is_cuda or backend() == "triton")


def stacked(layers: Sequence[tuple[Any, tuple[Branch, ...]]]) -> list[Pair]:
    """The factors of layers that one launch reads, of one rank.

    Args:
        layers: each with what its adapters add, which may be nothing.
    """
    if not any(branches for _, branches in layers):
        return [(None, None)] * len(layers)
    ranks = [padded_rank(sum(len(branch.down) for branch in branches)) for _, branches in layers if branches]
    # A stack never shrinks: it may be read by launches of other ranks in turn.
    ranks += [len(_STACKS[layer].down) for layer, branches in layers if branches and layer in _STACKS]
    return [_stack_of(layer, branches, max(ranks)) if branches else (None, None) for layer, branches in layers]


def _stack_of(layer: nn.Module, branches: tuple[Branch, ...], rank: int) -> Pair:
    stack = _STACKS.get(layer)
    if stack is None or len(stack.down) != rank or not stack.has_room(branches):
        stack = _STACKS[layer] = _Stack(branches, rank)
    stack.update(branches)
    return stack.down, stack.up


def let_go(layers: Iterable[Any]) -> None:
    """Hold no matrices of layers: their adapters are others from now on, or the layers are called."""
    # Code that is compiled must not see the table.
    if not torch.compiler.is_compiling() and _STACKS:
        for layer in layers:
            if layer is not None:
                _STACKS.pop(layer, None)


def settled(layer: nn.Module) -> Hashable:
    """What a graph holds on to of a layer with adapters; what changed in matrices that stay is written into them."""
    base, branches = adapted(layer)
    stack = _STACKS.get(layer)
    if stack is not None and branches and stack.has_room(branches):
        stack.update(branches)
        return (id(base), stack.down.data_ptr(), stack.up.data_ptr(), len(stack.down))
    # The layer is called: its factors and scales are part of the graph.
    scales = [id(b.scale) if isinstance(b.scale, torch.Tensor) else round(b.scale, 12) for b in branches]
    return (id(base), *scales, *((id(b.down), id(b.up)) for b in branches))
