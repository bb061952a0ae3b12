"""Width in closed form: what a block computes with fewer heads, channels and ranks, without a step of training.

Everything here is least squares on what the teacher's own blocks see (calibration inputs, weighted as the loss weighs
timesteps), one pass of the teacher for all blocks:

    heads, channels    optimal brain surgery (Hassibi & Stork 1993): the unit that costs least is taken out, the
                       remaining weights make up for it, and so on; the order in which units go is the rank order
    linear maps        ``g + l(g)`` for an MLP (PPCL eq. 9), regression of what the MLP adds on what it reads
    modulations        the map from timestep embedding to modulations, truncated where the embeddings are
    text runs          what blocks read, and how the text stream moves on, where it stands still (PPCL eq. 8)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ppcl_rt import Interval, Streams, Width
from ppcl_rt.model.pluggable import DOWN, UP, BlockLayout
from ppcl_rt.planning.catalog import MLPS, text_maps
from ppcl_train.config.settings import RunConfig
from ppcl_train.data import calibration, streams
from ppcl_train.engine.files import read_tensors, write_tensors
from ppcl_train.engine.log import Log
from ppcl_train.selectors.eq5 import LeastSquares
from ppcl_train.stages.draft import open_draft, write_draft

# Timesteps at which modulations are looked at, spread evenly: a sampler begins at 1, where training draws hardly any.
_TIMES = 512


def legal_counts(run: RunConfig, full: Width) -> dict[str, list[int]]:
    """Counts of each group, widest first; 0 is the linear map, where it is asked for."""
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


class Watcher:
    """What one block's closed forms are computed from: Gram matrices, streamed, whose size does not grow with data."""

    def __init__(self, block: Any, layout: BlockLayout, dim: int) -> None:
        self.block, self.layout = block, layout
        self.layers: dict[str, Any] = {name: block.get_submodule(path) for name, (path, _) in layout.outputs.items()}
        self.fits = {name: LeastSquares(layer.in_features) for name, layer in self.layers.items()}
        self.maps = {name: LeastSquares(dim, dim) for name, (_, group) in layout.outputs.items() if group in MLPS}

    @torch.no_grad()
    def see(self, state: Streams, batch: calibration.Inputs, context: dict[str, Any]) -> None:
        """Take in what the block computes from a teacher's streams."""
        mask, weight = batch.mask, batch.weight

        def taken(x: torch.Tensor, text: bool) -> torch.Tensor:
            return x[mask] if text else x.flatten(0, 1)

        def weights(x: torch.Tensor, text: bool) -> torch.Tensor:
            return taken(weight[:, None].expand(x.shape[:2]), text)

        def look(name: str) -> Any:
            text = name.endswith("_text")
            return lambda _, given: self.fits[name].add(taken(given[0], text), weight=weights(given[0], text))

        looking = [layer.register_forward_pre_hook(look(name)) for name, layer in self.layers.items()]
        out = streams.run_block(self.block, state, context)
        for hook in looking:
            hook.remove()
        # With MLPs that say nothing, a block returns what its MLPs read.
        silent = [
            self.layers[name].register_forward_hook(lambda _, __, said: torch.zeros_like(said)) for name in self.maps
        ]
        read = streams.run_block(self.block, state, context)
        for hook in silent:
            hook.remove()
        for name, fit in self.maps.items():
            text = name.endswith("_text")
            g, after = (read.text, out.text) if text else (read.image, out.image)
            fit.add(taken(g, text), taken(after - g, text), weights(g, text))


def prune(run: RunConfig, folder: Path) -> None:
    """Narrow all blocks and students in closed form; writes ``width.safetensors``."""
    log, config = Log(folder, "width"), run.width
    students = read_tensors(folder / "students.safetensors")
    write_draft(run, folder, students)
    model = open_draft(run, folder)
    shape, layout = model.catalog.shape, model.layout
    embeddings = time_embeddings(run, model)
    runnable: list[tuple[str, Any, int]] = [
        (f"transformer_blocks.{n}", block, n) for n, block in enumerate(model.transformer_blocks)
    ]
    runnable += [(f"students.{key}", block, Interval.of_key(key).first) for key, block in model.students.items()]
    tensors: dict[str, torch.Tensor] = {}
    waiting = iter(runnable)
    while group := list(islice(waiting, config.blocks_at_once)):
        watchers = {prefix: Watcher(block, layout, shape.dim) for prefix, block, _ in group}
        for batch in calibration.batches(run, config.samples, calibration.WIDTH):
            passed = streams.trace(model, batch)
            for prefix, _, first in group:
                watchers[prefix].see(passed.streams[first], batch, passed.context)
        for prefix, watcher in watchers.items():
            made = compress_block(run, watcher, shape.width, embeddings)
            tensors |= {f"{prefix}.{name}": tensor for name, tensor in made.items()}
        log(narrowed=len({name.rsplit(".order.")[0] for name in tensors if ".order.heads" in name}), of=len(runnable))
    if config.longest_text_run > 1:
        tensors |= fit_text_runs(run, model)
        log(text_runs=len({name.split(".")[1] for name in tensors if name.startswith("text_runs.")}))
    write_tensors(folder / "width.safetensors", tensors, {"samples": config.samples})


@torch.no_grad()
def fit_text_runs(run: RunConfig, model: Any) -> dict[str, torch.Tensor]:
    """Maps of every text run up to the longest (`Plan.text_runs`), by regression on the teacher's own streams."""
    depth, dim, full = model.catalog.shape.depth, model.catalog.shape.dim, model.catalog.shape.width
    blocks = list(model.transformer_blocks)
    # From each block on: to what the blocks behind it read, and to the text behind them, all side by side.
    reach = [min(run.width.longest_text_run, depth - first) - 1 for first in range(depth - 1)]
    reads = [LeastSquares(dim, ahead * dim) for ahead in reach]
    moves = [LeastSquares(dim, ahead * dim) for ahead in reach]
    for batch in calibration.batches(run, run.width.samples, calibration.WIDTH):
        passed = streams.trace(model, batch)
        words = batch.mask
        weight = batch.weight[:, None].expand(words.shape)[words]
        texts = [state.text[words] for state in passed.streams]
        seen = [
            block.text_input(state.text, passed.context["temb"], full)[words]
            for block, state in zip(blocks, passed.streams, strict=False)
        ]
        for first, ahead in enumerate(reach):
            there = range(first + 1, first + 1 + ahead)
            reads[first].add(seen[first], torch.cat([seen[n] - seen[first] for n in there], 1), weight)
            now = texts[first + 1]
            moves[first].add(now, torch.cat([texts[n + 1] - now for n in there], 1), weight)
    made = {}
    for first, ahead in enumerate(reach):
        read, move = ([part.split(dim) for part in fit[first].solve(run.width.ridge)] for fit in (reads, moves))
        for last in range(first + 1, first + 1 + ahead):
            interval = Interval(first, last)
            for name in text_maps(interval, depth):
                (weights, biases), n = (move, last) if name == "text" else (read, int(name.removeprefix("z_")))
                prefix = f"text_runs.{interval.key}.{name}"
                made[f"{prefix}.weight"] = weights[n - first - 1].clone()
                made[f"{prefix}.bias"] = biases[n - first - 1].clone()
    return made


@torch.no_grad()
def time_embeddings(run: RunConfig, model: Any) -> torch.Tensor:
    """What the modulations of a block read: ``silu`` of timestep embeddings ``[n, D]``, spread evenly over [0, 1]."""
    found = []
    for part in torch.linspace(0, 1, _TIMES).split(run.batch):
        batch = calibration.inputs(run, len(part), calibration.WIDTH)
        call = {**batch.call, "timestep": part[: len(batch.x)].to(batch.x)}
        found.append(nn.functional.silu(streams.trace(model, calibration.Inputs(batch.x, part, call)).context["temb"]))
    return torch.cat(found)


def compress_block(
    run: RunConfig, watcher: Watcher, full: Width, embeddings: torch.Tensor
) -> Mapping[str, torch.Tensor]:
    """Rank orders (``order.*``) and what stands in at narrower widths (``narrow.*``) of one block."""
    made: dict[str, torch.Tensor] = {}

    def keep(name: str, weight: torch.Tensor, bias: torch.Tensor) -> None:
        made[f"narrow.{name}.weight"], made[f"narrow.{name}.bias"] = weight.float().cpu(), bias.float().cpu()

    layout, ridge, counts = watcher.layout, run.width.ridge, legal_counts(run, full)
    for group in ("heads", *MLPS):
        outputs = [name for name, (_, its_group) in layout.outputs.items() if its_group == group]
        given = [(watcher.layers[name], watcher.fits[name].gram) for name in outputs]
        narrower = [count for count in counts[group][1:] if count]
        order, narrowed = eliminate(given, getattr(full, group), narrower, ridge)
        made[f"order.{group}"] = order.to(torch.int32)
        for name, by_count in zip(outputs, narrowed, strict=True):
            for count, (weight, bias) in by_count.items():
                keep(layout.narrow_name(name, count), weight, bias)
            if counts[group][-1] == 0:
                keep(layout.narrow_name(name, 0), *watcher.maps[name].solve(ridge))
    if len(counts["modulation"]) > 1:
        layers = [watcher.block.get_submodule(path) for path in layout.modulations.values()]
        down, (weight, bias) = factor(layers, embeddings, counts["modulation"][1])
        keep(DOWN, *down)
        sizes = [layer.out_features for layer in layers]
        for stream, up, up_bias in zip(layout.modulations, weight.split(sizes), bias.split(sizes), strict=True):
            keep(UP[stream], up.contiguous(), up_bias.contiguous())
    return made


Affine = tuple[torch.Tensor, torch.Tensor]


@torch.no_grad()
def factor(layers: Sequence[nn.Linear], inputs: torch.Tensor, rank: int) -> tuple[Affine, Affine]:
    """Two layers whose product comes nearest to ``layers`` side by side on ``inputs [n, D]``, at each rank up to one.

    With ``W`` the weights below one another and ``C`` the covariance of inputs, the best map of rank r is ``U U^T W``,
    ``U`` the first r left singular vectors of ``W C^(1/2)`` (Eckart & Young 1936): a lower rank is a prefix.

    Returns:
        Weight and bias of the first layer (``[rank, D]``) and of the second (``[outputs, rank]``).
    """
    weight = torch.cat([layer.weight for layer in layers]).double()
    bias = torch.cat([layer.bias for layer in layers]).double()
    x = inputs.double()
    mean = x.mean(0)
    values, vectors = torch.linalg.eigh((x - mean).T @ (x - mean) / len(x))
    root = vectors * values.clip(min=0).sqrt()
    left = torch.linalg.svd(weight @ root, full_matrices=False).U[:, :rank]
    down = left.T @ weight
    return (down, -(down @ mean)), (left.contiguous(), bias + weight @ mean)


def eliminate(
    layers: Sequence[tuple[Any, torch.Tensor]], units: int, counts: Sequence[int], ridge: float
) -> tuple[torch.Tensor, list[dict[int, Affine]]]:
    """Take units out of the inputs of linear layers, one after the other, always the one that costs least.

    What remains makes up for what went (optimal brain surgery): with ``H`` the inverse covariance of the inputs and
    ``W`` the weights so far, taking out the unit ``j`` costs ``W_j H_jj^-1 W_j^T``, and leaves ``W - W_j H_jj^-1 H_j``,
    which is the least-squares solution for the units that remain. Biases take care of means.

    Args:
        layers: linear layers that share their units, each with the Gram matrix of its inputs and a constant
            (`LeastSquares.gram`); a unit's cost is the sum over layers, each relative to its own output.
        units: how many groups of inputs there are, side by side.
        counts: how many are to be left.
        ridge: share of the mean variance that is added to each input's: it pulls towards the weights as they were.

    Returns:
        The rank order ``[units]``, and for each layer its weight ``[out, count * inputs of a unit]``, columns in rank
        order, and bias at each of the counts.
    """
    left = torch.ones(units, dtype=torch.bool)
    running = [_Surgery(layer, gram, units, ridge) for layer, gram in layers]
    taken: list[int] = []
    found: list[dict[int, torch.Tensor]] = [{} for _ in layers]
    least = min(counts, default=units)
    cost = torch.stack([each.cost() for each in running]).sum(0).cpu()
    while len(taken) < units - least:
        unit = int(torch.where(left, cost, torch.inf).argmin())
        left[unit] = False
        taken.append(unit)
        for each in running:
            each.take_out(unit)
        cost = torch.stack([each.cost() for each in running]).sum(0).cpu()
        if units - len(taken) in counts:
            for each, weights in zip(running, found, strict=True):
                weights[units - len(taken)] = each.weight.clone()
    best = torch.where(left, cost, -torch.inf).argsort(descending=True, stable=True)[:least]
    order = torch.tensor([*best.tolist(), *reversed(taken)])
    return order, [
        {count: each.finish(weight, order[:count]) for count, weight in weights.items()}
        for each, weights in zip(running, found, strict=True)
    ]


class _Surgery:
    """One layer of `eliminate`: weights ``[out, units, e]`` as far as they were changed, and the inverse covariance."""

    def __init__(self, layer: Any, gram: torch.Tensor, units: int, ridge: float) -> None:
        self.units = units
        self.before, self.bias = layer.weight.detach().double(), layer.bias.detach().double()
        self.mean = gram[:-1, -1] / gram[-1, -1]
        covariance = gram[:-1, :-1] / gram[-1, -1] - torch.outer(self.mean, self.mean)
        # What never varies is no reason to stop: the floor keeps the matrix regular.
        added = ridge * covariance.diagonal().mean().clip(min=1e-12)
        covariance = covariance + added * torch.eye(len(covariance)).to(covariance)
        self.scale = (self.before @ covariance * self.before).sum().clip(min=1e-300)
        self.inverse = torch.linalg.inv(covariance)
        self.weight = self.before.clone()

    def cost(self) -> torch.Tensor:
        """What taking out each unit would cost, relative to the layer's mean squared output."""
        e = self.before.shape[1] // self.units
        own = self.inverse.unflatten(0, (self.units, e)).unflatten(2, (self.units, e))
        own = own.diagonal(dim1=0, dim2=2).permute(2, 0, 1)  # [units, e, e]
        weight = self.weight.unflatten(1, (self.units, e))
        # What was taken out has a zero here and there, and no inverse.
        gone = own.diagonal(dim1=1, dim2=2).sum(1) == 0
        own = torch.where(gone[:, None, None], torch.eye(e).to(own), own)
        return torch.einsum("oue,uef,ouf->u", weight, torch.linalg.inv(own), weight) / self.scale

    def take_out(self, unit: int) -> None:
        e = self.before.shape[1] // self.units
        here = slice(unit * e, (unit + 1) * e)
        step = torch.linalg.solve(self.inverse[here, here], self.inverse[here])  # H_jj^-1 H_j
        self.weight -= self.weight[:, here] @ step
        self.inverse -= self.inverse[:, here] @ step
        # Exactly zero, not what is left of rounding.
        self.weight[:, here] = 0
        self.inverse[here] = 0
        self.inverse[:, here] = 0

    def finish(self, weight: torch.Tensor, kept: torch.Tensor) -> Affine:
        """Columns in rank order, and the bias that keeps the mean output what it was."""
        e = self.before.shape[1] // self.units
        columns = (kept[:, None] * e + torch.arange(e)).flatten()
        return weight[:, columns].contiguous(), self.bias + (self.before - weight) @ self.mean
