"""Linear layers over a prefix of their channels, with activation, gate and residual in the same kernel.

``y = x W[:n, :k]^T + b[:n]``, then in this order, if asked for: an activation, ``* gate``, ``+ residual``.
The activation is tanh-GELU, or SwiGLU with a second weight V:
``y = silu(x V[:n, :k]^T + v[:n]) * (x W[:n, :k]^T + b[:n])``. An adapter of either weight adds
``(x down[:, :k]^T) up[:n]^T`` to its product.

B batch, S tokens, K inputs and N outputs of the weight, of which the first ``k`` and ``n`` are kept. Weights are stored
in rank order, so a narrower layer is a prefix of a wider one. Eager writes and reads ``[B, S, n]`` again for each
operation after the product. The layers of both streams of a block run in one launch: the few text tokens fill waves
that the image tokens leave partly empty. With SwiGLU, half of a tile's columns are products with W and half with V, of
the same outputs, so that registers and shared memory are those of a layer with one weight.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F

from ppcl_kernels._check import check_index, check_like, check_modulation, check_shape, check_weight, wants_gradient
from ppcl_kernels._op import define_op
from ppcl_kernels._triton import jit, tl
from ppcl_kernels.launch import Launch, Target
from ppcl_kernels.matmul import Tile, by_parts, check_factors, operand, product_tile, product_tiles, takes_tma, work_off
from ppcl_kernels.modulation import per_token
from ppcl_kernels.prepared import Bound, described, suffixes

# What follows the bias.
Activation = Literal["none", "gelu", "swiglu"]


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
        silu_weight: with SwiGLU, ``[N, K]``: SiLU of its product multiplies that of ``weight``.
        silu_bias: ``[N]``, added before SiLU, or None.
        down, up: the factors ``[R, K]`` and ``[N, R]`` of an adapter, whose scale is in one of them, or None. For the
            kernel R is a power of two, the same of all adapters of a launch (`ppcl_kernels.matmul.padded_rank`).
        silu_down, silu_up: those of an adapter of ``silu_weight``.
    """

    x: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None = None
    out_features: int | None = None
    gate: torch.Tensor | None = None
    # The field hides tuple.index, which nobody calls.
    index: torch.Tensor | None = None  # type: ignore[assignment]  # hides tuple.index, which nobody calls
    residual: torch.Tensor | None = None
    silu_weight: torch.Tensor | None = None
    silu_bias: torch.Tensor | None = None
    down: torch.Tensor | None = None
    up: torch.Tensor | None = None
    silu_down: torch.Tensor | None = None
    silu_up: torch.Tensor | None = None

    @property
    def rank(self) -> int:
        """R, 0 without an adapter."""
        return max([len(down) for down in (self.down, self.silu_down) if down is not None], default=0)

    def reference(self, activation: Activation) -> torch.Tensor:
        """Apply it as `linear_reference` does."""
        after: dict[str, Any] = dict(zip(self._fields[4:], self[4:], strict=True))
        return linear_reference(*self[:4], activation=activation, **after)


def linear_reference(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    out_features: int | None = None,
    *,
    activation: Activation = "none",
    gate: torch.Tensor | None = None,
    index: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    silu_weight: torch.Tensor | None = None,
    silu_bias: torch.Tensor | None = None,
    down: torch.Tensor | None = None,
    up: torch.Tensor | None = None,
    silu_down: torch.Tensor | None = None,
    silu_up: torch.Tensor | None = None,
) -> torch.Tensor:
    """Multiply ``x [..., k]`` by the first ``k`` columns and the first ``out_features`` rows of ``weight [N, K]``.

    The arguments are those of `Linear`; GELU is the tanh form.

    Returns:
        ``[..., out_features]`` (all N rows where ``out_features`` is None).

    Raises:
        ValueError: ``x`` or ``out_features`` asks for more than the weight holds, or the activation is unknown or does
            not fit the weights.
    """
    n, _ = _widths(x, weight, out_features)
    check_activation(activation, weight, silu_weight)
    y = adapted_product_reference(x, weight, bias, n, down, up)
    if activation == "gelu":
        y = F.gelu(y, approximate="tanh")
    if silu_weight is not None:
        y = F.silu(adapted_product_reference(x, silu_weight, silu_bias, n, silu_down, silu_up)) * y
    if gate is not None:
        y = per_token(gate, index) * y
    return y if residual is None else residual + y


def adapted_product_reference(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    n: int,
    down: torch.Tensor | None,
    up: torch.Tensor | None,
) -> torch.Tensor:
    """The product alone, of the first ``n`` rows, with what an adapter adds."""
    k = x.shape[-1]
    # Slices are views: the other rows and columns are neither read nor multiplied.
    y = F.linear(x, weight[:n, :k], None if bias is None else bias[:n])
    return y if down is None or up is None else y + F.linear(F.linear(x, down[:, :k]), up[:n])


def check_activation(activation: str, weight: torch.Tensor, silu_weight: torch.Tensor | None) -> None:
    """Refuse an activation that is unknown, or whose weights are not there.

    Raises:
        ValueError: either; or the two weights of SwiGLU have different shapes.
    """
    if activation not in get_args(Activation):
        raise ValueError(f"activation is {activation!r}, wanted one of {', '.join(get_args(Activation))}")
    if (activation == "swiglu") != (silu_weight is not None):
        raise ValueError(f"silu_weight goes with the activation swiglu and with no other, here {activation}")
    if silu_weight is not None and silu_weight.shape != weight.shape:
        raise ValueError(f"silu_weight is {list(silu_weight.shape)}, wanted {list(weight.shape)}, as weight is")


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
    """Turn some columns of a tile of products into columns of the result, and write them.

    The bias is None where it was added before.
    """
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


@jit()
def _finish_swiglu(acc, arguments, place, ROWS: tl.constexpr, COLS: tl.constexpr, PARTS: tl.constexpr):
    """The epilogue with two products: SwiGLU makes one tile of them, of which the rest is as in `_finish`."""
    (bias, silu_bias), gate, index, residual, y, S, N, B, stride_gate_sample, GELU = arguments
    up, silu = acc
    cols = place[3] + tl.arange(0, COLS)
    if bias is not None:
        up += tl.load(bias + cols, mask=cols < N, other=0.0).to(tl.float32)[None, :]
    if silu_bias is not None:
        silu += tl.load(silu_bias + cols, mask=cols < N, other=0.0).to(tl.float32)[None, :]
    up *= silu * tl.sigmoid(silu)
    after = (None, gate, index, residual, y, S, N, B, stride_gate_sample, GELU)
    by_parts(up, _finish_columns, after, place, place[3], ROWS, COLS, PARTS)


@jit()
def _work_off_layer(
    start, x, w, bias, gate, index, residual, silu_w, silu_bias, y,
    S, N, K, stride_x_batch, stride_x_row, stride_w_row, stride_silu_w_row, stride_gate_sample,
    down, up, silu_down, silu_up, stride_down_row, B,
    ROWS: tl.constexpr, COLS: tl.constexpr, DEPTH: tl.constexpr, PARTS: tl.constexpr, FLAT: tl.constexpr,
    TMA: tl.constexpr, GELU: tl.constexpr, RANK: tl.constexpr,
):  # fmt: skip
    """Work off one layer; COLS are columns of the result."""
    sizes, x_strides = (S, N, K), (stride_x_batch, stride_x_row)
    adapter = (down, up, stride_down_row)
    if silu_w is None:
        arguments = (bias, gate, index, residual, y, S, N, B, stride_gate_sample, GELU)
        end = work_off(
            start, x, w, adapter, sizes, (x_strides, stride_w_row), B, tl.cdiv(N, COLS), None, product_tile, _finish,
            arguments, COLS, ROWS, COLS, DEPTH, PARTS, FLAT, TMA, RANK,
        )  # fmt: skip
    else:
        pair = ((bias, silu_bias), gate, index, residual, y, S, N, B, stride_gate_sample, GELU)
        end = work_off(
            start, x, (w, silu_w), (adapter, (silu_down, silu_up, stride_down_row)), sizes,
            (x_strides, (stride_w_row, stride_silu_w_row)), B, tl.cdiv(N, COLS), None,
            product_tiles, _finish_swiglu, pair, COLS, ROWS, COLS, DEPTH, PARTS, FLAT, TMA, RANK,
        )  # fmt: skip
    return end


# The token counts change with the prompt, and B = 1 would compile a second kernel: do not specialise on either.
# fmt: off
@jit(do_not_specialize=["B", "S0", "S1"])
def _linear_kernel(
    x0, w0, bias0, gate0, index0, residual0, silu_w0, silu_bias0, y0,
    S0, N0, K0, stride_x_batch0, stride_x_row0, stride_w_row0, stride_silu_w_row0, stride_gate_sample0,
    down0, up0, silu_down0, silu_up0, stride_down_row0,
    x1, w1, bias1, gate1, index1, residual1, silu_w1, silu_bias1, y1,
    S1, N1, K1, stride_x_batch1, stride_x_row1, stride_w_row1, stride_silu_w_row1, stride_gate_sample1,
    down1, up1, silu_down1, silu_up1, stride_down_row1,
    B,
    ROWS: tl.constexpr, COLS: tl.constexpr, DEPTH: tl.constexpr, PARTS: tl.constexpr, FLAT: tl.constexpr,
    TMA: tl.constexpr, GELU: tl.constexpr, RANK: tl.constexpr,
):
    # fmt: on
    start = _work_off_layer(
        tl.program_id(0), x0, w0, bias0, gate0, index0, residual0, silu_w0, silu_bias0, y0,
        S0, N0, K0, stride_x_batch0, stride_x_row0, stride_w_row0, stride_silu_w_row0, stride_gate_sample0,
        down0, up0, silu_down0, silu_up0, stride_down_row0, B,
        ROWS, COLS, DEPTH, PARTS, FLAT, TMA, GELU, RANK,
    )  # fmt: skip
    if y1 is not None:
        _work_off_layer(
            start, x1, w1, bias1, gate1, index1, residual1, silu_w1, silu_bias1, y1,
            S1, N1, K1, stride_x_batch1, stride_x_row1, stride_w_row1, stride_silu_w_row1, stride_gate_sample1,
            down1, up1, silu_down1, silu_up1, stride_down_row1, B,
            ROWS, COLS, DEPTH, PARTS, FLAT, TMA, GELU, RANK,
        )  # fmt: skip


# fmt: off
_LAYER_ARGUMENTS = (
    "x", "w", "bias", "gate", "index", "residual", "silu_w", "silu_bias", "y",
    "S", "N", "K", "stride_x_batch", "stride_x_row", "stride_w_row", "stride_silu_w_row", "stride_gate_sample",
    "down", "up", "silu_down", "silu_up", "stride_down_row",
)
# fmt: on


def outputs_of(tile: Tile, activation: Activation) -> int:
    """Return how many outputs a tile computes for each token: with SwiGLU, two of its columns make one."""
    return tile.cols // 2 if activation == "swiglu" else tile.cols


def _factors(layer: Linear, n: int, k: int, block: tuple[int, int, int], tma: bool) -> list[Any]:
    """Return the values of the last five of `_LAYER_ARGUMENTS`; the block is columns, rank and depth of a tile."""
    cols, rank, depth = block
    values: list[Any] = []
    for down, up in ((layer.down, layer.up), (layer.silu_down, layer.silu_up)):
        values.append(None if down is None else operand(down[:, :k], (rank, depth), tma))
        values.append(None if up is None else operand(up[:n], (cols, rank), tma))
    # Factors that are not there have no stride, so that without adapters the kernel is the same as it would be.
    return [*values, next((down.stride(0) for down in (layer.down, layer.silu_down) if down is not None), None)]


def launch_linear(
    layers: Sequence[Linear], outputs: Sequence[torch.Tensor], activation: Activation, tile: Tile, target: Target
) -> Launch:
    """Return the launch that writes ``outputs`` (contiguous ``[B, S, n]``) of one or two layers."""
    # Fields 9 to 12 are the factors of adapters.
    weights = [w for layer in layers for w in (layer.weight, layer.silu_weight, *layer[9:]) if w is not None]
    rank = max(layer.rank for layer in layers)
    tma = takes_tma(target, *(layer.x for layer in layers), *weights)
    cols = outputs_of(tile, activation)
    batch, tiles, arguments = layers[0].x.shape[0], 0, dict[str, Any]()
    for number in range(2):
        values: Sequence[Any] = (None,) * 9 + (0,) * 8 + (None,) * 5
        if number < len(layers):
            layer, y, silu = layers[number], outputs[number], layers[number].silu_weight
            tokens, n, k = y.shape[1], y.shape[2], layer.x.shape[2]
            tiles += batch * -(-tokens // tile.rows) * -(-n // cols)
            values = (
                operand(layer.x, (1, tile.rows, tile.depth), tma),
                operand(layer.weight[:n, :k], (cols, tile.depth), tma),
                layer.bias,
                layer.gate,
                layer.index,
                layer.residual,
                None if silu is None else operand(silu[:n, :k], (cols, tile.depth), tma),
                layer.silu_bias,
                y,
                tokens,
                n,
                k,
                layer.x.stride(0),
                layer.x.stride(1),
                layer.weight.stride(0),
                0 if silu is None else silu.stride(0),
                0 if layer.gate is None else layer.gate.stride(0),
                *_factors(layer, n, k, (cols, rank, tile.depth), tma),
            )
        arguments.update({f"{name}{number}": value for name, value in zip(_LAYER_ARGUMENTS, values, strict=True)})
    arguments |= {
        "B": batch,
        "ROWS": tile.rows,
        "COLS": cols,
        "DEPTH": tile.depth,
        "PARTS": tile.parts,
        "FLAT": bool(tile.flat),
        "TMA": tma,
        "GELU": activation == "gelu",
        "RANK": rank,
    }
    grid = (min(tiles, target.multiprocessors * tile.resident),)
    return Launch(_linear_kernel, grid, arguments, tile.warps, tile.stages, tile.registers)


def describe_linear(
    layers: Sequence[Linear], outputs: Sequence[torch.Tensor], activation: Activation, tile: Tile | None = None
) -> Launch | None:
    """Return the launch of layers that were checked, by default at the cheapest tile; None if no layer has tokens."""
    work = [(layer, y) for layer, y in zip(layers, outputs, strict=True) if y.numel()]
    if not work:
        return None
    target = Target.of(work[0][1].device)
    if tile is None:
        tokens, cols = [y.shape[1] for _, y in work], max(y.shape[2] for _, y in work)
        rank = max(layer.rank for layer, _ in work)
        tile = Tile.choose(target, work[0][1].dtype, tokens, work[0][1].shape[0], cols, activation == "swiglu", rank)
    return launch_linear([layer for layer, _ in work], [y for _, y in work], activation, tile, target)


def run_linear(layers: Sequence[Linear], activation: Activation, tile: Tile | None = None) -> list[torch.Tensor]:
    """Launch one or two layers that were checked; a stream without tokens launches nothing."""
    outputs = [
        layer.x.new_empty(*layer.x.shape[:2], _widths(layer.x, layer.weight, layer.out_features)[0]) for layer in layers
    ]
    launch = describe_linear(layers, outputs, activation, tile)
    if launch is not None:
        launch.run()
    return outputs


def check_linear(layers: Sequence[Linear], activation: Activation) -> None:
    """Refuse layers that the kernel cannot compute.

    Raises:
        ValueError: wrong device, dtype, shape or stride, more inputs or outputs than the weight holds, an activation
            that does not fit the weights, or adapters that do not.
    """
    first = layers[0].x
    for layer in layers:
        if layer.x.dim() != 3 or layer.x.shape[0] != first.shape[0]:
            raise ValueError(f"x is {list(layer.x.shape)}, wanted [B, S, k] with the same B in every layer")
        n, k = _widths(layer.x, layer.weight, layer.out_features)
        check_activation(activation, layer.weight, layer.silu_weight)
        if layer.silu_weight is not None:
            check_weight("silu_weight", layer.silu_weight)
        fields = layer._asdict()
        check_like(first, **{name: fields[name] for name in fields if name not in ("out_features", "index")})
        for name in ("bias", "silu_bias"):
            if fields[name] is not None:
                check_shape(name, fields[name], layer.weight.shape[:1])
        check_factors(n, k, max(each.rank for each in layers), (layer.down, layer.silu_down), layer[10::2])
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
    "Tensor?[] residual, Tensor?[] silu_weight, Tensor?[] silu_bias, Tensor?[] down, Tensor?[] up, "
    "Tensor?[] silu_down, Tensor?[] silu_up, str activation, int[]? tile) -> Tensor[]",
)
def _linear_op(*arguments):
    *fields, activation, tile = arguments
    layers = [Linear(*parts) for parts in zip(*fields, strict=True)]
    check_linear(layers, activation)
    return run_linear(layers, activation, None if tile is None else Tile(*tile))


@_linear_op.register_fake
def _(*arguments):
    *fields, activation, _ = arguments
    layers = [Linear(*parts) for parts in zip(*fields, strict=True)]
    check_linear(layers, activation)
    return [layer.x.new_empty(*layer.x.shape[:2], layer.out_features) for layer in layers]


def grouped_linear(
    layers: Sequence[Linear], *, activation: Activation = "none", tile: Tile | None = None
) -> list[torch.Tensor]:
    """Apply one or two linear layers, with the operations that follow each, in one launch.

    Where a gradient is needed, the reference computes the result.

    Args:
        layers: what to apply to which input; `Linear` gives the shapes.
        activation: what follows the bias in all layers: nothing, tanh-GELU or SwiGLU.
        tile: None to choose by shape and device.

    Returns:
        ``[B, S, n]`` for each layer, contiguous, in the dtype of ``x``.

    Raises:
        ValueError: wrong device, dtype, shape or stride, more inputs or outputs than the weight holds, or not one or
            two layers.
    """
    _check_count(layers)
    if any(wants_gradient(*layer[:3], layer.gate, *layer[6:]) for layer in layers):
        return [layer.reference(activation) for layer in layers]
    whole = [layer._replace(out_features=_widths(*layer[:2], layer.out_features)[0]) for layer in layers]
    return _linear_op(*map(list, zip(*whole, strict=True)), activation, tile)


def linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    out_features: int | None = None,
    *,
    activation: Activation = "none",
    gate: torch.Tensor | None = None,
    index: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    silu_weight: torch.Tensor | None = None,
    silu_bias: torch.Tensor | None = None,
    down: torch.Tensor | None = None,
    up: torch.Tensor | None = None,
    silu_down: torch.Tensor | None = None,
    silu_up: torch.Tensor | None = None,
    tile: Tile | None = None,
) -> torch.Tensor:
    """Apply one linear layer to ``x [B, S, k]``; arguments and errors are those of `Linear` and `grouped_linear`."""
    layer = Linear(
        *(x, weight, bias, out_features, gate, index, residual, silu_weight, silu_bias, down, up, silu_down, silu_up)
    )
    return grouped_linear([layer], activation=activation, tile=tile)[0]


class PreparedLinear:
    """One or two linear layers whose weights, shapes and tile are fixed (`prepare_linear`)."""

    def __init__(self, layers: Sequence[Linear], activation: Activation, tile: Tile | None) -> None:
        self._sizes = [(*layer.x.shape[:2], _widths(layer.x, layer.weight, layer.out_features)[0]) for layer in layers]
        self._activation, self._tile = activation, tile
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
            self.launch(
                tuple(tensors), lambda: described(describe_linear(layers, outputs, self._activation, self._tile))
            )
        return outputs


def prepare_linear(
    layers: Sequence[Linear], *, activation: Activation = "none", tile: Tile | None = None
) -> PreparedLinear:
    """Check what `grouped_linear` checks, once for all later calls with the same weights and tensors like these.

    `ppcl_kernels.prepared.Bound` lists what the caller must then guarantee. There is no gradient.
    """
    _check_count(layers)
    check_linear(layers, activation)
    return PreparedLinear(layers, activation, tile)
