"""Programs: a plan made executable. What a plan leaves out is not in the program, so it costs nothing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from torch import nn

from ppcl_rt.planning.plan import Interval, Plan, Width


class Still(NamedTuple):
    """A block's part in a text run (PPCL eq. 8).

    Attributes:
        begins: whether the run begins here: then the block computes the text, and what it reads is kept.
        reads: what the block reads in place of the text: ``z + reads(z)``, z what the first block read.
        moves_on: how the text stream goes on behind the run, ``text + moves_on(text)``; on its last block alone.
    """

    begins: bool
    reads: nn.Module | None = None
    moves_on: nn.Module | None = None


class ProgramStep(NamedTuple):
    """One module to call.

    Attributes:
        module: a block of the teacher, or a student.
        width: how much of it runs.
        blocks: the original blocks that it stands for.
        text: the text run that it is part of, if any.
    """

    module: nn.Module
    width: Width
    blocks: Interval
    text: Still | None = None


@dataclass(frozen=True)
class Program:
    """The steps that the model walks, and the plan that they came from."""

    plan: Plan
    steps: tuple[ProgramStep, ...]
