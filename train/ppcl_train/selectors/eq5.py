"""Linear probes of blocks and the intervals of redundant blocks found with them (PPCL stages 1.1 and 1.2)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from ppcl_rt import Interval, Streams
from ppcl_rt.files import replacing
from ppcl_train.config.settings import RunConfig
from ppcl_train.data import calibration, streams
from ppcl_train.engine.distributed import join
from ppcl_train.engine.files import read_tensors, write_json, write_tensors
from ppcl_train.engine.log import Log
from ppcl_train.engine.loop import train_loop
from ppcl_train.selectors import selection
from ppcl_train.stages.teacher import load

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Seeds of the fine-tuning's batches and of what the probes are judged on, beside those of least squares.
_TUNING, _HELD_OUT = calibration.PROBES + 1_000_000, calibration.PROBES + 2_000_000

# (u, k): probes of blocks u..k, both included.
Pair = tuple[int, int]


class LeastSquares:
    """Streamed regression of ``y [n, P]`` on ``x [n, D]`` and a constant; memory does not grow with n.

    Holds ``sum of (x, 1)(x, 1)^T`` and ``sum of y (x, 1)^T`` in float64.
    """

    def __init__(self, inputs: int, outputs: int = 0) -> None:
        self.gram = torch.zeros(inputs + 1, inputs + 1, dtype=torch.float64)
        self.cross = torch.zeros(outputs, inputs + 1, dtype=torch.float64)

    def add(self, x: torch.Tensor, y: torch.Tensor | None = None, weight: torch.Tensor | None = None) -> None:
        """Take in n rows; ``weight [n]`` is what each row's squared error counts, 1 by default."""
        x = torch.cat([x, x.new_ones(len(x), 1)], dim=1).double()
        weighted = x if weight is None else x * weight.double()[:, None]
        self.gram, self.cross = self.gram.to(x.device), self.cross.to(x.device)
        self.gram += x.T @ weighted
        if y is not None:
            self.cross += y.double().T @ weighted

    def solve(self, ridge: float) -> tuple[torch.Tensor, torch.Tensor]:
        """Weight ``[P, D]`` and bias ``[P]``, float32; ``ridge`` is a share of the Gram matrix's mean diagonal."""
        solution = torch.linalg.solve(ridged(self.gram, ridge), self.cross.T).T.float()
        return solution[:, :-1].contiguous(), solution[:, -1].contiguous()


def ridged(gram: torch.Tensor, ridge: float) -> torch.Tensor:
    """A Gram matrix whose last row is the constant's, with a ridge on all but the constant."""
    diagonal = gram.diagonal().clone()
    diagonal[:-1] += ridge * diagonal[:-1].mean()
    return gram.diagonal_scatter(diagonal)


def rows(streams: Streams, mask: torch.Tensor) -> Streams:
    """Tokens that count as rows ``[n, D]``: all of the image's, the words of the text."""
    return Streams(image=streams.image.flatten(0, 1), text=streams.text[mask])


def linear_cka(x: torch.Tensor, y: torch.Tensor) -> float:
    """Linear centred kernel alignment of ``x [n, D]`` and ``y [n, D]``, in [0, 1] (PPCL eq. 3)."""
    x, y = (x - x.mean(0)).double(), (y - y.mean(0)).double()
    return float((y.T @ x).square().sum() / ((x.T @ x).norm() * (y.T @ y).norm()))


def find_intervals(cka: Mapping[Pair, float], depth: int) -> list[Interval]:
    """Intervals of redundant blocks, both ends included, numbered from 0 (PPCL eq. 4 and 5).

    Args:
        cka: ``(u, k)`` -> alignment of the teacher's state behind block ``k`` with probes ``u..k`` composed.
        depth: blocks.

    From a start ``u`` the interval ends at the first rise of ``D`` (`difference`):
    ``v = min{k - 1 >= u + 1 : D(u, k) > D(u, k - 1)}``, or with the last block where it never rises; the next search
    starts behind it. A last block alone is no interval.
    """
    found, u = [], 0
    while u < depth - 1:
        v = depth - 1
        for k in range(u + 2, depth):
            if difference(cka, u, k) > difference(cka, u, k - 1):
                v = k - 1
                break
        found.append(Interval(u, v))
        u = v + 1
    return found


def difference(cka: Mapping[Pair, float], u: int, k: int) -> float:
    """``D(u, k) = cka(u, k - 1) - cka(u, k)`` for ``k > u``: what block ``k`` costs the run of probes (eq. 4)."""
    return cka[u, k - 1] - cka[u, k]


def fit(run: RunConfig, folder: Path) -> None:
    """Fit the probes and find the intervals, as in the paper (eq. 1-5).

    Writes ``probes.start.safetensors`` (least squares), ``probes.safetensors`` (fine-tuned), ``intervals.json`` and
    ``intervals.png`` (both streams' curves and their mean, which decides), and last ``selected.json``: exactly the
    intervals of eq. 5, each student from its first block.

    Raises:
        ValueError: the fine-tuning diverges.
    """
    log, config = Log(folder, "select"), run.probes
    model = load(run, folder).to(join().device)
    started, tuned = folder / "probes.start.safetensors", folder / "probes.safetensors"
    if not started.exists():
        write_tensors(started, least_squares(run, model), {"samples": config.samples})
    if not tuned.exists():
        named = {name: tensor.to(join().device) for name, tensor in read_tensors(started).items()}
        before = error(run, model, named)
        tune(run, folder, model, named, log)
        log(least_squares=before, tuned=error(run, model, named))
        write_tensors(tuned, named, {"steps": config.steps})
    alignment = align(run, model, {name: tensor.to(join().device) for name, tensor in read_tensors(tuned).items()})
    intervals = find_intervals(alignment["mean"], model.catalog.shape.depth)
    log(intervals=" ".join(map(str, intervals)))
    curves = [
        {"u": u, "k": k, "cka": {name: cka[u, k] for name, cka in alignment.items()}}
        | ({"D": {name: difference(cka, u, k) for name, cka in alignment.items()}} if k > u else {})
        for u, k in alignment["mean"]
    ]
    found = [[interval.first, interval.last] for interval in intervals]
    write_json(folder / "intervals.json", {"intervals": found, "decides": "mean", "curves": curves})
    with replacing(folder / "intervals.png") as beside:
        picture(alignment, intervals).savefig(beside, format="png", dpi=120)
    selection.write(folder, [selection.Selected(interval, "first") for interval in intervals])


def least_squares(run: RunConfig, model: Any) -> dict[str, torch.Tensor]:
    """Solve eq. 1 for all blocks and both streams from one pass of the teacher over ``probes.samples``.

    Returns:
        ``probes.{block}.{stream}.weight`` ``[D, D]`` and ``.bias`` ``[D]`` of the residual probe ``x + W x + b``.
    """
    shape = model.catalog.shape
    fits = {(b, stream): LeastSquares(shape.dim, shape.dim) for b in range(shape.depth) for stream in Streams._fields}
    for tokens in map(partial(trace_rows, model), calibration.batches(run, run.probes.samples, calibration.PROBES)):
        for (block, stream), fitted in fits.items():
            before, after = getattr(tokens[block], stream), getattr(tokens[block + 1], stream)
            fitted.add(before, after - before)
    solved: dict[str, torch.Tensor] = {}
    for (block, stream), fitted in fits.items():
        weight, bias = fitted.solve(run.probes.ridge)
        solved |= {f"probes.{block}.{stream}.weight": weight, f"probes.{block}.{stream}.bias": bias}
    return solved


def trace_rows(model: Any, given: calibration.Inputs) -> list[Streams]:
    """``h_0 .. h_L`` of a batch as rows ``[n, D]`` per stream, in float32 whatever the teacher computes in."""
    return [Streams(*(x.float() for x in rows(state, given.mask))) for state in streams.trace(model, given).streams]


def apply(probes: Mapping[str, torch.Tensor], block: int, stream: str, x: torch.Tensor) -> torch.Tensor:
    """What the probe of a block's stream makes of rows ``x [n, D]``: ``x + W x + b``."""
    return x + F.linear(x, probes[f"probes.{block}.{stream}.weight"], probes[f"probes.{block}.{stream}.bias"])


def tune(run: RunConfig, folder: Path, model: Any, probes: dict[str, torch.Tensor], log: Log) -> None:
    """Fine-tune all probes in place on eq. 2 with Adam, or go on; every step's teacher pass feeds all of them."""
    config = run.probes
    for tensor in probes.values():
        tensor.requires_grad_(True)

    def step_loss(step: int) -> float:
        tokens = trace_rows(model, calibration.inputs(run, config.batch, _TUNING + step))
        total = 0.0
        for block, (before, after) in enumerate(pairwise(tokens)):
            for stream, x, y in zip(Streams._fields, before, after, strict=True):
                loss = (apply(probes, block, stream, x) - y).square().sum(-1).mean()
                loss.backward()
                total += loss.item()
        return total

    better = train_loop(
        run, config, log, probes, step_loss, optimisers=[torch.optim.Adam(probes.values(), lr=config.lr)]
    )
    for name, tensor in probes.items():
        tensor.requires_grad_(False).copy_(better[name])


@torch.no_grad()
def error(run: RunConfig, model: Any, probes: Mapping[str, torch.Tensor]) -> float:
    """Loss of eq. 2 on inputs that no probe was fitted to, over what the block changes; the mean of all probes."""
    tokens = trace_rows(model, calibration.inputs(run, run.batch, _HELD_OUT))
    relative = [
        float((apply(probes, block, stream, x) - y).square().sum() / (y - x).square().sum().clamp(min=1e-30))
        for block, (before, after) in enumerate(pairwise(tokens))
        for stream, x, y in zip(Streams._fields, before, after, strict=True)
    ]
    return sum(relative) / len(relative)


@torch.no_grad()
def align(run: RunConfig, model: Any, probes: Mapping[str, torch.Tensor]) -> dict[str, dict[Pair, float]]:
    """``cka(u, k)`` for all ``u <= k`` (eq. 3), of each stream by name and of their ``mean``.

    That their mean decides is our reading: eq. 3 is written for one stream.
    """
    config, depth = run.probes, model.catalog.shape.depth
    parts = []
    for given in calibration.batches(run, config.cka_samples, calibration.PROBES):
        share = max(1, config.cka_tokens * len(given.x) // config.cka_samples)
        parts.append([Streams(*(thinned(x, share) for x in state)) for state in trace_rows(model, given)])
    held = [Streams(*map(torch.cat, zip(*states_of_k, strict=True))) for states_of_k in zip(*parts, strict=True)]
    alignment: dict[str, dict[Pair, float]] = {stream: {} for stream in Streams._fields}
    for stream, cka in alignment.items():
        for u in range(depth):
            current = getattr(held[u], stream)
            for k in range(u, depth):
                current = apply(probes, k, stream, current)
                cka[u, k] = linear_cka(current, getattr(held[k + 1], stream))
    image, text = alignment["image"], alignment["text"]
    alignment["mean"] = {pair: (value + text[pair]) / 2 for pair, value in image.items()}
    return alignment


def thinned(x: torch.Tensor, most: int) -> torch.Tensor:
    """At most so many of the rows ``x [n, D]``, spread evenly."""
    return x if len(x) <= most else x[torch.linspace(0, len(x) - 1, most).round().long()]


def picture(alignment: Mapping[str, Mapping[Pair, float]], intervals: Sequence[Interval]) -> Figure:
    """Draw ``cka(u, k)`` and ``D(u, k)`` over ``k`` from the start ``u`` of every interval, a column a curve.

    Intervals are shaded. A curve is strong up to the block behind its interval, where D rises; what follows is faint.
    """
    # Here, so that only who draws waits for it. A figure made without pyplot needs no display.
    from matplotlib import colormaps
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    depth = 1 + max(k for _, k in alignment["mean"])
    # 0.1 inch a block, so that 60 of them can be told apart.
    figure = Figure(figsize=(3 * max(4.2, 0.1 * depth + 1), 6.4), layout="constrained")
    axes = figure.subplots(2, len(alignment), sharex=True, sharey="row")
    colours = colormaps["viridis"].resampled(len(intervals) + 1)
    for column, (name, cka) in enumerate(alignment.items()):
        axes[0, column].set_title(f"{name}, which decides" if name == "mean" else f"{name} stream")
        for row, label in ((0, "cka(u, k)"), (1, "D(u, k)")):
            axis = axes[row, column]
            axis.set_xlim(-0.6, depth - 0.4)
            for n, interval in enumerate(intervals):
                u, colour = interval.first, colours(n)
                axis.axvspan(u - 0.4, interval.last + 0.4, color=colour, alpha=0.12, linewidth=0)
                ks = range(u + row, depth)
                values = [difference(cka, u, k) if row else cka[u, k] for k in ks]
                strong = len(interval) + 1 - row
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
