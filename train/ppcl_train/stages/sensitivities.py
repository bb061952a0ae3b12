"""The loss and the sketch of each choice of a catalog alone, measured by the runtime itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from ppcl_rt import Catalog, Interval, LegalCount, LegalWidths, Plan, PlannedBlock
from ppcl_rt.planning.sketch import TENSORS, choices
from ppcl_train.config.settings import RunConfig
from ppcl_train.losses.sketching import sketch_for
from ppcl_train.losses.velocity_error import LEAST_LOSS, Target, VelocityError


class _Measuring:
    """Measures choices one by one, in the order of `ppcl_rt.planning.sketch.choices`, and keeps their sketches."""

    def __init__(self, model: Any, run: RunConfig) -> None:
        self.catalog: Catalog = model.catalog
        count = sum(1 for _ in choices(self.catalog))
        self.sketch = sketch_for(count, run.seed, run.measure.bands)
        self.error = VelocityError(model, run, self.sketch)
        self._rows: list[np.ndarray] = []

    def measure(self, plan: Plan, against: Sequence[Target] = ()) -> tuple[float, tuple[float, ...]]:
        """Measure a plan with one choice; returns its loss, and the parts of it in each band."""
        change = self.error.change(plan, against)
        self._rows.append(change.sketches.astype(np.float16))
        return max(sum(change.bands), LEAST_LOSS), change.bands

    def widths(
        self, interval: Interval, student: bool, widths: LegalWidths, against: Sequence[Target] = ()
    ) -> LegalWidths:
        """Measure every narrower count of a block or student alone.

        Args:
            against: what the student predicts at full width; its counts lose what they change of that.
        """

        def measure_count(group: str, units: int) -> LegalCount:
            planned = PlannedBlock(interval=interval, width=widths.full.replace(**{group: units}), student=student)
            return LegalCount(units, *self.measure(self.error.with_block(planned), against))

        return LegalWidths(
            {
                group: (widths.of(group)[0], *(measure_count(group, count.units) for count in widths.of(group)[1:]))
                for group in widths.groups
            }
        )

    @property
    def sketches(self) -> dict[str, torch.Tensor]:
        """What was kept, ``[choices, size]`` each, by the name that it has in a checkpoint."""
        rows = np.stack(self._rows) if self._rows else np.zeros((0, len(TENSORS), self.sketch.size), np.float16)
        return {name: torch.from_numpy(rows[:, n].copy()) for n, name in enumerate(TENSORS)}


def sensitivities(model: Any, run: RunConfig, log: Callable[..., None]) -> tuple[Catalog, dict[str, torch.Tensor]]:
    """Measure every choice of a model's catalog alone.

    Returns:
        The catalog with these losses, and the sketches by name.
    """
    measuring, catalog = _Measuring(model, run), model.catalog
    error = measuring.error
    blocks, students, runs = [], [], []
    for n, widths in enumerate(catalog.blocks):
        blocks.append(measuring.widths(Interval(n, n), False, widths))
        log(block=n, of=catalog.architecture.depth)
    for student in catalog.students:
        whole = error.with_block(PlannedBlock(interval=student.interval, width=student.widths.full, student=True))
        loss, bands = measuring.measure(whole)
        widths = measuring.widths(student.interval, True, student.widths, error.predictions(whole))
        students.append(student.model_copy(update={"loss": loss, "widths": widths, "bands": bands}))
        log(student=str(student.interval), loss=loss)
    for text_run in catalog.text_runs:
        loss, bands = measuring.measure(error.with_text_run(text_run.interval))
        runs.append(text_run.model_copy(update={"loss": loss, "bands": bands}))
        log(text_run=str(text_run.interval), loss=loss)
    found = {"blocks": tuple(blocks), "students": tuple(students), "text_runs": tuple(runs)}
    catalog = catalog.model_copy(update={**found, "edges": error.edges, "sketch": measuring.sketch})
    return catalog, measuring.sketches
