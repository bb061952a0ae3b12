"""Files of a run folder: JSON and tensors, replaced as a whole, each with a record of what made it."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from ppcl_rt import files
from ppcl_rt.checkpoint.converted import Stored
from ppcl_rt.files import one_line, replacing
from ppcl_train.engine.provenance import MADE_BY, signed


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON object through `replacing`; inside `making`, with what made it."""
    files.write_json(path, signed(content))


def read_content(path: Path) -> dict[str, Any]:
    """Read what `write_json` was given.

    Raises:
        ValueError: the file is missing, cut or altered.
    """
    with _whole(path):
        content: dict[str, Any] = json.loads(path.read_bytes())
    content.pop(MADE_BY, None)
    return content


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor], note: Mapping[str, Any]) -> None:
    """Write tensors and a JSON note into one safetensors file, as `write_json` does."""
    held = {name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()}
    with replacing(path) as temporary:
        save_file(held, temporary, metadata={"note": json.dumps(signed(note))})


def read_note(path: Path) -> dict[str, Any]:
    """Read the note of a file that `write_tensors` wrote.

    Raises:
        ValueError: the file is missing, cut or altered.
    """
    with _whole(path), safe_open(path, framework="pt") as file:
        note: dict[str, Any] = json.loads((file.metadata() or {}).get("note", "{}"))
    return note


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Read all tensors of a file, or of the files that a list names (`engine.parts`).

    Raises:
        ValueError: a file is missing, cut or altered.
    """
    if path.suffix == ".json":
        files = (read_tensors(path.parent / name) for name in read_content(path)["files"])
        return {name: tensor for held in files for name, tensor in held.items()}
    with _whole(path):
        return load_file(path)


def stored_in(path: Path) -> dict[str, Stored]:
    """List the tensors of a file, or of all files that a JSON file lists, which are read when they are asked for.

    Raises:
        ValueError: a file is missing, cut or altered.
    """
    if path.suffix == ".json":
        files = (stored_in(path.parent / name) for name in read_content(path)["files"])
        return {name: each for listed in files for name, each in listed.items()}

    def read(name: str) -> torch.Tensor:
        with _whole(path), safe_open(path, framework="pt") as file:
            tensor: torch.Tensor = file.get_tensor(name)
        return tensor

    with _whole(path), safe_open(path, framework="pt") as file:
        names = list(file.keys())
        return {name: Stored(tuple(file.get_slice(name).get_shape()), partial(read, name)) for name in names}


@contextlib.contextmanager
def _whole(path: Path) -> Iterator[None]:
    """Turn what a damaged or missing file raises into a ValueError of one line."""
    try:
        yield
    except (SafetensorError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not whole ({one_line(error)}): delete it, and it is made again") from None
    except (OSError, RuntimeError) as error:
        # safetensors.torch raises a RuntimeError for a file that does not exist.
        raise ValueError(f"{path} cannot be read: {one_line(error)}") from None
