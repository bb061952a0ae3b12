"""Load a checkpoint once and draw the same prompt at four ratios.

python examples/load_and_switch.py
"""

import time
from pathlib import Path

import torch

import ppcl_rt
from ppcl_rt.pipelines.likeness import likeness_of
from ppcl_rt.pipelines.task import task_of

SCENES = Path(__file__).parent / "scenes"
PROMPTS = ["two red squares", "a yellow triangle above a cyan stripe"]


def main() -> None:
    """Print what each ratio costs, and how near its pictures are to those of ratio 1."""
    model = ppcl_rt.load(SCENES, ratio=1.0, dtype=torch.float32)
    task = task_of(model.catalog)
    dense = task.sample(model, PROMPTS, seed=0)
    for ratio in (1.0, 0.7, 0.5, 0.35):
        # From now on. The first visit may read from disk; the second is a look-up.
        model.set_ratio(ratio)
        begun = time.perf_counter()
        pictures = task.sample(model, PROMPTS, seed=0)
        seconds = time.perf_counter() - begun
        costs, psnr = model.costs(), likeness_of(dense, pictures)["psnr"]
        near = "the same pictures" if psnr is None else f"{psnr:.1f} dB to ratio 1"
        print(f"asked {ratio}: ratio {costs['ratio']:.3f}, {costs['params']:,} parameters, {seconds:.2f} s, {near}")
    with model.at(ratio=0.2):
        print(f"inside `at`: ratio {model.costs()['ratio']:.3f}")
    print(f"after it: ratio {model.costs()['ratio']:.3f}")


if __name__ == "__main__":
    main()
