"""Judging scenes: read an image cell by cell, and score it against its caption.

Shape letters: N images, C = 16 cells, P = 16 pixels of a cell.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ppcl_train.scenes.language import (
    CELL,
    CELLS,
    COLOURS,
    GLYPHS,
    GRID,
    GROUNDS,
    INK,
    SHAPES,
    Caption,
    cells_of,
    holds,
)
from ppcl_train.scenes.rendering import BITMAPS

# What `read_cells` finds in a cell with nothing in it, and in one that matches no shape or glyph.
EMPTY, UNKNOWN = ("", ""), ("", "?")
PALETTE = np.array([*COLOURS.values(), *GROUNDS.values()], dtype=np.float32)


def read_cells(images: np.ndarray, grounds: Sequence[str]) -> list[list[tuple[str, str]]]:
    """Quantise images to the palette and match every cell against the bitmaps, pixel for pixel.

    Args:
        images: ``[N, 16, 16, 3]`` in [-1, 1].
        grounds: the ground of each image.

    Returns:
        Per image, 16 pairs (colour, shape or glyph); `EMPTY` for bare ground, `UNKNOWN` for what matches no bitmap.
    """
    cells = images.reshape(-1, GRID, CELL, GRID, CELL, 3).swapaxes(2, 3).reshape(-1, CELLS, CELL * CELL, 3)
    colours = np.square(cells[..., None, :] - PALETTE).sum(-1).argmin(-1)  # [N, C, P]
    colour_names, template_names = (*COLOURS, *GROUNDS), (*SHAPES, *GLYPHS)
    ground_ids = np.array([colour_names.index(ground) for ground in grounds])
    drawn = colours != ground_ids[:, None, None]
    bare = ~drawn.any(-1)
    # The colour of what is drawn in a cell, if it has one colour.
    ink = np.where(drawn, colours, -1).max(-1)
    plain = np.where(drawn, colours == ink[..., None], True).all(-1)
    matches = (drawn[..., None, :] == BITMAPS).all(-1)  # [N, C, 22]
    template = np.where(matches.any(-1) & plain, matches.argmax(-1), -1)

    def name(n: int, cell: int) -> tuple[str, str]:
        if bare[n, cell]:
            return EMPTY
        if template[n, cell] < 0:
            return UNKNOWN
        # Shapes have colours and glyphs have ink; anything else (a white ring, a red letter) is not a scene.
        colour, thing = colour_names[ink[n, cell]], template_names[template[n, cell]]
        if (colour in COLOURS and thing in GLYPHS) or (colour in GROUNDS and thing in SHAPES):
            # A shape and a glyph may have the same bitmap: its colour decides which of the two it can be.
            return UNKNOWN
        return colour, thing

    return [[name(n, cell) for cell in range(CELLS)] for n in range(len(cells))]


def judge(captions: Sequence[Caption], images: np.ndarray) -> np.ndarray:
    """Score images against their captions.

    Args:
        captions: N captions.
        images: ``[N, 16, 16, 3]`` in [-1, 1].

    Returns:
        The share of each caption that came out right, ``[N]`` in [0, 1] (the soft score). It is 1.0 exactly if all of
        the caption came out right and nothing else is in the picture; the strict score is the share of ones.
    """
    cells = read_cells(images, [caption.ground for caption in captions])
    return np.array([_share(caption, found) for caption, found in zip(captions, cells, strict=True)])


def _share(caption: Caption, found: list[tuple[str, str]]) -> float:
    things = sum(item != EMPTY for item in found)
    if caption.kind == "text":
        ink, right = INK[caption.ground], 0
        for row in range(GRID):
            for start in range(GRID - len(caption.text) + 1):
                spelled = found[row * GRID + start :][: len(caption.text)]
                right = max(right, sum(item == (ink, letter) for item, letter in zip(spelled, caption.text)))
        return right / max(len(caption.text), things)
    allowed = cells_of(caption.place)
    counts = Counter(found[cell] for cell in allowed)
    right = sum(min(things.count, counts[things.item]) for things in caption.things)
    wanted = sum(things.count for things in caption.things)
    if not caption.relation:
        return right / max(wanted, things)
    where = [[cell for cell in range(CELLS) if found[cell] == things.item] for things in caption.things]
    related = any(holds(caption.relation, a, b) for a in where[0] for b in where[1])
    return (right + related) / (max(wanted, things) + 1)


@dataclass(frozen=True)
class Score:
    """Strict and soft score of a set of prompts, each with a 95 % interval."""

    strict: float
    strict_ci: tuple[float, float]
    soft: float
    soft_ci: tuple[float, float]

    @classmethod
    def of(cls, shares: np.ndarray, resamples: int = 1000) -> Score:
        """Average over prompts; the intervals are percentile bootstrap over prompts, with a fixed seed."""
        values = np.stack([shares == 1.0, shares]).astype(np.float64)  # [2, N]
        chosen = np.random.default_rng(0).integers(values.shape[1], size=(resamples, values.shape[1]))
        low, high = np.quantile(values[:, chosen].mean(-1), (0.025, 0.975), axis=-1)
        strict, soft = values.mean(-1)
        return cls(float(strict), (float(low[0]), float(high[0])), float(soft), (float(low[1]), float(high[1])))
