"""Programs: a plan made executable. What a plan leaves out is not in the program, so it costs nothing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
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


@dataclass(frozen=True)
class Program:
    """The calls that a forward makes, and the plan that they came from."""

    plan: Plan
    calls: tuple[BlockCall, ...]

    def over(self, grown: Mapping[PluggableBlock, PluggableBlock]) -> Program:
        """The same over the blocks that others have grown to; itself where it calls none of them."""
        if not any(call.block in grown for call in self.calls):
            return self
        return Program(self.plan, tuple(c._replace(block=grown.get(c.block, c.block)) for c in self.calls))
