"""Recovery: end to end on the teacher's prediction, under plans drawn anew at every step (PPCL stage 3)."""

from __future__ import annotations

import copy
import random
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from ppcl_rt import Catalog, Interval, Plan, Step, Width, Widths
from ppcl_train.config.settings import RunConfig
from ppcl_train.data import calibration
from ppcl_train.engine.distributed import join
from ppcl_train.engine.files import read_content, read_tensors, write_json, write_tensors
from ppcl_train.engine.log import Log
from ppcl_train.engine.loop import train_loop
from ppcl_train.stages.draft import open_draft, write_draft
from ppcl_train.stages.measure import planned, sensitivities
from ppcl_train.stages.teacher import load
from ppcl_train.stages.width import legal_counts

OUTPUT = "recovered.safetensors"
# What the planner goes by while it chooses plans to train: losses before recovery.
COSTS = "costs.json"
# How far apart the ratios are whose plans are trained.
_SPACING = 0.02
# What ratio 1 does not run, beside layers for narrower widths.
_APART = ("students.", "text_runs.")
# Shares of the steps: the smallest plan (the sandwich rule), and, where kept blocks are trained, the dense one.
_SMALLEST, _DENSE = 0.15, 0.25


def recover(run: RunConfig, folder: Path) -> None:
    """Train what narrower and shallower plans run; writes ``recovered.safetensors``.

    First students, compensated layers, maps and factors: what ratio 1 does not run. Then, if asked, the teacher's own
    blocks as well, the dense plan among the plans. Every process of a world calls this; they share each batch.
    """
    log, config, world = Log(folder, "recover"), run.recover, join()
    given = read_tensors(folder / "students.safetensors") | read_tensors(folder / "width.safetensors")
    if not config.steps + config.kept_steps:
        if world.is_main:
            write_tensors(folder / OUTPUT, given, {"steps": 0})
        return
    if world.is_main:
        write_draft(run, folder, given, legal_counts(run, load(run, folder).catalog.shape.width))
        if not (folder / COSTS).exists():
            measured = sensitivities(open_draft(run, folder), run, log)
            write_json(folder / COSTS, measured.model_dump(mode="json"))
    world.wait()
    model = open_draft(run, folder)
    plans = Plans(Catalog.model_validate(read_content(folder / COSTS)), config.planned, config.least_ratio)
    teacher = copy.deepcopy(model).requires_grad_(False) if config.kept_steps else model
    model.requires_grad_(False)
    own = {name: p for name, p in model.named_parameters() if name.startswith(_APART) or ".narrow." in name}
    parts = [(log, own, config)]
    kept = config.model_copy(update={"steps": config.kept_steps})
    parts += [(Log(folder, "recover.kept"), dict(model.named_parameters()), kept)]
    for part, (its_log, trained, its_config) in enumerate(parts):
        if not its_config.steps:
            continue
        for parameter in trained.values():
            # In float32 whatever the teacher computes in: steps are too small for less.
            parameter.data = parameter.data.float()
            parameter.requires_grad_(True)
        seed = calibration.RECOVER + part * config.steps * config.accumulate

        def step_loss(number: int, seed: int = seed, dense: bool = part == 1) -> float:
            batch = calibration.inputs(run, config.batch, seed + number).part(world.share(config.batch))
            with torch.no_grad(), teacher.at(plan=model.catalog.dense):
                wanted = batch.clean(teacher(**batch.call)[0])
            with model.at(plan=plans.draw(random.Random(run.seed * 1_000_003 + seed + number), dense)):
                mine = (batch.clean(model(**batch.call)[0]) - wanted).square().sum()
            # Over all processes, so that however a batch is shared, gradients average to those of the whole.
            error, signal = world.mean(torch.stack([mine.detach(), wanted.square().sum()]))
            # The root, so that steps of large plans count, which lose a hundredth of what small ones do.
            loss = (error / signal + 1e-8).sqrt()
            (mine / signal / (2 * loss)).backward()
            return loss.item()

        def average(trained: Mapping[str, nn.Parameter] = trained) -> None:
            world.average(trained.values())

        better = train_loop(run, its_config, its_log, trained, step_loss, world=world, before_update=average)
        with torch.no_grad():
            for name, tensor in better.items():
                trained[name].copy_(tensor)
    if not world.is_main:
        return
    state = model.full_state()
    names = state if config.kept_steps else given
    write_tensors(folder / OUTPUT, {n: state[n] for n in names}, {"steps": config.steps, "kept": config.kept_steps})


class Plans:
    """Plans to train: those that the planner takes, the smallest more often, and random ones."""

    def __init__(self, catalog: Catalog, share: float, least_ratio: float = 0.0) -> None:
        self.catalog, self._share = catalog, share
        plans = planned(catalog, _SPACING, least_ratio)
        self._planned = [plan for plan in plans if plan != catalog.dense]

    def draw(self, rng: random.Random, dense: bool) -> Plan:
        """Draw a plan; ``dense`` puts the dense one among them."""
        if dense and rng.random() < _DENSE:
            return self.catalog.dense
        if rng.random() < _SMALLEST:
            return self._planned[0]
        if rng.random() < self._share:
            return rng.choice(self._planned)
        # The dense plan runs nothing that could be trained, unless it was asked for.
        while (plan := random_plan(self.catalog, rng)) == self.catalog.dense:
            pass
        return plan


def random_plan(catalog: Catalog, rng: random.Random) -> Plan:
    """Plug in students, one after the other, until as many blocks are left as drawn at first; any legal widths."""

    def width(widths: Widths) -> Width:
        # Two in three parts stay whole, or hardly any plan would be near the teacher.
        return Width(
            *(rng.choice(widths.of(g)).count if rng.random() < 1 / 3 else widths.of(g)[0].count for g in Width._fields)
        )

    depth = catalog.shape.depth
    target = rng.randint(depth // 3, depth)
    chosen: list[Interval] = []
    for student in rng.sample(catalog.students, len(catalog.students)):
        interval = student.interval
        free = all(interval.last < other.first or other.last < interval.first for other in chosen)
        if free and depth - sum(len(i) - 1 for i in chosen) > target:
            chosen.append(interval)
    kept = [(n, width(catalog.blocks[n])) for n in range(depth) if not any(n in interval for interval in chosen)]
    runs: list[Interval] = []
    for run in rng.sample(catalog.text_runs, min(len(catalog.text_runs), rng.randint(0, 3))):
        if not any(n in other for n in run.interval for other in (*chosen, *runs)):
            runs.append(run.interval)
    students = [Step(blocks=i, width=width(catalog.student(i).widths), student=True) for i in chosen]
    return Plan.of(catalog.fingerprint, depth, kept, students, runs)
