"""The stage *measure*: the loss and the sketch of each choice of the recovered checkpoint alone."""

from __future__ import annotations

from pathlib import Path

from ppcl_train.config.settings import RunConfig
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
    """Measure the recovered checkpoint.

    Writes ``sketches.safetensors`` and, last, ``sensitivities.json``.
    """
    # In the storage dtype: losses are of what is stored.
    source = assembled(run, folder, stored_in(folder / recover.REFINED), run.storage)
    model, _ = opened_as_factors(run, source, trains=False)
    measured, sketches = sensitivities(model, run, Log(folder, "measure"))
    write_tensors(folder / SKETCHES, sketches, {"samples": run.measure.samples})
    write_json(folder / OUTPUT, measured.model_dump(mode="json", include=set(MEASURED)))
