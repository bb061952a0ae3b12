"""RMSNorm of the heads of q and k: ``x / sqrt(mean(x^2) + eps) * g`` over the E channels of a head.

E head dimension. Eager reads and writes q and k twice for it. In a kernel that holds a whole head, it takes one sum for
each token.
"""

from __future__ import annotations

import torch

from ppcl_kernels._check import check_like, check_shape
from ppcl_kernels._triton import jit, tl

# RMSNorm weights of q and k, ``[E]``, or None for no norm.
Norms = tuple[torch.Tensor | None, torch.Tensor | None]


def rms_norm_reference(x: torch.Tensor, weight: torch.Tensor | None, eps: float) -> torch.Tensor:
    """Divide ``x [..., E]`` by its root mean square over E; the variance is float32, as in diffusers."""
    if weight is None:
        return x
    normed = x * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + eps)
    return normed.to(weight.dtype) * weight


def check_norms(norms: Norms, like: torch.Tensor, head_dim: int) -> None:
    """Refuse norms of q and k that the kernels cannot read.

    Raises:
        ValueError: wrong device, dtype or shape, or a norm of q without one of k.
    """
    check_like(like, norm_q=norms[0], norm_k=norms[1])
    if (norms[0] is None) != (norms[1] is None):
        raise ValueError("q or k alone has a norm: give both or none")
    for norm in norms:
        if norm is not None:
            check_shape("norm", norm, (head_dim,))


@jit()
def inverse_rms(tile, eps, E: tl.constexpr):
    """Compute ``1 / sqrt(mean(x^2) + eps)`` for each row of a head's tile; columns beyond E must be zero."""
    return tl.rsqrt(tl.sum(tile * tile, axis=1) / E + eps)
