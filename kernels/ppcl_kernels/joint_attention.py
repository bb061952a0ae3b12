"""Attention over text and image tokens together: ``softmax(q k^T / sqrt(E)) v``.

B batch, S tokens (text first), H heads kept, E head dim.
"""

import torch
import torch.nn.functional as F


def joint_attention_reference(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, key_mask: torch.Tensor | None = None
) -> torch.Tensor:
    """Attend; q, k, v and the result are ``[B, S, H, E]``, ``key_mask [B, S]`` is true on keys that count."""
    mask = None if key_mask is None else key_mask[:, None, None, :]
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)
