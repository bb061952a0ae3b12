"""How well the losses of plans are predicted: by the sum over their choices, and by the sketches of a checkpoint.

    python bench/studies/interactions.py examples/scenes

Prints percentiles of measured over predicted loss, for plans that are made at ratios spread evenly, by sketches and by
sums, and for random plans; then how the two ways of planning compare at equal ratios. All is measured on samples that
neither planning nor training has seen. A checkpoint without sketches is measured first, which takes minutes.
"""

from __future__ import annotations

import random
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer

import ppcl_rt
from ppcl_rt import Catalog, Plan, Planner
from ppcl_rt.planning.sketch import PLAN, SCORE, Sketches, taken
from ppcl_train.config.presets import PRESETS
from ppcl_train.config.settings import RunConfig
from ppcl_train.data import calibration
from ppcl_train.losses.velocity_error import VelocityError
from ppcl_train.stages.recover import random_plan
from ppcl_train.stages.sensitivities import sensitivities

_PERCENTILES = (5, 25, 50, 75, 95)
# Ratios above this have next to no loss to compare.
_COMPARED_BELOW = 0.5


def sketched(checkpoint: str, model: Any, run: RunConfig) -> tuple[Catalog, dict[str, np.ndarray]]:
    """Read the sketches of a checkpoint, or make them; returns them with the catalog that their losses lie in."""
    source = ppcl_rt.Checkpoint(ppcl_rt.locate(checkpoint))
    if model.catalog.sketch is not None:
        catalog, tensors = model.catalog, {name: source.read(name) for name in (PLAN, SCORE)}
    else:
        begun = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            catalog, tensors = sensitivities(model, run, Path(folder), lambda **_: None)
        print(f"measured {len(tensors[PLAN])} choices in {time.perf_counter() - begun:.0f} s", flush=True)
    # Without the measured frontier, which would answer in the place of the planner.
    return catalog.model_copy(update={"frontier": ()}), {name: rows.numpy() for name, rows in tensors.items()}


def main(
    checkpoint: str,
    planned: Annotated[int, typer.Option(min=2)] = 64,
    drawn: Annotated[int, typer.Option(min=1)] = 200,
    seed: int = 0,
) -> None:
    """Measure plans, and print how far predictions are from what is measured."""
    torch.set_grad_enabled(False)
    run = PRESETS["scenes"]
    model = ppcl_rt.load(checkpoint, dtype=torch.float32, resident="all").requires_grad_(False)
    catalog, sketches = sketched(checkpoint, model, run)
    error, rng = VelocityError(model, run, seed=calibration.CHECK + seed), random.Random(seed)
    by_sums, by_sketches = Planner(catalog), Planner(catalog, lambda: [sketches[name] for name in (PLAN, SCORE)])
    least = by_sums.smallest_in_digits
    ratios = [least + (0.99 - least) * n / (planned - 1) for n in range(planned)]
    plans: dict[str, list[Plan]] = {
        "planned by sketches": [by_sketches.plan(ratio) for ratio in ratios],
        "planned by sums": [by_sums.plan(ratio) for ratio in ratios],
        "random": [random_plan(catalog, rng) for _ in range(drawn)],
    }
    scaled = {name: Sketches.of(rows, catalog) for name, rows in sketches.items()}
    losses: dict[str, np.ndarray] = {}
    for kind, some in plans.items():
        measured = losses[kind] = np.array([sum(error.of(plan)) for plan in some])
        predicted = {"sum": np.array([catalog.loss(plan) for plan in some])}
        for name, rows in scaled.items():
            predicted[name] = np.array([rows.loss(taken(catalog, plan)) for plan in some])
        print(f"{len(some)} plans, {kind}: measured over predicted at percentiles {_PERCENTILES}")
        for name, values in predicted.items():
            # What changes too little for float16 has a sketch of zeros.
            some_loss = values > 0
            _print_ratios(name, measured[some_loss] / values[some_loss])
    below = np.array(ratios) < _COMPARED_BELOW
    paired = (losses["planned by sketches"] / losses["planned by sums"])[below]
    print(
        f"{below.sum()} ratios below {_COMPARED_BELOW}: measured loss planned by sketches over by sums "
        f"{np.exp(np.log(paired).mean()):.3f} (geometric mean), {np.mean(paired <= 1):.0%} no worse"
    )


def _print_ratios(name: str, ratios: np.ndarray) -> None:
    inside = np.mean((ratios >= 0.8) & (ratios <= 1.6))
    figures = "  ".join(f"{value:.2f}" for value in np.percentile(ratios, _PERCENTILES))
    print(f"  {name:16} {figures}  within 0.8 to 1.6: {inside:.0%} of {len(ratios)}", flush=True)


if __name__ == "__main__":
    typer.run(main)
