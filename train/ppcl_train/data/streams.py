"""The streams between the blocks of a teacher: walk the dense model, keep what passes, run a block by hand."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map_only

from ppcl_rt import Interval, Streams
from ppcl_train.data.calibration import Inputs


@dataclass(frozen=True)
class Trace:
    """One pass of a teacher.

    Attributes:
        streams: ``h_0 .. h_L``; block ``i`` (from 0) maps ``streams[i]`` to ``streams[i + 1]``.
        context: keyword arguments that every block was called with.
    """

    streams: list[Streams]
    context: dict[str, Any] = field(repr=False)


# Called after a block: (its number, its input, its output, the keyword arguments that it was called with).
Visit = Callable[[int, Streams, Streams, dict[str, Any]], None]
# Runs a block: (its number, its input, the keyword arguments that it is called with) -> its output.
Step = Callable[[int, Streams, dict[str, Any]], Streams]
# Called when the teacher reaches the end of an interval: (the interval, its input, its output, keyword arguments).
VisitInterval = Callable[[Interval, Streams, Streams, dict[str, Any]], None]


@torch.no_grad()
def walk(model: Any, given: Inputs, visit: Visit) -> None:
    """Run the dense model without gradients and call ``visit`` after every block; nothing is kept."""

    def after_block(number: int) -> Callable[..., None]:
        def hook(_: nn.Module, __: Any, kwargs: dict[str, Any], out: tuple[torch.Tensor, torch.Tensor]) -> None:
            context = dict(kwargs)
            before = Streams(context.pop("hidden_states"), context.pop("encoder_hidden_states"))
            context.pop("width", None)
            visit(number, before, Streams(image=out[1], text=out[0]), context)

        return hook

    hooks = [
        block.register_forward_hook(after_block(number), with_kwargs=True)
        for number, block in enumerate(model.blocks())
    ]
    try:
        model(**given.call)
    finally:
        for hook in hooks:
            hook.remove()


def walk_intervals(model: Any, given: Inputs, intervals: Collection[Interval], visit: VisitInterval) -> None:
    """Run the dense model once for all intervals, which may overlap, and visit each as soon as its end is reached.

    The input of an interval is held from its first block to its last; no other streams are held.
    """
    open_until = {i.first: max(other.last for other in intervals if other.first == i.first) for i in intervals}
    held: dict[int, Streams] = {}

    def after_block(number: int, before: Streams, after: Streams, context: dict[str, Any]) -> None:
        if number in open_until:
            held[number] = before
        for interval in intervals:
            if interval.last == number:
                visit(interval, held[interval.first], after, context)
        for first in [first for first in held if open_until[first] <= number]:
            del held[first]

    walk(model, given, after_block)


def trace(model: Any, given: Inputs) -> Trace:
    """Run the dense model and keep the streams between all blocks."""
    streams: list[Streams] = []
    shared: dict[str, Any] = {}

    def keep(_: int, before: Streams, after: Streams, context: dict[str, Any]) -> None:
        streams[-1:] = [before, after]
        shared.update(context)

    walk(model, given, keep)
    return Trace(streams, shared)


class _EnteredError(Exception):
    """Carries what enters the first block out of a forward, which ends there."""

    def __init__(self, state: Streams, context: dict[str, Any]) -> None:
        super().__init__()
        self.state, self.context = state, context


@torch.no_grad()
def enter(model: Any, given: Inputs) -> tuple[Streams, dict[str, Any]]:
    """Run the model up to its first block: the embedders alone.

    Returns:
        What enters the first block, and the keyword arguments that every block is called with.
    """

    def stop(_: nn.Module, __: Any, kwargs: dict[str, Any]) -> None:
        context = dict(kwargs)
        state = Streams(context.pop("hidden_states"), context.pop("encoder_hidden_states"))
        context.pop("width", None)
        raise _EnteredError(state, context)

    hook = model.blocks()[0].register_forward_pre_hook(stop, with_kwargs=True)
    try:
        model(**given.call)
    except _EnteredError as entered:
        return entered.state, entered.context
    finally:
        hook.remove()
    raise AssertionError("the dense model runs its first block")


def run_block(block: nn.Module, streams: Streams, context: dict[str, Any]) -> Streams:
    """Apply a block at its full width."""
    text, image = block(hidden_states=streams.image, encoder_hidden_states=streams.text, **context)
    return Streams(image=image, text=text)


def in_float32(tree: Any) -> Any:
    """Return nested dicts, lists and tuples with their floating-point tensors in float32."""
    return tree_map_only(torch.Tensor, lambda x: x.float() if x.is_floating_point() else x, tree)
