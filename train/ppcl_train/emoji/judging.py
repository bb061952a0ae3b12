"""Judging emoji without a network: which of all pictures is the nearest to the one that was drawn."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from ppcl_train.emoji.artwork import SIDE, Artwork
from ppcl_train.emoji.captions import Caption

# Pixels along the side of the squares whose means are compared.
_CELL = 4
_RESAMPLES = 2000
# Some emoji have the same picture ("artist", "man artist"): as near as the nearest counts as it.
_SAME = 1e-6


class Verdicts(NamedTuple):
    """What was right of each of N pictures, ``[N]`` bool each.

    Attributes:
        exact: the nearest picture is the caption's own.
        top_5: the caption's own is among the nearest five.
        role: the nearest has the caption's role, whatever its gender and tone.
        tone: the nearest has the caption's tones; of captions without any, it has none.
    """

    exact: np.ndarray
    top_5: np.ndarray
    role: np.ndarray
    tone: np.ndarray


class Share(NamedTuple):
    """A share of pictures with its 95 % bootstrap interval."""

    mean: float
    low: float
    high: float

    @classmethod
    def of(cls, right: np.ndarray) -> Share:
        """Average what was right, ``[N]``; the interval is over pictures, with a fixed seed."""
        values = right.astype(np.float64)
        chosen = np.random.default_rng(0).integers(len(values), size=(_RESAMPLES, len(values)))
        low, high = np.quantile(values[chosen].mean(1), (0.025, 0.975))
        return cls(float(values.mean()), float(low), float(high))


class Judge:
    """Compares pictures with all of the artwork."""

    def __init__(self, artwork: Artwork) -> None:
        self._means = means(artwork.pictures)
        self._captions = artwork.captions
        self._numbers = {caption: number for number, caption in enumerate(artwork.captions)}

    def judge(self, captions: Sequence[Caption], pictures: np.ndarray) -> Verdicts:
        """Judge ``pictures [N, 64, 64, 3]`` uint8 against their captions."""
        drawn = means(pictures)
        squares = (drawn**2).sum(1)[:, None] + (self._means**2).sum(1) - 2 * drawn @ self._means.T
        distances = np.maximum(squares, 0) / self._means.shape[1]
        own = np.array([self._numbers[caption] for caption in captions])
        mine = distances[np.arange(len(own)), own]
        nearest = distances.argmin(1)
        exact = mine <= distances.min(1) + _SAME
        found = [
            caption if right else self._captions[number] for caption, right, number in zip(captions, exact, nearest)
        ]
        return Verdicts(
            exact=exact,
            top_5=(distances < mine[:, None] - _SAME).sum(1) < 5,
            role=np.array([one.role == other.role for one, other in zip(captions, found)]),
            tone=np.array([one.tones == other.tones for one, other in zip(captions, found)]),
        )


def means(pictures: np.ndarray) -> np.ndarray:
    """Means over squares of 4 x 4 pixels, in [0, 1]: ``[N, 64, 64, 3]`` uint8 -> ``[N, 768]`` float64."""
    cells = SIDE // _CELL
    squares = pictures.reshape(-1, cells, _CELL, cells, _CELL, 3).astype(np.float32) / 255
    return squares.mean((2, 4), dtype=np.float64).reshape(len(pictures), -1)
