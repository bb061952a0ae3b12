"""The stages *recover* and *refine*: training end to end on the teacher's prediction, under a new plan at every step.

PPCL stage 3.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ppcl_rt import Catalog, Interval, LegalWidths, Plan, PlannedBlock, Planner, Width
from ppcl_rt.checkpoint.converted import Stored
from ppcl_rt.planning.sketch import TENSORS
from ppcl_train.config.settings import RunConfig
from ppcl_train.config.stages import EndToEndConfig
from ppcl_train.data import calibration, seeds
from ppcl_train.data.loading import Batches
from ppcl_train.data.seeds import Purpose, Seed
from ppcl_train.engine.distributed import join
from ppcl_train.engine.files import read_content, read_tensors, stored_in, write_json, write_tensors
from ppcl_train.engine.log import Log
from ppcl_train.engine.loop import train_loop
from ppcl_train.engine.optimisers import adamw_class, free_optimisers, muon
from ppcl_train.engine.sharding import Sharding, drop_unreached
from ppcl_train.losses.velocity_error import Target
from ppcl_train.stages import compress, width
from ppcl_train.stages.assembly import assembled, opened
from ppcl_train.stages.sensitivities import sensitivities
from ppcl_train.stages.taken import listed, taken
from ppcl_train.stages.trained import opened_as_factors

OUTPUT = "recovered.safetensors"
REFINED = "refined.safetensors"
# Share of the steps for the dense plan where kept blocks are trained.
_DENSE = 0.15


class _Costs(NamedTuple):
    """What the planner goes by when it chooses the plans that are trained: measured before training.

    Attributes:
        catalog, sketches: names of the files in the run folder.
        by_sketches: plan by the sketches, for all budgets; else by sums of losses, for ratios.
        first_seed: of the first batch that are trained on.
    """

    catalog: str
    sketches: str
    by_sketches: bool
    first_seed: Seed

    def measure(self, run: RunConfig, folder: Path, start: Mapping[str, Stored], log: Log) -> None:
        """Measure every choice that some tensors make; every process of a world calls this."""
        measured, sketches = _measured(run, folder, start, log)
        if join().is_main:
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


_CLOSED_FORMS = _Costs("start_costs.json", "start_costs.safetensors", by_sketches=False, first_seed=calibration.RECOVER)
_RECOVERED = _Costs(
    "recovered_costs.json", "recovered_costs.safetensors", by_sketches=True, first_seed=calibration.REFINE
)


def recover(run: RunConfig, folder: Path) -> None:
    """Train what narrower and shallower plans run; writes ``recovered.safetensors``.

    First come students, compensated layers, maps and factors: what ratio 1 does not run. Then, if asked, all blocks
    are trained, the teacher's own included, with the dense plan among the plans. Every process of a world calls this;
    the processes share each batch.
    """
    _end_to_end(run, folder, Log(folder, "recover"), run.recover, _CLOSED_FORMS, _before_recovery(folder), OUTPUT)


def _before_recovery(folder: Path) -> dict[str, Stored]:
    return stored_in(folder / width.OUTPUT) | stored_in(folder / compress.OUTPUT)


def refine(run: RunConfig, folder: Path) -> None:
    """Train the same once more, under the plans that will answer budgets; writes ``refined.safetensors``."""
    start = stored_in(folder / OUTPUT)
    _end_to_end(run, folder, Log(folder, "refine"), run.refine, _RECOVERED, start, REFINED)


def take_part(run: RunConfig, folder: Path, log: Callable[..., None]) -> None:
    """Measure what recovery or refinement begins with, together with all processes that call this."""
    start = stored_in(folder / OUTPUT) if (folder / OUTPUT).exists() else _before_recovery(folder)
    _measured(run, folder, start, log)


def _measured(
    run: RunConfig, folder: Path, start: Mapping[str, Stored], log: Callable[..., None]
) -> tuple[Catalog, dict[str, torch.Tensor]]:
    model, _ = opened_as_factors(run, assembled(run, folder, start), trains=False)
    return sensitivities(model, run, folder, log)


def _end_to_end(
    run: RunConfig,
    folder: Path,
    log: Log,
    config: EndToEndConfig,
    costs: _Costs,
    start: Mapping[str, Stored],
    output: str,
) -> None:
    world = join()
    if not config.all_steps:
        if world.is_main:
            write_tensors(folder / output, {name: each.read() for name, each in start.items()}, {"steps": 0})
        return
    if not (folder / costs.catalog).exists():
        costs.measure(run, folder, start, log)
    world.wait()
    worthwhile, planned = costs.read(folder, config)
    start = {name: start[name] for name in listed(worthwhile, start)}
    plans = Plans(worthwhile, planned, config)
    if config.steps:
        start = _trained(run, folder, config, log, start, plans, costs.first_seed)
        free_optimisers()
    if config.kept_steps:
        kept_log, kept_config = Log(folder, f"{log.stage}.kept"), config.model_copy(update={"steps": config.kept_steps})
        first_seed = costs.first_seed + config.steps * config.accumulate
        start = _trained(run, folder, kept_config, kept_log, start, plans, first_seed, everything=True)
    if world.is_main:
        tensors = {name: each.read() for name, each in start.items()}
        write_tensors(folder / output, tensors, {"steps": config.steps, "kept": config.kept_steps})


def _chance(run: RunConfig, seed: Seed) -> random.Random:
    return random.Random(seeds.generator(run.seed, seed, Purpose.PLAN).bytes(16))


def _trained(
    run: RunConfig,
    folder: Path,
    config: EndToEndConfig,
    log: Log,
    start: Mapping[str, Stored],
    plans: Plans,
    first_seed: Seed,
    everything: bool = False,
) -> dict[str, Stored]:
    """Train on the velocity error of plans; returns all tensors in the form in which they are stored.

    Args:
        start: what the run has made so far.
        first_seed: of the first batch.
        everything: train the teacher's blocks too, with the dense plan among the plans.
    """
    world, source = join(), assembled(run, folder, start)
    sharding = Sharding(world) if config.shard else None
    model, trained = opened_as_factors(run, source, everything, sharding=sharding)
    parameters = trained.parameters
    if config.checkpointing:
        model.enable_gradient_checkpointing()
    # The dense plan runs nothing that is trained, so a second model is needed only where the teacher's blocks are.
    teacher = opened(run, assembled(run, folder, {})) if everything else model
    if sharding is not None and everything:
        sharding.add(teacher)

    batches = Batches(
        run, config.batch, first_seed, config.steps * config.accumulate, world.share(config.batch), teacher
    )

    def step_loss(number: int) -> float:
        batch = batches(number)
        with torch.no_grad(), teacher.at(plan=teacher.catalog.dense):
            target = Target.of(batch, teacher(**batch.call)[0])
        with model.at(plan=plans.draw(_chance(run, first_seed + number), everything)):
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

    def average() -> None:
        drop_unreached(parameters.values(), world)
        world.average(parameters.values())

    found = train_loop(
        run,
        config,
        log,
        parameters,
        step_loss,
        optimisers=_optimisers(run, config, log, model, parameters),
        world=world,
        before_update=average,
    )
    # What is trained after this begins with it in every process; otherwise the first writes it.
    return trained.outcome(start, world.whole(found, everywhere=config.kept_steps > 0))


def _optimisers(
    run: RunConfig, config: EndToEndConfig, log: Log, model: Any, parameters: Mapping[str, torch.Tensor]
) -> list[torch.optim.Optimizer]:
    """With ``muon_lr``, Muon and AdamW; empty for the AdamW of the loop."""
    whole = matrices(run, model, parameters) if config.muon_lr else set()
    if not whole:
        return []
    log(muon=len(whole), of=len(parameters))
    rates = {"muon_lr": config.muon_lr, "adamw_lr": config.lr}
    return muon(parameters, whole, **rates, weight_decay=config.weight_decay, kind=adamw_class(config, log))


def matrices(run: RunConfig, model: Any, parameters: Iterable[str]) -> set[str]:
    """Names of the matrices that Muon may train: of whole layers inside blocks and students, but for modulations."""

    def inside(name: str) -> str:
        # transformer_blocks.3.attn.to_q.weight, students.3-5.attn.to_q.weight
        return name.split(".", 2)[-1]

    layers = {inside(name) for name in run.family.hidden_matrices(model)}
    return {name for name in parameters if inside(name) in layers and not inside(name).startswith("replacements.")}


class Plans:
    """Plans to train: those that the planner takes, the smallest of them more often, and random plans.

    Args:
        catalog: what they are drawn from.
        planned: the planner's plans.
        config: which of them are drawn, and how often.
    """

    def __init__(self, catalog: Catalog, planned: Sequence[Plan], config: EndToEndConfig) -> None:
        self.catalog, self._config = catalog, config
        self._planned = [plan for plan in planned if catalog.ratio(plan) <= config.most_ratio and plan != catalog.dense]
        if not self._planned:
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
