"""The stages *recover* and *refine*: training end to end on the teacher's prediction, under a new plan at every step.

PPCL stage 3.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from ppcl_rt import Catalog, Interval, LegalWidths, Plan, PlannedBlock, Planner, Width
from ppcl_rt.planning.sketch import TENSORS
from ppcl_train.config.settings import RunConfig
from ppcl_train.config.stages import EndToEndConfig
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
REFINED = "refined.safetensors"
# Share of the steps for the dense plan where kept blocks are trained.
_DENSE = 0.25


class _Costs(NamedTuple):
    """What the planner goes by when it chooses the plans that are trained: measured before training.

    Attributes:
        catalog, sketches: names of the files in the run folder.
        by_sketches: plan by the sketches, for all budgets; else by sums of losses, for ratios.
        first_seed: of the batches that are trained on.
    """

    catalog: str
    sketches: str
    by_sketches: bool
    first_seed: int

    def measure(self, run: RunConfig, folder: Path, start: Mapping[str, torch.Tensor], log: Log) -> None:
        """Measure every choice that some tensors make."""
        write_draft(run, folder, start, narrower=True)
        measured, sketches = sensitivities(open_draft(run, folder), run, log)
        write_tensors(folder / self.sketches, sketches, {})
        write_json(folder / self.catalog, measured.model_dump(mode="json"))

    def read(self, folder: Path, config: EndToEndConfig) -> tuple[Catalog, list[Plan]]:
        """The catalog without what no plan takes, which is neither trained nor kept; and the plans."""
        catalog = Catalog.model_validate(read_content(folder / self.catalog))
        if self.by_sketches:
            rows = {name: tensor.numpy() for name, tensor in read_tensors(folder / self.sketches).items()}
            planner = Planner(catalog, lambda: [rows[name] for name in TENSORS])
            plans = planner.frontier(config.spacing, config.other_spacing, config.least_ratio)
            return taken(catalog, plans, config.neighbours), plans
        planner = Planner(catalog)
        worthwhile = taken(catalog, planner.plans(config.spacing), config.neighbours)
        return worthwhile, Planner(worthwhile).plans(config.spacing, config.least_ratio)


_CLOSED_FORMS = _Costs("costs.json", "costs.safetensors", by_sketches=False, first_seed=calibration.RECOVER)
_RECOVERED = _Costs(
    "recovered_costs.json", "recovered_costs.safetensors", by_sketches=True, first_seed=calibration.REFINE
)


def recover(run: RunConfig, folder: Path) -> None:
    """Train what narrower and shallower plans run; writes ``recovered.safetensors``.

    First come students, compensated layers, maps and factors: what ratio 1 does not run. Then, if asked, all blocks
    are trained, the teacher's own included, with the dense plan among the plans. Every process of a world calls this;
    the processes share each batch.
    """
    start = read_tensors(folder / "students.safetensors") | read_tensors(folder / "width.safetensors")
    config = run.recover
    _end_to_end(run, folder, Log(folder, "recover"), config, _CLOSED_FORMS, start, OUTPUT, config.kept_steps)


def refine(run: RunConfig, folder: Path) -> None:
    """Train the same once more, under the plans that will answer budgets; writes ``refined.safetensors``."""
    start = read_tensors(folder / OUTPUT)
    _end_to_end(run, folder, Log(folder, "refine"), run.refine, _RECOVERED, start, REFINED)


def _end_to_end(
    run: RunConfig,
    folder: Path,
    log: Log,
    config: EndToEndConfig,
    costs: _Costs,
    start: dict[str, torch.Tensor],
    output: str,
    kept_steps: int = 0,
) -> None:
    world = join()
    if not config.steps + kept_steps:
        if world.is_main:
            write_tensors(folder / output, start, {"steps": 0})
        return
    if world.is_main:
        if not (folder / costs.catalog).exists():
            costs.measure(run, folder, start, log)
        worthwhile, planned = costs.read(folder, config)
        start = {name: start[name] for name in listed(worthwhile, start)}
        write_draft(run, folder, start, narrower=True)
    world.wait()
    if not world.is_main:
        worthwhile, planned = costs.read(folder, config)
    model = open_draft(run, folder)
    plans = Plans(_of_draft(worthwhile, model), planned, config)
    teacher = copy.deepcopy(model).requires_grad_(False) if kept_steps else model
    model.requires_grad_(False)
    if config.steps:
        parameters = {name: p for name, p in model.named_parameters() if _only_narrower_plans_run(name)}
        _train(run, config, log, model, teacher, plans, parameters, costs.first_seed, dense=False)
    if kept_steps:
        kept_log, kept_config = Log(folder, "recover.kept"), config.model_copy(update={"steps": kept_steps})
        first_seed = costs.first_seed + config.steps * config.accumulate
        parameters = dict(model.named_parameters())
        _train(run, kept_config, kept_log, model, teacher, plans, parameters, first_seed, dense=True)
    if world.is_main:
        state = model.stored_state()
        names = state if kept_steps else start
        write_tensors(
            folder / output, {name: state[name] for name in names}, {"steps": config.steps, "kept": kept_steps}
        )


def _of_draft(catalog: Catalog, model: Any) -> Catalog:
    """The catalog with the checksums of a draft: plans name the weights that run them."""
    return Catalog.model_validate({**catalog.model_dump(mode="json"), "checksums": model.catalog.checksums})


def _only_narrower_plans_run(name: str) -> bool:
    """Whether a parameter is of a student, a text run or a narrower width: ratio 1 runs none of these."""
    path = name.split(".")
    return path[0] in ("students", "text_runs") or "replacements" in path


def _train(
    run: RunConfig,
    config: EndToEndConfig,
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
        batch = calibration.inputs(run, config.batch, seed, teacher=teacher).part(world.share(config.batch))
        with torch.no_grad(), teacher.at(plan=model.catalog.dense):
            target = Target.of(batch, teacher(**batch.call)[0])
        with model.at(plan=plans.draw(random.Random(run.seed * 1_000_003 + seed), dense)):
            output = model(**batch.call)[0]
        error, data = target.squared_error(output).sum(), target.clean.new_zeros(())
        if config.flow_matching:
            data = config.flow_matching * target.data_error(output).sum()
        # Over all processes, so that gradients average to those of the whole batch, however the batch is shared.
        total_error, total_data, total = world.mean(
            torch.stack([error.detach(), data.detach(), target.clean.square().sum()])
        )
        # The root gives weight to steps of large plans, whose errors are a hundredth of those of small plans. Errors
        # against the data have a floor that is the same for all plans, and take none.
        loss = (total_error / total + 1e-8).sqrt()
        (error / total / (2 * loss) + data / total).backward()
        return (loss + total_data / total).item()

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
        catalog: of the draft that runs them.
        planned: the planner's plans, of another catalog with the same blocks.
        config: which of them are drawn, and how often.
    """

    def __init__(self, catalog: Catalog, planned: Sequence[Plan], config: EndToEndConfig) -> None:
        self.catalog, self._config = catalog, config
        inside = [plan for plan in planned if catalog.ratio(plan) <= config.most_ratio and not is_dense(plan, catalog)]
        self._planned = [plan.model_copy(update={"checkpoint": catalog.fingerprint}) for plan in inside]
        if not inside:
            raise ValueError(
                f"no plan has a ratio of {config.least_ratio:g} to {config.most_ratio:g}: raise most_ratio"
            )
        ratios = [catalog.ratio(plan) for plan in self._planned]
        self._weights = [ratio**-config.towards_small for ratio in ratios]
        self._smallest = self._planned[min(range(len(ratios)), key=ratios.__getitem__)]

    def draw(self, rng: random.Random, dense: bool) -> Plan:
        """Draw a plan; ``dense`` puts the dense plan among them."""
        if dense and rng.random() < _DENSE:
            return self.catalog.dense
        if rng.random() < self._config.smallest:
            return self._smallest
        if rng.random() < self._config.planned:
            return rng.choices(self._planned, self._weights)[0]
        # The dense plan runs nothing that is trained, unless it was asked for.
        while (plan := random_plan(self.catalog, rng)) == self.catalog.dense:
            pass
        return plan


def is_dense(plan: Plan, catalog: Catalog) -> bool:
    """Whether a plan runs all that the teacher runs, whatever checkpoint it names."""
    return plan.blocks == catalog.dense.blocks and not plan.text_runs


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
