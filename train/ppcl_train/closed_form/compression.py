"""Layers as differences of low rank (`ppcl_rt.checkpoint.composed`): the least rank, by the error that it adds.

The rank is the least at which the squared error that truncation adds to a layer's output, on calibration inputs, stays
below a share of the error that the choice itself makes: of a compensated output against the full one, of a linear map
against what it stands in for. A student is stored as a difference to the block that it was copied from; there the error
is a share of what its training changed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ppcl_rt import LINEAR_MAP
from ppcl_rt.checkpoint.composed import composed
from ppcl_train.closed_form.block_statistics import BlockStatistics
from ppcl_train.closed_form.least_squares import LeastSquares
from ppcl_train.config.settings import RunConfig

Factors = tuple[torch.Tensor, torch.Tensor]


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
    matrix: torch.Tensor,
    second: torch.Tensor | None,
    most: float,
    dtype: torch.dtype,
    most_rank: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Find the two factors of least rank whose product is near enough to a matrix on some inputs.

    The best map of rank r is ``U U^T M`` with the first r left singular vectors ``U`` of ``M C^(1/2)``, as in
    `ppcl_rt.convert.low_rank`; what it loses is the sum of the other squared singular values.

    Args:
        matrix: M ``[rows, columns]``.
        second: second moments C of the inputs ``[columns, columns]``; None for the identity.
        most: the largest mean squared error of the output, summed over its entries.
        dtype: that factors are stored in.
        most_rank: the largest rank, whatever error that leaves; None for any.

    Returns:
        ``[rows, r]`` and ``[r, columns]``; None where two factors would not be smaller than the matrix.
    """
    matrix = matrix.double()
    values, vectors = _left_singular(matrix, second)
    # Ascending: what is lost by leaving out the first n.
    lost = values.clip(min=0).cumsum(0)
    rank = max(1, int((lost > most).sum()))
    rank = rank if most_rank is None else min(rank, most_rank)
    if rank * sum(matrix.shape) >= matrix.numel():
        return None
    up = vectors[:, -rank:].flip(1)
    return up.to(dtype).contiguous(), (up.T @ matrix).to(dtype).contiguous()


def _left_singular(matrix: torch.Tensor, second: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Squared singular values of ``M C^(1/2)``, ascending, and its left singular vectors, in columns."""
    rows, columns = matrix.shape
    if rows <= columns:
        weighted = matrix if second is None else matrix @ second.to(matrix)
        return torch.linalg.eigh(weighted @ matrix.T)
    # By the smaller side: modulations have 18,432 rows and 3,072 columns, which is 200 times the work by the larger.
    image = matrix
    if second is not None:
        variances, axes = torch.linalg.eigh(second.to(matrix))
        image = matrix @ (axes * variances.clip(min=0).sqrt())
    values, right = torch.linalg.eigh(image.T @ image)
    return values, image @ (right / values.clip(min=1e-300).sqrt())


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
    most_rank: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Find the factors of a linear map that add at most a share of the error that the map itself makes.

    Args:
        fit: what the map was fitted from.
        rows: of the fit that are the map's.
        weight, bias: of the map.
        share: of its error.
        dtype, most_rank: as of `truncated`.
    """
    second, _ = moments(fit.gram, centred=bias is not None)
    return truncated(weight, second, share * fit.error(weight, bias, rows), dtype, most_rank)


def student_as_factors(
    run: RunConfig,
    statistics: BlockStatistics,
    tensors: dict[str, torch.Tensor],
    bases: Sequence[Any],
    read_by_modulations: torch.Tensor | None,
) -> None:
    """Store a student's parts as differences to the mean of the blocks that it was copied from, in place.

    The student goes on with weights as they will be read.

    Args:
        statistics: of the student.
        tensors: of the student, in float32.
        bases: the blocks that it was copied from.
        read_by_modulations: ``[n, D]``; None for a block whose modulations are not factored.
    """
    block, dtype = statistics.block, getattr(torch, run.storage)
    of_modulations = None
    if read_by_modulations is not None:
        of_modulations = read_by_modulations.double().T @ read_by_modulations.double() / len(read_by_modulations)
    for part in block.spec.parts if run.compress.share else ():
        base = torch.stack([of.get_submodule(part.path).weight.float() for of in bases]).mean(0)
        change = tensors[f"{part.path}.weight"].to(base) - base
        second = of_modulations if part.factored else None
        if part.path in statistics.inputs:
            second, _ = moments(statistics.inputs[part.path].gram, centred=False)
        energy = change.square().sum().item() if second is None else output_error(change, second)
        factors = truncated(change, second, run.compress.student_share * energy, dtype, run.compress.most_rank)
        if _store(tensors, part.path, factors) and factors is not None:
            block.get_submodule(part.path).weight.copy_(composed(base, *factors))


def store_as_factors(run: RunConfig, statistics: BlockStatistics, tensors: dict[str, torch.Tensor]) -> None:
    """Store replacements of a block as factors, in place, where these are smaller and near enough.

    Args:
        statistics: of the block, its units in stock order.
        tensors: ``replacements.*`` and ``order.*`` of the block.
    """
    spec, share, dtype = statistics.block.spec, run.compress.share, getattr(torch, run.storage)
    for output in spec.outputs if share else ():
        group, unit = output.segment.group, output.segment.unit
        paths = {
            count: f"replacements.{spec.replacement(output.name, count)}" for count in range(spec.groups[group].count)
        }
        for count, path in ((count, path) for count, path in paths.items() if f"{path}.weight" in tensors):
            weight, bias = tensors[f"{path}.weight"], tensors.get(f"{path}.bias")
            if count == LINEAR_MAP:
                map_as_factors(run, statistics.maps[output.name], slice(None), path, tensors)
                continue
            second, mean = moments(statistics.gram(output), centred=bias is not None)
            order = tensors[f"order.{group}"].long().to(second.device)
            ranked = (order[:, None] * unit + torch.arange(unit, device=second.device)).flatten()
            second, mean = second[ranked][:, ranked], mean[ranked]
            whole = statistics.columns(output).weight[:, ranked].to(second)
            columns = weight.shape[1]
            change = weight.to(second) - whole[:, :columns]
            error = output_error(torch.cat([change, -whole[:, columns:]], 1), second)
            factors = truncated(change, second[:columns, :columns], share * error, dtype, run.compress.most_rank)
            if _store(tensors, path, factors) and bias is not None and factors is not None:
                up, down = (factor.to(change) for factor in factors)
                # The bias makes up for the mean of what was left out.
                tensors[f"{path}.bias"] = bias + ((change - up @ down) @ mean[:columns]).to(bias)


def _store(tensors: dict[str, torch.Tensor], path: str, factors: Factors | None) -> bool:
    if factors is None:
        return False
    del tensors[f"{path}.weight"]
    # In float32 as all that stages write; the numbers are those of the storage dtype.
    tensors[f"{path}.up"], tensors[f"{path}.down"] = (factor.float().cpu() for factor in factors)
    return True


def map_as_factors(run: RunConfig, fit: LeastSquares, rows: slice, path: str, tensors: dict[str, torch.Tensor]) -> None:
    """Store a linear map as factors, in place, where these are smaller and near enough.

    Args:
        fit: what the map was fitted from.
        rows: of the fit that are the map's.
        path: of the map among the tensors.
    """
    if share := run.compress.share:
        weight, bias = tensors[f"{path}.weight"], tensors.get(f"{path}.bias")
        dtype, most_rank = getattr(torch, run.storage), run.compress.most_rank
        _store(tensors, path, truncated_map(fit, rows, weight, bias, share, dtype, most_rank))
