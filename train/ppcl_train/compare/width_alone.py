"""Methods that cut every block to one width: no block is left out, nothing compensates for what is cut."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch

from ppcl_rt import Architecture, BlockSpec, Width
from ppcl_train.compare.entry import Entry, UnreachableError
from ppcl_train.compare.training import train_end_to_end
from ppcl_train.data import seeds
from ppcl_train.data.seeds import Purpose, Seed, Stage

# Weights of a group's tensors, each ``[units, ...]`` -> score of each unit ``[units]``.
Score = Callable[[list[torch.Tensor]], torch.Tensor]


def width_within(architecture: Architecture, ratio: float) -> Width:
    """Find the width of all blocks that meets a ratio, heads and channels cut by about the same share.

    Raises:
        UnreachableError: one head and one channel are too many.
        ValueError: there are several kinds of blocks, or MLPs with different numbers of channels.
    """
    kinds = list(architecture.kinds.values())
    spec, full = kinds[0], kinds[0].full
    mlps = [group for group in spec.unit_groups if group not in spec.head_groups]
    if len(kinds) > 1 or len(spec.head_groups) != 1 or len({full[group] for group in mlps}) != 1:
        raise ValueError("one width for all takes blocks of one kind, with heads and MLPs of one size")
    [of_heads] = spec.head_groups
    all_heads, all_channels = full[of_heads], full[mlps[0]]

    def width(heads: int, channels: int) -> Width:
        return full.replace(**{of_heads: heads}, **dict.fromkeys(mlps, channels))

    budget = (ratio * architecture.dense_params - architecture.outer_params) / architecture.depth
    found = []
    for heads in range(1, all_heads + 1):
        one, two = (spec.params(width(heads, channels)) for channels in (1, 2))
        channels = min(all_channels, 1 + int((budget - one) // (two - one)))
        if channels >= 1:
            found.append((abs(heads / all_heads - channels / all_channels), heads, channels))
    if not found:
        raise UnreachableError(f"ratio {ratio:g} is below all blocks at one head and one channel")
    _, heads, channels = min(found)
    return width(heads, channels)


class _Units(NamedTuple):
    """A tensor with units of a group: along ``axis`` from ``offset`` on, ``length`` rows or columns each."""

    tensor: torch.nn.Parameter
    axis: int
    offset: int
    length: int


def _tensors_of(block: Any, group: str) -> Iterator[_Units]:
    """Find the tensors of a block that hold units of a group."""
    spec: BlockSpec = block.spec
    for part in spec.parts:
        layer = block.get_submodule(part.path)
        for segment in part.segments:
            if segment.group == group and part.axis is not None:
                yield _Units(layer.weight, part.axis, segment.offset, segment.unit)
                if part.axis == 0 and part.bias:
                    yield _Units(layer.bias, 0, segment.offset, segment.unit)


def _reorder(block: Any, group: str, score: Score) -> None:
    """Put the units of a group in order of their score, highest first."""
    count, tensors = block.spec.groups[group].count, list(_tensors_of(block, group))
    by_unit = [
        each.tensor.narrow(each.axis, each.offset, count * each.length)
        .movedim(each.axis, 0)
        .unflatten(0, (count, -1))
        .flatten(1)
        for each in tensors
    ]
    order = score(by_unit).cpu().argsort(descending=True, stable=True)
    for tensor, axis, offset, length in tensors:
        index = torch.arange(tensor.shape[axis])
        index[offset : offset + count * length] = offset + (order[:, None] * length + torch.arange(length)).flatten()
        tensor.data = tensor.data.index_select(axis, index.to(tensor.device))


def _cut(entry: Entry, score: Score) -> Any:
    """Cut every block to one width, keeping the units of the highest score, and train end to end for all steps."""
    model = entry.teacher()
    catalog = model.catalog
    width = width_within(catalog.architecture, entry.ratio)
    for block in model.blocks():
        for group in block.spec.unit_groups:
            _reorder(block, group, score)
    model.set_plan(catalog.compose((n, width) for n in range(catalog.architecture.depth)))
    return train_end_to_end(entry, model, entry.run.compare.steps)


def magnitude_width(entry: Entry) -> Any:
    """Keep the heads and channels with the largest weights; then train end to end."""
    return _cut(entry, lambda by_unit: torch.stack([w.square().sum(1) for w in by_unit]).sum(0))


def random_width(entry: Entry) -> Any:
    """Keep heads and channels drawn at random; then train end to end."""
    rng = seeds.generator(entry.run.seed, Seed(Stage.RANDOM_WIDTH), Purpose.PLAN)
    return _cut(entry, lambda by_unit: torch.from_numpy(rng.random(len(by_unit[0]), dtype=np.float32)))
