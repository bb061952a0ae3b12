"""Checkpoints on the way: what a run has made so far, put together so that the runtime itself can run it."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

import ppcl_rt
from ppcl_rt import Catalog, Interval, Option, Student, TextRun, Widths
from ppcl_train.config.settings import RunConfig
from ppcl_train.engine.distributed import join
from ppcl_train.families import base as family
from ppcl_train.selectors import selection
from ppcl_train.stages.teacher import load

# A choice that nothing has been measured for yet.
_UNMEASURED = 1.0


def write_draft(
    run: RunConfig,
    folder: Path,
    made: Mapping[str, torch.Tensor],
    widths: Mapping[str, list[int]] | None = None,
    dtype: str | None = None,
) -> Catalog:
    """Write ``draft/``: the teacher, and what was made: students and, with ``widths``, all that narrower widths run.

    Args:
        dtype: of the floats in it; None for what the teacher computes in.
    """
    teacher = load(run, folder)
    shape = teacher.catalog.shape
    options = Widths.only(shape.width)
    if widths:
        options = Widths(
            **{
                group: tuple(Option(count, _UNMEASURED if rank else 0.0) for rank, count in enumerate(counts))
                for group, counts in widths.items()
            }
        )
    intervals = sorted({Interval.of_key(name.split(".")[1]) for name in made if name.startswith("students.")})
    starts = dict(selection.read(folder))
    catalog = Catalog(
        family=teacher.family,
        shape=shape,
        blocks=(options,) * shape.depth,
        students=tuple(
            Student(
                interval=interval,
                start=starts[interval],
                loss=_UNMEASURED,
                widths=options,
            )
            for interval in intervals
        ),
        text_runs=tuple(
            TextRun(interval=interval, loss=_UNMEASURED)
            for interval in sorted({Interval.of_key(n.split(".")[1]) for n in made if n.startswith("text_runs.")})
        ),
        compensated=bool(widths),
        # What nobody here can judge is a checkpoint for a diffusers pipeline.
        task={"name": run.task, "sampler": run.sampler.model_dump()} if family.of(run.task).judged else None,
    )
    tensors = {**teacher.full_state(), **made}
    kind = getattr(torch, dtype or run.teacher.dtype)
    stored = {name: t.to(kind) if t.is_floating_point() else t for name, t in tensors.items()}
    # What an earlier stage left is of no more use, and where there is nothing to replace, one rename does it.
    shutil.rmtree(folder / "draft", ignore_errors=True)
    return ppcl_rt.write_checkpoint(folder / "draft", teacher.stock_config, catalog, stored)


def open_draft(run: RunConfig, folder: Path) -> Any:
    """Load ``draft/`` with everything resident, in the dtype that the teacher computes in, on this process's device."""
    dtype = getattr(torch, run.teacher.dtype)
    return ppcl_rt.load(folder / "draft", dtype=dtype, device=join().device, resident="all")
