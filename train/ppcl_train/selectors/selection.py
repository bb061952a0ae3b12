"""What a selector leaves for the next stage: the intervals that get a student, and where each student starts."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from ppcl_rt import Interval
from ppcl_rt.planning.frozen import Frozen, read_json
from ppcl_rt.planning.legal import Start, starting_blocks
from ppcl_train.engine.files import read_content, write_json

OUTPUT = "selected.json"


class Selected(NamedTuple):
    """An interval that gets a student, and the block that the student is copied from."""

    interval: Interval
    start: Start

    @property
    def copied_from(self) -> tuple[int, ...]:
        """Numbers of the blocks whose mean the student begins as."""
        return starting_blocks(self.interval, self.start)


class _Selection(Frozen):
    selected: tuple[Selected, ...]


def write(folder: Path, selected: Sequence[Selected]) -> None:
    """Write ``selected.json``, in order of the intervals."""
    write_json(folder / OUTPUT, _Selection(selected=tuple(sorted(selected))).model_dump(mode="json"))


def read(folder: Path) -> tuple[Selected, ...]:
    """Read ``selected.json``."""
    path = folder / OUTPUT
    return read_json(_Selection, json.dumps(read_content(path)), f"{path} is no selection").selected


def new_student(blocks: Sequence[nn.Module], selected: Selected) -> nn.Module:
    """Make an untrained student: a copy of one of the teacher's blocks, or of the mean of all blocks of the interval.

    Returns:
        The student, trainable, in float32 whatever the teacher computes in: steps are too small for a coarser dtype.
    """
    numbers = selected.copied_from
    student = copy.deepcopy(blocks[numbers[0]])
    with torch.no_grad():
        for name, parameter in student.named_parameters():
            parameter.copy_(torch.stack([blocks[n].get_parameter(name) for n in numbers]).mean(0))
    return student.float().requires_grad_(True)
