"""Why a forward can be neither captured nor replayed, as far as its inputs and the state of torch decide it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import chain
from typing import Any

import torch
from torch import nn
from torch.autograd import forward_ad
from torch.nn.modules.module import _has_any_global_hook
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext

from ppcl_rt.model.graphs.backend import Backend

NOT_ON_CUDA = "not on a CUDA device"
# Types of inputs that become part of the key by their value.
_PLAIN_TYPES = (type(None), bool, int, float, str, torch.dtype, torch.device)


def obstacle_of_forward(
    backend: Backend,
    leaves: Sequence[Any],
    tensors: Sequence[torch.Tensor],
    modules: Callable[[], Iterable[nn.Module]],
) -> str:
    """Say why nothing can be captured or replayed here and now; an empty string if it can.

    Args:
        backend: what would capture.
        leaves: all inputs of the forward.
        tensors: those of them that are tensors.
        modules: gives the modules that the forward reads.
    """
    if not tensors or not all(backend.supports(tensor.device) for tensor in tensors):
        return NOT_ON_CUDA
    if backend.capturing():
        return "inside another capture"
    if torch._C._len_torch_dispatch_stack() or torch._C._functorch.peek_interpreter_stack():
        return "a dispatch mode"
    if torch._C._get_tracing_state():
        return "tracing"
    if any(type(mode) is not DeviceContext for mode in _get_current_function_mode_stack()):
        return "a function mode"
    if torch.is_autocast_enabled(tensors[0].device.type):
        return "autocast"
    if _has_any_global_hook():
        return "forward hooks"
    if any(tensor.device != tensors[0].device for tensor in tensors):
        return "inputs on several devices"
    for leaf in leaves:
        if type(leaf) not in (torch.Tensor, nn.Parameter, *_PLAIN_TYPES):
            return f"an input that is a {type(leaf).__name__}"
    if torch.is_grad_enabled():
        weights = chain.from_iterable(module.parameters() for module in modules())
        if any(tensor.requires_grad for tensor in chain(tensors, weights)):
            return "gradients"
    if forward_ad._current_level >= 0:
        return "gradients"
    return ""
