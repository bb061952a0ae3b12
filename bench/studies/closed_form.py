"""What a checkpoint loses when half of the MLP channels of every block go, without any training.

    python bench/studies/closed_form.py runs/scenes [--prompts 2000]

Reads the teacher and the closed forms (``width.json``) of a run folder, as they were before recovery: a run
with ``keep_all=true``. Nothing but the MLP channels changes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ppcl_rt import BlockSpec, Width
from ppcl_rt.pipelines.task import task_of
from ppcl_train import pipeline
from ppcl_train.engine.files import stored_in
from ppcl_train.losses.velocity_error import VelocityError
from ppcl_train.stages.assembly import assembled, opened


def _half_of_channels(spec: BlockSpec) -> Width:
    """The full width, with half of the channels of every MLP."""
    channels = [group for group in spec.unit_groups if group not in spec.head_groups]
    return spec.full.replace(**{group: spec.full[group] // 2 for group in channels})


def main(run_folder: Path, prompts: Annotated[int, typer.Option(min=5)] = 2000, seed: int = 1) -> None:
    """Print the velocity error, and the scores next to those of the teacher."""
    run = pipeline.config_of(run_folder)
    model = opened(run, assembled(run, run_folder, stored_in(run_folder / "width.json")))
    catalog = model.catalog
    depth = catalog.architecture.depth
    plan = catalog.compose((n, _half_of_channels(catalog.spec(n))) for n in range(depth))
    print(f"half of all MLP channels: velocity error {sum(VelocityError(model, run).of(plan)):.6f} relative")
    for name, chosen in (("teacher", catalog.dense), ("half", plan)):
        with model.at(plan=chosen):
            judged = task_of(catalog).judge(model, prompts, seed)
        scores = "  ".join(
            f"{k} {judged[k]:.4f} ({judged[f'{k}_ci'][0]:.4f}-{judged[f'{k}_ci'][1]:.4f})" for k in ("strict", "soft")
        )
        print(f"{name:>8}: {scores}  ratio {catalog.ratio(chosen):.3f}", flush=True)


if __name__ == "__main__":
    typer.run(main)
