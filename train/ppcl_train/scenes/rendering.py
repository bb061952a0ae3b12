"""Painting scenes: from a caption to an image that it is true of. P = 16 pixels of a cell."""

from __future__ import annotations

import numpy as np

from ppcl_train.scenes.language import (
    CELL,
    COLOURS,
    GLYPHS,
    GRID,
    GROUNDS,
    INK,
    SHAPES,
    SIDE,
    Caption,
    cells_of,
    holds,
)


def _bitmap(rows: str) -> np.ndarray:
    return np.array([[pixel == "#" for pixel in row] for row in rows.split()])


# Bitmaps of all shapes, then of all glyphs.
BITMAPS = np.stack([_bitmap(rows).reshape(-1) for rows in (*SHAPES.values(), *GLYPHS.values())])  # [22, P]


def render(caption: Caption, rng: np.random.Generator, apart: bool = True) -> np.ndarray:
    """Paint an image ``[16, 16, 3]`` in [-1, 1] that the caption is true of; what the caption leaves open is random.

    With ``apart``, the two things of a relation lie in opposite halves of the grid, as a person would place them who
    says that one is left of the other. Without it, they lie in any two cells of which the relation holds, which is all
    that the judge asks for.
    """
    cells = _place(caption, rng, apart)
    image = np.empty((GRID, CELL, GRID, CELL, 3), dtype=np.float32)
    image[:] = GROUNDS[caption.ground]
    for cell, (colour, name) in cells.items():
        rgb = COLOURS.get(colour) or GROUNDS[colour]
        bitmap = BITMAPS[(*SHAPES, *GLYPHS).index(name)].reshape(CELL, CELL)
        image[cell // GRID, :, cell % GRID][bitmap] = rgb
    return image.reshape(SIDE, SIDE, 3)


def _place(caption: Caption, rng: np.random.Generator, apart: bool) -> dict[int, tuple[str, str]]:
    """Choose cells at random: number of a cell -> (colour, shape or glyph)."""
    if caption.kind == "text":
        row, start = int(rng.integers(GRID)), int(rng.integers(GRID - len(caption.text) + 1))
        return {row * GRID + start + i: (INK[caption.ground], letter) for i, letter in enumerate(caption.text)}
    items = [things.item for things in caption.things for _ in range(things.count)]
    while True:
        allowed = np.array(cells_of(caption.place))
        cells = [int(cell) for cell in rng.permutation(allowed)[: len(items)]]
        if not caption.relation or holds(caption.relation, cells[0], cells[1], unit=GRID // 2 if apart else 1):
            return dict(zip(cells, items, strict=True))
