"""Which tiles a kernel is offered on a target, and which of them it takes: one protocol and one rule for all kernels.

Offered is what fits the shared memory, for all blocks that are resident on a multiprocessor, and is not refused by
`ppcl_kernels.allowed`; none of it spills (`ppcl_kernels.tools.aot` checks). Taken is the cheapest in waves: the blocks
of a launch run ``multiprocessors * resident`` at a time, and a last wave with one block in it costs as much as a full one.
What a wave costs is a guess until measured, and is called so where it is written.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Protocol, TypeVar

from ppcl_kernels.allowed import VARIABLE, is_allowed
from ppcl_kernels.launch import Target


class Tiling(Protocol):
    """What the rule asks of a tile; every kernel's tile is a tuple of integers with these."""

    def __iter__(self) -> Iterator[int]:
        """Its numbers, of which its name is made."""

    @property
    def resident(self) -> int:
        """Blocks that share a multiprocessor."""

    @property
    def cost(self) -> float:
        """Time of a block that has a multiprocessor to itself, in any unit that the tiles of a kernel share."""


AnyTile = TypeVar("AnyTile", bound=Tiling)


def offered(
    kernel: str, tiles: Iterable[AnyTile], target: Target, shared_bytes: Callable[[AnyTile], int] | None = None
) -> tuple[AnyTile, ...]:
    """Keep the tiles that fit on a target, in their order.

    Args:
        kernel: its name, as `ppcl_kernels.tools.aot` and ``PPCL_ALLOWED`` spell it.
        tiles: best guess first.
        shared_bytes: shared memory of a block, None for next to nothing.
    """
    return tuple(
        tile
        for tile in tiles
        if (shared_bytes is None or tile.resident * shared_bytes(tile) <= target.shared_bytes)
        and is_allowed(kernel, tile)
    )


def waves(blocks: int, target: Target, resident: int = 1) -> int:
    """Rounds that so many blocks take, ``resident`` of them at a time on every multiprocessor."""
    return -(-blocks // (target.multiprocessors * resident))


def cheapest(kernel: str, tiles: Iterable[AnyTile], target: Target, blocks: Callable[[AnyTile], int]) -> AnyTile:
    """Choose by the one rule: waves, times ``resident * cost``, which is what a wave costs; the first of equals.

    Args:
        kernel: its name.
        tiles: what `offered` left.
        blocks: how many a launch has with a tile.

    Raises:
        ValueError: no tile was left.
    """
    tiles = tuple(tiles)
    if not tiles:
        raise ValueError(f"no tile of {kernel} may run on {target.arch} ({VARIABLE} refuses them): call the reference")
    return min(tiles, key=lambda tile: waves(blocks(tile), target, tile.resident) * tile.resident * tile.cost)
