"""The stage *width*: what blocks compute at narrower widths, in closed form, without a step of training.

Everything here is least squares on what the teacher's own blocks read (calibration inputs, weighted as the loss weighs
timesteps), one pass of the teacher for all blocks:

    heads, channels    optimal brain surgery (`closed_form.surgery`): the unit that costs least is removed, the
                       remaining weights compensate, and so on; the order of removal is the rank order
    linear maps        ``g + l(g)`` for an MLP (PPCL eq. 9), regression of what the MLP adds on what it reads
    modulations        the map from timestep embedding to modulations, truncated where the embeddings are
    text runs          what blocks read, and how the text stream changes, where it is not updated (PPCL eq. 8)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ppcl_rt import Interval, Streams, Width
from ppcl_rt.model.pluggable import DOWN, UP, BlockLayout
from ppcl_rt.planning.catalog import MLPS, text_maps
from ppcl_train.closed_form.least_squares import LeastSquares
from ppcl_train.closed_form.low_rank import factor
from ppcl_train.closed_form.surgery import eliminate
from ppcl_train.config.settings import RunConfig
from ppcl_train.data import calibration, streams
from ppcl_train.engine.files import read_tensors, write_tensors
from ppcl_train.engine.log import Log
from ppcl_train.stages.draft import open_draft, write_draft

OUTPUT = "width.safetensors"
# Timesteps at which modulations are fitted, spread evenly: a sampler begins at 1, where training draws hardly any.
_TIMESTEPS = 512


def legal_counts(run: RunConfig, full: Width) -> dict[str, list[int]]:
    """List the counts of each group, widest first; 0 is the linear map, where the config asks for it."""
    config, counts = run.width, {}
    for group, count in full._asdict().items():
        if group == "modulation":
            narrower = {rank for rank in config.ranks if rank < count}
        else:
            shares = config.heads if group == "heads" else config.channels
            narrower = {max(1, round(share * count)) for share in shares}
            narrower |= {0} if group in MLPS and config.maps else set()
        counts[group] = sorted({count, *narrower}, reverse=True)
    return counts


class BlockStatistics:
    """What the closed forms of one block are computed from: Gram matrices, whose size does not grow with the data.

    Attributes:
        layers: the output layers of groups, by name.
        fits: the inputs of each output layer.
        maps: for each MLP, by the name of its output layer: regression of what it adds to its stream on what it reads.
    """

    def __init__(self, block: Any, layout: BlockLayout, dim: int) -> None:
        self.block, self.layout = block, layout
        self.layers: dict[str, Any] = {name: block.get_submodule(path) for name, (path, _) in layout.outputs.items()}
        self.fits = {name: LeastSquares(layer.in_features) for name, layer in self.layers.items()}
        self.maps = {name: LeastSquares(dim, dim) for name, (_, group) in layout.outputs.items() if group in MLPS}

    @torch.no_grad()
    def add(self, state: Streams, batch: calibration.Inputs, context: dict[str, Any]) -> None:
        """Add what the block computes from the teacher's streams; of the text, words alone."""
        mask, weight = batch.mask, batch.weight

        def rows(x: torch.Tensor, text: bool) -> torch.Tensor:
            return x[mask] if text else x.flatten(0, 1)

        def weights(x: torch.Tensor, text: bool) -> torch.Tensor:
            return rows(weight[:, None].expand(x.shape[:2]), text)

        def add_inputs(name: str) -> Any:
            text = name.endswith("_text")
            return lambda _, args: self.fits[name].add(rows(args[0], text), weight=weights(args[0], text))

        hooks = [layer.register_forward_pre_hook(add_inputs(name)) for name, layer in self.layers.items()]
        after = streams.run_block(self.block, state, context)
        for hook in hooks:
            hook.remove()
        # A block whose MLPs put out zero returns what its MLPs read.
        hooks = [
            self.layers[name].register_forward_hook(lambda _, __, out: torch.zeros_like(out)) for name in self.maps
        ]
        before = streams.run_block(self.block, state, context)
        for hook in hooks:
            hook.remove()
        for name, fit in self.maps.items():
            text = name.endswith("_text")
            x, y = (before.text, after.text) if text else (before.image, after.image)
            fit.add(rows(x, text), rows(y - x, text), weights(x, text))


def prune(run: RunConfig, folder: Path) -> None:
    """Find what all blocks and students run at narrower widths; writes ``width.safetensors``."""
    log, config = Log(folder, "width"), run.width
    write_draft(run, folder, read_tensors(folder / "students.safetensors"))
    model = open_draft(run, folder)
    full = model.catalog.shape.width
    embeddings = time_embeddings(run, model)
    # Prefix of tensor names, block, and number of the block whose input it reads.
    runnable: list[tuple[str, Any, int]] = [
        (f"transformer_blocks.{n}", block, n) for n, block in enumerate(model.transformer_blocks)
    ]
    runnable += [(f"students.{key}", block, Interval.of_key(key).first) for key, block in model.students.items()]
    tensors: dict[str, torch.Tensor] = {}
    done = 0
    for portion in _portions(runnable, config.blocks_at_once):
        for prefix, statistics in _observe(run, model, portion).items():
            compressed = compress_block(run, statistics, full, embeddings)
            tensors |= {f"{prefix}.{name}": tensor for name, tensor in compressed.items()}
        done += len(portion)
        log(narrowed=done, of=len(runnable))
    if config.longest_text_run > 1:
        maps = fit_text_runs(run, model)
        tensors |= maps
        log(text_runs=len({name.split(".")[1] for name in maps}))
    write_tensors(folder / OUTPUT, tensors, {"samples": config.samples})


def _portions(items: list[Any], size: int) -> Iterator[list[Any]]:
    remaining = iter(items)
    while portion := list(islice(remaining, size)):
        yield portion


def _observe(run: RunConfig, model: Any, portion: list[tuple[str, Any, int]]) -> dict[str, BlockStatistics]:
    """Collect the statistics of some blocks in one pass of the teacher over all calibration inputs."""
    statistics = {prefix: BlockStatistics(block, model.layout, model.catalog.shape.dim) for prefix, block, _ in portion}
    for batch in calibration.batches(run, run.width.samples, calibration.WIDTH):
        trace = streams.trace(model, batch)
        for prefix, _, first in portion:
            statistics[prefix].add(trace.streams[first], batch, trace.context)
    return statistics


@torch.no_grad()
def fit_text_runs(run: RunConfig, model: Any) -> dict[str, torch.Tensor]:
    """Fit the maps of every text run up to the longest (`Plan.text_runs`), by regression on the teacher's streams."""
    depth, dim, full = model.catalog.shape.depth, model.catalog.shape.dim, model.catalog.shape.width
    blocks = list(model.transformer_blocks)
    # For each first block of a run: the number of later blocks that a run may cover. Their outputs lie side by side.
    reach = [min(run.width.longest_text_run, depth - first) - 1 for first in range(depth - 1)]
    # From what the first block reads to what the later blocks read; from the text after the first to that after others.
    reads = [LeastSquares(dim, ahead * dim) for ahead in reach]
    moves = [LeastSquares(dim, ahead * dim) for ahead in reach]
    for batch in calibration.batches(run, run.width.samples, calibration.WIDTH):
        trace = streams.trace(model, batch)
        words = batch.mask
        weight = batch.weight[:, None].expand(words.shape)[words]
        texts = [state.text[words] for state in trace.streams]
        read = [
            block.text_input(state.text, trace.context["temb"], full)[words]
            for block, state in zip(blocks, trace.streams, strict=False)
        ]
        for first, ahead in enumerate(reach):
            later = range(first + 1, first + 1 + ahead)
            reads[first].add(read[first], torch.cat([read[n] - read[first] for n in later], 1), weight)
            text = texts[first + 1]
            moves[first].add(text, torch.cat([texts[n + 1] - text for n in later], 1), weight)
    maps = {}
    for first, ahead in enumerate(reach):
        read_maps, move_maps = (
            [part.split(dim) for part in fit[first].solve(run.width.ridge)] for fit in (reads, moves)
        )
        for last in range(first + 1, first + 1 + ahead):
            interval = Interval(first, last)
            for name in text_maps(interval, depth):
                (weights, biases), n = (
                    (move_maps, last) if name == "text" else (read_maps, int(name.removeprefix("z_")))
                )
                prefix = f"text_runs.{interval.key}.{name}"
                maps[f"{prefix}.weight"] = weights[n - first - 1].clone()
                maps[f"{prefix}.bias"] = biases[n - first - 1].clone()
    return maps


@torch.no_grad()
def time_embeddings(run: RunConfig, model: Any) -> torch.Tensor:
    """Compute what the modulations of a block read, ``silu`` of timestep embeddings, at timesteps evenly over [0, 1].

    Returns:
        ``[n, D]``.
    """
    embeddings = []
    for t in torch.linspace(0, 1, _TIMESTEPS).split(run.batch):
        batch = calibration.inputs(run, len(t), calibration.WIDTH)
        call = {**batch.call, "timestep": t[: len(batch.x)].to(batch.x)}
        trace = streams.trace(model, calibration.Inputs(batch.x, t, call))
        embeddings.append(nn.functional.silu(trace.context["temb"]))
    return torch.cat(embeddings)


def compress_block(
    run: RunConfig, statistics: BlockStatistics, full: Width, embeddings: torch.Tensor
) -> Mapping[str, torch.Tensor]:
    """Compute the rank orders (``order.*``) and the replacements at narrower widths (``narrow.*``) of one block."""
    tensors: dict[str, torch.Tensor] = {}

    def keep(name: str, weight: torch.Tensor, bias: torch.Tensor) -> None:
        tensors[f"narrow.{name}.weight"], tensors[f"narrow.{name}.bias"] = weight.float().cpu(), bias.float().cpu()

    layout, ridge, counts = statistics.layout, run.width.ridge, legal_counts(run, full)
    for group in ("heads", *MLPS):
        outputs = [name for name, (_, its_group) in layout.outputs.items() if its_group == group]
        layers = [(statistics.layers[name], statistics.fits[name].gram) for name in outputs]
        narrower = [count for count in counts[group][1:] if count]
        order, compensated = eliminate(layers, getattr(full, group), narrower, ridge)
        tensors[f"order.{group}"] = order.to(torch.int32)
        for name, by_count in zip(outputs, compensated, strict=True):
            for count, (weight, bias) in by_count.items():
                keep(layout.narrow_name(name, count), weight, bias)
            if counts[group][-1] == 0:
                keep(layout.narrow_name(name, 0), *statistics.maps[name].solve(ridge))
    if len(counts["modulation"]) > 1:
        modulations = [statistics.block.get_submodule(path) for path in layout.modulations.values()]
        down, (weight, bias) = factor(modulations, embeddings, counts["modulation"][1])
        keep(DOWN, *down)
        sizes = [layer.out_features for layer in modulations]
        for stream, up, up_bias in zip(layout.modulations, weight.split(sizes), bias.split(sizes), strict=True):
            keep(UP[stream], up.contiguous(), up_bias.contiguous())
    return tensors
