"""Milliseconds of a transformer's blocks as they were measured on one device, and what they say a plan takes.

``bench/suites/bench_gpu_model.py`` writes the table (``sweep.json``, docs/formats.md). Plain data, no torch: a planner
for milliseconds adds up `BlockTimes.change` as it adds up parameters.
"""

from __future__ import annotations

import bisect
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from ppcl_rt.planning.block_spec import ALL_UPDATED, TEXT_NOT_UPDATED, BlockSpec, Stream
from ppcl_rt.planning.frozen import Frozen, read_json
from ppcl_rt.planning.plan import Plan, text_maps
from ppcl_rt.planning.width import LINEAR_MAP, Width

Kind = Literal["block", "text_not_updated", "map", "outer"]
# Milliseconds are above zero: a difference of timings may not be.
LEAST_MS = 1e-6


class TimeRow(Frozen):
    """One measurement.

    Attributes:
        kind: ``block``; ``text_not_updated``, a block of a text run that does not update the text stream (its width has
            no group of the text MLP); ``map``, one linear map ``[D, D]`` of a text run over the text tokens; ``outer``,
            all outside of blocks.
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
        if (self.width is not None) != (self.kind in ("block", "text_not_updated")):
            raise ValueError(f"rows of blocks have a width, others have none: {self.kind} {self.width}")
        return self

    @property
    def not_updated(self) -> frozenset[Stream]:
        """The streams that the block leaves as they were."""
        return TEXT_NOT_UPDATED if self.kind == "text_not_updated" else ALL_UPDATED


class TimeTable(Frozen):
    """What was measured on a device.

    Attributes:
        format: version of this schema.
        device, versions, commit, dirty, date, command: where the figures come from.
        dtype: of weights and activations.
        backend: ``PPCL_BACKEND`` as it was.
        spec: what the blocks are made of.
        blocks: different blocks that were run in turn, so that no weight is read from a cache.
        complete: whether every row that was meant to be measured is there, or in ``left_out``.
        left_out: what failed, and why.
    """

    format: Literal[2]
    device: str
    versions: dict[str, str | None]
    commit: str | None
    dirty: bool | None
    date: str
    command: str
    dtype: str
    backend: str
    spec: BlockSpec
    blocks: int = Field(ge=1)
    complete: bool
    left_out: dict[str, str] = Field(default_factory=dict)
    rows: tuple[TimeRow, ...]

    @model_validator(mode="after")
    def _once(self) -> TimeTable:
        seen = set()
        for row in self.rows:
            key = (row.kind, row.image_tokens, row.text_tokens, row.batch, row.width)
            if key in seen:
                raise ValueError(f"{row.kind} {row.width} at {row.image_tokens} tokens is listed twice: drop one")
            if row.width is not None and set(row.width) != set(self.spec.groups_without(row.not_updated)):
                raise ValueError(f"a row of kind {row.kind} names the groups {', '.join(row.width)}")
            if row.width is not None and not row.width.within(self.spec.full):
                raise ValueError(f"a row is wider than the full block: {row.width}, {self.spec.full}")
            for group, count in (row.width or {}).items():
                if count == LINEAR_MAP and not self.spec.groups[group].mappable:
                    raise ValueError(f"{group} is 1 or more, not 0: {row.width}")
            seen.add(key)
        return self

    @classmethod
    def read(cls, path: str | Path) -> TimeTable:
        """Read a file.

        Raises:
            ValueError: not a table of costs; one line says why.
            FileNotFoundError: no such file.
        """
        return read_json(cls, Path(path).read_bytes(), f"{path} is not a table of costs")

    def at(self, image_tokens: int, text_tokens: int, batch: int = 1) -> BlockTimes:
        """Return the costs at one shape.

        Raises:
            ValueError: nothing that agrees with plain torch was measured there.
        """
        shape = (image_tokens, text_tokens, batch)
        rows = [row for row in self.rows if row.agrees]
        here = tuple(row for row in rows if (row.image_tokens, row.text_tokens, row.batch) == shape)
        costs = BlockTimes(self.spec, here, shape)
        if not any((row.kind, row.width) == ("block", self.spec.full) for row in here):
            there = sorted({(row.image_tokens, row.text_tokens, row.batch) for row in rows})
            raise ValueError(
                f"no full block was measured at {shape} (image tokens, text tokens, batch); there are: {there}"
            )
        return costs


@dataclass(frozen=True)
class BlockTimes:
    """Milliseconds at one shape: a sum over the groups of a width, so that a linear program can count with them.

    ``ms(width) = ms(full) + sum over groups of (ms(full but for this group) - ms(full))``, linear between the counts
    that were measured. Two points are never interpolated to: `LINEAR_MAP`, and the full rank of modulations (the stock
    layers).
    """

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
            raise ValueError(f"{kind}, {group}: {count} lies outside of what was measured at {self.shape}: {known}")
        low, high = counts[above - 1], counts[above]
        share = (count - low) / (high - low)
        return (1 - share) * points[low] + share * points[high] - points[full]

    def plan_ms(self, plan: Plan) -> float:
        """Return the milliseconds of a forward.

        Raises:
            ValueError: a block needs what was not measured.
        """
        return sum(self.parts(plan).values())

    def parts(self, plan: Plan) -> dict[str, float]:
        """Divide the milliseconds of a forward into what adds up.

        Those outside of blocks (``outer``), of full blocks (``full``), of maps (``map``), what changes where the text
        is not updated (``still``), and where a group is narrower, by its name.

        Raises:
            ValueError: as `plan_ms`.
        """
        maps = sum(len(text_maps(run, plan.depth)) for run in plan.text_runs)
        found = {"outer": self.outer_ms, "map": maps * self.map_ms if maps else 0.0, "full": 0.0, "still": 0.0}
        found |= dict.fromkeys(self.spec.full, 0.0)
        for block in plan.blocks:
            not_updated = plan.not_updated(block)
            found["full"] += self._full_ms
            found["still"] += self._whole_ms(not_updated) - self._full_ms
            for group in self.whole(not_updated):
                found[group] += self.change(group, block.width[group], not_updated)
        return found

    def scaled(self, factors: Mapping[str, float]) -> BlockTimes:
        """Multiply each of the `parts` by a factor; those of the blocks' groups by that of the group."""
        full = self._full_ms * factors["full"]

        def ms(row: TimeRow) -> float:
            if row.width is None:
                return row.ms * factors[row.kind]
            reference, whole = self.whole(row.not_updated), self._whole_ms(row.not_updated)
            narrower = [group for group in reference if row.width[group] != reference[group]]
            change = row.ms / row.full_ms * self._full_ms - whole
            factor = factors[narrower[0]] if len(narrower) == 1 else 1.0
            return full + factors["still"] * (whole - self._full_ms) + factor * change

        rows = (row.model_copy(update={"ms": max(ms(row), LEAST_MS), "full_ms": full}) for row in self.rows)
        return BlockTimes(self.spec, tuple(rows), self.shape)

    @property
    def outer_ms(self) -> float:
        """Milliseconds of all that is outside of blocks."""
        return self._only("outer").ms

    @property
    def map_ms(self) -> float:
        """Milliseconds of one map of a text run."""
        return self._only("map").ms

    def counts(self, group: str) -> Sequence[int]:
        """Return the counts at which a group was measured, ascending."""
        return sorted(self._curve("block", group))

    def _only(self, kind: Kind) -> TimeRow:
        for row in self.rows:
            if row.kind == kind:
                return row
        raise ValueError(f"no row of kind {kind} was measured at {self.shape}")

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
            raise ValueError(f"no full row of kind {kind} was measured at {self.shape}")
        return points


def _kind(not_updated: Collection[Stream]) -> Kind:
    return "text_not_updated" if "text" in not_updated else "block"
