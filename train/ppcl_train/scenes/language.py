"""Scenes: captions of made images. What may be said, in which words, and which captions are held out.

A scene is a 16x16 RGB image in [-1, 1] on a 4x4 grid of cells; a cell is empty, or holds one of 6 shapes in 6 colours
or one of 16 glyphs. Scenes and their exact judge take the place of GenEval and LongText-Bench, whose detectors and
downloads are too much for a test. There are five kinds:

    object    "a red square at b3"              one thing, in a named cell (column a-d, row 1-4) or anywhere
    count     "three blue rings in row 2"       two to four of a thing, in a named row or column or anywhere
    groups    "two red squares and a blue ring" two different things, one to three of each
    relation  "a red square above a blue ring"  left of | right of | above | below, compared by column or by row
    text      'the text "FAIL"'                 two to four glyphs side by side in one row

A caption may end in ``on white`` or ``on grey``; otherwise the ground is black. A quarter of all captions, chosen by
hash, is held out: training never draws one of them (`Caption.held_out`).
"""

from __future__ import annotations

import functools
import hashlib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

GRID, CELL = 4, 4
SIDE = GRID * CELL
CELLS = GRID * GRID

KINDS = ("object", "count", "groups", "relation", "text")
COLOURS = {
    "red": (1, -1, -1),
    "green": (-1, 1, -1),
    "blue": (-1, -1, 1),
    "yellow": (1, 1, -1),
    "magenta": (1, -1, 1),
    "cyan": (-1, 1, 1),
}
GROUNDS = {"black": (-1, -1, -1), "white": (1, 1, 1), "grey": (0, 0, 0)}
# Ground -> the colour that glyphs have on it.
INK = {"black": "white", "white": "black", "grey": "black"}

# Rows of a 4x4 bitmap. Any two shapes differ in 4 pixels or more, any two glyphs in 3 or more.
SHAPES = {
    "square": "#### #### #### ####",
    "circle": ".##. #### #### .##.",
    "triangle": "#... ##.. ###. ####",
    "cross": "#..# .##. .##. #..#",
    "ring": "#### #..# #..# ####",
    "stripe": "#### .... #### ....",
}
GLYPHS = {
    "A": ".##. #..# #### #..#",
    "D": "###. #..# #..# ###.",
    "E": "#### ##.. ##.. ####",
    "F": "#### ##.. #... #...",
    "I": ".### ..#. ..#. .###",
    "J": "...# ...# #..# .##.",
    "K": "#.#. ##.. #.#. #..#",
    "L": "#... #... #... ###.",
    "M": "#### #### #..# #..#",
    "N": "#..# ##.# #.## #..#",
    "P": "###. #.#. ###. #...",
    "T": "#### .#.. .#.. .#..",
    "U": "#..# #..# #..# ####",
    "V": "#.#. #.#. #.#. .#..",
    "Y": "#..# .### ..#. .#..",
    "Z": "#### ..#. .#.. ####",
}
NUMBERS = ("one", "two", "three", "four")
RELATIONS = ("left", "right", "above", "below")
PLACES = tuple(f"{column}{row}" for row in "1234" for column in "abcd")
LINES = tuple(f"{axis} {index}" for axis in ("row", "column") for index in "1234")

# Words that only make a caption read well; they take no token.
_FILLER = frozenset({"a", "an", "one", "at", "in", "on", "of", "and", "the"})
_WORDS = (*COLOURS, *SHAPES, *NUMBERS[1:], *RELATIONS, *PLACES, "row", "column", *"1234", "text", *GLYPHS, *GROUNDS)
_PLURAL = {**{f"{shape}s": shape for shape in SHAPES}, "crosses": "cross"}

# Most words of a prompt, without filler.
MAX_TOKENS = 7


@dataclass(frozen=True)
class Things:
    """``count`` things of one colour and shape."""

    count: int
    colour: str
    shape: str

    def __str__(self) -> str:
        if self.count == 1:
            return f"a {self.colour} {self.shape}"
        return f"{NUMBERS[self.count - 1]} {self.colour} {self.shape}{'es' if self.shape == 'cross' else 's'}"

    @property
    def item(self) -> tuple[str, str]:
        """The colour and shape that fill a cell."""
        return self.colour, self.shape


@dataclass(frozen=True)
class Caption:
    """What a prompt asks for. `Caption.parse` and ``str`` are inverse to each other.

    Attributes:
        things: none for text, two for groups and relation, else one.
        place: a cell (``"b3"``), a line (``"row 2"``) or ``""`` for anywhere.
        relation: one of `RELATIONS`, or ``""``.
        text: two to four glyphs, or ``""``.
        ground: the colour of the empty image, one of `GROUNDS`.
    """

    things: tuple[Things, ...] = ()
    place: str = ""
    relation: str = ""
    text: str = ""
    ground: str = "black"

    @property
    def kind(self) -> str:
        """One of `KINDS`."""
        if self.text:
            return "text"
        if self.relation:
            return "relation"
        if len(self.things) == 2:
            return "groups"
        return "count" if self.things[0].count > 1 else "object"

    def __str__(self) -> str:
        if self.text:
            said = f'the text "{self.text}"'
        elif self.relation:
            of = " of" if self.relation in ("left", "right") else ""
            said = f"{self.things[0]} {self.relation}{of} {self.things[1]}"
        else:
            said = " and ".join(map(str, self.things))
        if self.place:
            said += f" {'at' if self.place in PLACES else 'in'} {self.place}"
        return said if self.ground == "black" else f"{said} on {self.ground}"

    @property
    def held_out(self) -> bool:
        """Whether training never sees this caption (a quarter of all, by hash)."""
        return hashlib.sha256(str(self).encode()).digest()[0] % 4 == 0

    @classmethod
    def parse(cls, prompt: str) -> Caption:
        """Read a prompt.

        Raises:
            ValueError: a word is unknown, or the words are in an order that means nothing.
        """
        words = words_of(prompt)
        rest = list(words)

        def take(allowed: Iterable[str]) -> str:
            return rest.pop(0) if rest and rest[0] in allowed else ""

        def things() -> Things:
            number, colour, shape = take(NUMBERS) or "one", take(COLOURS), take(SHAPES)
            if not (colour and shape):
                raise ValueError(_unclear(prompt))
            return Things(NUMBERS.index(number) + 1, colour, shape)

        if take(("text",)):
            text = ""
            while letter := take(GLYPHS):
                text += letter
            caption = cls(text=text, ground=take(GROUNDS) or "black")
            valid = 2 <= len(text) <= GRID
        else:
            first = things()
            if relation := take(RELATIONS):
                second = things()
                caption = cls((first, second), relation=relation, ground=take(GROUNDS) or "black")
                valid = first.count == second.count == 1 and first != second
            elif rest and rest[0] in (*NUMBERS, *COLOURS):
                second = things()
                caption = cls((first, second), ground=take(GROUNDS) or "black")
                valid = max(first.count, second.count) <= 3 and first.item != second.item
            else:
                axis = take(("row", "column"))
                place = f"{axis} {take('1234')}" if axis else take(PLACES)
                caption = cls((first,), place=place, ground=take(GROUNDS) or "black")
                valid = not place or place in (PLACES if first.count == 1 else LINES)
        if rest or not valid:
            raise ValueError(_unclear(prompt))
        return caption


def _unclear(prompt: str) -> str:
    return f'the prompt "{prompt}" is not a scene: say, for instance, "two red squares", or: the text "FAIL"'


@functools.lru_cache(maxsize=65536)
def words_of(prompt: str) -> tuple[str, ...]:
    """Split a prompt into the words that take a token: plurals become singular, quoted text letters, filler is dropped.

    Raises:
        ValueError: a word is unknown, or there are more than `MAX_TOKENS` words.
    """
    words: list[str] = []
    for quoted, word in re.findall(r'"([^"]*)"|(\S+)', prompt):
        if quoted:
            words.extend(quoted)
        elif (word := word.lower().rstrip(",.")) not in _FILLER:
            words.append(_PLURAL.get(word, word))
    for word in words:
        if word not in _WORDS:
            raise ValueError(f'the word "{word}" means nothing here; the words are: {" ".join(_WORDS)}')
    if len(words) > MAX_TOKENS:
        raise ValueError(f"the prompt has {len(words)} words that count, the most is {MAX_TOKENS}: {prompt}")
    return tuple(words)


def draw_caption(kind: str, rng: np.random.Generator) -> Caption:
    """Draw a caption of one kind, held out or not."""

    def pick(options: Sequence[str]) -> str:
        return options[int(rng.integers(len(options)))]

    def things(count: int) -> Things:
        return Things(count, pick(tuple(COLOURS)), pick(tuple(SHAPES)))

    ground = pick(tuple(GROUNDS))
    if kind == "text":
        length = int(rng.integers(2, GRID + 1))
        return Caption(text="".join(pick(tuple(GLYPHS)) for _ in range(length)), ground=ground)
    if kind in ("object", "count"):
        count = 1 if kind == "object" else int(rng.integers(2, 5))
        where = PLACES if kind == "object" else LINES
        place = pick(where) if rng.random() < 0.75 else ""
        return Caption((things(count),), place=place, ground=ground)
    counts = (1, 1) if kind == "relation" else tuple(int(n) for n in rng.integers(1, 4, size=2))
    first = things(counts[0])
    while (second := things(counts[1])).item == first.item:
        pass
    return Caption((first, second), relation=pick(RELATIONS) if kind == "relation" else "", ground=ground)


def training_caption(rng: np.random.Generator, shares: Sequence[float] | None = None) -> Caption:
    """Draw a caption that is not held out; ``shares`` of the five kinds sum to 1, None for equal ones."""
    number = rng.integers(len(KINDS)) if shares is None else rng.choice(len(KINDS), p=shares)
    kind = KINDS[int(number)]
    while (caption := draw_caption(kind, rng)).held_out:
        pass
    return caption


def held_out_captions(per_kind: int, seed: int) -> list[Caption]:
    """Draw ``per_kind`` distinct held-out captions of each kind, kinds one after the other.

    Raises:
        ValueError: a kind has fewer held-out captions.
    """
    drawn: list[Caption] = []
    for kind in KINDS:
        rng = np.random.default_rng([seed, KINDS.index(kind)])
        found: dict[Caption, None] = {}
        # Some kinds have few captions. A kind counts as exhausted when 10,000 draws in a row bring no new caption.
        misses = 0
        while len(found) < per_kind and misses < 10_000:
            caption = draw_caption(kind, rng)
            misses += 1
            if caption.held_out and caption not in found:
                found[caption], misses = None, 0
        if len(found) < per_kind:
            raise ValueError(f'there are only {len(found)} held-out prompts of kind "{kind}": ask for fewer')
        drawn.extend(found)
    return drawn


def cells_of(place: str) -> list[int]:
    """Numbers of the cells that a place names: a cell, a line, or ``""`` for all of them."""
    if place in PLACES:
        return [PLACES.index(place)]
    axis, _, index = place.partition(" ")
    if axis == "row":
        return [cell for cell in range(CELLS) if cell // GRID == int(index) - 1]
    if axis == "column":
        return [cell for cell in range(CELLS) if cell % GRID == int(index) - 1]
    return list(range(CELLS))


def holds(relation: str, first: int, second: int, unit: int = 1) -> bool:
    """Whether cell ``first`` is left of (right of, above, below) cell ``second``, in bands of ``unit`` cells."""
    (row, column), (other_row, other_column) = ((cell // GRID // unit, cell % GRID // unit) for cell in (first, second))
    return {
        "left": column < other_column,
        "right": column > other_column,
        "above": row < other_row,
        "below": row > other_row,
    }[relation]
