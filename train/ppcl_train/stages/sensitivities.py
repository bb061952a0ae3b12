"""The loss and the sketch of each choice of a catalog alone, measured by the runtime itself.

Each choice is a job of a queue on disk (`ppcl_train.engine.queue`), named by a digest of the tensors that it runs, of
the teacher, of the batches and of what is made of them. What was measured in an earlier stage and still holds is read.

Blocks before a choice are not run for it: streams of the teacher are kept at its first block, and moved on from block
to block (`ppcl_train.data.prefix`). Over all choices this halves the work. The results are those of whole forwards bit
for bit on a CPU, where a block computes the same whether or not others ran before it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ppcl_rt import Catalog, Interval, LegalCount, LegalWidths, Plan, PlannedBlock
from ppcl_rt.planning.sketch import TENSORS, Choice, choices
from ppcl_train.config.settings import RunConfig
from ppcl_train.data.prefix import HeldStreams
from ppcl_train.engine import digests
from ppcl_train.engine.queue import Job, Queue, Result
from ppcl_train.losses.sketching import sketch_for
from ppcl_train.losses.velocity_error import LEAST_LOSS, Target, VelocityError

# Rises when a result of the same tensors, batches and settings would be another.
_VERSION = 1
_BANDS, _SKETCHES = "bands", "sketches"


def entry(choice: Choice) -> int:
    """The block before which a choice runs the teacher: its first; of a text run the one before, which is run too."""
    # The first block of a text run keeps what it reads of the text before it is called (`run_from`).
    return max(0, choice.interval.first - (choice.kind == "text_run"))


def plan_with(catalog: Catalog, choice: Choice) -> Plan:
    """The dense plan with one choice made."""
    dense = [(n, catalog.spec(n).full) for n in range(catalog.architecture.depth)]
    if choice.kind == "text_run":
        return catalog.compose(dense, text_runs=[choice.interval])
    full = catalog.spec(choice.interval.first).full
    width = full.replace(**{choice.group: choice.units}) if choice.group else full
    planned = PlannedBlock(interval=choice.interval, width=width, student=choice.kind == "student")
    return catalog.compose([each for each in dense if each[0] not in choice.interval], [planned])


def _of_block(block: Any) -> str:
    return digests.of_module(block, without=".replacements.")


def _of_teacher(model: Any) -> str:
    outside = (
        child
        for name, child in sorted(model.named_children())
        if name not in ("students", "text_runs", *model.block_lists)
    )
    # What lies in no module: tokens that stand for padding.
    loose = digests.of_tensors(tensor for name, tensor in model.named_parameters() if "." not in name)
    return digests.of_values(
        [digests.of_module(child) for child in outside], list(map(_of_block, model.blocks())), loose
    )


def _of_measuring(run: RunConfig, error: VelocityError) -> str:
    """What is measured on, and what is made of predictions."""
    # Not the settings that led to the batches: these say it all.
    batches = [(batch.x, batch.t, batch.call, batch.shares) for batch in error.batches]
    made_of = [run.task, run.family.predicts, run.sampler.guidance, run.teacher.dtype, error.edges]
    return digests.of_values(_VERSION, digests.of_tree(batches), made_of)


class _Measuring:
    """Measures choices of a model, those of one block next to each other."""

    def __init__(self, model: Any, run: RunConfig) -> None:
        self._model, self._run, self.catalog = model, run, model.catalog
        self.choices: list[Choice] = list(choices(self.catalog))
        self.sketch = sketch_for(len(self.choices), run.seed, run.measure.bands)
        self.error = VelocityError(model, run, self.sketch)
        self._students: dict[Interval, str] = {}
        # The student whose narrower counts were measured last, and what it predicts at full width.
        self._student: tuple[Interval, Sequence[Target]] | None = None

    @cached_property
    def _held(self) -> HeldStreams:
        return HeldStreams(self._model, self.error.batches)

    def jobs(self) -> dict[Job, Choice]:
        """The job of each choice, in the order in which they are taken: by the block that they begin at."""
        measuring, sketch = _of_measuring(self._run, self.error), self.sketch.model_dump(mode="json")
        shared, found = digests.of_values(_of_teacher(self._model), measuring, sketch), {}
        for choice in sorted(self.choices, key=entry):
            own = digests.of_values(shared, self._own_digests(choice), choice.kind, *self._what(choice))
            group = f"{choice.kind}-{choice.interval.first if choice.kind == 'text_run' else choice.interval.key}"
            found[Job("-".join([choice.kind, *self._what(choice), own[:16]]), group)] = choice
        return found

    @staticmethod
    def _what(choice: Choice) -> list[str]:
        return [choice.interval.key, *([choice.group, str(choice.units)] if choice.group else [])]

    def _own_digests(self, choice: Choice) -> list[str]:
        """What the result of one choice depends on besides: the tensors that only the choice runs."""
        if choice.kind == "text_run":
            return [digests.of_module(self._model.text_runs[choice.interval.key])]
        student, spec = choice.kind == "student", self.catalog.spec(choice.interval.first)
        planned = PlannedBlock(interval=choice.interval, width=spec.full, student=student)
        block = self._model.home(planned).block
        if student and choice.interval not in self._students:
            self._students[choice.interval] = _of_block(block)
        found = [self._students[choice.interval]] if student else []
        if not choice.group:
            return found
        if spec.groups[choice.group].is_rank:
            names = [spec.shared_factor(choice.group), *(part.name for part in spec.factored_by(choice.group))]
        else:
            names = [spec.replacement(output.name, choice.units) for output in spec.outputs_of(choice.group)]
        # Without one, the block's own layers run up to the count.
        held = [block.replacements[name] for name in names if name in block.replacements]
        return found + [digests.of_module(layer) for layer in held]

    def measure(self, choice: Choice) -> Result:
        """Measure a choice; a narrower count of a student against the student at full width."""
        block = entry(choice)
        self._held.hold(*([block] if block else []))
        against = self._of_student(choice.interval, block) if choice.kind == "student" and choice.group else ()
        change = self.error.change(plan_with(self.catalog, choice), against, self._held, block)
        rows = torch.from_numpy(change.sketches.astype(np.float16))
        return Result({_BANDS: torch.tensor(change.bands, dtype=torch.float64), _SKETCHES: rows}, {})

    def _of_student(self, interval: Interval, block: int) -> Sequence[Target]:
        if self._student is None or self._student[0] != interval:
            self._student = None
            whole = plan_with(self.catalog, Choice("student", interval))
            self._student = interval, self.error.predictions(whole, self._held, block)
        return self._student[1]


def sensitivities(
    model: Any, run: RunConfig, folder: Path, log: Callable[..., None]
) -> tuple[Catalog, dict[str, torch.Tensor]]:
    """Measure every choice of a model's catalog alone; every process of a world calls this, and others may.

    Args:
        model: everything that plans need is resident; its dense plan is the teacher. Of the same bits in all processes.
        folder: the run folder.

    Returns:
        The catalog with these losses, and the sketches by name, in all processes.
    """
    measuring = _Measuring(model, run)
    jobs = measuring.jobs()
    results = Queue(folder, list(jobs)).work(lambda job: measuring.measure(jobs[job]), log)
    found = dict(zip(jobs.values(), results, strict=True))
    rows = [found[choice].tensors[_SKETCHES] for choice in measuring.choices]
    stacked = torch.stack(rows) if rows else torch.zeros(0, len(TENSORS), measuring.sketch.size, dtype=torch.float16)
    sketches = {name: stacked[:, n].contiguous() for n, name in enumerate(TENSORS)}
    bands = {choice: tuple(result.tensors[_BANDS].tolist()) for choice, result in found.items()}
    catalog = with_losses(model.catalog, bands)
    catalog = catalog.model_copy(update={"edges": measuring.error.edges, "sketch": measuring.sketch})
    return catalog, sketches


def with_losses(catalog: Catalog, bands: Mapping[Choice, tuple[float, ...]]) -> Catalog:
    """A catalog with the losses of all its choices, given the parts of each in the bands of the timestep."""

    def loss(choice: Choice) -> float:
        return max(sum(bands[choice]), LEAST_LOSS)

    def narrower(whole: Choice, widths: LegalWidths) -> LegalWidths:
        counts = {}
        for group in widths.groups:
            full, *rest = widths.of(group)
            made = [(count.units, whole._replace(group=group, units=count.units)) for count in rest]
            counts[group] = (full, *(LegalCount(units, loss(choice), bands[choice]) for units, choice in made))
        return LegalWidths(counts)

    students, runs = [], []
    for student in catalog.students:
        whole = Choice("student", student.interval)
        losses = {"loss": loss(whole), "bands": bands[whole], "widths": narrower(whole, student.widths)}
        students.append(student.model_copy(update=losses))
    for run in catalog.text_runs:
        whole = Choice("text_run", run.interval)
        runs.append(run.model_copy(update={"loss": loss(whole), "bands": bands[whole]}))
    blocks = (narrower(Choice("block", Interval(n, n)), widths) for n, widths in enumerate(catalog.blocks))
    return catalog.model_copy(update={"blocks": tuple(blocks), "students": tuple(students), "text_runs": tuple(runs)})


def losses_of_plans(
    model: Any, run: RunConfig, folder: Path, plans: Sequence[Plan], log: Callable[..., None]
) -> dict[Plan, tuple[float, ...]]:
    """Measure plans as a whole, each a job; every process of a world calls this, and others may.

    Args:
        model, folder: as of `sensitivities`.

    Returns:
        The part of each plan's loss in each band of the timestep, in the order of the plans.
    """
    error = VelocityError(model, run)
    # All tensors: a plan may run any of them.
    shared = digests.of_values(_of_measuring(run, error), digests.of_module(model))

    def job(plan: Plan) -> Job:
        own = digests.of_values(shared, plan.model_dump(mode="json", include={"blocks", "text_runs"}))[:16]
        return Job(f"plan-{own}", f"plan-{own}-alone")

    jobs = {job(plan): plan for plan in plans}

    def measure(job: Job) -> Result:
        return Result({_BANDS: torch.tensor(error.of(jobs[job]), dtype=torch.float64)}, {})

    results = Queue(folder, list(jobs)).work(measure, log)
    return {plan: tuple(result.tensors[_BANDS].tolist()) for plan, result in zip(jobs.values(), results, strict=True)}
