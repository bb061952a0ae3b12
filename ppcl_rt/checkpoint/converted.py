"""Checkpoints in other layouts, read as a checkpoint of one plan: nothing is written, and nothing held."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ppcl_rt.checkpoint.composed import ComposedCheckpoint
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


class ConvertedCheckpoint(ComposedCheckpoint):
    """What lies in another layout, under the names that a checkpoint of ours has.

    Attributes:
        folder: where the source lies.
        config, catalog: as of `Checkpoint`.
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
        self._bases, self._factored = None, {}
        self._whole = {name: name for name in self._tensors}

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor.

        Raises:
            ValueError: there is no such tensor.
        """
        if name not in self._tensors:
            raise ValueError(f"{self.folder} holds no {name}: fetch it again")
        return self._tensors[name].shape

    def read(self, name: str) -> torch.Tensor:
        """Read one tensor.

        Raises:
            ValueError: it is missing or cannot be read.
        """
        self.shape(name)
        return self._tensors[name].read()
