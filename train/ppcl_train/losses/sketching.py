"""Count sketches of differences, made batch by batch on the device (`ppcl_rt.planning.sketch`)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch

from ppcl_rt.planning.legal import Sketch
from ppcl_rt.planning.sketch import TENSORS
from ppcl_train.data.calibration import Inputs

# Buckets of a sketch, and the number of choices above which it has more. Of 426 choices, 1,024 buckets gave the loss of
# plans within 0.96 to 1.09, 4,096 within 0.97 to 1.03.
_SMALL, _LARGE, _MANY = 1024, 4096, 1000
# Random bits of a bucket: the largest and the smallest chance of a bucket differ by a share of its width over 2^30.
_BITS = 30


def sketch_for(choices: int, seed: int, bands: int) -> Sketch:
    """Decide on the sketch of so many choices."""
    return Sketch(seed=seed, size=_LARGE if choices > _MANY else _SMALL, bands=bands)


class Sketcher:
    """Sketches differences between outputs of the same batches, with two independent sets of buckets and signs.

    The coordinates of a batch are the elements of its latents. Their buckets and signs stay on the device, 5 bytes an
    element and sketch: 168 MB for 64 samples of 4,096 x 64.

    Args:
        sketch: what is made.
        batches: that differences belong to.
        edges: of the bands of the timestep.
    """

    def __init__(self, sketch: Sketch, batches: Iterable[Inputs], edges: Sequence[float]) -> None:
        self.sketch = sketch
        self._places = [
            [self._place(batch, edges, (sketch.seed, which, number)) for which in range(len(TENSORS))]
            for number, batch in enumerate(batches)
        ]

    def _place(self, batch: Inputs, edges: Sequence[float], seed: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Draw the bucket (int32) and the sign (int8) of every element of a batch; the seed alone decides them."""
        slices = [self.sketch.slice(int(band)) for band in batch.bands(edges)]
        drawn = np.random.default_rng(seed).integers(0, 2 ** (_BITS + 1), batch.x.shape, dtype=np.int64)
        shape = (-1, *[1] * (batch.x.ndim - 1))
        first = np.array([each.start for each in slices]).reshape(shape)
        width = np.array([each.stop - each.start for each in slices]).reshape(shape)
        buckets = first + ((drawn >> 1) * width >> _BITS)
        signs = 1 - 2 * (drawn & 1)
        device = batch.x.device
        return (
            torch.from_numpy(buckets.astype(np.int32)).flatten().to(device),
            torch.from_numpy(signs.astype(np.int8)).flatten().to(device),
        )

    def empty(self, device: torch.device) -> torch.Tensor:
        """Sketches of nothing, ``[2, size]`` in float64: what `add` adds to."""
        return torch.zeros(len(TENSORS), self.sketch.size, dtype=torch.float64, device=device)

    def add(self, sums: torch.Tensor, number: int, weighted: torch.Tensor) -> None:
        """Add a batch to sketches in place.

        Args:
            sums: ``[2, size]``.
            number: of the batch.
            weighted: the difference on it in float64 (`Inputs.weighted`).
        """
        flat = weighted.flatten()
        for row, (buckets, signs) in zip(sums, self._places[number], strict=True):
            row.index_add_(0, buckets, flat * signs)

    def unit_rows(self, sums: torch.Tensor, bands: Sequence[float]) -> np.ndarray:
        """Scale sketches so that a row has norm 1, and a band of it the band's share of a loss.

        Args:
            sums: ``[2, size]``.
            bands: parts of the loss in each band; all zero for a change that changes nothing, whose rows are zero.

        Returns:
            ``[2, size]`` in float64.
        """
        rows, total = sums.cpu().numpy().copy(), sum(bands)
        for band, part in enumerate(bands):
            there = rows[:, self.sketch.slice(band)]
            norms = np.linalg.norm(there, axis=1, keepdims=True)
            there *= np.sqrt(part / total if total else 0.0) / np.where(norms > 0, norms, 1.0)
        return rows
