"""The stage *width*: what blocks compute at narrower widths, in closed form, without a step of training.

Everything here is least squares on what the teacher's own blocks read (calibration inputs, weighted as the loss weighs
timesteps), one pass of the teacher for a portion of blocks (`data.passes`):

    heads, channels    optimal brain surgery (`closed_form.surgery`): the unit that costs least is removed, the
                       remaining weights compensate, and so on; what goes last comes first in the rank order
    linear maps        ``g + l(g)`` for an MLP (PPCL eq. 9), regression of what the MLP adds on what it reads
    modulations        the map from timestep embedding to modulations, truncated where the embeddings are
    text runs          what blocks read, and how the text stream changes, where it is not updated (PPCL eq. 8);
                       in `closed_form.text_runs`
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import torch

from ppcl_rt import LINEAR_MAP, Streams
from ppcl_rt.convert.low_rank import Inputs, LowRank
from ppcl_train.closed_form.block_statistics import BlockStatistics, pass_by
from ppcl_train.closed_form.compression import store_as_factors
from ppcl_train.closed_form.surgery import eliminate
from ppcl_train.closed_form.text_runs import fit_text_runs, later_blocks
from ppcl_train.config.settings import RunConfig
from ppcl_train.data import calibration, streams
from ppcl_train.data.passes import Passes
from ppcl_train.engine.distributed import World, join
from ppcl_train.engine.log import Log
from ppcl_train.engine.parts import Parts
from ppcl_train.stages.assembly import assembled, legal_counts, opened

Item = TypeVar("Item")

OUTPUT = "width.json"
# Timesteps at which modulations are fitted, spread evenly: a sampler begins at 1, where training draws hardly any.
_TIMESTEPS = 512


# Prefix of tensor names, block, and number of the teacher's block whose input it reads.
Runnable = tuple[str, Any, int]
# The settings, prefix and statistics of a block, and what its modulations read -> its tensors, by name inside of it.
Make = Callable[[RunConfig, str, BlockStatistics, "torch.Tensor | None"], dict[str, torch.Tensor]]


def prune(run: RunConfig, folder: Path) -> None:
    """Find what blocks run at narrower widths, and maps of text runs; every process takes a share of the blocks.

    Writes a file for each block, and for each block that text runs begin with, into ``width/``, and last of all
    ``width.json``, which lists them. What is there is not made again. The result is that of one process bit for bit.
    """
    log, world = Log(folder, "width"), join()
    parts, names = Parts(folder / "width"), list[str]()
    if not run.width.is_empty:
        model = opened(run, assembled(run, folder, {}))
        architecture = model.catalog.architecture
        runnable = [("{}.{}".format(*architecture.place(n)), block, n) for n, block in enumerate(model.blocks())]
        names += narrow(run, model, runnable, parts, log, world)
    if run.width.longest_text_run > 1:
        names += map_text_runs(run, model, parts, log, world)
    world.wait()
    if world.is_main:
        parts.list_in(folder / OUTPUT, names, {"samples": run.width.samples})


def closed_forms(
    run: RunConfig, statistics: BlockStatistics, read_by_modulations: torch.Tensor | None
) -> dict[str, torch.Tensor]:
    """What a block runs at narrower widths (`compress_block`), as factors where these are smaller and near enough."""
    tensors = compress_block(run, statistics, read_by_modulations)
    store_as_factors(run, statistics, tensors)
    return tensors


def narrow(
    run: RunConfig,
    model: Any,
    runnable: list[Runnable],
    parts: Parts,
    log: Log,
    world: World,
    make: Make = lambda run, prefix, statistics, read: closed_forms(run, statistics, read),
) -> list[str]:
    """Compute what some blocks run at narrower widths, each into a file of its own.

    Args:
        model: the dense model.
        runnable: the blocks.
        make: computes the tensors of a block, by name inside of it.

    Returns:
        The names of all files.
    """
    kind, read_by_modulations = model.catalog.architecture.kind, modulation_inputs(run, model)
    # In the order in which the teacher reaches them; only rank 0 looks at what is there, so that all divide the same.
    names = [prefix for prefix, _, _ in runnable]
    left = world.agree([name for name in names if name not in parts])
    passes = Passes(run, model, run.width.samples, parts.folder / f"inputs.{world.rank}")
    mine = _share(sorted((each for each in runnable if each[0] in left), key=lambda each: each[2]), world)
    for portion, following in portions(mine, run.width.blocks_at_once):
        statistics = observe(passes, portion, following[2] if following else 0, run.width.maps)
        for prefix, _, first in portion:
            # Taken out: the sums of a block are of no use any more, and the largest thing in memory.
            made = make(run, prefix, statistics.pop(prefix), read_by_modulations.get(kind(first)))
            parts.write(prefix, {f"{prefix}.{name}": tensor for name, tensor in made.items()})
        log(narrowed=sum(name in parts for name in names), of=len(names))
    passes.end()
    return names


def map_text_runs(run: RunConfig, model: Any, parts: Parts, log: Log, world: World) -> list[str]:
    """Fit the maps of text runs, those of each first block into a file of its own; returns the names of all files."""
    reach = later_blocks(model, run.width.longest_text_run)
    names = {first: f"text_runs.{first}" for first in reach}
    left = world.agree([first for first, name in names.items() if name not in parts])
    passes = Passes(run, model, run.width.samples, parts.folder / f"inputs.{world.rank}")
    for portion, following in portions(_share(left, world), run.width.blocks_at_once):
        maps = fit_text_runs(run, passes, {first: reach[first] for first in portion}, following or 0)
        for first in portion:
            of_first = {name: tensor for name, tensor in maps.items() if name.startswith(f"{names[first]}.")}
            parts.write(names[first], of_first)
        log(text_runs=sum(name in parts for name in names.values()), of=len(names))
    passes.end()
    return list(names.values())


def _share(items: list[Item], world: World) -> list[Item]:
    """The items of this process, next to one another: what one pass reads is where the one before ended."""
    first, end = (len(items) * rank // world.size for rank in (world.rank, world.rank + 1))
    return items[first:end]


def portions(items: list[Item], size: int) -> Iterator[tuple[list[Item], Item | None]]:
    """Divide items into lists of at most ``size``, each with the item that comes next; None after the last."""
    for start in range(0, len(items), size):
        end = start + size
        yield items[start:end], items[end] if end < len(items) else None


def observe(
    passes: Passes, portion: list[Runnable], following: int = 0, maps: bool = True
) -> dict[str, BlockStatistics]:
    """Collect the statistics of some blocks in one pass of the teacher over calibration inputs, by prefix.

    The pass ends with the last block that is needed. Blocks of the teacher are observed as it runs them; others, and
    blocks without their MLPs, take a run more.

    Args:
        portion: the blocks.
        following: the teacher's block whose input the next portion begins with; 0 for no next one.
        maps: whether linear maps are wanted.
    """
    blocks, statistics = passes.model.blocks(), {prefix: BlockStatistics(block, maps) for prefix, block, _ in portion}
    read = {first for _, _, first in portion}
    for batch, walk in passes.over(range(min(read), max(read) + 1), following):

        def step(number: int, state: Streams, context: dict[str, Any], batch: calibration.Inputs = batch) -> Streams:
            after = None
            for prefix, block, first in portion:
                if first == number:
                    returned = statistics[prefix].add(state, batch, context)
                    after = returned if block is blocks[number] else after
            return pass_by(blocks[number], state, context) if after is None else after

        walk(step)
    return statistics


@torch.no_grad()
def modulation_inputs(run: RunConfig, model: Any) -> dict[str, torch.Tensor]:
    """Compute what the modulations of each kind of block read, at timesteps spread evenly over [0, 1].

    The embedders alone are run, no block.

    Returns:
        ``[n, D]`` by kind; nothing for kinds whose modulations are not factored.
    """
    architecture = model.catalog.architecture
    # One block of each kind says how it reads the condition.
    readers = {architecture.kind(n): block for n, block in enumerate(model.blocks()) if block.spec.rank_groups}
    if not readers:
        return {}
    read: dict[str, list[torch.Tensor]] = {kind: [] for kind in readers}
    # Each batch has samples of its own: modulations may see the text too.
    for number, t in enumerate(torch.linspace(0, 1, _TIMESTEPS).split(run.batch)):
        _, context = streams.enter(model, calibration.inputs(run, len(t), calibration.WIDTH + number, t, teacher=model))
        for kind, block in readers.items():
            read[kind].append(block.modulation_input(context[model.condition]))
    return {kind: torch.cat(portions) for kind, portions in read.items()}


def compress_block(
    run: RunConfig, statistics: BlockStatistics, read_by_modulations: torch.Tensor | None
) -> dict[str, torch.Tensor]:
    """Compute the rank orders (``order.*``) and the replacements at narrower widths (``replacements.*``) of one block.

    Args:
        read_by_modulations: ``[n, D]`` (`modulation_inputs`); None for a block whose modulations are not factored.
    """
    tensors: dict[str, torch.Tensor] = {}

    def replace(name: str, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        tensors[f"replacements.{name}.weight"] = weight.float().cpu()
        if bias is not None:
            tensors[f"replacements.{name}.bias"] = bias.float().cpu()

    block, spec, ridge = statistics.block, statistics.block.spec, run.width.ridge
    counts = legal_counts(run, spec)
    for group in spec.unit_groups:
        outputs = spec.outputs_of(group)
        layers = [(statistics.columns(output), statistics.gram(output)) for output in outputs]
        narrower = [count for count in counts[group][1:] if count != LINEAR_MAP]
        order, compensated = eliminate(layers, spec.groups[group].count, narrower, ridge)
        tensors[f"order.{group}"] = order.to(torch.int32)
        for output, by_count in zip(outputs, compensated, strict=True):
            for count, (weight, bias) in by_count.items():
                replace(spec.replacement(output.name, count), weight, bias if output.biased else None)
            if counts[group][-1] == LINEAR_MAP:
                weight, bias = statistics.linear_map(output, ridge)
                replace(spec.replacement(output.name, LINEAR_MAP), weight, bias if output.biased else None)
    for group in spec.rank_groups:
        parts = spec.factored_by(group)
        if len(counts[group]) == 1 or not parts:
            continue
        assert read_by_modulations is not None, "a rank is that of modulations"
        modulations: list[Any] = [block.get_submodule(part.path) for part in parts]
        affine = [(layer.weight.detach(), layer.bias.detach()) for layer in modulations]
        down, ups = LowRank(affine, Inputs.of(read_by_modulations)).factors(counts[group][1])
        replace(spec.shared_factor(group), *down)
        for part, (up, bias) in zip(parts, ups, strict=True):
            replace(part.name, up.contiguous(), bias)
    return tensors
