"""What depth and widths cost on this machine, each against what it should cost.

    python bench/suites/bench_widths.py          (or: make bench)

Medians of paired turns: the forwards of a pair run one right after the other, so a machine that slows down slows both.
``scenes`` is the shipped checkpoint, ``512 wide`` random blocks of a medium size. Lines:

- ours at ratio 1, and with `precompute`, over stock diffusers;
- a plan over ratio 1, next to the share of the FLOPs;
- the same plan over a stock model that is physically that small, and that model over the stock dense one: what a small
  model of plain layers takes is the floor, since norms and residuals of the streams stay as wide as they are.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import QwenImageTransformer2DModel
from diffusers.utils import logging as diffusers_logging
from model_races.models import Models
from model_races.presets import TINY, Preset, inputs

import ppcl_rt
from ppcl_rt.pipelines.task import task_of
from ppcl_rt.planning.plan import Plan
from ppcl_rt.planning.width import Width

CHECKPOINT = Path(__file__).parents[2] / "examples" / "scenes"
# 12 blocks, 8 heads of 64 channels, 256 image and 32 text tokens.
MEDIUM = dataclasses.replace(
    TINY, heads=8, head_dim=64, text_dim=512, axes=(16, 24, 24), blocks=12, walks=1, sizes={256: (16, 16)}, text=32
)
Call = Callable[[], Any]


def paired(call: Call, other: Call, pairs: int) -> float:
    """Return the median of a call's time over the time of another call right after it."""

    def turn() -> float:
        start = time.perf_counter()
        call()
        middle = time.perf_counter()
        other()
        return (middle - start) / (time.perf_counter() - middle)

    turn()
    return statistics.median(turn() for _ in range(pairs))


def forward(model: Any, call: dict[str, Any]) -> Call:
    return lambda: model(**call)


def agree(call: Call, other: Call) -> None:
    got, wanted = call()[0], other()[0]
    # What is timed gives the same: roundings of float32 over a dozen blocks.
    assert (got - wanted).norm() < 1e-5 * wanted.norm()


def race_scenes(pairs: int) -> None:
    """Print the shipped checkpoint at ratio 1 over stock diffusers."""
    ours = ppcl_rt.load(CHECKPOINT, 1.0, dtype=torch.float32)
    stock = QwenImageTransformer2DModel.from_pretrained(CHECKPOINT, torch_dtype=torch.float32).eval()
    task = task_of(ours.catalog)
    for batch in (1, 64):
        call = task.example(ours, batch)
        call["timestep"] = torch.full_like(call["timestep"], 0.5)
        about = f"scenes, batch {batch}"
        versus_stock(about, ours, forward(ours, call), forward(stock, call), pairs)


def versus_stock(about: str, ours: Any, call: Call, stock: Call, pairs: int) -> None:
    agree(call, stock)
    print(f"{about}: ratio 1 takes {paired(call, stock, pairs):.3f} of stock diffusers", flush=True)
    ours.precompute([0.5])
    agree(call, stock)
    print(f"{about}: ratio 1, precomputed timesteps, {paired(call, stock, pairs):.3f} of stock diffusers", flush=True)
    ours.precompute([])


def plans_of(models: Models) -> dict[str, Plan]:
    """Half the blocks; half and a quarter of heads and channels, modulations whole."""
    preset, compose = models.preset, models.catalog.compose
    plans = {"half the blocks": compose([(n, preset.full) for n in range(0, preset.depth, 2)])}
    for name, share in (("half widths", 2), ("quarter widths", 4)):
        units = {group: preset.full[group] // share for group in preset.spec.unit_groups}
        plans[name] = compose([(n, Width({**preset.full, **units})) for n in range(preset.depth)])
    return plans


def race_widths(preset: Preset, pairs: int) -> None:
    """Print a random model at ratio 1 over stock, and plans over ratio 1 and over physically small models."""
    models = Models(preset)
    [size] = list(preset.sizes)[:1]
    call, dense = inputs(preset, size, preset.text), models.catalog.dense
    rows, columns = preset.sizes[size]

    def flops(plan: Plan) -> float:
        return models.catalog.architecture.flops(plan, rows * columns, preset.text)

    about = f"{preset.dim} wide"
    ours, whole = models.ours(dense), forward(models.stock(dense), call)
    at_one = forward(ours, call)
    versus_stock(about, ours, at_one, whole, pairs)
    for name, plan in plans_of(models).items():
        narrow = models.ours(plan)
        planned, small = forward(narrow, call), forward(models.stock(plan), call)
        agree(planned, small)
        share, took = flops(plan) / flops(dense), paired(planned, at_one, pairs)
        print(
            f"{about}, {name}: {share:.3f} of the FLOPs, {took:.3f} of the time of ratio 1 ({took / share:.3f} of its "
            f"share); {paired(planned, small, pairs):.3f} of a stock model physically so small, "
            f"which takes {paired(small, whole, pairs) / share:.3f} of its own share",
            flush=True,
        )
        for model in (ours, narrow):
            model.precompute([0.5])
        agree(planned, small)
        took = paired(planned, at_one, pairs)
        print(f"{about}, {name}, both with precomputed timesteps: {took:.3f} ({took / share:.3f})", flush=True)
        ours.precompute([])


def main() -> None:
    """Print all ratios."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--pairs", type=int, default=31, help="turns of each pair")
    parser.add_argument("--tiny", action="store_true", help="a tiny model; its figures mean nothing")
    arguments = parser.parse_args()
    # Else it warns of a thousand tensors that it does not know.
    diffusers_logging.set_verbosity_error()
    print(f"CPU, {torch.get_num_threads()} threads, float32, torch {torch.__version__}, medians of {arguments.pairs}")
    with torch.no_grad():
        if not arguments.tiny:
            race_scenes(arguments.pairs)
        race_widths(TINY if arguments.tiny else MEDIUM, arguments.pairs)


if __name__ == "__main__":
    main()
