"""What may be read out of a module, and what has to be called instead."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from diffusers.models.normalization import RMSNorm
from torch import nn

import ppcl_kernels as kernels


class Streams(NamedTuple):
    """The image and the text half of something; diffusers swaps the order from place to place, this never does."""

    image: torch.Tensor
    text: torch.Tensor


def is_plain(module: Any) -> bool:
    """Whether weights may be read past the module: adapters, hooks and quantised tensors are to be called instead."""
    # Look-ups in dictionaries: this runs for every layer of every forward, and hasattr on a module takes microseconds.
    own = module.__dict__
    return (
        type(module) in _PLAIN
        and not own["_forward_hooks"]
        and not own["_forward_pre_hooks"]
        and "forward" not in own
        and "_hf_hook" not in own
        and "_diffusers_hook" not in own
        and type(own["_parameters"].get("weight")) in _WEIGHTS
    )


_PLAIN = (nn.Linear, nn.LayerNorm, RMSNorm)
_WEIGHTS = (nn.Parameter, type(None))


def parameter(module: nn.Module | None, name: str) -> Any:
    """Read a parameter of a plain module, None where there is none; an attribute would take half a microsecond."""
    return None if module is None else module._parameters.get(name)


def readable(x: torch.Tensor, *modules: Any, moving: tuple[torch.Tensor | None, ...] = ()) -> bool:
    """Whether an operation on the modules' tensors gives what calling them would.

    It does for plain weights, without gradient and autocast. ``moving`` is what else the operation reads; a module may
    be None.
    """
    if torch.is_autocast_enabled(x.device.type):
        return False
    for module in modules:
        if module is not None and not is_plain(module):
            return False
    if not torch.is_grad_enabled():
        return True
    held = (p for module in modules if module is not None for p in module._parameters.values())
    read = (x, *moving, *held)
    return not any(t is not None and t.requires_grad for t in read)


def linear(module: Any, x: torch.Tensor, out_features: int | None = None) -> torch.Tensor:
    """Apply the first ``out_features`` rows of a linear module to ``x [..., k]``, over its first ``k`` columns."""
    if is_plain(module):
        return kernels.linear_reference(x, module.weight, module.bias, out_features)
    # Correct for whatever wraps a linear layer, and as slow as the full width.
    return module(F.pad(x, (0, module.in_features - x.shape[-1])))[..., :out_features]
