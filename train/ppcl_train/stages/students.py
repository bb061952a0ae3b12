"""One student block an interval, distilled on the teacher's own streams."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from ppcl_rt import Interval, Streams
from ppcl_train.config.settings import RunConfig
from ppcl_train.config.stages import StudentsConfig
from ppcl_train.data import calibration, stream_cache, streams
from ppcl_train.engine.distributed import ALONE, World, join, owners
from ppcl_train.engine.files import write_tensors
from ppcl_train.engine.log import Log
from ppcl_train.engine.loop import train_loop
from ppcl_train.engine.optimisers import adamw, adamw_class
from ppcl_train.selectors import selection
from ppcl_train.selectors.eq5 import rows
from ppcl_train.stages.teacher import load


def matching_loss(
    student: Streams, teacher: Streams, mask: torch.Tensor, magnitude: float, world: World = ALONE
) -> torch.Tensor:
    """``|| n(student) - n(teacher) ||^2`` a token, both streams summed; n is L2 normalisation over features (eq. 6).

    ``magnitude`` times the squared error over the teacher's mean square is added: eq. 6 leaves the residual stream's
    length free. Over the processes of ``world`` that share a batch, the losses' mean is the loss of the whole batch.
    """
    total = torch.zeros((), device=mask.device)
    for mine, theirs in zip(rows(student, mask), rows(teacher, mask), strict=True):
        mine, theirs = mine.float(), theirs.float()
        count, square = world.mean(
            torch.stack([mask.new_tensor(len(theirs), dtype=torch.float), theirs.square().sum()])
        )
        total = total + (F.normalize(mine, dim=-1) - F.normalize(theirs, dim=-1)).square().sum() / count
        if magnitude:
            total = total + magnitude * (mine - theirs).square().sum() / square
    return total


class Learner:
    """A student, its optimiser, and what a step of both is.

    Args:
        student: in float32.
        magnitude: see `matching_loss`.
        kind: class of the optimiser (`optimisers.adamw_class`).
        world: the processes that share each batch.
    """

    def __init__(
        self,
        student: nn.Module,
        config: StudentsConfig,
        magnitude: float,
        world: World = ALONE,
        kind: Any = torch.optim.AdamW,
    ) -> None:
        self.student, self._config, self._magnitude, self._world = student, config, magnitude, world
        self.optimiser = adamw(student.parameters(), lr=config.lr, weight_decay=config.weight_decay, kind=kind)

    def learn(self, before: Streams, after: Streams, context: dict[str, Any], mask: torch.Tensor) -> float:
        """Backpropagate the loss of ``before -> after`` and, unless more batches make a step, step; returns the loss.

        Afterwards no activations are left, and gradients only for a step that is still to come.
        """
        config, world = self._config, self._world
        if config.precision == "no":
            # Whatever the teacher computes in.
            before, context = Streams(*streams.in_float32(tuple(before))), streams.in_float32(context)
        with torch.enable_grad(), precise(config, world):
            # Recomputation takes the block whole: of one block it saves what the loss would hold beside it.
            out = (
                checkpoint(streams.run_block, self.student, before, context, use_reentrant=False)
                if config.checkpointing
                else streams.run_block(self.student, before, context)
            )
            loss = matching_loss(out, after, mask, self._magnitude, world)
        with torch.autocast(world.device.type, enabled=False):
            loss.backward()
        mean = world.mean(loss.detach()).item()
        # A loss that is not finite stops the training; the weights that led there are worth a look.
        if config.accumulate == 1 and math.isfinite(mean):
            self.average()
            if config.clip:
                nn.utils.clip_grad_norm_(self.student.parameters(), config.clip)
            self.optimiser.step()
            self.optimiser.zero_grad()
        return mean

    def average(self) -> None:
        """Average gradients that are left over processes."""
        self._world.average(self.student.parameters())


def distil(run: RunConfig, folder: Path) -> None:
    """Train every student on the teacher's streams (eq. 6); writes ``students.safetensors``.

    No student reads another's output, so any subset can be plugged in; one teacher pass a step feeds all. A student
    learns while the teacher waits at the end of its interval, and takes its optimiser's step at once, so activations
    and gradients of one student at a time are alive. (With ``accumulate``, gradients of all are, from batch to batch.)

    Every process of a world calls this.

    Raises:
        ValueError: more processes than students or samples, a cache too small for a batch, a loss that is not finite.
    """
    config, world = run.students.model_copy(update={"magnitude": run.magnitude}), join()
    log, chosen, teacher = Log(folder, "students"), selection.read(folder), load(run, folder)
    apart = config.parallel == "intervals"
    if apart and world.size > len(chosen):
        raise ValueError(f"{world.size} processes have {len(chosen)} students to train: start no more than that")
    # Who trains students of its own exchanges nothing; the others share each batch.
    peers = world.alone if apart else world
    owner = owners([1] * len(chosen), world.size) if apart else [world.rank] * len(chosen)
    kind = adamw_class(config, log)
    learners = {
        selected.interval: Learner(
            selection.begin(teacher.transformer_blocks, selected).float().to(world.device),
            config,
            run.magnitude,
            peers,
            kind,
        )
        for selected, rank in zip(chosen, owner)
        if rank == world.rank
    }
    named = {
        f"students.{interval.key}.{name}": parameter
        for interval, learner in learners.items()
        for name, parameter in learner.student.named_parameters()
    }
    if config.precision == "bf16":
        # Not diffusers' own, which warns of modules that it would keep in float32, of which there are none.
        nn.Module.to(teacher, torch.bfloat16)
    if config.shard_teacher:
        world.shard(teacher)
    teacher.to(world.device)

    def batch_of(number: int) -> calibration.Inputs:
        batch = calibration.inputs(run, config.batch, calibration.STUDENTS + number)
        return batch.part(peers.share(config.batch)).to(world.device)

    cache, cached = stream_cache.StreamCache(folder / "states" / f"{peers.rank}-{peers.size}"), 0
    if config.cache_bytes:
        with precise(config, world):
            batches = map(batch_of, range(config.steps * config.accumulate))
            cached = cache.fill(teacher, batches, config.cache_bytes // peers.size, world, world.is_main or not apart)
        if not cached:
            raise ValueError(f"students.cache_bytes={config.cache_bytes} does not hold one batch: raise it, or take 0")

    def step_loss(number: int) -> dict[str, float]:
        number = number % cached if cached else number
        given, losses = batch_of(number), {}

        def learn(interval: Interval, before: Streams, after: Streams, context: dict[str, Any]) -> None:
            losses[interval] = learners[interval].learn(before, after, context, given.mask)

        if cached:
            cache.walk_intervals(number, learners, learn, world.device)
        else:
            with precise(config, world):
                streams.walk_intervals(teacher, given, learners, learn)
        return {f"students.{interval.key}": losses[interval] for interval in learners}

    def average() -> None:
        for learner in learners.values():
            learner.average()

    log(students=len(chosen), intervals=" ".join(str(selected.interval) for selected in chosen))
    trained = train_loop(
        run,
        config,
        log,
        named,
        step_loss,
        optimisers=[learner.optimiser for learner in learners.values()],
        world=world,
        before_update=average,
    )
    whole = world.gather(trained)
    if world.is_main:
        write_tensors(folder / "students.safetensors", whole, {"steps": config.steps})
    # Not before all have read their last.
    world.wait()
    if world.is_main:
        shutil.rmtree(cache.folder.parent, ignore_errors=True)


def precise(config: StudentsConfig, world: World) -> torch.autocast:
    """Autocast as ``precision`` asks; weights that were cast are not kept, or they would pile up with the students."""
    enabled = config.precision == "bf16"
    return torch.autocast(world.device.type, torch.bfloat16, enabled=enabled, cache_enabled=False)
