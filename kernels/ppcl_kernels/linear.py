"""Linear layers over a prefix of their channels, with activation, gate and residual in the same kernel.

``y = x W[:n, :k]^T + b[:n]``, then in this order, if asked for: tanh-GELU, ``* gate``, ``+ residual``.

B batch, S tokens, K inputs and N outputs of the weight, of which the first ``k`` and ``n`` are kept. Weights are stored
in rank order, so a narrower layer is a prefix of a wider one. Eager writes and reads ``[B, S, n]`` again for each
operation after the product. The layers of both streams of a block run in one launch: the few text tokens fill waves
that the image tokens leave partly empty.
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
    """A linear layer on one stream, with the operations that follow it.

    Attributes:
        x: ``[B, S, k]``.
        weight: ``[N, K]``.
        bias: ``[N]`` or None.
        out_features: n, None for all N outputs.
        gate: ``[B, n]``, or ``[2 B, n]`` with ``index`` (`ppcl_kernels.modulation`), or None.
        index: ``[B, S]`` of zeros and ones, or None.
        residual: ``[B, S, n]`` or None.
    """

    x: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None = None
    out_features: int | None = None
    gate: torch.Tensor | None = None
    # The field hides tuple.index, which nobody calls.
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
    """Multiply ``x [..., k]`` by the first ``k`` columns and the first ``out_features`` rows of ``weight [N, K]``.

    The arguments are those of `Linear`; ``gelu`` is the tanh form.

    Returns:
        ``[..., out_features]`` (all N rows where ``out_features`` is None).

    Raises:
        ValueError: ``x`` or ``out_features`` asks for more than the weight holds.
    """
    n, k = _widths(x, weight, out_features)
    # Slices are views: the other rows and columns are neither read nor multiplied.
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
    """Turn some columns of a tile of products into columns of the result, and write them."""
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
    # The offset of the tile is 64-bit. Offsets within the tile are 32-bit, which takes half the registers.
    corner = (b.to(tl.int64) * S + row) * N + first_col
    offsets = tl.arange(0, ROWS)[:, None] * N + tl.arange(0, COLS)[None, :]
    if residual is not None:
        acc += tl.load(residual + corner + offsets, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + corner + offsets, acc.to(y.dtype.element_ty), mask=inside)


@jit()
def _finish(acc, arguments, place, ROWS: tl.constexpr, COLS: tl.constexpr, PARTS: tl.constexpr):
    """The epilogue of `ppcl_kernels.matmul.work_off`."""
    by_parts(acc, _finish_columns, arguments, place, place[3], ROWS, COLS, PARTS)


# The token counts change with the prompt, and B = 1 would compile a second kernel: do not specialise on either.
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
_LAYER_ARGUMENTS = (
    "x", "w", "bias", "gate", "index", "residual", "y",
    "S", "N", "K", "stride_x_batch", "stride_x_row", "stride_w_row", "stride_gate_sample",
)
# fmt: on


def launch_linear(
    layers: Sequence[Linear], outputs: Sequence[torch.Tensor], gelu: bool, tile: Tile, target: Target
) -> Launch:
    """Return the launch that writes ``outputs`` (contiguous ``[B, S, n]``) of one or two layers."""
    tma = takes_tma(target, *(layer.x for layer in layers), *(layer.weight for layer in layers))
    batch, tiles, arguments = layers[0].x.shape[0], 0, dict[str, Any]()
    for number in range(2):
        values: Sequence[Any] = (None,) * 7 + (0,) * 7
        if number < len(layers):
            layer, y = layers[number], outputs[number]
            tokens, n, k = y.shape[1], y.shape[2], layer.x.shape[2]
            tiles += batch * -(-tokens // tile.rows) * -(-n // tile.cols)
            values = (
                operand(layer.x, (1, tile.rows, tile.depth), tma),
                operand(layer.weight[:n, :k], (tile.cols, tile.depth), tma),
                layer.bias,
                layer.gate,
                layer.index,
                layer.residual,
                y,
                tokens,
                n,
                k,
                layer.x.stride(0),
                layer.x.stride(1),
                layer.weight.stride(0),
                0 if layer.gate is None else layer.gate.stride(0),
            )
        arguments.update({f"{name}{number}": value for name, value in zip(_LAYER_ARGUMENTS, values, strict=True)})
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
    layers: Sequence[Linear], outputs: Sequence[torch.Tensor], gelu: bool, tile: Tile | None = None
) -> Launch | None:
    """Return the launch of layers that were checked, by default at the cheapest tile; None if no layer has tokens."""
    work = [(layer, y) for layer, y in zip(layers, outputs, strict=True) if y.numel()]
    if not work:
        return None
    target = Target.of(work[0][1].device)
    if tile is None:
        tokens, cols = [y.shape[1] for _, y in work], max(y.shape[2] for _, y in work)
        tile = Tile.choose(target, work[0][1].dtype, tokens, work[0][1].shape[0], cols)
    return launch_linear([layer for layer, _ in work], [y for _, y in work], gelu, tile, target)


def run_linear(layers: Sequence[Linear], gelu: bool, tile: Tile | None = None) -> list[torch.Tensor]:
    """Launch one or two layers that were checked; a stream without tokens launches nothing."""
    outputs = [
        layer.x.new_empty(*layer.x.shape[:2], _widths(layer.x, layer.weight, layer.out_features)[0]) for layer in layers
    ]
    launch = describe_linear(layers, outputs, gelu, tile)
    if launch is not None:
        launch.run()
    return outputs


def check_linear(layers: Sequence[Linear]) -> None:
    """Refuse layers that the kernel cannot compute.

    Raises:
        ValueError: wrong device, dtype, shape or stride, or more inputs or outputs than the weight holds.
    """
    first = layers[0].x
    for layer in layers:
        if layer.x.dim() != 3 or layer.x.shape[0] != first.shape[0]:
            raise ValueError(f"x is {list(layer.x.shape)}, wanted [B, S, k] with the same B in every layer")
        n, _ = _widths(layer.x, layer.weight, layer.out_features)
        check_like(first, x=layer.x, weight=layer.weight, bias=layer.bias, gate=layer.gate, residual=layer.residual)
        if layer.bias is not None:
            check_shape("bias", layer.bias, layer.weight.shape[:1])
        check_modulation("gate", layer.gate, layer.x, n, layer.index)
        check_index(layer.index, layer.x)
        if layer.residual is not None:
            check_shape("residual", layer.residual, (*layer.x.shape[:2], n))
            if not layer.residual.is_contiguous():
                raise ValueError(f"residual has strides {layer.residual.stride()}, wanted contiguous: .contiguous()")


def _check_count(layers: Sequence[Linear]) -> None:
    if len(layers) not in (1, 2):
        raise ValueError(f"one launch takes one or two layers (one for each stream of a block), got {len(layers)}")


@define_op(
    "linear",
    "(Tensor[] x, Tensor[] weight, Tensor?[] bias, int[] out_features, Tensor?[] gate, Tensor?[] index, "
    "Tensor?[] residual, bool gelu, int[]? tile) -> Tensor[]",
)
def _linear_op(x, weight, bias, out_features, gate, index, residual, gelu, tile):
    layers = [Linear(*parts) for parts in zip(x, weight, bias, out_features, gate, index, residual, strict=True)]
    check_linear(layers)
    return run_linear(layers, gelu, None if tile is None else Tile(*tile))


@_linear_op.register_fake
def _(x, weight, bias, out_features, gate, index, residual, gelu, tile):
    check_linear([Linear(*parts) for parts in zip(x, weight, bias, out_features, gate, index, residual, strict=True)])
    return [part.new_empty(*part.shape[:2], n) for part, n in zip(x, out_features, strict=True)]


def grouped_linear(layers: Sequence[Linear], *, gelu: bool = False, tile: Tile | None = None) -> list[torch.Tensor]:
    """Apply one or two linear layers, with the operations that follow each, in one launch.

    Where a gradient is needed, the reference computes the result.

    Args:
        layers: what to apply to which input; `Linear` gives the shapes.
        gelu: apply tanh-GELU after the bias, in all layers.
        tile: None to choose by shape and device.

    Returns:
        ``[B, S, n]`` for each layer, contiguous, in the dtype of ``x``.

    Raises:
        ValueError: wrong device, dtype, shape or stride, more inputs or outputs than the weight holds, or not one or
            two layers.
    """
    _check_count(layers)
    if any(wants_gradient(layer.x, layer.weight, layer.bias, layer.gate, layer.residual) for layer in layers):
        return [
            linear_reference(*layer[:4], gelu=gelu, gate=layer.gate, index=layer.index, residual=layer.residual)
            for layer in layers
        ]
    x, weight, bias, out_features, gate, index, residual = map(list, zip(*layers, strict=True))
    out_features = [_widths(layer.x, layer.weight, layer.out_features)[0] for layer in layers]
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
    """Apply one linear layer to ``x [B, S, k]``; arguments and errors are those of `Linear` and `grouped_linear`."""
    return grouped_linear([Linear(x, weight, bias, out_features, gate, index, residual)], gelu=gelu, tile=tile)[0]


class PreparedLinear:
    """One or two linear layers whose weights, shapes and tile are fixed (`prepare_linear`)."""

    def __init__(self, layers: Sequence[Linear], gelu: bool, tile: Tile | None) -> None:
        self._sizes = [(*layer.x.shape[:2], _widths(layer.x, layer.weight, layer.out_features)[0]) for layer in layers]
        self._gelu, self._tile = gelu, tile
        numbers = suffixes([layer.x for layer in layers])
        moving = [(f"{name}{n}",) if n else () for n in numbers for name in ("x", "gate", "index", "residual", "y")]
        self.launch = Bound(moving) if any(numbers) else None

    def __call__(self, layers: Sequence[Linear]) -> list[torch.Tensor]:
        """Apply the layers to tensors of the same shapes, strides and dtypes as those given to preparation."""
        outputs, tensors = [], []
        for layer, size in zip(layers, self._sizes):
            y = layer.x.new_empty(size)
            outputs.append(y)
            tensors += [layer.x, layer.gate, layer.index, layer.residual, y]
        if self.launch is not None:
            self.launch(tuple(tensors), lambda: described(describe_linear(layers, outputs, self._gelu, self._tile)))
        return outputs


def prepare_linear(layers: Sequence[Linear], *, gelu: bool = False, tile: Tile | None = None) -> PreparedLinear:
    """Check what `grouped_linear` checks, once for all later calls with the same weights and tensors like these.

    `ppcl_kernels.prepared.Bound` lists what the caller must then guarantee. There is no gradient.
    """
    _check_count(layers)
    check_linear(layers)
    return PreparedLinear(layers, gelu, tile)
