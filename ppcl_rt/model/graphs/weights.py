"""The modules that a graph was captured on: whether a graph can hold them, and whether they have changed since."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain
from operator import is_
from typing import Any

import torch
from torch import nn

from ppcl_rt import ops


class Weights:
    """The modules that a forward reads, as they are when this is made.

    Args:
        model: compared in its own parameters, buffers and list of children. Hooks on it and attributes of it do not
            matter here (`hooks_of` has to be asked).
        modules: all else that the forward reads; compared with all that they contain.
    """

    def __init__(self, model: nn.Module, modules: Iterable[nn.Module]) -> None:
        # Flat lists, which are compared without a loop in python: 60 blocks of a 20B model are 2,400 modules and 1,900
        # parameters.
        self._inside = list(dict.fromkeys(each for module in modules for each in module.modules()))
        package = type(model).__module__.partition(".")[0]
        self._known_packages = (f"{package}.", "torch.nn.modules.", "diffusers.models.", "ppcl_rt.")
        every = (model, *self._inside)
        self._dicts_of_modules = [module._modules for module in every if module._modules]
        self._dicts_of_tensors = [held for m in every for held in (m._parameters, m._buffers) if held]
        self._modules, self._held = _values(self._dicts_of_modules), _values(self._dicts_of_tensors)
        self.tensors = [each for each in self._held if each is not None]
        self._addresses = [*map(torch.Tensor.data_ptr, self.tensors)]
        # A new attribute may be a hook, a replaced forward or a compiled forward.
        self._attributes = [module.__dict__ for module in self._inside]
        self._attribute_counts = [*map(len, self._attributes)]
        self._forwards = [(a, a["forward"]) for a in self._attributes if "forward" in a]
        self._adapted = [module for module in self._inside if "lora_A" in module._modules]
        self._factors = [t for m in self._adapted for t in _factors_of(m)]
        self._adapters = _adapters_of(self._adapted, self._factors)
        self._settled = [*map(ops.settled, self._adapted)]
        self._hooks: list[Any] = [hooks for m in self._inside for hooks in (m._forward_hooks, m._forward_pre_hooks)]

    def unchanged(self) -> bool:
        """Whether modules, parameters and buffers are the same objects at the same addresses, and have no hooks.

        Weights that are trained in place count as unchanged: a graph reads their memory.
        """
        # Tensors are compared one by one with `is`: `==` of lists would compare their values on the device.
        held = _values(self._dicts_of_tensors)
        return (
            not any(self._hooks)
            and _values(self._dicts_of_modules) == self._modules
            and len(held) == len(self._held)
            and all(map(is_, held, self._held))
            and [*map(torch.Tensor.data_ptr, self.tensors)] == self._addresses
            and [*map(len, self._attributes)] == self._attribute_counts
            and all(attributes.get("forward") is forward for attributes, forward in self._forwards)
            and (not self._adapted or self._adapters_settled())
        )

    def _adapters_settled(self) -> bool:
        """Whether the graph reads what adapters add now: scales and factors are written to where it reads them.

        Not where the number of adapters, or their ranks, do not fit there, nor for layers that are called.
        """
        # Taking layers apart takes microseconds each: only where something changed.
        adapters = _adapters_of(self._adapted, self._factors)
        if adapters != self._adapters:
            if [*map(ops.settled, self._adapted)] != self._settled:
                return False
            self._adapters = adapters
        return True

    def obstacle(self, device: torch.device) -> str:
        """Say why no graph can hold these modules; an empty string if one can."""
        for module in self._inside:
            kind = type(module)
            if reason := hooks_of(module):
                return reason
            can_be_read = "lora_A" in module._modules and ops.adapted(module)[0] is not module
            if not can_be_read and not kind.__module__.startswith(self._known_packages):
                return f"a {kind.__name__} of {kind.__module__.partition('.')[0]} among the layers"
            if "_compiled_call_impl" in module.__dict__:
                return "compiled layers"
        for tensor in self.tensors:
            if type(tensor) not in (torch.Tensor, nn.Parameter):
                return f"weights that are a {type(tensor).__name__}"
            if tensor.device != device:
                return "weights on another device than the inputs"
        return ""


def _values(dicts: list[dict[str, Any]]) -> list[Any]:
    return [*chain.from_iterable(map(dict.values, dicts))]


def _factors_of(layer: Any) -> list[torch.Tensor]:
    """The factors of a layer's adapters, and scales that are tensors."""
    scales = [scale for scale in layer.scaling.values() if isinstance(scale, torch.Tensor)]
    return [*layer.lora_A.parameters(), *layer.lora_B.parameters(), *scales]


def _adapters_of(layers: list[nn.Module], factors: list[torch.Tensor]) -> list[Any]:
    """What is set of the adapters of layers: scales, which of them are active, and the versions of their factors."""
    own: list[dict[str, Any]] = [layer.__dict__ for layer in layers]
    return [
        [dict(each["scaling"]) for each in own],
        [each["_active_adapter"] for each in own],
        [(each["_disable_adapters"], *each["merged_adapters"]) for each in own],
        [0 if t.is_inference() else t._version for t in factors],
    ]


def hooks_of(module: nn.Module) -> str:
    """Name what was put around the forward of a module; an empty string if nothing was."""
    own = module.__dict__
    if module._forward_hooks or module._forward_pre_hooks:
        return "forward hooks"
    if "_hf_hook" in own:
        return "hooks of accelerate"
    if getattr(own.get("_diffusers_hook"), "hooks", None):
        return "hooks of diffusers"
    # When diffusers removes its last hook, it leaves the module's own forward among the attributes.
    forward = own.get("forward")
    if forward is not None and getattr(forward, "__func__", None) is not type(module).forward:
        return "a replaced forward"
    return ""
