"""Checks of arguments that the public functions share, so that all refuse in the same words."""

from __future__ import annotations

from collections.abc import Iterable

import torch

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def wants_gradient(*tensors: torch.Tensor | None) -> bool:
    """Return whether the result needs a gradient: the references compute one, the kernels do not."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def check_like(like: torch.Tensor, **tensors: torch.Tensor | None) -> None:
    """Refuse tensors that a kernel cannot read together with ``like``.

    Raises:
        ValueError: a tensor has another device, another dtype, or a last dimension that is not contiguous.
    """
    dtype, device = like.dtype, like.device
    if dtype not in DTYPES:
        raise ValueError(f"kernels take float32, float16 or bfloat16, got {dtype}: cast, or call the reference")
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if tensor.device != device:
            raise ValueError(f"{name} is on {tensor.device}, wanted {device} as the first tensor: move it")
        if tensor.dtype != dtype:
            raise ValueError(f"{name} is {tensor.dtype}, wanted {dtype} as the first tensor: cast it")
        if tensor.dim() and tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
            raise ValueError(f"{name} has stride {tensor.stride(-1)} in its last dimension, wanted 1: .contiguous()")


def check_shape(name: str, tensor: torch.Tensor, shape: Iterable[int]) -> None:
    """Refuse a tensor of another shape.

    Raises:
        ValueError: the tensor has another shape.
    """
    shape = tuple(shape)
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name} is {list(tensor.shape)}, wanted {list(shape)}")


def check_weight(name: str, weight: torch.Tensor) -> None:
    """Refuse a weight that is not a matrix.

    Raises:
        ValueError: the weight is not a matrix.
    """
    if weight.dim() != 2:
        raise ValueError(f"{name} is {list(weight.shape)}, wanted [outputs, inputs]")


def check_index(index: torch.Tensor | None, x: torch.Tensor) -> None:
    """Refuse an index into modulations that does not hold one integer (0 or 1) for each token of ``x [B, S, D]``.

    Raises:
        ValueError: wrong device, dtype, shape or stride.
    """
    if index is None:
        return
    check_shape("index", index, x.shape[:2])
    if index.device != x.device:
        raise ValueError(f"index is on {index.device}, wanted {x.device}: move it")
    if index.dtype not in (torch.int32, torch.int64) or not index.is_contiguous():
        raise ValueError(f"index is {index.dtype} with strides {index.stride()}, wanted contiguous int32 or int64")


def check_modulation(
    name: str, modulation: torch.Tensor | None, x: torch.Tensor, channels: int, index: torch.Tensor | None
) -> None:
    """Refuse a modulation of ``x [B, S, D]`` that is not ``[B, channels]``, or ``[2 B, channels]`` with an index.

    Raises:
        ValueError: the modulation has another shape.
    """
    if modulation is not None:
        check_shape(name, modulation, (x.shape[0] * (1 if index is None else 2), channels))
