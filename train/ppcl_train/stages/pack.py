"""The stage *pack*: the measured catalog and the tensors become the checkpoint of the run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

from ppcl_rt import Catalog, Plan, Planner
from ppcl_rt.checkpoint.converted import Stored
from ppcl_rt.checkpoint.writer import in_shards, write_shards
from ppcl_rt.planning.catalog import MeasuredPlan
from ppcl_rt.planning.sketch import TENSORS, select, taken
from ppcl_train.config.settings import RunConfig
from ppcl_train.engine import digests
from ppcl_train.engine.distributed import join
from ppcl_train.engine.files import read_content, read_tensors, stored_in, write_json
from ppcl_train.engine.log import Log
from ppcl_train.stages import measure, recover
from ppcl_train.stages.assembly import assembled
from ppcl_train.stages.sensitivities import losses_of_plans
from ppcl_train.stages.taken import listed
from ppcl_train.stages.trained import opened_as_factors

# Written last, into the checkpoint: what made it.
OUTPUT = "checkpoint/run.json"
# The plans that are measured, and a digest of what they were planned with.
_PLANS = "plans.json"


def pack(run: RunConfig, folder: Path) -> None:
    """Put the measured catalog and the tensors together; writes ``checkpoint/``, with ``run.json`` in it.

    Plans are made for many budgets, some for each, from where training began (`RecoverConfig.least_ratio`), and
    measured as a whole. Those that no other one beats are the frontier (`Catalog.frontier`). What none of them takes
    is left out: students, text runs. Every process of a world calls this and measures; the first one does the rest.
    """
    log, config, world = Log(folder, "pack"), run.measure, join()
    if not world.is_main:
        # Until the plans are there.
        world.wait()
        take_part(run, folder, log)
        return
    source = assembled(run, folder, stored_in(folder / recover.REFINED), run.storage)
    assert source.catalog is not None, "what is assembled has a catalog"
    measured = read_content(folder / measure.OUTPUT)
    whole = Catalog.model_validate({**source.catalog.model_dump(mode="json"), **measured})
    read = read_tensors(folder / measure.SKETCHES)
    sketches = {name: rows.numpy() for name, rows in read.items()}
    planner = Planner(whole, lambda: [sketches[name] for name in TENSORS])
    least_share = max(run.recover.least_ratio, run.refine.least_ratio)
    of = digests.of_values(measured, digests.of_tree(dict(sorted(read.items()))))
    if not (folder / _PLANS).exists() or read_content(folder / _PLANS)["of"] != of:
        plans = planner.frontier(config.spacing, config.other_spacing, least_share, config.candidates)
        write_json(folder / _PLANS, {"of": of, "plans": [plan.model_dump(mode="json") for plan in plans]})
        log(plans=len(plans), smallest_ratio=planner.smallest)
    world.wait()
    losses = undominated(whole, take_part(run, folder, log))
    catalog = _packed(whole, list(losses))
    frontier = (
        MeasuredPlan(choices=tuple(taken(catalog, plan)), loss=sum(bands), bands=bands)
        for plan, bands in losses.items()
    )
    catalog = catalog.model_copy(update={"frontier": tuple(frontier)})
    tensors = source.stored(listed(catalog, source.stored_names))
    for name, rows in sketches.items():
        tensors[name] = Stored.held(torch.from_numpy(select(rows, whole, catalog)))
    # By shapes alone: the tensors of one file at a time are in memory.
    shapes = {
        name: torch.empty(each.shape, dtype=getattr(torch, run.storage), device="meta")
        for name, each in tensors.items()
    }
    shards = ({name: tensors[name].read() for name in shard} for shard in in_shards(shapes))
    write_shards(folder / "checkpoint", source.config, shards, lambda: catalog)
    # The note holds what made the checkpoint, and nothing else.
    write_json(folder / OUTPUT, {})
    size = sum(path.stat().st_size for path in (folder / "checkpoint").iterdir())
    log(
        students=" ".join(str(student.interval) for student in catalog.students),
        text_runs=" ".join(str(text_run.interval) for text_run in catalog.text_runs),
        megabytes=size / 1e6,
    )


def _packed(whole: Catalog, plans: Sequence[Plan]) -> Catalog:
    """The catalog without the students and the text runs that no plan takes."""
    students = {planned.interval for plan in plans for planned in plan.blocks if planned.student}
    runs = {text_run for plan in plans for text_run in plan.text_runs}
    return whole.model_copy(
        update={
            "students": tuple(student for student in whole.students if student.interval in students),
            "text_runs": tuple(text_run for text_run in whole.text_runs if text_run.interval in runs),
        }
    )


def take_part(run: RunConfig, folder: Path, log: Callable[..., None]) -> dict[Plan, tuple[float, ...]]:
    """Measure the plans together with all processes that call this; returns what `losses_of_plans` does."""
    source = assembled(run, folder, stored_in(folder / recover.REFINED), run.storage)
    plans = [Plan.model_validate(plan) for plan in read_content(folder / _PLANS)["plans"]]
    model, _ = opened_as_factors(run, source, trains=False)
    return losses_of_plans(model, run, folder, plans, log)


def undominated(catalog: Catalog, losses: Mapping[Plan, tuple[float, ...]]) -> dict[Plan, tuple[float, ...]]:
    """Leave out plans that another one beats, or equals, in parameters, FLOPs and loss at once."""
    architecture, reference = catalog.architecture, catalog.reference
    figures = {
        plan: (sum(bands), architecture.params(plan), architecture.flops(plan, *reference))
        for plan, bands in losses.items()
    }
    kept: dict[Plan, tuple[float, ...]] = {}
    # The least loss first, so that what beats a plan comes before it.
    for plan in sorted(losses, key=figures.__getitem__):
        if not any(all(a <= b for a, b in zip(figures[other], figures[plan], strict=True)) for other in kept):
            kept[plan] = losses[plan]
    return kept
