"""Adaptive LayerNorm ``y = norm(x) * (1 + scale) + shift``, alone or after the gated residual ``x + gate * h``.

B batch, S tokens, D width. The norm has no affine part; its statistics are float32. Eager reads and writes
``[B, S, D]`` three times (norm, multiply, add; five with the residual); the kernel moves each input and result once.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from ppcl_kernels._check import check_index, check_like, check_modulation, check_shape, wants_gradient
from ppcl_kernels._op import define_op
from ppcl_kernels._triton import jit, tl
from ppcl_kernels.launch import Launch, Target
from ppcl_kernels.modulation import per_token
from ppcl_kernels.prepared import Bound

# A row is held in registers.
MAX_WIDTH = 16384


def ada_layer_norm_reference(
    x: torch.Tensor,
    scale: torch.Tensor,
    shift: torch.Tensor,
    index: torch.Tensor | None = None,
    eps: float = 1e-6,
) -> torch.Tensor:
    """Normalise ``x [B, S, D]`` and modulate it; ``scale`` and ``shift`` as in `ppcl_kernels.modulation`."""
    return F.layer_norm(x, x.shape[-1:], eps=eps) * (1 + per_token(scale, index)) + per_token(shift, index)


def gated_residual_reference(
    x: torch.Tensor, gate: torch.Tensor, h: torch.Tensor, index: torch.Tensor | None = None
) -> torch.Tensor:
    """Add ``gate * h`` to the residual stream ``x [B, S, D]``; ``gate`` as ``scale`` above."""
    return x + per_token(gate, index) * h


def gated_ada_layer_norm_reference(
    x: torch.Tensor,
    gate: torch.Tensor,
    h: torch.Tensor,
    scale: torch.Tensor,
    shift: torch.Tensor,
    index: torch.Tensor | None = None,
    eps: float = 1e-6,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Add ``gate * h`` to ``x``, then normalise and modulate the sum; returns (sum, normalised)."""
    x = gated_residual_reference(x, gate, h, index)
    return x, ada_layer_norm_reference(x, scale, shift, index, eps)


class Tile(NamedTuple):
    """How tokens are shared out.

    Attributes:
        rows: consecutive tokens of a sample that one block takes, one after the other, with one read of the modulation.
        warps: per block.
    """

    rows: int
    warps: int

    @classmethod
    def candidates(cls, width: int, normed: bool = True) -> tuple[Tile, ...]:
        """Tiles worth measuring for rows of ``width`` elements, with a norm or for the gated residual alone."""
        # 16 elements a thread: two 16-byte accesses of bf16.
        warps = min(max(_power_of_2(width) // 512, 1), 16)
        # The gate alone is not worth a loop.
        return tuple(cls(rows, warps) for rows in ((1, 4, 16) if normed else (1,)))

    @classmethod
    def choose(cls, target: Target, batch: int, tokens: int, width: int, normed: bool = True) -> Tile:
        """Pick the most rows that leave every multiprocessor eight blocks, enough to hide the memory's latency."""
        tiles = cls.candidates(width, normed)
        busy = [tile for tile in tiles if batch * -(-tokens // tile.rows) >= 8 * target.multiprocessors]
        return busy[-1] if busy else tiles[0]


def _power_of_2(n: int) -> int:
    return 1 << (n - 1).bit_length()


@jit(do_not_specialize=["B", "S"])
def _ada_layer_norm_kernel(
    x,
    h,
    gate,
    scale,
    shift,
    index,
    total,
    y,
    B,
    S,
    D,
    x_batch_step,
    x_row_step,
    h_batch_step,
    h_row_step,
    gate_step,
    scale_step,
    shift_step,
    eps,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row_blocks = tl.cdiv(S, ROWS)
    b = tl.program_id(0) // row_blocks
    first = tl.program_id(0) % row_blocks * ROWS
    cols = tl.arange(0, BLOCK)
    inside = cols < D
    sample = b.to(tl.int64)
    if index is None and scale is not None:
        factor = 1 + tl.load(scale + sample * scale_step + cols, mask=inside, other=0.0).to(tl.float32)
        offset = tl.load(shift + sample * shift_step + cols, mask=inside, other=0.0).to(tl.float32)
    if index is None and gate is not None:
        weight = tl.load(gate + sample * gate_step + cols, mask=inside, other=0.0).to(tl.float32)
    for step in range(0, tl.minimum(ROWS, S - first)):
        at = (first + step).to(tl.int64)
        value = tl.load(x + sample * x_batch_step + at * x_row_step + cols, mask=inside, other=0.0).to(tl.float32)
        if index is not None:
            chosen = (b + B * (tl.load(index + sample * S + at) != 0)).to(tl.int64)
            if gate is not None:
                weight = tl.load(gate + chosen * gate_step + cols, mask=inside, other=0.0).to(tl.float32)
            if scale is not None:
                factor = 1 + tl.load(scale + chosen * scale_step + cols, mask=inside, other=0.0).to(tl.float32)
                offset = tl.load(shift + chosen * shift_step + cols, mask=inside, other=0.0).to(tl.float32)
        out = (sample * S + at) * D + cols
        if gate is not None:
            part = tl.load(h + sample * h_batch_step + at * h_row_step + cols, mask=inside, other=0.0).to(tl.float32)
            # What is normalised is what is stored: the residual stream in its own dtype, as in eager.
            value = (value + weight * part).to(total.dtype.element_ty)
            tl.store(total + out, value, mask=inside)
            value = value.to(tl.float32)
        if scale is not None:
            mean = tl.sum(value, axis=0) / D
            centred = tl.where(inside, value - mean, 0.0)
            deviation = tl.rsqrt(tl.sum(centred * centred, axis=0) / D + eps)
            tl.store(y + out, (centred * deviation * factor + offset).to(y.dtype.element_ty), mask=inside)


def launch_ada_layer_norm(
    x: torch.Tensor,
    gate: torch.Tensor | None,
    h: torch.Tensor | None,
    scale: torch.Tensor | None,
    shift: torch.Tensor | None,
    index: torch.Tensor | None,
    total: torch.Tensor | None,
    y: torch.Tensor | None,
    eps: float,
    tile: Tile,
) -> Launch:
    """Describe the launch that writes ``total`` (with a gate) and ``y`` (with a scale), contiguous ``[B, S, D]``."""
    batch, tokens, width = x.shape
    arguments = {
        "x": x,
        "h": h,
        "gate": gate,
        "scale": scale,
        "shift": shift,
        "index": index,
        "total": total,
        "y": y,
        "B": batch,
        "S": tokens,
        "D": width,
        "x_batch_step": x.stride(0),
        "x_row_step": x.stride(1),
        "h_batch_step": 0 if h is None else h.stride(0),
        "h_row_step": 0 if h is None else h.stride(1),
        "gate_step": 0 if gate is None else gate.stride(0),
        "scale_step": 0 if scale is None else scale.stride(0),
        "shift_step": 0 if shift is None else shift.stride(0),
        "eps": eps,
        "ROWS": tile.rows,
        "BLOCK": _power_of_2(width),
    }
    return Launch(_ada_layer_norm_kernel, (batch * -(-tokens // tile.rows),), arguments, tile.warps, 1)


def _check(x, gate, h, scale, shift, index) -> None:
    if x.dim() != 3 or x.shape[-1] > MAX_WIDTH:
        raise ValueError(f"x is {list(x.shape)}, wanted [B, S, D] with D up to {MAX_WIDTH}")
    check_like(x, x=x, h=h, gate=gate, scale=scale, shift=shift)
    check_index(index, x)
    for name, modulation in (("gate", gate), ("scale", scale), ("shift", shift)):
        check_modulation(name, modulation, x, x.shape[-1], index)
    if h is not None:
        check_shape("h", h, x.shape)


def _run(x, gate, h, scale, shift, index, eps, tile) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Check, launch, and return (sum, normalised), each None where it is not asked for."""
    _check(x, gate, h, scale, shift, index)
    total = None if gate is None else x.new_empty(x.shape)
    y = None if scale is None else x.new_empty(x.shape)
    tile = _tile(x, scale is not None, tile)
    if x.numel():
        launch_ada_layer_norm(x, gate, h, scale, shift, index, total, y, eps, tile).run()
    return total, y


def _tile(x, normed, tile) -> Tile:
    target, (batch, tokens, width) = Target.of(x.device), x.shape
    return Tile.choose(target, batch, tokens, width, normed) if tile is None else Tile(*tile)


@define_op(
    "ada_layer_norm",
    "(Tensor x, Tensor scale, Tensor shift, Tensor? index, float eps, int[]? tile) -> Tensor",
)
def _norm_op(x, scale, shift, index, eps, tile):
    return _run(x, None, None, scale, shift, index, eps, tile)[1]


@define_op(
    "gated_ada_layer_norm",
    "(Tensor x, Tensor gate, Tensor h, Tensor scale, Tensor shift, Tensor? index, float eps, int[]? tile) "
    "-> (Tensor, Tensor)",
)
def _gated_norm_op(x, gate, h, scale, shift, index, eps, tile):
    return _run(x, gate, h, scale, shift, index, eps, tile)


@define_op(
    "gated_residual",
    "(Tensor x, Tensor gate, Tensor h, Tensor? index, int[]? tile) -> Tensor",
)
def _gated_residual_op(x, gate, h, index, tile):
    return _run(x, gate, h, None, None, index, 0.0, tile)[0]


@_norm_op.register_fake
def _(x, scale, shift, index, eps, tile):
    _check(x, None, None, scale, shift, index)
    return x.new_empty(x.shape)


@_gated_norm_op.register_fake
def _(x, gate, h, scale, shift, index, eps, tile):
    _check(x, gate, h, scale, shift, index)
    return x.new_empty(x.shape), x.new_empty(x.shape)


@_gated_residual_op.register_fake
def _(x, gate, h, index, tile):
    _check(x, gate, h, None, None, index)
    return x.new_empty(x.shape)


def ada_layer_norm(
    x: torch.Tensor,
    scale: torch.Tensor,
    shift: torch.Tensor,
    index: torch.Tensor | None = None,
    eps: float = 1e-6,
    *,
    tile: Tile | None = None,
) -> torch.Tensor:
    """Normalise and modulate in one pass; where a gradient is asked for, the reference computes it.

    Args:
        x: ``[B, S, D]``, rows contiguous.
        scale, shift: ``[B, D]``, or ``[2 B, D]`` with ``index``.
        index: ``[B, S]`` of zeros and ones (`ppcl_kernels.modulation`), or None.
        eps: under the root.
        tile: None to choose by shape and device.

    Returns:
        ``[B, S, D]``, contiguous, in the dtype of ``x``.

    Raises:
        ValueError: wrong device, dtype, shape or stride.
    """
    if wants_gradient(x, scale, shift):
        return ada_layer_norm_reference(x, scale, shift, index, eps)
    return _norm_op(x, scale, shift, index, eps, tile)


def gated_ada_layer_norm(
    x: torch.Tensor,
    gate: torch.Tensor,
    h: torch.Tensor,
    scale: torch.Tensor,
    shift: torch.Tensor,
    index: torch.Tensor | None = None,
    eps: float = 1e-6,
    *,
    tile: Tile | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Add ``gate * h`` to the residual stream ``x``, and normalise and modulate the sum, in one pass.

    Arguments and errors as in `ada_layer_norm`; ``gate`` as ``scale``, ``h`` as ``x``.

    Returns:
        (sum, normalised), ``[B, S, D]`` each.
    """
    if wants_gradient(x, gate, h, scale, shift):
        return gated_ada_layer_norm_reference(x, gate, h, scale, shift, index, eps)
    return _gated_norm_op(x, gate, h, scale, shift, index, eps, tile)


def gated_residual(
    x: torch.Tensor, gate: torch.Tensor, h: torch.Tensor, index: torch.Tensor | None = None, *, tile: Tile | None = None
) -> torch.Tensor:
    """Add ``gate * h`` to ``x`` in one pass: what closes a block after a matrix product of cuBLAS.

    Arguments and errors as in `gated_ada_layer_norm`.
    """
    if wants_gradient(x, gate, h):
        return gated_residual_reference(x, gate, h, index)
    return _gated_residual_op(x, gate, h, index, tile)


class PreparedAdaLayerNorm:
    """A modulated norm whose shapes and tile are known (`prepare_ada_layer_norm`)."""

    def __init__(self, x: torch.Tensor, eps: float, tile: Tile) -> None:
        self._size, self._eps, self._tile = x.shape, eps, tile
        names = ("x", "scale", "shift", "index", "y")
        self.launch = Bound(self._describe, [(name,) for name in names]) if x.numel() else None

    def _describe(self, x: Any, scale: Any, shift: Any, index: Any, y: Any) -> Launch:
        return launch_ada_layer_norm(x, None, None, scale, shift, index, None, y, self._eps, self._tile)

    def __call__(
        self, x: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor, index: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Normalise and modulate other tensors like those of `prepare_ada_layer_norm`."""
        y = x.new_empty(self._size)
        if self.launch is not None:
            self.launch(x, scale, shift, index, y)
        return y


def prepare_ada_layer_norm(
    x: torch.Tensor,
    scale: torch.Tensor,
    shift: torch.Tensor,
    index: torch.Tensor | None = None,
    eps: float = 1e-6,
    *,
    tile: Tile | None = None,
) -> PreparedAdaLayerNorm:
    """Check what `ada_layer_norm` checks, once for all calls with tensors like these.

    `ppcl_kernels.prepared.Bound` says what the caller sees to from then on. No tensor is kept alive; no gradient.
    """
    _check(x, None, None, scale, shift, index)
    return PreparedAdaLayerNorm(x, eps, _tile(x, True, tile))


class PreparedGatedResidual:
    """A gated residual whose shapes and tile are known (`prepare_gated_residual`)."""

    def __init__(self, x: torch.Tensor, tile: Tile) -> None:
        self._size, self._tile = x.shape, tile
        names = ("x", "gate", "h", "index", "total")
        self.launch = Bound(self._describe, [(name,) for name in names]) if x.numel() else None

    def _describe(self, x: Any, gate: Any, h: Any, index: Any, total: Any) -> Launch:
        return launch_ada_layer_norm(x, gate, h, None, None, index, total, None, 0.0, self._tile)

    def __call__(
        self, x: torch.Tensor, gate: torch.Tensor, h: torch.Tensor, index: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Add other tensors like those of `prepare_gated_residual`."""
        total = x.new_empty(self._size)
        if self.launch is not None:
            self.launch(x, gate, h, index, total)
        return total


def prepare_gated_residual(
    x: torch.Tensor, gate: torch.Tensor, h: torch.Tensor, index: torch.Tensor | None = None, *, tile: Tile | None = None
) -> PreparedGatedResidual:
    """Check what `gated_residual` checks, once for all calls with tensors like these; as `prepare_ada_layer_norm`."""
    _check(x, gate, h, None, None, index)
    return PreparedGatedResidual(x, _tile(x, False, tile))
