"""The lock of a run folder: one process writes it at a time."""

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


def is_follower() -> bool:
    """Whether this process was launched together with others and is not the first of them."""
    return int(os.environ.get("RANK", "0")) > 0


def _lock_file(folder: Path) -> Path:
    return folder / ".lock"


def _lock(file: Any) -> bool:
    """Take a lock that is freed when the file is closed; returns false if another process holds it."""
    try:
        import fcntl
    except ImportError:
        # Windows has no fcntl: there, run folders are not locked.
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
