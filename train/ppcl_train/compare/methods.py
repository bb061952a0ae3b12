"""Ways to make a model smaller, by name: each gives one model of at most a ratio, in the same number of steps.

A step is a batch of `CompareConfig.batch` samples that gradients are computed on. A batch that feeds several students
at once, all from one pass of the teacher, is one step. What is solved in closed form or chosen by measurement takes no
step. Width is left to the runtime: a model here is the teacher's class with its plan set.
"""

from __future__ import annotations

from typing import Any

import torch

import ppcl_rt
from ppcl_train import pipeline
from ppcl_train.compare.entry import Entry, Method, UnreachableError
from ppcl_train.compare.whole_blocks import drop, drop_and_train, eq5, eq5_literal, gates, sequential, uniform
from ppcl_train.compare.width_alone import magnitude_width, random_width
from ppcl_train.config.settings import RunConfig


def ours(entry: Entry) -> Any:
    """Run the pipeline, once a seed for all ratios, and load its checkpoint at a ratio.

    Raises:
        UnreachableError: the checkpoint has no plan this small.
    """
    folder = entry.shared / "ours"
    run = entry.begin(folder, **_budgeted(entry.run))
    pipeline.run_stages(run, folder)
    checkpoint = folder / "checkpoint"
    try:
        return ppcl_rt.load(checkpoint, entry.ratio, dtype=torch.float32, device=entry.device)
    except ValueError as error:
        smallest = ppcl_rt.load(checkpoint, dtype=torch.float32).planner.smallest
        if entry.ratio < smallest:
            raise UnreachableError(str(error)) from None
        raise


def _budgeted(run: RunConfig) -> dict[str, int]:
    """Find settings with which the pipeline trains for as many steps as every other method, divided as ``run`` does.

    Raises:
        ValueError: choosing intervals takes all steps.
    """
    planned = {
        "students__steps": run.students.steps,
        "recover__steps": run.recover.steps,
        "recover__kept_steps": run.recover.kept_steps,
        "refine__steps": run.refine.steps,
        "refine__kept_steps": run.refine.kept_steps,
    }
    taken = run.table.steps if run.select == "table" else run.probes.steps
    left, total = run.compare.steps - taken, sum(planned.values())
    if left < len(planned):
        raise ValueError(f"choosing intervals takes {taken} of {run.compare.steps} steps: raise compare.steps")
    # One step for whatever the run trains at all, the rest by its own shares; what rounding leaves goes to the longest.
    spare = left - sum(count > 0 for count in planned.values())
    changes = {name: (count > 0) + spare * count // total for name, count in planned.items()}
    changes[max(planned, key=planned.__getitem__)] += left - sum(changes.values())
    return changes


METHODS: dict[str, Method] = {
    "ours": ours,
    "eq5": eq5,
    "eq5-literal": eq5_literal,
    "sequential": sequential,
    "uniform": uniform,
    "gates": gates,
    "drop+train": drop_and_train,
    "drop": drop,
    "magnitude": magnitude_width,
    "random": random_width,
}
# Methods that are trained with every seed, not with the first alone.
SEEDED = ("ours", "eq5")
