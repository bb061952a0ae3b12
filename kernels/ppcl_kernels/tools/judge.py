"""Whether a result is right: every 64 x 64 tile of it against float64, by a limit that is derived.

One wrong tile of 1,728 moves the error over a whole result by a fortieth of its own: so every tile has to pass alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

SIDE = 64
# Half the distance of neighbouring numbers from 1 on: what one rounding moves a value by at most, relative to it.
ROUNDING = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
# How many times a tile's RMS the values are that a rounding on the way can come from.
_SPREAD = 4.0


@dataclass(frozen=True)
class Limit:
    """How far a result may be off, relative to its values.

    Attributes:
        dtype: of the result.
        roundings: to ``dtype`` on the way to a value, that of the result among them. One moves a value by ``ROUNDING``
            at most, 0.4 of that in the RMS.
        terms: of the longest sum in float32. Each addition rounds the sum so far, by 2^-24 of it at most; were all
            of one sign, they would add up to ``terms * 2^-24``.
    """

    dtype: torch.dtype
    roundings: int
    terms: int

    @property
    def value(self) -> float:
        """The RMS error of a tile is under this times its RMS; no error over this times (its value + 4 RMS)."""
        # Integers have to be equal.
        return self.roundings * ROUNDING.get(self.dtype, 0.0) + self.terms * 2.0**-24

    def __str__(self) -> str:
        name = str(self.dtype).removeprefix("torch.")
        return f"{self.value:.1e} ({self.roundings} roundings to {name}, sums of {self.terms} terms in float32)"


def _tiles(x: torch.Tensor) -> torch.Tensor:
    """Cut ``[R, C]`` into ``[r, 64, c, 64]``, with zeros beyond its edges."""
    rows, cols = x.shape
    x = F.pad(x, (0, -cols % SIDE, 0, -rows % SIDE))
    return x.unflatten(1, (-1, SIDE)).unflatten(0, (-1, SIDE))


def judge(got: torch.Tensor, exact: torch.Tensor, limit: Limit) -> dict[str, Any]:
    """Compare a result with its values in float64, tile by tile.

    A tile is 64 tokens of one sample by 64 of what else there is: of ``[B, S, ...]``, or of one sample ``[S, C]``.
    The scale of a tile is its RMS, or that of the whole result where this is larger.

    Returns:
        ``tiles``, ``wrong`` (how many are), ``error_rms`` (of the worst tile, to its scale), ``error_max`` (the
        largest of an element, to (its value + 4 scales)), ``limit``, and ``where`` the worst tile begins.
    """
    if got.shape != exact.shape:
        return {"tiles": 0, "wrong": 1, "where": f"shape {list(got.shape)}, wanted {list(exact.shape)}"}
    got, exact = (t.reshape(*t.shape[:2], -1) if t.dim() > 2 else t.reshape(1, -1, t.shape[-1]) for t in (got, exact))
    overall = exact.double().square().mean().sqrt()
    tiles = wrong = 0
    worst, largest, where = -1.0, 0.0, ""
    # Sample by sample: in float64 a result is four times as large.
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
