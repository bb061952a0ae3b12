"""The figure of a selection by eq. 5: how CKA and its differences run over the blocks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from ppcl_rt import Interval

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# By (u, k) with u <= k: a value of the probes of the blocks u..k, both included.
Curves = Mapping[tuple[int, int], float]


def draw_curves(
    cka: Mapping[str, Curves], differences: Mapping[str, Curves], intervals: Sequence[Interval], decides: str
) -> Figure:
    """Draw ``cka(u, k)`` and ``D(u, k)`` over ``k`` from the start ``u`` of every interval, a column a curve.

    Intervals are shaded. A curve is strong up to the block after its interval, where D rises; the rest is faint.

    Args:
        cka: by the name of a stream, and for both together under ``decides``.
        differences: ``D`` under the same names.
        intervals: what was found.
        decides: the name whose curve decides.
    """
    # Imported here, so that only those who draw wait for it. A figure made without pyplot needs no display.
    from matplotlib import colormaps
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    depth = 1 + max(k for _, k in cka[decides])
    # 0.1 inch a block, so that 60 blocks can be told apart.
    figure = Figure(figsize=(3 * max(4.2, 0.1 * depth + 1), 6.4), layout="constrained")
    axes = figure.subplots(2, len(cka), sharex=True, sharey="row")
    colours = colormaps["viridis"].resampled(len(intervals) + 1)
    for column, name in enumerate(cka):
        axes[0, column].set_title(f"{name}, which decides" if name == decides else f"{name} stream")
        for row, (label, curves) in enumerate((("cka(u, k)", cka[name]), ("D(u, k)", differences[name]))):
            axis = axes[row, column]
            axis.set_xlim(-0.6, depth - 0.4)
            for n, interval in enumerate(intervals):
                u, colour = interval.first, colours(n)
                axis.axvspan(u - 0.4, interval.last + 0.4, color=colour, alpha=0.12, linewidth=0)
                ks = range(u, depth)
                values = [curves[u, k] for k in ks]
                strong = len(interval) + 1
                axis.plot(ks, values, color=colour, alpha=0.25, linewidth=1)
                axis.plot(ks[:strong], values[:strong], color=colour, marker="o", markersize=3.5, linewidth=1.8)
            if column == 0:
                axis.set_ylabel(label)
            if row:
                axis.set_xlabel("block k, from 0")
            axis.xaxis.set_major_locator(MaxNLocator(integer=True))
            axis.grid(alpha=0.25)
    figure.suptitle(f"intervals by eq. 5, both ends included: {'  '.join(map(str, intervals))}", wrap=True, fontsize=11)
    return figure
