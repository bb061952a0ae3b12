"""The heads of q, k and v: the joint layout, and the bias, norm and rotation after their products.

B batch, S tokens, h heads kept, H heads of the weights, E head dimension. `qkv_projection` and `norm_rope` write
``[B, S, h, E]``, tokens in the order of the streams; `joint_attention` reads it. What follows the products is here once
as a reference and once as the epilogue of a kernel.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ppcl_kernels._triton import jit, tl
from ppcl_kernels.head_norm import Norms, inverse_rms, rms_norm_reference
from ppcl_kernels.matmul import by_parts
from ppcl_kernels.rope import Rope, apply_rope_reference, rotate

# q, k and v of a stream, ``[B, S, h, E]`` each; q is None for a stream without queries.
Raw = tuple[torch.Tensor | None, torch.Tensor, torch.Tensor]
# Biases of those three products, ``[H E]`` or None each; the first h E elements are used.
Biases = tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]
NO_BIASES: Biases = (None, None, None)
# A head has to fit one tile.
MAX_HEAD_DIM = 128


def head_cols(head_dim: int) -> int:
    """Return the columns of the tile that holds a head: a power of two, and at least the 16 that tensor cores need."""
    return max(16, 1 << (head_dim - 1).bit_length())


def joint_outputs(
    like: torch.Tensor, tokens: Sequence[int], queries: Sequence[bool], heads: int, head_dim: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Allocate q (for the streams that have queries), k and v, ``[B, S, h, E]`` each."""
    asked = sum(count for count, wanted in zip(tokens, queries, strict=True) if wanted)
    q = like.new_empty(like.shape[0], asked, heads, head_dim)
    k, v = (like.new_empty(like.shape[0], sum(tokens), heads, head_dim) for _ in range(2))
    return q, k, v


def _with_biases(parts: Raw, biases: Biases) -> Raw:
    shape, size = parts[1].shape[2:], parts[1].shape[2:].numel()
    q, k, v = (
        x if x is None or bias is None else x + bias[:size].view(shape) for x, bias in zip(parts, biases, strict=True)
    )
    assert k is not None and v is not None, "only q may be None"
    return q, k, v


def norm_rope_reference(
    raw: Sequence[Raw],
    norms: Sequence[Norms],
    ropes: Sequence[Rope | None],
    eps: float = 1e-6,
    biases: Sequence[Biases] | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Add biases to q, k and v ``[B, S, h, E]``, normalise and rotate q and k, and join the streams; q may be None."""
    joint: list[list[torch.Tensor]] = [[], [], []]
    if biases is not None:
        raw = [_with_biases(parts, each) for parts, each in zip(raw, biases, strict=True)]
    for (q, k, v), (norm_q, norm_k), rope in zip(raw, norms, ropes, strict=True):
        for out, x, norm in ((joint[0], q, norm_q), (joint[1], k, norm_k)):
            if x is not None:
                x = rms_norm_reference(x, norm, eps)
                out.append(x if rope is None else apply_rope_reference(x, rope))
        joint[2].append(v)
    if not joint[0]:
        raise ValueError("no stream has queries: set queries=True on one")
    return torch.cat(joint[0], 1), torch.cat(joint[1], 1), torch.cat(joint[2], 1)


@jit()
def _finish_columns(acc, arguments, place, first_col, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Apply the norm's weight, rotate, and write the columns of a head from ``first_col`` on."""
    _, norm, rope, out, S, out_tokens, out_first, heads, _, E = arguments
    b, row, head, _ = place
    rows = row + tl.arange(0, ROWS)
    cols = first_col + tl.arange(0, COLS)
    if norm is not None:
        acc *= tl.load(norm + cols, mask=cols < E, other=0.0).to(tl.float32)[None, :]
    acc = rotate(acc, rope, row, first_col, S, E, ROWS, COLS)
    # The offset of the tile is 64-bit, offsets within the tile are 32-bit.
    corner = ((b.to(tl.int64) * out_tokens + out_first + row) * heads + head) * E
    offsets = tl.arange(0, ROWS)[:, None] * (heads * E) + cols[None, :]
    tl.store(out + corner + offsets, acc.to(out.dtype.element_ty), mask=(rows[:, None] < S) & (cols[None, :] < E))


@jit()
def finish_head(acc, arguments, place, ROWS: tl.constexpr, COLS: tl.constexpr, PARTS: tl.constexpr):
    """Add the bias, normalise, rotate and write one head of some tokens; parts that are None are left out.

    This is the epilogue of `ppcl_kernels.matmul.work_off` when one tile of columns is one head.

    Args:
        acc: ``[ROWS, COLS]``, float32.
        arguments: (bias or None, RMSNorm's weight or None, (cosines or None, sines, stride_rope_row,
            stride_rope_pair), output, tokens of this stream, tokens of a sample of the output, number of this stream's
            first token there, heads, eps, E).
        place: (sample, first token, head, first row of the weights).
    """
    bias, norm, _, _, _, _, _, _, eps, E = arguments
    cols = tl.arange(0, COLS)
    if bias is not None:
        acc += tl.load(bias + place[3] + cols, mask=cols < E, other=0.0).to(tl.float32)[None, :]
    if norm is not None:
        if COLS != E:
            # The tile is wider than the head and reaches into the next one.
            acc = tl.where(cols[None, :] < E, acc, 0.0)
        # The mean is over the whole head, so it comes before the tile is split.
        acc *= inverse_rms(acc, eps, E)[:, None]
    by_parts(acc, _finish_columns, arguments, place, 0, ROWS, COLS, PARTS)
