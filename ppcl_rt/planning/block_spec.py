"""What one kind of block is made of: its linear layers, and the groups of units that they hold.

A family supplies one `BlockSpec` for each kind of block. Parameters, FLOPs and bytes follow from it, and so do the
tensors that a plan reads. Plain data, no torch.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from functools import cached_property
from typing import Literal, NamedTuple

from pydantic import Field, model_validator

from ppcl_rt.planning.frozen import Frozen
from ppcl_rt.planning.width import LINEAR_MAP, Width

Stream = Literal["image", "text"]
# What passes through a part: the tokens of a stream, of both streams together, or one vector a sample.
Input = Literal["image", "text", "joint", "sample"]
# Sizes stay below this: a catalog that claims more is broken, and sums of products of sizes still fit a float.
LARGEST = 2**31
# Streams that a block leaves as they were: none, or the text.
ALL_UPDATED: frozenset[Stream] = frozenset()
TEXT_NOT_UPDATED: frozenset[Stream] = frozenset({"text"})


class Segment(NamedTuple):
    """Where the units of a group lie in a part: rows (or columns) ``offset .. offset + count * unit``.

    Attributes:
        group: name of the group.
        offset: first row or column in the dense part.
        unit: rows or columns of one unit: the channels of a head, 1 for an MLP channel.
    """

    group: str
    offset: int
    unit: int


class Group(Frozen):
    """Units of a block that are kept or removed together.

    Attributes:
        count: units in the dense block.
        mappable: whether a linear map ``[D, D]`` may stand in for all of them (`LINEAR_MAP`, PPCL eq. 9).
        is_rank: whether units are the rank of a factorisation; the full count is the stock layers then.
        updates: the one stream that the group serves; None where it serves both.
    """

    count: int = Field(ge=1, lt=LARGEST)
    mappable: bool = False
    is_rank: bool = False
    updates: Stream | None = None


class Part(Frozen):
    """One linear layer of a block, ``[rows, columns]``, and which of it belongs to which group.

    Attributes:
        path: of the module inside the block.
        rows, columns: of the dense weight.
        bias: whether there is a bias ``[rows]``.
        axis: 0 where groups lie along the rows, 1 along the columns, None where the part is always whole.
        segments: where the units lie along that axis; a part may hold several groups, a group may lie in several parts.
        stream: what passes through it.
        updates: the stream whose update is all that the part is there for; None where a block needs it in any case.
        factored: the rank group whose two factors stand in for the part below the full rank.
        name: of the layers that stand in for it; needed where ``axis`` is 1 or the part is factored.
    """

    path: str
    rows: int = Field(ge=1, lt=LARGEST)
    columns: int = Field(ge=1, lt=LARGEST)
    bias: bool = True
    axis: Literal[0, 1] | None = None
    segments: tuple[Segment, ...] = ()
    stream: Input
    updates: Stream | None = None
    factored: str | None = None
    name: str = ""

    @model_validator(mode="after")
    def _sound(self) -> Part:
        if bool(self.segments) != (self.axis is not None) or (self.segments and self.factored):
            raise ValueError(f"part {self.path}: segments go with an axis, and a factored part has neither")
        if not self.name and (self.axis == 1 or self.factored):
            raise ValueError(f"part {self.path}: what may stand in for it needs a name")
        return self

    @property
    def across(self) -> int:
        """Numbers that one row or column of a unit holds: its length, and its bias where it is a row."""
        return self.columns + self.bias if self.axis == 0 else self.rows


class Weights(NamedTuple):
    """How many numbers weights have, biases left out, and how many rows."""

    numbers: int
    rows: int


class Output(NamedTuple):
    """The columns of a part that read one group: what least squares compensates for units that are left out.

    Attributes:
        name: of the layers that stand in for these columns.
        part: the part.
        segment: its columns.
        shared: whether the part has columns of other groups too; the part itself is then always read, and what stands
            in for one group adds to it without a bias of its own.
    """

    name: str
    part: Part
    segment: Segment
    shared: bool

    @property
    def biased(self) -> bool:
        """Whether what stands in for these columns has a bias: the part has one, and no other group shares it."""
        return self.part.bias and not self.shared


class BlockSpec(Frozen):
    """One kind of block.

    Attributes:
        dim: size D of a token in the streams.
        head_dim: channels E of a head.
        heads: the group of the attention heads, which attend over the tokens of both streams; or, where a block has
            several attentions, the group of each and the tokens over which it attends; None for a block without.
        groups: by name, in the order in which they are shown and planned.
        parts: all linear layers.
        other_params: parameters of all else (norms), which every width has.
        may_leave: streams that the block can leave as they were (PPCL eq. 8).
    """

    dim: int = Field(ge=1, lt=LARGEST)
    head_dim: int = Field(ge=1, lt=LARGEST)
    heads: str | dict[str, Input] | None = "heads"
    groups: dict[str, Group] = Field(min_length=1)
    parts: tuple[Part, ...]
    other_params: int = Field(0, ge=0, lt=2**60)
    may_leave: tuple[Stream, ...] = ()

    @model_validator(mode="after")
    def _consistent(self) -> BlockSpec:
        named = {segment.group for part in self.parts for segment in part.segments}
        named |= {part.factored for part in self.parts if part.factored} | set(self.head_groups)
        if named - set(self.groups):
            raise ValueError(f"parts name the group {min(named - set(self.groups))}, which the block has not")
        read = {segment.group for part in self.parts if part.axis == 1 for segment in part.segments}
        for name, group in self.groups.items():
            if group.is_rank and not self.factored_by(name):
                raise ValueError(f"group {name} is a rank, but no part is factored by it")
            if not group.is_rank and name not in read:
                raise ValueError(f"group {name} is read by no part: nothing says what its units are worth")
        for part in self.parts:
            if part.factored and self.groups[part.factored].updates not in (None, part.updates):
                raise ValueError(f"part {part.path} serves another stream than its group {part.factored}")
            end, length = 0, part.rows if part.axis == 0 else part.columns
            for segment in part.segments:
                if segment.offset < end:
                    raise ValueError(f"part {part.path}: segments overlap or are out of order")
                end = segment.offset + segment.unit * self.groups[segment.group].count
            if end > length:
                raise ValueError(f"part {part.path}: its segments end at {end}, it has {length}")
        return self

    @cached_property
    def head_groups(self) -> dict[str, Input]:
        """Groups of attention heads, each with the tokens over which it attends."""
        if isinstance(self.heads, dict):
            return self.heads
        return {self.heads: "joint"} if self.heads else {}

    @cached_property
    def full(self) -> Width:
        """The dense width."""
        return Width({name: group.count for name, group in self.groups.items()})

    @cached_property
    def outputs(self) -> tuple[Output, ...]:
        """What least squares compensates, in the order of the parts."""
        found = []
        for part in self.parts:
            shared = len({segment.group for segment in part.segments}) > 1
            for segment in part.segments if part.axis == 1 else ():
                found.append(Output(f"{part.name}_{segment.group}" if shared else part.name, part, segment, shared))
        return tuple(found)

    def outputs_of(self, group: str) -> tuple[Output, ...]:
        """The outputs that read a group."""
        return tuple(output for output in self.outputs if output.segment.group == group)

    def factored_by(self, group: str) -> tuple[Part, ...]:
        """The parts that come in two factors below the full count of a rank group."""
        return tuple(part for part in self.parts if part.factored == group)

    @cached_property
    def rank_groups(self) -> tuple[str, ...]:
        """Groups whose units are ranks."""
        return tuple(name for name, group in self.groups.items() if group.is_rank)

    @cached_property
    def unit_groups(self) -> tuple[str, ...]:
        """Groups whose units lie in the parts themselves: those that have a rank order."""
        return tuple(name for name, group in self.groups.items() if not group.is_rank)

    def groups_without(self, not_updated: Collection[Stream]) -> tuple[str, ...]:
        """The groups of a block that leaves some streams as they were."""
        return tuple(name for name, group in self.groups.items() if group.updates not in not_updated)

    def runs(self, part: Part, not_updated: Collection[Stream]) -> bool:
        """Whether a block that leaves some streams as they were needs a part."""
        return part.updates not in not_updated

    @staticmethod
    def replacement(output: str, count: int) -> str:
        """Name of the layer that stands in for an output at a count: ``mlp_image_192``; a linear map's count is 0."""
        return f"{output}_{count}"

    @staticmethod
    def shared_factor(group: str) -> str:
        """Name of the first of the two factors below the full rank, which all factored parts share."""
        return f"{group}_down"

    # Costs. A block's parameters are `fixed_params` and, for each group, `group_params`: a sum, so that a linear
    # program can count with them.

    def _parts(self, not_updated: Collection[Stream]) -> Iterator[Part]:
        return (part for part in self.parts if self.runs(part, not_updated))

    def _whole(self, part: Part) -> int:
        """Rows or columns of a part that belong to no group."""
        length = part.rows if part.axis == 0 else part.columns
        return length - sum(s.unit * self.groups[s.group].count for s in part.segments)

    def fixed_params(self, not_updated: Collection[Stream] = ALL_UPDATED) -> int:
        """Parameters of a block at no width at all: norms, biases of outputs, parts that are always whole."""
        total = self.other_params
        for part in self._parts(not_updated):
            if not part.factored:
                total += self._whole(part) * part.across + (part.rows if part.bias and part.axis != 0 else 0)
        return total

    def group_params(self, group: str, count: int, not_updated: Collection[Stream] = ALL_UPDATED) -> int:
        """Parameters of a group of a block at a count."""
        if self.groups[group].is_rank:
            return self._rank_params(group, count, not_updated)
        parts = list(self._parts(not_updated))
        if count == LINEAR_MAP:
            return self.dim**2 * sum(s.group == group for part in parts if part.axis == 1 for s in part.segments)
        units = sum(s.unit * part.across for part in parts for s in part.segments if s.group == group)
        return count * units

    def _rank_params(self, group: str, rank: int, not_updated: Collection[Stream]) -> int:
        parts = [part for part in self.factored_by(group) if self.runs(part, not_updated)]
        if rank == self.groups[group].count or not parts:
            return sum(part.rows * (part.columns + part.bias) for part in parts)
        return rank * (parts[0].columns + 1) + sum(part.rows * (rank + 1) for part in parts)

    def params(self, width: Width, not_updated: Collection[Stream] = ALL_UPDATED) -> int:
        """Parameters of a block at a width."""
        return self.fixed_params(not_updated) + sum(self.group_params(g, n, not_updated) for g, n in width.items())

    def fixed_weights(self, takes: Callable[[Part], bool], not_updated: Collection[Stream]) -> Weights:
        """Of `fixed_params`, the weights of some parts; rows of outputs, whose count depends on no group, are here."""
        parts = [part for part in self._parts(not_updated) if not part.factored and takes(part)]
        numbers = sum(self._whole(part) * (part.columns if part.axis == 0 else part.rows) for part in parts)
        return Weights(numbers, sum(self._whole(part) if part.axis == 0 else part.rows for part in parts))

    def group_weights(
        self, takes: Callable[[Part], bool], group: str, count: int, not_updated: Collection[Stream]
    ) -> Weights:
        """Of `group_params`, the weights of some parts, none of which is factored."""
        held = [(p, s.unit) for p in self._parts(not_updated) if takes(p) for s in p.segments if s.group == group]
        if count == LINEAR_MAP:
            return Weights(self.dim**2 * sum(part.axis == 1 for part, _ in held), 0)
        numbers = sum(unit * (part.columns if part.axis == 0 else part.rows) for part, unit in held)
        return Weights(count * numbers, count * sum(unit for part, unit in held if part.axis == 0))

    def flops(
        self, width: Width, image_tokens: int, text_tokens: int, not_updated: Collection[Stream] = ALL_UPDATED
    ) -> int:
        """Floating-point operations (2 a multiply-add) of a block's products and attention, for one sample.

        Like parameters, a sum over groups: those of no group at all, and what each group adds to them.
        """
        both = image_tokens + text_tokens
        tokens = {"image": image_tokens, "text": text_tokens, "joint": both, "sample": 1}
        heads = sum(tokens[over] ** 2 * width.get(group, 0) for group, over in self.head_groups.items())
        total = 4 * heads * self.head_dim
        shared: set[str] = set()
        for part in self._parts(not_updated):
            products = self._products(part, width, first=part.factored not in shared)
            shared |= {part.factored} if part.factored else set()
            total += 2 * tokens[part.stream] * products
        return total

    def _products(self, part: Part, width: Width, first: bool) -> int:
        """Multiply-adds of a part for one token; the factor that parts share counts with the ``first`` of them.

        A group that ``width`` does not name is not run.
        """
        if part.factored:
            rank = width.get(part.factored, 0)
            if rank == self.groups[part.factored].count:
                return part.rows * part.columns
            return rank * (part.rows + (part.columns if first else 0))
        across = part.columns if part.axis == 0 else part.rows
        total = self._whole(part) * across
        for segment in part.segments:
            count = width.get(segment.group)
            if count == LINEAR_MAP:
                total += self.dim**2 if part.axis == 1 else 0
            elif count is not None:
                total += count * segment.unit * across
        return total
