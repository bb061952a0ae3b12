"""Checkpoints that lie elsewhere: in other layouts, or in pieces. Nothing is written, and nothing held."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ppcl_rt.checkpoint.composed import ComposedCheckpoint
from ppcl_rt.checkpoint.headers import Header
from ppcl_rt.checkpoint.reader import Checkpoint
from ppcl_rt.planning.catalog import Catalog


class Stored(NamedTuple):
    """A tensor that lies somewhere.

    Attributes:
        shape: known before it is read.
        read: reads it, and converts it if need be.
    """

    shape: tuple[int, ...]
    read: Callable[[], torch.Tensor]

    @classmethod
    def held(cls, tensor: torch.Tensor) -> Stored:
        """One that is in memory, or mapped into it."""
        return cls(tuple(tensor.shape), lambda: tensor)

    @classmethod
    def in_checkpoint(cls, source: Checkpoint, name: str) -> Stored:
        """One of a checkpoint folder."""
        return cls(source.shape(name), lambda: source.read(name))

    def rounded(self, dtype: torch.dtype) -> Stored:
        """The same, read in a dtype if it is of floats."""

        def read() -> torch.Tensor:
            tensor = self.read()
            return tensor.to(dtype) if tensor.is_floating_point() else tensor

        return Stored(self.shape, read)


class ConvertedCheckpoint(ComposedCheckpoint):
    """What lies in another layout, or in several places, under the names that a checkpoint of ours has.

    Attributes:
        folder: where the source lies, as messages name it.
        config, catalog: as of `Checkpoint`; the catalog has no checksums.
        notes: what a person who converts it should know, a line each.
    """

    def __init__(
        self,
        folder: Path,
        config: Mapping[str, Any],
        catalog: Catalog | None,
        tensors: Mapping[str, Stored],
        notes: tuple[str, ...] = (),
    ) -> None:
        # Not `Checkpoint.__init__`, which reads a folder of our layout.
        self.folder, self.config, self.catalog, self.notes = folder, dict(config), catalog, notes
        self._tensors = dict(tensors)
        self._stored = {name: name for name in tensors}
        self._files = {name: Header(folder, stored.shape, "") for name, stored in tensors.items()}
        self._compose()

    def stored(self, names: Iterable[str]) -> dict[str, Stored]:
        """Tensors as they lie there, by their names there."""
        return {name: self._tensors[name] for name in names}

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor.

        Raises:
            ValueError: there is no such tensor.
        """
        if name not in self and name not in self._stored:
            raise ValueError(f"{self.folder} holds no {name}: fetch it again")
        return super().shape(name)

    def read_stored(self, stored: str) -> torch.Tensor:
        """See `Checkpoint.read_stored`."""
        return self._tensors[stored].read()
