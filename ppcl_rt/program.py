"""Programs: a plan made executable. What a plan leaves out is not in the program, so it costs nothing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from torch import nn

from ppcl_rt.plan import Interval, Plan, Width


class ProgramStep(NamedTuple):
    """One module to call.

    Attributes:
        module: a block of the teacher, or a student.
        width: how much of it runs.
        blocks: the original blocks that it stands for.
    """

    module: nn.Module
    width: Width
    blocks: Interval


@dataclass(frozen=True)
class Program:
    """The steps that the model walks, and the plan that they came from."""

    plan: Plan
    steps: tuple[ProgramStep, ...]
