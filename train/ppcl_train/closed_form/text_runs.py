"""Text runs in closed form: linear maps for blocks along which the text stream is not updated (PPCL eq. 8)."""

from __future__ import annotations

from typing import Any

import torch

from ppcl_rt import Interval
from ppcl_rt.planning.plan import text_maps
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
        if later and "text" in architecture.spec(first).may_skip:
            counts[first] = later
    return counts


@torch.no_grad()
def fit_text_runs(run: RunConfig, model: Any) -> dict[str, torch.Tensor]:
    """Fit the maps of every text run up to the longest (`Plan.text_runs`), by regression on the teacher's streams.

    Returns:
        ``text_runs.{interval}.{map}.weight`` ``[D, D]`` and ``.bias`` ``[D]``.
    """
    architecture, blocks = model.catalog.architecture, model.blocks()
    dim, reach = architecture.dim, later_blocks(model, run.width.longest_text_run)
    # The later blocks of a run, side by side: from what the first block reads to what they read, and from the text
    # after the first block to the text after them.
    reads = {first: LeastSquares(dim, later * dim) for first, later in reach.items()}
    moves = {first: LeastSquares(dim, later * dim) for first, later in reach.items()}
    in_runs = sorted({n for first, later in reach.items() for n in range(first, first + later + 1)})
    for batch in calibration.batches(run, run.width.samples, calibration.WIDTH):
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
    maps = {}
    for first, later in reach.items():
        read_maps, move_maps = (
            [part.split(dim) for part in fit[first].solve(run.width.ridge)] for fit in (reads, moves)
        )
        for last in range(first + 1, first + 1 + later):
            interval = Interval(first, last)
            for name in text_maps(interval, architecture.depth):
                # ``z_5`` maps to what block 5 reads, ``text`` to the text after the run.
                (weights, biases), n = (
                    (move_maps, last) if name == "text" else (read_maps, int(name.removeprefix("z_")))
                )
                prefix = f"text_runs.{interval.key}.{name}"
                maps[f"{prefix}.weight"] = weights[n - first - 1].clone()
                maps[f"{prefix}.bias"] = biases[n - first - 1].clone()
    return maps
