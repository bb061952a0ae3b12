"""Other ways to make a model smaller, each made to give one model of at most a ratio, in the same number of steps.

A step is a batch of `CompareConfig.batch` samples that gradients are computed on; one that feeds several students at
once, all from one pass of the teacher, is one step. What is solved in closed form or chosen by measurement takes none.

What is trained end to end is trained whole, blocks that were kept included, on the clean image that the teacher's
prediction points at (`recover`). Width is left to the runtime: a model here is the teacher's class, its plan set.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize

import ppcl_rt
from ppcl_rt import Interval, Plan, Shape, Width
from ppcl_train import pipeline
from ppcl_train.config.settings import RunConfig, with_changes
from ppcl_train.data import calibration, streams
from ppcl_train.engine.files import read_content, read_tensors, write_json
from ppcl_train.engine.log import Log
from ppcl_train.engine.loop import train_loop
from ppcl_train.engine.provenance import making
from ppcl_train.selectors import selection
from ppcl_train.stages import students, teacher

# The groups that a width cuts here, heads and the channels of both MLPs.
_CUT = ("heads", "image", "text")
# Layers share a gate's choice in groups of about so many, as in TinyFusion's 2:4.
_GATED = 4
# The gates' temperature falls from the first to the second over training (TinyFusion).
_TEMPERATURES = (4.0, 0.1)


class UnreachableError(ValueError):
    """A method that cannot make a model this small."""


@dataclass(frozen=True)
class Entry:
    """A model to be made.

    Attributes:
        run: all settings; its seed decides data and chance.
        folder: for this entry alone; what is begun in it is gone on with.
        shared: for all entries of a seed.
        teacher_file: the teacher, as ``teacher.safetensors`` of a run folder.
        ratio: the most parameters, over those of the teacher; `slack` beyond it for whole blocks.
        device: where models are trained and judged; what the pipeline itself trains goes where it goes there.
        seen: the clean images that the teacher pointed at, by the seed of the batch; entries of a seed see the same
            batches, and without this the teacher takes a third of the time.
    """

    run: RunConfig
    folder: Path
    shared: Path
    teacher_file: Path
    ratio: float
    device: str = "cpu"
    seen: dict[int, torch.Tensor] = field(default_factory=dict, repr=False)

    def begin(self, folder: Path, **changes: Any) -> RunConfig:
        """Begin a run folder with this teacher; settings are changed by dotted name, ``__`` for the dot."""
        changed = with_changes(self.run, {name.replace("__", "."): value for name, value in changes.items()})
        pipeline.begin(changed, folder, self.teacher_file)
        return changed

    def teacher(self) -> Any:
        """A copy of the teacher, frozen, in float32."""
        self.begin(self.folder)
        # Not diffusers' own `to`, which warns of modules that it would keep in float32, of which there are none.
        model: Any = nn.Module.to(teacher.load(self.run, self.folder), self.device, torch.float32)
        return model

    def inputs(self, seed: int) -> calibration.Inputs:
        """A batch to train on."""
        batch = calibration.inputs(self.run, self.run.compare.batch, seed)
        call = {name: v.to(self.device) if isinstance(v, torch.Tensor) else v for name, v in batch.call.items()}
        return replace(batch, x=batch.x.to(self.device), t=batch.t.to(self.device), call=call)

    def blocks(self, shape: Shape) -> int:
        """The most whole blocks.

        Raises:
            UnreachableError: not one.
        """
        budget = (self.ratio + self.run.compare.slack) * shape.dense_params - shape.outer_params
        count = min(shape.depth, int(budget / shape.block_params(shape.width)))
        if count < 1:
            raise UnreachableError(f"ratio {self.ratio:g} leaves no whole block")
        return count


Method = Callable[[Entry], Any]


# Training, the same for all.


def _train(
    entry: Entry,
    stage: str,
    named: Mapping[str, nn.Parameter],
    step_loss: Callable[[int], float],
    steps: int,
    optimisers: Sequence[torch.optim.Optimizer] = (),
    **changes: Any,
) -> None:
    """Train parameters in the loop of all stages; ``changes`` are to what `CompareConfig` says of it."""
    config = entry.run.compare.model_copy(update={"steps": steps, **changes})
    with making(entry.run, stage):
        trained = train_loop(entry.run, config, Log(entry.folder, stage), named, step_loss, optimisers=optimisers)
    with torch.no_grad():
        for name, parameter in named.items():
            parameter.copy_(trained[name])


def velocity_loss(entry: Entry, model: Any, stock: Any, seed: int) -> torch.Tensor:
    """Relative squared error of the clean image that a model points at, the teacher's being right, on a batch."""
    batch = entry.inputs(seed)
    if seed not in entry.seen:
        with torch.no_grad():
            entry.seen[seed] = batch.clean(stock(**batch.call)[0])
    wanted = entry.seen[seed]
    return (batch.clean(model(**batch.call)[0]) - wanted).square().mean() / wanted.square().mean()


def measured_loss(entry: Entry, model: Any, stock: Any) -> float:
    """The same over calibration batches."""
    count = math.ceil(entry.run.measure.samples / entry.run.compare.batch)
    with torch.no_grad():
        return sum(velocity_loss(entry, model, stock, calibration.MEASURE + n).item() for n in range(count)) / count


def _tuned(entry: Entry, model: Any, steps: int) -> Any:
    """Train all of a model end to end."""
    stock = entry.teacher()
    named = dict(model.requires_grad_(True).named_parameters())

    def step_loss(step: int) -> float:
        loss = velocity_loss(entry, model, stock, calibration.RECOVER + step)
        loss.backward()
        return loss.item()

    _train(entry, "end", named, step_loss, steps)
    return model.requires_grad_(False)


def _end_steps(entry: Entry) -> int:
    return entry.run.compare.steps - entry.run.compare.distil_steps


# Whole blocks.


def _plan(model: Any, kept: Sequence[int], width: Width | None = None) -> Plan:
    catalog = model.catalog
    blocks = [(block, width or catalog.shape.width) for block in sorted(kept)]
    return Plan.of(catalog.fingerprint, catalog.shape.depth, blocks)


def _keep(model: Any, kept: Sequence[int]) -> Any:
    model.set_plan(_plan(model, kept))
    model.trim()
    return model


def _plug(model: Any, blocks: Mapping[Interval, nn.Module]) -> Any:
    """Put each student where the first block of its interval is, and leave out the others."""
    gone: set[int] = set()
    for interval, student in blocks.items():
        model.transformer_blocks[interval.first] = student
        gone |= set(interval) - {interval.first}
    return _keep(model, [n for n in range(model.catalog.shape.depth) if n not in gone])


def drop(entry: Entry) -> Any:
    """Leave out blocks, one after the other, each time the one that is missed least; train nothing."""
    model = entry.teacher()
    shape = model.catalog.shape
    gone = _least_missed(entry)[: shape.depth - entry.blocks(shape)]
    return _keep(model, [n for n in range(shape.depth) if n not in gone])


def _least_missed(entry: Entry) -> list[int]:
    """All blocks but one, in the order in which they are left out; measured once a seed."""
    file = entry.shared / "dropped.json"
    if not file.exists():
        model, stock = entry.teacher(), entry.teacher()
        kept, gone = list(range(model.catalog.shape.depth)), []

        def error(dropped: int) -> float:
            with model.at(plan=_plan(model, [n for n in kept if n != dropped])):
                return measured_loss(entry, model, stock)

        while len(kept) > 1:
            gone.append(min(kept, key=error))
            kept.remove(gone[-1])
        write_json(file, {"order": gone})
    order: list[int] = read_content(file)["order"]
    return order


def drop_and_train(entry: Entry) -> Any:
    """Leave out the same blocks, then train what is left end to end for all steps."""
    return _tuned(entry, drop(entry), entry.run.compare.steps)


def _distilled(folder: Path, run: RunConfig) -> dict[Interval, dict[str, torch.Tensor]]:
    """Weights of the students of a run folder, which are selected and distilled now unless they are there."""
    pipeline.run_stages(run, folder, last="students")
    weights: dict[Interval, dict[str, torch.Tensor]] = {}
    for name, tensor in read_tensors(folder / "students.safetensors").items():
        _, key, parameter = name.split(".", 2)
        weights.setdefault(Interval.of_key(key), {})[parameter] = tensor
    return weights


def _with_students(model: Any, weights: Mapping[Interval, Mapping[str, torch.Tensor]]) -> Any:
    """Plug in students, by their weights."""
    blocks = {}
    for interval, tensors in weights.items():
        blocks[interval] = selection.begin(model.transformer_blocks, selection.Selected(interval, "first"))
        blocks[interval].load_state_dict(tensors)
    return _plug(model, blocks)


def _as_written(entry: Entry, folder: Path, steps: int) -> RunConfig:
    """Begin a folder whose students are distilled as PPCL has it: by eq. 6 alone."""
    batch = entry.run.compare.batch
    return entry.begin(folder, select="eq5", students__steps=steps, students__batch=batch, probes__batch=batch)


def _after_probes(entry: Entry) -> int:
    """Steps before the end-to-end stage that are left when the probes have had theirs.

    Raises:
        ValueError: none.
    """
    left = entry.run.compare.distil_steps - entry.run.probes.steps
    if left < 1:
        raise ValueError(
            f"probes.steps={entry.run.probes.steps} leaves no step of the {entry.run.compare.distil_steps} before the "
            "end-to-end stage: raise compare.steps"
        )
    return left


def uniform_intervals(depth: int, count: int) -> list[Interval]:
    """``count`` intervals over all blocks, as equal as can be."""
    bounds = [round(n * depth / count) for n in range(count + 1)]
    return [Interval(first, beyond - 1) for first, beyond in itertools.pairwise(bounds)]


def uniform(entry: Entry) -> Any:
    """Give each of equal intervals a student, distilled as the reference's; then end to end."""
    model = entry.teacher()
    shape = model.catalog.shape
    folder = entry.folder / "students"
    run = _as_written(entry, folder, entry.run.compare.distil_steps)
    intervals = [i for i in uniform_intervals(shape.depth, entry.blocks(shape)) if len(i) > 1]
    selection.write(folder, [selection.Selected(interval, "first") for interval in intervals])
    return _tuned(entry, _with_students(model, _distilled(folder, run)), _end_steps(entry))


def _reference(entry: Entry) -> dict[Interval, dict[str, torch.Tensor]]:
    """Intervals of eq. 5 with their students' weights, the fewest and best that a ratio needs.

    Plugged in are those that together were measured to lose least, each alone. They are distilled once a seed.

    Raises:
        UnreachableError: all of them leave too many blocks.
    """
    folder = entry.shared / "eq5"
    weights = _distilled(folder, _as_written(entry, folder, _after_probes(entry)))
    stock = entry.teacher()
    losses = {
        interval: measured_loss(entry, _with_students(entry.teacher(), {interval: tensors}), stock)
        for interval, tensors in weights.items()
    }
    depth, most = stock.catalog.shape.depth, entry.blocks(stock.catalog.shape)
    chosen = [
        some
        for count in range(len(weights) + 1)
        for some in itertools.combinations(weights, count)
        if depth - sum(len(interval) - 1 for interval in some) <= most
    ]
    if not chosen:
        raise UnreachableError(f"eq. 5 found {', '.join(map(str, sorted(weights)))}: more than {most} blocks are left")
    best = min(chosen, key=lambda some: sum(losses[interval] for interval in some))
    return {interval: weights[interval] for interval in best}


def eq5(entry: Entry) -> Any:
    """Compress as PPCL is written (probes, eq. 5, eq. 6), then train end to end."""
    return _tuned(entry, _with_students(entry.teacher(), _reference(entry)), _end_steps(entry))


def sequential(entry: Entry) -> Any:
    """Distil students for the reference's intervals on what the students before them put out; then end to end."""
    model, stock = entry.teacher(), entry.teacher()
    blocks = {
        interval: selection.begin(stock.transformer_blocks, selection.Selected(interval, "first"))
        for interval in sorted(_reference(entry))
    }
    walk = {interval.first: interval for interval in blocks}
    skipped = {n for interval in blocks for n in interval}

    def step_loss(step: int) -> float:
        batch = entry.inputs(calibration.STUDENTS + step)
        passed = streams.trace(stock, batch)
        state, total = passed.streams[0], 0.0
        for n in range(len(passed.streams) - 1):
            if n in walk:
                interval = walk[n]
                out = streams.run_block(blocks[interval], state, passed.context)
                wanted = passed.streams[interval.last + 1]
                loss = students.matching_loss(out, wanted, batch.mask, magnitude=0.0)
                loss.backward()
                total += loss.item() / len(blocks)
                # No gradient goes back into the student before: each answers for its own interval.
                state = ppcl_rt.Streams(out.image.detach(), out.text.detach())
            elif n not in skipped:
                with torch.no_grad():
                    state = streams.run_block(stock.transformer_blocks[n], state, passed.context)
        return total

    named = {f"{i.key}.{name}": p for i, block in blocks.items() for name, p in block.named_parameters()}
    _train(entry, "sequential", named, step_loss, _after_probes(entry), lr=entry.run.students.lr)
    return _tuned(entry, _plug(model, blocks), _end_steps(entry))


# Learned gates.


class Gates(nn.Module):
    """Which blocks are kept, drawn from learnt chances: n of the m blocks of each group (TinyFusion's N:M).

    Every group has a logit for each way to keep n of its m blocks; a draw is hard, its gradient is that of the
    Gumbel softmax (straight through).
    """

    def __init__(self, depth: int, kept: int, groups: int) -> None:
        super().__init__()
        self.groups = uniform_intervals(depth, groups)
        bounds = [round(n * kept / groups) for n in range(groups + 1)]
        self.ways = [
            torch.tensor([[float(n in some) for n in group] for some in itertools.combinations(group, count)])
            for group, count in zip(self.groups, (b - a for a, b in itertools.pairwise(bounds)), strict=True)
        ]
        self.logits = nn.ParameterList(torch.zeros(len(ways)) for ways in self.ways)

    def draw(self, temperature: float, generator: torch.Generator) -> torch.Tensor:
        """Draw a mask over all blocks, 1 for kept."""
        masks = []
        for logits, ways in zip(self.logits, self.ways, strict=True):
            uniform = torch.rand(len(ways), generator=generator).clamp(1e-9, 1 - 1e-9)
            soft = F.softmax((logits - (-uniform.log()).log()) / temperature, dim=0)
            hard = F.one_hot(soft.argmax(), len(ways)).to(soft)
            masks.append((hard - soft.detach() + soft) @ ways)
        return torch.cat(masks)

    def chosen(self) -> list[int]:
        """The blocks of the likeliest choice."""
        kept = torch.cat([ways[logits.argmax()] for logits, ways in zip(self.logits, self.ways, strict=True)])
        return [int(n) for n in kept.nonzero()]


@contextlib.contextmanager
def gated(blocks: Sequence[nn.Module], mask: torch.Tensor) -> Iterator[None]:
    """Inside, block ``n`` changes its streams by ``mask[n]`` times what it would."""
    mask = mask.to(next(blocks[0].parameters()).device)

    def hook(n: int) -> Any:
        def blend(_: nn.Module, __: Any, given: dict[str, Any], out: tuple[torch.Tensor, torch.Tensor]) -> Any:
            text, image = given["encoder_hidden_states"], given["hidden_states"]
            return text + mask[n] * (out[0] - text), image + mask[n] * (out[1] - image)

        return blend

    hooks = [block.register_forward_hook(hook(n), with_kwargs=True) for n, block in enumerate(blocks)]
    try:
        yield
    finally:
        for handle in hooks:
            handle.remove()


class LowRank(nn.Module):
    """A weight ``[out, in]`` plus ``B A`` of a low rank, zero at first (LoRA)."""

    def __init__(self, weight: torch.Tensor, rank: int, generator: torch.Generator) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.randn(rank, weight.shape[1], generator=generator) / rank**0.5)
        self.b = nn.Parameter(torch.zeros(weight.shape[0], rank))

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        """Add it."""
        return weight + self.b @ self.a


def learn_gates(entry: Entry, model: Any, kept: int) -> list[int]:
    """Learn which blocks to keep, together with adapters that stand in for the training to come.

    The adapters are merged into the model at the end, so what they learnt is not lost.
    """
    config, stock = entry.run.compare, entry.teacher()
    depth = model.catalog.shape.depth
    gates = Gates(depth, kept, max(1, min(depth // _GATED, kept)))
    generator = torch.Generator().manual_seed(entry.run.seed)
    layers = {
        f"{n}.{path}": layer
        for n, block in enumerate(model.transformer_blocks)
        for path, layer in block.named_modules()
        if isinstance(layer, nn.Linear)
    }
    adapters: dict[str, nn.Parameter] = {}
    for name, layer in layers.items():
        adapter = LowRank(layer.weight, config.rank, generator).to(entry.device)
        parametrize.register_parametrization(layer, "weight", adapter)
        adapters |= {f"{name}.a": adapter.a, f"{name}.b": adapter.b}
    first, last = _TEMPERATURES

    def step_loss(step: int) -> float:
        temperature = first + (last - first) * step / config.distil_steps
        mask = gates.draw(temperature, torch.Generator().manual_seed(entry.run.seed * 1_000_003 + step))
        with gated(list(model.transformer_blocks), mask):
            loss = velocity_loss(entry, model, stock, calibration.STUDENTS + step)
            loss.backward()
        return loss.item()

    optimisers = [
        torch.optim.AdamW(parameters, lr, betas=(0.9, 0.95), weight_decay=0.0)
        for parameters, lr in ((gates.parameters(), config.gate_lr), (adapters.values(), entry.run.students.lr))
    ]
    named = {**dict(gates.named_parameters()), **adapters}
    _train(entry, "gates", named, step_loss, config.distil_steps, optimisers)
    for layer in layers.values():
        parametrize.remove_parametrizations(layer, "weight", leave_parametrized=True)
    return gates.chosen()


def gates(entry: Entry) -> Any:
    """Learn which blocks to keep (TinyFusion, arXiv 2412.01199), then train these end to end."""
    model = entry.teacher()
    kept = learn_gates(entry, model, entry.blocks(model.catalog.shape))
    Log(entry.folder, "gates")(kept=" ".join(map(str, kept)))
    return _tuned(entry, _keep(model, kept), _end_steps(entry))


# Width.


def width_within(shape: Shape, ratio: float) -> Width:
    """The width of all blocks that meets a ratio, its heads and channels cut by about the same share.

    Raises:
        UnreachableError: one head and one channel are too many.
    """
    budget = (ratio * shape.dense_params - shape.outer_params) / shape.depth
    found = []
    for heads in range(1, shape.width.heads + 1):
        one, two = (shape.block_params(shape.width._replace(heads=heads, image=n, text=n)) for n in (1, 2))
        channels = min(shape.width.image, 1 + int((budget - one) // (two - one)))
        if channels >= 1:
            found.append((abs(heads / shape.width.heads - channels / shape.width.image), heads, channels))
    if not found:
        raise UnreachableError(f"ratio {ratio:g} is below all blocks at one head and one channel")
    _, heads, channels = min(found)
    return shape.width._replace(heads=heads, image=channels, text=channels)


def _cut(entry: Entry, score: Callable[[list[torch.Tensor]], torch.Tensor]) -> Any:
    """Cut every block to one width, keeping the units of the highest score, and train end to end for all steps.

    Args:
        score: weights of a group, each ``[units, ...]`` -> score ``[units]``.
    """
    model = entry.teacher()
    shape = model.catalog.shape
    width = width_within(shape, entry.ratio)
    for block in model.transformer_blocks:
        for group in _CUT:
            units = getattr(shape.width, group)
            tensors = {
                name: (block.get_parameter(name), axis)
                for name, (its_group, axis) in model.layout.axes.items()
                if its_group == group
            }
            spread = [p.movedim(axis, 0).unflatten(0, (units, -1)).flatten(1) for p, axis in tensors.values()]
            order = score(spread).cpu().argsort(descending=True, stable=True)
            for parameter, axis in tensors.values():
                unit = parameter.shape[axis] // units
                index = (order[:, None] * unit + torch.arange(unit)).flatten()
                parameter.data = parameter.data.index_select(axis, index.to(entry.device))
    model.set_plan(_plan(model, range(shape.depth), width))
    return _tuned(entry, model, entry.run.compare.steps)


def magnitude_width(entry: Entry) -> Any:
    """Keep the heads and channels with the largest weights, uncompensated; then end to end."""
    return _cut(entry, lambda spread: torch.stack([w.square().sum(1) for w in spread]).sum(0))


def random_width(entry: Entry) -> Any:
    """Keep heads and channels drawn at random, uncompensated; then end to end."""
    generator = torch.Generator().manual_seed(entry.run.seed)
    return _cut(entry, lambda spread: torch.rand(len(spread[0]), generator=generator))


# Ours.


def ours(entry: Entry) -> Any:
    """Run the pipeline, once a seed for all ratios, and load its checkpoint at a ratio.

    Raises:
        UnreachableError: the checkpoint has no plan this small.
    """
    folder = entry.shared / "ours"
    run = entry.begin(folder, **_budgeted(entry.run))
    pipeline.run_stages(run, folder)
    checkpoint = folder / "checkpoint"
    try:
        return ppcl_rt.load(checkpoint, entry.ratio, dtype=torch.float32, device=entry.device)
    except ValueError as error:
        smallest = ppcl_rt.load(checkpoint, dtype=torch.float32).planner.smallest
        if entry.ratio < smallest:
            raise UnreachableError(str(error)) from None
        raise


def _budgeted(run: RunConfig) -> dict[str, int]:
    """Settings with which the pipeline trains for as many steps as every other method, split as it splits them.

    Raises:
        ValueError: the cost table takes them all.
    """
    planned = {
        "students__steps": run.students.steps,
        "recover__steps": run.recover.steps,
        "recover__kept_steps": run.recover.kept_steps,
    }
    taken = run.table.steps if run.select == "table" else run.probes.steps
    left, total = run.compare.steps - taken, sum(planned.values())
    if left < len(planned):
        raise ValueError(f"choosing intervals takes {taken} of {run.compare.steps} steps: raise compare.steps")
    changes = {name: round(count * left / total) for name, count in planned.items()}
    changes["recover__steps"] += left - sum(changes.values())
    return changes


METHODS: dict[str, Method] = {
    "ours": ours,
    "eq5": eq5,
    "sequential": sequential,
    "uniform": uniform,
    "gates": gates,
    "drop+train": drop_and_train,
    "drop": drop,
    "magnitude": magnitude_width,
    "random": random_width,
}
# Methods that are trained with every seed, not with the first alone.
SEEDED = ("ours", "eq5")
