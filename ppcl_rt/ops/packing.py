"""Weights of q, k and v next to each other in memory, so that one batched matrix product makes all three."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

import ppcl_kernels as kernels


def side_by_side(parts: Sequence[torch.Tensor | None]) -> torch.Tensor | None:
    """View tensors of one shape as one tensor ``[parts, ...]``, without a copy.

    `pack` lays the weights of a block out in this way when the block is loaded or moved. Code that replaces one of the
    weights takes them apart again, without notice, so this is asked in each call.

    Returns:
        The view; None unless the tensors lie in one storage at equal distances.
    """
    tensors = [t for t in parts if t is not None]
    if len(tensors) < len(parts):
        return None
    first, others = tensors[0], tensors[1:]
    distance = others[0].data_ptr() - first.data_ptr()
    if distance < first.numel() * first.itemsize or distance % first.itemsize:
        return None
    storage = first.untyped_storage().data_ptr()
    for number, t in enumerate(others, 1):
        if (
            t.data_ptr() - first.data_ptr() != number * distance
            or t.shape != first.shape
            or t.stride() != first.stride()
            or t.dtype != first.dtype
            or t.untyped_storage().data_ptr() != storage
        ):
            return None
    return first.as_strided((len(parts), *first.shape), (distance // first.itemsize, *first.stride()))


def pack(*modules: nn.Module) -> None:
    """Copy the weights of linear modules of one shape to places side by side in memory, if they are not so already.

    The modules keep their parameter objects, whose data become views of one tensor: names, state dicts, optimisers and
    adapters see no difference. Nothing happens where no kernel could run, where a module holds anything but a plain
    parameter of the same shape, dtype and device as the others, or where a parameter was made in inference mode (its
    data cannot be replaced).
    """
    weights: list[Any] = [getattr(module, "weight", None) for module in modules]
    if (
        any(type(p) is not nn.Parameter or not kernels.can_run(p) or p.shape != weights[0].shape for p in weights)
        or any(p.is_inference() for p in weights)
        or len({(p.dtype, p.device) for p in weights}) > 1
        or side_by_side(weights) is not None
    ):
        return
    with torch.inference_mode(False):
        for weight, view in zip(weights, torch.stack([p.detach() for p in weights]), strict=True):
            weight.data = view
