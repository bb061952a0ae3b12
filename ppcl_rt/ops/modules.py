"""Whether an operation may read the weights of a module, or has to call the module instead."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from diffusers.models.normalization import RMSNorm
from torch import nn

import ppcl_kernels as kernels
from ppcl_rt.ops.quantised import QuantisedLinear


class Streams(NamedTuple):
    """The image half and the text half of something, by name, because diffusers' order differs from place to place."""

    image: torch.Tensor
    text: torch.Tensor


def is_plain(module: Any) -> bool:
    """Whether reading the weights gives what calling the module gives.

    It does not for adapters, modules with hooks, and quantised weights: these modules have to be called.
    """
    # This runs for every layer in every forward. Look-ups in dictionaries take a fraction of the time of `hasattr` on a
    # module, which takes microseconds.
    own = module.__dict__
    return (
        type(module) in _PLAIN_MODULES
        and type(own["_parameters"].get("weight")) in _PLAIN_WEIGHTS
        # As `has_hooks`, without another call.
        and not own["_forward_hooks"]
        and not own["_forward_pre_hooks"]
        and "forward" not in own
        and "_hf_hook" not in own
        and "_diffusers_hook" not in own
    )


def has_hooks(module: nn.Module) -> bool:
    """Whether calling a module does more than its class says: hooks, or another forward."""
    own = module.__dict__
    return bool(
        own["_forward_hooks"]
        or own["_forward_pre_hooks"]
        or "forward" in own
        or "_hf_hook" in own
        or "_diffusers_hook" in own
    )


class Branch(NamedTuple):
    """What an adapter (LoRA) adds to a linear layer: ``scale * (x down^T) up^T``.

    Attributes:
        down: ``[r, columns]``.
        up: ``[rows, r]``.
        scale: of the adapter as it is set now; a tensor of one number after diffusers' `enable_lora_hotswap`.
    """

    down: torch.Tensor
    up: torch.Tensor
    scale: float | torch.Tensor

    def __call__(self, x: torch.Tensor, rows: int, first: int = 0) -> torch.Tensor:
        """``[..., rows]``, the first of them, for ``x [..., k]``, which stands at the columns from ``first`` on."""
        return F.linear(F.linear(x, self.down[:, first : first + x.shape[-1]]), self.up[:rows]) * self.scale


def adapted(module: Any) -> tuple[Any, tuple[Branch, ...]]:
    """Take a linear layer with adapters apart: the layer itself, and what its adapters add now.

    Returns:
        The module and nothing for one without adapters, and for one that has to be called: with hooks, with dropout, or
        with adapters that are more than two factors.
    """
    own = module.__dict__
    modules = own["_modules"]
    if "lora_A" not in modules or "base_layer" not in modules:
        return module, ()
    if own["_forward_hooks"] or own["_forward_pre_hooks"] or "forward" in own or own.get("lora_variant"):
        return module, ()
    merged, disabled = own["merged_adapters"], own["_disable_adapters"]
    if merged or disabled:
        # A layer that is disabled while merged is unmerged by calling it.
        return (module, ()) if merged and disabled else (modules["base_layer"], ())
    branches = []
    for name in module.active_adapters:
        down = modules["lora_A"]._modules.get(name)
        if down is None:
            continue
        up, dropout = modules["lora_B"]._modules[name], modules["lora_dropout"]._modules[name]
        random = module.training and not isinstance(dropout, nn.Identity)
        if random or up._parameters.get("bias") is not None or not (is_plain(down) and is_plain(up)):
            return module, ()
        branches.append(Branch(down._parameters["weight"], up._parameters["weight"], own["scaling"][name]))
    return modules["base_layer"], tuple(branches)


_PLAIN_MODULES = (nn.Linear, nn.LayerNorm, RMSNorm)
_PLAIN_WEIGHTS = (nn.Parameter, type(None))


def parameter(module: nn.Module | None, name: str) -> Any:
    """Return a parameter of a plain module; None if the module has none, or is None.

    Access as an attribute would take half a microsecond.
    """
    return None if module is None else module._parameters.get(name)


def readable(x: torch.Tensor, *modules: Any, others: tuple[torch.Tensor | None, ...] = ()) -> bool:
    """Whether an operation on the weights of modules gives what calling the modules would give.

    It does if all modules are plain, autocast is off, and nothing requires a gradient.

    Args:
        x: the input.
        modules: all modules whose weights the operation reads; None where there is no module.
        others: all other tensors that the operation reads.
    """
    if torch.is_autocast_enabled(x.device.type):
        return False
    for module in modules:
        if module is not None and not is_plain(module):
            return False
    if not torch.is_grad_enabled():
        return True
    weights = (p for module in modules if module is not None for p in module._parameters.values())
    return not any(t is not None and t.requires_grad for t in (x, *others, *weights))


def linear(module: Any, x: torch.Tensor, out_features: int | None = None) -> torch.Tensor:
    """Apply a linear module to ``x [..., k]``: its first ``out_features`` rows (None: all) and first ``k`` columns."""
    base, branches = adapted(module)
    is_quantised = type(base) is QuantisedLinear
    if (is_quantised or is_plain(base)) and all(branch.down.dtype == x.dtype for branch in branches):
        # A quantised layer is called, so that its hooks run.
        how = base if is_quantised else partial(kernels.linear_reference, weight=base.weight, bias=base.bias)
        y = how(x, out_features=out_features)
        for branch in branches:
            y = y + branch(x, y.shape[-1])
        return y
    # Correct for whatever wraps a linear layer, but it computes the full width.
    return module(F.pad(x, (0, module.in_features - x.shape[-1])))[..., :out_features]
