"""Methods that cut every block to one width: no block is left out, nothing compensates for what is cut."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ppcl_rt import Plan, Shape, Width
from ppcl_train.compare.entry import Entry, UnreachableError
from ppcl_train.compare.training import train_end_to_end

# The groups that are cut: heads, and the channels of both MLPs.
_CUT = ("heads", "image", "text")

# Weights of a group's tensors, each ``[units, ...]`` -> score of each unit ``[units]``.
Score = Callable[[list[torch.Tensor]], torch.Tensor]


def width_within(shape: Shape, ratio: float) -> Width:
    """Find the width of all blocks that meets a ratio, heads and channels cut by about the same share.

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


def _cut(entry: Entry, score: Score) -> Any:
    """Cut every block to one width, keeping the units of the highest score, and train end to end for all steps."""
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
            by_unit = [p.movedim(axis, 0).unflatten(0, (units, -1)).flatten(1) for p, axis in tensors.values()]
            order = score(by_unit).cpu().argsort(descending=True, stable=True)
            for parameter, axis in tensors.values():
                unit = parameter.shape[axis] // units
                index = (order[:, None] * unit + torch.arange(unit)).flatten()
                parameter.data = parameter.data.index_select(axis, index.to(entry.device))
    catalog = model.catalog
    model.set_plan(Plan.of(catalog.fingerprint, shape.depth, [(block, width) for block in range(shape.depth)]))
    return train_end_to_end(entry, model, entry.run.compare.steps)


def magnitude_width(entry: Entry) -> Any:
    """Keep the heads and channels with the largest weights; then train end to end."""
    return _cut(entry, lambda by_unit: torch.stack([w.square().sum(1) for w in by_unit]).sum(0))


def random_width(entry: Entry) -> Any:
    """Keep heads and channels drawn at random; then train end to end."""
    generator = torch.Generator().manual_seed(entry.run.seed)
    return _cut(entry, lambda by_unit: torch.rand(len(by_unit[0]), generator=generator))
