"""The stage *width*: what blocks compute at narrower widths, in closed form, without a step of training.

Everything here is least squares on what the teacher's own blocks read (calibration inputs, weighted as the loss weighs
timesteps), one pass of the teacher for all blocks:

    heads, channels    optimal brain surgery (`closed_form.surgery`): the unit that costs least is removed, the
                       remaining weights compensate, and so on; what goes last comes first in the rank order
    linear maps        ``g + l(g)`` for an MLP (PPCL eq. 9), regression of what the MLP adds on what it reads
    modulations        the map from timestep embedding to modulations, truncated where the embeddings are
    text runs          what blocks read, and how the text stream changes, where it is not updated (PPCL eq. 8);
                       in `closed_form.text_runs`
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from ppcl_rt import LINEAR_MAP, Interval
from ppcl_rt.convert.low_rank import Inputs, LowRank
from ppcl_train.closed_form.block_statistics import BlockStatistics
from ppcl_train.closed_form.surgery import eliminate
from ppcl_train.closed_form.text_runs import fit_text_runs
from ppcl_train.config.settings import RunConfig
from ppcl_train.data import calibration, streams
from ppcl_train.engine.files import read_tensors, write_tensors
from ppcl_train.engine.log import Log
from ppcl_train.stages.draft import legal_counts, open_draft, write_draft

OUTPUT = "width.safetensors"
# Timesteps at which modulations are fitted, spread evenly: a sampler begins at 1, where training draws hardly any.
_TIMESTEPS = 512


def prune(run: RunConfig, folder: Path) -> None:
    """Find what all blocks and students run at narrower widths; writes ``width.safetensors``."""
    log, config = Log(folder, "width"), run.width
    write_draft(run, folder, read_tensors(folder / "students.safetensors"))
    model = open_draft(run, folder)
    architecture = model.catalog.architecture
    read_by_modulations = modulation_inputs(run, model)
    # Prefix of tensor names, block, and number of the teacher's block whose input it reads.
    runnable = [("{}.{}".format(*architecture.place(n)), block, n) for n, block in enumerate(model.blocks())]
    runnable += [(f"students.{key}", block, Interval.of_key(key).first) for key, block in model.students.items()]
    tensors: dict[str, torch.Tensor] = {}
    done = 0
    for portion in portions(runnable, config.blocks_at_once):
        statistics = observe(run, model, portion, config.samples)
        for prefix, _, first in portion:
            compressed = compress_block(run, statistics[prefix], read_by_modulations.get(architecture.kind(first)))
            tensors |= {f"{prefix}.{name}": tensor for name, tensor in compressed.items()}
        done += len(portion)
        log(narrowed=done, of=len(runnable))
    if config.longest_text_run > 1:
        maps = fit_text_runs(run, model)
        tensors |= maps
        log(text_maps=len(maps) // 2)
    write_tensors(folder / OUTPUT, tensors, {"samples": config.samples})


def portions(items: list[Any], size: int) -> Iterator[list[Any]]:
    """Divide items into lists of at most ``size``."""
    remaining = iter(items)
    while portion := list(islice(remaining, size)):
        yield portion


def observe(
    run: RunConfig, model: Any, portion: list[tuple[str, Any, int]], samples: int
) -> dict[str, BlockStatistics]:
    """Collect the statistics of some blocks in one pass of the teacher over calibration inputs.

    Args:
        portion: for each block the prefix of its tensors, itself, and the teacher's block whose input it reads.
    """
    statistics = {prefix: BlockStatistics(block) for prefix, block, _ in portion}
    for batch in calibration.batches(run, samples, calibration.WIDTH, teacher=model):
        trace = streams.trace(model, batch)
        for prefix, _, first in portion:
            statistics[prefix].add(trace.streams[first], batch, trace.context)
    return statistics


@torch.no_grad()
def modulation_inputs(run: RunConfig, model: Any) -> dict[str, torch.Tensor]:
    """Compute what the modulations of each kind of block read, at timesteps spread evenly over [0, 1].

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
        trace = streams.trace(model, calibration.inputs(run, len(t), calibration.WIDTH + number, t, teacher=model))
        for kind, block in readers.items():
            read[kind].append(block.modulation_input(trace.context[model.condition]))
    return {kind: torch.cat(portions) for kind, portions in read.items()}


def compress_block(
    run: RunConfig, statistics: BlockStatistics, read_by_modulations: torch.Tensor | None
) -> Mapping[str, torch.Tensor]:
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
