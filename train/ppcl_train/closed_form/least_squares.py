"""Least squares over a stream of rows: memory does not grow with the number of rows."""

from __future__ import annotations

import torch


class LeastSquares:
    """Regression of ``y [n, P]`` on ``x [n, D]`` and a constant, from rows that arrive in portions.

    Holds the Gram matrix ``sum of (x, 1)(x, 1)^T``, ``sum of y (x, 1)^T`` and ``sum of y^2`` ``[P]``, in float64.
    """

    def __init__(self, inputs: int, outputs: int = 0) -> None:
        self.gram = torch.zeros(inputs + 1, inputs + 1, dtype=torch.float64)
        self.cross = torch.zeros(outputs, inputs + 1, dtype=torch.float64)
        self.squares = torch.zeros(outputs, dtype=torch.float64)

    def add(self, x: torch.Tensor, y: torch.Tensor | None = None, weight: torch.Tensor | None = None) -> None:
        """Add n rows.

        Args:
            x: inputs ``[n, D]``.
            y: outputs ``[n, P]``; None where the Gram matrix alone is of interest.
            weight: factor ``[n]`` on the squared error of each row; None for 1.
        """
        x = torch.cat([x, x.new_ones(len(x), 1)], dim=1).double()
        weighted = x if weight is None else x * weight.double()[:, None]
        self.gram, self.cross = self.gram.to(x.device), self.cross.to(x.device)
        self.gram += x.T @ weighted
        if y is not None:
            y = y.double()
            self.cross += y.T @ weighted
            self.squares = self.squares.to(x.device)
            self.squares += (y.square() if weight is None else y.square() * weight.double()[:, None]).sum(0)

    def error(self, weight: torch.Tensor, bias: torch.Tensor | None, rows: slice = slice(None)) -> float:
        """Mean squared error of a layer over the rows of data, summed over its outputs.

        Args:
            weight: ``[P', D]``.
            bias: ``[P']``, None for zero.
            rows: the outputs that the layer predicts.
        """
        constant = weight.new_zeros(len(weight)) if bias is None else bias
        layer = torch.cat([weight, constant[:, None]], 1).to(self.gram)
        total = self.squares[rows].sum() - 2 * (layer * self.cross[rows]).sum() + ((layer @ self.gram) * layer).sum()
        # Rounding may leave less than nothing of what is fitted exactly.
        return float(total.clip(min=0) / self.gram[-1, -1])

    def solve(self, ridge: float) -> tuple[torch.Tensor, torch.Tensor]:
        """Solve for the weight ``[P, D]`` and the bias ``[P]``, both in float32.

        Args:
            ridge: see `ridged`.
        """
        solution = torch.linalg.solve(ridged(self.gram, ridge), self.cross.T).T.float()
        return solution[:, :-1].contiguous(), solution[:, -1].contiguous()


def ridged(gram: torch.Tensor, ridge: float) -> torch.Tensor:
    """Add a ridge to the diagonal of a Gram matrix, except to the last entry, which belongs to the constant.

    Args:
        gram: ``[D + 1, D + 1]``.
        ridge: what is added, as a share of the mean of the first ``D`` diagonal entries.
    """
    diagonal = gram.diagonal().clone()
    diagonal[:-1] += ridge * diagonal[:-1].mean()
    return gram.diagonal_scatter(diagonal)
