"""Text runs in closed form: linear maps for blocks along which the text stream is not updated (PPCL eq. 8)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from ppcl_rt import Interval
from ppcl_train.closed_form.least_squares import LeastSquares
from ppcl_train.config.settings import RunConfig
from ppcl_train.data import calibration, streams


def later_blocks(model: Any, longest: int) -> dict[int, int]:
    """Count the blocks that a run may cover after its first block, for each block that a run may begin with.

    A run lies in one list of blocks, which can leave the text stream as it was.

    Args:
        longest: the most blocks of a run.
    """
    architecture = model.catalog.architecture
    counts = {}
    for first in range(architecture.depth - 1):
        lasts = range(first + 1, min(first + longest, architecture.depth))
        later = sum(architecture.one_kind(Interval(first, last)) for last in lasts)
        if later and "text" in architecture.spec(first).may_leave:
            counts[first] = later
    return counts


class TextRunFits:
    """Regressions of all maps of text runs, by the block that a run begins with; its later blocks side by side.

    Attributes:
        reads: from what the first block reads to what later ones read, less what the first one reads.
        moves: from the text after the first block to the text after later ones, less the text after the first.
    """

    def __init__(self, dim: int, reach: dict[int, int]) -> None:
        self.dim, self.reach = dim, reach
        self.reads = {first: LeastSquares(dim, later * dim) for first, later in reach.items()}
        self.moves = {first: LeastSquares(dim, later * dim) for first, later in reach.items()}

    def maps(self, depth: int) -> Iterator[tuple[str, LeastSquares, slice]]:
        """Yield every map once for all runs with its first block: its path, its regression, and its rows there."""
        for first, later in self.reach.items():
            for n in range(later):
                rows, last = slice(n * self.dim, (n + 1) * self.dim), first + 1 + n
                yield f"text_runs.{first}.z_{last}", self.reads[first], rows
                if last < depth - 1:
                    # After the last block of the model nobody reads the text.
                    yield f"text_runs.{first}.text_{last}", self.moves[first], rows


@torch.no_grad()
def observe_text_runs(run: RunConfig, model: Any, samples: int) -> TextRunFits:
    """Collect what the maps of every text run up to the longest are fitted from, on the teacher's streams."""
    architecture, blocks = model.catalog.architecture, model.blocks()
    fits = TextRunFits(architecture.dim, later_blocks(model, run.width.longest_text_run))
    reach, reads, moves = fits.reach, fits.reads, fits.moves
    in_runs = sorted({n for first, later in reach.items() for n in range(first, first + later + 1)})
    for batch in calibration.batches(run, samples, calibration.WIDTH, teacher=model):
        trace = streams.trace(model, batch)
        words, condition = batch.mask, trace.context[model.condition]
        weight = batch.weight[:, None].expand(words.shape)[words]
        texts = [state.text[words] for state in trace.streams]
        read = {n: blocks[n].text_input(trace.streams[n].text, condition, blocks[n].spec.full)[words] for n in in_runs}
        for first, later in reach.items():
            others = range(first + 1, first + 1 + later)
            reads[first].add(read[first], torch.cat([read[n] - read[first] for n in others], 1), weight)
            text = texts[first + 1]
            moves[first].add(text, torch.cat([texts[n + 1] - text for n in others], 1), weight)
    return fits


def fit_text_runs(run: RunConfig, model: Any) -> dict[str, torch.Tensor]:
    """Fit the maps of every text run up to the longest (`Plan.text_runs`).

    Returns:
        ``text_runs.{first}.z_{n}.weight`` ``[D, D]`` and ``.bias`` ``[D]`` for what block n reads, and
        ``text_runs.{first}.text_{last}`` for how the text goes on after a run.
    """
    fits = observe_text_runs(run, model, run.width.samples)
    solved = {id(fit): fit.solve(run.width.ridge) for by in (fits.reads, fits.moves) for fit in by.values()}
    maps = {}
    for path, fit, rows in fits.maps(model.catalog.architecture.depth):
        weight, bias = solved[id(fit)]
        maps[f"{path}.weight"], maps[f"{path}.bias"] = weight[rows].clone(), bias[rows].clone()
    return maps
