"""What each set of a checkpoint's students loses, at full width.

    python bench/studies/subsets.py examples/scenes [--most 64] [--prompts 100] [--json out.json]

Evaluates all sets of disjoint students if there are at most ``--most`` of them. Otherwise it evaluates the empty set,
the largest set, and sets drawn at random with seed 0, ``--most`` together. The velocity error is that of
`ppcl_train.losses.velocity_error`, the scores are those of ``ppcl eval``.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from scipy.stats import spearmanr

import ppcl_rt
from ppcl_kernels.tools.machine import write_json
from ppcl_rt import Catalog, Interval, Plan, PlannedBlock
from ppcl_rt.pipelines.task import task_of
from ppcl_train.config.presets import PRESETS
from ppcl_train.losses.velocity_error import VelocityError


def disjoint(intervals: tuple[Interval, ...]) -> Iterator[tuple[Interval, ...]]:
    """Yield every set of intervals of which no two share a block."""
    for size in range(len(intervals) + 1):
        for chosen in itertools.combinations(intervals, size):
            blocks = [block for interval in chosen for block in interval]
            if len(blocks) == len(set(blocks)):
                yield chosen


def plan_of(catalog: Catalog, chosen: tuple[Interval, ...]) -> Plan:
    """Make the plan that runs these students and all other blocks at full width."""
    depth = catalog.architecture.depth
    kept = [(n, catalog.spec(n).full) for n in range(depth) if not any(n in interval for interval in chosen)]
    students = [PlannedBlock(interval=i, width=catalog.student(i).widths.full, student=True) for i in chosen]
    return catalog.compose(kept, students)


def main(
    checkpoint: str,
    most: Annotated[int, typer.Option(min=2)] = 64,
    prompts: Annotated[
        int, typer.Option(min=0, help="unseen prompts to judge on; 0 for the velocity error alone")
    ] = 100,
    seed: int = 1,
    json_file: Annotated[Path | None, typer.Option("--json")] = None,
) -> None:
    """Evaluate sets of students, and print their losses by the number of blocks that are gone."""
    model = ppcl_rt.load(checkpoint, dtype=torch.float32, resident="all").requires_grad_(False)
    catalog, task = model.catalog, task_of(model.catalog)
    sets = list(disjoint(tuple(student.interval for student in catalog.students)))
    gone = {chosen: sum(len(interval) - 1 for interval in chosen) for chosen in sets}
    if len(sets) > most:
        ends = [sets[0], max(sets, key=gone.__getitem__)]
        sets = ends + random.Random(0).sample([chosen for chosen in sets if chosen not in ends], most - 2)
    error, rows = VelocityError(model, PRESETS["scenes"]), []
    for chosen in sorted(sets, key=gone.__getitem__):
        plan = plan_of(catalog, chosen)
        row = {
            "students": list(map(str, chosen)),
            "blocks_gone": gone[chosen],
            "ratio": catalog.ratio(plan),
            "predicted": catalog.loss(plan),
            "velocity_error": sum(error.of(plan)),
        }
        if prompts:
            with model.at(plan=plan):
                judged = task.judge(model, prompts, seed)
            row |= {"strict": judged["strict"], "soft": judged["soft"]}
        rows.append(row)
        print("  ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()), flush=True)
    print(f"{len(rows)} of {len(gone)} sets of {len(catalog.students)} students")
    for count in sorted({gone[chosen] for chosen in sets}):
        here = [row for row in rows if row["blocks_gone"] == count]
        errors = np.array([row["velocity_error"] for row in here])
        soft = f"  soft {min(r['soft'] for r in here):.3f}..{max(r['soft'] for r in here):.3f}" if prompts else ""
        print(
            f"{count:>3} blocks gone: {len(here):>3} sets, velocity error {errors.min():.4f}..{errors.max():.4f}{soft}"
        )
    losses = [row["velocity_error"] for row in rows]
    for what in ("blocks_gone", "predicted"):
        print(f"rank correlation of velocity error with {what}: {spearmanr([r[what] for r in rows], losses)[0]:.3f}")
    if json_file is not None:
        write_json(json_file, {"seed": seed, "prompts": prompts, "rows": rows})


if __name__ == "__main__":
    typer.run(main)
