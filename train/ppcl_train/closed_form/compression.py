"""The least rank at which a matrix may be stored, by the error that this adds to outputs."""

from __future__ import annotations

import torch

from ppcl_train.closed_form.least_squares import LeastSquares


def moments(gram: torch.Tensor, centred: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the second moments of inputs ``[D, D]``, and their means ``[D]``.

    Args:
        gram: `LeastSquares.gram`.
        centred: about the means, for a layer whose bias can make up for them.
    """
    mean = gram[:-1, -1] / gram[-1, -1]
    second = gram[:-1, :-1] / gram[-1, -1]
    return (second - torch.outer(mean, mean), mean) if centred else (second, mean)


def truncated(
    matrix: torch.Tensor, second: torch.Tensor | None, most: float, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Find the two factors of least rank whose product is near enough to a matrix on some inputs.

    The best map of rank r is ``U U^T M`` with the first r left singular vectors ``U`` of ``M C^(1/2)``, as in
    `ppcl_rt.convert.low_rank`; what it loses is the sum of the other squared singular values.

    Args:
        matrix: M ``[rows, columns]``.
        second: second moments C of the inputs ``[columns, columns]``; None for the identity.
        most: the largest mean squared error of the output, summed over its entries.
        dtype: that factors are stored in.

    Returns:
        ``[rows, r]`` and ``[r, columns]``; None where two factors would not be smaller than the matrix.
    """
    matrix = matrix.double()
    weighted = matrix if second is None else matrix @ second.to(matrix)
    values, vectors = torch.linalg.eigh(weighted @ matrix.T)
    # Ascending: what is lost by leaving out the first n.
    lost = values.clip(min=0).cumsum(0)
    rank = max(1, int((lost > most).sum()))
    if rank * sum(matrix.shape) >= matrix.numel():
        return None
    up = vectors[:, -rank:].flip(1)
    return up.to(dtype).contiguous(), (up.T @ matrix).to(dtype).contiguous()


def output_error(change: torch.Tensor, second: torch.Tensor) -> float:
    """Mean squared output of a matrix ``[rows, columns]`` on inputs with some second moments, summed over the rows."""
    change = change.to(second)
    return float(((change @ second) * change).sum().clip(min=0))


def truncated_map(
    fit: LeastSquares,
    rows: slice,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    share: float,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Find the factors of a linear map that add at most a share of the error that the map itself makes.

    Args:
        fit: what the map was fitted from.
        rows: of the fit that are the map's.
        weight, bias: of the map.
        share: of its error.
        dtype: that factors are stored in.
    """
    second, _ = moments(fit.gram, centred=bias is not None)
    return truncated(weight, second, share * fit.error(weight, bias, rows), dtype)
