"""The stage *pack*: the measured catalog and the tensors become the checkpoint of the run."""

from __future__ import annotations

from pathlib import Path

import torch

import ppcl_rt
from ppcl_rt import Catalog, Interval, Planner
from ppcl_rt.checkpoint.reader import Checkpoint
from ppcl_rt.planning.sketch import select
from ppcl_train.config.settings import RunConfig
from ppcl_train.engine.files import read_content, read_tensors, write_json
from ppcl_train.engine.log import Log
from ppcl_train.stages import measure
from ppcl_train.stages.taken import listed

# Written last, into the checkpoint: what made it.
OUTPUT = "checkpoint/run.json"
# Between the ratios whose plans decide what is packed.
_SPACING = 0.005


def pack(run: RunConfig, folder: Path) -> None:
    """Put the measured catalog and the tensors together; writes ``checkpoint/``, with ``run.json`` in it.

    Students and text runs that no plan takes are left out (`used`).
    """
    log = Log(folder, "pack")
    draft = Checkpoint(folder / "draft")
    assert draft.catalog is not None, "a draft has a catalog"
    measured = read_content(folder / measure.OUTPUT)
    whole = Catalog.model_validate({**draft.catalog.model_dump(mode="json"), **measured})
    students, runs = used(whole)
    catalog = whole.model_copy(
        update={
            "students": tuple(s for s in whole.students if s.interval in students),
            "text_runs": tuple(r for r in whole.text_runs if r.interval in runs),
        }
    )
    tensors = {name: draft.read(name) for name in listed(catalog, draft.names)}
    for name, rows in read_tensors(folder / measure.SKETCHES).items():
        tensors[name] = torch.from_numpy(select(rows.numpy(), whole, catalog))
    catalog = ppcl_rt.write_checkpoint(folder / "checkpoint", draft.config, catalog, tensors)
    # The note holds what made the checkpoint, and nothing else.
    write_json(folder / OUTPUT, {})
    size = sum(path.stat().st_size for path in (folder / "checkpoint").iterdir())
    log(students=" ".join(map(str, sorted(students))), text_runs=" ".join(map(str, sorted(runs))), megabytes=size / 1e6)


def used(catalog: Catalog) -> tuple[set[Interval], set[Interval]]:
    """Find the students and the text runs that plans take: the smallest plan, and those at ratios 0.005 apart."""
    plans = Planner(catalog).plans(_SPACING)
    students = {planned.interval for plan in plans for planned in plan.blocks if planned.student}
    return students, {run for plan in plans for run in plan.text_runs}
