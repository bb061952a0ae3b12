"""Whether two results of one operation are equal but for roundings, judged tile by tile.

A wrong tile of a large result hardly changes an error over the whole result. So the error of each tile is bounded.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch.utils._pytree import tree_leaves

# Side of the tiles that are judged one by one: no kernel writes a smaller tile.
TILE = 64
# Allowed RMS error of a tile, as a share of the RMS of its values: ten times the error of a few roundings of bfloat16,
# and a tenth of the error of a wrong tile.
TOLERANCE = 0.05


def agree(got: Any, wanted: Any) -> bool:
    """Compare all tensors of two results in tiles of `TILE` tokens x `TILE` features.

    Args:
        got: a tensor, or a tree of tensors: what an implementation gives.
        wanted: the same from plain torch.

    Returns:
        Whether in every tile the RMS of the difference is at most `TOLERANCE` times the RMS of the wanted values. Where
        the values of a tile nearly cancel out, a quarter of the median tile's RMS takes the place of the tile's own.
    """
    tensors = ([t for t in tree_leaves(result) if isinstance(t, torch.Tensor)] for result in (got, wanted))
    return all(_tensors_agree(a, b) for a, b in zip(*tensors, strict=True) if b.numel())


def _tensors_agree(got: torch.Tensor, wanted: torch.Tensor) -> bool:
    if got.shape != wanted.shape:
        return False
    error = _tile_means((got.float() - wanted.float()).square())
    power = _tile_means(wanted.float().square())
    # Comparisons with NaN are false: a result that holds a NaN never agrees. The 16 is the square of "a quarter of".
    return bool((error <= TOLERANCE**2 * torch.maximum(power, power.median() / 16)).all())


def _tile_means(x: torch.Tensor) -> torch.Tensor:
    """Mean of each tile of ``[B, S, D]``, ``[B, S, H, E]`` (whose features are ``H E``) or ``[S, D]``."""
    x = x.reshape(1, *x.shape) if x.dim() < 3 else x
    rows = x.shape[1] if x.dim() > 2 else 1
    return F.avg_pool2d(
        x.reshape(x.shape[0], 1, rows, -1), (min(TILE, rows), TILE), TILE, ceil_mode=True, count_include_pad=False
    )
