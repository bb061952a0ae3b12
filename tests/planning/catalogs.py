"""Random catalogs."""

from __future__ import annotations

import numpy as np
from hypothesis import HealthCheck, settings

from ppcl_rt import Catalog, Interval, LegalCount, LegalWidths, Student, TextRun, Tokens, Width
from ppcl_rt.families.qwen_image import block_spec
from ppcl_rt.planning.architecture import Architecture, BlockList

seeded = settings(deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])


def architecture(depth: int, full: Width, head_dim: int, outer_params: int) -> Architecture:
    """Two-stream blocks of any counts."""
    dim = full["modulation"]
    return Architecture(
        lists=(BlockList(path="transformer_blocks", kind="two-stream", depth=depth),),
        kinds={"two-stream": block_spec(dim, full["heads"], head_dim, full["image"], full["text"])},
        dim=dim,
        outer_params=outer_params,
    )


def random_catalog(rng: np.random.Generator, depth: int, students: int, losses: tuple[float, float] = (0.01, 1.0)):
    """A catalog with two counts a group; losses spread evenly over the orders of magnitude between two bounds."""
    dim = 24
    heads, image, text = (int(n) for n in rng.integers(2, 30, 3))
    full = Width(heads=heads, image=image, text=text, modulation=dim)

    def loss() -> float:
        return float(np.exp(rng.uniform(*np.log(losses))))

    def widths() -> LegalWidths:
        # Two factors of nearly the full rank hold more than the layer that they stand in for.
        bounds = full.replace(modulation=dim // 2)
        counts = [int(rng.integers(group in ("heads", "modulation"), n)) for group, n in bounds.items()]
        return LegalWidths(
            **{
                group: (LegalCount(full_count, 0.0), LegalCount(count, loss()))
                for (group, full_count), count in zip(full.items(), counts, strict=True)
            }
        )

    every = [Interval(a, b) for a in range(depth) for b in range(a, depth)]
    chosen = [every[n] for n in sorted(rng.permutation(len(every))[:students])]
    long = [interval for interval in every if len(interval) > 1]
    runs = [long[n] for n in sorted(rng.permutation(len(long))[:students])]
    return Catalog(
        family="qwen-image",
        reference=Tokens(16, 7),
        architecture=architecture(depth, full, 8, outer_params=int(rng.integers(0, 20000))),
        blocks=tuple(widths() for _ in range(depth)),
        students=tuple(Student(interval=i, start="first", loss=loss(), widths=widths()) for i in chosen),
        text_runs=tuple(TextRun(interval=i, loss=loss()) for i in runs),
    )
