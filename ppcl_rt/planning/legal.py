"""What a checkpoint offers for one block, one interval or one text run, and what each offer loses. Plain data."""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

from pydantic import ConfigDict, Field, RootModel, field_validator, model_validator

from ppcl_rt.planning.frozen import Frozen
from ppcl_rt.planning.interval import Interval
from ppcl_rt.planning.width import Width

# The teacher block of an interval that a student was copied from; ``average`` is the mean of all.
Start = Literal["first", "middle", "last", "average"]


class LegalCount(NamedTuple):
    """A count that a group may have, and the velocity error of the dense model with this group alone narrowed to it.

    Attributes:
        units: the count.
        loss: see `ppcl_rt.planning.catalog.Catalog`.
        bands: the loss's parts in each band of the timestep (`Catalog.edges`); none where it was not measured so.
    """

    units: int
    loss: float
    bands: tuple[float, ...] = ()


class LegalWidths(RootModel[dict[str, tuple[LegalCount, ...]]]):
    """The legal counts of a block by group, widest first; the widest is the full count and loses nothing."""

    model_config = ConfigDict(frozen=True)

    @field_validator("root")
    @classmethod
    def _sound(cls, groups: dict[str, tuple[LegalCount, ...]]) -> dict[str, tuple[LegalCount, ...]]:
        for group, legal in groups.items():
            counts = [count.units for count in legal]
            if not counts or counts[0] < 1 or min(counts) < 0 or counts != sorted(set(counts), reverse=True):
                raise ValueError(f"{group}: counts fall strictly from the full one and stay at 0 or more, not {counts}")
            if legal[0].loss != 0 or not all(count.loss > 0 and math.isfinite(count.loss) for count in legal[1:]):
                raise ValueError(f"{group}: the full count loses 0, every narrower one more than 0")
        return groups

    @classmethod
    def only(cls, width: Width) -> LegalWidths:
        """A block that runs at one width."""
        return cls({group: (LegalCount(count, 0.0),) for group, count in width.items()})

    @property
    def groups(self) -> tuple[str, ...]:
        """Names of the groups."""
        return tuple(self.root)

    def of(self, group: str) -> tuple[LegalCount, ...]:
        """The legal counts of one group."""
        return self.root[group]

    def has(self, group: str, units: int) -> bool:
        """Whether a count is legal."""
        return any(count.units == units for count in self.of(group))

    def highest_rank(self, group: str) -> int:
        """The highest rank below the full one that a rank group comes in, 0 for none: lower ones are prefixes of it."""
        legal = self.of(group)
        return legal[1].units if len(legal) > 1 else 0

    @property
    def full(self) -> Width:
        """The dense width."""
        return Width({group: legal[0].units for group, legal in self.root.items()})


def starting_blocks(interval: Interval, start: Start) -> tuple[int, ...]:
    """The blocks of an interval that a student with some start is a copy of, or the mean of."""
    first, last = interval.first, interval.last
    starts = {"first": (first,), "middle": ((first + last) // 2,), "last": (last,)}
    return starts.get(start, tuple(interval))


class Student(Frozen):
    """A block distilled to stand in for an interval.

    Attributes:
        interval: the blocks that it replaces, all of one list and so of one kind.
        start: the teacher block of the interval that it was copied from.
        loss: velocity error of the dense model with this student alone plugged in, at full width.
        widths: its own legal widths.
        bands: as in `LegalCount`.
    """

    interval: Interval
    start: Start
    loss: float = Field(gt=0, allow_inf_nan=False)
    widths: LegalWidths
    bands: tuple[float, ...] = ()

    @property
    def copied_from(self) -> tuple[int, ...]:
        """The teacher's blocks that it is a copy of, or the mean of."""
        return starting_blocks(self.interval, self.start)


class TextRun(Frozen):
    """Blocks along which the text stream need not be updated (PPCL eq. 8; `Plan.text_runs`).

    Attributes:
        interval: two or more blocks; the first updates the text stream as ever.
        loss: velocity error of the dense model with this run alone.
        bands: as in `LegalCount`.
    """

    interval: Interval
    loss: float = Field(gt=0, allow_inf_nan=False)
    bands: tuple[float, ...] = ()

    @field_validator("interval")
    @classmethod
    def _long(cls, interval: Interval) -> Interval:
        if len(interval) < 2:
            raise ValueError(f"a text run is two or more blocks, not {interval}")
        return interval


# A size beyond this is a broken catalog.
MOST_BUCKETS = 2**20


class Sketch(Frozen):
    """What the sketches of a checkpoint are.

    Attributes:
        seed: decides buckets and signs.
        size: buckets, the numbers of a row.
        bands: of the timestep; each has an equal share of the buckets, in order.
    """

    seed: int = Field(ge=0, lt=2**63)
    size: int = Field(ge=1, le=MOST_BUCKETS)
    bands: int = Field(ge=1)

    @model_validator(mode="after")
    def _a_bucket_for_each(self) -> Sketch:
        if self.size < self.bands:
            raise ValueError(f"{self.size} buckets cannot be shared by {self.bands} bands")
        return self

    def slice(self, band: int) -> slice:
        """The buckets of a band."""
        return slice(band * self.size // self.bands, (band + 1) * self.size // self.bands)
