"""Low rank: linear layers that read the same input, replaced by two thin layers, one after the other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

# Weight and bias of a linear layer.
Affine = tuple[torch.Tensor, torch.Tensor]

# Rows of a weight that are in double precision at once: 100 MB at 3,072 columns.
_ROWS = 4096


class Inputs(NamedTuple):
    """Where the inputs of layers lie, in double precision.

    Attributes:
        mean: ``[D]``.
        root: ``[D, k]``; ``root @ root.T`` is the covariance of the inputs.
    """

    mean: torch.Tensor
    root: torch.Tensor

    @classmethod
    def of(cls, x: torch.Tensor, left_out: float = 0.0) -> Inputs:
        """Of inputs ``[n, D]``, without the directions that hold at most this share of their variance together."""
        x = x.double()
        mean = x.mean(0)
        values, vectors = torch.linalg.eigh((x - mean).T @ (x - mean) / len(x))
        values = values.clip(min=0)
        # In rising order. Strictly less: nothing goes where nothing is to be left out.
        fewer = int((values.cumsum(0) < left_out * values.sum()).sum())
        return cls(mean, (vectors * values.sqrt())[:, fewer:])


class LowRank:
    """The two layers whose product is nearest to some layers on their inputs, for every rank.

    ``W`` stands for the weights of all layers below one another, ``C`` for the covariance of the inputs. The best map
    of rank r is ``U U^T W`` with the first r left singular vectors ``U`` of ``W C^(1/2)`` (Eckart & Young 1936).
    These vectors do not depend on r, so a lower rank is a prefix of a higher one.

    Attributes:
        errors: ``[k + 1, layers]``: at each rank, the squared error of each layer's outputs over their square, both
            means over the inputs.
    """

    def __init__(self, layers: Sequence[Affine], inputs: Inputs, *, relative: bool = False) -> None:
        """Find them.

        Args:
            layers: weight ``[rows, D]`` and bias ``[rows]`` of each, in any dtype.
            inputs: what the layers read.
            relative: whether what is least is the sum of the layers' relative errors, whatever the size of the outputs
                of each; else that of their squared errors.
        """
        self._layers, self._inputs = layers, inputs
        read = torch.cat([inputs.root, inputs.mean[:, None]], dim=1)
        images, means, energies = [], [], []
        for weight, bias in layers:
            image = torch.cat([rows.double() @ read for rows in weight.split(_ROWS)])
            means.append(image[:, -1] + bias.double())
            images.append(image[:, :-1])
            energies.append(images[-1].square().sum() + means[-1].square().sum())
        self._means = means
        energy = torch.stack(energies)
        known = energy > 0
        # Of mean 1 or so, which keeps the sizes of both factors near those of the layers.
        self._scales = (
            torch.where(known, energy[known].mean() / energy, 1).sqrt() if relative else torch.ones_like(energy)
        )
        for image, scale in zip(images, self._scales, strict=True):
            image *= scale
        left, values, _ = torch.linalg.svd(torch.cat(images), full_matrices=False)
        del images
        self._left = left.split([len(mean) for mean in means])
        lost = torch.stack([each.square().sum(0) for each in self._left], dim=1) * values.square()[:, None]
        tails = torch.cat([lost, torch.zeros_like(lost[:1])]).flip(0).cumsum(0).flip(0)
        self.errors = tails / (self._scales.square() * torch.where(known, energy, 1))

    def rank_for(self, error: float) -> int:
        """The lowest rank, 1 or more, at which no layer's relative squared error is larger."""
        return max(1, int((self.errors.amax(1) > error).sum()))

    def factors(self, rank: int) -> tuple[Affine, list[Affine]]:
        """Weight and bias of the first layer (``[rank, D]``), and of the second for each layer (``[rows, rank]``)."""
        mean = self._inputs.mean
        down = mean.new_zeros(rank, len(mean))
        ups = []
        for (weight, _), left, bias, scale in zip(self._layers, self._left, self._means, self._scales, strict=True):
            kept = left[:, :rank]
            for units, rows in zip(kept.split(_ROWS), weight.split(_ROWS), strict=True):
                down += scale * (units.T @ rows.double())
            ups.append((kept / scale, bias))
        return (down, -(down @ mean)), ups
