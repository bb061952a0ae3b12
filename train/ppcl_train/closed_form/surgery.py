"""Optimal brain surgery: input units of linear layers are removed, and the remaining weights compensate.

Hassibi & Stork 1993. ``H`` stands for the inverse covariance of the inputs, ``W`` for the current weights. Removing the
unit ``j`` costs ``W_j H_jj^-1 W_j^T`` and leaves the weights ``W - W_j H_jj^-1 H_j``, which is the least-squares
solution for the units that remain. The biases keep the mean outputs as they were.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ppcl_rt.convert.low_rank import Affine


def eliminate(
    layers: Sequence[tuple[Any, torch.Tensor]], units: int, counts: Sequence[int], ridge: float
) -> tuple[torch.Tensor, list[dict[int, Affine]]]:
    """Remove input units of linear layers one after the other, always the unit that costs least.

    Args:
        layers: linear layers that share their units, each with the Gram matrix of its inputs and a constant
            (`LeastSquares.gram`). The cost of a unit is the sum over the layers, each relative to its own output.
        units: number of units; a unit is a run of adjacent inputs.
        counts: numbers of remaining units for which weights are wanted.
        ridge: added to the variance of each input, as a share of the mean variance. The ridge pulls towards the
            original weights.

    Returns:
        The rank order ``[units]``; and for each layer, by count, its weight ``[out, count * inputs of a unit]`` with
        columns in rank order, and its bias.
    """
    remaining = torch.ones(units, dtype=torch.bool)
    surgeries = [_LayerSurgery(layer, gram, units, ridge) for layer, gram in layers]
    removed: list[int] = []
    weights: list[dict[int, torch.Tensor]] = [{} for _ in layers]
    least = min(counts, default=units)
    cost = torch.stack([surgery.cost() for surgery in surgeries]).sum(0).cpu()
    while len(removed) < units - least:
        unit = int(torch.where(remaining, cost, torch.inf).argmin())
        remaining[unit] = False
        removed.append(unit)
        for surgery in surgeries:
            surgery.remove(unit)
        cost = torch.stack([surgery.cost() for surgery in surgeries]).sum(0).cpu()
        if units - len(removed) in counts:
            for surgery, by_count in zip(surgeries, weights, strict=True):
                by_count[units - len(removed)] = surgery.weight.clone()
    best = torch.where(remaining, cost, -torch.inf).argsort(descending=True, stable=True)[:least]
    order = torch.tensor([*best.tolist(), *reversed(removed)])
    return order, [
        {count: surgery.finish(weight, order[:count]) for count, weight in by_count.items()}
        for surgery, by_count in zip(surgeries, weights, strict=True)
    ]


class _LayerSurgery:
    """One layer of `eliminate`: its weights ``[out, units * e]``, e inputs a unit, and the inverse covariance."""

    def __init__(self, layer: Any, gram: torch.Tensor, units: int, ridge: float) -> None:
        self.units = units
        self.original, self.bias = layer.weight.detach().double(), layer.bias.detach().double()
        self.mean = gram[:-1, -1] / gram[-1, -1]
        covariance = gram[:-1, :-1] / gram[-1, -1] - torch.outer(self.mean, self.mean)
        # The floor keeps the matrix regular where no input varies.
        added = ridge * covariance.diagonal().mean().clip(min=1e-12)
        covariance = covariance + added * torch.eye(len(covariance)).to(covariance)
        self.scale = (self.original @ covariance * self.original).sum().clip(min=1e-300)
        self.inverse = torch.linalg.inv(covariance)
        self.weight = self.original.clone()

    def cost(self) -> torch.Tensor:
        """Compute what the removal of each unit would cost ``[units]``, relative to the layer's mean squared output."""
        e = self.original.shape[1] // self.units
        own = self.inverse.unflatten(0, (self.units, e)).unflatten(2, (self.units, e))
        own = own.diagonal(dim1=0, dim2=2).permute(2, 0, 1)  # [units, e, e]
        weight = self.weight.unflatten(1, (self.units, e))
        # The block of a removed unit is zero and has no inverse: the identity takes its place.
        removed = own.diagonal(dim1=1, dim2=2).sum(1) == 0
        own = torch.where(removed[:, None, None], torch.eye(e).to(own), own)
        return torch.einsum("oue,uef,ouf->u", weight, torch.linalg.inv(own), weight) / self.scale

    def remove(self, unit: int) -> None:
        """Remove a unit and let the other weights compensate."""
        e = self.original.shape[1] // self.units
        own = slice(unit * e, (unit + 1) * e)
        change = torch.linalg.solve(self.inverse[own, own], self.inverse[own])  # H_jj^-1 H_j
        self.weight -= self.weight[:, own] @ change
        self.inverse -= self.inverse[:, own] @ change
        # Rounding would leave values near zero, which `cost` could not tell from a unit that remains.
        self.weight[:, own] = 0
        self.inverse[own] = 0
        self.inverse[:, own] = 0

    def finish(self, weight: torch.Tensor, kept: torch.Tensor) -> Affine:
        """Put the columns of the kept units into rank order, and find the bias that preserves the mean output."""
        e = self.original.shape[1] // self.units
        columns = (kept[:, None] * e + torch.arange(e)).flatten()
        return weight[:, columns].contiguous(), self.bias + (self.original - weight) @ self.mean
