"""A training run: a folder of files that are written beside and renamed, and the loop that every stage trains with.

A step depends on the weights and on (seed, step) alone and the whole state is saved, so a run that was killed at any
moment and started again ends with the weights that it would have had.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from ppcl_rt.checkpoint import line
from ppcl_train.distributed import join


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
    with _whole(path), safe_open(path, framework="pt") as file:
        note: dict[str, Any] = json.loads((file.metadata() or {}).get("note", "{}"))
    return note


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Read all tensors of a file."""
    with _whole(path):
        return load_file(path)


@contextlib.contextmanager
def _whole(path: Path) -> Iterator[None]:
    try:
        yield
    except SafetensorError as error:
        raise ValueError(f"{path} is no whole safetensors file ({line(error)}): delete it or bring it back") from None


class Log:
    """Appends one JSON line an event to a run's ``log.jsonl``, and prints it; in the main process alone."""

    def __init__(self, folder: Path, stage: str) -> None:
        self._path, self._stage, self._start = folder / "log.jsonl", stage, time.monotonic()
        folder.mkdir(parents=True, exist_ok=True)

    def __call__(self, **values: Any) -> None:
        """Write down some values."""
        if not join().is_main:
            return
        event = {**values, "seconds": round(time.monotonic() - self._start, 1)}
        with self._path.open("a") as file:
            file.write(json.dumps({"stage": self._stage, **event}) + "\n")
        shown = (f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in event.items())
        print(f"{self._stage:>9}  {'  '.join(shown)}", flush=True)


def cosine(step: int, steps: int, warmup: int) -> float:
    """Share of the peak learning rate at a step: linear up over ``warmup``, then half a cosine down to zero."""
    return min((step + 1) / max(warmup, 1), 0.5 * (1 + math.cos(math.pi * step / steps)))


def train_loop(
    *,
    state_file: Path,
    parameters: Mapping[str, torch.Tensor],
    optimisers: Sequence[torch.optim.Optimizer],
    step_loss: Callable[[int], float],
    steps: int,
    rate: Callable[[int], float],
    save_every: int,
    log: Log,
    log_every: int = 100,
    averages: Mapping[str, torch.Tensor] | None = None,
    after_step: Callable[[int], None] = lambda done: None,
    write: Callable[[Path, Mapping[str, torch.Tensor], Mapping[str, Any]], None] = write_tensors,
) -> None:
    """Train, or go on training from ``state_file``, which is left in place when the loop ends.

    Args:
        parameters: what is trained, by name; changed in place.
        optimisers: over these parameters; the learning rate that each has now is its peak.
        step_loss: ``step -> loss``; computes and backpropagates.
        rate: ``step -> share of the peak learning rate``.
        averages: moving averages that ``after_step`` keeps; saved and restored with the rest.
        after_step: called with the number of steps done.
        write: writes the state; where several processes train, all call it and one of them writes.

    Raises:
        ValueError: the loss is not finite; the state of the last save is kept.
    """
    averages = averages or {}
    peaks = [[group["lr"] for group in optimiser.param_groups] for optimiser in optimisers]
    first = 0
    if state_file.exists():
        held, first = read_tensors(state_file), read_note(state_file)["step"]
        with torch.no_grad():
            for prefix, into in (("model", parameters), ("average", averages)):
                for name, tensor in into.items():
                    tensor.copy_(held[f"{prefix}.{name}"])
        _restore_optimisers(optimisers, parameters, held)
        log(resumed=first)
    mean = math.nan
    for step in range(first, steps):
        for optimiser, rates in zip(optimisers, peaks):
            for group, peak in zip(optimiser.param_groups, rates):
                group["lr"] = peak * rate(step)
        loss = step_loss(step)
        if not math.isfinite(loss):
            raise ValueError(f"the loss is {loss} at step {step}: lower the learning rate; {state_file} is kept")
        for optimiser in optimisers:
            optimiser.step()
            optimiser.zero_grad()
        mean = loss if math.isnan(mean) else 0.98 * mean + 0.02 * loss
        done = step + 1
        after_step(done)
        if done % log_every == 0 or done == steps:
            log(step=done, of=steps, loss=mean)
        if done % save_every == 0 or done == steps:
            state = {f"model.{name}": tensor for name, tensor in parameters.items()}
            state |= {f"average.{name}": tensor for name, tensor in averages.items()}
            write(state_file, state | _optimiser_tensors(optimisers, parameters), {"step": done})


def _optimiser_tensors(
    optimisers: Sequence[torch.optim.Optimizer], parameters: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    return {
        f"optimiser.{name}.{key}": torch.as_tensor(value)
        for optimiser in optimisers
        for name, index in _indices(optimiser, parameters).items()
        for key, value in optimiser.state_dict()["state"].get(index, {}).items()
    }


def _restore_optimisers(
    optimisers: Sequence[torch.optim.Optimizer],
    parameters: Mapping[str, torch.Tensor],
    tensors: Mapping[str, torch.Tensor],
) -> None:
    states: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        if name.startswith("optimiser."):
            parameter, key = name.removeprefix("optimiser.").rsplit(".", 1)
            states.setdefault(parameter, {})[key] = tensor
    for optimiser in optimisers:
        content = optimiser.state_dict()
        content["state"] = {i: states[name] for name, i in _indices(optimiser, parameters).items() if name in states}
        optimiser.load_state_dict(content)


def _indices(optimiser: torch.optim.Optimizer, parameters: Mapping[str, torch.Tensor]) -> dict[str, int]:
    """Numbers under which an optimiser's state dict knows parameters.

    States are stored under names, so that they can be read back by optimisers over other groups of parameters.
    """
    names = {id(parameter): name for name, parameter in parameters.items()}
    return {
        names[id(parameter)]: index
        for group, numbered in zip(optimiser.param_groups, optimiser.state_dict()["param_groups"])
        for parameter, index in zip(group["params"], numbered["params"])
    }
