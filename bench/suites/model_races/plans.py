"""Plans that are raced, and the catalog that the planner chooses them from."""

from __future__ import annotations

import json
import math
import random
from typing import Any, NamedTuple

from model_races.presets import RATIOS, Preset
from ppcl_rt.families.qwen_image import PPCLQwenImageTransformer2DModel
from ppcl_rt.planning.architecture import Tokens
from ppcl_rt.planning.catalog import Catalog
from ppcl_rt.planning.interval import Interval
from ppcl_rt.planning.legal import LegalCount, LegalWidths, Student, TextRun
from ppcl_rt.planning.plan import Plan
from ppcl_rt.planning.planner import Planner
from ppcl_rt.planning.width import Width


def catalog_of(preset: Preset, outer_params: int) -> Catalog:
    """Make a catalog with synthetic losses: students of two blocks, text runs of three, all widths on offer."""
    rng = random.Random(0)
    full, depth = preset.full, preset.depth
    config = {**preset.config, "num_layers": depth}

    def widths(scale: float) -> LegalWidths:
        groups = {}
        for group, whole in full.items():
            # Losing half of the units of a group costs a quarter of losing all of them.
            kept = [(count, (1 - count / whole) ** 2) for count in preset.offered[group]]
            weight = scale * {"heads": 1.0, "image": 1.5, "text": 0.4, "modulation": 0.05}[group] * rng.uniform(0.5, 2)
            groups[group] = (LegalCount(whole, 0.0), *(LegalCount(count, weight * loss) for count, loss in kept))
        return LegalWidths(groups)

    return Catalog(
        family=PPCLQwenImageTransformer2DModel.family,
        reference=Tokens(math.prod(next(iter(preset.sizes.values()))), preset.text),
        architecture=PPCLQwenImageTransformer2DModel.architecture_of(config, outer_params),
        blocks=tuple(widths(1.0) for _ in range(depth)),
        students=tuple(
            Student(interval=Interval(n, n + 1), start="first", loss=rng.uniform(0.1, 0.8), widths=widths(2.0))
            for n in range(0, depth - 1, 2)
        ),
        text_runs=tuple(
            TextRun(interval=Interval(n, n + 2), loss=rng.uniform(0.05, 0.6)) for n in range(0, depth - 2, 3)
        ),
    )


class Planned(NamedTuple):
    """A plan, and how it was made.

    Attributes:
        kind: ``dense``; ``width``: all blocks equally narrow; ``depth``: evenly spaced blocks left out; ``mixed``:
            chosen by the planner from a catalog with synthetic losses.
        ratio: upper limit of the plan's parameters and FLOPs, relative to the dense plan.
        plan: the plan.
    """

    kind: str
    ratio: float
    plan: Plan

    @property
    def name(self) -> str:
        return f"{self.kind} {self.ratio:g}"


PLANS = ("dense 1", *(f"{kind} {ratio:g}" for kind in ("width", "depth", "mixed") for ratio in RATIOS))


def plan_of(name: str, preset: Preset, catalog: Catalog) -> Planned:
    """Make one of `PLANS`; its ratio limits parameters, and FLOPs at the first size."""
    kind, ratio = name.split()[0], float(name.split()[1])
    architecture, depth, full = catalog.architecture, preset.depth, preset.full
    if kind == "width":
        plan = catalog.compose((n, narrowed(preset, ratio)) for n in range(depth))
    elif kind == "depth":
        kept = int((ratio * architecture.dense_params - architecture.outer_params) / preset.spec.params(full))
        plan = catalog.compose((n * depth // kept, full) for n in range(kept))
    elif kind == "mixed":
        plan = Planner(catalog).plan(ratio)
    else:
        plan = catalog.dense
    return Planned(kind, ratio, plan)


def narrowed(preset: Preset, ratio: float) -> Width:
    """Return a width with a share of the heads and channels, and modulations of a low rank."""
    channels = int(ratio * preset.full["image"]) // preset.unit * preset.unit
    return Width(heads=int(ratio * preset.heads), image=channels, text=channels, modulation=preset.rank)


def described(planned: Planned, catalog: Catalog) -> dict[str, Any]:
    """Describe a plan for readers of the figures."""
    plan, architecture = planned.plan, catalog.architecture
    blocks = len(plan.blocks)
    # A block that does not update the text has no text MLP: it counts as 0 channels.
    mean = {
        group: round(sum(block.width.get(group, 0) for block in plan.blocks) / blocks, 1)
        for group in architecture.spec(0).groups
    }
    return {
        "kind": planned.kind,
        "ratio": planned.ratio,
        "how": "planner, synthetic losses" if planned.kind == "mixed" else "explicit",
        "params": architecture.params(plan),
        "params_ratio": round(architecture.params(plan) / architecture.dense_params, 4),
        "blocks": blocks,
        "students": sum(block.student for block in plan.blocks),
        "text_not_updated": len(plan.text_not_updated),
        "mean_width": mean,
        "widths": len({block.width for block in plan.blocks}),
        "plan": json.loads(plan.model_dump_json(exclude={"checkpoint"})),
    }
