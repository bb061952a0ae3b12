"""Linear layer over a prefix of its channels: ``y = x W[:n, :k]^T + b[:n]``.

Weights lie in rank order, so a narrower layer is a prefix of a wider one: ``n`` is read off as asked, ``k`` off ``x``.
"""

import torch
import torch.nn.functional as F


def linear_reference(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, out_features: int | None = None
) -> torch.Tensor:
    """Multiply ``x [..., k]`` by the first ``k`` columns and first ``out_features`` rows of ``weight [N, K]``.

    Returns:
        ``[..., out_features]`` (all N rows where ``out_features`` is None).

    Raises:
        ValueError: ``x`` or ``out_features`` is wider than the weight.
    """
    n, k = weight.shape[0] if out_features is None else out_features, x.shape[-1]
    if n > weight.shape[0] or k > weight.shape[1]:
        raise ValueError(f"wanted {n} outputs of {k} inputs, the weight holds {weight.shape[0]} of {weight.shape[1]}")
    # Slices are views: what is left out is neither read nor multiplied.
    return F.linear(x, weight[:n, :k], None if bias is None else bias[:n])
