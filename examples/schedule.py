"""Run the first denoising steps dense and the others small.

python examples/schedule.py
"""

from pathlib import Path

import torch

import ppcl_rt
from ppcl_rt.pipelines.likeness import likeness_of
from ppcl_rt.pipelines.task import task_of

SCENES = Path(__file__).parent / "scenes"
SMALL = 0.2


def main() -> None:
    """Print how near pictures stay to those of ratio 1, by the number of dense steps."""
    model = ppcl_rt.load(SCENES, dtype=torch.float32)
    task = task_of(model.catalog)
    steps, prompts = task.usual.steps, task.demo_prompts
    dense = task.sample(model, prompts, seed=0)
    for first in (0, 4, 8):
        model.set_schedule(ppcl_rt.Schedule.warm(dense_steps=first, ratio=SMALL))
        likeness = likeness_of(dense, task.sample(model, prompts, seed=0))
        psnr = "the same" if likeness["psnr"] is None else f"{likeness['psnr']:.1f} dB"
        print(f"{first} of {steps} steps dense, then {SMALL}: {psnr}, SSIM {likeness['ssim']:.3f}")
    # Phases of one's own: the first denoising step of each, and what runs from it on.
    model.set_schedule(ppcl_rt.Schedule(phases=((0, 0.35), (4, 1.0), (8, 0.5))))
    likeness = likeness_of(dense, task.sample(model, prompts, seed=0))
    print(f"0.35 for 4 steps, 1 for 4, then 0.5: SSIM {likeness['ssim']:.3f}")


if __name__ == "__main__":
    main()
