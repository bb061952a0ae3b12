"""Passes of a teacher over the same calibration batches, each over a portion of its blocks, in rising order.

A portion needs the teacher no further than its last block. What enters the block that the next portion begins with is
kept on disk: the next pass goes on from there. With 60 blocks, 8 a portion, all passes together run 60 blocks a sample,
in the place of 284 from the first block to the last of each portion, and of 480 through the whole teacher. At
4,300 tokens x 3,072 a sample's streams take 26 MB in bfloat16, twice while a pass runs.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ppcl_rt import Streams
from ppcl_train.config.settings import RunConfig
from ppcl_train.data import calibration, streams
from ppcl_train.data.calibration import Inputs
from ppcl_train.engine.files import read_tensors, write_tensors


class Passes:
    """Passes of a teacher over calibration batches.

    Attributes:
        model: the dense model.
    """

    def __init__(self, run: RunConfig, model: Any, samples: int, folder: Path | None = None) -> None:
        """Run nothing yet.

        Args:
            samples: calibration samples of every pass.
            folder: for what enters blocks, at most ``width.kept_bytes`` of it; None to keep nothing. What is there
                from passes that were stopped is taken.
        """
        self.model, self._run, self._samples, self._folder = model, run, samples, folder

    def over(self, numbers: range, following: int) -> Iterator[tuple[Inputs, Callable[[streams.Step], None]]]:
        """Yield every batch, and with it a function that walks some blocks.

        Its argument runs a block: each of these, and before them those after the last one whose input was kept. What
        is kept is what it returns, so passes that shall go on from one another run blocks in the same way.

        Args:
            numbers: of the blocks.
            following: the block that the next pass begins with, at most the one after these; 0 for no next pass.
        """
        batches = calibration.batches(self._run, self._samples, calibration.WIDTH, teacher=self.model)
        for number, batch in enumerate(batches):
            yield batch, partial(self._walk, number, batch, numbers, following)

    @torch.no_grad()
    def _walk(self, number: int, batch: Inputs, numbers: range, following: int, step: streams.Step) -> None:
        state, context = streams.enter(self.model, batch)
        first, state = self._kept(number, numbers.start, state)
        for n in range(first, numbers.stop):
            if n == following:
                self._keep(number, n, state, len(batch.x))
            state = step(n, state, context)
        if following == numbers.stop:
            self._keep(number, following, state, len(batch.x))

    def end(self) -> None:
        """Delete what was kept."""
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)

    def _kept(self, batch: int, block: int, state: Streams) -> tuple[int, Streams]:
        """The last block up to ``block`` whose input was kept, and this input; 0 and ``state`` if there is none."""
        if self._folder is None:
            return 0, state
        files = {int(file.name.split(".")[0]): file for file in self._folder.glob(f"*.{batch:05d}.safetensors")}
        found = max((number for number in files if number <= block), default=0)
        for number, file in files.items():
            # A pass that is stopped begins again where this one does.
            if number < found:
                file.unlink()
        if not found:
            return 0, state
        held = read_tensors(files[found])
        return found, Streams(*(held[name].to(old) for name, old in zip(Streams._fields, state, strict=True)))

    def _keep(self, batch: int, block: int, state: Streams, samples: int) -> None:
        size = sum(stream.nbytes for stream in state)
        # Of this pass, and of the one before until all that it was for is written.
        if not block or self._folder is None or 2 * size * self._samples > self._run.width.kept_bytes * samples:
            return
        write_tensors(self._folder / f"{block:03d}.{batch:05d}.safetensors", state._asdict(), {})
