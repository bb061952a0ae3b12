"""The draft: what a run has made so far, as a checkpoint that the runtime itself can run."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

import ppcl_rt
from ppcl_rt import Catalog, Interval, Option, Student, TextRun, Widths
from ppcl_train.config.settings import RunConfig
from ppcl_train.data.teacher_file import load_teacher
from ppcl_train.engine.distributed import join
from ppcl_train.selectors import selection

# The loss of a choice that nothing has been measured for yet.
_UNMEASURED = 1.0


def write_draft(
    run: RunConfig,
    folder: Path,
    tensors: Mapping[str, torch.Tensor],
    counts: Mapping[str, list[int]] | None = None,
    dtype: str | None = None,
) -> Catalog:
    """Write ``draft/``: the teacher and the tensors that the run has made.

    Args:
        tensors: of students, text runs and narrower widths, under the names that they have in a checkpoint.
        counts: legal counts of each group, widest first; None for the full width alone.
        dtype: of the floats in the draft; None for the dtype that the teacher computes in.
    """
    teacher = load_teacher(run, folder)
    shape = teacher.catalog.shape
    widths = Widths.only(shape.width)
    if counts:
        widths = Widths(
            **{
                group: tuple(Option(count, 0.0 if count == legal[0] else _UNMEASURED) for count in legal)
                for group, legal in counts.items()
            }
        )
    starts = dict(selection.read(folder))
    catalog = Catalog(
        family=teacher.family,
        shape=shape,
        blocks=(widths,) * shape.depth,
        students=tuple(
            Student(interval=interval, start=starts[interval], loss=_UNMEASURED, widths=widths)
            for interval in _intervals(tensors, "students")
        ),
        text_runs=tuple(TextRun(interval=i, loss=_UNMEASURED) for i in _intervals(tensors, "text_runs")),
        compensated=bool(counts),
        # A checkpoint that nobody here can judge is meant for a diffusers pipeline, and names no task.
        task={"name": run.task, "sampler": run.sampler.model_dump()} if run.family.judged else None,
    )
    all_tensors = {**teacher.full_state(), **tensors}
    floats = getattr(torch, dtype or run.teacher.dtype)
    stored = {name: t.to(floats) if t.is_floating_point() else t for name, t in all_tensors.items()}
    # The draft of an earlier stage is of no more use, and with nothing to replace, one rename writes the new one.
    shutil.rmtree(folder / "draft", ignore_errors=True)
    return ppcl_rt.write_checkpoint(folder / "draft", teacher.stock_config, catalog, stored)


def _intervals(tensors: Mapping[str, torch.Tensor], kind: str) -> list[Interval]:
    """List the intervals that tensors named ``{kind}.{interval}...`` belong to."""
    paths = (name.split(".") for name in tensors)
    return sorted({Interval.of_key(path[1]) for path in paths if path[0] == kind})


def open_draft(run: RunConfig, folder: Path) -> Any:
    """Load ``draft/`` with everything resident, in the dtype that the teacher computes in, on this process's device."""
    dtype = getattr(torch, run.teacher.dtype)
    return ppcl_rt.load(folder / "draft", dtype=dtype, device=join().device, resident="all")
