"""The saved states of a training loop: written by all processes, read by another number of them.

A state is a folder ``STAGE.state/STEP`` of safetensors files, one or more a process, and ``note.json``. It is written
under another name and renamed when every process has written its part: whatever is killed, and whenever, the newest
folder is whole. Then the one before it is deleted, so that there are at most one state and the one that is being
written.
"""

from __future__ import annotations

import json
import shutil
import time
import warnings
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import async_save, save

from ppcl_rt.files import one_line, write_json
from ppcl_train.engine.distributed import World, group
from ppcl_train.engine.files import read_content
from ppcl_train.engine.provenance import signed

_NOTE = "note.json"
# Bytes of a file of one process, about: a file is put together in host memory before it is written.
FILE_BYTES = 1 << 30


def state_folder(folder: Path, stage: str) -> Path:
    """Return where the training loop of a stage keeps its states until the stage is done."""
    return folder / f"{stage}.state"


def newest(folder: Path, stage: str) -> Path | None:
    """Return the newest whole state of a stage, or of a part of one; None if there is none."""
    return max((path for path in state_folder(folder, stage).glob("[0-9]*")), default=None)


def saved_steps(folder: Path, stage: str) -> tuple[int, int]:
    """Return the steps that a stage has saved, and the steps in all, over its own loop and those of its parts.

    A part writes its log under the name ``stage.part``. It may be asked at any time: 0 of 0 where nothing is saved, or
    where a state is deleted at this moment.
    """
    step = of = 0
    for home in _homes(folder, stage):
        found = newest(folder, home.name.removesuffix(".state"))
        try:
            note = read_content(found / _NOTE) if found else {"step": 0, "of": 0}
        except ValueError:
            continue
        step, of = step + note["step"], of + note["of"]
    return step, of


def delete_states(folder: Path, stage: str) -> None:
    """Delete the states of a stage and of its parts."""
    for home in _homes(folder, stage):
        shutil.rmtree(home)


def _homes(folder: Path, stage: str) -> list[Path]:
    return sorted({*folder.glob(f"{stage}.state"), *folder.glob(f"{stage}.*.state")})


class Saves:
    """The states of one loop, by torch's distributed checkpoints; every process of a world calls every method.

    Args:
        folder: the run folder, which all processes see.
        stage: of the loop, as its log names it.
        world: the processes whose parameters are one state. Tensors of one name are the same in all of them, or shards
            of one (`DTensor`); a name may be in one process alone.
        background: whether training goes on while a state is written. It is copied to host memory first. None: where
            the state lies on a GPU; on a CPU a copy and a thread would take the memory and the core that trains.
    """

    def __init__(self, folder: Path, stage: str, world: World, background: bool | None = None) -> None:
        self._folder, self._stage, self._world = state_folder(folder, stage), stage, world
        self._background = world.device.type == "cuda" if background is None else background
        self._pending: Future[Any] | None = None
        self._thread = ThreadPoolExecutor(1)
        self._begun = time.monotonic()

    @property
    def age(self) -> float:
        """Seconds since the last state was begun to be written, or the loop began."""
        return time.monotonic() - self._begun

    def newest(self) -> Path | None:
        """The newest whole state, the same in all processes."""
        return self._world.agree(newest(self._folder.parent, self._stage))

    def read_note(self, state: Path) -> dict[str, Any]:
        """Read the note of a state.

        Raises:
            ValueError: it is missing, cut or altered.
        """
        return read_content(state / _NOTE)

    def write(self, step: int, tensors: Mapping[str, torch.Tensor], note: Mapping[str, Any]) -> None:
        """Write a state after some steps, or begin to.

        Args:
            tensors: by name; those of every process its own, of at least one dimension.
            note: JSON, the same in all processes.

        Raises:
            ValueError: this state, or the last one, cannot be written.
        """
        self.finish()
        self._begun = time.monotonic()
        partial = self._folder / ".partial"
        if self._world.is_main:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            write_json(partial / _NOTE, signed(note))
        writer = HuggingFaceStorageWriter(str(partial), self._files(tensors), save_distributed=True)
        with _of_one_line(f"{self._folder} cannot be written", "; what was there before is kept"):
            if self._background:
                begun: Any = async_save(dict(tensors), storage_writer=writer, **self._processes)
                self._pending = self._thread.submit(lambda: self._commit(step, begun.result()))
                return
            save(dict(tensors), storage_writer=writer, **self._processes)
            self._commit(step)

    def finish(self) -> None:
        """Return once the last state is written.

        Raises:
            ValueError: it cannot be.
        """
        if self._pending is not None:
            pending, self._pending = self._pending, None
            with _of_one_line(f"{self._folder} cannot be written", "; what was there before is kept"):
                pending.result()

    def _commit(self, step: int, _: Any = None) -> None:
        """Have the state that every process has written take the place of the one before it."""
        if self._world.is_main:
            done = self._folder / f"{step:09d}"
            shutil.rmtree(done, ignore_errors=True)
            (self._folder / ".partial").rename(done)
            for other in self._folder.glob("[0-9]*"):
                if other != done:
                    shutil.rmtree(other)

    def forms(self, state: Path) -> dict[str, tuple[torch.Size, torch.dtype]]:
        """List shape and dtype of every tensor of a state.

        Raises:
            ValueError: a file of it is cut.
        """
        with _of_one_line(f"{state} is not whole", ": delete it, and the stage begins anew"):
            found = HuggingFaceStorageReader(str(state)).read_metadata().state_dict_metadata
        tensors = {name: each for name, each in found.items() if isinstance(each, TensorStorageMetadata)}
        return {name: (each.size, each.properties.dtype) for name, each in tensors.items()}

    def read(self, state: Path, into: Mapping[str, torch.Tensor]) -> None:
        """Read tensors in place, however the processes that wrote them had divided them.

        Raises:
            ValueError: a file is cut.
        """
        with _of_one_line(f"{state} is not whole", ": delete it, and the stage begins anew"):
            reader = HuggingFaceStorageReader(str(state))
            load(dict(into), storage_reader=reader, **self._processes)

    @property
    def _processes(self) -> dict[str, Any]:
        # A group of its own: a thread that writes must not come between collectives of training.
        alone = self._world.size == 1
        return {"no_dist": True} if alone else {"process_group": group("saving")}

    def _files(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, int]:
        """The number of the file that each tensor goes into, of all processes; every process writes its own."""
        sizes = self._world.union({name: tensor.numel() * tensor.element_size() for name, tensor in tensors.items()})
        numbers, total = {}, 0
        for name in sorted(sizes):
            numbers[name] = 1 + total // (FILE_BYTES * self._world.size)
            total += sizes[name]
        return numbers


class _of_one_line:  # a context manager, used as a function
    """Turn what torch and safetensors raise into a ValueError of one line."""

    def __init__(self, what: str, end: str) -> None:
        self._what, self._end, self._warnings = what, end, warnings.catch_warnings()

    def __enter__(self) -> None:
        self._warnings.__enter__()
        # Of one process alone it is said each time.
        warnings.filterwarnings("ignore", message="torch.distributed is ")

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        self._warnings.__exit__(kind, error, trace)
        causes = [error]
        if isinstance(error, CheckpointException):
            causes = [each for each, _ in error.failures.values()]
        for cause in causes:
            if isinstance(cause, OSError | SafetensorError | RuntimeError | ValueError | json.JSONDecodeError):
                raise ValueError(f"{self._what}: {one_line(cause)}{self._end}") from None
