"""What a run has made so far, as a model that the runtime itself runs: put together in memory, nothing is written.

The teacher is read where it lies, what the run made out of the files of its stages; both a tensor at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from ppcl_rt import LINEAR_MAP, BlockSpec, Catalog, Interval, LegalCount, LegalWidths, Student, TextRun
from ppcl_rt.checkpoint.converted import ConvertedCheckpoint, Stored
from ppcl_rt.families import registry
from ppcl_rt.planning.architecture import Tokens
from ppcl_rt.planning.catalog import LONGEST_MODEL
from ppcl_train.config.settings import RunConfig
from ppcl_train.data.teacher_file import find_teacher
from ppcl_train.engine.distributed import join
from ppcl_train.families.base import Judged
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


def assembled(
    run: RunConfig, folder: Path, tensors: Mapping[str, Stored], dtype: str | None = None
) -> ConvertedCheckpoint:
    """Put together a checkpoint of the teacher and of tensors that the run has made.

    Args:
        tensors: of students, text runs and narrower widths, under the names that they have in a checkpoint. The counts
            that they hold a layer for are legal.
        dtype: that the tensors are rounded to before they are used; None for the one that the teacher computes in.
    """
    teacher = find_teacher(run, folder)
    architecture = teacher.catalog.architecture

    def widths(prefix: str, number: int) -> LegalWidths:
        return _legal_widths(_made(run, architecture.spec(number), prefix, tensors))

    intervals = _students(tensors)
    starts = dict(selection.read(folder)) if intervals else {}
    catalog = Catalog(
        family=teacher.catalog.family,
        architecture=architecture,
        reference=Tokens(*registry.reference(run.task)),
        blocks=tuple(widths("{}.{}".format(*architecture.place(n)), n) for n in range(architecture.depth)),
        students=tuple(
            Student(interval=i, start=starts[i], loss=_UNMEASURED, widths=widths(f"students.{i.key}", i.first))
            for i in intervals
        ),
        text_runs=tuple(TextRun(interval=i, loss=_UNMEASURED) for i in _text_runs(tensors, architecture.depth)),
        compensated=True,
        base_model=run.base_model or _hub_name(run.teacher.pretrained) or teacher.catalog.base_model,
        license=run.license or teacher.catalog.license,
        task=_task(run),
    )
    floats = getattr(torch, dtype or run.teacher.dtype)
    made = {name: each.rounded(floats) for name, each in tensors.items()}
    return ConvertedCheckpoint(folder, teacher.config, catalog, {**teacher.tensors, **made})


def _task(run: RunConfig) -> dict[str, Any] | None:
    """What a checkpoint says of its task; one that nobody here can judge is meant for a pipeline, and names none."""
    if not isinstance(run.family, Judged):
        return None
    return {"name": run.task, "sampler": run.sampler.model_dump(), **run.family.task_settings}


def opened(run: RunConfig, source: ConvertedCheckpoint, held: Callable[[str, Any], None] | None = None) -> Any:
    """Load all of it, in the dtype that the teacher computes in, on this process's device, frozen.

    Args:
        held: called with the prefix of each block and student, and with itself, as soon as it is whole
            (`CheckpointFolder.hold_everything`).
    """
    dtype, device = getattr(torch, run.teacher.dtype), join().device
    return registry.model_class(run.task).of_source(source, dtype, device, held)


def _hub_name(source: str | None) -> str | None:
    """The hub's name of a pretrained teacher; a folder of somebody's disk is nobody else's business."""
    return source if source and not Path(source).exists() and len(source) <= LONGEST_MODEL else None


def _made(run: RunConfig, spec: BlockSpec, prefix: str, tensors: Mapping[str, Any]) -> dict[str, list[int]]:
    """List the legal counts of each group of a block that some layer was made for, widest first."""

    def holds(group: str, count: int) -> bool:
        if spec.groups[group].is_rank:
            # A lower rank is a prefix of a higher one.
            return f"{prefix}.replacements.{spec.shared_factor(group)}.weight" in tensors
        # All outputs of a group come at the same counts.
        names = [spec.replacement(output.name, count) for output in spec.outputs_of(group)[:1]]
        weights = [f"{prefix}.replacements.{name}.{which}" for name in names for which in ("weight", "up")]
        return any(weight in tensors for weight in weights)

    return {
        group: [count for count in counts if count == counts[0] or holds(group, count)]
        for group, counts in legal_counts(run, spec).items()
    }


def _students(tensors: Iterable[str]) -> list[Interval]:
    """List the intervals of the students that tensors belong to."""
    paths = (name.split(".") for name in tensors)
    return sorted({Interval.of_key(path[1]) for path in paths if path[0] == "students"})


def _text_runs(tensors: Iterable[str], depth: int) -> list[Interval]:
    """List the text runs that all maps are there for."""
    paths = {tuple(name.split(".")[1:3]) for name in tensors if name.startswith("text_runs.")}
    lasts = {(int(first), int(name.removeprefix("z_"))) for first, name in paths if name.startswith("z_")}
    return sorted(Interval(f, n) for f, n in lasts if n == depth - 1 or (str(f), f"text_{n}") in paths)
