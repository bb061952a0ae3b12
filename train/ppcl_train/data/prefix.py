"""The model in two parts: streams that enter a block, and what a plan makes of them from that block on.

A choice changes nothing before its first block. What the dense model does up to there is the same for all choices of
that block, and is done once: streams are kept at one block, and moved on by the dense model to the next.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from ppcl_rt import Plan, Streams
from ppcl_train.data.calibration import Inputs
from ppcl_train.data.streams import walk


@torch.no_grad()
def run_from(model: Any, plan: Plan, block: int, entering: Streams | None, batch: Inputs) -> Any:
    """Compute what a plan puts out if ``entering`` enter ``block``; what it runs before that block is not run.

    Args:
        plan: of the model. Something begins at ``block``, and no text run begins there or before: the first block of a
            text run keeps the text before a block is called.
        block: where the streams enter; the depth for after the last block.
        entering: None to run all of the plan, with ``block`` 0.

    Returns:
        What the transformer puts out, as `Inputs.clean` takes it.
    """
    assert entering is not None or block == 0, "a plan without its first blocks needs their streams"
    assert entering is None or all(run.first > block for run in plan.text_runs), "a text run begins after the entry"
    with _entered(model, _rest(plan, block), entering):
        return model(**batch.call)[0]


def _rest(plan: Plan, block: int) -> Plan:
    """A plan without what it runs before a block."""
    blocks = tuple(planned for planned in plan.blocks if planned.interval.first >= block)
    return Plan(checkpoint=plan.checkpoint, depth=plan.depth, blocks=blocks, text_runs=plan.text_runs)


@contextlib.contextmanager
def _entered(model: Any, plan: Plan, entering: Streams | None) -> Iterator[None]:
    """Run a plan in forwards inside the ``with``, with these streams in place of those that enter its first block."""

    def enter_block(_: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        assert entering is not None
        image, text = (
            mine.to(theirs) for mine, theirs in zip(entering, map(kwargs.get, ("hidden_states", _TEXT)), strict=True)
        )
        return args, {**kwargs, "hidden_states": image, _TEXT: text}

    def enter_after(_: nn.Module, args: tuple[torch.Tensor, ...], kwargs: dict[str, Any]) -> Any:
        assert entering is not None
        return (entering.image.to(args[0]), *args[1:]), kwargs

    with contextlib.ExitStack() as stack:
        stack.enter_context(model.at(plan=plan))
        if entering is not None:
            calls = model.prepare(plan).calls
            module, enter = (
                (calls[0].block, enter_block) if calls else (model.get_submodule(model.after_blocks), enter_after)
            )
            stack.callback(module.register_forward_pre_hook(enter, with_kwargs=True).remove)
        yield


_TEXT = "encoder_hidden_states"


class HeldStreams:
    """The dense model's streams that enter a few blocks, on some batches.

    They lie on the host in the model's dtype, 26 MB a sample and block for 4,300 tokens of width 3,072 in bfloat16, and
    come to the device a batch at a time.

    Args:
        model: everything that the dense plan runs is resident.
        batches: all of them.
    """

    def __init__(self, model: Any, batches: Iterable[Inputs]) -> None:
        self.model, self.batches = model, tuple(batches)
        self._contexts: dict[int, dict[str, Any]] = {}
        # By block, and by batch.
        self._held: dict[int, list[Streams | None]] = {}

    def hold(self, *blocks: int) -> None:
        """Hold the streams that enter these blocks, and no others; the depth stands for those after the last block.

        They are moved on from the nearest block before, or from the beginning.
        """
        for block in sorted(blocks):
            if block not in self._held:
                begin = max((held for held in self._held if held < block), default=None)
                # What is not asked for is let go of a batch at a time, so that no more than one block's are added.
                self._held[block] = self._moved(begin, block, kept=begin in blocks)
        self._held = {block: self._held[block] for block in blocks}

    @torch.no_grad()
    def _moved(self, begin: int | None, block: int, kept: bool) -> list[Streams | None]:
        catalog = self.model.catalog
        # Without any blocks to run, the first one is run and says what came.
        numbers = range(begin or 0, max(block, 1))
        plan = catalog.compose([(n, catalog.spec(n).full) for n in numbers])
        before: Sequence[Streams | None] = [None] * len(self.batches) if begin is None else self._held[begin]
        found: list[Streams | None] = []
        for number, batch in enumerate(self.batches):
            ends: list[Streams] = []

            def keep(
                _: int,
                came: Streams,
                left: Streams,
                context: dict[str, Any],
                number: int = number,
                ends: list[Streams] = ends,
            ) -> None:
                ends[:] = [left if block else came]
                self._contexts.setdefault(number, context)

            with _entered(self.model, plan, before[number]):
                walk(self.model, batch, keep)
            found.append(Streams(*(stream.cpu() for stream in ends[0])))
            if begin is not None and not kept:
                self._held[begin][number] = None
        return found

    def read(self, number: int, block: int) -> Streams:
        """The streams of a batch that enter a block that is held (`hold`), on the model's device."""
        streams = self._held[block][number]
        assert streams is not None, "these streams were let go of"
        return Streams(*(stream.to(self.model.device, non_blocking=True) for stream in streams))

    def context(self, number: int) -> dict[str, Any]:
        """The keyword arguments that every block is called with on a batch; after a `hold`."""
        return self._contexts[number]

    def run(self, plan: Plan, block: int, number: int) -> Any:
        """Compute what a plan, dense before a block, puts out on a batch (`run_from`); the block is held, or is 0."""
        entering = self.read(number, block) if block else None
        return run_from(self.model, plan, block, entering, self.batches[number])
