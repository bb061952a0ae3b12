"""Rotary position embedding (RoPE) of interleaved pairs: neighbouring channels of a head, rotated by a token's angle.

``(x0, x1) -> (x0 cos - x1 sin, x0 sin + x1 cos)``.

B batch, S tokens, H heads, E head dimension. Eager reads and writes q and k once for it, and once more to make the
pairs complex.
"""

from __future__ import annotations

import torch

from ppcl_kernels._check import check_shape
from ppcl_kernels._triton import jit, tl

# Cosines and sines in float32, in one of three forms: one table ``[S, E / 2, 2]`` (a complex table viewed as real); two
# tables of ``[S, E / 2]``; or two tables of ``[S, E]`` that hold every value twice in a row.
Rope = torch.Tensor | tuple[torch.Tensor, torch.Tensor]


def rope_tables(rope: Rope | None, head_dim: int) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """View any form of ``rope`` (`Rope`) as cosines and sines of pairs, ``[S, E / 2]`` each, without a copy.

    Raises:
        ValueError: the two tables do not have E / 2 or E columns.
    """
    if rope is None:
        return None, None
    if isinstance(rope, torch.Tensor):
        return rope[..., 0], rope[..., 1]
    widths = tuple(table.shape[1] if table.dim() == 2 else None for table in rope)
    if widths not in ((head_dim // 2, head_dim // 2), (head_dim, head_dim)):
        shapes = " and ".join(str(list(table.shape)) for table in rope)
        raise ValueError(f"rope is {shapes}, wanted two of [S, {head_dim // 2}] or [S, {head_dim}]")
    return rope if widths[0] != head_dim else (rope[0][:, ::2], rope[1][:, ::2])


def apply_rope_reference(x: torch.Tensor, rope: Rope) -> torch.Tensor:
    """Rotate interleaved pairs of ``x [B, S, H, E]`` by ``rope`` (`Rope`), in float32.

    The arithmetic is real, since torch.compile does not compile the complex form.
    """
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = rope_tables(rope, x.shape[-1])
    assert cos is not None and sin is not None
    cos, sin = cos[:, None], sin[:, None]
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2).to(x.dtype)


def check_rope(rope: Rope | None, tokens: int, head_dim: int, device: torch.device) -> None:
    """Refuse a rotation that the kernels cannot read.

    Raises:
        ValueError: wrong device, dtype or shape, or cosines and sines with different strides.
    """
    cos, sin = rope_tables(rope, head_dim)
    if cos is None or sin is None:
        return
    for table in (cos, sin):
        check_shape("rope (pairs)", table, (tokens, head_dim // 2))
        if table.device != device or table.dtype != torch.float32:
            raise ValueError(f"rope is {table.dtype} on {table.device}, wanted float32 on {device}")
    if cos.stride() != sin.stride():
        raise ValueError(
            f"rope's cosines have strides {cos.stride()}, its sines {sin.stride()}: give both the same strides"
        )


@jit()
def rotate(tile, rope, row, col, S, E: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Rotate a tile of a head, ``[ROWS, COLS]`` from token ``row`` and channel ``col`` on, in float32.

    ``rope`` is (cosines, sines, stride_rope_row, stride_rope_pair); without cosines the tile is returned as it is.
    """
    cos, sin, stride_rope_row, stride_rope_pair = rope
    if cos is not None:
        rows = row + tl.arange(0, ROWS)
        pairs = col // 2 + tl.arange(0, COLS // 2)
        offsets = rows[:, None] * stride_rope_row + pairs[None, :] * stride_rope_pair
        inside = (rows[:, None] < S) & (pairs[None, :] < E // 2)
        c = tl.load(cos + offsets, mask=inside, other=0.0)
        s = tl.load(sin + offsets, mask=inside, other=0.0)
        even, odd = tile.reshape(ROWS, COLS // 2, 2).split()
        tile = tl.join(even * c - odd * s, even * s + odd * c).reshape(ROWS, COLS)
    return tile


def rope_arguments(rope: Rope | None, suffix: str = "") -> list[tuple[str, ...]]:
    """Return the names of the launch arguments that are views of each of the two tensors of `rope_tensors`."""
    names = (f"cos{suffix}", f"sin{suffix}")
    return [names[:1], names[1:]] if isinstance(rope, tuple) else [names, ()]


def rope_tensors(rope: Rope | None) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Return the tensors of a rotation as a pair; None stands for those that its form does not have."""
    return rope if isinstance(rope, tuple) else (rope, None)
