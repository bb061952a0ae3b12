"""What a teacher in eight bits adds to measured losses: the velocity error of the dense plan, and the losses of choices
measured against it.

    python bench/studies/teacher_in_eight_bits.py examples/scenes
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

import ppcl_rt
from ppcl_train.config.presets import PRESETS
from ppcl_train.config.settings import with_changes
from ppcl_train.losses.velocity_error import VelocityError


def main() -> None:
    """Print the losses of plans against the exact teacher and against the one in eight bits."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--ratios", default="0.8,0.65,0.5,0.35,0.2")
    parser.add_argument("--samples", type=int, default=200)
    given = parser.parse_args()
    run = with_changes(PRESETS["scenes"], {"measure.samples": given.samples})
    float32 = torch.float32
    exact = ppcl_rt.load(given.checkpoint, dtype=float32)
    held = ppcl_rt.load(given.checkpoint, dtype=float32, quantize="int8")
    error, of_held = VelocityError(exact, run), VelocityError(held, run)
    alone = sum(of_held.change(exact.catalog.dense, error.teacher).bands)
    print(f"{run.task}, {given.samples} samples, float32, CPU; velocity errors")
    print(f"the dense plan in int8, against the exact teacher: {alone:.2e}")
    print("ratio  all exact  teacher in int8     all in int8")
    for ratio in map(float, given.ratios.split(",")):
        plan = exact.planner.plan(ratio)
        wanted, *others = sum(error.of(plan)), sum(error.change(plan, of_held.teacher).bands), sum(of_held.of(plan))
        print(f"{ratio:5.2f}  {wanted:.3e}", *(f"{other:.3e} {other / wanted - 1:+7.2%}" for other in others), sep="  ")


if __name__ == "__main__":
    main()
