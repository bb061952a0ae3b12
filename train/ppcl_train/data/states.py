"""What passes through a teacher: calibration inputs, the streams between blocks, and running a block by hand."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import safe_open
from torch import nn

from ppcl_rt import Interval, Streams
from ppcl_train.config.settings import RunConfig
from ppcl_train.data.source import source
from ppcl_train.engine.distributed import ALONE, World, join
from ppcl_train.engine.files import read_note, write_tensors
from ppcl_train.families import base as family

# Seeds of calibration batches start here, so that no stage sees a batch of another or of the teacher's training.
PROBES, STUDENTS, RECOVER, WIDTH, MEASURE = (10_000_000 * stage for stage in range(1, 6))


@dataclass(frozen=True)
class Inputs:
    """A batch of a task.

    Attributes:
        x: noisy latents ``[N, S, C]``.
        t: their timesteps ``[N]`` in [0, 1]; 1 is noise.
        call: all that the transformer is called with.
        predicts: what its output is: ``x_0``, or the velocity ``noise - x_0 = (x - x_0) / t``.
    """

    x: torch.Tensor
    t: torch.Tensor
    call: dict[str, Any] = field(repr=False)
    predicts: Literal["clean", "velocity"] = "velocity"

    @property
    def mask(self) -> torch.Tensor:
        """``[N, S_text]``, true on words."""
        mask: torch.Tensor = self.call["encoder_hidden_states_mask"]
        return mask

    @property
    def weight(self) -> torch.Tensor:
        """What a sample's squared error in the output counts, ``[N]``: that of the `clean` it makes."""
        return torch.ones_like(self.t) if self.predicts == "clean" else self.t.square()

    def clean(self, output: torch.Tensor) -> torch.Tensor:
        """The ``x_0`` that an output points at, ``[N, S, C]``.

        A difference of two of these is ``t`` times the difference of velocities: high noise weighs most, as it does
        for the picture.
        """
        return output if self.predicts == "clean" else self.x - self.t[:, None, None] * output

    def banded(self, difference: torch.Tensor, edges: Sequence[float]) -> torch.Tensor:
        """Sum of squares of ``difference [N, S, C]`` in each band of the timestep between ``edges``, ``[bands]``."""
        squares = difference.double().square().flatten(1).sum(1).cpu()
        bands = torch.bucketize(self.t.double().cpu(), torch.tensor(edges[1:-1], dtype=torch.float64))
        return torch.zeros(len(edges) - 1, dtype=torch.float64).index_add(0, bands, squares)

    def part(self, samples: slice) -> Inputs:
        """Some of the samples."""
        size = len(self.x)
        call = {
            name: value[samples] if isinstance(value, (torch.Tensor, list)) and len(value) == size else value
            for name, value in self.call.items()
        }
        return replace(self, x=self.x[samples], t=self.t[samples], call=call)

    def to(self, device: torch.device) -> Inputs:
        """The same on a device."""
        return replace(self, x=self.x.to(device), t=self.t.to(device), call=_moved(self.call, device))


def inputs(run: RunConfig, size: int, seed: int) -> Inputs:
    """Make a calibration batch on this process's device; (run.seed, seed) alone decides it.

    ``x_t = (1 - t) x_0 + t noise`` at logit-normal timesteps; the transformer is called in the teacher's dtype.
    """
    samples = source(run).samples(size, seed)
    generator = torch.Generator().manual_seed(run.seed * 1_000_003 + seed)
    t = torch.sigmoid(run.time_mean + run.time_std * torch.randn(size, generator=generator))
    x = torch.lerp(samples.latents, torch.randn(samples.latents.shape, generator=generator), t[:, None, None])
    kind, dtype = family.of(run.task), getattr(torch, run.teacher.dtype)
    call = kind.arguments(x.to(dtype), t, samples.embeddings.to(dtype), samples.mask, samples.shape)
    return Inputs(x, t, call, kind.predicts).to(join().device)


def batches(run: RunConfig, samples: int, seed: int) -> Iterator[Inputs]:
    """Calibration batches of at most ``run.batch`` with ``samples`` samples in all."""
    for number, start in enumerate(range(0, samples, run.batch)):
        yield inputs(run, min(run.batch, samples - start), seed + number)


@dataclass(frozen=True)
class Trace:
    """One pass of a teacher.

    Attributes:
        states: ``h_0 .. h_L``; block ``i`` (from 0) maps ``states[i]`` to ``states[i + 1]``.
        context: keyword arguments that every block was called with.
    """

    states: list[Streams]
    context: dict[str, Any] = field(repr=False)


# Called behind a block: (number, its input, its output, keyword arguments that it was called with).
Visit = Callable[[int, Streams, Streams, dict[str, Any]], None]
# Called where a teacher reaches the end of an interval: (the interval, its input, its output, keyword arguments).
VisitInterval = Callable[[Interval, Streams, Streams, dict[str, Any]], None]


@torch.no_grad()
def walk(model: Any, given: Inputs, visit: Visit) -> None:
    """Run the dense model without gradients and call ``visit`` behind every block; nothing is kept."""

    def behind(number: int) -> Callable[..., None]:
        def hook(_: nn.Module, __: Any, kwargs: dict[str, Any], out: tuple[torch.Tensor, torch.Tensor]) -> None:
            context = dict(kwargs)
            before = Streams(context.pop("hidden_states"), context.pop("encoder_hidden_states"))
            context.pop("width", None)
            visit(number, before, Streams(image=out[1], text=out[0]), context)

        return hook

    hooks = [
        block.register_forward_hook(behind(number), with_kwargs=True)
        for number, block in enumerate(model.transformer_blocks)
    ]
    try:
        model(**given.call)
    finally:
        for hook in hooks:
            hook.remove()


def walk_intervals(model: Any, given: Inputs, intervals: Collection[Interval], visit: VisitInterval) -> None:
    """Run the dense model once for all intervals, which may overlap, and visit each as soon as its end is reached.

    An interval's input is held from its first block to its last; no other stream is.
    """
    open_until = {i.first: max(other.last for other in intervals if other.first == i.first) for i in intervals}
    held: dict[int, Streams] = {}

    def behind(number: int, before: Streams, after: Streams, context: dict[str, Any]) -> None:
        if number in open_until:
            held[number] = before
        for interval in intervals:
            if interval.last == number:
                visit(interval, held[interval.first], after, context)
        for first in [first for first in held if open_until[first] <= number]:
            del held[first]

    walk(model, given, behind)


def trace(model: Any, given: Inputs) -> Trace:
    """Run the dense model and keep the streams between blocks."""
    states: list[Streams] = []
    shared: dict[str, Any] = {}

    def keep(_: int, before: Streams, after: Streams, context: dict[str, Any]) -> None:
        states[-1:] = [before, after]
        shared.update(context)

    walk(model, given, keep)
    return Trace(states, shared)


def run_block(block: nn.Module, state: Streams, context: dict[str, Any]) -> Streams:
    """Apply a block at its full width."""
    text, image = block(hidden_states=state.image, encoder_hidden_states=state.text, **context)
    return Streams(image=image, text=text)


class StateCache:
    """A teacher's streams on disk, for training that sees the same batches again.

    A folder a batch, a file a stream; each is written beside and renamed, and a batch counts once all of it is there,
    so filling goes on where it was stopped. Reads are memory-mapped: only what is asked for comes off the disk. What is
    trained on always comes from the files, rounded to ``storage``, so a first visit is no different from a later one.
    """

    def __init__(self, folder: Path, storage: torch.dtype = torch.bfloat16) -> None:
        self.folder, self.storage = folder, storage

    def __contains__(self, batch: int) -> bool:
        return (self._home(batch) / "context.safetensors").exists()

    def _home(self, batch: int) -> Path:
        return self.folder / f"{batch:06d}"

    def bytes_of(self, batch: int) -> int:
        """Bytes on disk of a batch."""
        return sum(file.stat().st_size for file in self._home(batch).glob("*.safetensors"))

    def fill(
        self, model: Any, batches: Iterable[Inputs], budget: int, world: World = ALONE, writes: bool = True
    ) -> int:
        """Write all streams of batch after batch until the next would take more than ``budget`` bytes in all.

        What is there already is left as it is.

        Args:
            world: all whose caches are filled alike; each takes part in every pass, so that the model may be sharded.
            writes: whether this process writes; false where it reads what another of ``world`` writes.

        Returns:
            how many batches there are.
        """
        held = 0
        for given in batches:
            if world.any(held not in self) and world.any(not self._add(held, model, given, budget, writes)):
                break
            budget -= self.bytes_of(held)
            held += 1
        return held

    def _add(self, batch: int, model: Any, given: Inputs, budget: int, writes: bool) -> bool:
        """Write a batch if its streams fit into ``budget`` bytes; says whether they do."""
        depth = len(model.transformer_blocks)
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
        """The streams that come into a block, in the dtype of storage; those behind the last under its number + 1."""
        with safe_open(self._home(batch) / f"{block:03d}.safetensors", framework="pt") as file:
            return Streams(*(file.get_tensor(name) for name in Streams._fields))

    def context(self, batch: int) -> dict[str, Any]:
        """Keyword arguments that every block was called with."""
        path = self._home(batch) / "context.safetensors"
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
        return {name: _unflatten(value, tensors) for name, value in read_note(path)["form"].items()}

    def walk_intervals(
        self, batch: int, intervals: Collection[Interval], visit: VisitInterval, device: torch.device
    ) -> None:
        """Visit intervals from what is stored, on a device, in float32."""
        context = _moved(self.context(batch), device)
        for interval in intervals:
            ends = (self.read(batch, block) for block in (interval.first, interval.last + 1))
            before, after = (Streams(*(stream.to(device).float() for stream in streams)) for streams in ends)
            visit(interval, before, after, context)


def _moved(value: Any, device: torch.device) -> Any:
    if isinstance(value, dict):
        return {name: _moved(item, device) for name, item in value.items()}
    if isinstance(value, tuple):
        return tuple(_moved(item, device) for item in value)
    return value.to(device) if isinstance(value, torch.Tensor) else value


def in_float32(value: Any) -> Any:
    """The same with its real tensors in float32."""
    if isinstance(value, dict):
        return {name: in_float32(item) for name, item in value.items()}
    if isinstance(value, tuple):
        return tuple(map(in_float32, value))
    return value.float() if isinstance(value, torch.Tensor) and value.is_floating_point() else value


def _flatten(value: Any, name: str, tensors: dict[str, torch.Tensor]) -> Any:
    """Put tensors aside under names; the rest, with names for tensors, is JSON."""
    if isinstance(value, torch.Tensor):
        tensors[name] = value
        return {"tensor": name}
    if isinstance(value, (tuple, list)):
        return [_flatten(item, f"{name}.{number}", tensors) for number, item in enumerate(value)]
    json.dumps(value)
    return value


def _unflatten(form: Any, tensors: Mapping[str, torch.Tensor]) -> Any:
    if isinstance(form, dict):
        return tensors[form["tensor"]]
    return tuple(_unflatten(item, tensors) for item in form) if isinstance(form, list) else form
