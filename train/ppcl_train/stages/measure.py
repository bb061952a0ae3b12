"""The stage *measure*: the loss and the sketch of each choice of the recovered checkpoint alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from ppcl_rt import Catalog
from ppcl_train.config.settings import RunConfig
from ppcl_train.engine.distributed import join
from ppcl_train.engine.files import stored_in, write_json, write_tensors
from ppcl_train.engine.log import Log
from ppcl_train.stages import recover
from ppcl_train.stages.assembly import assembled
from ppcl_train.stages.sensitivities import sensitivities
from ppcl_train.stages.trained import opened_as_factors

OUTPUT = "sensitivities.json"
# The sketches, rows in the order of the catalog's choices.
SKETCHES = "sketches.safetensors"
# What the stage adds to a catalog.
MEASURED = ("blocks", "students", "text_runs", "edges", "sketch")


def measure(run: RunConfig, folder: Path) -> None:
    """Measure the recovered checkpoint; every process of a world calls this.

    Writes ``sketches.safetensors`` and, last, ``sensitivities.json``.
    """
    measured, sketches = take_part(run, folder, Log(folder, "measure"))
    if join().is_main:
        write_tensors(folder / SKETCHES, sketches, {"samples": run.measure.samples})
        write_json(folder / OUTPUT, measured.model_dump(mode="json", include=set(MEASURED)))


def take_part(run: RunConfig, folder: Path, log: Callable[..., None]) -> tuple[Catalog, dict[str, torch.Tensor]]:
    """Measure together with all processes that call this; returns what `sensitivities` does."""
    # In the storage dtype: losses are of what is stored.
    source = assembled(run, folder, stored_in(folder / recover.REFINED), run.storage)
    return sensitivities(opened_as_factors(run, source, trains=False)[0], run, folder, log)
