"""The draft: what a run has made so far, as a checkpoint that the runtime itself can run."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

import ppcl_rt
from ppcl_rt import LINEAR_MAP, BlockSpec, Catalog, Interval, LegalCount, LegalWidths, Student, TextRun
from ppcl_rt.families import registry
from ppcl_rt.planning.architecture import Tokens
from ppcl_rt.planning.catalog import LONGEST_MODEL
from ppcl_train.config.settings import RunConfig
from ppcl_train.data.teacher_file import load_teacher
from ppcl_train.engine.distributed import join
from ppcl_train.selectors import selection

# The loss of a choice that nothing has been measured for yet.
_UNMEASURED = 1.0


def legal_counts(run: RunConfig, spec: BlockSpec) -> dict[str, list[int]]:
    """List the counts of each group of a kind of block, widest first."""
    config, counts = run.width, {}
    for name, group in spec.groups.items():
        if group.is_rank:
            narrower = {rank for rank in config.ranks if rank < group.count}
        else:
            shares = config.heads if name in spec.head_groups else config.channels
            narrower = {max(1, round(share * group.count)) for share in shares}
            narrower |= {LINEAR_MAP} if group.mappable and config.maps else set()
        counts[name] = sorted({group.count, *narrower}, reverse=True)
    return counts


def _legal_widths(counts: Mapping[str, list[int]]) -> LegalWidths:
    return LegalWidths(
        {
            group: tuple(LegalCount(count, 0.0 if count == legal[0] else _UNMEASURED) for count in legal)
            for group, legal in counts.items()
        }
    )


def write_draft(
    run: RunConfig,
    folder: Path,
    tensors: Mapping[str, torch.Tensor],
    narrower: bool = False,
    dtype: str | None = None,
) -> Catalog:
    """Write ``draft/``: the teacher and the tensors that the run has made.

    Args:
        tensors: of students, text runs and narrower widths, under the names that they have in a checkpoint.
        narrower: whether ``tensors`` hold what narrower widths run (`legal_counts`): the counts that they hold a layer
            for are legal; otherwise every block runs at full
            width alone.
        dtype: of the floats in the draft; None for the dtype that the teacher computes in.
    """
    teacher = load_teacher(run, folder)
    architecture = teacher.catalog.architecture

    def widths(prefix: str, number: int) -> LegalWidths:
        spec = architecture.spec(number)
        return _legal_widths(_made(run, spec, prefix, tensors)) if narrower else LegalWidths.only(spec.full)

    starts = dict(selection.read(folder))
    catalog = Catalog(
        family=teacher.family,
        architecture=architecture,
        reference=Tokens(*registry.reference(run.task)),
        blocks=tuple(widths("{}.{}".format(*architecture.place(n)), n) for n in range(architecture.depth)),
        students=tuple(
            Student(interval=i, start=starts[i], loss=_UNMEASURED, widths=widths(f"students.{i.key}", i.first))
            for i in _students(tensors)
        ),
        text_runs=tuple(TextRun(interval=i, loss=_UNMEASURED) for i in _text_runs(tensors, architecture.depth)),
        compensated=narrower,
        base_model=run.base_model or _hub_name(run.teacher.pretrained) or teacher.catalog.base_model,
        license=run.license or teacher.catalog.license,
        # A checkpoint that nobody here can judge is meant for a diffusers pipeline, and names no task.
        task={"name": run.task, "sampler": run.sampler.model_dump()} if run.family.judged else None,
    )
    all_tensors = {**teacher.full_state(), **tensors}
    floats = getattr(torch, dtype or run.teacher.dtype)
    stored = {name: t.to(floats) if t.is_floating_point() else t for name, t in all_tensors.items()}
    # The draft of an earlier stage is of no more use, and with nothing to replace, one rename writes the new one.
    shutil.rmtree(folder / "draft", ignore_errors=True)
    return ppcl_rt.write_checkpoint(folder / "draft", teacher.stock_config, catalog, stored)


def _hub_name(source: str | None) -> str | None:
    """The hub's name of a pretrained teacher; a folder of somebody's disk is nobody else's business."""
    return source if source and not Path(source).exists() and len(source) <= LONGEST_MODEL else None


def _made(run: RunConfig, spec: BlockSpec, prefix: str, tensors: Mapping[str, torch.Tensor]) -> dict[str, list[int]]:
    """List the legal counts of each group of a block that some layer was made for, widest first."""

    def holds(group: str, count: int) -> bool:
        # All outputs of a group come at the same counts.
        names = [spec.replacement(output.name, count) for output in spec.outputs_of(group)[:1]]
        weights = [f"{prefix}.replacements.{name}.{which}" for name in names for which in ("weight", "up")]
        return not weights or any(weight in tensors for weight in weights)

    return {
        group: [count for count in counts if count == counts[0] or spec.groups[group].is_rank or holds(group, count)]
        for group, counts in legal_counts(run, spec).items()
    }


def _students(tensors: Mapping[str, torch.Tensor]) -> list[Interval]:
    """List the intervals of the students that tensors belong to."""
    paths = (name.split(".") for name in tensors)
    return sorted({Interval.of_key(path[1]) for path in paths if path[0] == "students"})


def _text_runs(tensors: Mapping[str, torch.Tensor], depth: int) -> list[Interval]:
    """List the text runs that all maps are there for."""
    paths = {tuple(name.split(".")[1:3]) for name in tensors if name.startswith("text_runs.")}
    lasts = {(int(first), int(name.removeprefix("z_"))) for first, name in paths if name.startswith("z_")}
    return sorted(Interval(f, n) for f, n in lasts if n == depth - 1 or (str(f), f"text_{n}") in paths)


def open_draft(run: RunConfig, folder: Path) -> Any:
    """Load ``draft/`` with everything resident, in the dtype that the teacher computes in, on this process's device."""
    dtype = getattr(torch, run.teacher.dtype)
    return ppcl_rt.load(folder / "draft", dtype=dtype, device=join().device, resident="all")
