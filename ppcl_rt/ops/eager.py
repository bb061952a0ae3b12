"""Plain torch on a CPU, in as few passes over memory and as few calls as torch allows.

The references in `ppcl_kernels` say what an operation means, one step a line; these functions give the same but for
roundings. On a CPU a call of torch takes microseconds, and at width 96 most of a forward is not matrix products: so q
and k of both streams are normalised and rotated together and in place, and what follows a product is added in one pass.
They are called where nothing requires a gradient.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

import ppcl_kernels as kernels
from ppcl_kernels.linear import Activation
from ppcl_rt.ops.modules import Branch


def suits(x: torch.Tensor) -> bool:
    """Whether these functions are for a tensor: float32 in the memory of a CPU.

    Half precision rounds after each step, as the references say; compiled code joins steps by itself.
    """
    return x.dtype == torch.float32 and x.device.type == "cpu" and not torch.compiler.is_compiling()


def ada_layer_norm(
    x: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor, index: torch.Tensor | None = None, eps: float = 1e-6
) -> torch.Tensor:
    """As `ppcl_kernels.ada_layer_norm_reference`: in one pass at batch 1, in two otherwise."""
    if index is None and (len(x) == 1 or scale.stride(0) == shift.stride(0) == 0):
        # One modulation for all: the norm applies it as weights of its own.
        return F.layer_norm(x, x.shape[-1:], scale[0] + 1, shift[0], eps)
    y = F.layer_norm(x, x.shape[-1:], eps=eps)
    return torch.addcmul(kernels.per_token(shift, index), y, kernels.per_token(scale, index) + 1, out=y)


def add_branches(y: torch.Tensor, x: torch.Tensor, branches: Sequence[Branch]) -> None:
    """Add what adapters add to ``y [B, S, N]``, in memory without gaps, the product of ``x [B, S, k]``."""
    flat, columns = y.view(-1, y.shape[-1]), x.shape[-1]
    for branch in branches:
        down = F.linear(x, branch.down[:, :columns]).view(len(flat), -1)
        flat.addmm_(down, branch.up[: y.shape[-1]].t(), alpha=float(branch.scale))


def linear(
    g: kernels.Linear, activation: Activation, branches: Sequence[Branch] = (), silu_branches: Sequence[Branch] = ()
) -> torch.Tensor:
    """As `ppcl_kernels.linear_reference`; the gate and the residual come in one pass.

    Args:
        branches, silu_branches: what adapters add to the product, and to the one that goes through SiLU.
    """
    n, k = g.out_features or len(g.weight), g.x.shape[-1]
    weight, bias = g.weight, g.bias
    silu_weight, silu_bias = g.silu_weight, g.silu_bias
    if (n, k) != tuple(weight.shape):
        if n > weight.shape[0] or k > weight.shape[1]:
            # It says what is wrong.
            return g.reference(activation)
        weight, bias = weight[:n, :k], None if bias is None else bias[:n]
        if silu_weight is not None:
            silu_weight, silu_bias = silu_weight[:n, :k], None if silu_bias is None else silu_bias[:n]
    y = F.linear(g.x, weight, bias)
    if branches:
        add_branches(y, g.x, branches)
    if activation == "gelu":
        y = F.gelu(y, approximate="tanh")
    if silu_weight is not None:
        silu = F.linear(g.x, silu_weight, silu_bias)
        if silu_branches:
            add_branches(silu, g.x, silu_branches)
        y = y.mul_(F.silu(silu, inplace=True))
    if g.gate is None:
        return y if g.residual is None else y.add_(g.residual)
    gate = kernels.per_token(g.gate, g.index)
    return y.mul_(gate) if g.residual is None else torch.addcmul(g.residual, gate, y, out=y)


def qkv_projection(
    streams: tuple[kernels.Stream, ...],
    heads: int,
    head_dim: int,
    eps: float = 1e-6,
    branches: Sequence[Sequence[Sequence[Branch]]] | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """As `ppcl_kernels.qkv_projection_reference`; all streams need queries, and norms and rotations all or none.

    Args:
        branches: of each stream, what adapters add to q, k and v; None where there are none.
    """
    batch, columns = len(streams[0].x), streams[0].x.shape[-1]
    tokens = [s.x.shape[1] for s in streams]
    rows = heads * head_dim
    # q, k and v of all tokens, so that what is done to q and k is done once.
    joint = streams[0].x.new_empty(3, batch, sum(tokens), rows)
    parts = joint.split(tokens, dim=2)
    for s, part, added in zip(streams, parts, branches or [((), (), ())] * len(streams), strict=True):
        for into, weight, bias, more in zip(part.unbind(0), s.weights, s.biases, added, strict=True):
            if rows < len(weight):
                weight, bias = weight[:rows], None if bias is None else bias[:rows]
            weight = weight if columns == weight.shape[1] else weight[:, :columns]
            if batch == 1 and bias is not None:
                # Where a stream is one piece of memory, the product goes there at once.
                torch.addmm(bias, s.x[0], weight.t(), out=into[0])
                if more:
                    add_branches(into, s.x, more)
            else:
                product = F.linear(s.x, weight, bias)
                if more:
                    add_branches(product, s.x, more)
                into.copy_(product)
    joint = joint.view(3, batch, sum(tokens), heads, head_dim)
    qk = joint[:2]
    if streams[0].norms[0] is not None:
        # The root of the sum of squares, over that of the mean: one pass, where squares and their mean are two.
        squares = torch.linalg.vector_norm(qk, dim=-1, keepdim=True).square_()
        qk.mul_(squares.mul_(1 / head_dim).add_(eps).rsqrt_())
        for s, part in zip(streams, qk.split(tokens, dim=2), strict=True):
            part.mul_(torch.stack([norm for norm in s.norms if norm is not None]).view(2, 1, 1, 1, head_dim))
    if streams[0].rope is not None:
        rope = torch.view_as_complex(joined([s.rope for s in streams if isinstance(s.rope, torch.Tensor)]))
        pairs = torch.view_as_complex(qk.view(2, batch, sum(tokens), heads, head_dim // 2, 2))
        pairs.mul_(rope[:, None])
    q, k, v = joint.unbind(0)
    return q, k, v


def takes_qkv(streams: tuple[kernels.Stream, ...], heads: int, head_dim: int) -> bool:
    """Whether `qkv_projection` can make them."""
    first = streams[0]
    return all(
        s.queries
        and (s.norms[0] is None) == (s.norms[1] is None) == (first.norms[0] is None)
        and (s.rope is None) == (first.rope is None)
        and not isinstance(s.rope, tuple)
        and heads * head_dim <= len(s.weights[0])
        for s in streams
    )


def joined(tables: Sequence[torch.Tensor]) -> torch.Tensor:
    """Give tensors one after the other along their first axis: a view where they lie so in memory, else a copy."""
    first, end = tables[0], tables[0].data_ptr()
    for table in tables:
        adjacent = table.data_ptr() == end and table.is_contiguous()
        if not adjacent or table.untyped_storage().data_ptr() != first.untyped_storage().data_ptr():
            return torch.cat(list(tables))
        end += table.numel() * table.itemsize
    return first.as_strided((sum(map(len, tables)), *first.shape[1:]), first.stride())
