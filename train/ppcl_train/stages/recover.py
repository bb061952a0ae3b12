"""The stage *recover*: training end to end on the teacher's prediction, under a new plan at every step.

PPCL stage 3.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ppcl_rt import Catalog, Interval, LegalWidths, Plan, PlannedBlock, Planner, Width
from ppcl_train.config.settings import RunConfig
from ppcl_train.config.stages import RecoverConfig
from ppcl_train.data import calibration
from ppcl_train.engine.distributed import join
from ppcl_train.engine.files import read_content, read_tensors, write_json, write_tensors
from ppcl_train.engine.log import Log
from ppcl_train.engine.loop import train_loop
from ppcl_train.losses.velocity_error import Target
from ppcl_train.stages.draft import open_draft, write_draft
from ppcl_train.stages.sensitivities import sensitivities
from ppcl_train.stages.taken import listed, taken

OUTPUT = "recovered.safetensors"
# The catalog with losses before recovery: what the planner goes by when it chooses the plans that are trained.
COSTS = "costs.json"
# And the sketches that go with them.
COST_SKETCHES = "costs.safetensors"
# Between the ratios whose plans are trained.
_SPACING = 0.02
# Shares of the steps: for the smallest plan (the sandwich rule), and, where kept blocks are trained, for the dense one.
_SMALLEST, _DENSE = 0.15, 0.25


def recover(run: RunConfig, folder: Path) -> None:
    """Train what narrower and shallower plans run; writes ``recovered.safetensors``.

    First come students, compensated layers, maps and factors: what ratio 1 does not run. Then, if asked, all blocks
    are trained, the teacher's own included, with the dense plan among the plans. Every process of a world calls this;
    the processes share each batch.
    """
    log, config, world = Log(folder, "recover"), run.recover, join()
    start = read_tensors(folder / "students.safetensors") | read_tensors(folder / "width.safetensors")
    if not config.steps + config.kept_steps:
        if world.is_main:
            write_tensors(folder / OUTPUT, start, {"steps": 0})
        return
    if world.is_main:
        if not (folder / COSTS).exists():
            write_draft(run, folder, start, narrower=True)
            measured, sketches = sensitivities(open_draft(run, folder), run, log)
            write_tensors(folder / COST_SKETCHES, sketches, {})
            write_json(folder / COSTS, measured.model_dump(mode="json"))
        worthwhile = _worthwhile(config, folder)
        start = {name: start[name] for name in listed(worthwhile, start)}
        write_draft(run, folder, start, narrower=True)
    world.wait()
    if not world.is_main:
        worthwhile = _worthwhile(config, folder)
    model = open_draft(run, folder)
    # Plans name the draft that runs them: the one without what no plan takes.
    named = {"checksums": model.catalog.checksums}
    costs = Catalog.model_validate({**worthwhile.model_dump(mode="json"), **named})
    plans = Plans(costs, config.planned, config.least_ratio)
    teacher = copy.deepcopy(model).requires_grad_(False) if config.kept_steps else model
    model.requires_grad_(False)
    if config.steps:
        parameters = {name: p for name, p in model.named_parameters() if _only_narrower_plans_run(name)}
        _train(run, config, log, model, teacher, plans, parameters, calibration.RECOVER, dense=False)
    if config.kept_steps:
        kept_log, kept_config = Log(folder, "recover.kept"), config.model_copy(update={"steps": config.kept_steps})
        first_seed = calibration.RECOVER + config.steps * config.accumulate
        parameters = dict(model.named_parameters())
        _train(run, kept_config, kept_log, model, teacher, plans, parameters, first_seed, dense=True)
    if world.is_main:
        state = model.stored_state()
        names = state if config.kept_steps else start
        note = {"steps": config.steps, "kept": config.kept_steps}
        write_tensors(folder / OUTPUT, {name: state[name] for name in names}, note)


def _worthwhile(config: RecoverConfig, folder: Path) -> Catalog:
    """The catalog of closed-form losses without what no plan takes: that is neither trained nor kept."""
    return taken(Catalog.model_validate(read_content(folder / COSTS)), _SPACING, config.neighbours)


def _only_narrower_plans_run(name: str) -> bool:
    """Whether a parameter is of a student, a text run or a narrower width: ratio 1 runs none of these."""
    path = name.split(".")
    return path[0] in ("students", "text_runs") or "replacements" in path


def _train(
    run: RunConfig,
    config: RecoverConfig,
    log: Log,
    model: Any,
    teacher: Any,
    plans: Plans,
    parameters: Mapping[str, nn.Parameter],
    first_seed: int,
    dense: bool,
) -> None:
    """Train parameters of a model in place, on the velocity error of its plans.

    Args:
        teacher: a model whose dense plan is the teacher.
        first_seed: of the first batch.
        dense: whether the dense plan is among the plans.
    """
    world = join()
    for parameter in parameters.values():
        # In float32 whatever the teacher computes in: steps are too small for a coarser dtype.
        parameter.data = parameter.data.float()
        parameter.requires_grad_(True)

    def step_loss(number: int) -> float:
        seed = first_seed + number
        batch = calibration.inputs(run, config.batch, seed).part(world.share(config.batch))
        with torch.no_grad(), teacher.at(plan=model.catalog.dense):
            target = Target.of(batch, teacher(**batch.call)[0])
        with model.at(plan=plans.draw(random.Random(run.seed * 1_000_003 + seed), dense)):
            error = target.squared_error(model(**batch.call)[0]).sum()
        # Over all processes, so that gradients average to those of the whole batch, however the batch is shared.
        total_error, total = world.mean(torch.stack([error.detach(), target.clean.square().sum()]))
        # The root gives weight to steps of large plans, whose errors are a hundredth of those of small plans.
        loss = (total_error / total + 1e-8).sqrt()
        (error / total / (2 * loss)).backward()
        return loss.item()

    trained = train_loop(
        run,
        config,
        log,
        parameters,
        step_loss,
        world=world,
        before_update=lambda: world.average(parameters.values()),
    )
    with torch.no_grad():
        for name, tensor in trained.items():
            parameters[name].copy_(tensor)


class Plans:
    """Plans to train: those that the planner takes, the smallest of them more often, and random plans.

    Args:
        share: of the draws that take one of the planner's plans; the others are random.
        least_ratio: take no plan of the planner's below this ratio.
    """

    def __init__(self, catalog: Catalog, share: float, least_ratio: float = 0.0) -> None:
        self.catalog, self._share = catalog, share
        self._planned = [plan for plan in Planner(catalog).plans(_SPACING, least_ratio) if plan != catalog.dense]

    def draw(self, rng: random.Random, dense: bool) -> Plan:
        """Draw a plan; ``dense`` puts the dense plan among them."""
        if dense and rng.random() < _DENSE:
            return self.catalog.dense
        if rng.random() < _SMALLEST:
            return self._planned[0]
        if rng.random() < self._share:
            return rng.choice(self._planned)
        # The dense plan runs nothing that is trained, unless it was asked for.
        while (plan := random_plan(self.catalog, rng)) == self.catalog.dense:
            pass
        return plan


def random_plan(catalog: Catalog, rng: random.Random) -> Plan:
    """Draw a plan from all that are legal.

    First comes the number of blocks to leave; then random students are put in until so many are left; then widths and
    text runs are drawn.
    """

    def draw_width(widths: LegalWidths) -> Width:
        # Two groups in three stay whole on average, or hardly any plan would be near the teacher.
        counts = {}
        for group in widths.groups:
            legal = widths.of(group)
            counts[group] = (rng.choice(legal) if rng.random() < 1 / 3 else legal[0]).units
        return Width(counts)

    depth = catalog.architecture.depth
    target = rng.randint(depth // 3, depth)
    chosen: list[Interval] = []
    for student in rng.sample(catalog.students, len(catalog.students)):
        interval = student.interval
        free = all(interval.last < other.first or other.last < interval.first for other in chosen)
        if free and depth - sum(len(i) - 1 for i in chosen) > target:
            chosen.append(interval)
    kept = [(n, draw_width(catalog.blocks[n])) for n in range(depth) if not any(n in interval for interval in chosen)]
    runs: list[Interval] = []
    for run in rng.sample(catalog.text_runs, min(len(catalog.text_runs), rng.randint(0, 3))):
        if not any(n in other for n in run.interval for other in (*chosen, *runs)):
            runs.append(run.interval)
    students = [PlannedBlock(interval=i, width=draw_width(catalog.student(i).widths), student=True) for i in chosen]
    return catalog.compose(kept, students, runs)
