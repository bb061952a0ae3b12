"""The velocity error: how far predictions are from the teacher's.

A velocity ``v`` at the noisy latents ``x`` and the timestep ``t`` points at the clean image ``x_0 = x - t v``, so

    squared error    sum |t (v' - v)|^2 = sum |x_0' - x_0|^2      v, x_0 the teacher's; v', x_0' those of a prediction
    signal           sum |t v|^2        = sum |x - x_0|^2
    velocity error   squared error / signal, both over calibration inputs

The factor ``t`` weighs high noise most, as the picture does and as the judge does. What is measured is the velocity
error. What is trained divides the same squared error by ``sum |x_0|^2`` instead, which exists at ``t = 0`` too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ppcl_rt import Plan, PlannedBlock
from ppcl_train.config.settings import RunConfig
from ppcl_train.data import calibration
from ppcl_train.data.calibration import Inputs

# Losses of choices are recorded as at least this, so that a change that measures as free is still told from the dense
# plan, whose loss is exactly 0.
LEAST_LOSS = 1e-9


def band_edges(bands: int) -> tuple[float, ...]:
    """Timesteps between which equal bands lie, 0 and 1 included; 1 is noise."""
    return tuple(band / bands for band in range(bands + 1))


@dataclass(frozen=True)
class Target:
    """A batch with the clean images that the teacher points at: what predictions are compared with.

    Attributes:
        inputs: the batch.
        clean: ``x_0`` of the teacher, ``[N, S, C]``.
    """

    inputs: Inputs
    clean: torch.Tensor

    @classmethod
    def of(cls, inputs: Inputs, output: torch.Tensor) -> Target:
        """Take the target from what the teacher put out for a batch."""
        return cls(inputs, inputs.clean(output))

    def _difference(self, output: torch.Tensor) -> torch.Tensor:
        return self.inputs.clean(output) - self.clean

    def squared_error(self, output: torch.Tensor) -> torch.Tensor:
        """Compute ``|x_0' - x_0|^2`` of an output by element, ``[N, S, C]``; gradients pass."""
        return self._difference(output).square()

    def error_by_band(self, output: torch.Tensor, edges: Sequence[float]) -> torch.Tensor:
        """Sum the squared error of an output in each band of the timestep, ``[bands]`` in float64."""
        return self.inputs.banded(self._difference(output), edges)

    def signal_by_band(self, edges: Sequence[float]) -> torch.Tensor:
        """Sum the teacher's signal ``|t v|^2`` in each band of the timestep, ``[bands]`` in float64."""
        return self.inputs.banded(self.inputs.x - self.clean, edges)


class VelocityError:
    """Measures the velocity error of plans of a model, whose dense plan is the teacher.

    Attributes:
        edges: timesteps between which the bands lie (`band_edges`).
    """

    @torch.no_grad()
    def __init__(self, model: Any, run: RunConfig) -> None:
        self._model = model
        self.edges = band_edges(run.measure.bands)
        batches = list(calibration.batches(run, run.measure.samples, calibration.MEASURE))
        with model.at(plan=model.catalog.dense):
            self._targets = [Target.of(batch, model(**batch.call)[0]) for batch in batches]
        self._signal = float(torch.stack([target.signal_by_band(self.edges) for target in self._targets]).sum())

    @torch.no_grad()
    def of(self, plan: Plan) -> tuple[float, ...]:
        """Measure a plan; returns the part of its velocity error in each band of the timestep. The parts sum to it."""
        with self._model.at(plan=plan):
            errors = [
                target.error_by_band(self._model(**target.inputs.call)[0], self.edges) for target in self._targets
            ]
        return tuple((torch.stack(errors).sum(0) / self._signal).tolist())

    def of_block(self, planned: PlannedBlock) -> tuple[float, ...]:
        """Measure the dense plan with one block, or one interval, changed; returns what `of` returns."""
        catalog = self._model.catalog
        others = [n for n in range(catalog.architecture.depth) if n not in planned.interval]
        return self.of(catalog.compose([(n, catalog.spec(n).full) for n in others], [planned]))
