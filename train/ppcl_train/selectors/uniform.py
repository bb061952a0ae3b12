"""Uniform selection: intervals of equal length, nothing measured."""

from __future__ import annotations

import itertools

from ppcl_rt import Interval


def uniform_intervals(depth: int, count: int) -> list[Interval]:
    """Divide all blocks into ``count`` intervals whose lengths differ by at most 1."""
    bounds = [round(n * depth / count) for n in range(count + 1)]
    return [Interval(first, after - 1) for first, after in itertools.pairwise(bounds)]
