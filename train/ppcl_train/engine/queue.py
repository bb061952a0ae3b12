"""A queue of small jobs on disk, which any process of any world takes.

A job is named by what its result depends on, and its result is one file of that name: what is there is never made
again, by whichever stage or process it was made. A process claims a job by a lock of the operating system. A process
that is killed at any moment loses the job that it was at, and another process takes it. On a file system that several
machines share, ``flock`` has to work across them (NFS 4 and Lustre's ``flock`` option do that).
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ppcl_train.engine import digests
from ppcl_train.engine.files import read_note, read_tensors, write_tensors
from ppcl_train.engine.lock import attended, claimed, delete, is_attended

# Of the run folder: the results of all jobs of all stages, and the locks of those that are being done.
RESULTS = "results"
# Seconds between two looks for what other processes have done, or have left undone.
_PAUSE = 0.1
# Seconds that processes have to leave another queue.
_PATIENCE = 10.0


class Job(NamedTuple):
    """Something to compute.

    Attributes:
        name: what it is, and a digest of all that its result depends on (`engine.digests`); the name of a file.
        group: jobs that share some of their work, next to each other in a queue. A process goes to a group where no
            other process is, and helps with another one's when there is none.
    """

    name: str
    group: str


class Result(NamedTuple):
    """What a job has made.

    Attributes:
        tensors: by name.
        note: what JSON can hold.
    """

    tensors: Mapping[str, torch.Tensor]
    note: Mapping[str, Any]


# Computes a job.
Do = Callable[[Job], Result]


class Queue:
    """Jobs, and the folder of their results.

    Args:
        folder: the run folder.

    Attributes:
        jobs: in the order in which they are taken, each name once.
    """

    def __init__(self, folder: Path, jobs: Sequence[Job]) -> None:
        self._folder, self.jobs = folder / RESULTS, tuple(jobs)
        self._digest = digests.of_values([job.name for job in self.jobs])[:16]

    @property
    def _open_file(self) -> Path:
        return self._folder / f"{self._digest}.open"

    def _file(self, job: Job) -> Path:
        return self._folder / f"{job.name}.safetensors"

    def _lock_file(self, name: str) -> Path:
        return self._folder / f"{name}.{self._digest}.lock"

    def is_done(self, job: Job) -> bool:
        """Whether the result of a job is there."""
        return self._file(job).exists()

    @property
    def left(self) -> list[Job]:
        """The jobs whose results are not there, in order."""
        return [job for job in self.jobs if not self.is_done(job)]

    def _others_are_here(self) -> bool:
        """Whether processes work at another queue of the folder."""
        return any(is_attended(file) for file in self._folder.glob("*.open") if file != self._open_file)

    def work(self, do: Do, log: Callable[..., None]) -> list[Result]:
        """Take jobs until all are done, by this process or by others; returns the results, in the order of the jobs.

        Args:
            do: computes a job.
            log: is told how many are done whenever this process has left a group.

        Raises:
            ValueError: processes work at another queue of the folder: they measure something else, or with other
                versions. And what ``do`` raises: what was done before is kept.
        """
        until = time.monotonic() + _PATIENCE
        # A process that helped at the queue before this one leaves it when it sees that all is done.
        while self._others_are_here() and time.monotonic() < until:
            time.sleep(_PAUSE)
        if self._others_are_here():
            raise ValueError(
                f"processes at {self._folder} make other results than this one would: start all of them with the same "
                "settings, versions and kind of device"
            )
        with attended(self._open_file):
            left = self.left
            if left:
                log(jobs=len(self.jobs), done=len(self.jobs) - len(left))
            while left:
                took = [self._sweep(left, helps, do, log) for helps in (False, True)]
                left = self.left
                if left and not any(took):
                    time.sleep(_PAUSE)
        for name in {name for job in self.jobs for name in job}:
            # Those of processes that were killed.
            delete(self._lock_file(name))
        return [Result(read_tensors(file), read_note(file)) for file in map(self._file, self.jobs)]

    def _sweep(self, left: Sequence[Job], helps: bool, do: Do, log: Callable[..., None]) -> bool:
        """Go through all groups once; returns whether there was anything to do.

        Args:
            helps: whether to take jobs of groups at which other processes are, the last first.
        """
        took = False
        for group, jobs in itertools.groupby(left, key=lambda job: job.group):
            with claimed(self._lock_file(group)) as mine:
                in_group = list(jobs)
                if mine or helps:
                    took_here = [self._take(job, do) for job in (in_group if mine else reversed(in_group))]
                    if any(took_here):
                        took = True
                        log(done=len(self.jobs) - len(self.left), of=len(self.jobs), last=group)
        return took

    def _take(self, job: Job, do: Do) -> bool:
        """Do a job, unless it is done or another process is at it; returns whether it was done here."""
        if self.is_done(job):
            return False
        with claimed(self._lock_file(job.name)) as mine:
            # The process that had it before may have ended it.
            if not mine or self.is_done(job):
                return False
            tensors, note = do(job)
            write_tensors(self._file(job), tensors, note)
            return True


def work_under_way(folder: Path) -> str | None:
    """Name the queue that processes of a run folder work at now; None for none."""
    return next((file.stem for file in sorted((folder / RESULTS).glob("*.open")) if is_attended(file)), None)
