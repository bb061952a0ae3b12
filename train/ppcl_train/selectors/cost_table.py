"""The cost table: the loss of a student for every interval of blocks, from a short distillation of each.

A candidate is an interval. Its loss estimates what the stage *measure* would measure of its student, had that student
been trained for `TableConfig.steps` steps. The exact planner then says which candidates are worth a full training.

Candidates do not depend on one another, and a line of the table depends on the seed alone: a run that was stopped
resumes after the last whole line.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ppcl_rt import Architecture, Catalog, Interval, LegalWidths, Planner, Streams, Student
from ppcl_rt.planning.frozen import Frozen, read_json
from ppcl_rt.planning.legal import Start
from ppcl_train.config.settings import RunConfig
from ppcl_train.data import calibration, streams
from ppcl_train.data.calibration import Inputs
from ppcl_train.data.teacher_file import load_teacher
from ppcl_train.engine.distributed import join
from ppcl_train.engine.files import read_content, write_json
from ppcl_train.engine.log import Log
from ppcl_train.engine.optimisers import adamw, cosine, schedule, take_step
from ppcl_train.losses.matching import matching_loss
from ppcl_train.losses.velocity_error import LEAST_LOSS, Target, band_edges
from ppcl_train.selectors import selection
from ppcl_train.selectors.selection import Selected

OUTPUT = "table.json"

# Seeds of the batches that losses are measured on; the short distillations see others.
_CALIBRATION = calibration.PROBES + 1_000_000


class Candidate(Frozen):
    """A line of the table.

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


class TracedBatches:
    """Batches, with the teacher's streams between all blocks, held in memory.

    `StreamCache` offers the same `context` and `read` from a disk, for streams that do not fit into memory.

    Attributes:
        inputs: the batches.
    """

    def __init__(self, model: Any, inputs: Iterable[Inputs]) -> None:
        self.inputs: Sequence[Inputs] = list(inputs)
        self._traces = [streams.trace(model, batch) for batch in self.inputs]

    def context(self, number: int) -> dict[str, Any]:
        """Return the keyword arguments that every block was called with on a batch."""
        return self._traces[number].context

    def read(self, number: int, block: int) -> Streams:
        """Return the streams that enter a block on a batch; those after the last block lie under its number + 1."""
        return self._traces[number].streams[block]

    def run(self, student: nn.Module, interval: Interval, number: int) -> Streams:
        """Run a student on the teacher's streams of a batch, in float32 whatever the teacher computes in."""
        before = Streams(*map(torch.Tensor.float, self.read(number, interval.first)))
        return streams.run_block(student, before, streams.in_float32(self.context(number)))


@torch.no_grad()
def run_from(model: Any, block: int, entering: Streams, batch: Inputs) -> torch.Tensor:
    """Compute what the model puts out if ``entering`` enter ``block``; the blocks before it are not run.

    Args:
        block: where the streams enter; the depth for after the last block.
    """
    catalog, depth = model.catalog, model.catalog.architecture.depth
    plan = catalog.compose([(n, catalog.spec(n).full) for n in range(block, depth)])

    def enter_block(_: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        image, text = entering.image.to(kwargs["hidden_states"]), entering.text.to(kwargs["encoder_hidden_states"])
        return args, {**kwargs, "hidden_states": image, "encoder_hidden_states": text}

    def enter_after(_: nn.Module, args: tuple[torch.Tensor, ...], kwargs: dict[str, Any]) -> Any:
        return (entering.image.to(args[0]), *args[1:]), kwargs

    module, enter = (
        (model.blocks()[block], enter_block)
        if block < depth
        else (model.get_submodule(model.after_blocks), enter_after)
    )
    hook = module.register_forward_pre_hook(enter, with_kwargs=True)
    try:
        with model.at(plan=plan):
            output: torch.Tensor = model(**batch.call)[0]
    finally:
        hook.remove()
    return output


class StudentLoss:
    """Measures the loss of students, each alone in the teacher: the velocity error over some batches.

    Only the student and the blocks after its interval are run.

    Attributes:
        edges: of the bands of the timestep (`band_edges`).
        shares: each band's share of the teacher's signal.
    """

    def __init__(self, model: Any, traced: TracedBatches, bands: int) -> None:
        self._model, self._traced = model, traced
        depth = model.catalog.architecture.depth
        self.edges = band_edges(bands)
        self._targets = [
            Target.of(batch, run_from(model, depth, traced.read(number, depth), batch))
            for number, batch in enumerate(traced.inputs)
        ]
        self._signals = [target.signal_by_band(self.edges) for target in self._targets]
        signal = torch.stack(self._signals).sum(0)
        self.shares = tuple((signal / signal.sum()).tolist())

    def by_band(self, interval: Interval, student: nn.Module, batches: int | None = None) -> list[float]:
        """Measure a student on the first ``batches``, or on all; returns its loss in each band. The parts sum to it."""
        numbers = range(len(self._targets))[:batches]
        error = torch.zeros(len(self.shares), dtype=torch.float64)
        for number in numbers:
            target = self._targets[number]
            with torch.no_grad():
                out = self._traced.run(student, interval, number)
            output = run_from(self._model, interval.last + 1, out, target.inputs)
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

    def train(self, traced: TracedBatches, steps: range) -> None:
        """Take these steps, which follow those taken before.

        Raises:
            ValueError: the loss is not finite.
        """
        interval = self.selected.interval
        for step in steps:
            number = step % len(traced.inputs)
            out = traced.run(self.student, interval, number)
            target = Streams(*map(torch.Tensor.float, traced.read(number, interval.last + 1)))
            loss = matching_loss(out, target, traced.inputs[number].mask, self.run.magnitude)
            if not math.isfinite(loss.item()):
                raise ValueError(
                    f"the loss of candidate {interval} from its {self.selected.start} block is {loss.item()} at step "
                    f"{step}: lower table.lr; the candidates before it are kept"
                )
            loss.backward()
            take_step([self.optimiser])
            self.schedule.step()


def select(run: RunConfig, folder: Path) -> None:
    """Measure every candidate and choose; writes ``table.json``, a candidate at a time, then ``selected.json``.

    A candidate costs ``len(starts) * trial_steps + steps - trial_steps`` steps of one block (`measure_candidate`).
    Candidates are trained one after the other: at 12 blocks x 96 a step of 64 samples runs at 60 GFLOP/s of one core,
    so training several at once would gain nothing.

    Raises:
        ValueError: the model has too few blocks for any candidate, or a loss is not finite.
    """
    log, config = Log(folder, "select"), run.table
    model = load_teacher(run, folder).to(join().device)
    intervals = candidate_intervals(model.catalog.architecture, config.lengths)
    trained_on = TracedBatches(
        model,
        (calibration.inputs(run, config.batch, calibration.PROBES + n, teacher=model) for n in range(config.batches)),
    )
    measured_on = TracedBatches(model, calibration.measured(run, config.samples, _CALIBRATION, teacher=model))
    loss = StudentLoss(model, measured_on, config.bands)
    path = folder / OUTPUT
    table = read(folder) if path.exists() else Table(edges=loss.edges, shares=loss.shares)
    done = {candidate.interval for candidate in table.candidates}
    log(candidates=len(intervals), measured=len(done), batches=config.batches, samples=config.samples)
    for interval in intervals:
        if interval in done:
            continue
        line = measure_candidate(run, model, trained_on, loss, interval)
        table = table.model_copy(update={"candidates": (*table.candidates, line)})
        write_json(path, table.model_dump(mode="json"))
        position = f"{len(table.candidates)}/{len(intervals)}"
        log(candidate=str(interval), done=position, start=line.start, loss=line.loss)
    choices = choices_by_ratio(model.catalog, table.candidates, config.ratio_step, config.least_ratio)
    write_json(path, table.model_copy(update={"choices": choices}).model_dump(mode="json"))
    starts = {candidate.interval: candidate.start for candidate in table.candidates}
    chosen = {interval for choice in choices for interval in choice.intervals}
    log(students=len(chosen), intervals=" ".join(map(str, sorted(chosen))))
    selection.write(folder, [Selected(interval, starts[interval]) for interval in chosen])


def read(folder: Path) -> Table:
    """Read ``table.json``, complete or not.

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
    run: RunConfig, model: Any, trained_on: TracedBatches, loss: StudentLoss, interval: Interval
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
        trial = _Trial(run, model.blocks(), Selected(interval, start))
        trial.train(trained_on, range(config.trial_steps))
        trials[start] = sum(loss.by_band(interval, trial.student, batches=1))
        # Only the best so far is kept, so that at most two students and their optimisers are in memory.
        if best is None or trials[start] < trials[best.selected.start]:
            best = trial
    assert best is not None, "there is a start"
    best.train(trained_on, range(config.trial_steps, config.steps))
    bands = loss.by_band(interval, best.student)
    return Candidate(interval=interval, start=best.selected.start, loss=sum(bands), bands=tuple(bands), trials=trials)


def choices_by_ratio(
    dense: Catalog, candidates: Sequence[Candidate], ratio_step: float, least_ratio: float
) -> tuple[Choice, ...]:
    """Plan at every multiple of ``ratio_step`` below 1, down to ``least_ratio`` or the smallest plan.

    Depth is chosen alone: all blocks and students run at full width.

    Returns:
        From the largest ratio to the smallest, each choice that differs from the one before it.
    """
    students = [
        Student(
            interval=each.interval,
            start=each.start,
            loss=max(each.loss, LEAST_LOSS),
            widths=LegalWidths.only(dense.spec(each.interval.first).full),
        )
        for each in candidates
    ]
    catalog = dense.model_copy(update={"students": tuple(students)})
    choices: list[Choice] = []
    for plan in reversed(Planner(catalog).plans(ratio_step, least_ratio)):
        intervals = tuple(planned.interval for planned in plan.blocks if planned.student)
        if plan != catalog.dense and (not choices or intervals != choices[-1].intervals):
            choices.append(Choice(ratio=catalog.ratio(plan), loss=catalog.loss(plan), intervals=intervals))
    return tuple(choices)
