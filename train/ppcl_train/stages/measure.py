"""Sensitivities, by the runtime itself: each choice of a catalog alone; then the checkpoint."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import ppcl_rt
from ppcl_rt import Catalog, Interval, Option, Plan, Step, Width, Widths
from ppcl_rt.checkpoint.reader import Checkpoint
from ppcl_train.config.settings import RunConfig
from ppcl_train.data import calibration
from ppcl_train.engine.files import read_content, read_tensors, write_json
from ppcl_train.engine.log import Log
from ppcl_train.stages.draft import open_draft, write_draft
from ppcl_train.stages.teacher import load
from ppcl_train.stages.width import legal_counts

# Losses are kept above this: a choice that measures as free is still a choice, and the dense plan loses exactly 0.
_LEAST = 1e-9


class VelocityError:
    """The loss of a plan: ``sum |t (v' - v)|^2 / sum |t v|^2`` over calibration inputs, v the teacher's velocity.

    With ``v = (x - x_0) / t`` that is the error of the clean image that a velocity points at: high noise weighs most,
    as it does for the picture.
    """

    @torch.no_grad()
    def __init__(self, model: Any, run: RunConfig) -> None:
        self._model, bands = model, run.measure.bands
        self.edges = tuple(band / bands for band in range(bands + 1))
        self._given = list(calibration.batches(run, run.measure.samples, calibration.MEASURE))
        self._wanted = self._clean(model.catalog.dense)
        signal = [
            batch.banded(batch.x - clean, self.edges) for batch, clean in zip(self._given, self._wanted, strict=True)
        ]
        self._scale = float(torch.stack(signal).sum())

    def _clean(self, plan: Plan) -> list[torch.Tensor]:
        with self._model.at(plan=plan):
            return [batch.clean(self._model(**batch.call)[0]) for batch in self._given]

    @torch.no_grad()
    def of(self, plan: Plan) -> tuple[float, ...]:
        """The loss of one plan, in parts by the band of the timestep: they sum to it."""
        made = zip(self._given, self._clean(plan), self._wanted, strict=True)
        parts = torch.stack([given.banded(mine - wanted, self.edges) for given, mine, wanted in made]).sum(0)
        return tuple((parts / self._scale).tolist())

    def of_step(self, step: Step) -> tuple[float, ...]:
        """The loss of the teacher with one step changed, likewise."""
        catalog = self._model.catalog
        others = [(block, catalog.shape.width) for block in range(catalog.shape.depth) if block not in step.blocks]
        return self.of(Plan.of(catalog.fingerprint, catalog.shape.depth, others, [step]))


def _loss(parts: tuple[float, ...]) -> float:
    return max(sum(parts), _LEAST)


def sensitivities(model: Any, run: RunConfig, log: Callable[..., None]) -> Catalog:
    """Measure every choice of a model's catalog alone; returns the catalog with these losses."""
    catalog, error = model.catalog, VelocityError(model, run)
    full = catalog.shape.width

    def measured(blocks: Interval, student: bool, widths: Widths, base: tuple[float, ...]) -> Widths:
        """``widths`` with losses beyond ``base``, which the full width loses."""

        def alone(group: str, count: int) -> Option:
            parts = error.of_step(Step(blocks=blocks, width=full._replace(**{group: count}), student=student))
            more = tuple(max(part - least, 0.0) for part, least in zip(parts, base, strict=True))
            return Option(count, _loss(more), more)

        return Widths(
            **{
                group: (widths.of(group)[0], *(alone(group, option.count) for option in widths.of(group)[1:]))
                for group in Width._fields
            }
        )

    blocks, students = [], []
    for n, widths in enumerate(catalog.blocks):
        blocks.append(measured(Interval(n, n), False, widths, (0.0,) * run.measure.bands))
        log(block=n, of=catalog.shape.depth)
    for student in catalog.students:
        base = error.of_step(Step(blocks=student.interval, width=full, student=True))
        widths = measured(student.interval, True, student.widths, base)
        students.append(student.model_copy(update={"loss": _loss(base), "widths": widths, "bands": base}))
        log(student=str(student.interval), loss=_loss(base))
    runs = []
    kept = [(n, full) for n in range(catalog.shape.depth)]
    for still in catalog.text_runs:
        plan = Plan.of(catalog.fingerprint, catalog.shape.depth, kept, text_runs=[still.interval])
        parts = error.of(plan)
        runs.append(still.model_copy(update={"loss": _loss(parts), "bands": parts}))
        log(text_run=str(still.interval), loss=runs[-1].loss)
    return catalog.model_copy(
        update={
            "blocks": tuple(blocks),
            "students": tuple(students),
            "text_runs": tuple(runs),
            "edges": error.edges,
        }
    )


def measure(run: RunConfig, folder: Path) -> None:
    """Measure the recovered checkpoint; writes ``draft/`` in the storage dtype and ``sensitivities.json``."""
    tensors = read_tensors(folder / "width.safetensors") | read_tensors(folder / "recovered.safetensors")
    full = load(run, folder).catalog.shape.width
    write_draft(run, folder, tensors, legal_counts(run, full), run.storage)
    measured = sensitivities(open_draft(run, folder), run, Log(folder, "measure"))
    write_json(
        folder / "sensitivities.json",
        measured.model_dump(mode="json", include={"blocks", "students", "text_runs", "edges"}),
    )


def pack(run: RunConfig, folder: Path) -> None:
    """Put the measured catalog and the tensors together; writes ``checkpoint/``, with ``run.json`` in it.

    Students and text runs that no plan takes are left out (`used`).
    """
    log = Log(folder, "pack")
    source = Checkpoint(folder / "draft")
    assert source.catalog is not None, "a draft has a catalog"
    measured = read_content(folder / "sensitivities.json")
    catalog = Catalog.model_validate({**source.catalog.model_dump(mode="json"), **measured})
    students, runs = used(catalog)
    catalog = catalog.model_copy(
        update={
            "students": tuple(s for s in catalog.students if s.interval in students),
            "text_runs": tuple(r for r in catalog.text_runs if r.interval in runs),
        }
    )
    keys = {("students", i.key) for i in students} | {("text_runs", i.key) for i in runs}
    apart = ("students.", "text_runs.")
    names = [n for n in source.names if not n.startswith(apart) or tuple(n.split(".")[:2]) in keys]
    tensors = {name: source.read(name) for name in names}
    catalog = ppcl_rt.write_checkpoint(folder / "checkpoint", source.config, catalog, tensors)
    # Last: the checkpoint with it is the stage's output. It holds what made it and nothing else.
    write_json(folder / "checkpoint" / "run.json", {})
    size = sum(path.stat().st_size for path in (folder / "checkpoint").iterdir())
    log(students=" ".join(map(str, sorted(students))), text_runs=" ".join(map(str, sorted(runs))), megabytes=size / 1e6)


def planned(catalog: Catalog, spacing: float, least_ratio: float = 0.0) -> list[Plan]:
    """The plans that the planner takes: the smallest of at least ``least_ratio``, then at ratios ``spacing`` apart."""
    planner = ppcl_rt.Planner(catalog)
    smallest = max(math.ceil(planner.smallest * 1e4) / 1e4, least_ratio)
    above = (n * spacing for n in range(1, round(1 / spacing) + 1))
    return [planner.plan(ratio) for ratio in [smallest, *(ratio for ratio in above if smallest < ratio <= 1)]]


def used(catalog: Catalog) -> tuple[set[Interval], set[Interval]]:
    """Intervals of the students and of the text runs that plans take: the smallest, and at ratios 0.005 apart."""
    plans = planned(catalog, 0.005)
    students = {step.blocks for plan in plans for step in plan.steps if step.student}
    return students, {run for plan in plans for run in plan.text_runs}
