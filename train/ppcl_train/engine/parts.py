"""The tensors of a stage in a folder, a file for each part: a part that is there is done, and a kill loses no other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ppcl_train.engine.files import read_tensors, write_json, write_tensors


class Parts:
    """Files of parts, each written once and as a whole, by any process; at the end a list of them.

    Attributes:
        folder: next to the list.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __contains__(self, name: str) -> bool:
        return self._file(name).exists()

    def _file(self, name: str) -> Path:
        return self.folder / f"{name}.safetensors"

    def write(self, name: str, tensors: Mapping[str, torch.Tensor]) -> None:
        """Write the tensors of a part."""
        write_tensors(self._file(name), tensors, {})

    def read(self, name: str) -> dict[str, torch.Tensor]:
        """Read the tensors of a part."""
        return read_tensors(self._file(name))

    def list_in(self, path: Path, names: Sequence[str], note: Mapping[str, Any]) -> None:
        """Write the list of the parts' files, which `read_tensors` and all later stages read, and a note."""
        write_json(path, {**note, "files": [f"{self.folder.name}/{name}.safetensors" for name in names]})
