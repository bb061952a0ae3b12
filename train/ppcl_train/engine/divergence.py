"""When a loss has diverged."""

from __future__ import annotations

import math
from dataclasses import dataclass

# A loss has diverged when its running mean (of about 50 steps) has been above 20 times its lowest for more than 100
# steps on end. Generous: losses fall by orders of magnitude, and the samples of one step change a loss by several
# times. Losses below the floor are rounding errors.
_TIMES_LOWEST, _STEPS, _FLOOR = 20.0, 100, 1e-6
_MEAN_OF = 50


@dataclass
class WatchedLoss:
    """One loss over the steps.

    Attributes:
        count: steps seen.
        mean: the running mean.
        lowest: the lowest running mean so far.
        far_off: for how many steps on end the running mean has been far above the lowest.
    """

    count: int = 0
    mean: float = 0.0
    lowest: float = 0.0
    far_off: int = 0

    def take(self, loss: float) -> str:
        """Take in the loss of a step; returns what is wrong with it, or ``""``."""
        if not math.isfinite(loss):
            return f"is {loss}"
        self.count += 1
        self.mean += (loss - self.mean) / min(self.count, _MEAN_OF)
        self.lowest = min(self.lowest, self.mean) if self.count > _MEAN_OF else self.mean
        limit = _TIMES_LOWEST * max(self.lowest, _FLOOR)
        self.far_off = self.far_off + 1 if self.mean > limit else 0
        if self.far_off <= _STEPS:
            return ""
        return f"has been over {limit:.3g} for {_STEPS} steps, {_TIMES_LOWEST:g} times its lowest"
