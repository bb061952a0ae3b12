"""One model of a comparison: what a method gets to make it, and what all methods share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ppcl_rt import Architecture
from ppcl_train import pipeline
from ppcl_train.config.settings import RunConfig, with_changes
from ppcl_train.data import calibration
from ppcl_train.data.seeds import Seed
from ppcl_train.data.teacher_file import load_teacher


class UnreachableError(ValueError):
    """A method cannot make a model this small."""


@dataclass(frozen=True)
class Entry:
    """A model to be made: one method at one ratio with one seed.

    Attributes:
        run: all settings; its seed decides data and chance.
        folder: for this entry alone; what was begun in it is resumed.
        shared: folder for all entries of a seed.
        teacher_file: the teacher, as ``teacher.safetensors`` of a run folder.
        ratio: the most parameters, over those of the teacher; whole blocks may take `CompareConfig.slack` more.
        device: where models are trained and judged; what the pipeline itself trains goes where the pipeline puts it.
        clean: the clean images that the teacher pointed at, by the seed of the batch. Entries of a seed see the same
            batches; without this the teacher would take a third of the time.
    """

    run: RunConfig
    folder: Path
    shared: Path
    teacher_file: Path
    ratio: float
    device: str = "cpu"
    clean: dict[Seed, torch.Tensor] = field(default_factory=dict, repr=False)

    def begin(self, folder: Path, **changes: Any) -> RunConfig:
        """Begin a run folder with this teacher.

        Args:
            changes: settings by dotted name, with ``__`` for the dot.

        Returns:
            The changed settings.
        """
        changed = with_changes(self.run, {name.replace("__", "."): value for name, value in changes.items()})
        pipeline.begin(changed, folder, self.teacher_file)
        return changed

    def teacher(self) -> Any:
        """Load a copy of the teacher, frozen, in float32."""
        self.begin(self.folder)
        # Not diffusers' `to`, which warns of modules that it would keep in float32; there are none here.
        model: Any = nn.Module.to(load_teacher(self.run, self.folder), self.device, torch.float32)
        return model

    def inputs(self, seed: Seed, teacher: Any) -> calibration.Inputs:
        """Make a batch to train on."""
        batch = calibration.inputs(self.run, self.run.compare.batch, seed, teacher=teacher)
        return batch.to(torch.device(self.device))

    def whole_blocks(self, architecture: Architecture) -> int:
        """Count the whole blocks that the ratio leaves room for, by the mean size of a block.

        Raises:
            UnreachableError: there is not room for one.
        """
        budget = (self.ratio + self.run.compare.slack) * architecture.dense_params - architecture.outer_params
        block = (architecture.dense_params - architecture.outer_params) / architecture.depth
        count = min(architecture.depth, int(budget / block))
        if count < 1:
            raise UnreachableError(f"ratio {self.ratio:g} leaves no whole block")
        return count


# Makes the model of an entry.
Method = Callable[[Entry], Any]
