"""Files that training in the authors' code writes: pickled state dicts, of which tensors alone are read."""

from __future__ import annotations

import pickle
import re
import zipfile
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from ppcl_rt.files import one_line

_NOT_WHOLE = (RuntimeError, EOFError, OSError, ValueError, KeyError, AttributeError, TypeError, IndexError)
# ``k.<name>``, under data-parallel training ``module.k.<name>``.
_ENTRY = re.compile(r"(?:module\.)?(\d{1,5})\.(.+)")

Entries = list[dict[str, torch.Tensor]]


def read_training_file(path: Path, first: str, lists: Collection[str]) -> dict[str, Entries]:
    """Read a file of a depth run (the state dict of a list of blocks) or of a width run (a dict of several such).

    Weights stay on disk, mapped into memory, as far as the file allows it.

    Args:
        first: name of the one list that a file of a depth run holds.
        lists: names of the lists that a file of a width run may hold.

    Returns:
        Of each list the tensors of its entries by name.

    Raises:
        ValueError: it is no such file; nothing in it is ever executed.
    """
    try:
        held = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError:
        raise ValueError(f"{path} holds other things than tensors, which could be programs: it is not read") from None
    except (*_NOT_WHOLE, SafetensorError) as error:
        # torch reads a file whose name says so as safetensors.
        raise ValueError(f"{path} is no file that torch wrote, or not whole: {one_line(error)}") from None
    if not isinstance(held, Mapping) or not held:
        raise ValueError(f"{path} holds no state dict")
    if all(isinstance(value, Mapping) for value in held.values()):
        if unknown := sorted(set(map(str, held)) - set(lists)):
            raise ValueError(f"{path} holds {unknown[0]}; files of a width run hold {', '.join(lists)}")
        return {name: _entries(value, f"{path}: {name}") for name, value in held.items()}
    return {first: _entries(held, str(path))}


def _entries(state: Mapping[Any, Any], where: str) -> Entries:
    """Take the state dict of a list apart."""
    found: dict[int, dict[str, torch.Tensor]] = {}
    for key, tensor in state.items():
        entry = _ENTRY.fullmatch(key) if isinstance(key, str) else None
        if entry is None or not isinstance(tensor, torch.Tensor) or not tensor.is_floating_point():
            raise ValueError(f"{where} holds {key}, wanted tensors k.NAME with k from 0: is it a list's state dict?")
        if entry[2] in found.setdefault(int(entry[1]), {}):
            raise ValueError(f"{where} holds {entry[2]} of entry {entry[1]} twice")
        found[int(entry[1])][entry[2]] = tensor
    if lost := sorted(set(range(len(found))) - set(found)):
        raise ValueError(f"{where} has no entry {lost[0]}, but one {max(found)}")
    return [found[n] for n in range(len(found))]
