"""One plan of a checkpoint in a format of its own: ours, the authors', diffusers', or one file with original names."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_args

import torch

from ppcl_rt.checkpoint import card
from ppcl_rt.checkpoint.writer import in_shards, write_file, write_plain
from ppcl_rt.convert.authors import write_authors
from ppcl_rt.convert.formats import CONFIG_IN_FILE, Format, Types
from ppcl_rt.convert.ggufs import write_gguf
from ppcl_rt.convert.whole import check_whole
from ppcl_rt.model.pluggable import Pluggable
from ppcl_rt.model.residency import READING
from ppcl_rt.model.tensors import restore
from ppcl_rt.planning.plan import Plan
from ppcl_rt.planning.planner import Planner


def export(model: Pluggable, out: Path, format: Format, types: Types = "BF16") -> None:
    """Write what a model runs now in a format, and nothing else.

    Args:
        model: with the plan set. Weights are written in its dtype.
        out: folder or file; one that is there already is replaced once the new one is complete.
        format: see `Format`.
        types: of ``gguf``: what the linear weights of the blocks are written in, F32, F16, BF16 or Q8_0.

    Raises:
        ValueError: the format cannot hold the plan, with the nearest one that it holds; or ``out`` cannot be written.
    """
    check(model.planner, model.plan, format)
    if format == "ppcl":
        model.save_plan(out)
    elif format == "authors":
        write_authors(model, out)
    elif format == "diffusers":
        tensors = {**stock_outer(model), **stock_blocks(model)}
        write_plain(out, stock_config(model), in_shards(tensors), _origin(model), _said(model))
    elif format == "gguf":
        if not model.gguf_architecture:
            raise ValueError(f"the family {model.family} does not say what readers of GGUF know it as")
        outer, blocks = (model.to_original(tensors) for tensors in (stock_outer(model), stock_blocks(model)))
        write_gguf(out, model.gguf_architecture, outer, blocks, stock_config(model), _origin(model), types)
    else:
        metadata = {**card.metadata(_origin(model)), CONFIG_IN_FILE: json.dumps(stock_config(model))}
        write_file(out, model.to_original({**stock_outer(model), **stock_blocks(model)}), metadata)


def check(planner: Planner, plan: Plan, format: Format, within: Callable[[Planner], Plan] | None = None) -> None:
    """Refuse a plan that a format cannot hold; weights are not looked at.

    Args:
        planner: of the checkpoint.
        within: has a planner make a plan for the budget that ``plan`` was made for; None for the plan's ratio.

    Raises:
        ValueError: says what is in the way, and the nearest plan that the format holds.
    """
    if format not in get_args(Format):
        raise ValueError(f"a format is {', '.join(get_args(Format))}, not {format}")
    # What the authors' layout holds is for the family to say, once its weights are read.
    if format in ("ppcl", "authors"):
        return
    ratio = planner.catalog.ratio(plan)
    check_whole(planner, plan, within or (lambda others: others.plan(ratio)), f"the format {format}")


def stock_config(model: Pluggable) -> dict[str, Any]:
    """``config.json`` of diffusers' class for the blocks that are left.

    Raises:
        ValueError: the class needs a block of each list, or another kind of block at some place than is left there.
    """
    architecture, plan = model.catalog.architecture, model.plan
    blocks = [planned.interval.first for planned in plan.blocks]
    config = {**model.stock_config, **model.settings_of(architecture, blocks)}
    if empty := next((name for name in model.depth_settings if config[name] < 1), None):
        raise ValueError(f"the plan leaves no block of {empty}: {model.stock_name} needs one")
    built = type(model).architecture_of(config, architecture.outer_params)
    for place, block in enumerate(blocks):
        if built.kind(place) != (kind := architecture.kind(block)):
            raise ValueError(f"block {block} is of kind {kind}, {model.stock_name} has {built.kind(place)} there")
    return config


def stock_outer(model: Pluggable) -> dict[str, torch.Tensor]:
    """The tensors outside the blocks, by their stock names."""
    homes = tuple(f"{home}." for home in (*model.block_lists, "students", "text_runs"))
    return {name: tensor for name, tensor in model.state_dict().items() if not name.startswith(homes)}


def stock_blocks(model: Pluggable) -> dict[str, torch.Tensor]:
    """The tensors of the blocks that run, whole ones, by stock names and new numbers, units in stock order."""
    with READING:
        program = model.prepare(model.plan)
    architecture, counted = model.catalog.architecture, dict.fromkeys(model.block_lists, 0)
    found: dict[str, torch.Tensor] = {}
    for call, planned in zip(program.calls, program.plan.blocks, strict=True):
        path = architecture.place(planned.interval.first).path
        found |= {f"{path}.{counted[path]}.{name}": tensor for name, tensor in _in_stock_order(call.block)}
        counted[path] += 1
    return found


def _in_stock_order(block: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of a block that holds all of its parts, next to whatever stands in for them."""
    for name, held in block.state_dict().items():
        if not name.startswith("replacements."):
            yield name, restore(torch.empty_like(held), held, name, block)


def _origin(model: Pluggable) -> card.Origin:
    return card.Origin(model.catalog.base_model, model.catalog.license)


def _said(model: Pluggable) -> str:
    architecture, plan = model.catalog.architecture, model.plan
    left, students = len(plan.blocks), sum(planned.student for planned in plan.blocks)
    params = architecture.params(plan) / 1e9
    return (
        f"{left} blocks in place of {architecture.depth}, {students} of them distilled, {params:.3g} billion parameters"
    )
