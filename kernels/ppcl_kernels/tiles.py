"""Which tiles are offered on a target, and which of them is taken: one protocol and one rule for all kernels.

A tile is offered if the thread blocks that are resident on a multiprocessor fit its shared memory, and if
`ppcl_kernels.allowed` does not refuse the tile. Offered tiles do not spill registers (`ppcl_kernels.tools.aot` checks).

Of the offered tiles the cheapest in waves is taken. Thread blocks run ``multiprocessors * resident`` at a time, which
is one wave, and a last wave with a single thread block costs as much as a full one. The cost of a wave is a guess until
it is measured; such guesses are marked where they are written.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Protocol, TypeVar

from ppcl_kernels.allowed import VARIABLE, is_allowed
from ppcl_kernels.launch import Target


class Tiling(Protocol):
    """A tile as the rule sees it; the tile of every kernel is a tuple of integers with these members."""

    def __iter__(self) -> Iterator[int]:
        """Iterate over its numbers, which make up its name."""

    @property
    def resident(self) -> int:
        """Thread blocks that share a multiprocessor."""

    @property
    def cost(self) -> float:
        """Time of a thread block that has a multiprocessor to itself, in a unit common to the tiles of a kernel."""


AnyTile = TypeVar("AnyTile", bound=Tiling)


def offered(
    kernel: str, tiles: Iterable[AnyTile], target: Target, shared_bytes: Callable[[AnyTile], int] | None = None
) -> tuple[AnyTile, ...]:
    """Return the tiles that fit a target and are not refused, in their order.

    Args:
        kernel: its name in `ppcl_kernels.tools.aot` and in the file of ``PPCL_ALLOWED``.
        tiles: best guess first.
        shared_bytes: shared memory of a thread block with a tile, None if it is negligible.
    """
    return tuple(
        tile
        for tile in tiles
        if (shared_bytes is None or tile.resident * shared_bytes(tile) <= target.shared_bytes)
        and is_allowed(kernel, tile)
    )


def waves(blocks: int, target: Target, resident: int = 1) -> int:
    """Return the waves that ``blocks`` thread blocks take with ``resident`` on each multiprocessor."""
    return -(-blocks // (target.multiprocessors * resident))


def cheapest(kernel: str, tiles: Iterable[AnyTile], target: Target, blocks: Callable[[AnyTile], int]) -> AnyTile:
    """Return the tile with the least waves times ``resident * cost``, the cost of a wave; the first among equals.

    Args:
        kernel: its name.
        tiles: those that `offered` returned.
        blocks: number of thread blocks of a launch with a tile.

    Raises:
        ValueError: there is no tile.
    """
    tiles = tuple(tiles)
    if not tiles:
        raise ValueError(f"no tile of {kernel} may run on {target.arch} ({VARIABLE} refuses them): call the reference")
    return min(tiles, key=lambda tile: waves(blocks(tile), target, tile.resident) * tile.resident * tile.cost)
