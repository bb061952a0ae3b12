"""A teacher's streams on disk, for training that sees the same batches again."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch.utils._pytree import tree_map_only

from ppcl_rt import Interval, Streams
from ppcl_train.data.calibration import Inputs
from ppcl_train.data.streams import VisitInterval, walk
from ppcl_train.engine.distributed import ALONE, World
from ppcl_train.engine.files import read_note, write_tensors


class StreamCache:
    """A folder with a folder for each batch, and in it a file for the streams between every two blocks.

    Each file is replaced as a whole, and a batch counts once all of its files are there, so filling goes on where it
    was stopped. Reads are memory-mapped: only what is asked for comes from the disk. Training always reads the files,
    rounded to ``storage``, so the first visit of a batch is no different from a later one.
    """

    def __init__(self, folder: Path, storage: torch.dtype = torch.bfloat16) -> None:
        self.folder, self.storage = folder, storage

    def __contains__(self, batch: int) -> bool:
        return (self._home(batch) / "context.safetensors").exists()

    def _home(self, batch: int) -> Path:
        return self.folder / f"{batch:06d}"

    def bytes_of(self, batch: int) -> int:
        """Bytes of a batch on disk."""
        return sum(file.stat().st_size for file in self._home(batch).glob("*.safetensors"))

    def fill(
        self, model: Any, batches: Iterable[Inputs], budget: int, world: World = ALONE, writes: bool = True
    ) -> int:
        """Write all streams of batch after batch until the next batch would exceed ``budget`` bytes in all.

        Batches that are there already are left as they are.

        Args:
            model: the dense model.
            batches: in order, from the first.
            budget: bytes.
            world: the processes whose caches are filled alike; each takes part in every pass, so that the model may be
                sharded.
            writes: whether this process writes; false if it reads what another process of ``world`` writes.

        Returns:
            How many batches there are.
        """
        held = 0
        for given in batches:
            if world.any(held not in self) and world.any(not self._add(held, model, given, budget, writes)):
                break
            budget -= self.bytes_of(held)
            held += 1
        return held

    def _add(self, batch: int, model: Any, given: Inputs, budget: int, writes: bool) -> bool:
        """Write a batch if its streams fit into ``budget`` bytes; returns whether they do."""
        depth = len(model.blocks())
        shared: dict[str, Any] = {}

        def keep(number: int, before: Streams, after: Streams, context: dict[str, Any]) -> None:
            if (depth + 1) * sum(stream.numel() for stream in before) * self.storage.itemsize > budget:
                return
            shared.update(context)
            ends = [(number, before)] + [(depth, after)] * (number == depth - 1)
            for block, streams in ends if writes else []:
                tensors = {name: stream.to(self.storage) for name, stream in streams._asdict().items()}
                write_tensors(self._home(batch) / f"{block:03d}.safetensors", tensors, {})

        walk(model, given, keep)
        if shared and writes:
            tensors: dict[str, torch.Tensor] = {}
            form = {name: _flatten(value, name, tensors) for name, value in shared.items()}
            write_tensors(self._home(batch) / "context.safetensors", tensors, {"form": form})
        return bool(shared)

    def read(self, batch: int, block: int) -> Streams:
        """Read the streams that enter a block, in the dtype of storage; ``block`` is the depth for the last output."""
        with safe_open(self._home(batch) / f"{block:03d}.safetensors", framework="pt") as file:
            return Streams(*(file.get_tensor(name) for name in Streams._fields))

    def context(self, batch: int) -> dict[str, Any]:
        """Read the keyword arguments that every block was called with."""
        path = self._home(batch) / "context.safetensors"
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
        return {name: _unflatten(value, tensors) for name, value in read_note(path)["form"].items()}

    def walk_intervals(
        self, batch: int, intervals: Collection[Interval], visit: VisitInterval, device: torch.device
    ) -> None:
        """Visit intervals with what is stored, on a device, in float32."""
        context = tree_map_only(torch.Tensor, lambda tensor: tensor.to(device), self.context(batch))
        for interval in intervals:
            ends = (self.read(batch, block) for block in (interval.first, interval.last + 1))
            before, after = (Streams(*(stream.to(device).float() for stream in streams)) for streams in ends)
            visit(interval, before, after, context)


# Not torch's pytree: what is stored is JSON that does not depend on the version of torch.


def _flatten(value: Any, name: str, tensors: dict[str, torch.Tensor]) -> Any:
    """Move tensors into ``tensors`` under names; returns the rest as JSON, with the names in place of the tensors."""
    if isinstance(value, torch.Tensor):
        tensors[name] = value
        return {"tensor": name}
    if isinstance(value, (tuple, list)):
        return [_flatten(item, f"{name}.{number}", tensors) for number, item in enumerate(value)]
    if isinstance(value, dict):
        return {"items": {key: _flatten(item, f"{name}.{key}", tensors) for key, item in value.items()}}
    json.dumps(value)
    return value


def _unflatten(form: Any, tensors: Mapping[str, torch.Tensor]) -> Any:
    if isinstance(form, dict):
        if "items" in form:
            return {key: _unflatten(item, tensors) for key, item in form["items"].items()}
        return tensors[form["tensor"]]
    return tuple(_unflatten(item, tensors) for item in form) if isinstance(form, list) else form
