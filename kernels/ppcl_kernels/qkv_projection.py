"""Query, key and value of one stream: matrix product, bias, RMSNorm of q and k, interleaved RoPE; first ``h`` heads.

B batch, S tokens, D width, H heads kept, E head dim.
"""

import torch

from ppcl_kernels.linear import linear_reference


def apply_rope_reference(x: torch.Tensor, rope: torch.Tensor) -> torch.Tensor:
    """Rotate interleaved pairs of ``x [B, S, H, E]`` by ``rope [S, E / 2, 2]`` (cosine, sine), in float32.

    Real arithmetic on purpose: the complex form does not compile.
    """
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = rope[:, None, :, 0], rope[:, None, :, 1]
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2).to(x.dtype)


def _rms_norm(x: torch.Tensor, weight: torch.Tensor | None, eps: float) -> torch.Tensor:
    """Divide by the root mean square over E; the variance in float32, as diffusers does it."""
    if weight is None:
        return x
    normed = x * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + eps)
    return normed.to(weight.dtype) * weight


def qkv_projection_reference(
    x: torch.Tensor,
    weights: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    biases: tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None],
    norms: tuple[torch.Tensor | None, torch.Tensor | None],
    rope: torch.Tensor | None,
    heads: int,
    head_dim: int,
    eps: float = 1e-6,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Project ``x [B, S, D]`` to q, k, v ``[B, S, heads, head_dim]``.

    Args:
        weights: of q, k and v, ``[H * E, D]``, heads in rank order.
        biases: beside them, ``[H * E]``.
        norms: RMSNorm weights of q and k, ``[E]``, or None for no norm.
        rope: ``[S, E / 2, 2]`` or None.
    """
    q, k, v = (
        linear_reference(x, weight, bias, heads * head_dim).unflatten(-1, (heads, head_dim))
        for weight, bias in zip(weights, biases, strict=True)
    )
    q, k = _rms_norm(q, norms[0], eps), _rms_norm(k, norms[1], eps)
    if rope is not None:
        q, k = apply_rope_reference(q, rope), apply_rope_reference(k, rope)
    return q, k, v
