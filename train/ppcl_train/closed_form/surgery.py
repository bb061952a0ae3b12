"""Optimal brain surgery: input units of linear layers are removed, and the remaining weights compensate.

Hassibi & Stork 1993. ``H`` stands for the inverse covariance of the inputs, ``W`` for the current weights and ``G`` for
``W^T W``; ``X_u`` are the columns of a unit u. Removing the unit u costs ``tr(H_uu^-1 G_uu)`` and leaves the weights
``W - W_u H_uu^-1 H_u``, which is the least-squares solution for the units that remain. The biases keep the mean outputs
as they were.

The costs need ``H`` and ``G`` alone. With ``H_uu = L L^T``, ``c = L^-1 H_u`` and ``q = L^-1 G_u``, a removal is

    H <- H - c^T c        G <- G - c^T z - z^T c,   z = q - q_u L^-T c / 2

so the two matrices are changed a chunk of units at a time, by products of matrices: within a chunk, only the row of the
unit that goes and the diagonal are brought up to date. Units go in the same order as one at a time, up to rounding.
Weights are solved for at the end, for the wanted counts alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ppcl_rt.convert.low_rank import Affine

# Inputs that a chunk removes. On a CPU of two cores, 3,072 channels take the same time with 32, 64 and 128.
_CHUNK = 64


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
        The rank order ``[units]``, on the CPU; and for each layer, by count, its weight ``[out, count * inputs of a
        unit]`` with columns in rank order, and its bias, both in float64.

    Raises:
        ValueError: the ridge is too small for inputs that depend on one another.
    """
    surgeries = [_LayerSurgery(layer, gram, units, ridge) for layer, gram in layers]
    # The units that remain, and their places in the matrices, which shrink after every chunk.
    places, removed, least = torch.arange(units), list[int](), min(counts, default=units)
    chunk = max(1, min(_CHUNK // surgery.size for surgery in surgeries))
    while len(places) > least:
        left = torch.ones(len(places), dtype=torch.bool)
        for surgery in surgeries:
            surgery.begin(min(chunk, len(places) - least))
        for _ in range(min(chunk, len(places) - least)):
            place = int(torch.where(left, _cost(surgeries), torch.inf).argmin())
            left[place] = False
            removed.append(int(places[place]))
            for surgery in surgeries:
                surgery.remove(place)
        for surgery in surgeries:
            surgery.end(left)
        places = _shrunk(left, places)
    order = torch.tensor([*places[_cost(surgeries).argsort(descending=True, stable=True)].tolist(), *reversed(removed)])
    return order, [surgery.solve(order, counts) for surgery in surgeries]


def _cost(surgeries: Sequence[_LayerSurgery]) -> torch.Tensor:
    return torch.stack([surgery.cost() for surgery in surgeries]).sum(0).cpu()


def _solved(root: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """``root^-1 rows``; a division where a unit is one input, as of MLPs, which have thousands of units."""
    return rows / root if len(root) == 1 else torch.linalg.solve_triangular(root, rows, upper=False)


def _holes(left: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The places to fill among the first ``sum(left)``, and those after them that they are filled from."""
    count = int(left.sum())
    return (~left[:count]).nonzero().flatten(), count + left[count:].nonzero().flatten()


def _shrunk(left: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """The units at the places that are left, as `_LayerSurgery.end` moves them."""
    holes, last = _holes(left)
    places[holes] = places[last]
    return places[: int(left.sum())]


class _LayerSurgery:
    """One layer of `eliminate`, in float64.

    Attributes:
        size: e, the inputs of a unit.
        inverse, energy: H and G ``[m e, m e]`` of the m units that remained before this chunk.
        own, worth: ``H_uu`` and ``G_uu`` ``[m, e, e]``, up to date.
        rows: of each unit that this chunk removed, c and z, one below the other: ``[r, m e]`` each.
    """

    def __init__(self, layer: Any, gram: torch.Tensor, units: int, ridge: float) -> None:
        self.original, self.bias = layer.weight.detach().to(gram), layer.bias.detach().to(gram)
        self.size = self.original.shape[1] // units
        self.mean = gram[:-1, -1] / gram[-1, -1]
        self.covariance = gram[:-1, :-1] / gram[-1, -1]
        self.covariance.addr_(self.mean, self.mean, alpha=-1)
        # The floor keeps the matrix regular where no input varies.
        diagonal = self.covariance.diagonal()
        diagonal += ridge * diagonal.mean().clip(min=1e-12)
        self.scale = (self.original @ self.covariance * self.original).sum().clip(min=1e-300)
        root, failed = torch.linalg.cholesky_ex(self.covariance)
        if failed:
            raise ValueError(f"inputs depend on one another too closely for a ridge of {ridge:g}: raise width.ridge")
        self.inverse = torch.cholesky_inverse(root)
        del root
        self.energy = self.original.T @ self.original
        self._refresh()

    def _refresh(self) -> None:
        """Take the diagonal blocks out of the matrices."""
        units = (len(self.inverse) // self.size, self.size)
        self.own, self.worth = (
            matrix.unflatten(0, units).unflatten(2, units).diagonal(dim1=0, dim2=2).permute(2, 0, 1).clone()
            for matrix in (self.inverse, self.energy)
        )

    def begin(self, removals: int) -> None:
        """Begin a chunk of some removals."""
        self.rows = self.inverse.new_empty(2, removals * self.size, len(self.inverse))
        self.count = 0

    def cost(self) -> torch.Tensor:
        """Compute what the removal of each unit would cost ``[m]``, relative to the layer's mean squared output."""
        if self.size == 1:
            return (self.worth / self.own).flatten() / self.scale
        return torch.linalg.solve(self.own, self.worth).diagonal(dim1=1, dim2=2).sum(1) / self.scale

    def remove(self, place: int) -> None:
        """Remove the unit at a place and let the other weights compensate."""
        e, count = self.size, self.count
        columns = slice(place * e, (place + 1) * e)
        cs, zs = self.rows[:, :count]
        h = self.inverse[columns] - cs[:, columns].T @ cs
        g = self.energy[columns] - cs[:, columns].T @ zs - zs[:, columns].T @ cs
        root, _ = torch.linalg.cholesky_ex(h[:, columns]) if e > 1 else (h[:, columns].sqrt(), None)
        c, q = _solved(root, torch.stack([h, g]))
        half = _solved(root, q[:, columns].T).T / 2
        z = q - half @ c
        self.rows[0, count : count + e], self.rows[1, count : count + e] = c, z
        self.count += e
        cu, zu = (rows.unflatten(1, (-1, e)).transpose(0, 1) for rows in (c, z))
        self.own -= cu.mT @ cu
        both = cu.mT @ zu
        self.worth -= both + both.mT
        # Rounding would leave something near zero, which has no inverse.
        self.own[place], self.worth[place] = torch.eye(e).to(h), 0

    def end(self, left: torch.Tensor) -> None:
        """Bring the matrices up to date, and move what is left to their front."""
        e, count = self.size, int(left.sum()) * self.size
        holes, last = ((of[:, None] * e + torch.arange(e)).flatten().to(self.mean.device) for of in _holes(left))
        self.rows[..., holes] = self.rows[..., last]
        for matrix in (self.inverse, self.energy):
            matrix[:, holes] = matrix[:, last]
            matrix[holes] = matrix[last]
        # Views of what they were: nothing is copied.
        self.inverse, self.energy = self.inverse[:count, :count], self.energy[:count, :count]
        cs, zs = self.rows[..., :count]
        self.inverse.addmm_(cs.T, cs, alpha=-1)
        self.energy.addmm_(cs.T, zs, alpha=-1).addmm_(zs.T, cs, alpha=-1)
        self._refresh()

    def solve(self, order: torch.Tensor, counts: Sequence[int]) -> dict[int, Affine]:
        """Solve for the weights of the first units in rank order, and for the biases that preserve the mean output."""
        ranked = (order[:, None] * self.size + torch.arange(self.size)).flatten().to(self.mean.device)
        ranked = ranked[: max(counts, default=0) * self.size]
        # The leading blocks of a Cholesky factor are the factors of the leading blocks.
        root = torch.linalg.cholesky(self.covariance[ranked[:, None], ranked])
        wanted = self.original @ self.covariance[:, ranked]
        solved = {}
        for columns in (count * self.size for count in counts):
            weight = torch.cholesky_solve(wanted[:, :columns].T, root[:columns, :columns]).T.contiguous()
            lost = self.original @ self.mean - weight @ self.mean[ranked[:columns]]
            solved[columns // self.size] = weight, self.bias + lost
        return solved
