"""Milliseconds of a transformer's blocks as they were measured on one device, and what they say a plan takes.

``bench/suites/bench_gpu_model.py`` writes the table (``sweep.json``, docs/formats.md). Plain data, no torch: a planner
for milliseconds adds up `Costs.change` as it adds up parameters.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from ppcl_rt.planning.catalog import text_maps
from ppcl_rt.planning.plan import Frozen, Plan, Width, read_json

Kind = Literal["block", "still", "map", "outer"]


class CostRow(Frozen):
    """One measurement.

    Attributes:
        kind: ``block``; ``still``, a block in a text run that leaves the text stream alone (its ``width.text`` is 0);
            ``map``, one linear map ``[D, D]`` of a text run over the text tokens; ``outer``, all outside of blocks.
        image_tokens, text_tokens, batch: what it ran on; no key mask.
        width: of a block; None for ``map`` and ``outer``.
        ms: on the device, of one block, map or forward without blocks; python is ahead of it.
        full_ms: of the full block, in turn with this one: ``ms / full_ms`` holds where clocks have changed since.
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
    def _sound(self) -> CostRow:
        if (self.width is not None) != (self.kind in ("block", "still")):
            raise ValueError(f"rows of blocks have a width, others have none: {self.kind} {self.width}")
        if self.width is not None and (min(self.width) < 0 or min(self.width.heads, self.width.modulation) < 1):
            raise ValueError(f"heads and modulation are 1 or more, MLPs 0 or more: {self.width}")
        if self.kind == "still" and self.width is not None and self.width.text:
            raise ValueError(f"a block that leaves the text alone runs no text MLP: its text width is 0: {self.width}")
        return self


class CostTable(Frozen):
    """What was measured on a device.

    Attributes:
        format: version of this schema.
        device, versions, commit, dirty, date, command: where the figures come from.
        dtype: of weights and activations.
        backend: ``PPCL_BACKEND`` as it was.
        dim, head_dim, full: width D of the streams, channels of a head, the full block.
        blocks: different blocks that were run in turn, so that no weight is read from a cache.
        complete: whether every row that was meant to be measured is there, or in ``left_out``.
        left_out: what failed, and why.
    """

    format: Literal[1]
    device: str
    versions: dict[str, str | None]
    commit: str | None
    dirty: bool | None
    date: str
    command: str
    dtype: str
    backend: str
    dim: int = Field(ge=1)
    head_dim: int = Field(ge=1)
    full: Width
    blocks: int = Field(ge=1)
    complete: bool
    left_out: dict[str, str] = Field(default_factory=dict)
    rows: tuple[CostRow, ...]

    @model_validator(mode="after")
    def _once(self) -> CostTable:
        seen = set()
        for row in self.rows:
            key = (row.kind, row.image_tokens, row.text_tokens, row.batch, row.width)
            if key in seen:
                raise ValueError(f"{row.kind} {row.width} at {row.image_tokens} tokens is listed twice: drop one")
            if row.width is not None and not row.width.within(self.full):
                raise ValueError(f"a row is wider than the full block: {row.width}, {self.full}")
            seen.add(key)
        return self

    @classmethod
    def read(cls, path: str | Path) -> CostTable:
        """Read a file.

        Raises:
            ValueError: not a table of costs; one line says why.
            FileNotFoundError: no such file.
        """
        return read_json(cls, Path(path).read_bytes(), f"{path} is not a table of costs")

    def at(self, image_tokens: int, text_tokens: int, batch: int = 1) -> Costs:
        """Return the costs at one shape.

        Raises:
            ValueError: nothing that agrees with plain torch was measured there.
        """
        shape = (image_tokens, text_tokens, batch)
        rows = [row for row in self.rows if row.agrees]
        here = tuple(row for row in rows if (row.image_tokens, row.text_tokens, row.batch) == shape)
        costs = Costs(self.full, here, shape)
        if not any((row.kind, row.width) == ("block", self.full) for row in here):
            there = sorted({(row.image_tokens, row.text_tokens, row.batch) for row in rows})
            raise ValueError(
                f"no full block was measured at {shape} (image tokens, text tokens, batch); there are: {there}"
            )
        return costs


@dataclass(frozen=True)
class Costs:
    """Milliseconds at one shape: a sum over the groups of `Width`, so that a linear program can count with them.

    ``ms(width) = ms(full) + sum over groups of (ms(full but for this group) - ms(full))``, linear between the counts
    that were measured. Two points stand apart and are never interpolated to: 0 channels (a linear map) and
    the full rank of modulations (the stock layers).
    """

    full: Width
    rows: tuple[CostRow, ...]
    shape: tuple[int, int, int]

    def ms(self, width: Width, still: bool = False) -> float:
        """Return the milliseconds of a block; ``still`` as in `Plan.still`.

        Raises:
            ValueError: a count lies outside of what was measured.
        """
        kind: Kind = "still" if still else "block"
        total = self._base(kind)
        for group, count in width._asdict().items():
            if not (still and group == "text"):
                total += self.change(group, count, still)
        return total

    def change(self, group: str, count: int, still: bool = False) -> float:
        """Return the milliseconds that a block takes more when only this group differs from the full block's.

        A block that leaves the text alone goes by the other blocks' figures where it has none of its own.

        Raises:
            ValueError: the count lies outside of what was measured.
        """
        full = getattr(self.full, group)
        kind: Kind = "still" if still else "block"
        points = self._curve(kind, group)
        if still and len(points) < 2:
            kind, points = "block", self._curve("block", group)
        if count in points:
            return points[count] - points[full]
        apart = {0} if group in ("image", "text") else {full} if group == "modulation" else set()
        counts = [n for n in sorted(points) if n not in apart]
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
            ValueError: a step needs what was not measured.
        """
        total = self._only("outer").ms
        total += sum(self.ms(step.width, step.blocks.first in plan.still) for step in plan.steps)
        maps = sum(len(text_maps(run, plan.depth)) for run in plan.text_runs)
        return total + (maps * self._only("map").ms if maps else 0.0)

    def counts(self, group: str) -> Sequence[int]:
        """Return the counts at which a group was measured, ascending."""
        return sorted(self._curve("block", group))

    def _only(self, kind: Kind) -> CostRow:
        for row in self.rows:
            if row.kind == kind:
                return row
        raise ValueError(f"no row of kind {kind} was measured at {self.shape}")

    def _whole(self, kind: Kind) -> Width:
        return self.full._replace(text=0) if kind == "still" else self.full

    def _base(self, kind: Kind) -> float:
        return self._curve(kind, "heads")[self.full.heads]

    @cached_property
    def _full_ms(self) -> float:
        [row] = (row for row in self.rows if (row.kind, row.width) == ("block", self.full))
        return row.ms

    def _curve(self, kind: Kind, group: str) -> dict[int, float]:
        """Milliseconds by count where all else is full, on the clock of the full block's own row."""
        whole = self._whole(kind)
        widths = [(row, row.width) for row in self.rows if row.kind == kind and row.width is not None]
        points = {
            getattr(width, group): row.ms / row.full_ms * self._full_ms
            for row, width in widths
            if width == whole._replace(**{group: getattr(width, group)})
        }
        if getattr(whole, group) not in points:
            raise ValueError(f"no full row of kind {kind} was measured at {self.shape}")
        return points
