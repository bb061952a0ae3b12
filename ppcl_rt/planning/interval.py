"""Intervals of blocks: the one place that knows that both ends are included."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

# So that a length is a number that python takes for one.
_LARGEST = 2**31


@dataclass(frozen=True, order=True)
class Interval:
    """Blocks ``first..last``, **both included**, numbered from 0 as in diffusers.

    Use ``in``, ``len`` and iteration instead of arithmetic on the ends.

    Raises:
        ValueError: ``last < first`` or a negative number.
    """

    first: int
    last: int

    def __post_init__(self) -> None:
        if not 0 <= self.first <= self.last < _LARGEST:
            raise ValueError(f"an interval is first..last with 0 <= first <= last < {_LARGEST}, not {self}")

    def __str__(self) -> str:
        return f"{self.first}..{self.last}"

    def __len__(self) -> int:
        return self.last - self.first + 1

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.first, self.last + 1))

    def __contains__(self, block: object) -> bool:
        return isinstance(block, int) and self.first <= block <= self.last

    def overlaps(self, other: Interval) -> bool:
        """Whether the two have a block in common."""
        return self.first <= other.last and other.first <= self.last

    @property
    def key(self) -> str:
        """The interval as a part of a tensor name: ``3-5``."""
        return f"{self.first}-{self.last}"

    @classmethod
    def of_key(cls, key: str) -> Interval:
        """Undo `key`."""
        return cls(*map(int, key.split("-")))
