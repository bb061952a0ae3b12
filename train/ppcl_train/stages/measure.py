"""The stage *measure*: the loss of each choice of a catalog alone, measured by the runtime itself."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from ppcl_rt import Catalog, Interval, LegalCount, LegalWidths, PlannedBlock
from ppcl_train.config.settings import RunConfig
from ppcl_train.engine.files import read_tensors, write_json
from ppcl_train.engine.log import Log
from ppcl_train.losses.velocity_error import LEAST_LOSS, VelocityError
from ppcl_train.stages.draft import open_draft, write_draft

OUTPUT = "sensitivities.json"
# What the stage adds to a catalog.
MEASURED = ("blocks", "students", "text_runs", "edges")


def _loss(bands: tuple[float, ...]) -> float:
    return max(sum(bands), LEAST_LOSS)


def _measure_widths(
    error: VelocityError, interval: Interval, student: bool, widths: LegalWidths, at_full: tuple[float, ...]
) -> LegalWidths:
    """Measure every count of a block or student alone.

    Args:
        at_full: loss of the block or student at full width, by band; losses of counts are what comes on top of it.
    """

    def measure_count(group: str, units: int) -> LegalCount:
        width = widths.full.replace(**{group: units})
        bands = error.of_block(PlannedBlock(interval=interval, width=width, student=student))
        added = tuple(max(band - least, 0.0) for band, least in zip(bands, at_full, strict=True))
        return LegalCount(units, _loss(added), added)

    return LegalWidths(
        {
            group: (widths.of(group)[0], *(measure_count(group, count.units) for count in widths.of(group)[1:]))
            for group in widths.groups
        }
    )


def sensitivities(model: Any, run: RunConfig, log: Callable[..., None]) -> Catalog:
    """Measure every choice of a model's catalog alone; returns the catalog with these losses."""
    catalog, error = model.catalog, VelocityError(model, run)
    depth = catalog.architecture.depth
    blocks, students, runs = [], [], []
    for n, widths in enumerate(catalog.blocks):
        blocks.append(_measure_widths(error, Interval(n, n), False, widths, (0.0,) * run.measure.bands))
        log(block=n, of=depth)
    for student in catalog.students:
        whole = PlannedBlock(interval=student.interval, width=student.widths.full, student=True)
        bands = error.of_block(whole)
        widths = _measure_widths(error, student.interval, True, student.widths, bands)
        students.append(student.model_copy(update={"loss": _loss(bands), "widths": widths, "bands": bands}))
        log(student=str(student.interval), loss=_loss(bands))
    for text_run in catalog.text_runs:
        kept = [(n, catalog.spec(n).full) for n in range(depth)]
        bands = error.of(catalog.compose(kept, text_runs=[text_run.interval]))
        runs.append(text_run.model_copy(update={"loss": _loss(bands), "bands": bands}))
        log(text_run=str(text_run.interval), loss=_loss(bands))
    measured = {"blocks": tuple(blocks), "students": tuple(students), "text_runs": tuple(runs), "edges": error.edges}
    return catalog.model_copy(update=measured)


def measure(run: RunConfig, folder: Path) -> None:
    """Measure the recovered checkpoint; writes ``draft/`` in the storage dtype and ``sensitivities.json``."""
    tensors = read_tensors(folder / "width.safetensors") | read_tensors(folder / "recovered.safetensors")
    write_draft(run, folder, tensors, narrower=True, dtype=run.storage)
    measured = sensitivities(open_draft(run, folder), run, Log(folder, "measure"))
    write_json(folder / OUTPUT, measured.model_dump(mode="json", include=set(MEASURED)))
