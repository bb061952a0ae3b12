"""Plans: what runs for each block of a transformer, and how wide. Plain data, no torch."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator


class Width(NamedTuple):
    """How much of a block runs: the first so many in rank order.

    Attributes:
        heads: attention heads, of both streams together; 1 or more.
        image: hidden channels of the image stream's MLP; 0 for the linear map that stands in for it (PPCL eq. 9).
        text: hidden channels of the text stream's MLP, likewise.
        modulation: rank of the map from timestep embedding to modulations, of both streams together; 1 or more. The
            full rank, which is the model's width, is the stock layers.
    """

    heads: int
    image: int
    text: int
    modulation: int

    def within(self, other: Width) -> bool:
        """Whether no part is wider than ``other``'s."""
        return all(mine <= theirs for mine, theirs in zip(self, other, strict=True))

    def union(self, other: Width) -> Width:
        """The narrowest width that both are within."""
        return Width(*map(max, self, other))


@dataclass(frozen=True, order=True)
class Interval:
    """Blocks ``first..last``, **both included**, numbered from 0 as in diffusers.

    This class is the one place that knows the convention: use ``in``, ``len`` and iteration instead of arithmetic.

    Raises:
        ValueError: ``last < first`` or a negative number.
    """

    first: int
    last: int

    def __post_init__(self) -> None:
        if not 0 <= self.first <= self.last:
            raise ValueError(f"an interval is first..last with 0 <= first <= last, not {self}")

    def __str__(self) -> str:
        return f"{self.first}..{self.last}"

    def __len__(self) -> int:
        return self.last - self.first + 1

    def __iter__(self) -> Any:
        return iter(range(self.first, self.last + 1))

    def __contains__(self, block: object) -> bool:
        return isinstance(block, int) and self.first <= block <= self.last

    @property
    def key(self) -> str:
        """The interval as a part of a tensor name: ``3-5``."""
        return f"{self.first}-{self.last}"

    @classmethod
    def of_key(cls, key: str) -> Interval:
        """Undo `key`."""
        return cls(*map(int, key.split("-")))


class Frozen(BaseModel):
    """Immutable, validated, JSON both ways; unknown keys are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")


Model = TypeVar("Model", bound=Frozen)


def read_json(kind: type[Model], text: str | bytes, what: str) -> Model:
    """Parse and validate JSON.

    Raises:
        ValueError: one line with the first thing that is wrong, ``what`` in front.
    """
    try:
        return kind.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
        message = first["msg"].removeprefix("Value error, ")
        # Joined anew, because what was given (a key, say) may hold line ends.
        raise ValueError(" ".join(f"{what}: {where + ': ' if where else ''}{message}{more}".split())) from None


class Step(Frozen):
    """One thing that runs: a block of the teacher, or a student in place of the blocks of an interval."""

    blocks: Interval
    width: Width
    student: bool = False

    @model_validator(mode="after")
    def _valid(self) -> Step:
        if not self.student and len(self.blocks) != 1:
            raise ValueError(f"a step over {self.blocks} needs student: true; without it, a step is one block")
        if min(self.width) < 0 or min(self.width.heads, self.width.modulation) < 1:
            raise ValueError(f"blocks {self.blocks}: heads and modulation are 1 or more, MLPs 0 or more: {self.width}")
        return self


class Plan(Frozen):
    """One choice out of a catalog: the steps that run, in order. A block that no step covers is skipped.

    Attributes:
        checkpoint: fingerprint of the checkpoint that the plan was made for.
        depth: blocks of the dense model.
        steps: ascending, none overlapping.
        text_runs: where the text stream stands still (PPCL eq. 8): the first block of a run computes it, the others
            read a linear map of it and leave it alone (their ``width.text`` is 0), and behind the last it moves on in
            one step. All blocks of a run are blocks of the teacher. Ascending, none overlapping.
    """

    checkpoint: str
    depth: int = Field(ge=1)
    steps: tuple[Step, ...]
    text_runs: tuple[Interval, ...] = ()

    @field_validator("steps")
    @classmethod
    def _ordered(cls, steps: tuple[Step, ...]) -> tuple[Step, ...]:
        for before, after in pairwise(steps):
            if after.blocks.first <= before.blocks.last:
                raise ValueError(
                    f"step {before.blocks} overlaps or follows {after.blocks}: put them in order, drop one"
                )
        return steps

    @model_validator(mode="after")
    def _inside(self) -> Plan:
        if self.steps and self.steps[-1].blocks.last >= self.depth:
            raise ValueError(f"step {self.steps[-1].blocks} ends beyond the last block, {self.depth - 1}")
        return self

    @model_validator(mode="after")
    def _still(self) -> Plan:
        for before, after in pairwise(self.text_runs):
            if after.first <= before.last:
                raise ValueError(f"text run {before} overlaps or follows {after}: put them in order, drop one")
        kept = {step.blocks.first: step.width for step in self.steps if not step.student}
        for run in self.text_runs:
            if len(run) < 2 or any(block not in kept for block in run):
                raise ValueError(f"text run {run} is not two or more blocks of the teacher that all run")
            if any(kept[block].text for block in run if block != run.first):
                raise ValueError(f"text run {run}: blocks behind its first run no text MLP, so their text width is 0")
        return self

    @classmethod
    def dense(cls, checkpoint: str, depth: int, width: Width) -> Plan:
        """The plan that leaves everything in."""
        return cls.of(checkpoint, depth, ((block, width) for block in range(depth)))

    @classmethod
    def of(
        cls,
        checkpoint: str,
        depth: int,
        kept: Iterable[tuple[int, Width]],
        students: Iterable[Step] = (),
        text_runs: Iterable[Interval] = (),
    ) -> Plan:
        """Build a plan from kept blocks with their widths, students and text runs."""
        runs = tuple(sorted(text_runs))
        still = {block for run in runs for block in run if block != run.first}
        steps = [
            Step(blocks=Interval(block, block), width=width._replace(text=0) if block in still else width)
            for block, width in kept
        ]
        ordered = tuple(sorted([*steps, *students], key=_first_block))
        return cls(checkpoint=checkpoint, depth=depth, steps=ordered, text_runs=runs)

    @cached_property
    def still(self) -> frozenset[int]:
        """Blocks that leave the text stream alone: those of text runs, but for the first of each."""
        return frozenset(block for run in self.text_runs for block in run if block != run.first)

    @property
    def skipped(self) -> tuple[int, ...]:
        """Blocks that neither run nor are stood in for."""
        covered = {block for step in self.steps for block in step.blocks}
        return tuple(block for block in range(self.depth) if block not in covered)

    def to_json(self) -> str:
        """Write as JSON; `from_json` reads it back."""
        return self.model_dump_json(indent=1)

    @classmethod
    def from_json(cls, text: str | bytes) -> Plan:
        """Read from JSON.

        Raises:
            ValueError: not a plan; one line says why.
        """
        return read_json(cls, text, "not a plan")

    @classmethod
    def read(cls, path: str | Path) -> Plan:
        """Read a plan file.

        Raises:
            ValueError: not a plan; one line says why.
            FileNotFoundError: no such file.
        """
        return read_json(cls, Path(path).read_bytes(), f"{path} is not a plan")


def _first_block(step: Step) -> int:
    return step.blocks.first
