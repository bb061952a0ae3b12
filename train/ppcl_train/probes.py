"""Linear probes of blocks and the intervals of redundant blocks found with them (PPCL stages 1.1 and 1.2)."""

from __future__ import annotations

from pathlib import Path

import torch

from ppcl_rt import Interval, Streams
from ppcl_train import selection, states
from ppcl_train.config import RunConfig
from ppcl_train.runs import Log, write_json, write_tensors
from ppcl_train.teacher import load


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


def find_intervals(cka: dict[tuple[int, int], float], depth: int) -> list[Interval]:
    """Intervals of redundant blocks, both ends included, numbered from 0 (PPCL eq. 4 and 5).

    Args:
        cka: ``(u, k)`` -> alignment of the teacher's state behind block ``k`` with probes ``u..k`` composed.
        depth: blocks.

    From a start ``u`` the interval ends at the first rise of ``D(u, k) = cka(u, k - 1) - cka(u, k)``:
    ``v = min{k - 1 >= u + 1 : D(u, k) > D(u, k - 1)}``, or with the last block where it never rises; the next search
    starts behind it. A last block alone is no interval.
    """
    found, u = [], 0
    while u < depth - 1:
        v = depth - 1
        for k in range(u + 2, depth):
            if cka[u, k - 1] - cka[u, k] > cka[u, k - 2] - cka[u, k - 1]:
                v = k - 1
                break
        found.append(Interval(u, v))
        u = v + 1
    return found


def fit(run: RunConfig, folder: Path) -> None:
    """Fit the probes and find the intervals; writes ``probes.safetensors`` and ``intervals.json``."""
    log, config = Log(folder, "probes"), run.probes
    model = load(run, folder)
    depth, dim = model.catalog.shape.depth, model.catalog.shape.dim
    fits = [(LeastSquares(dim, dim), LeastSquares(dim, dim)) for _ in range(depth)]
    held: list[list[Streams]] = []
    for batch in states.batches(run, config.samples, states.PROBES):
        passed = states.trace(model, batch)
        tokens = [rows(state, batch.mask) for state in passed.states]
        for block, probe in enumerate(fits):
            for fitted, before, after in zip(probe, tokens[block], tokens[block + 1], strict=True):
                fitted.add(before, after - before)
        if len(held) * run.batch < config.cka_samples:
            held.append(tokens)
    solved = [[fitted.solve(config.ridge) for fitted in probe] for probe in fits]
    states_of = [Streams(*map(torch.cat, zip(*(tokens[k] for tokens in held)))) for k in range(depth + 1)]
    alignment = compose(solved, states_of)
    intervals = find_intervals(alignment, depth)
    lengths = {Interval(u, u + n - 1) for n in run.students.lengths for u in range(depth - n + 1) if n > 1}
    selection.write(folder, [selection.Selected(i, run.students.start) for i in {*intervals, *lengths}])
    log(samples=config.samples, intervals=" ".join(map(str, intervals)))
    tensors = {
        f"probes.{block}.{stream}.{part}": tensor
        for block, pair in enumerate(solved)
        for stream, parts in zip(Streams._fields, pair, strict=True)
        for part, tensor in zip(("weight", "bias"), parts, strict=True)
    }
    write_tensors(folder / "probes.safetensors", tensors, {"samples": config.samples})
    write_json(
        folder / "intervals.json",
        {
            "intervals": [[interval.first, interval.last] for interval in intervals],
            "cka": [[u, k, value] for (u, k), value in alignment.items()],
        },
    )


def compose(
    solved: list[list[tuple[torch.Tensor, torch.Tensor]]], states_of: list[Streams]
) -> dict[tuple[int, int], float]:
    """``cka(u, k)`` for all ``u <= k``, the mean over both streams.

    Args:
        solved: per block and stream, weight and bias of its probe.
        states_of: ``h_0 .. h_L`` as rows ``[n, D]`` per stream.
    """
    alignment = {}
    for u in range(len(solved)):
        current = list(states_of[u])
        for k in range(u, len(solved)):
            for s, (weight, bias) in enumerate(solved[k]):
                current[s] = current[s] + current[s] @ weight.T + bias
            alignment[u, k] = sum(map(linear_cka, current, states_of[k + 1])) / 2
    return alignment
