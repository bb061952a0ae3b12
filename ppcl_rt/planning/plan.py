"""Plans: what runs for each block of a transformer, and how wide. Plain data, no torch."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cached_property
from itertools import pairwise
from pathlib import Path

from pydantic import Field, field_validator, model_validator

from ppcl_rt.planning.block_spec import ALL_UPDATED, TEXT_NOT_UPDATED, Stream
from ppcl_rt.planning.frozen import Frozen, read_json
from ppcl_rt.planning.interval import Interval
from ppcl_rt.planning.width import Width


class PlannedBlock(Frozen):
    """One thing that runs: a block of the teacher, or a student in place of the blocks of an interval."""

    interval: Interval
    width: Width
    student: bool = False

    @model_validator(mode="after")
    def _valid(self) -> PlannedBlock:
        if not self.student and len(self.interval) != 1:
            raise ValueError(f"blocks {self.interval} need student: true; without it, an interval is one block")
        return self


class Plan(Frozen):
    """One choice out of a catalog: the blocks and students that run, in order. A block that none covers is skipped.

    Attributes:
        checkpoint: fingerprint of the checkpoint that the plan was made for.
        depth: blocks of the dense model.
        blocks: ascending, none overlapping.
        text_runs: where the text stream is not updated (PPCL eq. 8). The first block of a run updates it. The others
            read a linear map of what the first one read, and their width has no group of the text MLP. After the last
            block one linear map brings the text stream up to date. All blocks of a run are blocks of the teacher.
            Ascending, none overlapping.
    """

    checkpoint: str
    depth: int = Field(ge=1)
    blocks: tuple[PlannedBlock, ...]
    text_runs: tuple[Interval, ...] = ()

    @field_validator("blocks")
    @classmethod
    def _ordered(cls, blocks: tuple[PlannedBlock, ...]) -> tuple[PlannedBlock, ...]:
        for before, after in pairwise(blocks):
            if after.interval.first <= before.interval.last:
                raise ValueError(
                    f"block {before.interval} overlaps or follows {after.interval}: put them in order, drop one"
                )
        return blocks

    @model_validator(mode="after")
    def _inside(self) -> Plan:
        if self.blocks and self.blocks[-1].interval.last >= self.depth:
            raise ValueError(f"block {self.blocks[-1].interval} ends beyond the last block, {self.depth - 1}")
        return self

    @model_validator(mode="after")
    def _runs(self) -> Plan:
        for before, after in pairwise(self.text_runs):
            if after.first <= before.last:
                raise ValueError(f"text run {before} overlaps or follows {after}: put them in order, drop one")
        kept = {block.interval.first for block in self.blocks if not block.student}
        for run in self.text_runs:
            if len(run) < 2 or any(block not in kept for block in run):
                raise ValueError(f"text run {run} is not two or more blocks of the teacher that all run")
        return self

    @classmethod
    def of(
        cls,
        checkpoint: str,
        depth: int,
        kept: Iterable[tuple[int, Width]],
        students: Iterable[PlannedBlock] = (),
        text_runs: Iterable[Interval] = (),
    ) -> Plan:
        """Build a plan from kept blocks with their widths, students and text runs."""
        blocks = [PlannedBlock(interval=Interval(block, block), width=width) for block, width in kept]
        ordered = tuple(sorted([*blocks, *students], key=_first_block))
        return cls(checkpoint=checkpoint, depth=depth, blocks=ordered, text_runs=tuple(sorted(text_runs)))

    @cached_property
    def text_not_updated(self) -> frozenset[int]:
        """Blocks that do not update the text stream: those of text runs, but for the first of each."""
        return frozenset(block for run in self.text_runs for block in run if block != run.first)

    def not_updated(self, block: PlannedBlock) -> frozenset[Stream]:
        """The streams that a block leaves as they were."""
        return TEXT_NOT_UPDATED if block.interval.first in self.text_not_updated else ALL_UPDATED

    @property
    def skipped(self) -> tuple[int, ...]:
        """Blocks that neither run nor are stood in for."""
        covered = {block for planned in self.blocks for block in planned.interval}
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


class OnePlan(Frozen):
    """The plan of a checkpoint that was made for it alone, and holds nothing else.

    Its tensors lie in the files as the plan runs them: of each part the units that run, in rank order.

    Attributes:
        blocks, text_runs: as of `Plan`.
        loss: predicted or measured velocity error; None: not known.
    """

    blocks: tuple[PlannedBlock, ...]
    text_runs: tuple[Interval, ...] = ()
    loss: float | None = Field(None, ge=0, allow_inf_nan=False)


def _first_block(block: PlannedBlock) -> int:
    return block.interval.first


def text_maps(run: Interval, depth: int) -> tuple[str, ...]:
    """Names of a text run's maps ``[D, D]``: what each block after the first reads, and how the text stream goes on.

    After the last block of the model nobody reads the text.
    """
    read = [f"z_{block}" for block in run if block != run.first]
    return (*read, *(["text"] if run.last < depth - 1 else []))
