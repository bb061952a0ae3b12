"""Locks that the operating system frees however a process ends: of a run folder, and of pieces of work in it."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep other processes from writing a run folder; the operating system frees the lock however this process ends.

    Of processes that were launched together (environment variable ``RANK``), only the first takes the lock.

    Raises:
        ValueError: another process writes the folder.
    """
    if is_follower():
        yield
        return
    with _lock_file(folder).open("a+") as file:
        if not _lock(file):
            # Tried twice, because `in_use` holds the lock for a moment.
            time.sleep(0.2)
            if not _lock(file):
                file.seek(0)
                raise ValueError(
                    f"{folder} is being written by process {file.read() or '?'}: wait for it, or choose another --out"
                )
        file.seek(0)
        if file.read() != str(os.getpid()):
            file.truncate(0)
            file.write(str(os.getpid()))
            file.flush()
        yield


def in_use(folder: Path) -> bool:
    """Whether a process is inside `locked` for this folder now."""
    try:
        with _lock_file(folder).open("r+") as file:
            return not _lock(file)
    except OSError:
        return False


@contextlib.contextmanager
def claimed(path: Path) -> Iterator[bool]:
    """Try to claim what a lock file stands for; yields whether this process has it until the ``with`` ends.

    The file is deleted in the end; that of a process that was killed stays, and stands for nothing.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        # Another process may have let go of the file, and deleted it, since it was opened here.
        mine = _lock(file) and _is_at(file, path)
        try:
            yield mine
        finally:
            if mine:
                delete(path)


@contextlib.contextmanager
def attended(path: Path) -> Iterator[None]:
    """Be one of the processes that have to do with a lock file (`is_attended`); the last of them deletes it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        _lock(file, shared=True)
        try:
            yield
        finally:
            if _lock(file):
                delete(path)


def is_attended(path: Path) -> bool:
    """Whether a process is inside `attended` for this file now."""
    try:
        with path.open("r") as file:
            return not _lock(file)
    except OSError:
        return False


def delete(path: Path) -> None:
    """Delete a lock file, if it is there."""
    # Windows deletes no file that is open.
    with contextlib.suppress(OSError):
        path.unlink()


def is_follower() -> bool:
    """Whether this process was launched together with others and is not the first of them."""
    return int(os.environ.get("RANK", "0")) > 0


def _lock_file(folder: Path) -> Path:
    return folder / ".lock"


def _is_at(file: Any, path: Path) -> bool:
    """Whether an open file is still the one at a path."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _lock(file: Any, shared: bool = False) -> bool:
    """Take a lock that is freed when the file is closed; returns false if another process holds it.

    Args:
        shared: with others that want it shared; waits for one that has it alone.
    """
    try:
        import fcntl
    except ImportError:
        # Windows has no fcntl: there, nothing is locked.
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_SH if shared else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
