"""Caches across denoising steps at lower ratios: score on scenes and time of each pair.

    OMP_NUM_THREADS=1 python bench/studies/caches.py --prompts 300 --json caches.json

All pairs see the same prompts and the same noise. Time is what the process computes for all of them (CPU seconds, one
thread) over that of ratio 1 without a cache; other work on the machine hardly counts. MagCache's ratios are calibrated
by diffusers, at ratio 1.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import io
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch

import ppcl_rt
from ppcl_train.scenes.encoding import to_images
from ppcl_train.scenes.judging import Score, judge
from ppcl_train.scenes.language import KINDS, Caption, held_out_captions
from ppcl_train.scenes.sampling import Sampler, noise_for

CHECKPOINT = Path(__file__).resolve().parents[2] / "examples" / "scenes"
# The timestep of the forward that runs, in 0..1000.
NOW = {"timestep": 1000.0}


def now() -> float:
    """What the caches ask that skip within a range of timesteps."""
    return NOW["timestep"]


def configs(magnitudes: list[float]) -> dict[str, Callable[[], Any] | None]:
    """The caches, by name; their settings are those of diffusers but for these."""
    return {
        "none": None,
        "First-Block": lambda: diffusers.FirstBlockCacheConfig(threshold=0.1),
        "Mag": lambda: diffusers.MagCacheConfig(num_inference_steps=len(magnitudes), mag_ratios=magnitudes),
        "TaylorSeer, every 2nd": lambda: diffusers.TaylorSeerCacheConfig(
            cache_interval=2, taylor_factors_dtype=torch.float32
        ),
        "Pyramid-Attention": lambda: diffusers.PyramidAttentionBroadcastConfig(
            spatial_attention_block_skip_range=2, current_timestep_callback=now
        ),
        "FasterCache": lambda: diffusers.FasterCacheConfig(
            is_guidance_distilled=True, tensor_format="BCHW", current_timestep_callback=now
        ),
    }


def sample(model: Any, sampler: Sampler, captions: list[Caption], batch: int = 100) -> tuple[np.ndarray, float]:
    """Shares of the captions that came out right, and CPU seconds."""
    noise, shares, seconds = noise_for(len(captions), 1), [], 0.0
    for start in range(0, len(captions), batch):
        part = captions[start : start + batch]
        if model.is_cache_enabled:
            model._reset_stateful_cache()
        begin = time.process_time()
        with model.cache_context("both"):
            clean = sampler.sample(model, [str(caption) for caption in part], noise[start : start + batch])
        seconds += time.process_time() - begin
        shares.append(judge(part, to_images(clean)))
    return np.concatenate(shares), seconds


def calibrated(model: Any, sampler: Sampler, captions: list[Caption]) -> list[float]:
    """MagCache's ratios of magnitudes, as diffusers prints them."""
    model.enable_cache(diffusers.MagCacheConfig(calibrate=True, num_inference_steps=sampler.steps))
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        sample(model, sampler, captions[:100])
    model.disable_cache()
    [line] = [line for line in printed.getvalue().splitlines() if line.startswith("[") and "Mag" not in line]
    return [float(ratio) for ratio in ast.literal_eval(line)]


def main() -> None:
    """Measure, print a table, and write the rows if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ratios", default="1,0.7,0.5,0.35")
    parser.add_argument("--prompts", type=int, default=300)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    diffusers.utils.logging.set_verbosity_error()
    torch.set_num_threads(1)
    captions, rows, whole = held_out_captions(given.prompts // len(KINDS), seed=1), [], 0.0
    model = ppcl_rt.load(CHECKPOINT, dtype=torch.float32)
    sampler = Sampler.model_validate(model.catalog.task["sampler"])
    model.register_forward_pre_hook(
        lambda _, args, kwargs: NOW.update(timestep=1000 * float(kwargs["timestep"][0])), with_kwargs=True
    )
    magnitudes = calibrated(model, sampler, captions)
    print("| ratio | cache | time | strict (95 %) | soft |\n|---|---|---|---|---|", flush=True)
    for ratio in map(float, given.ratios.split(",")):
        model.set_ratio(ratio)
        for name, config in configs(magnitudes).items():
            if config is not None:
                model.enable_cache(config())
            shares, seconds = sample(model, sampler, captions)
            if config is not None:
                model.disable_cache()
            whole, score = whole or seconds, Score.of(shares)
            rows.append({"ratio": ratio, "cache": name, "seconds": seconds, "time": seconds / whole, **vars(score)})
            low, high = score.strict_ci
            cells = (f"{ratio:g}", name, f"{seconds / whole:.2f}", f"{score.strict:.3f} ({low:.3f}-{high:.3f})")
            print(f"| {' | '.join(cells)} | {score.soft:.3f} |", flush=True)
    if given.json is not None:
        given.json.write_text(json.dumps({"prompts": len(captions), "magnitudes": magnitudes, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
