"""Least squares over a stream of rows: memory does not grow with the number of rows."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

# Rows that are multiplied in one product, before they are added to the sums in float64.
_ROWS = 8192


class LeastSquares:
    """Regression of ``y [n, P]`` on ``x [n, D]`` and a constant, from rows that arrive in portions.

    Holds ``sum of (x', 1)(x', 1)^T``, ``sum of y' (x', 1)^T`` and ``sum of y'^2`` ``[P]``, in float64; ``x'`` and
    ``y'`` are less the means of the first rows (`shifts`). Products of at most 8,192 rows are computed in float32 (of
    rows in float64: in float64), never in TF32, and added in float64. Without the shifts, rounding would be relative to
    means, which covariances do not have: inputs of mean 100 and deviation 1 would lose four of the seven digits.

    At 12,288 inputs the sums take 1.21 GB, and 0.6 GB more while rows are added.
    """

    def __init__(self, inputs: int, outputs: int = 0) -> None:
        self.shifts: tuple[torch.Tensor, torch.Tensor] | None = None
        self._gram = torch.zeros(inputs + 1, inputs + 1, dtype=torch.float64)
        self._cross = torch.zeros(outputs, inputs + 1, dtype=torch.float64)
        self._squares = torch.zeros(outputs, dtype=torch.float64)

    @torch.no_grad()
    def add(self, x: torch.Tensor, y: torch.Tensor | None = None, weight: torch.Tensor | None = None) -> None:
        """Add n rows.

        Args:
            x: inputs ``[n, D]``.
            y: outputs ``[n, P]``; None where the Gram matrix alone is of interest.
            weight: factor ``[n]`` on the squared error of each row; None for 1.
        """
        if not len(x):
            return
        y = x[:, :0] if y is None else y
        dtype = torch.promote_types(x.dtype, torch.float32)
        if self.shifts is None:
            self.shifts = x.mean(0, dtype=dtype), y.mean(0, dtype=dtype)
            self._gram, self._cross, self._squares = (
                held.to(x.device) for held in (self._gram, self._cross, self._squares)
            )
        root = torch.ones_like(x[:, 0], dtype=dtype) if weight is None else weight.to(dtype).sqrt()
        with _exact(x.device):
            for portion in (slice(start, start + _ROWS) for start in range(0, len(x), _ROWS)):
                self._add(x[portion].to(dtype), y[portion].to(dtype), root[portion, None])

    def _add(self, x: torch.Tensor, y: torch.Tensor, root: torch.Tensor) -> None:
        assert self.shifts is not None, "`add` sets them"
        x, y = ((each - shift) * root for each, shift in zip((x, y), self.shifts, strict=True))
        self._gram[:-1, :-1] += x.T @ x
        sums = (x * root).sum(0, dtype=torch.float64)
        self._gram[-1, :-1] += sums
        self._gram[:-1, -1] += sums
        self._gram[-1, -1] += root.double().square().sum()
        if len(self._cross):
            self._cross[:, :-1] += y.T @ x
            self._cross[:, -1] += (y * root).sum(0, dtype=torch.float64)
            self._squares += y.square().sum(0, dtype=torch.float64)

    @property
    def gram(self) -> torch.Tensor:
        """The Gram matrix ``sum of (x, 1)(x, 1)^T``, ``[D + 1, D + 1]`` in float64; a copy."""
        gram = self._gram.clone()
        if self.shifts is not None:
            shift, sums = self.shifts[0].double(), gram[:-1, -1].clone()
            gram[:-1, :-1].addr_(shift, sums).addr_(sums + gram[-1, -1] * shift, shift)
            gram[:-1, -1] += gram[-1, -1] * shift
            gram[-1, :-1] = gram[:-1, -1]
        return gram

    @property
    def cross(self) -> torch.Tensor:
        """``sum of y (x, 1)^T``, ``[P, D + 1]`` in float64; a copy."""
        cross = self._cross.clone()
        if self.shifts is not None:
            of_x, of_y = (shift.double() for shift in self.shifts)
            cross.addr_(of_y, self._gram[-1])
            cross[:, :-1].addr_(cross[:, -1].clone(), of_x)
        return cross

    def error(self, weight: torch.Tensor, bias: torch.Tensor | None, rows: slice = slice(None)) -> float:
        """Mean squared error of a layer over the rows of data, summed over its outputs.

        Args:
            weight: ``[P', D]``.
            bias: ``[P']``, None for zero.
            rows: the outputs that the layer predicts.
        """
        weight = weight.to(self._gram)
        constant = weight.new_zeros(len(weight)) if bias is None else bias.to(weight)
        if self.shifts is not None:
            of_x, of_y = (shift.double() for shift in self.shifts)
            constant = constant + weight @ of_x - of_y[rows]
        layer = torch.cat([weight, constant[:, None]], 1)
        explained = (layer * self._cross[rows]).sum()
        total = self._squares[rows].sum() - 2 * explained + ((layer @ self._gram) * layer).sum()
        # Rounding may leave less than nothing of what is fitted exactly.
        return float(total.clip(min=0) / self._gram[-1, -1])

    def solve(self, ridge: float, biased: bool = True) -> tuple[torch.Tensor, torch.Tensor]:
        """Solve for the weight ``[P, D]`` and the bias ``[P]``, both in float32.

        Args:
            ridge: see `ridged`.
            biased: False for a bias of zero.
        """
        gram, cross = self.gram, self.cross
        if not biased:
            gram[:-1, -1] = gram[-1, :-1] = cross[:, -1] = 0
        solution = torch.linalg.solve(ridged(gram, ridge), cross.T).T.float()
        return solution[:, :-1].contiguous(), solution[:, -1].contiguous()


@contextlib.contextmanager
def _exact(device: torch.device) -> Iterator[None]:
    """Have products of float32 computed in float32, whatever is set."""
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(precision)


def ridged(gram: torch.Tensor, ridge: float) -> torch.Tensor:
    """Add a ridge to the diagonal of a Gram matrix, except to the last entry, which belongs to the constant.

    Args:
        gram: ``[D + 1, D + 1]``.
        ridge: what is added, as a share of the mean of the first ``D`` diagonal entries.
    """
    diagonal = gram.diagonal().clone()
    diagonal[:-1] += ridge * diagonal[:-1].mean()
    return gram.diagonal_scatter(diagonal)
