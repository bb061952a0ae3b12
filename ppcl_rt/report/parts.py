"""What a page is made of: sections of tables, curves and pictures. Plain data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

# Levels of plots that have none.
_NONE: Mapping[str, float] = {}


class Curve(NamedTuple):
    """Points of one thing that was measured.

    Attributes:
        name: in the legend.
        x, y: of the points.
        low, high: 95 % interval of ``y``; empty where it is not known.
        joined: whether lines join the points.
    """

    name: str
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] = ()
    high: Sequence[float] = ()
    joined: bool = True


class Plot(NamedTuple):
    """Curves over one pair of axes.

    Attributes:
        title: what is shown, above the axes.
        x, y: labels of the axes.
        curves: what is drawn.
        levels: name -> value, drawn as a horizontal line.
        logarithmic: the axes that are, ``"x"``, ``"y"`` or ``"xy"``.
    """

    title: str
    x: str
    y: str
    curves: Sequence[Curve]
    levels: Mapping[str, float] = _NONE
    logarithmic: str = ""


class Table(NamedTuple):
    """A table of text; ``folded`` is one that the reader opens."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    folded: bool = False


class Picture(NamedTuple):
    """A picture as a file: its bytes, and their type, ``image/png`` for one."""

    title: str
    data: bytes
    mime: str


class Section(NamedTuple):
    """A part of a page under one heading.

    Attributes:
        title: the heading.
        parts: what is shown, in this order.
        file: where it was read, relative to the folder; empty for what several files say together.
        command: what prints or makes it, as far as the file knows it; words in capitals are not known.
        notes: sentences above the parts.
    """

    title: str
    parts: Sequence[Plot | Table | Picture] = ()
    file: str = ""
    command: str = ""
    notes: Sequence[str] = ()


def estimate(mean: float, low: float, high: float) -> str:
    """Return a mean with its 95 % interval, as tables show it."""
    return f"{mean:.3f} ({low:.3f}-{high:.3f})"
