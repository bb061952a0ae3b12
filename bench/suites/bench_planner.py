"""How long planning takes at the size of Qwen-Image: 60 blocks, 4 groups at 8 counts each, 55 students, 40 text runs.

    python bench/suites/bench_planner.py

Losses and sketches are made up: losses log-normal as those of examples/scenes are, sketches with a part in common, so
that choices add up and cancel. Prints seconds of one plan at each ratio, by sums and by sketches, each planned by a
planner that has planned nothing else at this ratio, and the predicted loss of the one over that of the other.
"""

from __future__ import annotations

import time
from typing import Annotated

import numpy as np
import typer

import ppcl_rt
from ppcl_rt import Catalog, Interval, LegalCount, LegalWidths, Plan, Planner, Student, TextRun, Tokens
from ppcl_rt.planning import sketch
from ppcl_rt.planning.legal import Sketch

_CONFIG = {"num_layers": 60, "num_attention_heads": 24, "attention_head_dim": 128}
_OUTER_PARAMS = 10**8
_SHARES = (1, 7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8)
_LENGTHS = (2, 3, 4, 5)
_RATIOS = (0.8, 0.7, 0.6, 0.5, 0.45, 0.4, 0.35, 0.3, 0.25, 0.2)
_STUDENTS, _TEXT_RUNS = 55, 40
# Of a sketch, by the rule of training: 4,096 above 1,000 choices. Changes lie near one of so many directions.
_SIZE, _DIRECTIONS, _IN_COMMON = 4096, 20, 0.7


def made_up(rng: np.random.Generator) -> Catalog:
    """A catalog of Qwen-Image's architecture with losses drawn at random."""
    architecture = ppcl_rt.PPCLQwenImageTransformer2DModel.architecture_of(_CONFIG, _OUTER_PARAMS)
    depth, full = architecture.depth, architecture.spec(0).full

    def widths() -> LegalWidths:
        counts = {}
        for group, count in full.items():
            least = float(rng.lognormal(-7, 1.2))
            narrower = [LegalCount(max(1, int(count * s)), least * 1.6**n) for n, s in enumerate(_SHARES) if n]
            counts[group] = (LegalCount(count, 0.0), *narrower)
        return LegalWidths(counts)

    intervals = [Interval(n, n + length - 1) for n in range(depth) for length in _LENGTHS if n + length <= depth]
    drawn = [sorted(rng.permutation(len(intervals))[:many]) for many in (_STUDENTS, _TEXT_RUNS)]
    students, runs = ([intervals[n] for n in numbers] for numbers in drawn)
    return Catalog(
        family="qwen-image",
        architecture=architecture,
        reference=Tokens(4096, 512),
        blocks=tuple(widths() for _ in range(depth)),
        students=tuple(
            Student(interval=i, start="first", loss=float(rng.lognormal(-4, 1)), widths=widths()) for i in students
        ),
        text_runs=tuple(TextRun(interval=i, loss=float(rng.lognormal(-5, 1))) for i in runs),
        sketch=Sketch(seed=0, size=_SIZE, bands=4),
    )


def _rows(choices: int, rng: np.random.Generator) -> np.ndarray:
    directions = rng.normal(size=(_DIRECTIONS, _SIZE))
    rows = rng.normal(size=(choices, _SIZE)) + _IN_COMMON * directions[rng.integers(0, _DIRECTIONS, choices)]
    return (rows / np.linalg.norm(rows, axis=1)[:, None]).astype(np.float16)


def main(seeds: Annotated[int, typer.Option(min=1)] = 3) -> None:
    """Print seconds and losses of plans of so many made-up catalogs."""

    def timed(planner: Planner, ratio: float) -> tuple[float, Plan]:
        begun = time.perf_counter()
        plan = planner.plan(ratio)
        return time.perf_counter() - begun, plan

    everything = []
    for seed in range(seeds):
        rng = np.random.default_rng(seed)
        catalog = made_up(rng)
        rows = _rows(len(list(sketch.choices(catalog))), rng)
        by_sums, by_sketches = Planner(catalog), Planner(catalog, lambda rows=rows: (rows, rows))
        first, _ = timed(by_sketches, 0.9)
        print(f"seed {seed}: {len(rows)} choices; the first plan by sketches, which prepares them, {first:.2f} s")
        for ratio in _RATIOS:
            sums, linear = timed(by_sums, ratio)
            quadratic, plan = timed(by_sketches, ratio)
            everything.append(quadratic)
            gain = by_sketches.loss(plan) / by_sketches.loss(linear)
            print(f"  ratio {ratio}: by sums {sums:.2f} s, by sketches {quadratic:.2f} s, loss {gain:.3f} of by sums")
    print(f"by sketches: median {np.median(everything):.2f} s, most {max(everything):.2f} s (asked: under 2 s)")


if __name__ == "__main__":
    typer.run(main)
