"""Hold weights in eight bits: fewer bytes, and pictures that hardly change.

python examples/quantised.py
"""

from pathlib import Path

import torch

import ppcl_rt
from ppcl_rt.pipelines.likeness import likeness_of
from ppcl_rt.pipelines.task import task_of

SCENES = Path(__file__).parent / "scenes"
PROMPTS = ["two red squares", "a yellow triangle above a cyan stripe"]


def main() -> None:
    """Print bytes that are held, and how near pictures are to those of the same plan in float32."""
    plain = ppcl_rt.load(SCENES, 0.5, dtype=torch.float32)
    task = task_of(plain.catalog)
    wanted = task.sample(plain, PROMPTS, seed=0)
    print(f"ratio 0.5, float32: {plain.resident_bytes:,} bytes")
    for form in ("int8", "float8"):
        model = ppcl_rt.load(SCENES, 0.5, dtype=torch.float32, quantize=form)
        ssim = likeness_of(wanted, task.sample(model, PROMPTS, seed=0))["ssim"]
        print(f"ratio 0.5, {form}: {model.resident_bytes:,} bytes, SSIM {ssim:.3f} to float32")
    # What is read later, for another ratio, is quantised as well.
    model.set_ratio(0.7)
    print(f"ratio 0.7, {form}: {model.resident_bytes:,} bytes")


if __name__ == "__main__":
    main()
