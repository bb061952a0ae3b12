"""What a dense model is made of: lists of blocks of one kind each. Plain data, no torch."""

from __future__ import annotations

from collections import Counter
from functools import cached_property
from itertools import pairwise
from typing import NamedTuple

from pydantic import Field, model_validator

from ppcl_rt.planning.block_spec import LARGEST, BlockSpec
from ppcl_rt.planning.frozen import Frozen
from ppcl_rt.planning.interval import Interval
from ppcl_rt.planning.plan import Plan, text_maps

# Of one list. A config or catalog that claims more is broken: everything here is kept for each block.
MOST_BLOCKS = 10_000


class BlockList(Frozen):
    """Blocks of one kind, one after the other; a model has one such list or several.

    Attributes:
        path: of the module list in the model. A module list that holds several kinds is several lists in a row, whose
            blocks are numbered on from one to the next.
        kind: of its blocks.
        depth: how many there are.
    """

    path: str
    kind: str
    depth: int = Field(ge=1, le=MOST_BLOCKS)


class Place(NamedTuple):
    """Where a block lies: the list's path, and its number in the list."""

    path: str
    number: int


class Tokens(NamedTuple):
    """What a forward runs on: the shape at which FLOPs are counted and milliseconds measured.

    Attributes:
        image, text: tokens of a sample.
        batch: samples.
    """

    image: int
    text: int
    batch: int = 1


class Architecture(Frozen):
    """The dense model.

    Attributes:
        lists: of blocks, in the order in which they run.
        kinds: what a block of each kind is made of.
        dim: size D of a token in the streams.
        outer_params: parameters outside the blocks; buffers that are saved count, because they are held, too.
    """

    lists: tuple[BlockList, ...] = Field(min_length=1)
    kinds: dict[str, BlockSpec]
    dim: int = Field(ge=1, lt=LARGEST)
    outer_params: int = Field(ge=0, lt=2**60)

    @model_validator(mode="after")
    def _consistent(self) -> Architecture:
        if unknown := {each.kind for each in self.lists} - set(self.kinds):
            raise ValueError(f"a list holds blocks of kind {min(unknown)}; there are: {', '.join(self.kinds)}")
        for before, after in pairwise(self.lists):
            if (before.path, before.kind) == (after.path, after.kind):
                raise ValueError(f"{after.path} holds two lists of kind {after.kind} in a row: join them")
        return self

    @cached_property
    def depth(self) -> int:
        """Blocks of all lists together."""
        return sum(each.depth for each in self.lists)

    @cached_property
    def _lists(self) -> tuple[int, ...]:
        """For each block, which of ``lists`` it is in."""
        return tuple(n for n, each in enumerate(self.lists) for _ in range(each.depth))

    @cached_property
    def _places(self) -> tuple[Place, ...]:
        ends: Counter[str] = Counter()
        places = []
        for each in self.lists:
            start = ends[each.path]
            ends[each.path] += each.depth
            places += [Place(each.path, n) for n in range(start, ends[each.path])]
        return tuple(places)

    def place(self, block: int) -> Place:
        """Where a block lies."""
        return self._places[block]

    def kind(self, block: int) -> str:
        """The kind of a block."""
        return self.lists[self._lists[block]].kind

    def spec(self, block: int) -> BlockSpec:
        """What a block is made of."""
        return self.kinds[self.kind(block)]

    def one_kind(self, interval: Interval) -> bool:
        """Whether all blocks of an interval exist and lie in one list: then they are of one kind."""
        return interval.last < self.depth and self._lists[interval.first] == self._lists[interval.last]

    def run_maps(self, run: Interval) -> tuple[str, ...]:
        """Names of a text run's maps (`text_maps`)."""
        return text_maps(run, self.depth)

    def run_params(self, run: Interval) -> int:
        """Parameters of a text run's maps."""
        return len(self.run_maps(run)) * self.dim * (self.dim + 1)

    def run_flops(self, run: Interval, text_tokens: int) -> int:
        """Floating-point operations of a text run's maps, for one sample."""
        return 2 * text_tokens * self.dim**2 * len(self.run_maps(run))

    @cached_property
    def dense_params(self) -> int:
        """Parameters of the dense model."""
        return self.outer_params + sum(self.spec(n).params(self.spec(n).full) for n in range(self.depth))

    def params(self, plan: Plan) -> int:
        """Parameters that a plan runs."""
        blocks = sum(
            self.spec(block.interval.first).params(block.width, plan.not_updated(block)) for block in plan.blocks
        )
        return self.outer_params + blocks + sum(map(self.run_params, plan.text_runs))

    def flops(self, plan: Plan, image_tokens: int, text_tokens: int, batch: int = 1) -> int:
        """Floating-point operations (2 a multiply-add) of the blocks' products and attention, one forward."""
        total = sum(
            self.spec(b.interval.first).flops(b.width, image_tokens, text_tokens, plan.not_updated(b))
            for b in plan.blocks
        )
        total += sum(self.run_flops(run, text_tokens) for run in plan.text_runs)
        return batch * total

    def dense_flops(self, tokens: Tokens) -> int:
        """Floating-point operations of the dense blocks, one forward."""
        image, text, batch = tokens
        return batch * sum(self.spec(n).flops(self.spec(n).full, image, text) for n in range(self.depth))
