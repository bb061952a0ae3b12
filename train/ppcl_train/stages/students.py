"""The stage *students*: one student block for each selected interval, distilled on the teacher's own streams."""

from __future__ import annotations

import itertools
import math
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from ppcl_rt import Interval, Streams
from ppcl_rt.checkpoint.converted import Stored
from ppcl_train.config.settings import RunConfig
from ppcl_train.config.stages import StudentsConfig
from ppcl_train.data import calibration, streams
from ppcl_train.data.loading import Batches
from ppcl_train.data.stream_cache import StreamCache
from ppcl_train.data.teacher_file import find_teacher, load_teacher, only_read
from ppcl_train.engine.distributed import ALONE, World, join, owners
from ppcl_train.engine.files import write_tensors
from ppcl_train.engine.log import Log
from ppcl_train.engine.loop import train_loop
from ppcl_train.engine.optimisers import adamw, adamw_class, autocast, free_optimisers, take_step
from ppcl_train.engine.sharding import Sharding
from ppcl_train.losses.matching import matching_loss
from ppcl_train.selectors import selection
from ppcl_train.selectors.selection import Selected
from ppcl_train.stages.assembly import assembled, opened

OUTPUT = "students.safetensors"


class Learner:
    """A student with its optimiser.

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
        """Backpropagate the loss of ``before -> after``; take the optimiser's step unless more batches make a step.

        Afterwards no activations are in memory, and gradients only if the step takes more batches.

        Args:
            before: the teacher's streams at the start of the interval.
            after: the teacher's streams after the interval.
            context: keyword arguments that the teacher's blocks were called with.
            mask: ``[N, S_text]``, true on words.

        Returns:
            The loss, over all processes.
        """
        config, world = self._config, self._world
        if config.precision == "no":
            # In float32 whatever the teacher computes in.
            before, context = Streams(*streams.in_float32(tuple(before))), streams.in_float32(context)
        # Casts of weights are not kept: they would pile up with the students.
        with torch.enable_grad(), autocast(config.precision, world.device.type, keeps_casts=False):
            # The whole block is one checkpoint: of one block this saves what the loss would hold next to it.
            out = (
                checkpoint(streams.run_block, self.student, before, context, use_reentrant=False)
                if config.checkpointing
                else streams.run_block(self.student, before, context)
            )
            loss = matching_loss(out, after, mask, self._magnitude, world)
        with torch.autocast(world.device.type, enabled=False):
            loss.backward()
        mean = world.mean(loss.detach()).item()
        # A loss that is not finite stops the training, with the weights that led to it: they are worth a look.
        if config.accumulate == 1 and math.isfinite(mean):
            self.average()
            if config.clip:
                nn.utils.clip_grad_norm_(self.student.parameters(), config.clip)
            take_step([self.optimiser])
        return mean

    def average(self) -> None:
        """Average the gradients that are there over the processes."""
        self._world.average(self.student.parameters())


class Division(NamedTuple):
    """How the processes of a world divide the work.

    Attributes:
        world: all processes.
        peers: the processes that share each batch with this one; alone where each process trains students of its own
            on whole batches, with nothing to exchange.
        own: the students that this process trains.
    """

    world: World
    peers: World
    own: list[Selected]

    @classmethod
    def of(cls, config: StudentsConfig, world: World, selected: Sequence[Selected]) -> Division:
        """Divide the samples of each batch, or the students, as ``config.parallel`` says.

        Raises:
            ValueError: there are more processes than students.
        """
        if config.parallel == "data":
            return cls(world, world, list(selected))
        if world.size > len(selected) > 0:
            raise ValueError(f"{world.size} processes have {len(selected)} students to train: start no more than that")
        owner = owners([1] * len(selected), world.size)
        return cls(world, world.alone, [each for each, rank in zip(selected, owner) if rank == world.rank])

    @property
    def writes_cache(self) -> bool:
        """Whether this process writes to its cache; processes that train whole batches all read what rank 0 writes."""
        return self.world.is_main or self.peers is self.world


class TeacherStreams:
    """Hands the teacher's streams at both ends of every interval to learners: from teacher passes or from a cache."""

    def __init__(self, run: RunConfig, folder: Path, teacher: Any, division: Division) -> None:
        self._run, self._config, self._teacher, self._division = run, run.students, teacher, division
        peers, config = division.peers, run.students
        share, count = peers.share(config.batch), config.steps * config.accumulate
        self._batch = Batches(run, config.batch, calibration.STUDENTS, count, share, teacher)
        self._cache = StreamCache(folder / "states" / f"{peers.rank}-{peers.size}")
        self._cached = self._fill_cache() if self._config.cache_bytes else 0

    def _fill_cache(self) -> int:
        """Write the streams of as many batches as fit; returns how many.

        Raises:
            ValueError: not one fits.
        """
        config, (world, peers, _) = self._config, self._division
        with autocast(config.precision, world.device.type, keeps_casts=False):
            batches = map(self._batch, range(config.steps * config.accumulate))
            budget = config.cache_bytes // peers.size
            count = self._cache.fill(self._teacher, batches, budget, world, self._division.writes_cache)
        if not count:
            raise ValueError(f"students.cache_bytes={config.cache_bytes} does not hold one batch: raise it, or take 0")
        return count

    def learn(self, number: int, learners: dict[Interval, Learner]) -> dict[Interval, float]:
        """Let every learner learn from a batch, as soon as the end of its interval is reached; returns the losses."""
        number = number % self._cached if self._cached else number
        with autocast(self._config.precision, self._division.world.device.type, keeps_casts=False):
            batch, losses = self._batch(number), dict[Interval, float]()

        def visit(interval: Interval, before: Streams, after: Streams, context: dict[str, Any]) -> None:
            losses[interval] = learners[interval].learn(before, after, context, batch.mask)

        if self._cached:
            self._cache.walk_intervals(number, learners, visit, self._division.world.device)
        else:
            with autocast(self._config.precision, self._division.world.device.type, keeps_casts=False):
                streams.walk_intervals(self._teacher, batch, learners, visit)
        return losses

    def delete_cache(self) -> None:
        """Delete the cached streams of all processes."""
        shutil.rmtree(self._cache.folder.parent, ignore_errors=True)


def distil(run: RunConfig, folder: Path) -> None:
    """Train every student on the teacher's streams (eq. 6); writes ``students.safetensors``.

    No student reads the output of another, so any subset of students can be plugged in, and one teacher pass a step
    feeds all of them. A student learns while the teacher waits at the end of the student's interval, and takes its
    optimiser's step at once: activations and gradients of one student at a time are in memory. (With ``accumulate``,
    the gradients of all students are, from batch to batch.) More students than ``at_once`` are trained in groups, one
    after the other.

    Every process of a world calls this.

    Raises:
        ValueError: there are more processes than students or samples, the cache is too small for a batch, or a loss is
            not finite.
    """
    config, world = run.students, join()
    log, selected = Log(folder, "students"), selection.read(folder)
    if not selected:
        log(students=0)
        if world.is_main:
            write_tensors(folder / OUTPUT, {}, {"steps": 0})
        return
    teacher = only_read(run, _teacher(run, folder, world), log)
    divisions = [Division.of(config, world, group) for group in in_groups(selected, config.at_once)]
    teacher_streams = TeacherStreams(run, folder, teacher, divisions[0])
    log(students=len(selected), intervals=" ".join(str(each.interval) for each in selected))
    trained: dict[str, torch.Tensor] = {}
    for number, division in enumerate(divisions):
        part = Log(folder, "students" if len(divisions) == 1 else f"students.{number}")
        trained |= world.gather(_train(run, folder, part, teacher, teacher_streams, division))
        free_optimisers()
    if world.is_main:
        write_tensors(folder / OUTPUT, trained, {"steps": config.steps})
    # Every process has read its last batch before the cache is deleted.
    world.wait()
    if world.is_main:
        teacher_streams.delete_cache()


def _teacher(run: RunConfig, folder: Path, world: World) -> Any:
    """Load the teacher in the precision of the training; where it is spread, one block of it at a time is whole."""
    config = run.students
    if config.shard_teacher:
        sharding, dtype = Sharding(world), "bfloat16" if config.precision == "bf16" else run.teacher.dtype
        run = run.model_copy(update={"teacher": run.teacher.model_copy(update={"dtype": dtype})})
        teacher = opened(run, assembled(run, folder, {}), lambda _, block: sharding.add_block(block, {}))
        sharding.add_rest(teacher, {})
        return teacher
    teacher = load_teacher(run, folder)
    if config.precision == "bf16":
        # Not diffusers' `to`, which warns of modules that it would keep in float32; there are none here.
        nn.Module.to(teacher, torch.bfloat16)
    return teacher


def in_groups(selected: Sequence[Selected], most: int) -> list[Sequence[Selected]]:
    """Divide students into groups of at most so many, as equal as can be."""
    count = -(-len(selected) // most)
    bounds = [len(selected) * n // count for n in range(count + 1)]
    return [selected[first:end] for first, end in itertools.pairwise(bounds)]


def _train(
    run: RunConfig, folder: Path, log: Log, teacher: Any, teacher_streams: TeacherStreams, division: Division
) -> dict[str, torch.Tensor]:
    """Train a group of students; returns the tensors of those that this process has trained, on the CPU."""
    config, world = run.students, division.world
    kind, stored = adamw_class(config, log), find_teacher(run, folder).tensors
    learners = {}
    for each in division.own:
        student = _new_student(teacher, stored, each).to(world.device)
        learners[each.interval] = Learner(student, config, run.magnitude, division.peers, kind)

    def step_loss(number: int) -> dict[str, float]:
        losses = teacher_streams.learn(number, learners)
        return {f"students.{interval.key}": losses[interval] for interval in learners}

    def average() -> None:
        for learner in learners.values():
            learner.average()

    trained = train_loop(
        run,
        config,
        log,
        {
            f"students.{interval.key}.{name}": parameter
            for interval, learner in learners.items()
            for name, parameter in learner.student.named_parameters()
        },
        step_loss,
        optimisers=[learner.optimiser for learner in learners.values()],
        world=world,
        before_update=average,
    )
    return {name: tensor.cpu() for name, tensor in trained.items()}


def _new_student(teacher: Any, stored: Mapping[str, Stored], selected: Selected) -> nn.Module:
    """As `selection.new_student`, out of the teacher's files: in memory its blocks may be spread over processes."""
    architecture, numbers = teacher.catalog.architecture, selected.copied_from
    student: nn.Module = teacher.meta_block(architecture.kind(numbers[0]))
    prefixes = ["{}.{}".format(*architecture.place(n)) for n in numbers]
    state = {
        name: torch.stack([stored[f"{prefix}.{name}"].read().float() for prefix in prefixes]).mean(0)
        for name in student.state_dict()
    }
    student.load_state_dict(state, assign=True)
    return student.requires_grad_(True)
