"""The velocity error: how far predictions are from the teacher's. The one loss that choices and plans are judged by.

A velocity ``v`` at the noisy latents ``x`` and the timestep ``t`` points at the clean image ``x_0 = x - t v``, so

    squared error    sum |t (v' - v)|^2 = sum |x_0' - x_0|^2      v, x_0 the teacher's; v', x_0' those of a prediction
    signal           sum |t v|^2        = sum |x - x_0|^2
    velocity error   squared error / signal, both over calibration inputs

It is measured as a sampler meets it (`calibration.measured`): both predictions are guided, ``v = u + g (c - u)`` with
the sampler's guidance and negative prompt; the timesteps are those of the sampler's grid; and every sample counts as
the share of the sampler's denoising steps that it stands for. So both sums are means over the denoising steps:

    velocity error = mean over steps of E |t (v' - v)|^2 / mean over steps of E |t v|^2

The factor ``t`` weighs high noise most, as the picture does and as the judge does. What is trained divides the same
squared error by ``sum |x_0|^2`` instead, which exists at ``t = 0`` too.

A band's part is zero where the sampler has no timestep in it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch

from ppcl_rt import Interval, Plan, PlannedBlock
from ppcl_rt.planning.legal import Sketch
from ppcl_train.config.settings import RunConfig
from ppcl_train.data import calibration
from ppcl_train.data.calibration import Inputs
from ppcl_train.data.prefix import HeldStreams
from ppcl_train.data.seeds import Seed
from ppcl_train.losses.sketching import Sketcher

# Losses of choices are recorded as at least this, so that a change that measures as free is still told from the dense
# plan, whose loss is exactly 0. Roundings of float32 alone are about so much.
LEAST_LOSS = 1e-14


def band_edges(bands: int) -> tuple[float, ...]:
    """Timesteps between which equal bands lie, 0 and 1 included; 1 is noise."""
    return tuple(band / bands for band in range(bands + 1))


@dataclass(frozen=True)
class Target:
    """A batch with the clean images that the teacher points at: what predictions are compared with.

    Attributes:
        inputs: the batch.
        clean: ``x_0`` of the teacher, of the shape of the latents.
    """

    inputs: Inputs
    clean: torch.Tensor

    @classmethod
    def of(cls, inputs: Inputs, output: torch.Tensor) -> Target:
        """Take the target from what the teacher put out for a batch."""
        return cls(inputs, inputs.clean(output))

    def difference(self, output: torch.Tensor) -> torch.Tensor:
        """Compute ``x_0' - x_0`` of an output; gradients pass."""
        return self.inputs.clean(output) - self.clean

    def squared_error(self, output: torch.Tensor) -> torch.Tensor:
        """Compute ``|x_0' - x_0|^2`` of an output by element; gradients pass."""
        return self.difference(output).square()

    def data_error(self, output: torch.Tensor) -> torch.Tensor:
        """Compute ``|x_0' - x_0|^2`` of an output by element, ``x_0`` the data and not the teacher's; gradients pass.

        This is the flow-matching loss: of a velocity, ``|t (v' - (noise - x_0))|^2``.
        """
        assert self.inputs.data is not None, "a sampler's trajectory has no data"
        return (self.inputs.clean(output) - self.inputs.data).square()

    def error_by_band(self, output: torch.Tensor, edges: Sequence[float]) -> torch.Tensor:
        """Sum the squared error of an output in each band of the timestep, ``[bands]`` in float64."""
        return self.inputs.banded(self.difference(output), edges)

    def signal_by_band(self, edges: Sequence[float]) -> torch.Tensor:
        """Sum the teacher's signal ``|t v|^2`` in each band of the timestep, ``[bands]`` in float64."""
        return self.inputs.banded(self.inputs.x - self.clean, edges)


class Change(NamedTuple):
    """What a plan changes in the guided prediction.

    Attributes:
        bands: the parts of its loss in each band of the timestep; they sum to the loss.
        sketches: ``[2, size]`` with unit rows, one of each sketch; without rows where none were asked for.
    """

    bands: tuple[float, ...]
    sketches: np.ndarray


class VelocityError:
    """Measures the velocity error of plans of a model, whose dense plan is the teacher.

    The teacher's predictions are computed when they are first needed.

    Args:
        model: everything that plans need is resident.
        run: settings of the run.
        sketch: the sketch to make of what plans change; None for none.
        seed: of the first batch.

    Attributes:
        batches: that are measured on.
        edges: timesteps between which the bands lie (`band_edges`).
    """

    def __init__(
        self, model: Any, run: RunConfig, sketch: Sketch | None = None, seed: Seed = calibration.MEASURE
    ) -> None:
        self._model, self._sketch = model, sketch
        self.edges = band_edges(run.measure.bands)
        with torch.no_grad():
            self.batches = tuple(calibration.measured(run, run.measure.samples, seed, teacher=model))

    @cached_property
    def teacher(self) -> tuple[Target, ...]:
        """What the teacher predicts on every batch."""
        return self.predictions(self._model.catalog.dense)

    @cached_property
    def _signal(self) -> float:
        return float(torch.stack([target.signal_by_band(self.edges) for target in self.teacher]).sum())

    @cached_property
    def _sketcher(self) -> Sketcher | None:
        return Sketcher(self._sketch, self.batches, self.edges) if self._sketch else None

    def _output(self, plan: Plan, number: int, held: HeldStreams | None, block: int) -> Any:
        if held is not None:
            return held.run(plan, block, number)
        with self._model.at(plan=plan):
            return self._model(**self.batches[number].call)[0]

    @torch.no_grad()
    def predictions(self, plan: Plan, held: HeldStreams | None = None, block: int = 0) -> tuple[Target, ...]:
        """What a plan predicts on every batch, to measure other plans against; ``held``, ``block`` as in `change`."""
        return tuple(
            Target.of(batch, self._output(plan, number, held, block)) for number, batch in enumerate(self.batches)
        )

    @torch.no_grad()
    def change(
        self, plan: Plan, against: Sequence[Target] = (), held: HeldStreams | None = None, block: int = 0
    ) -> Change:
        """Measure what a plan changes.

        Args:
            plan: of the model.
            against: predictions that it changes; those of the teacher, unless others are named. The signal is the
                teacher's in either case.
            held: streams of the batches that enter ``block``, before which the plan is dense, or for which ``block`` is
                0; None to run all of the plan.
        """
        errors = torch.zeros(len(self.edges) - 1, dtype=torch.float64)
        sums = self._sketcher.empty(self._model.device) if self._sketcher else torch.zeros(0)
        for number, target in enumerate(against or self.teacher):
            difference = target.difference(self._output(plan, number, held, block))
            errors += target.inputs.banded(difference, self.edges)
            if self._sketcher:
                self._sketcher.add(sums, number, target.inputs.weighted(difference))
        bands = tuple((errors / self._signal).tolist())
        return Change(bands, self._sketcher.unit_rows(sums, bands) if self._sketcher else sums.numpy())

    def of(self, plan: Plan) -> tuple[float, ...]:
        """Measure a plan; returns the part of its velocity error in each band of the timestep. The parts sum to it."""
        return self.change(plan).bands

    def with_block(self, planned: PlannedBlock) -> Plan:
        """The dense plan with one block, or one interval, changed."""
        catalog = self._model.catalog
        others = [n for n in range(catalog.architecture.depth) if n not in planned.interval]
        return catalog.compose([(n, catalog.spec(n).full) for n in others], [planned])

    def with_text_run(self, interval: Interval) -> Plan:
        """The dense plan with one text run."""
        catalog = self._model.catalog
        depth = catalog.architecture.depth
        return catalog.compose([(n, catalog.spec(n).full) for n in range(depth)], text_runs=[interval])

    def of_block(self, planned: PlannedBlock) -> tuple[float, ...]:
        """Measure the dense plan with one block, or one interval, changed; returns what `of` returns."""
        return self.of(self.with_block(planned))
