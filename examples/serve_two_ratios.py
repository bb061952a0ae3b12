"""One model in two threads, each at a ratio of its own.

python examples/serve_two_ratios.py
"""

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import ppcl_rt
from ppcl_rt.pipelines.task import task_of

SCENES = Path(__file__).parent / "scenes"
REQUESTS = [("a red square at b2", 0.7), ("three blue rings in row 2", 0.35)] * 2


def main() -> None:
    """Draw requests one after the other and two at once, and compare the pictures."""
    model = ppcl_rt.load(SCENES, ratio=0.7, dtype=torch.float32)
    task = task_of(model.catalog)

    def serve(request: tuple[str, float]) -> Image.Image:
        prompt, ratio = request
        # Of this thread alone (and of a task of asyncio alone); plain `set_ratio` is for all of them.
        with model.at(ratio=ratio):
            return task.sample(model, [prompt], seed=0)[0]

    begun = time.perf_counter()
    alone = [serve(request) for request in REQUESTS]
    between = time.perf_counter()
    with ThreadPoolExecutor(2) as pool:
        together = list(pool.map(serve, REQUESTS))
    ended = time.perf_counter()
    same = sum(np.array_equal(one, other) for one, other in zip(alone, together, strict=True))
    print(f"{same} of {len(REQUESTS)} pictures are the same when two are drawn at once")
    print(f"one after the other, and the first visit of each ratio: {between - begun:.2f} s")
    print(f"two at once: {ended - between:.2f} s on {torch.get_num_threads()} torch threads")
    print(f"the model is as it was: ratio {model.costs()['ratio']:.3f}, {model.resident_bytes:,} bytes for both")


if __name__ == "__main__":
    main()
