"""One student block an interval, distilled on the teacher's own streams; then, if asked, all of them end to end."""

from __future__ import annotations

import random
from pathlib import Path

import torch
import torch.nn.functional as F

from ppcl_rt import Interval, Plan, Step, Streams, Width
from ppcl_train import selection, states
from ppcl_train.config import RunConfig
from ppcl_train.draft import open_draft, write_draft
from ppcl_train.loop import train_loop
from ppcl_train.probes import rows
from ppcl_train.runs import Log, read_tensors, write_tensors
from ppcl_train.teacher import load


def matching_loss(student: Streams, teacher: Streams, mask: torch.Tensor, magnitude: float) -> torch.Tensor:
    """``|| n(student) - n(teacher) ||^2`` a token, both streams summed; n is L2 normalisation over features (eq. 6).

    ``magnitude`` times the squared error over the teacher's mean square is added: eq. 6 leaves the residual stream's
    length free.
    """
    total = torch.zeros(())
    for mine, theirs in zip(rows(student, mask), rows(teacher, mask), strict=True):
        total = total + (F.normalize(mine, dim=-1) - F.normalize(theirs, dim=-1)).square().sum(-1).mean()
        if magnitude:
            total = total + magnitude * (mine - theirs).square().mean() / theirs.square().mean()
    return total


def distil(run: RunConfig, folder: Path) -> None:
    """Train every student on the teacher's streams (eq. 6); writes ``students.safetensors``.

    No student reads another's output, so any subset can be plugged in; one teacher pass a step feeds all.
    """
    log, config = Log(folder, "students"), run.students
    teacher = load(run, folder)
    chosen = selection.read(folder)
    students = {selected.interval: selection.begin(teacher.transformer_blocks, selected) for selected in chosen}
    named = {f"students.{i.key}.{name}": p for i, block in students.items() for name, p in block.named_parameters()}

    def step_loss(step: int) -> dict[str, float]:
        batch = states.inputs(run, config.batch, states.STUDENTS + step)
        passed = states.trace(teacher, batch)
        losses = {}
        for interval, student in students.items():
            out = states.run_block(student, passed.states[interval.first], passed.context)
            loss = matching_loss(out, passed.states[interval.last + 1], batch.mask, config.magnitude)
            # At once, so that the activations of one block at a time are alive.
            loss.backward()
            losses[f"students.{interval.key}"] = loss.item()
        return losses

    log(students=len(students), intervals=" ".join(map(str, students)))
    trained = train_loop(run, config, log, named, step_loss)
    write_tensors(folder / "students.safetensors", trained, {"steps": config.steps})


def tune(run: RunConfig, folder: Path) -> None:
    """Train all students end to end on the teacher's prediction, under random plans; writes ``tuned.safetensors``.

    The teacher's blocks stay as they are, so ratio 1 stays the teacher.
    """
    log, config = Log(folder, "tune"), run.tune
    trained = read_tensors(folder / "students.safetensors")
    if config.steps:
        write_draft(run, folder, trained)
        model = open_draft(folder)
        model.requires_grad_(False)
        model.students.requires_grad_(True)
        named = {n: p for n, p in model.named_parameters() if n.startswith("students.")}
        intervals = [student.interval for student in model.catalog.students]

        # On the predicted x_0: with v = (x - x_0) / t that is the velocity's error times t squared.
        def step_loss(step: int) -> float:
            batch = states.inputs(run, config.batch, states.TUNE + step)
            with torch.no_grad(), model.at(plan=model.catalog.dense):
                wanted = model(**batch.call)[0]
            plan = random_plan(model.catalog.dense, intervals, random.Random(run.seed * 1_000_003 + step))
            with model.at(plan=plan):
                loss = (model(**batch.call)[0] - wanted).square().mean() / wanted.square().mean()
            loss.backward()
            return loss.item()

        trained = train_loop(run, config, log, named, step_loss)
    write_tensors(folder / "tuned.safetensors", trained, {"steps": config.steps})


def random_plan(dense: Plan, intervals: list[Interval], rng: random.Random) -> Plan:
    """Plug in students, drawn one after the other until as many blocks are left as drawn at first."""
    width: Width = dense.steps[0].width
    target = rng.randint(dense.depth // 3, dense.depth - 1)
    chosen: list[Interval] = []
    for interval in rng.sample(intervals, len(intervals)):
        free = all(interval.last < other.first or other.last < interval.first for other in chosen)
        if free and dense.depth - sum(len(i) - 1 for i in chosen) > target:
            chosen.append(interval)
    kept = [(block, width) for block in range(dense.depth) if not any(block in interval for interval in chosen)]
    return Plan.of(dense.checkpoint, dense.depth, kept, [Step(blocks=i, width=width, student=True) for i in chosen])
