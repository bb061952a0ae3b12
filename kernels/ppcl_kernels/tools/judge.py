"""Compare a result with float64, in every tile of 64 x 64, within a derived limit.

In a result of 1,728 tiles, the error of a single wrong tile is a fortieth as large over the whole result as over the
tile. So every tile has to pass alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

SIDE = 64
# The most that one rounding changes a value, relative to the value: half the distance between neighbours above 1.
ROUNDING = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
# Intermediate values, which are rounded too, are taken to be up to this many times the RMS of a tile.
_SPREAD = 4.0


@dataclass(frozen=True)
class Limit:
    """The largest error of a result, relative to its values.

    Attributes:
        dtype: of the result.
        roundings: number of roundings to ``dtype`` on the way to a value, including that of the result. One rounding
            changes a value by at most ``ROUNDING``, and by 0.4 of that in the RMS.
        terms: of the longest sum in float32. Each addition rounds the sum so far by at most 2^-24 of it. If all these
            roundings had the same sign, they would add up to ``terms * 2^-24``.
    """

    dtype: torch.dtype
    roundings: int
    terms: int

    @property
    def value(self) -> float:
        """The limit: of a tile's RMS error to its RMS, and of each error to (the value + 4 RMS of the tile)."""
        # For integers the limit is 0.
        return self.roundings * ROUNDING.get(self.dtype, 0.0) + self.terms * 2.0**-24

    def __str__(self) -> str:
        name = str(self.dtype).removeprefix("torch.")
        return f"{self.value:.1e} ({self.roundings} roundings to {name}, sums of {self.terms} terms in float32)"


def _tiles(x: torch.Tensor) -> torch.Tensor:
    """Cut ``[R, C]`` into tiles ``[r, 64, c, 64]``, with zeros beyond the edges."""
    rows, cols = x.shape
    x = F.pad(x, (0, -cols % SIDE, 0, -rows % SIDE))
    return x.unflatten(1, (-1, SIDE)).unflatten(0, (-1, SIDE))


def judge(got: torch.Tensor, exact: torch.Tensor, limit: Limit) -> dict[str, Any]:
    """Compare a result with its values in float64, tile by tile.

    A tile is 64 tokens of one sample by 64 elements of the other dimensions, of a result ``[B, S, ...]`` or, for one
    sample, ``[S, C]``. The scale of a tile is its RMS, or the RMS of the whole result if that is larger.

    Returns:
        ``tiles``: number of tiles; ``wrong``: number of wrong ones; ``error_rms``: RMS error of the worst tile over its
        scale; ``error_max``: largest error of an element over (its value + 4 scales); ``limit``; ``where``: the place
        of the worst tile.
    """
    if got.shape != exact.shape:
        return {"tiles": 0, "wrong": 1, "where": f"shape {list(got.shape)}, wanted {list(exact.shape)}"}
    got, exact = (t.reshape(*t.shape[:2], -1) if t.dim() > 2 else t.reshape(1, -1, t.shape[-1]) for t in (got, exact))
    overall = exact.double().square().mean().sqrt()
    tiles = wrong = 0
    worst, largest, where = -1.0, 0.0, ""
    # Sample by sample, since float64 takes four times the memory.
    for sample, (part, wanted) in enumerate(zip(got, exact, strict=True)):
        wanted = wanted.double()
        off = (part.double() - wanted).abs().nan_to_num(nan=float("inf"))
        count = _tiles(torch.ones_like(wanted)).sum((1, 3))
        size = (_tiles(wanted.square()).sum((1, 3)) / count).sqrt()
        scale = torch.maximum(size, overall).clamp_min(1e-300)
        rms = (_tiles(off.square()).sum((1, 3)) / count).sqrt() / scale
        high = (_tiles(off) / (_tiles(wanted.abs()) + _SPREAD * scale[:, None, :, None])).amax((1, 3))
        bad = (rms > limit.value) | (high > limit.value)
        tiles, wrong = tiles + bad.numel(), wrong + int(bad.sum())
        largest = max(largest, float(high.max()))
        if float(rms.max()) > worst:
            worst, at = float(rms.max()), int(rms.argmax())
            row, col = at // rms.shape[1] * SIDE, at % rms.shape[1] * SIDE
            where = f"sample {sample}, rows from {row}, columns from {col}"
    return {
        "tiles": tiles,
        "wrong": wrong,
        "error_rms": worst,
        "error_max": largest,
        "limit": limit.value,
        "where": where,
    }
