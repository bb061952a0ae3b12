"""Bytes of tensors that are alive, counted after every operation: the same on every machine and in every run."""

from __future__ import annotations

from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Counts the storages that are created inside ``with LiveBytes() as live:``; ``live.peak`` is their peak in bytes.

    Not counted: what was there before (weights, an optimiser's state), and scratch memory inside one operation.
    """

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation and count the storages that it created."""
        out = func(*args, **(kwargs or {}))
        given = {storage._cdata for storage in map(_storage, tree_leaves((args, kwargs))) if storage is not None}
        self._alive = {key: held for key, held in self._alive.items() if not held[0].expired()}
        for storage in map(_storage, tree_leaves(out)):
            if storage is not None and storage._cdata not in given and storage._cdata not in self._alive:
                self._alive[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self.peak = max(self.peak, sum(size for _, size in self._alive.values()))
        return out


def _storage(value: Any) -> torch.UntypedStorage | None:
    return value.untyped_storage() if isinstance(value, torch.Tensor) else None
