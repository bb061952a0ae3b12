"""Whether an operation may read the weights of a module, or has to call the module instead."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from diffusers.models.normalization import RMSNorm
from torch import nn

import ppcl_kernels as kernels


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
        and not own["_forward_hooks"]
        and not own["_forward_pre_hooks"]
        and "forward" not in own
        and "_hf_hook" not in own
        and "_diffusers_hook" not in own
        and type(own["_parameters"].get("weight")) in _PLAIN_WEIGHTS
    )


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
    if is_plain(module):
        return kernels.linear_reference(x, module.weight, module.bias, out_features)
    # Correct for whatever wraps a linear layer, but it computes the full width.
    return module(F.pad(x, (0, module.in_features - x.shape[-1])))[..., :out_features]
