"""Batches of a training loop, made ahead by worker processes (torch's `DataLoader`) while the step before trains."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch.utils.data import DataLoader, Dataset, Sampler

from ppcl_train.config.settings import RunConfig
from ppcl_train.data import calibration
from ppcl_train.data.calibration import Drawn, Inputs
from ppcl_train.data.seeds import Seed
from ppcl_train.data.source import WHOLE
from ppcl_train.engine.distributed import join

# Workers of a process with a GPU, which trains faster than one core makes batches.
_WORKERS_OF_A_GPU = 4


class Batches:
    """Batches by their numbers, in the order of a training loop.

    A number alone decides its batch, so batches do not depend on the workers, and a loop that was killed goes on with
    any number. Workers draw (`calibration.draw`); what needs the device is done here. A worker holds two batches ahead.

    Args:
        run: its ``data.workers`` says how many workers there are; without any, a batch is made when it is asked for.
        size: samples of a whole batch.
        first: the seed of batch 0.
        count: batches of the loop.
        share: the samples of each batch that this process takes.
        teacher: as for `calibration.inputs`.
    """

    def __init__(
        self, run: RunConfig, size: int, first: Seed, count: int, share: slice = WHOLE, teacher: Any = None
    ) -> None:
        self._run, self._size, self._first, self._share, self._teacher = run, size, first, share, teacher
        self._device = join().device
        workers = run.data.workers
        if workers is None:
            workers = _WORKERS_OF_A_GPU if self._device.type == "cuda" else 0
        self._numbers = _Numbers(count)
        self._ahead: Iterator[Drawn] = iter(())
        self._loader: DataLoader[Drawn] | None = None
        if workers:
            self._loader = DataLoader(
                _Draws(run, size, first, share),
                batch_size=None,
                collate_fn=_as_it_is,
                sampler=self._numbers,
                num_workers=workers,
                pin_memory=self._device.type == "cuda",
                persistent_workers=True,
            )

    def __call__(self, number: int) -> Inputs:
        """Return a batch on this process's device."""
        if self._loader is None:
            seed = self._first + number
            return calibration.inputs(self._run, self._size, seed, share=self._share, teacher=self._teacher)
        if number != self._numbers.following:
            self._numbers.following = number
            self._ahead = iter(self._loader)
        self._numbers.following += 1
        return calibration.made(self._run, next(self._ahead), self._teacher).to(self._device)


def _as_it_is(drawn: Any) -> Any:
    """Leave a batch alone: torch would make lists of tuples."""
    return drawn


class _Numbers(Sampler[int]):
    """Numbers of batches up to ``count``, from the one that follows what was returned."""

    def __init__(self, count: int) -> None:
        self.count, self.following = count, -1

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.following, self.count))


class _Draws(Dataset[Drawn]):
    """What is drawn for each batch, by its number."""

    def __init__(self, run: RunConfig, size: int, first: Seed, share: slice) -> None:
        self._run, self._size, self._first, self._share = run, size, first, share

    def __getitem__(self, number: int) -> Drawn:
        return calibration.draw(self._run, self._size, self._first + number, share=self._share)
