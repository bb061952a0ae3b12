"""The tensors of one block: which of them a width needs, where the units of a group lie in them, how they grow."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import nn

from ppcl_rt.checkpoint.reader import Checkpoint
from ppcl_rt.model.block import NotLoaded, PluggableBlock, without_adapters
from ppcl_rt.ops.quantised import QuantisedLinear
from ppcl_rt.planning.block_spec import BlockSpec, Output, Part, Stream
from ppcl_rt.planning.width import Width


class Missing(NamedTuple):
    """A tensor that a block lacks, or holds too little of.

    Attributes:
        name: inside the block.
        tensor: as it was read, at the counts that are needed.
        part: the part that it is the weight or bias of; None for other parameters and for replacements.
        counts: the counts that it was read at; empty for a tensor that has no units.
        with_bias: whether its layer has a bias.
    """

    name: str
    tensor: torch.Tensor
    part: Part | None = None
    counts: Width = Width()
    with_bias: bool = True


def rank_order(source: Checkpoint, name: str, units: int) -> torch.Tensor:
    """Read the rank order of a group ``[units]``; the order of the units themselves where the checkpoint has none.

    Raises:
        ValueError: it is no permutation.
    """
    order = source.read(name) if name in source else torch.arange(units)
    if order.is_floating_point() or not torch.equal(order.long().sort().values, torch.arange(units)):
        raise ValueError(f"{source.folder}: {name} is no permutation of 0..{units - 1}")
    return order.long()


def held_index(part: Part, counts: Width, orders: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Which rows (or columns) of the dense part are held at some counts, in the order in which they lie in memory.

    Segments keep their order, and so does what belongs to no group; the units of a segment lie in rank order. A group
    that the block does not run has no units.
    """
    pieces, end = [], 0
    for segment in part.segments:
        order = orders[segment.group]
        units = order[: counts.get(segment.group, 0), None] * segment.unit + torch.arange(segment.unit)
        pieces += [torch.arange(end, segment.offset), segment.offset + units.reshape(-1)]
        end = segment.offset + segment.unit * len(order)
    pieces.append(torch.arange(end, part.rows if part.axis == 0 else part.columns))
    return torch.cat(pieces)


def has_units(part: Part, name: str) -> bool:
    """Whether a tensor of a part (its weight or bias) has an axis along which units lie."""
    return part.axis == 0 or (part.axis == 1 and name.endswith("weight"))


def first_units(part: Part, name: str, tensor: torch.Tensor, counts: Width, block: PluggableBlock) -> torch.Tensor:
    """The first units of a stock tensor in rank order; the tensor itself where it has no units."""
    if not has_units(part, name):
        return tensor
    assert part.axis is not None, "units lie along an axis"
    return tensor.index_select(part.axis, held_index(part, counts, block.orders))


def restore(stock: torch.Tensor, held: torch.Tensor, name: str, block: PluggableBlock) -> torch.Tensor:
    """``stock`` with what a block holds of it put back in its place.

    Args:
        stock: a tensor as it lies in the checkpoint.
        held: the same as the block holds it.
        name: of the tensor inside the block.
    """
    parts = {part.path: part for part in block.spec.parts}
    part = parts.get(name.rpartition(".")[0])
    if part is not None and has_units(part, name):
        assert part.axis is not None, "units lie along an axis"
        index = held_index(part, block.held[part.path], block.orders)
        return stock.to(held.dtype, copy=True).index_copy_(part.axis, index, held)
    if stock.shape == held.shape:
        return held
    # A factor of a lower rank is the first rows or columns of one of a higher rank.
    whole = stock.to(held.dtype, copy=True)
    whole[tuple(slice(size) for size in held.shape)] = held
    return whole


def missing_tensors(
    source: Checkpoint, block: PluggableBlock, prefix: str, width: Width, not_updated: Collection[Stream], fresh: bool
) -> Iterator[Missing]:
    """Read what a block needs in order to run a width, and does not hold yet.

    Args:
        prefix: what the names of the block's tensors begin with in the checkpoint.
        not_updated: streams that the block leaves as they were.
        fresh: whether the block holds nothing yet.
    """
    if source.catalog is not None and source.catalog.only is not None:
        yield from _as_stored(source, block, prefix, width, fresh)
        return
    spec = block.spec
    if fresh:
        paths = {part.path for part in spec.parts}
        for name in block.state_dict():
            if name.rpartition(".")[0] not in paths:
                yield Missing(name, source.read(prefix + name))
    for part in spec.parts:
        if not spec.runs(part, not_updated):
            continue
        counts = _counts_to_read(source, block, part, prefix, width)
        if counts is not None:
            for which in ("weight", "bias") if part.bias else ("weight",):
                name = f"{part.path}.{which}"
                tensor = first_units(part, name, source.read(prefix + name), counts, block)
                yield Missing(name, tensor, part, counts, part.bias)
    for output in spec.outputs:
        if spec.runs(output.part, not_updated):
            yield from _replacement(source, block, output, prefix, width)
    for group in spec.rank_groups:
        yield from _factors(source, block, group, prefix, width, not_updated)


def _as_stored(source: Checkpoint, block: PluggableBlock, prefix: str, width: Width, fresh: bool) -> Iterator[Missing]:
    """All that a checkpoint of one plan holds of a block, but for what is held already: it lies there as it runs."""
    parts, order = {part.path: part for part in block.spec.parts}, f"{prefix}order."
    # A layer is made when its weight comes, so weights come before biases.
    for stored in sorted(source.names, key=lambda name: name.endswith(".bias")):
        if not stored.startswith(prefix) or stored.startswith(order):
            continue
        name = stored.removeprefix(prefix)
        path = name.rpartition(".")[0]
        part = parts.get(path)
        replaced = path.removeprefix("replacements.")
        is_held = path in block.held if part is not None else replaced == path or replaced in block.replacements
        if fresh or not is_held:
            counts = Width() if part is None else block.counts_of(part, width)
            yield Missing(name, source.read(stored), part, counts, f"{prefix}{path}.bias" in source)


def is_replaced(source: Checkpoint, spec: BlockSpec, output: Output, prefix: str, count: int) -> bool:
    """Whether a replacement runs in place of an output at a count."""
    name = f"{prefix}replacements.{spec.replacement(output.name, count)}.weight"
    return count < spec.groups[output.segment.group].count and name in source


def _counts_to_read(source: Checkpoint, block: PluggableBlock, part: Part, prefix: str, width: Width) -> Width | None:
    """The counts at which a part has to be read, None where what is held of it is enough."""
    spec, held = block.spec, block.held.get(part.path)
    if part.factored:
        full = spec.groups[part.factored].count
        return Width({part.factored: full}) if width[part.factored] == full and held is None else None
    if part.axis is None:
        return Width() if held is None else None
    wanted = block.counts_of(part, width)
    if part.axis == 0 and not any(wanted.values()):
        # A linear map stands in for all of it.
        return None
    outputs = [output for output in spec.outputs if output.part is part]
    if outputs and not outputs[0].shared and is_replaced(source, spec, outputs[0], prefix, *wanted.values()):
        return None
    if held is not None and wanted.within(held):
        return None
    return wanted.union(held or Width())


def _replacement(
    source: Checkpoint, block: PluggableBlock, output: Output, prefix: str, width: Width
) -> Iterator[Missing]:
    count = width[output.segment.group]
    name = block.spec.replacement(output.name, count)
    if is_replaced(source, block.spec, output, prefix, count) and name not in block.replacements:
        path = f"replacements.{name}"
        # What stands in for one group of several adds to the part without a bias of its own.
        with_bias = f"{prefix}{path}.bias" in source
        for which in ("weight", "bias") if with_bias else ("weight",):
            tensor = source.read(f"{prefix}{path}.{which}")
            yield Missing(f"{path}.{which}", tensor, with_bias=with_bias)


def _factors(
    source: Checkpoint,
    block: PluggableBlock,
    group: str,
    prefix: str,
    width: Width,
    not_updated: Collection[Stream],
) -> Iterator[Missing]:
    """The two factors of the parts of a rank group, as far as a rank needs them: first rows and first columns."""
    parts = [part for part in block.spec.factored_by(group) if block.spec.runs(part, not_updated)]
    rank = width.get(group, 0)
    if not parts or rank == block.spec.groups[group].count:
        return
    down = block.spec.shared_factor(group)
    if down not in block.replacements or block.factor(down).out_features < rank:
        for which in ("weight", "bias"):
            path = f"replacements.{down}.{which}"
            yield Missing(path, source.read(f"{prefix}{path}")[:rank].contiguous())
    for part in block.spec.factored_by(group):
        up = part.name
        if block.spec.runs(part, not_updated) and (up not in block.replacements or block.factor(up).in_features < rank):
            path = f"replacements.{up}"
            yield Missing(f"{path}.weight", source.read(f"{prefix}{path}.weight")[:, :rank].contiguous())
            yield Missing(f"{path}.bias", source.read(f"{prefix}{path}.bias"))


def assign(block: PluggableBlock, missing: Missing, tensor: torch.Tensor) -> None:
    """Put a tensor into a block, making or resizing its linear layer; what the block held of it is kept.

    A weight that is held quantised takes the place of what was held.
    """
    path, _, which = missing.name.rpartition(".")
    parent, _, leaf = path.rpartition(".")
    home: Any = block.get_submodule(parent)
    while leaf and "base_layer" in getattr(home._modules.get(leaf), "_modules", ()):
        # Inside what adapters put around it.
        home, leaf = home._modules[leaf], "base_layer"
    module: Any = home._modules.get(leaf) if leaf else home
    if which == "weight" and (format := block.format_of(path)) is not None:
        if not isinstance(module, QuantisedLinear):
            module = QuantisedLinear(format)
            home.add_module(leaf, module)
        module.hold(tensor)
        _is_held(block, missing, which)
        return
    old = getattr(module, which, None) if leaf else None
    if isinstance(old, nn.Parameter) and not old.is_meta:
        # What is resident may have been trained since: a block grows around it.
        _keep_held(block, missing, tensor, old)
    if which == "weight" and tensor.ndim == 2 and isinstance(module, (NotLoaded, type(None))):
        home.add_module(leaf, nn.Linear(tensor.shape[1], tensor.shape[0], bias=missing.with_bias, device="meta"))
    module = home.get_submodule(leaf)
    setattr(module, which, nn.Parameter(tensor, requires_grad=tensor.requires_grad))
    if isinstance(module, nn.Linear) and which == "weight":
        module.out_features, module.in_features = tensor.shape
    _is_held(block, missing, which)


def _is_held(block: PluggableBlock, missing: Missing, which: str) -> None:
    if missing.part is not None and (which == "bias" or not missing.with_bias):
        # The bias comes after the weight: only now is the part held at the new counts.
        block.held[missing.part.path] = missing.counts


def _keep_held(block: PluggableBlock, missing: Missing, tensor: torch.Tensor, old: torch.Tensor) -> None:
    """Copy what is held into its place in a wider tensor, whatever the dtypes and devices of the two."""
    part = missing.part
    with torch.no_grad():
        if part is None or not has_units(part, missing.name):
            tensor[tuple(slice(size) for size in old.shape)] = old
            return
        assert part.axis is not None, "units lie along an axis"
        # What is held of a segment is its first units in rank order: pieces without gaps, here as there.
        held, here, there, end = block.held[part.path], 0, 0, 0
        for segment in part.segments:
            whole, units = segment.offset - end, segment.unit * held.get(segment.group, 0)
            tensor.narrow(part.axis, there, whole + units).copy_(old.narrow(part.axis, here, whole + units))
            here += whole + units
            there += whole + segment.unit * missing.counts.get(segment.group, 0)
            end = segment.offset + segment.unit * block.spec.groups[segment.group].count
        rest = old.shape[part.axis] - here
        tensor.narrow(part.axis, there, rest).copy_(old.narrow(part.axis, here, rest))


def held_at(block: PluggableBlock, width: Width, not_updated: Collection[Stream]) -> Iterator[tuple[str, torch.Tensor]]:
    """What a block reads when it runs a width, by name inside the block; where it is narrower, its rank orders too.

    Args:
        not_updated: streams that the block leaves as they were.
    """
    spec, state = block.spec, without_adapters(block.state_dict())
    paths = {part.path for part in spec.parts}
    yield from ((n, t) for n, t in state.items() if n.rpartition(".")[0] not in paths and not n.startswith("replace"))
    for part in spec.parts:
        if spec.runs(part, not_updated):
            yield from _part_at(block, part, width, state)
    for group, order in block.orders.items():
        if width.get(group, 0) < spec.groups[group].count:
            yield f"order.{group}", order


def _part_at(
    block: PluggableBlock, part: Part, width: Width, state: Mapping[str, torch.Tensor]
) -> Iterator[tuple[str, torch.Tensor]]:
    spec = block.spec
    whole = tuple((which, f"{part.path}.{which}") for which in ("weight", "bias") if f"{part.path}.{which}" in state)
    if part.factored:
        rank = width[part.factored]
        if rank == spec.groups[part.factored].count:
            yield from ((name, state[name]) for _, name in whole)
            return
        down, up = f"replacements.{spec.shared_factor(part.factored)}", f"replacements.{part.name}"
        yield from ((f"{down}.{which}", state[f"{down}.{which}"][:rank]) for which in ("weight", "bias"))
        yield f"{up}.weight", state[f"{up}.weight"][:, :rank]
        yield f"{up}.bias", state[f"{up}.bias"]
        return
    counts = block.counts_of(part, width)
    for output in (output for output in spec.outputs if output.part is part):
        prefix = f"replacements.{spec.replacement(output.name, width[output.segment.group])}."
        replacing = [name for name in state if name.startswith(prefix)]
        yield from ((name, state[name]) for name in replacing)
        if replacing and not output.shared:
            return
    if part.axis == 0 and counts and not any(counts.values()):
        return
    for _, name in whole:
        yield name, _narrowed(block, part, name, state[name], counts)


def _narrowed(block: PluggableBlock, part: Part, name: str, held: torch.Tensor, counts: Width) -> torch.Tensor:
    """The first units of what a block holds of a part."""
    if not has_units(part, name):
        return held
    assert part.axis is not None, "units lie along an axis"
    pieces, here, end = [], 0, 0
    for segment in part.segments:
        # Rows of no group, then the units of one.
        start = here + segment.offset - end
        pieces.append(torch.arange(here, start + segment.unit * counts.get(segment.group, 0)))
        here = start + segment.unit * block.held[part.path].get(segment.group, 0)
        end = segment.offset + segment.unit * block.spec.groups[segment.group].count
    pieces.append(torch.arange(here, held.shape[part.axis]))
    return held.index_select(part.axis, torch.cat(pieces).to(held.device))
