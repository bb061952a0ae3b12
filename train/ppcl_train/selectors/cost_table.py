"""The cost table: what every interval of blocks would lose, from a short distillation each; then what to train fully.

A candidate is an interval; its cost is what `measure` will say of its student, had that been trained for `steps` steps.
Each candidate is on its own, so the table resumes at the last whole line of it, and a line depends on the seed alone.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import nn

from ppcl_rt import Catalog, Interval, Plan, Planner, Streams, Student, Widths
from ppcl_rt.planning.legal import Start
from ppcl_rt.planning.frozen import Frozen, read_json
from ppcl_train.config.settings import RunConfig
from ppcl_train.data import states
from ppcl_train.data.states import Inputs
from ppcl_train.engine.distributed import join
from ppcl_train.engine.files import Log, read_content, write_json
from ppcl_train.engine.loop import cosine
from ppcl_train.selectors import selection
from ppcl_train.selectors.selection import Selected
from ppcl_train.stages.students import matching_loss
from ppcl_train.stages.teacher import load

OUTPUT = "table.json"

# Seeds of what the costs are measured on, beside those that the short distillations see.
_CALIBRATION = states.PROBES + 1_000_000
# Losses are planned as at least this: a student that measures as free is still a choice.
_LEAST = 1e-9


class Candidate(Frozen):
    """A line of the table.

    Attributes:
        interval: the blocks that a student would replace.
        start: the block to copy the student from; of those tried, the one that lost least after the trial.
        loss: of the teacher's velocity with the short-trained student plugged in: `errors` over all bands.
        bands: its part in each band of the timestep; they sum to the loss.
        trials: start -> loss after the trial's steps, on the first calibration batch.
    """

    interval: Interval
    start: Start
    loss: float
    bands: tuple[float, ...]
    trials: dict[Start, float]


class Choice(Frozen):
    """What the planner takes at a ratio: parameters of the plan over the dense model's."""

    ratio: float
    loss: float
    intervals: tuple[Interval, ...]


class Table(Frozen):
    """Everything that was measured, and what was chosen with it.

    Attributes:
        edges: timesteps between which the bands lie, 0 and 1 included; 1 is noise.
        shares: of the teacher's own ``sum |t v|^2`` in each band. A candidate's part in a band over the band's share is
            its relative error there.
        candidates: in the order measured.
        choices: the exact planner's, ratio by ratio; empty until every candidate is measured.
    """

    edges: tuple[float, ...]
    shares: tuple[float, ...]
    candidates: tuple[Candidate, ...] = ()
    choices: tuple[Choice, ...] = ()


class Held(Protocol):
    """The teacher's streams on some batches, by batch and by block: in memory here, a disk does as well."""

    def context(self, batch: int) -> dict[str, Any]:
        """Keyword arguments that every block is called with."""

    def read(self, batch: int, block: int) -> Streams:
        """What comes into a block; what comes out of the last under its number + 1."""


class InMemory:
    """Batches traced once; see `Held`."""

    def __init__(self, model: Any, inputs: Iterable[Inputs]) -> None:
        self._traces = [states.trace(model, given) for given in inputs]

    def context(self, batch: int) -> dict[str, Any]:
        """Keyword arguments that every block is called with."""
        return self._traces[batch].context

    def read(self, batch: int, block: int) -> Streams:
        """What comes into a block; what comes out of the last under its number + 1."""
        return self._traces[batch].states[block]


class Calibration(NamedTuple):
    """Batches and what is held of them."""

    inputs: Sequence[Inputs]
    held: Held

    @classmethod
    def traced(cls, model: Any, inputs: Iterable[Inputs]) -> Calibration:
        """Trace batches and hold all of it in memory."""
        inputs = list(inputs)
        return cls(inputs, InMemory(model, inputs))

    def run(self, student: nn.Module, interval: Interval, batch: int) -> Streams:
        """What a student makes of the teacher's streams, in float32 whatever the teacher computes in."""
        before = Streams(*map(torch.Tensor.float, self.held.read(batch, interval.first)))
        return states.run_block(student, before, states.in_float32(self.held.context(batch)))


@torch.no_grad()
def run_from(model: Any, block: int, streams: Streams, given: Inputs) -> torch.Tensor:
    """What the model predicts if ``streams`` reach ``block``; what lies before it is not run.

    Args:
        block: where the streams enter; the depth for behind the last block.
    """
    shape = model.catalog.shape
    plan = Plan.of(model.catalog.fingerprint, shape.depth, [(b, shape.width) for b in range(block, shape.depth)])

    def enter_block(_: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        image, text = streams.image.to(kwargs["hidden_states"]), streams.text.to(kwargs["encoder_hidden_states"])
        return args, {**kwargs, "hidden_states": image, "encoder_hidden_states": text}

    def enter_head(_: nn.Module, args: tuple[torch.Tensor, ...], kwargs: dict[str, Any]) -> Any:
        return (streams.image.to(args[0]), *args[1:]), kwargs

    # `norm_out` follows the last block in every two-stream transformer of diffusers.
    module, enter = (
        (model.transformer_blocks[block], enter_block) if block < shape.depth else (model.norm_out, enter_head)
    )
    hook = module.register_forward_pre_hook(enter, with_kwargs=True)
    try:
        with model.at(plan=plan):
            prediction: torch.Tensor = model(**given.call)[0]
    finally:
        hook.remove()
    return prediction


class Costs:
    """Measures students, each alone in the teacher.

    The loss of one is ``sum |t (v' - v)|^2 / sum |t v|^2`` over calibration inputs, v the teacher's velocity: the error
    of the clean image that it points at, which weighs high noise as the judge does.

    Attributes:
        edges: of the bands of the timestep, 0 and 1 included.
        shares: of ``sum |t v|^2`` in each band.
    """

    def __init__(self, model: Any, calibration: Calibration, bands: int) -> None:
        self._model, self._calibration = model, calibration
        depth = model.catalog.shape.depth
        self.edges = tuple(band / bands for band in range(bands + 1))
        self._dense, self._scale = [], []
        for batch, given in enumerate(calibration.inputs):
            behind = calibration.held.read(batch, depth)
            self._dense.append(given.clean(run_from(model, depth, behind, given)))
            self._scale.append(given.banded(given.x - self._dense[-1], self.edges))
        scale = torch.stack(self._scale).sum(0)
        self.shares = tuple((scale / scale.sum()).tolist())

    def __call__(self, interval: Interval, student: nn.Module, batches: int | None = None) -> list[float]:
        """Loss of a student in each band, on the first ``batches``; they sum to its loss."""
        chosen = range(len(self._calibration.inputs))[:batches]
        error = torch.zeros(len(self.shares), dtype=torch.float64)
        for batch in chosen:
            given = self._calibration.inputs[batch]
            with torch.no_grad():
                out = self._calibration.run(student, interval, batch)
            clean = given.clean(run_from(self._model, interval.last + 1, out, given))
            error += given.banded(clean - self._dense[batch], self.edges)
        parts: list[float] = (error / sum(self._scale[batch].sum() for batch in chosen)).tolist()
        return parts


class _Attempt:
    """A student from one start, trained on the teacher's streams for some steps at a time."""

    def __init__(self, run: RunConfig, blocks: nn.ModuleList, selected: Selected) -> None:
        self.run, self.selected = run, selected
        self.student = selection.begin(blocks, selected).float()
        # Too few steps for weight decay to act.
        self.optimiser = torch.optim.AdamW(self.student.parameters(), betas=(0.9, 0.95), weight_decay=0.0)

    def train(self, calibration: Calibration, steps: range) -> None:
        """Take these steps.

        Raises:
            ValueError: the loss is not finite.
        """
        config, interval = self.run.table, self.selected.interval
        for step in steps:
            batch = step % len(calibration.inputs)
            for group in self.optimiser.param_groups:
                group["lr"] = config.lr * cosine(step, config.steps, config.warmup)
            out = calibration.run(self.student, interval, batch)
            target = Streams(*map(torch.Tensor.float, calibration.held.read(batch, interval.last + 1)))
            loss = matching_loss(out, target, calibration.inputs[batch].mask, self.run.magnitude)
            if not math.isfinite(loss.item()):
                raise ValueError(
                    f"the loss of candidate {interval} from its {self.selected.start} block is {loss.item()} at step "
                    f"{step}: lower table.lr; the candidates before it are kept"
                )
            loss.backward()
            self.optimiser.step()
            self.optimiser.zero_grad()


def measure(run: RunConfig, folder: Path) -> None:
    """Measure every candidate and choose; writes ``table.json``, a candidate at a time, then ``selected.json``.

    The starts of a candidate are each trained for ``trial_steps``; the one that then loses least on the first
    calibration batch is trained on and measured. A candidate so costs
    ``len(starts) * trial_steps + steps - trial_steps`` steps of one block. Candidates are trained one after the other:
    at 12 blocks x 96 a step of 64 samples runs at 60 GFLOP/s of one core, so doing several at once would gain nothing.

    Raises:
        ValueError: the model has too few blocks for any candidate, or a loss is not finite.
    """
    log, config = Log(folder, "select"), run.table
    model = load(run, folder).to(join().device)
    wanted = candidates(model.catalog.shape.depth, config.lengths)
    seen = Calibration.traced(
        model, (states.inputs(run, config.batch, states.PROBES + n) for n in range(config.batches))
    )
    unseen = Calibration.traced(model, states.batches(run, config.samples, _CALIBRATION))
    costs = Costs(model, unseen, config.bands)
    path = folder / OUTPUT
    table = read(folder) if path.exists() else Table(edges=costs.edges, shares=costs.shares)
    done = {candidate.interval for candidate in table.candidates}
    log(candidates=len(wanted), measured=len(done), batches=config.batches, samples=config.samples)
    for interval in wanted:
        if interval in done:
            continue
        line = measured(run, model, seen, costs, interval)
        table = table.model_copy(update={"candidates": (*table.candidates, line)})
        write_json(path, table.model_dump(mode="json"))
        log(candidate=str(interval), done=f"{len(table.candidates)}/{len(wanted)}", start=line.start, loss=line.loss)
    table = table.model_copy(
        update={"choices": choose(model.catalog, table.candidates, config.ratio_step, config.least_ratio)}
    )
    write_json(path, table.model_dump(mode="json"))
    starts = {candidate.interval: candidate.start for candidate in table.candidates}
    chosen = {interval for choice in table.choices for interval in choice.intervals}
    log(students=len(chosen), intervals=" ".join(map(str, sorted(chosen))))
    selection.write(folder, [Selected(interval, starts[interval]) for interval in chosen])


def read(folder: Path) -> Table:
    """Read ``table.json``, whole or as far as it has come.

    Raises:
        ValueError: no table.
    """
    path = folder / OUTPUT
    return read_json(
        Table, json.dumps(read_content(path)), f"{path} is no cost table: delete it and it is measured again"
    )


def candidates(depth: int, lengths: Iterable[int]) -> list[Interval]:
    """Every interval of these lengths, shortest first.

    Raises:
        ValueError: there is none.
    """
    found = [Interval(first, first + n - 1) for n in sorted(lengths) for first in range(depth - n + 1)]
    if not found:
        raise ValueError(f"no interval of table.lengths = {list(lengths)} fits into {depth} blocks: name shorter ones")
    return found


def measured(run: RunConfig, model: Any, seen: Calibration, costs: Costs, interval: Interval) -> Candidate:
    """Train a candidate's student for a short time from its best start, and measure it."""
    config = run.table
    trials: dict[Start, float] = {}
    best: _Attempt | None = None
    for start in config.starts:
        if start == "middle" and len(interval) == 2 and "first" in trials:
            # The middle of two blocks is the first.
            continue
        attempt = _Attempt(run, model.transformer_blocks, Selected(interval, start))
        attempt.train(seen, range(config.trial_steps))
        trials[start] = sum(costs(interval, attempt.student, batches=1))
        # Only the best so far is kept, so that two students and their optimisers are alive at most.
        if best is None or trials[start] < trials[best.selected.start]:
            best = attempt
    assert best is not None, "there is a start"
    best.train(seen, range(config.trial_steps, config.steps))
    bands = costs(interval, best.student)
    return Candidate(interval=interval, start=best.selected.start, loss=sum(bands), bands=tuple(bands), trials=trials)


def choose(dense: Catalog, found: Sequence[Candidate], ratio_step: float, least_ratio: float) -> tuple[Choice, ...]:
    """What the exact planner takes at every multiple of ``ratio_step``, down to ``least_ratio`` or the smallest plan.

    Depth alone: whatever runs, runs at full width.
    """
    only = Widths.only(dense.shape.width)
    students = [
        Student(interval=each.interval, start=each.start, loss=max(each.loss, _LEAST), widths=only) for each in found
    ]
    catalog = dense.model_copy(update={"students": tuple(students)})
    planner = Planner(catalog)
    # Rounded up, so that the ratio that is named can be had.
    smallest = max(math.ceil(planner.smallest * 1e4) / 1e4, least_ratio)
    ratios = [n * ratio_step for n in range(math.floor(1 / ratio_step), 0, -1)]
    choices: list[Choice] = []
    for ratio in [*(ratio for ratio in ratios if smallest < ratio < 1), smallest]:
        plan = planner.plan(ratio)
        intervals = tuple(step.blocks for step in plan.steps if step.student)
        if not choices or intervals != choices[-1].intervals:
            choices.append(Choice(ratio=catalog.ratio(plan), loss=catalog.loss(plan), intervals=intervals))
    return tuple(choices)
