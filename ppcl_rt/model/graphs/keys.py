"""What tells one graph from another: the layout of its inputs, and the settings of torch."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import torch


def describe(leaf: Any) -> Hashable:
    """Describe one input: the layout of a tensor, which may hold other values in each call; else type and value."""
    if isinstance(leaf, torch.Tensor):
        return (leaf.shape, leaf.stride(), leaf.dtype, leaf.device)
    # The type, because 1, 1.0 and True are equal, but are different inputs.
    return (type(leaf), leaf)


def torch_settings() -> Hashable:
    """Read the settings of torch that decide which kernels run."""
    cuda = torch.backends.cuda
    return (
        torch.get_float32_matmul_precision(),
        cuda.flash_sdp_enabled(),
        cuda.mem_efficient_sdp_enabled(),
        cuda.cudnn_sdp_enabled(),
        cuda.math_sdp_enabled(),
        cuda.matmul.allow_bf16_reduced_precision_reduction,
        cuda.matmul.allow_fp16_reduced_precision_reduction,
        torch.are_deterministic_algorithms_enabled(),
    )
