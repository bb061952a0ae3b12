"""Linear layers over a prefix of their channels, and what follows them, in one kernel.

``y = x W[:n, :k]^T + b[:n]``, then in this order, where asked for: tanh-GELU, ``* gate``, ``+ residual``.

B batch, S tokens, K inputs, N outputs of the weight; ``k <= K`` and ``n <= N`` are kept. Weights lie in rank order, so
a narrower layer is a prefix of a wider one. Eager writes and reads ``[B, S, n]`` once more for each thing that follows
the product. The two streams of a block are two groups of one launch: the short text fills waves that the image leaves
empty.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from ppcl_kernels._check import check_index, check_like, check_modulation, check_shape, check_weight, wants_gradient
from ppcl_kernels._op import define_op
from ppcl_kernels._triton import jit, tl
from ppcl_kernels.launch import Launch, Target
from ppcl_kernels.matmul import Tile, by_parts, operand, takes_tma, work_off
from ppcl_kernels.modulation import per_token
from ppcl_kernels.prepared import Bound, described, suffixes


class Linear(NamedTuple):
    """One group: a linear layer on one stream, and what follows it.

    Attributes:
        x: ``[B, S, k]``.
        weight: ``[N, K]``.
        bias: ``[N]`` or None.
        out_features: n, None for all N.
        gate: ``[B, n]``, or ``[2 B, n]`` with ``index`` (`ppcl_kernels.modulation`), or None.
        index: ``[B, S]`` of zeros and ones, or None.
        residual: ``[B, S, n]`` or None.
    """

    x: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None = None
    out_features: int | None = None
    gate: torch.Tensor | None = None
    index: torch.Tensor | None = None  # type: ignore[assignment]  # hides tuple.index, which nobody calls
    residual: torch.Tensor | None = None


def linear_reference(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    out_features: int | None = None,
    *,
    gelu: bool = False,
    gate: torch.Tensor | None = None,
    index: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """Multiply ``x [..., k]`` by the first ``k`` columns and first ``out_features`` rows of ``weight [N, K]``.

    Arguments as in `Linear`; ``gelu`` is the tanh form.

    Returns:
        ``[..., out_features]`` (all N rows where ``out_features`` is None).

    Raises:
        ValueError: ``x`` or ``out_features`` is wider than the weight.
    """
    n, k = _widths(x, weight, out_features)
    # Slices are views: what is left out is neither read nor multiplied.
    y = F.linear(x, weight[:n, :k], None if bias is None else bias[:n])
    if gelu:
        y = F.gelu(y, approximate="tanh")
    if gate is not None:
        y = per_token(gate, index) * y
    return y if residual is None else residual + y


def _widths(x: torch.Tensor, weight: torch.Tensor, out_features: int | None) -> tuple[int, int]:
    check_weight("weight", weight)
    n, k = weight.shape[0] if out_features is None else out_features, x.shape[-1]
    if n < 1:
        raise ValueError(f"out_features is {n}, wanted at least 1")
    if n > weight.shape[0] or k > weight.shape[1]:
        raise ValueError(f"wanted {n} outputs of {k} inputs, the weight holds {weight.shape[0]} of {weight.shape[1]}")
    return n, k


@jit()
def _finish_columns(acc, arguments, place, first_col, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Turn some columns of a tile of products into the result, and write them."""
    bias, gate, index, residual, y, S, N, B, stride_gate_sample, GELU = arguments
    b, row, _, _ = place
    rows = row + tl.arange(0, ROWS)
    cols = first_col + tl.arange(0, COLS)
    inside = (rows[:, None] < S) & (cols[None, :] < N)
    if bias is not None:
        acc += tl.load(bias + cols, mask=cols < N, other=0.0).to(tl.float32)[None, :]
    if GELU:
        # x (1 + tanh u) / 2 = x sigmoid(2 u), u = sqrt(2 / pi) (x + 0.044715 x^3)
        acc *= tl.sigmoid(1.5957691216057308 * (acc + 0.044715 * acc * acc * acc))
    if gate is not None:
        if index is None:
            scale = tl.load(gate + b.to(tl.int64) * stride_gate_sample + cols, mask=cols < N, other=0.0)
            acc *= scale.to(tl.float32)[None, :]
        else:
            second = tl.load(index + b.to(tl.int64) * S + rows, mask=rows < S, other=0) != 0
            sample = (b + tl.where(second, B, 0)).to(tl.int64)
            scale = tl.load(gate + sample[:, None] * stride_gate_sample + cols[None, :], mask=inside, other=0.0)
            acc *= scale.to(tl.float32)
    # 64-bit to the tile, 32-bit within it: half the registers.
    corner = (b.to(tl.int64) * S + row) * N + first_col
    offsets = tl.arange(0, ROWS)[:, None] * N + tl.arange(0, COLS)[None, :]
    if residual is not None:
        acc += tl.load(residual + corner + offsets, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + corner + offsets, acc.to(y.dtype.element_ty), mask=inside)


@jit()
def _finish(acc, arguments, place, ROWS: tl.constexpr, COLS: tl.constexpr, PARTS: tl.constexpr):
    """The epilogue of `ppcl_kernels.matmul.work_off`."""
    by_parts(acc, _finish_columns, arguments, place, place[3], ROWS, COLS, PARTS)


# Token counts change from prompt to prompt, and B = 1 would compile anew: neither may specialise the kernel.
# fmt: off
@jit(do_not_specialize=["B", "S0", "S1"])
def _linear_kernel(
    x0, w0, bias0, gate0, index0, residual0, y0,
    S0, N0, K0, stride_x_batch0, stride_x_row0, stride_w_row0, stride_gate_sample0,
    x1, w1, bias1, gate1, index1, residual1, y1,
    S1, N1, K1, stride_x_batch1, stride_x_row1, stride_w_row1, stride_gate_sample1,
    B,
    ROWS: tl.constexpr, COLS: tl.constexpr, DEPTH: tl.constexpr, PARTS: tl.constexpr, FLAT: tl.constexpr,
    TMA: tl.constexpr, GELU: tl.constexpr,
):
    # fmt: on
    sizes, strides = (S0, N0, K0), ((stride_x_batch0, stride_x_row0), stride_w_row0)
    arguments = (bias0, gate0, index0, residual0, y0, S0, N0, B, stride_gate_sample0, GELU)
    start = work_off(
        tl.program_id(0), x0, w0, sizes, strides, B, tl.cdiv(N0, COLS), None, _finish, arguments,
        COLS, ROWS, COLS, DEPTH, PARTS, FLAT, TMA,
    )  # fmt: skip
    if y1 is not None:
        sizes1, strides1 = (S1, N1, K1), ((stride_x_batch1, stride_x_row1), stride_w_row1)
        arguments1 = (bias1, gate1, index1, residual1, y1, S1, N1, B, stride_gate_sample1, GELU)
        work_off(
            start, x1, w1, sizes1, strides1, B, tl.cdiv(N1, COLS), None, _finish, arguments1,
            COLS, ROWS, COLS, DEPTH, PARTS, FLAT, TMA,
        )  # fmt: skip


# fmt: off
_GROUP_ARGUMENTS = (
    "x", "w", "bias", "gate", "index", "residual", "y",
    "S", "N", "K", "stride_x_batch", "stride_x_row", "stride_w_row", "stride_gate_sample",
)
# fmt: on


def launch_linear(
    groups: Sequence[Linear], outputs: Sequence[torch.Tensor], gelu: bool, tile: Tile, target: Target
) -> Launch:
    """Describe the launch that writes ``outputs`` (contiguous ``[B, S, n]``) of one or two groups."""
    tma = takes_tma(target, *(g.x for g in groups), *(g.weight for g in groups))
    batch, tiles, arguments = groups[0].x.shape[0], 0, dict[str, Any]()
    for number in range(2):
        values: Sequence[Any] = (None,) * 7 + (0,) * 7
        if number < len(groups):
            g, y = groups[number], outputs[number]
            tokens, n, k = y.shape[1], y.shape[2], g.x.shape[2]
            tiles += batch * -(-tokens // tile.rows) * -(-n // tile.cols)
            values = (
                operand(g.x, (1, tile.rows, tile.depth), tma),
                operand(g.weight[:n, :k], (tile.cols, tile.depth), tma),
                g.bias,
                g.gate,
                g.index,
                g.residual,
                y,
                tokens,
                n,
                k,
                g.x.stride(0),
                g.x.stride(1),
                g.weight.stride(0),
                0 if g.gate is None else g.gate.stride(0),
            )
        arguments.update({f"{name}{number}": value for name, value in zip(_GROUP_ARGUMENTS, values, strict=True)})
    arguments |= {
        "B": batch,
        "ROWS": tile.rows,
        "COLS": tile.cols,
        "DEPTH": tile.depth,
        "PARTS": tile.parts,
        "FLAT": bool(tile.flat),
        "TMA": tma,
        "GELU": gelu,
    }
    grid = (min(tiles, target.multiprocessors * tile.resident),)
    return Launch(_linear_kernel, grid, arguments, tile.warps, tile.stages, tile.registers)


def describe_linear(
    groups: Sequence[Linear], outputs: Sequence[torch.Tensor], gelu: bool, tile: Tile | None = None
) -> Launch | None:
    """Describe the launch for groups that were checked, at the tile that suits; None where none has tokens."""
    work = [(g, y) for g, y in zip(groups, outputs, strict=True) if y.numel()]
    if not work:
        return None
    target = Target.of(work[0][1].device)
    if tile is None:
        tokens, cols = [y.shape[1] for _, y in work], max(y.shape[2] for _, y in work)
        tile = Tile.choose(target, work[0][1].dtype, tokens, work[0][1].shape[0], cols)
    return launch_linear([g for g, _ in work], [y for _, y in work], gelu, tile, target)


def run_linear(groups: Sequence[Linear], gelu: bool, tile: Tile | None = None) -> list[torch.Tensor]:
    """Launch for one or two groups that were checked; streams without tokens launch nothing."""
    outputs = [g.x.new_empty(*g.x.shape[:2], _widths(g.x, g.weight, g.out_features)[0]) for g in groups]
    launch = describe_linear(groups, outputs, gelu, tile)
    if launch is not None:
        launch.run()
    return outputs


def check_linear(groups: Sequence[Linear]) -> None:
    """Refuse groups that the kernel cannot compute.

    Raises:
        ValueError: wrong device, dtype, shape or stride, or a width beyond the weight.
    """
    first = groups[0].x
    for g in groups:
        if g.x.dim() != 3 or g.x.shape[0] != first.shape[0]:
            raise ValueError(f"x is {list(g.x.shape)}, wanted [B, S, k] with the same B in every group")
        n, _ = _widths(g.x, g.weight, g.out_features)
        check_like(first, x=g.x, weight=g.weight, bias=g.bias, gate=g.gate, residual=g.residual)
        if g.bias is not None:
            check_shape("bias", g.bias, g.weight.shape[:1])
        check_modulation("gate", g.gate, g.x, n, g.index)
        check_index(g.index, g.x)
        if g.residual is not None:
            check_shape("residual", g.residual, (*g.x.shape[:2], n))
            if not g.residual.is_contiguous():
                raise ValueError(f"residual has strides {g.residual.stride()}, wanted contiguous: .contiguous()")


def _check_count(groups: Sequence[Linear]) -> None:
    if len(groups) not in (1, 2):
        raise ValueError(f"one launch takes one or two groups (the streams of a block), got {len(groups)}")


@define_op(
    "linear",
    "(Tensor[] x, Tensor[] weight, Tensor?[] bias, int[] out_features, Tensor?[] gate, Tensor?[] index, "
    "Tensor?[] residual, bool gelu, int[]? tile) -> Tensor[]",
)
def _linear_op(x, weight, bias, out_features, gate, index, residual, gelu, tile):
    groups = [Linear(*group) for group in zip(x, weight, bias, out_features, gate, index, residual, strict=True)]
    check_linear(groups)
    return run_linear(groups, gelu, None if tile is None else Tile(*tile))


@_linear_op.register_fake
def _(x, weight, bias, out_features, gate, index, residual, gelu, tile):
    check_linear([Linear(*group) for group in zip(x, weight, bias, out_features, gate, index, residual, strict=True)])
    return [part.new_empty(*part.shape[:2], n) for part, n in zip(x, out_features, strict=True)]


def grouped_linear(groups: Sequence[Linear], *, gelu: bool = False, tile: Tile | None = None) -> list[torch.Tensor]:
    """Apply one or two linear layers, and what follows each, in one launch.

    Where a gradient is asked for, the reference computes it.

    Args:
        groups: what to apply to what; `Linear` gives the shapes.
        gelu: tanh-GELU after the bias, in all groups.
        tile: None to choose by shape and device.

    Returns:
        ``[B, S, n]`` a group, contiguous, in the dtype of ``x``.

    Raises:
        ValueError: wrong device, dtype, shape or stride, a width beyond the weight, or not one or two groups.
    """
    _check_count(groups)
    if any(wants_gradient(g.x, g.weight, g.bias, g.gate, g.residual) for g in groups):
        return [linear_reference(*g[:4], gelu=gelu, gate=g.gate, index=g.index, residual=g.residual) for g in groups]
    x, weight, bias, out_features, gate, index, residual = map(list, zip(*groups, strict=True))
    out_features = [_widths(g.x, g.weight, g.out_features)[0] for g in groups]
    return _linear_op(x, weight, bias, out_features, gate, index, residual, gelu, tile)


def linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    out_features: int | None = None,
    *,
    gelu: bool = False,
    gate: torch.Tensor | None = None,
    index: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    tile: Tile | None = None,
) -> torch.Tensor:
    """Apply one linear layer to ``x [B, S, k]``; arguments and errors as in `Linear` and `grouped_linear`."""
    return grouped_linear([Linear(x, weight, bias, out_features, gate, index, residual)], gelu=gelu, tile=tile)[0]


class PreparedLinear:
    """One or two linear layers whose weights, shapes and tile are known (`prepare_linear`)."""

    def __init__(self, groups: Sequence[Linear], gelu: bool, tile: Tile | None) -> None:
        self._sizes = [(*g.x.shape[:2], _widths(g.x, g.weight, g.out_features)[0]) for g in groups]
        self._gelu, self._tile = gelu, tile
        numbers = suffixes([g.x for g in groups])
        moving = [(f"{name}{n}",) if n else () for n in numbers for name in ("x", "gate", "index", "residual", "y")]
        self.launch = Bound(moving) if any(numbers) else None

    def __call__(self, groups: Sequence[Linear]) -> list[torch.Tensor]:
        """Apply the layers to other tensors like those of `prepare_linear`."""
        outputs, tensors = [], []
        for g, size in zip(groups, self._sizes):
            y = g.x.new_empty(size)
            outputs.append(y)
            tensors += [g.x, g.gate, g.index, g.residual, y]
        if self.launch is not None:
            self.launch(tuple(tensors), lambda: described(describe_linear(groups, outputs, self._gelu, self._tile)))
        return outputs


def prepare_linear(groups: Sequence[Linear], *, gelu: bool = False, tile: Tile | None = None) -> PreparedLinear:
    """Check what `grouped_linear` checks, once for all calls with weights at the same place and tensors like these.

    `ppcl_kernels.prepared.Bound` says what the caller sees to from then on. No gradient.
    """
    _check_count(groups)
    check_linear(groups)
    return PreparedLinear(groups, gelu, tile)
