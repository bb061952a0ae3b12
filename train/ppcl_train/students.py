"""One student block an interval, distilled on the teacher's own streams."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F

from ppcl_rt import Streams
from ppcl_train import selection, states
from ppcl_train.config import RunConfig
from ppcl_train.loop import train_loop
from ppcl_train.probes import rows
from ppcl_train.runs import Log, write_tensors
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
            loss = matching_loss(out, passed.states[interval.last + 1], batch.mask, run.magnitude)
            # At once, so that the activations of one block at a time are alive.
            loss.backward()
            losses[f"students.{interval.key}"] = loss.item()
        return losses

    log(students=len(students), intervals=" ".join(map(str, students)))
    trained = train_loop(run, config, log, named, step_loss)
    write_tensors(folder / "students.safetensors", trained, {"steps": config.steps})
