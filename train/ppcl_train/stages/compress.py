"""The stage *compress*: students as differences of low rank to what they were copied from, and their narrower widths.

Blocks of the teacher get both in the stage *width*. It comes before recovery, which trains the factors: these are then
what is held in float32, with gradients and moments.
"""

from __future__ import annotations

from pathlib import Path

import torch

from ppcl_rt import Interval
from ppcl_train.closed_form.block_statistics import BlockStatistics
from ppcl_train.closed_form.compression import student_as_factors
from ppcl_train.config.settings import RunConfig
from ppcl_train.engine.distributed import join
from ppcl_train.engine.files import stored_in
from ppcl_train.engine.log import Log
from ppcl_train.engine.parts import Parts
from ppcl_train.stages import students
from ppcl_train.stages.assembly import assembled, opened
from ppcl_train.stages.width import closed_forms, narrow

OUTPUT = "compressed.json"


@torch.no_grad()
def compress(run: RunConfig, folder: Path) -> None:
    """Store students as factors, with what they run at narrower widths; every process takes a share of the students.

    Writes a file for each student into ``compressed/``, and last of all ``compressed.json``, which lists them.
    """
    world, given = join(), stored_in(folder / students.OUTPUT)
    parts, names = Parts(folder / "compressed"), list[str]()
    if given:
        model = opened(run, assembled(run, folder, given))
        catalog = model.catalog
        runnable = [(f"students.{key}", block, Interval.of_key(key).first) for key, block in model.students.items()]

        def make(
            run: RunConfig, prefix: str, statistics: BlockStatistics, read: torch.Tensor | None
        ) -> dict[str, torch.Tensor]:
            of_student = {name: each for name, each in given.items() if name.startswith(f"{prefix}.")}
            tensors = {name.removeprefix(f"{prefix}."): each.read() for name, each in of_student.items()}
            copied = catalog.student(Interval.of_key(prefix.removeprefix("students."))).copied_from
            student_as_factors(run, statistics, tensors, [model.blocks()[n] for n in copied], read)
            return tensors | closed_forms(run, statistics, read)

        names += narrow(run, model, runnable, parts, Log(folder, "compress"), world, make)
    world.wait()
    if world.is_main:
        parts.list_in(folder / OUTPUT, names, {"share": run.compress.share})
