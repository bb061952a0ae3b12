"""peft's layers around linear layers of a block: their factors cut as the block's weights are, and put back."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from ppcl_rt.model.block import PluggableBlock
from ppcl_rt.model.factors import Factors
from ppcl_rt.model.program import BlockCall
from ppcl_rt.model.tensors import held_index
from ppcl_rt.planning.block_spec import Part


def cut_to(block: PluggableBlock, part: Part, factors: Factors) -> tuple[torch.Tensor, torch.Tensor]:
    """The factors of a part as a block holds it; of one that is not loaded, all in rank order."""
    if part.axis is None:
        return factors.down, factors.up
    index = held_index(part, block.held.get(part.path, block.counts_of(part, block.spec.full)), block.orders)
    if part.axis == 0:
        return factors.down, factors.up.index_select(0, index)
    return factors.down.index_select(1, index), factors.up


def put_back(block: PluggableBlock, part: Part, factors: Factors | None, layer: Any, name: str) -> Factors:
    """The factors, or zeros, with what a block's layer holds of them in its place."""
    if factors is None:
        nothing = (torch.zeros(layer.r[name], part.columns), torch.zeros(part.rows, layer.r[name]))
        factors = Factors(*nothing, layer.lora_alpha[name] / layer.r[name])
    down, up = (held[name].weight.detach().to(factors.down) for held in (layer.lora_A, layer.lora_B))
    # `enable_lora_hotswap` makes room for adapters of a higher rank.
    more = len(down) - len(factors.down)
    factors = factors._replace(down=F.pad(factors.down, (0, 0, 0, more)), up=F.pad(factors.up, (0, more)))
    if part.axis is None:
        return factors._replace(down=down, up=up)
    index = held_index(part, block.held.get(part.path, block.counts_of(part, block.spec.full)), block.orders)
    if part.axis == 0:
        return factors._replace(down=down, up=factors.up.index_copy(0, index, up))
    return factors._replace(down=factors.down.index_copy(1, index, down), up=up)


def adapts_modulations(call: BlockCall) -> bool:
    """Whether a call has adapters on what the timestep alone decides."""
    parts = (part.path for part in call.block.spec.parts if part.factored)
    return any("lora_A" in call.block.get_submodule(path)._modules for path in parts)


def set_scale(layer: Any, name: str, scale: float) -> None:
    """Have a layer add ``scale`` times the product of an adapter's factors."""
    # As peft counts it: the rank that the layer was made for, which a hot-swapped adapter need not have.
    layer.lora_alpha[name], layer.use_rslora[name] = scale * layer.r[name], False
    now = layer.scaling.get(name)
    if isinstance(now, torch.Tensor):
        # Made by `enable_lora_hotswap`: compiled code reads this very tensor.
        now.fill_(scale)
    else:
        layer.scaling[name] = scale


def set_as(layer: Any, other: Any, name: str) -> None:
    """Set one of peft's layers as another is set: what is active, how much of it, whether it is off or fused."""
    if other is None:
        return
    layer._active_adapter = other._active_adapter
    layer.scaling[name] *= other.scaling[name] * other.r[name] / other.lora_alpha[name]
    layer._disable_adapters = other._disable_adapters
    if name in other.merged_adapters and name not in layer.merged_adapters:
        layer.merged_adapters.append(name)
