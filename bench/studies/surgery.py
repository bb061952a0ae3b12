"""Brain surgery in chunks against one unit at a time: seconds, columns, errors; and arithmetic for a GPU.

    python bench/studies/surgery.py [--channels 3072] [--outputs 768] [--units 3072] [--threads 1]
    python bench/studies/surgery.py --channels 12288 --outputs 3072 --units 12288 --arithmetic

Inputs are random and pass through a GELU, as those of an MLP's output layer do. *One at a time* changes all weights and
the whole inverse covariance for every unit (rank-1 updates), as `ppcl_train.closed_form.surgery` did at first. Both
run in float64; times are of this machine's CPU.

With ``--arithmetic`` nothing runs: FLOPs and bytes of each part are counted, and divided by the rates of an A100
(19.5 TFLOP/s in float64 by tensor cores, 1.9 TB/s) and of an H100 (67 TFLOP/s, 3.35 TB/s), at half of each.
"""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer

from ppcl_train.closed_form import surgery
from ppcl_train.closed_form.least_squares import LeastSquares

SHARES = (0.75, 0.5, 0.375, 0.25, 0.125)
# TFLOP/s in float64 and TB/s, as published.
DEVICES = {"A100 80 GB": (19.5, 1.935), "H100 80 GB": (67.0, 3.35)}
# Launches of a removal, and seconds of each; a removal also waits for the device once.
LAUNCHES, LAUNCH, WAIT = 40, 5e-6, 30e-6
Flag = typer.Option


def one_at_a_time(layer: Any, gram: torch.Tensor, units: int, least: int, ridge: float) -> tuple[list[int], Any]:
    """The units in the order in which they go, and the weights of those that are left, in stock order."""
    mean = gram[:-1, -1] / gram[-1, -1]
    covariance = gram[:-1, :-1] / gram[-1, -1] - torch.outer(mean, mean)
    covariance += ridge * covariance.diagonal().mean() * torch.eye(len(covariance)).to(covariance)
    inverse, weight = torch.linalg.inv(covariance), layer.weight.double().clone()
    e, removed, left = weight.shape[1] // units, [], torch.ones(units, dtype=torch.bool)
    while len(removed) < units - least:
        own = inverse.unflatten(0, (units, e)).unflatten(2, (units, e)).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
        own = torch.where(left[:, None, None], own, torch.eye(e).to(own))
        split = weight.unflatten(1, (units, e))
        cost = torch.einsum("oue,uef,ouf->u", split, torch.linalg.inv(own), split)
        unit = int(torch.where(left, cost, torch.inf).argmin())
        left[unit] = False
        removed.append(unit)
        columns = slice(unit * e, (unit + 1) * e)
        change = torch.linalg.solve(inverse[columns, columns], inverse[columns])
        weight -= weight[:, columns] @ change
        inverse -= inverse[:, columns] @ change
        weight[:, columns] = inverse[columns] = inverse[:, columns] = 0
    return removed, weight


def arithmetic(channels: int, outputs: int, units: int) -> None:
    """Print FLOPs, bytes and seconds of each part of the elimination of one layer down to the last share."""
    least = round(SHARES[-1] * units) / units
    # Sums of n^2 over the sizes that the matrices shrink through.
    squares = channels**3 * (1 - least**3) / 3
    kept = [share * channels for share in SHARES]
    parts = {
        "covariance and its inverse": (2 * channels**3 + 2 * outputs * channels**2, 8 * 6 * channels**2),
        "G = W^T W": (2 * outputs * channels**2, 8 * channels**2),
        "H and G after each chunk": (6 * squares, 8 * 6 * squares / surgery._CHUNK),
        "rows within chunks": (6 * squares / channels * surgery._CHUNK / 2, 0.0),
        "weights at all counts": (
            kept[0] ** 3 / 3 + sum(2 * outputs * n**2 for n in kept) + 2 * outputs * channels * kept[0],
            8 * (3 * kept[0] ** 2 + sum(n**2 for n in kept)),
        ),
    }
    # A row of both matrices, and the rows of the chunk so far: half a chunk, of half the channels or so.
    removals = (1 - least) * units
    row_bytes = 8 * removals * (channels / units) * channels * (1 + least) / 2 * (2 + 3 * surgery._CHUNK / 2)
    parts["rows within chunks"] = (parts["rows within chunks"][0], row_bytes)
    for name, (flops, size) in parts.items():
        print(f"{name:>28}: {flops / 1e12:8.3f} TFLOP, {size / 1e9:9.1f} GB read and written")
    print(f"{'held together':>28}: {8 * 5 * channels**2 / 1e9:.1f} GB (Gram matrix, covariance, H, G, one more)")
    waits = removals * (LAUNCHES * LAUNCH + WAIT)
    before = 8 * removals * (4 * channels**2 + 4 * outputs * channels)
    for name, (rate, bandwidth) in DEVICES.items():
        flops, size = (sum(part[n] for part in parts.values()) for n in (0, 1))
        seconds = flops / (rate / 2 * 1e12) + size / (bandwidth / 2 * 1e12)
        print(
            f"{name:>28}: {seconds:.1f} s at half its rates, {waits:.1f} s of launches, {seconds + waits:.1f} s in all;"
            f" one at a time {before / (bandwidth / 2 * 1e12):.0f} s of memory traffic"
        )


def covariance_of(gram: torch.Tensor) -> torch.Tensor:
    """Of inputs with this Gram matrix."""
    mean = gram[:-1, -1] / gram[-1, -1]
    return gram[:-1, :-1] / gram[-1, -1] - torch.outer(mean, mean)


def main(
    channels: Annotated[int, Flag(help="inputs of the layer")] = 3072,
    outputs: int = 768,
    units: Annotated[int, Flag(help="channels or heads that they are divided into")] = 3072,
    rows: Annotated[int, Flag(help="rows of data; 0 for four a channel")] = 0,
    threads: int = 1,
    arithmetic_only: Annotated[bool, Flag("--arithmetic", help="run nothing")] = False,
    chunks_only: Annotated[bool, Flag("--chunks", help="leave one at a time out")] = False,
) -> None:
    """Print the seconds of both ways, whether the columns agree, and the errors."""
    if arithmetic_only:
        arithmetic(channels, outputs, units)
        return
    torch.set_num_threads(threads)
    generator = torch.Generator().manual_seed(0)
    # Sums of products in float64, and in float32, as a run collects them.
    exact, rounded = LeastSquares(channels), LeastSquares(channels)
    mix = torch.randn(channels // 2, channels, generator=generator) / (channels // 2) ** 0.5
    for size in (min(4096, left) for left in range(rows or 4 * channels, 0, -4096)):
        x = F.gelu(torch.randn(size, channels // 2, generator=generator) @ mix - 0.3)
        exact.add(x.double())
        rounded.add(x)
    weight = torch.randn(outputs, channels, generator=generator) / channels**0.5
    layer, covariance = SimpleNamespace(weight=weight, bias=torch.zeros(outputs)), covariance_of(exact.gram)
    counts = sorted({max(1, round(share * units)) for share in SHARES}, reverse=True)
    least = counts[-1]

    def eliminated(fit: LeastSquares) -> tuple[torch.Tensor, torch.Tensor]:
        """The rank order, and the weights of the units that are left, in stock order."""
        order, (found,) = surgery.eliminate([(layer, fit.gram)], units, counts, 1e-4)
        whole, size = torch.zeros(weight.shape, dtype=torch.float64), channels // units
        whole[:, (order[:least, None] * size + torch.arange(size)).flatten()] = found[least][0]
        return order, whole

    def error(changed: torch.Tensor) -> float:
        change = changed - weight.double()
        return float((change @ covariance * change).sum())

    began = time.perf_counter()
    order, got = eliminated(exact)
    chunked = time.perf_counter() - began
    print(f"{channels} inputs in {units} units -> {outputs}, down to {least}; float64, {threads} threads, CPU")
    print(f"in chunks: {chunked:.1f} s, squared error of the outputs {error(got):.12g}", flush=True)
    other, of_other = eliminated(rounded)
    deviation = covariance.diagonal().sqrt()
    lost = (covariance_of(rounded.gram) - covariance) / torch.outer(deviation, deviation)
    print(f"products in float32: correlations off by {float(lost.abs().max()):.1e}; {int((other == order).sum())} of")
    print(f"    {units} units in the same place of the order, squared error {error(of_other):.12g}", flush=True)
    if chunks_only:
        return
    began = time.perf_counter()
    removed, wanted = one_at_a_time(layer, exact.gram, units, least, 1e-4)
    single = time.perf_counter() - began
    same = sum(a == b for a, b in zip(reversed(removed), order[least:].tolist(), strict=True))
    print(f"one at a time: {single:.1f} s, {single / chunked:.0f} times as long, squared error {error(wanted):.12g}")
    print(f"    {same} of {len(removed)} units go in the same place of the order")
    print(f"    weights differ by {float((got - wanted).abs().max() / wanted.abs().max()):.1e} of the largest at most")


if __name__ == "__main__":
    typer.run(main)
