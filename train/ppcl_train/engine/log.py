"""The log of a run: one JSON line an event in ``log.jsonl``."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ppcl_train.engine.lock import is_follower


class Log:
    """Appends one JSON line an event to a run's ``log.jsonl`` and prints it; of several processes only the first does.

    Attributes:
        folder: the run folder.
        stage: the stage that the lines are about.
    """

    def __init__(self, folder: Path, stage: str) -> None:
        self.folder, self.stage, self._start = folder, stage, time.monotonic()
        self._path, self._silent = folder / "log.jsonl", is_follower()
        folder.mkdir(parents=True, exist_ok=True)
        # A kill may have cut the last line: end it, so that the next event starts a line of its own.
        if not self._silent and self._path.exists() and not self._path.read_bytes().endswith(b"\n"):
            with self._path.open("a") as file:
                file.write("\n")

    def __call__(self, *, shown: bool = True, **values: Any) -> None:
        """Write an event; with ``shown`` also print its values, except mappings."""
        if self._silent:
            return
        event = {**values, "seconds": round(time.monotonic() - self._start, 1)}
        with self._path.open("a") as file:
            file.write(json.dumps({"stage": self.stage, **event}) + "\n")
        if shown:
            say(self.stage, **event)


def say(stage: str, **values: Any) -> None:
    """Print an event of a stage, except mappings."""
    plain = {key: value for key, value in values.items() if not isinstance(value, Mapping)}
    words = (f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in plain.items())
    print(f"{stage:>9}  {'  '.join(words)}", flush=True)


def read_log(folder: Path) -> Iterator[dict[str, Any]]:
    """Yield the events of a run's log, without lines that a kill cut."""
    with contextlib.suppress(FileNotFoundError), (folder / "log.jsonl").open() as file:
        for text in file:
            with contextlib.suppress(json.JSONDecodeError):
                yield json.loads(text)
