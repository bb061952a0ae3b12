"""Selection as in the paper: linear probes of blocks, and the intervals of redundant blocks found with them.

PPCL stages 1.1 (probes, eq. 1 and 2) and 1.2 (intervals, eq. 3 to 5).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from ppcl_rt import Interval, Streams
from ppcl_rt.files import replacing
from ppcl_train.closed_form.cka import linear_cka
from ppcl_train.closed_form.least_squares import LeastSquares
from ppcl_train.config.settings import RunConfig
from ppcl_train.data import calibration, streams
from ppcl_train.data.loading import Batches
from ppcl_train.data.seeds import Seed, Stage
from ppcl_train.data.teacher_file import load_teacher, only_read
from ppcl_train.engine.distributed import join
from ppcl_train.engine.files import read_tensors, write_json
from ppcl_train.engine.log import Log
from ppcl_train.engine.loop import train_loop
from ppcl_train.engine.optimisers import free_optimisers
from ppcl_train.engine.parts import Parts
from ppcl_train.losses.matching import token_rows
from ppcl_train.selectors import selection
from ppcl_train.selectors.cka_figure import Curves, draw_curves

# The list of the probes' files.
OUTPUT = "probes.json"
# The batches that tune the probes and those that judge them; least squares sees others.
_TUNING, _HELD_OUT = Seed(Stage.TUNE_PROBES), Seed(Stage.JUDGE_PROBES)
# The name of both streams' mean. That this mean decides is our reading: eq. 3 is written for one stream.
_DECIDES = "mean"


def find_intervals(cka: Curves, end: int, start: int = 0, *, literal: bool = False) -> list[Interval]:
    """Find the intervals of redundant blocks, both ends included, numbered from 0 (PPCL eq. 4 and 5).

    From a start ``u`` the interval ends before the first rise of ``D`` (`difference`), or with the last block where
    ``D`` never rises: ``v = min{k - 1 >= u : D(u, k) > D(u, k - 1)}``. The next search starts at the block after it. An
    interval of one block is not redundant: it is not among what is returned, and its block stays.

    Eq. 5 as it is printed asks for ``k - 1 >= u + 1``, so that every block lies in an interval of two or more, while
    the authors' own list for a model of 60 blocks leaves 22 of them in none. Hence this reading.

    Args:
        cka: ``(u, k)`` -> alignment of the teacher's state after block ``k`` with the probes ``u..k`` composed.
        end: number of the block after the last; all blocks lie in one list.
        start: number of the first block.
        literal: follow eq. 5 as it is printed; a last block alone is then no interval.
    """
    found, u, shortest = [], start, 2 if literal else 1
    while u < end:
        rises = (k for k in range(u + shortest, end) if difference(cka, u, k) > difference(cka, u, k - 1))
        v = next(rises, end) - 1
        if v > u:
            found.append(Interval(u, v))
        u = v + 1
    return found


def difference(cka: Curves, u: int, k: int) -> float:
    """``D(u, k) = cka(u, k - 1) - cka(u, k)``: alignment that the probe of block ``k`` loses (eq. 4).

    Before the first probe everything is aligned: ``D(u, u) = 1 - cka(u, u)``.
    """
    return (cka[u, k - 1] if k > u else 1.0) - cka[u, k]


def select(run: RunConfig, folder: Path) -> None:
    """Fit the probes and find the intervals, as in the paper (eq. 1-5).

    Writes the probes (``probes.json``), ``intervals.json`` and ``intervals.png`` (the curves of both streams and of
    their mean, which decides). Last comes ``selected.json``: exactly the intervals of eq. 5, each student copied from
    its first block. Blocks in no interval get none.

    Raises:
        ValueError: the fine-tuning diverges.
    """
    log = Log(folder, "select")
    model = only_read(run, load_teacher(run, folder), log)
    probes = make_probes(run, folder, model, log)
    cka = align(run, model, {name: tensor.to(join().device) for name, tensor in probes.items()})
    intervals, start = [], 0
    for blocks in model.catalog.architecture.lists:
        # No student stands in for blocks of two lists.
        literal = run.select == "eq5-literal"
        intervals += find_intervals(cka[_DECIDES], start + blocks.depth, start, literal=literal)
        start += blocks.depth
    log(intervals=" ".join(map(str, intervals)), kept=model.catalog.architecture.depth - sum(map(len, intervals)))
    _write_curves(folder, cka, intervals)
    selection.write(folder, [selection.Selected(interval, "first") for interval in intervals])


def _write_curves(folder: Path, cka: Mapping[str, Curves], intervals: list[Interval]) -> None:
    """Write ``intervals.json`` and ``intervals.png``."""
    pairs = list(cka[_DECIDES])
    differences = {name: {(u, k): difference(curve, u, k) for u, k in pairs} for name, curve in cka.items()}
    curves = [
        {"u": u, "k": k}
        | {what: {name: curve[u, k] for name, curve in by.items()} for what, by in (("cka", cka), ("D", differences))}
        for u, k in pairs
    ]
    ends = [[interval.first, interval.last] for interval in intervals]
    write_json(folder / "intervals.json", {"intervals": ends, "decides": _DECIDES, "curves": curves})
    with replacing(folder / "intervals.png") as path:
        draw_curves(cka, differences, intervals, _DECIDES).savefig(path, format="png", dpi=120)


def make_probes(run: RunConfig, folder: Path, model: Any, log: Log) -> dict[str, torch.Tensor]:
    """Fit and fine-tune the probes of all blocks, ``probes.at_once`` blocks at a time.

    No probe depends on another. What is there is not made again. Writes two files for each group of blocks into
    ``probes/`` (after least squares, and tuned), and last ``probes.json``, which lists those that are tuned.

    Returns:
        All probes, on the CPU.
    """
    config, depth = run.probes, model.catalog.architecture.depth
    parts, listed = Parts(folder / "probes"), folder / OUTPUT
    groups = [range(first, min(first + config.at_once, depth)) for first in range(0, depth, config.at_once)]
    for number, blocks in enumerate(groups):
        fitted, tuned = f"fitted.{number}", f"tuned.{number}"
        if tuned in parts:
            continue
        if fitted not in parts:
            parts.write(fitted, fit_probes(run, model, blocks))
        probes = {name: tensor.to(join().device) for name, tensor in parts.read(fitted).items()}
        error_before = probe_error(run, model, probes, blocks)
        tune_probes(run, model, probes, log if len(groups) == 1 else Log(folder, f"select.{number}"), blocks)
        error_after = probe_error(run, model, probes, blocks)
        log(probed=blocks.stop, of=depth, least_squares=error_before, tuned=error_after)
        parts.write(tuned, probes)
        del probes
        free_optimisers()
    parts.list_in(listed, [f"tuned.{number}" for number in range(len(groups))], {"steps": config.steps})
    return read_tensors(listed)


def fit_probes(run: RunConfig, model: Any, blocks: range) -> dict[str, torch.Tensor]:
    """Solve eq. 1 for some blocks and both streams from one pass of the teacher over ``probes.samples``.

    Returns:
        ``probes.{block}.{stream}.weight`` ``[D, D]`` and ``.bias`` ``[D]`` of the residual probe ``x + W x + b``.
    """
    dim = model.catalog.architecture.dim
    fits = {(block, stream): LeastSquares(dim, dim) for block in blocks for stream in Streams._fields}

    def add(block: int, stream: str, before: torch.Tensor, after: torch.Tensor) -> None:
        fits[block, stream].add(before, after - before)

    for batch in calibration.batches(run, run.probes.samples, calibration.PROBES, teacher=model):
        walk_rows(model, batch, blocks, add)
    probes: dict[str, torch.Tensor] = {}
    for (block, stream), fit in fits.items():
        weight, bias = fit.solve(run.probes.ridge)
        probes |= {f"probes.{block}.{stream}.weight": weight, f"probes.{block}.{stream}.bias": bias}
    return probes


def walk_rows(
    model: Any, batch: calibration.Inputs, blocks: range, visit: Callable[[int, str, torch.Tensor, torch.Tensor], None]
) -> None:
    """Run the teacher; visit both streams of some blocks: (block, stream, rows before it, rows after it).

    Rows are ``[n, D]``, in float32 whatever the teacher uses; those of one block at a time are held.
    """

    def each(block: int, before: Streams, after: Streams, _: dict[str, Any]) -> None:
        if block in blocks:
            rows = zip(*(token_rows(state, batch.mask) for state in (before, after)), strict=True)
            for stream, (x, y) in zip(Streams._fields, rows, strict=True):
                visit(block, stream, x.float(), y.float())

    streams.walk(model, batch, each)


def apply_probe(probes: Mapping[str, torch.Tensor], block: int, stream: str, x: torch.Tensor) -> torch.Tensor:
    """Apply the probe of a block and stream to rows ``x [n, D]``: ``x + W x + b``."""
    return x + F.linear(x, probes[f"probes.{block}.{stream}.weight"], probes[f"probes.{block}.{stream}.bias"])


def tune_probes(run: RunConfig, model: Any, probes: dict[str, torch.Tensor], log: Log, blocks: range) -> None:
    """Fine-tune the probes of some blocks in place on eq. 2 with Adam, or resume; a pass a step feeds all of them."""
    config = run.probes
    for tensor in probes.values():
        tensor.requires_grad_(True)

    batches = Batches(run, config.batch, _TUNING, config.steps * config.accumulate, teacher=model)

    def step_loss(number: int) -> float:
        total = 0.0

        def learn(block: int, stream: str, x: torch.Tensor, y: torch.Tensor) -> None:
            nonlocal total
            with torch.enable_grad():
                loss = (apply_probe(probes, block, stream, x) - y).square().sum(-1).mean()
                loss.backward()
            total += loss.item()

        walk_rows(model, batches(number), blocks, learn)
        return total

    tuned = train_loop(
        run, config, log, probes, step_loss, optimisers=[torch.optim.Adam(probes.values(), lr=config.lr)]
    )
    for name, tensor in probes.items():
        tensor.requires_grad_(False).copy_(tuned[name])


@torch.no_grad()
def probe_error(run: RunConfig, model: Any, probes: Mapping[str, torch.Tensor], blocks: range) -> float:
    """Compute the loss of eq. 2 on inputs that no probe saw, over the squared change by the block.

    Returns:
        The mean over the probes of some blocks.
    """
    relative: list[float] = []

    def add(block: int, stream: str, x: torch.Tensor, y: torch.Tensor) -> None:
        error = (apply_probe(probes, block, stream, x) - y).square().sum()
        relative.append(float(error / (y - x).square().sum().clamp(min=1e-30)))

    walk_rows(model, calibration.inputs(run, run.batch, _HELD_OUT, teacher=model), blocks, add)
    return sum(relative) / len(relative)


@torch.no_grad()
def align(run: RunConfig, model: Any, probes: Mapping[str, torch.Tensor]) -> dict[str, dict[tuple[int, int], float]]:
    """Compute ``cka(u, k)`` for all ``u <= k`` (eq. 3), of each stream by name and of their ``mean``."""
    config, depth = run.probes, model.catalog.architecture.depth
    # By stream: the thinned rows of all states, those of each batch one after the other.
    kept = {stream: [list[torch.Tensor]() for _ in range(depth + 1)] for stream in Streams._fields}
    for batch in calibration.batches(run, config.cka_samples, calibration.PROBES, teacher=model):
        share = max(1, config.cka_tokens * len(batch.x) // config.cka_samples)

        def keep(block: int, stream: str, x: torch.Tensor, y: torch.Tensor, share: int = share) -> None:
            if block == 0:
                kept[stream][0].append(thin(x, share))
            kept[stream][block + 1].append(thin(y, share))

        walk_rows(model, batch, range(depth), keep)
    alignment: dict[str, dict[tuple[int, int], float]] = {stream: {} for stream in Streams._fields}
    for stream, cka in alignment.items():
        rows = [torch.cat(of_state) for of_state in kept.pop(stream)]
        for u in range(depth):
            predicted = rows[u]
            for k in range(u, depth):
                predicted = apply_probe(probes, k, stream, predicted)
                cka[u, k] = linear_cka(predicted, rows[k + 1])
    image, text = alignment["image"], alignment["text"]
    alignment[_DECIDES] = {pair: (value + text[pair]) / 2 for pair, value in image.items()}
    return alignment


def thin(x: torch.Tensor, most: int) -> torch.Tensor:
    """Take at most ``most`` of the rows ``x [n, D]``, spread evenly."""
    return x if len(x) <= most else x[torch.linspace(0, len(x) - 1, most).round().long()]
