"""Sensitivities, by the runtime itself: each choice of a catalog alone; then the checkpoint."""

from __future__ import annotations

import math
from pathlib import Path

import torch

import ppcl_rt
from ppcl_rt import Catalog, Interval, Option, Plan, Step, Width, Widths
from ppcl_rt.checkpoint import Checkpoint
from ppcl_train import states
from ppcl_train.config import RunConfig
from ppcl_train.draft import open_draft, write_draft
from ppcl_train.runs import Log, read_content, read_tensors, write_json
from ppcl_train.teacher import load
from ppcl_train.width import legal_counts

# Losses are kept above this: a choice that measures as free is still a choice, and the dense plan loses exactly 0.
_LEAST = 1e-9


def sensitivities(run: RunConfig, folder: Path) -> None:
    """Measure every choice alone; writes ``draft/`` in the storage dtype and ``sensitivities.json``.

    The loss of a plan is ``sum |t (v' - v)|^2 / sum |t v|^2`` over calibration inputs, v the teacher's velocity: the
    error of the clean image that it points at, which weighs high noise as the judge does.
    """
    log = Log(folder, "measure")
    width = read_tensors(folder / "width.safetensors")
    students = read_tensors(folder / "tuned.safetensors")
    storage = getattr(torch, run.storage)
    full = load(run, folder).catalog.shape.width
    catalog = write_draft(run, folder, students, width, legal_counts(run, full), storage)
    model = open_draft(folder)
    given = list(states.batches(run, run.measure.samples, states.MEASURE))

    @torch.no_grad()
    def predictions(plan: Plan) -> list[torch.Tensor]:
        with model.at(plan=plan):
            return [model(**batch.call)[0] for batch in given]

    dense = predictions(catalog.dense)
    # With v = (x - x_0) / t, t (v' - v) is the difference of the predicted x_0.
    scale = sum(float((batch.x - out).square().sum()) for batch, out in zip(given, dense, strict=True))

    def loss(step: Step) -> float:
        others = [(b, full) for b in range(catalog.shape.depth) if b not in step.blocks]
        plan = Plan.of(catalog.fingerprint, catalog.shape.depth, others, [step])
        error = sum(float((a - b).square().sum()) for a, b in zip(predictions(plan), dense, strict=True))
        return max(error / scale, _LEAST)

    def measured(blocks: Interval, student: bool, widths: Widths, base: float) -> Widths:
        """``widths`` with losses beyond ``base``, which the full width loses; narrower never loses less than wider."""
        groups = {}
        for group in Width._fields:
            options, worst = [Option(getattr(full, group), 0.0)], _LEAST
            for count, _ in widths.of(group)[1:]:
                alone = loss(Step(blocks=blocks, width=full._replace(**{group: count}), student=student)) - base
                worst = max(worst, alone)
                options.append(Option(count, worst))
            groups[group] = tuple(options)
        return Widths(**groups)

    blocks, measured_students = [], []
    for n, widths in enumerate(catalog.blocks):
        blocks.append(measured(Interval(n, n), False, widths, 0.0).model_dump(mode="json"))
        log(block=n, narrowest=max(option[1] for group in blocks[-1].values() for option in group[-1:]))
    for student in catalog.students:
        base = loss(Step(blocks=student.interval, width=full, student=True))
        widths = measured(student.interval, True, student.widths, base)
        measured_students.append(student.model_copy(update={"loss": base, "widths": widths}).model_dump(mode="json"))
        log(student=str(student.interval), loss=base)
    write_json(folder / "sensitivities.json", {"blocks": blocks, "students": measured_students})


def pack(run: RunConfig, folder: Path) -> None:
    """Put the measured catalog and the tensors together; writes ``checkpoint/``, with ``run.json`` in it.

    Students that no plan takes are left out (`used_students`).
    """
    log = Log(folder, "pack")
    source = Checkpoint(folder / "draft")
    assert source.catalog is not None, "a draft has a catalog"
    measured = read_content(folder / "sensitivities.json")
    catalog = Catalog.model_validate({**source.catalog.model_dump(mode="json"), **measured})
    used = used_students(catalog)
    catalog = catalog.model_copy(update={"students": tuple(s for s in catalog.students if s.interval in used)})
    keys = {interval.key for interval in used}
    names = [name for name in source.names if not name.startswith("students.") or name.split(".")[1] in keys]
    tensors = {name: source.read(name) for name in names}
    catalog = ppcl_rt.write_checkpoint(folder / "checkpoint", source.config, catalog, tensors)
    # Last: the checkpoint with it is the stage's output. It holds what made it and nothing else.
    write_json(folder / "checkpoint" / "run.json", {})
    size = sum(path.stat().st_size for path in (folder / "checkpoint").iterdir())
    log(students=" ".join(str(s.interval) for s in catalog.students), megabytes=size / 1e6)


def used_students(catalog: Catalog) -> set[Interval]:
    """Intervals whose student some plan takes: the smallest plan, or one at a ratio in steps of 0.005."""
    planner = ppcl_rt.Planner(catalog)
    smallest = math.ceil(planner.smallest * 1e4) / 1e4
    ratios = [smallest, *(n / 200 for n in range(200, 0, -1) if n / 200 > smallest)]
    plans = [planner.plan(ratio) for ratio in ratios]
    return {step.blocks for plan in plans for step in plan.steps if step.student}
