"""Files of a training run: written beside and renamed, so that a kill at any moment loses no more than a few steps."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a path beside ``path`` to write to, and rename it over ``path`` once it is complete and on disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.partial")
    yield beside
    with beside.open("rb") as written:
        os.fsync(written.fileno())
    beside.replace(path)


def write_json(path: Path, content: Any) -> None:
    """Write JSON, atomically."""
    with replacing(path) as beside:
        beside.write_text(json.dumps(content, indent=1) + "\n")


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor], note: Mapping[str, Any]) -> None:
    """Write tensors and a JSON note into one safetensors file, atomically."""
    held = {name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()}
    with replacing(path) as beside:
        save_file(held, beside, metadata={"note": json.dumps(note)})


def read_note(path: Path) -> dict[str, Any]:
    """Read the note of a file that `write_tensors` wrote."""
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        return json.loads((file.metadata() or {}).get("note", "{}"))


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Read all tensors of a file."""
    return load_file(path)


class Log:
    """Appends one JSON line an event to ``log.jsonl`` and prints it as ``stage  key value  key value``."""

    def __init__(self, path: Path, stage: str) -> None:
        self._path, self._stage, self._start = path, stage, time.monotonic()
        path.parent.mkdir(parents=True, exist_ok=True)

    def __call__(self, **values: Any) -> None:
        line = {"stage": self._stage, **values, "seconds": round(time.monotonic() - self._start, 1)}
        with self._path.open("a") as file:
            file.write(json.dumps(line) + "\n")
        shown = "  ".join(f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in line.items())
        print(shown.removeprefix("stage "), flush=True)
