"""The stage *pack*: the measured catalog and the tensors become the checkpoint of the run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from ppcl_rt import Catalog, Plan, Planner
from ppcl_rt.checkpoint.converted import ConvertedCheckpoint, Stored
from ppcl_rt.checkpoint.writer import in_shards, write_shards
from ppcl_rt.planning.catalog import MeasuredPlan
from ppcl_rt.planning.sketch import TENSORS, select, taken
from ppcl_train.config.settings import RunConfig
from ppcl_train.engine.files import read_content, read_tensors, stored_in, write_json
from ppcl_train.engine.log import Log
from ppcl_train.losses.velocity_error import VelocityError
from ppcl_train.stages import measure, recover
from ppcl_train.stages.assembly import assembled
from ppcl_train.stages.taken import listed
from ppcl_train.stages.trained import opened_as_factors

# Written last, into the checkpoint: what made it.
OUTPUT = "checkpoint/run.json"
# Plans between two lines of the log.
_LOGGED = 20


def pack(run: RunConfig, folder: Path) -> None:
    """Put the measured catalog and the tensors together; writes ``checkpoint/``, with ``run.json`` in it.

    Plans are made for many budgets, some for each, from where training began (`RecoverConfig.least_ratio`), and
    measured as a whole. Those that no other one beats are the frontier (`Catalog.frontier`). What none of them takes
    is left out: students, text runs.
    """
    log, config = Log(folder, "pack"), run.measure
    source = assembled(run, folder, stored_in(folder / recover.REFINED), run.storage)
    assert source.catalog is not None, "what is assembled has a catalog"
    measured = read_content(folder / measure.OUTPUT)
    whole = Catalog.model_validate({**source.catalog.model_dump(mode="json"), **measured})
    sketches = {name: rows.numpy() for name, rows in read_tensors(folder / measure.SKETCHES).items()}
    planner = Planner(whole, lambda: [sketches[name] for name in TENSORS])
    least_share = max(run.recover.least_ratio, run.refine.least_ratio)
    plans = planner.frontier(config.spacing, config.other_spacing, least_share, config.candidates)
    log(plans=len(plans), smallest_ratio=planner.smallest)
    losses = undominated(whole, _measured(run, source, whole, plans, log))
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


def _measured(
    run: RunConfig, source: ConvertedCheckpoint, catalog: Catalog, plans: Sequence[Plan], log: Log
) -> dict[Plan, tuple[float, ...]]:
    """The losses of plans in each band, which are not those that were predicted."""
    error, found = VelocityError(opened_as_factors(run, source, trains=False)[0], run), dict[Plan, tuple[float, ...]]()
    for number, plan in enumerate(plans):
        found[plan] = error.of(plan)
        if number % _LOGGED == 0:
            log(measured=number, of=len(plans), ratio=catalog.ratio(plan), loss=sum(found[plan]))
    return found


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
