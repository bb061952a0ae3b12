"""Greedy removal: blocks are removed one after the other, always the block whose removal costs least."""

from __future__ import annotations

from collections.abc import Callable, Sequence


def removal_order(depth: int, loss: Callable[[Sequence[int]], float]) -> list[int]:
    """Order all blocks but one by when they are removed.

    Args:
        depth: number of blocks.
        loss: blocks that are kept -> loss of the model that runs these alone. Called ``depth (depth + 1) / 2 - 1``
            times.
    """
    kept, removed = list(range(depth)), []

    def loss_without(block: int) -> float:
        return loss([n for n in kept if n != block])

    while len(kept) > 1:
        removed.append(min(kept, key=loss_without))
        kept.remove(removed[-1])
    return removed
