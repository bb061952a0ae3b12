"""Scenes: captioned images that are made, not downloaded, and an exact judge of what was drawn.

An image is 16x16 RGB in [-1, 1] on a 4x4 grid of cells; a cell is empty or holds one of 6 shapes in 6 colours, or one
of 16 glyphs. It stands in for GenEval and LongText-Bench, whose detectors and downloads no test can afford. Five kinds:

    object    "a red square at b3"              one thing, in a named cell (column a-d, row 1-4) or anywhere
    count     "three blue rings in row 2"       two to four of a thing, in a named row or column or anywhere
    groups    "two red squares and a blue ring" two different things, one to three of each
    relation  "a red square above a blue ring"  left of | right of | above | below, compared by column or by row
    text      'the text "FAIL"'                 two to four glyphs side by side in one row

A caption may end in ``on white`` or ``on grey``; otherwise the ground is black. A quarter of all captions, chosen by
hash, is held out: training never draws one of them (`Caption.held_out`).

Shape letters: N images, C = 16 cells, P = 16 pixels of a cell.
"""

from __future__ import annotations

import functools
import hashlib
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

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
PALETTE = np.array([*COLOURS.values(), *GROUNDS.values()], dtype=np.float32)
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

# Words that only make a caption read well; they cost no token.
_FILLER = frozenset({"a", "an", "one", "at", "in", "on", "of", "and", "the"})
_WORDS = (*COLOURS, *SHAPES, *NUMBERS[1:], *RELATIONS, *PLACES, "row", "column", *"1234", "text", *GLYPHS, *GROUNDS)
_PLURAL = {**{f"{shape}s": shape for shape in SHAPES}, "crosses": "cross"}

MAX_TOKENS = 7
EMBEDDING_DIM = 64
# What the empty prompt is made of, so that no prompt is a row of masked keys.
_NOTHING = "<nothing>"


def _bitmap(rows: str) -> np.ndarray:
    return np.array([[pixel == "#" for pixel in row] for row in rows.split()])


_MASKS = np.stack([_bitmap(rows).reshape(-1) for rows in (*SHAPES.values(), *GLYPHS.values())])  # [22, P]


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
        """What fills a cell."""
        return self.colour, self.shape


@dataclass(frozen=True)
class Caption:
    """What a prompt asks for. `Caption.parse` and ``str`` are inverse to each other.

    Attributes:
        things: none for text, two for groups and relation, else one.
        place: a cell (``"b3"``), a line (``"row 2"``) or ``""`` for anywhere.
        relation: one of `RELATIONS`, or ``""``.
        text: two to four glyphs, or ``""``.
        ground: the colour behind, one of `GROUNDS`.
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
            ValueError: a word that the task does not have, or words in an order that says nothing.
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
    """Split a prompt into the words that cost a token: plurals folded, quoted text spelled out, filler dropped.

    Raises:
        ValueError: a word that the task does not have, or more than `MAX_TOKENS` words.
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


@functools.cache
def _word_vector(word: str) -> torch.Tensor:
    seed = int.from_bytes(hashlib.sha256(word.encode()).digest()[:8], "little")
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(EMBEDDING_DIM, dtype=np.float32))


def encode(prompts: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """Embed prompts with frozen vectors made from a hash of each word; the empty prompt is one word of its own.

    Args:
        prompts: N prompts.

    Returns:
        Embeddings ``[N, MAX_TOKENS, EMBEDDING_DIM]`` float32 and a boolean mask ``[N, MAX_TOKENS]``, true on words.

    Raises:
        ValueError: as `words_of`.
    """
    embeddings = torch.zeros(len(prompts), MAX_TOKENS, EMBEDDING_DIM)
    mask = torch.zeros(len(prompts), MAX_TOKENS, dtype=torch.bool)
    for n, prompt in enumerate(prompts):
        words = words_of(prompt) or (_NOTHING,)
        for position, word in enumerate(words):
            embeddings[n, position] = _word_vector(word)
        mask[n, : len(words)] = True
    return embeddings, mask


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
    """Draw ``per_kind`` distinct held-out captions of each kind, kinds one after the other."""
    drawn: list[Caption] = []
    for kind in KINDS:
        rng = np.random.default_rng([seed, KINDS.index(kind)])
        found: dict[Caption, None] = {}
        # Kinds have few captions or many; one is taken to be exhausted when so many draws in a row bring nothing new.
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


def render(caption: Caption, rng: np.random.Generator, apart: bool = True) -> np.ndarray:
    """Paint an image ``[16, 16, 3]`` in [-1, 1] that the caption is true of; what it leaves open is drawn at random.

    ``apart`` puts the two things of a relation into opposite halves of the grid, as a person would who says that one
    is left of the other; without it, any two cells of which the relation holds will do. The judge asks for no more
    than that the relation holds.
    """
    cells = _place(caption, rng, apart)
    image = np.empty((GRID, CELL, GRID, CELL, 3), dtype=np.float32)
    image[:] = GROUNDS[caption.ground]
    for cell, (colour, name) in cells.items():
        rgb = COLOURS.get(colour) or GROUNDS[colour]
        bitmap = _MASKS[(*SHAPES, *GLYPHS).index(name)].reshape(CELL, CELL)
        image[cell // GRID, :, cell % GRID][bitmap] = rgb
    return image.reshape(SIDE, SIDE, 3)


def _place(caption: Caption, rng: np.random.Generator, apart: bool) -> dict[int, tuple[str, str]]:
    """Cell -> (colour, shape or glyph)."""
    if caption.kind == "text":
        row, start = int(rng.integers(GRID)), int(rng.integers(GRID - len(caption.text) + 1))
        return {row * GRID + start + i: (INK[caption.ground], letter) for i, letter in enumerate(caption.text)}
    items = [things.item for things in caption.things for _ in range(things.count)]
    while True:
        allowed = np.array(_cells_of(caption.place))
        cells = [int(cell) for cell in rng.permutation(allowed)[: len(items)]]
        if not caption.relation or _holds(caption.relation, cells[0], cells[1], unit=GRID // 2 if apart else 1):
            return dict(zip(cells, items, strict=True))


def _cells_of(place: str) -> list[int]:
    if place in PLACES:
        return [PLACES.index(place)]
    axis, _, index = place.partition(" ")
    if axis == "row":
        return [cell for cell in range(CELLS) if cell // GRID == int(index) - 1]
    if axis == "column":
        return [cell for cell in range(CELLS) if cell % GRID == int(index) - 1]
    return list(range(CELLS))


def _holds(relation: str, first: int, second: int, unit: int = 1) -> bool:
    """Whether cell ``first`` is left of (right of, above, below) cell ``second``, in bands of ``unit`` cells."""
    (row, column), (other_row, other_column) = ((cell // GRID // unit, cell % GRID // unit) for cell in (first, second))
    return {
        "left": column < other_column,
        "right": column > other_column,
        "above": row < other_row,
        "below": row > other_row,
    }[relation]


EMPTY, UNKNOWN = ("", ""), ("", "?")


def read_cells(images: np.ndarray, grounds: Sequence[str]) -> list[list[tuple[str, str]]]:
    """Quantise images to the palette and match every cell against the templates, pixel for pixel.

    Args:
        images: ``[N, 16, 16, 3]`` in [-1, 1].
        grounds: the ground that each image is read on.

    Returns:
        Per image, 16 pairs (colour, shape or glyph); `EMPTY` for bare ground, `UNKNOWN` for what matches nothing.
    """
    cells = images.reshape(-1, GRID, CELL, GRID, CELL, 3).swapaxes(2, 3).reshape(-1, CELLS, CELL * CELL, 3)
    colours = np.square(cells[..., None, :] - PALETTE).sum(-1).argmin(-1)  # [N, C, P]
    colour_names, template_names = (*COLOURS, *GROUNDS), (*SHAPES, *GLYPHS)
    ground_ids = np.array([colour_names.index(ground) for ground in grounds])
    drawn = colours != ground_ids[:, None, None]
    bare = ~drawn.any(-1)
    # The one colour of what is drawn in a cell, where there is one.
    ink = np.where(drawn, colours, -1).max(-1)
    plain = np.where(drawn, colours == ink[..., None], True).all(-1)
    matches = (drawn[..., None, :] == _MASKS).all(-1)  # [N, C, 22]
    template = np.where(matches.any(-1) & plain, matches.argmax(-1), -1)

    def name(n: int, cell: int) -> tuple[str, str]:
        if bare[n, cell]:
            return EMPTY
        if template[n, cell] < 0:
            return UNKNOWN
        # Shapes come in colours, glyphs in ink; anything else (a white ring, a red letter) is not of this task.
        colour, thing = colour_names[ink[n, cell]], template_names[template[n, cell]]
        if (colour in COLOURS and thing in GLYPHS) or (colour in GROUNDS and thing in SHAPES):
            # A cross in ink is no glyph, a coloured glyph no shape, though one bitmap may be both.
            return UNKNOWN
        return colour, thing

    return [[name(n, cell) for cell in range(CELLS)] for n in range(len(cells))]


def judge(captions: Sequence[Caption], images: np.ndarray) -> np.ndarray:
    """Score images against what was asked for.

    Args:
        captions: N captions.
        images: ``[N, 16, 16, 3]`` in [-1, 1].

    Returns:
        The share of each request that came out right, ``[N]`` in [0, 1] (the soft score); 1.0 exactly where all of it
        did and nothing else is in the picture (the strict score is the share of ones).
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
    allowed = _cells_of(caption.place)
    counts = Counter(found[cell] for cell in allowed)
    right = sum(min(things.count, counts[things.item]) for things in caption.things)
    wanted = sum(things.count for things in caption.things)
    if not caption.relation:
        return right / max(wanted, things)
    where = [[cell for cell in range(CELLS) if found[cell] == things.item] for things in caption.things]
    holds = any(_holds(caption.relation, a, b) for a in where[0] for b in where[1])
    return (right + holds) / (max(wanted, things) + 1)


@dataclass(frozen=True)
class Score:
    """Strict and soft score of a set of prompts, each with a 95 % interval."""

    strict: float
    strict_ci: tuple[float, float]
    soft: float
    soft_ci: tuple[float, float]

    @classmethod
    def of(cls, shares: np.ndarray, resamples: int = 1000) -> Score:
        """Average over prompts; intervals are percentile bootstrap over prompts, seed fixed."""
        values = np.stack([shares == 1.0, shares]).astype(np.float64)  # [2, N]
        chosen = np.random.default_rng(0).integers(values.shape[1], size=(resamples, values.shape[1]))
        low, high = np.quantile(values[:, chosen].mean(-1), (0.025, 0.975), axis=-1)
        strict, soft = values.mean(-1)
        return cls(float(strict), (float(low[0]), float(high[0])), float(soft), (float(low[1]), float(high[1])))


@dataclass(frozen=True)
class Batch:
    """Training pairs: latents ``[N, 16, 48]`` (a cell is a token), embeddings ``[N, 7, 64]``, mask ``[N, 7]``."""

    latents: torch.Tensor
    embeddings: torch.Tensor
    mask: torch.Tensor
    captions: tuple[Caption, ...] = field(repr=False)


def to_tokens(images: np.ndarray | torch.Tensor) -> torch.Tensor:
    """Cut images ``[N, 16, 16, 3]`` into one token a cell, ``[N, 16, 48]``."""
    cells = torch.as_tensor(images).reshape(-1, GRID, CELL, GRID, CELL, 3).transpose(2, 3)
    return cells.reshape(-1, CELLS, CELL * CELL * 3)


def to_images(tokens: torch.Tensor) -> np.ndarray:
    """Join tokens ``[N, 16, 48]`` to images ``[N, 16, 16, 3]``; the inverse of `to_tokens`."""
    cells = tokens.detach().float().cpu().reshape(-1, GRID, GRID, CELL, CELL, 3).transpose(2, 3)
    return cells.reshape(-1, SIDE, SIDE, 3).numpy()


def training_batch(
    size: int, seed: Sequence[int], drop: float = 0.0, shares: Sequence[float] | None = None, apart: bool = True
) -> Batch:
    """Make ``size`` training pairs; ``seed`` alone decides them.

    Args:
        drop: share of the captions that is left empty.
        shares: of the five kinds, as in `training_caption`.
        apart: as in `render`.
    """
    rng = np.random.default_rng(seed)
    captions = tuple(training_caption(rng, shares) for _ in range(size))
    images = np.stack([render(caption, rng, apart) for caption in captions])
    dropped = rng.random(size) < drop
    embeddings, mask = encode(["" if gone else str(caption) for gone, caption in zip(dropped, captions, strict=True)])
    return Batch(to_tokens(images), embeddings, mask, captions)
