"""How long it takes to measure all choices of a checkpoint: by whole forwards, from their block on, and shared.

    OMP_NUM_THREADS=1 python bench/studies/measuring.py examples/scenes --samples 32

Prints seconds for each way, of the clock and of the processor (of the process that took longest, which is what the
clock would show on a machine with nothing else to do); and how far losses are from those of whole forwards.
"""

from __future__ import annotations

import multiprocessing
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

import ppcl_rt
from ppcl_rt.planning.sketch import choices, measured
from ppcl_train.config.presets import PRESETS
from ppcl_train.config.settings import RunConfig, with_changes
from ppcl_train.losses.sketching import sketch_for
from ppcl_train.losses.velocity_error import LEAST_LOSS, VelocityError
from ppcl_train.stages.sensitivities import plan_with, sensitivities


def _open(checkpoint: str) -> Any:
    torch.set_grad_enabled(False)
    return ppcl_rt.load(checkpoint, dtype=torch.float32, resident="all").requires_grad_(False)


def by_whole_forwards(checkpoint: str, run: RunConfig) -> tuple[float, list[float]]:
    """Seconds, and the loss of each choice."""
    model = _open(checkpoint)
    begun, every = time.process_time(), list(choices(model.catalog))
    error, found = VelocityError(model, run, sketch_for(len(every), run.seed, run.measure.bands)), []
    of_student = ()
    for choice in every:
        if choice.kind == "student" and not choice.group:
            of_student = error.predictions(plan_with(model.catalog, choice))
        against = of_student if choice.group and choice.kind == "student" else ()
        found.append(max(sum(error.change(plan_with(model.catalog, choice), against).bands), LEAST_LOSS))
    return time.process_time() - begun, found


def _work(checkpoint: str, run: RunConfig, folder: Path, ready: Any, seconds: Any) -> None:
    model = _open(checkpoint)
    ready.wait()
    begun, on_clock = time.process_time(), time.perf_counter()
    catalog, _ = sensitivities(model, run, folder, lambda **_: None)
    losses = [each.loss for each in measured(catalog)]
    seconds.put((time.perf_counter() - on_clock, time.process_time() - begun, losses))


def by_queue(checkpoint: str, run: RunConfig, processes: int) -> tuple[float, float, list[float]]:
    """Seconds of the clock and of the processor, and the loss of each choice."""
    context = multiprocessing.get_context("spawn")
    ready, seconds = context.Barrier(processes), context.Queue()
    with tempfile.TemporaryDirectory() as folder:
        given = (checkpoint, run, Path(folder), ready, seconds)
        workers = [context.Process(target=_work, args=given) for _ in range(processes)]
        for worker in workers:
            worker.start()
        found = [seconds.get() for _ in workers]
        for worker in workers:
            worker.join()
    return max(each[0] for each in found), max(each[1] for each in found), found[0][2]


def main(checkpoint: str, samples: Annotated[int, typer.Option(min=1)] = 32, whole: bool = True) -> None:
    """Measure a checkpoint of the scenes in each way."""
    run = with_changes(PRESETS["scenes"], {"measure.samples": samples})
    before, wanted = by_whole_forwards(checkpoint, run) if whole else (float("nan"), None)
    if wanted is not None:
        print(f"{len(wanted)} choices, {samples} samples")
        print(f"whole forwards, one process: {before:.1f} s of the processor", flush=True)
    alone = None
    for processes in (1, 2):
        clock, processor, losses = by_queue(checkpoint, run, processes)
        alone = alone or (clock, processor)
        shares = f"{clock / alone[0]:.2f} and {processor / alone[1]:.2f} of one process"
        print(f"queue, {processes} processes: {clock:.1f} s of the clock, {processor:.1f} s of the processor: {shares}")
        if wanted is not None:
            print(f"  losses differ by {max(abs(a - b) / a for a, b in zip(wanted, losses)):.1e} at most", flush=True)


if __name__ == "__main__":
    typer.run(main)
