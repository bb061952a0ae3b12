"""MLP over the first ``c`` hidden channels: ``y = gelu_tanh(x U[:c]^T + u[:c]) V[:, :c]^T + v``."""

import torch
import torch.nn.functional as F

from ppcl_kernels.linear import linear_reference


def mlp_reference(
    x: torch.Tensor,
    up: torch.Tensor,
    up_bias: torch.Tensor | None,
    down: torch.Tensor,
    down_bias: torch.Tensor | None,
    channels: int | None = None,
) -> torch.Tensor:
    """Apply the MLP to ``x [..., D]`` with ``up [C, D]`` and ``down [D, C]`` in rank order, ``channels <= C`` kept."""
    hidden = F.gelu(linear_reference(x, up, up_bias, channels), approximate="tanh")
    return linear_reference(hidden, down, down_bias)
