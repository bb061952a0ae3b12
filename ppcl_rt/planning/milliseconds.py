"""Milliseconds of a transformer's blocks as they were measured on one device, and what they say a plan takes.

Plain data, no torch: a planner for milliseconds adds up `BlockTimes.change` as it adds up parameters. Each kind of
block has times of its own. The file of them is a `ppcl_rt.planning.time_table.TimeTable`.
"""

from __future__ import annotations

import bisect
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, TypeAlias

from pydantic import Field, model_validator

from ppcl_rt.planning.architecture import Architecture
from ppcl_rt.planning.block_spec import ALL_UPDATED, TEXT_NOT_UPDATED, BlockSpec, Stream
from ppcl_rt.planning.frozen import Frozen
from ppcl_rt.planning.plan import Plan
from ppcl_rt.planning.width import LINEAR_MAP, Width

Kind = Literal["block", "text_not_updated", "map", "outer"]
# A share of a plan's milliseconds: the kind of block and what of it; no kind for what is around the blocks.
PartName: TypeAlias = tuple[str, str]
# Milliseconds are above zero: a difference of timings may not be.
LEAST_MS = 1e-6


class TimeRow(Frozen):
    """One measurement.

    Attributes:
        kind: ``block``; ``text_not_updated``, a block of a text run that does not update the text stream (its width has
            no group of the text MLP); ``map``, one linear map ``[D, D]`` of a text run over the text tokens; ``outer``,
            all outside of blocks.
        block_kind: of a block, its kind in the architecture; None for ``map`` and ``outer``.
        image_tokens, text_tokens, batch: what it ran on; no key mask.
        width: of a block; None for ``map`` and ``outer``.
        ms: on the device, of one block, map or forward without blocks; python is ahead of it.
        full_ms: of the full block, measured in turn with this one: ``ms / full_ms`` holds where clocks have changed.
        host_ms: until the call returned.
        repeats: timings that ``ms`` and ``full_ms`` are the medians of.
        operations: milliseconds of each operation of the block, timed in another pass; they need not add up to ``ms``.
        agrees: whether the result was that of plain torch, before and after it was timed.
    """

    kind: Kind
    block_kind: str | None = None
    image_tokens: int = Field(ge=1)
    text_tokens: int = Field(ge=1)
    batch: int = Field(1, ge=1)
    width: Width | None = None
    ms: float = Field(gt=0, allow_inf_nan=False)
    full_ms: float = Field(gt=0, allow_inf_nan=False)
    host_ms: float = Field(gt=0, allow_inf_nan=False)
    repeats: int = Field(ge=1)
    operations: dict[str, float] = Field(default_factory=dict)
    agrees: bool

    @model_validator(mode="after")
    def _sound(self) -> TimeRow:
        of_block = self.kind in ("block", "text_not_updated")
        if (self.width is not None) != of_block or (self.block_kind is not None) != of_block:
            said = f"{self.kind} {self.block_kind} {self.width}"
            raise ValueError(f"rows of blocks have a width and a kind of block, others have none: {said}")
        return self

    @property
    def not_updated(self) -> frozenset[Stream]:
        """The streams that the block leaves as they were."""
        return TEXT_NOT_UPDATED if self.kind == "text_not_updated" else ALL_UPDATED


@dataclass(frozen=True)
class BlockTimes:
    """Milliseconds of blocks of one kind at one shape: a sum over the groups of a width, as linear programs count.

    ``ms(width) = ms(full) + sum over groups of (ms(full but for this group) - ms(full))``, linear between the counts
    that were measured. Two points are never interpolated to: `LINEAR_MAP`, and the full rank of modulations (the stock
    layers).

    Attributes:
        name: of the kind.
        spec: what a block of it is made of.
        rows: of such blocks.
        shape: (image tokens, text tokens, batch).
    """

    name: str
    spec: BlockSpec
    rows: tuple[TimeRow, ...]
    shape: tuple[int, int, int]

    def ms(self, width: Width, not_updated: Collection[Stream] = ALL_UPDATED) -> float:
        """Return the milliseconds of a block.

        Args:
            not_updated: the streams that it leaves as they were (`Plan.not_updated`).

        Raises:
            ValueError: a count lies outside of what was measured.
        """
        changes = (self.change(group, width[group], not_updated) for group in self.whole(not_updated))
        return self._whole_ms(not_updated) + sum(changes)

    def _whole_ms(self, not_updated: Collection[Stream]) -> float:
        """Milliseconds of a block at full width."""
        whole = self.whole(not_updated)
        return self._curve(_kind(not_updated), next(iter(whole)))[next(iter(whole.values()))]

    def change(self, group: str, count: int, not_updated: Collection[Stream] = ALL_UPDATED) -> float:
        """Return the milliseconds that a block takes more when only this group differs from the full block's.

        A block that does not update the text goes by the other blocks' figures where it has none of its own.

        Raises:
            ValueError: the count lies outside of what was measured.
        """
        full, kind = self.spec.full[group], _kind(not_updated)
        points = self._curve(kind, group)
        if kind != "block" and len(points) < 2:
            kind, points = "block", self._curve("block", group)
        if count in points:
            return points[count] - points[full]
        never = {LINEAR_MAP, full} if self.spec.groups[group].is_rank else {LINEAR_MAP}
        counts = [n for n in sorted(points) if n not in never]
        above = bisect.bisect(counts, count)
        if not 0 < above < len(counts):
            known = ", ".join(map(str, sorted(points)))
            said = f"{kind} of kind {self.name}, {group}: {count}"
            raise ValueError(f"{said} lies outside of what was measured at {self.shape}: {known}")
        low, high = counts[above - 1], counts[above]
        share = (count - low) / (high - low)
        return (1 - share) * points[low] + share * points[high] - points[full]

    def parts(self, blocks: Iterable[tuple[Width, Collection[Stream]]]) -> dict[str, float]:
        """Divide the milliseconds of blocks into what adds up.

        Those of full blocks (``full``), what changes where the text is not updated (``still``), and where a group is
        narrower, by its name.

        Args:
            blocks: width of each, and the streams that it leaves as they were.

        Raises:
            ValueError: a block needs what was not measured.
        """
        found = {"full": 0.0, "still": 0.0, **dict.fromkeys(self.spec.full, 0.0)}
        for width, not_updated in blocks:
            found["full"] += self._full_ms
            found["still"] += self._whole_ms(not_updated) - self._full_ms
            for group in self.whole(not_updated):
                found[group] += self.change(group, width[group], not_updated)
        return found

    def scaled(self, factors: Mapping[str, float]) -> BlockTimes:
        """Multiply each of the `parts` by a factor; those of the blocks' groups by that of the group."""
        full = max(self._full_ms * factors["full"], LEAST_MS)

        def ms(row: TimeRow) -> float:
            assert row.width is not None, "these rows are of blocks"
            reference, whole = self.whole(row.not_updated), self._whole_ms(row.not_updated)
            narrower = [group for group in reference if row.width[group] != reference[group]]
            change = row.ms / row.full_ms * self._full_ms - whole
            factor = factors[narrower[0]] if len(narrower) == 1 else 1.0
            return full + factors["still"] * (whole - self._full_ms) + factor * change

        rows = (row.model_copy(update={"ms": max(ms(row), LEAST_MS), "full_ms": full}) for row in self.rows)
        return BlockTimes(self.name, self.spec, tuple(rows), self.shape)

    def counts(self, group: str) -> Sequence[int]:
        """Return the counts at which a group was measured, ascending."""
        return sorted(self._curve("block", group))

    def whole(self, not_updated: Collection[Stream] = ALL_UPDATED) -> Width:
        """The full width of a block that leaves some streams as they were."""
        return Width({group: self.spec.full[group] for group in self.spec.groups_without(not_updated)})

    @cached_property
    def _full_ms(self) -> float:
        [row] = (row for row in self.rows if (row.kind, row.width) == ("block", self.spec.full))
        return row.ms

    def _curve(self, kind: Kind, group: str) -> dict[int, float]:
        """Milliseconds by count where all else is full, on the clock of the full block's own row."""
        if (kind, group) not in self._curves:
            self._curves[kind, group] = self._made_curve(kind, group)
        return self._curves[kind, group]

    @cached_property
    def _curves(self) -> dict[tuple[Kind, str], dict[int, float]]:
        """Those that were asked for so far: a plan asks for each of them many times."""
        return {}

    def _made_curve(self, kind: Kind, group: str) -> dict[int, float]:
        rows = [(row, row.width) for row in self.rows if row.kind == kind and row.width is not None]
        whole = self.whole(TEXT_NOT_UPDATED if kind == "text_not_updated" else ALL_UPDATED)
        points = {
            width[group]: row.ms / row.full_ms * self._full_ms
            for row, width in rows
            if width == whole.replace(**{group: width[group]})
        }
        if whole[group] not in points:
            raise ValueError(f"no full row of kind {kind} of {self.name} was measured at {self.shape}")
        return points


@dataclass(frozen=True)
class Times:
    """Milliseconds at one shape of all that a forward is made of.

    Attributes:
        kinds: of the blocks of each kind.
        around: rows of what is not in a block.
        shape: (image tokens, text tokens, batch).
    """

    kinds: Mapping[str, BlockTimes]
    around: tuple[TimeRow, ...]
    shape: tuple[int, int, int]

    @classmethod
    def of_rows(cls, specs: Mapping[str, BlockSpec], rows: Sequence[TimeRow], shape: tuple[int, int, int]) -> Times:
        """Sort rows, all of one shape, by the kind of block that they are of."""
        kinds = {
            kind: BlockTimes(kind, spec, tuple(row for row in rows if row.block_kind == kind), shape)
            for kind, spec in specs.items()
        }
        return cls(kinds, tuple(row for row in rows if row.block_kind is None), shape)

    @property
    def rows(self) -> tuple[TimeRow, ...]:
        """All rows."""
        return (*(row for times in self.kinds.values() for row in times.rows), *self.around)

    def of(self, kind: str) -> BlockTimes:
        """Return those of the blocks of a kind.

        Raises:
            ValueError: there are none.
        """
        if kind not in self.kinds:
            raise ValueError(f"no blocks of kind {kind} were measured; there are: {', '.join(self.kinds)}")
        return self.kinds[kind]

    def parts(self, architecture: Architecture, plan: Plan) -> dict[PartName, float]:
        """Divide the milliseconds of a forward into what adds up.

        Those outside of blocks (``outer``), of maps (``map``), and the parts of the blocks of each kind
        (`BlockTimes.parts`).

        Raises:
            ValueError: a block needs what was not measured.
        """
        maps = sum(len(architecture.run_maps(run)) for run in plan.text_runs)
        found = {("", "outer"): self.outer_ms, ("", "map"): maps * self.map_ms if maps else 0.0}
        for kind in dict.fromkeys(each.kind for each in architecture.lists):
            blocks = [block for block in plan.blocks if architecture.kind(block.interval.first) == kind]
            parts = self.of(kind).parts((block.width, plan.not_updated(block)) for block in blocks)
            found |= {(kind, name): ms for name, ms in parts.items()}
        return found

    def scaled(self, factors: Mapping[PartName, float]) -> Times:
        """Multiply each of the `parts` by a factor."""
        around = (row.model_copy(update={"ms": max(row.ms * factors["", row.kind], LEAST_MS)}) for row in self.around)
        kinds = {
            kind: times.scaled({name: factor for (of, name), factor in factors.items() if of == kind})
            for kind, times in self.kinds.items()
        }
        return Times(kinds, tuple(around), self.shape)

    @property
    def outer_ms(self) -> float:
        """Milliseconds of all that is outside of blocks."""
        return self._only("outer").ms

    @property
    def map_ms(self) -> float:
        """Milliseconds of one map of a text run."""
        return self._only("map").ms

    def _only(self, kind: Kind) -> TimeRow:
        for row in self.around:
            if row.kind == kind:
                return row
        raise ValueError(f"no row of kind {kind} was measured at {self.shape}")


def _kind(not_updated: Collection[Stream]) -> Kind:
    return "text_not_updated" if "text" in not_updated else "block"
