"""Programs: a plan made executable. What a plan leaves out is not in the program, so it costs nothing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import nn

from ppcl_rt.model.block import PluggableBlock
from ppcl_rt.planning.interval import Interval
from ppcl_rt.planning.plan import Plan
from ppcl_rt.planning.width import Width


class TextRunRole(NamedTuple):
    """A block's part in a text run (PPCL eq. 8).

    Attributes:
        is_first: whether the run begins here: then the block updates the text stream, and what it reads is kept.
        input_map: what a later block reads in place of the text is ``z + input_map(z)``, z what the first block read.
        exit_map: on the last block alone: after it the text stream is ``text + exit_map(text)``.
    """

    is_first: bool
    input_map: nn.Module | None = None
    exit_map: nn.Module | None = None


class BlockCall(NamedTuple):
    """One block to call.

    Attributes:
        block: a block of the teacher, or a student.
        width: how much of it runs.
        interval: the original blocks that it stands for.
        text_run: its part in a text run, if any.
    """

    block: PluggableBlock
    width: Width
    interval: Interval
    text_run: TextRunRole | None = None


@dataclass(eq=False)
class Program:
    """The calls that a forward makes, and the plan that they came from; neither ever changes.

    Attributes:
        later: what has taken its place, over blocks that have grown.
        dropped: whether the model has let go of its blocks.
    """

    plan: Plan
    calls: tuple[BlockCall, ...]
    later: Program | None = field(default=None, repr=False)
    dropped: bool = False

    @property
    def latest(self) -> Program:
        """What runs in its place now: itself, or the last that has taken its place."""
        program = self
        while program.later is not None:
            program = program.later
        return program

    def over(self, grown: Mapping[PluggableBlock, PluggableBlock]) -> Program:
        """The same over the blocks that others have grown to; itself where it calls none of them."""
        if self.later is not None:
            return self.latest
        if not any(call.block in grown for call in self.calls):
            return self
        self.later = Program(self.plan, tuple(c._replace(block=grown.get(c.block, c.block)) for c in self.calls))
        return self.later
