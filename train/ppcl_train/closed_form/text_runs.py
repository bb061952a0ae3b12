"""Text runs in closed form: linear maps for blocks along which the text stream is not updated (PPCL eq. 8)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from ppcl_rt import Interval, Streams
from ppcl_train.closed_form.compression import map_as_factors
from ppcl_train.closed_form.least_squares import LeastSquares
from ppcl_train.config.settings import RunConfig
from ppcl_train.data import streams
from ppcl_train.data.calibration import Inputs
from ppcl_train.data.passes import Passes


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
    """Regressions of maps of text runs, by the block that a run begins with; its later blocks side by side.

    At a width of 3,072, those of one first block with 5 later ones take 0.91 GB.

    Attributes:
        reads: from what the first block reads to what later ones read, less what the first one reads.
        moves: from the text after the first block to the text after later ones, less the text after the first.
    """

    def __init__(self, dim: int, reach: Mapping[int, int]) -> None:
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

    def add(self, model: Any, batch: Inputs, walk: Callable[[streams.Step], None]) -> None:
        """Add what the blocks of the runs read of the text and make of it; no longer held than a run is open."""
        blocks, words = model.blocks(), batch.mask
        weight = batch.weight[:, None].expand(words.shape)[words]
        within = {n for first, later in self.reach.items() for n in range(first, first + later + 1)}
        read: dict[int, torch.Tensor] = {}
        text: dict[int, torch.Tensor] = {}

        def step(number: int, state: Streams, context: dict[str, Any]) -> Streams:
            block = blocks[number]
            if number not in within:
                return streams.run_block(block, state, context)
            read[number] = block.text_input(state.text, context[model.condition], block.spec.full)[words]
            after = streams.run_block(block, state, context)
            text[number] = after.text[words]
            for first in (first for first, later in self.reach.items() if first + later == number):
                others = range(first + 1, number + 1)
                self.reads[first].add(read[first], torch.cat([read[n] - read[first] for n in others], 1), weight)
                self.moves[first].add(text[first], torch.cat([text[n] - text[first] for n in others], 1), weight)
            still = min((first for first, later in self.reach.items() if first + later > number), default=number + 1)
            for done in [n for n in read if n < still]:
                del read[done], text[done]
            return after

        walk(step)


def observe_text_runs(passes: Passes, reach: Mapping[int, int], following: int = 0) -> TextRunFits:
    """Collect what maps of text runs are fitted from, in one pass of the teacher.

    Args:
        reach: of `later_blocks`, for all or some first blocks.
        following: the first block of the next pass; 0 for none.
    """
    model = passes.model
    fits = TextRunFits(model.catalog.architecture.dim, reach)
    numbers = range(min(reach), max(first + later for first, later in reach.items()) + 1)
    for batch, walk in passes.over(numbers, following):
        fits.add(model, batch, walk)
    return fits


def fit_text_runs(
    run: RunConfig, passes: Passes, reach: Mapping[int, int], following: int = 0
) -> dict[str, torch.Tensor]:
    """Fit maps of text runs (`Plan.text_runs`) in one pass of the teacher; args as of `observe_text_runs`.

    Returns:
        ``text_runs.{first}.z_{n}.weight`` ``[D, D]``, or its factors, and ``.bias`` ``[D]`` for what block n reads, and
        ``text_runs.{first}.text_{last}`` for how the text goes on after a run.
    """
    fits = observe_text_runs(passes, reach, following)
    solved = {id(fit): fit.solve(run.width.ridge) for by in (fits.reads, fits.moves) for fit in by.values()}
    maps = {}
    for path, fit, rows in fits.maps(passes.model.catalog.architecture.depth):
        weight, bias = solved[id(fit)]
        maps[f"{path}.weight"], maps[f"{path}.bias"] = weight[rows].clone(), bias[rows].clone()
        map_as_factors(run, fit, rows, path, maps)
    return maps
