"""What a pluggable checkpoint runs at some ratios: pictures of its plans."""

from __future__ import annotations

import io
import math
from pathlib import Path
from typing import Any

from ppcl_rt.checkpoint.names import CATALOG_KEY
from ppcl_rt.checkpoint.reader import Checkpoint, read_catalog
from ppcl_rt.pipelines.plan_picture import draw_plan
from ppcl_rt.planning.catalog import Catalog
from ppcl_rt.planning.plan import Plan
from ppcl_rt.planning.planner import Planner
from ppcl_rt.report.parts import Picture, Section, Table
from ppcl_rt.report.stored import Stored

_RATIOS = (0.7, 0.5, 0.35)


class Planned(Stored):
    """A checkpoint and its plans: what was asked for -> the plan, with the predicted loss where it is known."""

    folder: str
    catalog: Catalog
    plans: dict[str, tuple[Plan, float | None]]

    @classmethod
    def fits(cls, path: Path, content: Any) -> bool:
        """Whether it is the ``config.json`` of a checkpoint with a catalog."""
        return isinstance(content, dict) and CATALOG_KEY in content

    @classmethod
    def read(cls, path: Path, content: Any) -> Planned:
        """Plan for a few ratios; without the weights next to it, by the losses of single choices."""
        folder = path.parent
        if any(folder.glob("*.safetensors")):
            source = Checkpoint(folder)
            catalog, sketches = source.catalog, source.sketches
        else:
            catalog, sketches = read_catalog(folder)[2], None
        if catalog is None:
            raise ValueError("its catalog is empty")
        planner = Planner(catalog, sketches if catalog.sketch is not None else None)
        asked = {f"{ratio:g}": ratio for ratio in _RATIOS if ratio >= planner.smallest}
        asked = asked or {f"{planner.smallest_in_digits:g}": planner.smallest_in_digits}
        plans = {}
        for name, ratio in asked.items():
            plan = planner.plan(ratio)
            loss = planner.loss(plan)
            plans[name] = (plan, None if math.isnan(loss) else loss)
        # Not through validation once more: a catalog of sixty blocks takes seconds.
        return cls.model_construct(folder=str(folder), catalog=catalog, plans=plans)


def section(planned: Planned, file: str) -> Section:
    """Draw the plans, and say what each costs."""
    catalog, lines, pictures = planned.catalog, [], []
    for asked, (plan, loss) in planned.plans.items():
        costs = catalog.architecture.params(plan), catalog.architecture.flops(plan, *catalog.reference) / 1e6
        students = " ".join(str(block.interval) for block in plan.blocks if block.student)
        said = "" if loss is None else f"{loss:.3g}"
        lines.append([asked, f"{catalog.ratio(plan):.3f}", f"{costs[0]:,}", f"{costs[1]:,.1f}", said, students])
        file_of = io.BytesIO()
        draw_plan(catalog, plan).save(file_of, format="PNG")
        pictures.append(Picture(f"what runs at ratio {asked}", file_of.getvalue(), "image/png"))
    columns = ("ratio asked for", "ratio", "parameters", "MFLOPs", "predicted loss", "students")
    command = f"ppcl plan {planned.folder} --ratio {next(iter(planned.plans))} --picture plan.png"
    notes = [f"Checkpoint {catalog.fingerprint}, {catalog.architecture.dense_params:,} parameters at ratio 1."]
    return Section("Plans", [Table("plans", columns, lines), *pictures], file, command, notes)
