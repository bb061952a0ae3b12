"""The cost table: the loss of a student for every interval of blocks, from a short distillation of each.

A candidate is an interval. Its loss estimates what the stage *measure* would measure of its student, had that student
been trained for `TableConfig.steps` steps. The exact planner then says which candidates are worth a full training.

Candidates do not depend on one another: each is a job of a queue on disk (`ppcl_train.engine.queue`), which any process
takes. A process holds the teacher's streams at both ends of the candidate that it is at, and no others: for 16 samples
of 4,300 tokens of width 3,072 in bfloat16, 0.8 GB on the host.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ppcl_rt import Architecture, Catalog, Interval, LegalWidths, Planner, Streams, Student
from ppcl_rt.planning.frozen import Frozen, read_json
from ppcl_rt.planning.legal import Start
from ppcl_train.config.settings import RunConfig
from ppcl_train.data import calibration, streams
from ppcl_train.data.prefix import HeldStreams, run_from
from ppcl_train.data.seeds import Seed, Stage
from ppcl_train.data.teacher_file import load_teacher
from ppcl_train.engine import digests
from ppcl_train.engine.distributed import join
from ppcl_train.engine.files import read_content, write_json
from ppcl_train.engine.log import Log
from ppcl_train.engine.optimisers import adamw, autocast, cosine, free_optimisers, schedule, take_step
from ppcl_train.engine.queue import Job, Queue, Result
from ppcl_train.losses.matching import matching_loss
from ppcl_train.losses.velocity_error import LEAST_LOSS, Target, band_edges
from ppcl_train.selectors import selection
from ppcl_train.selectors.selection import Selected

OUTPUT = "table.json"
# Rises when a result of the same teacher, batches and settings would be another.
_VERSION = 1

# Seeds of the batches that losses are measured on; the short distillations see others.
_CALIBRATION = Seed(Stage.TABLE)


class Candidate(Frozen):
    """A candidate that was measured.

    Attributes:
        interval: the blocks that a student would replace.
        start: the block that the student is copied from: the start whose student lost least after the trial.
        loss: velocity error of the teacher with the briefly trained student in place of the interval.
        bands: the part of the loss in each band of the timestep; the parts sum to the loss.
        trials: start -> loss after the trial's steps, on the first calibration batch.
    """

    interval: Interval
    start: Start
    loss: float
    bands: tuple[float, ...]
    trials: dict[Start, float]


class Choice(Frozen):
    """What the planner chooses at a ratio, which is that of the plan that it found."""

    ratio: float
    loss: float
    intervals: tuple[Interval, ...]


class Table(Frozen):
    """Everything that was measured, and what was chosen with it.

    Attributes:
        edges: timesteps between which the bands lie, 0 and 1 included; 1 is noise.
        shares: each band's share of the teacher's own signal ``sum |t v|^2``. A candidate's part in a band over the
            band's share is its relative error there.
        candidates: in the order in which they were measured.
        choices: the exact planner's, ratio by ratio; empty until every candidate is measured.
    """

    edges: tuple[float, ...]
    shares: tuple[float, ...]
    candidates: tuple[Candidate, ...] = ()
    choices: tuple[Choice, ...] = ()


def run_student(held: HeldStreams, student: nn.Module, interval: Interval, number: int) -> Streams:
    """Run a student, which is in float32, on the teacher's streams of a batch; its first block is held.

    It computes in float32 if the teacher does, else under autocast to bfloat16.
    """
    before, context = held.read(number, interval.first), held.context(number)
    if before.image.dtype == torch.float32:
        return streams.run_block(student, before, context)
    with autocast("bf16", before.image.device.type, keeps_casts=False):
        return streams.run_block(student, before, context)


class StudentLoss:
    """Measures the loss of students, each alone in the teacher: the velocity error over some batches.

    Only the student and the blocks after its interval are run.

    Attributes:
        edges: of the bands of the timestep (`band_edges`).
        shares: each band's share of the teacher's signal.
    """

    def __init__(self, held: HeldStreams, bands: int) -> None:
        self._held, self._model = held, held.model
        dense = self._model.catalog.dense
        self.edges = band_edges(bands)
        self._targets = [Target.of(batch, run_from(self._model, dense, 0, None, batch)) for batch in held.batches]
        self._signals = [target.signal_by_band(self.edges) for target in self._targets]
        signal = torch.stack(self._signals).sum(0)
        self.shares = tuple((signal / signal.sum()).tolist())

    def by_band(self, interval: Interval, student: nn.Module, batches: int | None = None) -> list[float]:
        """Measure a student on the first ``batches``, or on all; returns its loss in each band. The parts sum to it."""
        numbers, after = range(len(self._targets))[:batches], interval.last + 1
        self._held.hold(interval.first)
        error = torch.zeros(len(self.shares), dtype=torch.float64)
        for number in numbers:
            target = self._targets[number]
            with torch.no_grad():
                out = run_student(self._held, student, interval, number)
            output = run_from(self._model, self._model.catalog.dense, after, out, target.inputs)
            error += target.error_by_band(output, self.edges)
        parts: list[float] = (error / sum(self._signals[number].sum() for number in numbers)).tolist()
        return parts


class _Trial:
    """A student from one start, with its optimiser: trained on the teacher's streams for some steps at a time."""

    def __init__(self, run: RunConfig, blocks: Sequence[nn.Module], selected: Selected) -> None:
        self.run, self.selected = run, selected
        self.student = selection.new_student(blocks, selected)
        # No weight decay: in so few steps it would change nothing.
        self.optimiser, config = adamw(self.student.parameters(), lr=run.table.lr), run.table
        self.schedule = schedule(self.optimiser, lambda step: cosine(step, config.steps, config.warmup))

    def train(self, held: HeldStreams, steps: range) -> None:
        """Take these steps, which follow those taken before, on the streams at both ends of the interval.

        Raises:
            ValueError: the loss is not finite.
        """
        interval = self.selected.interval
        held.hold(interval.first, interval.last + 1)
        for step in steps:
            number = step % len(held.batches)
            out, after = run_student(held, self.student, interval, number), held.read(number, interval.last + 1)
            loss = matching_loss(out, after, held.batches[number].mask, self.run.magnitude)
            if not math.isfinite(loss.item()):
                raise ValueError(
                    f"the loss of candidate {interval} from its {self.selected.start} block is {loss.item()} at step "
                    f"{step}: lower table.lr; the candidates before it are kept"
                )
            loss.backward()
            take_step([self.optimiser])
            self.schedule.step()


def select(run: RunConfig, folder: Path, others: Catalog) -> None:
    """Measure every candidate and choose; writes ``table.json``, then ``selected.json``.

    Only students that some plan takes are chosen: each is trained at length, and closed forms save most of the same for
    less.

    A candidate costs ``len(starts) * trial_steps + steps - trial_steps`` steps of one block (`measure_candidate`).
    Candidates are trained one after the other: at 12 blocks x 96 a step of 64 samples runs at 60 GFLOP/s of one core,
    so training several at once would gain nothing.

    Every process of a world calls this.

    Args:
        others: the measured catalog of all other choices, which plans may take instead.

    Raises:
        ValueError: the model has too few blocks for any candidate, or a loss is not finite.
    """
    log, config = Log(folder, "select"), run.table
    table = measured(run, folder, log)
    if not join().is_main:
        return
    if config.depth_first:
        others = _of_whole_blocks(others)
    choices = choices_by_ratio(others, table.candidates, config.ratio_step, config.least_ratio)
    write_json(folder / OUTPUT, table.model_copy(update={"choices": choices}).model_dump(mode="json"))
    starts = {candidate.interval: candidate.start for candidate in table.candidates}
    # Those that most plans take come first.
    taken = Counter(interval for choice in choices for interval in choice.intervals)
    chosen = [interval for interval, _ in taken.most_common(config.most_students)]
    log(students=len(chosen), intervals=" ".join(map(str, sorted(chosen))))
    selection.write(folder, [Selected(interval, starts[interval]) for interval in chosen])


def _of_whole_blocks(catalog: Catalog) -> Catalog:
    whole = tuple(LegalWidths.only(widths.full) for widths in catalog.blocks)
    return catalog.model_copy(update={"blocks": whole, "text_runs": ()})


def measured(run: RunConfig, folder: Path, log: Callable[..., None]) -> Table:
    """Measure every candidate, together with all processes that call this.

    Raises:
        ValueError: as `select`.
    """
    config = run.table
    model = load_teacher(run, folder).to(join().device)
    if run.teacher.held_otherwise:
        log(teacher_weights="exact", because="candidates are copies of its blocks")
    intervals = candidate_intervals(model.catalog.architecture, config.lengths)
    batches = (
        calibration.inputs(run, config.batch, calibration.PROBES + n, teacher=model) for n in range(config.batches)
    )
    trained_on = HeldStreams(model, batches)
    measured_on = HeldStreams(model, calibration.measured(run, config.samples, _CALIBRATION, teacher=model))
    loss = StudentLoss(measured_on, config.bands)
    shared = _shared_digest(run, model, trained_on, measured_on)

    def job(interval: Interval) -> Job:
        digest = digests.of_values(shared, interval.key)[:16]
        return Job(f"candidate-{interval.key}-{digest}", f"first-{interval.first}")

    # By their first block, so that the streams that a process holds move on from block to block.
    jobs = {job(interval): interval for interval in sorted(intervals)}

    def measure(job: Job) -> Result:
        line = measure_candidate(run, model, trained_on, loss, jobs[job])
        log(candidate=str(line.interval), start=line.start, loss=line.loss)
        return Result({}, {"line": line.model_dump(mode="json")})

    results = Queue(folder, list(jobs)).work(measure, log)
    found = {interval: result.note["line"] for interval, result in zip(jobs.values(), results, strict=True)}
    lines = tuple(Candidate.model_validate(found[interval]) for interval in intervals)
    return Table(edges=loss.edges, shares=loss.shares, candidates=lines)


def _shared_digest(run: RunConfig, model: Any, *held: HeldStreams) -> str:
    """What all candidates depend on: the teacher, the batches, and the settings of training and of measuring."""
    batches = [(batch.x, batch.t, batch.call, batch.shares) for each in held for batch in each.batches]
    config = run.table.model_dump(
        mode="json", exclude={"lengths", "ratio_step", "least_ratio", "most_students", "depth_first"}
    )
    settings = [_VERSION, run.task, run.sampler.guidance, run.magnitude, config]
    return digests.of_values(settings, digests.of_module(model), digests.of_tree(batches))


def read(folder: Path) -> Table:
    """Read ``table.json``.

    Raises:
        ValueError: it is not a cost table.
    """
    path = folder / OUTPUT
    return read_json(
        Table, json.dumps(read_content(path)), f"{path} is no cost table: delete it and it is measured again"
    )


def candidate_intervals(architecture: Architecture, lengths: Iterable[int]) -> list[Interval]:
    """List every interval of these lengths that lies in one list of blocks, shortest first.

    Raises:
        ValueError: there is none.
    """
    depth = architecture.depth
    possible = (Interval(first, first + n - 1) for n in sorted(lengths) for first in range(depth - n + 1))
    found = [interval for interval in possible if architecture.one_kind(interval)]
    if not found:
        raise ValueError(f"no interval of table.lengths = {list(lengths)} fits into {depth} blocks: name shorter ones")
    return found


def measure_candidate(
    run: RunConfig, model: Any, trained_on: HeldStreams, loss: StudentLoss, interval: Interval
) -> Candidate:
    """Train a candidate's student briefly from its best start, and measure it.

    Each start is trained for ``trial_steps``. The start whose student then loses least on the first calibration batch
    is trained on to ``steps`` and measured.
    """
    config = run.table
    trials: dict[Start, float] = {}
    best: _Trial | None = None
    for start in config.starts:
        if start == "middle" and len(interval) == 2 and "first" in trials:
            # The middle of two blocks is the first.
            continue
        free_optimisers()
        trial = _Trial(run, model.blocks(), Selected(interval, start))
        trial.train(trained_on, range(config.trial_steps))
        trials[start] = sum(loss.by_band(interval, trial.student, batches=1))
        # Only the best so far is kept, so that at most two students and their optimisers are in memory.
        if best is None or trials[start] < trials[best.selected.start]:
            best = trial
        del trial
    assert best is not None, "there is a start"
    best.train(trained_on, range(config.trial_steps, config.steps))
    bands = loss.by_band(interval, best.student)
    return Candidate(interval=interval, start=best.selected.start, loss=sum(bands), bands=tuple(bands), trials=trials)


def choices_by_ratio(
    others: Catalog, candidates: Sequence[Candidate], ratio_step: float, least_ratio: float
) -> tuple[Choice, ...]:
    """Plan at every multiple of ``ratio_step`` below 1, down to ``least_ratio`` or the smallest plan.

    A student that is narrower is taken to lose as much more as the first block of its interval would.

    Args:
        others: the measured catalog of all choices but students.

    Returns:
        From the largest ratio to the smallest, each choice that differs from the one before it.
    """
    students = [
        Student(
            interval=each.interval,
            start=each.start,
            loss=max(each.loss, LEAST_LOSS),
            widths=others.blocks[each.interval.first],
        )
        for each in candidates
    ]
    catalog = others.model_copy(update={"students": tuple(students)})
    choices: list[Choice] = []
    for plan in reversed(Planner(catalog).plans(ratio_step, least_ratio)):
        intervals = tuple(planned.interval for planned in plan.blocks if planned.student)
        if intervals and (not choices or intervals != choices[-1].intervals):
            choices.append(Choice(ratio=catalog.ratio(plan), loss=catalog.loss(plan), intervals=intervals))
    return tuple(choices)
