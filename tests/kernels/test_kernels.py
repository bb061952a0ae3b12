"""The Triton kernels against their references: on a GPU if there is one, otherwise in triton's interpreter."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator, Sequence
from unittest import mock

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

import ppcl_kernels as pk
from ppcl_kernels.heads import head_cols
from ppcl_kernels.launch import Launch, Target
from ppcl_kernels.linear import Activation
from ppcl_kernels.matmul import Tile, padded_rank
from ppcl_kernels.qkv_projection import tile_candidates

# The package exports functions with the names of its modules.
ada_module, residual_module, linear_module, qkv_module, attention_module = (
    importlib.import_module(f"ppcl_kernels.{name}")
    for name in ("ada_layer_norm", "gated_residual", "linear", "qkv_projection", "joint_attention")
)
AdaTile, AttentionTile = ada_module.Tile, attention_module.Tile

# In the interpreter numpy warns of overflows of exp, under a mask and in a sigmoid.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
# The interpreter's bfloat16 dot is wrong.
DTYPES = (torch.float32, torch.float16, *((torch.bfloat16,) if CUDA else ()))
# The most that one rounding changes a value, relative to the value: half the distance between neighbours above 1.
ROUNDING = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
TOKENS = (1, 7, 63, 64, 65)
# The tiny preset: model dimension, head dimension, and the counts that its plans keep.
DIM, HEAD_DIM, HEADS, CHANNELS = 96, 16, (6, 5, 4, 3), (384, 288, 192, 96)
SMALL_TILES = (Tile(16, 16, 16, 4, 2), Tile(16, 32, 16, 4, 2, 2), Tile(32, 64, 16, 4, 2, 4), Tile(32, 32, 32, 4, 2))
# Examples are small already, and shrinking them takes minutes in the interpreter.
sampled = settings(
    max_examples=15,
    deadline=None,
    derandomize=True,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
# Of large matrices of cases: half precision in `make full`.
matrix_dtypes = pytest.mark.parametrize(
    "dtype",
    [DTYPES[0], *(pytest.param(dtype, marks=() if CUDA else pytest.mark.slow) for dtype in DTYPES[1:])],
    ids=str,
)
paths = pytest.mark.parametrize("tma", [True, False], ids=["tma", "pointers"])
MARGIN = 64


@pytest.fixture(autouse=True, scope="module")
def poisoned() -> Iterator[None]:
    """Fill uninitialised memory with NaN, so that elements which no kernel writes are found."""
    before = (torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory)
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(before[0])
    torch.utils.deterministic.fill_uninitialized_memory = before[1]


@pytest.fixture(autouse=True)
def margins(poisoned: None) -> Iterator[list[torch.Tensor]]:
    """Allocate every output amid NaN, and check that the NaN around it do not change."""
    original, buffers = torch.Tensor.new_empty, []

    def amid(self: torch.Tensor, *shape, **options) -> torch.Tensor:
        if type(self) is not torch.Tensor or self.device.type != DEVICE.type or options:
            return original(self, *shape, **options)
        shape = shape[0] if len(shape) == 1 and not isinstance(shape[0], int) else shape
        count = torch.Size(shape).numel()
        buffers.append(torch.empty(count + 2 * MARGIN, dtype=self.dtype, device=self.device))
        return buffers[-1][MARGIN : MARGIN + count].view(shape)

    with mock.patch.object(torch.Tensor, "new_empty", amid):
        yield buffers
    for buffer in buffers:
        assert buffer[:MARGIN].isnan().all() and buffer[-MARGIN:].isnan().all(), "written beyond the output"


def test_outputs_are_poisoned(margins):
    """The fixtures work: uninitialised memory is NaN, also inside a custom op."""
    x = make(2, 3, 8)
    assert x.new_empty(5).isnan().all() and x.half().new_empty((2, 3)).isnan().all() and len(margins) == 2
    with mock.patch.object(Launch, "run", lambda self: None):
        assert pk.linear(x, make(4, 8)).isnan().all()
        assert pk.ada_layer_norm(x, make(2, 8), make(2, 8)).isnan().all()
        assert pk.joint_attention(x[:, None], x[:, None], x[:, None]).isnan().all()


def make(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32, size: float = 1.0) -> torch.Tensor:
    """Normal values, the same on every device; the seed depends on the shape, so that operands differ."""
    generator = torch.Generator().manual_seed(1000 * seed + sum(shape))
    return (torch.randn(*shape, generator=generator) * size).to(DEVICE, dtype)


def weight(n: int, k: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """A weight whose products have values of size 1."""
    return make(n, k, seed=seed, dtype=dtype, size=k**-0.5)


def amid_nan(whole: torch.Tensor, *part: slice) -> torch.Tensor:
    """A part of a tensor that is NaN everywhere else, so that reads outside the part are found."""
    values = whole[part].clone()
    whole.fill_(float("nan"))[part] = values
    return whole[part]


def double(value):
    """The same arguments, which are already rounded, in float64. (Rope tables are used as float32, see rope.)"""
    if isinstance(value, torch.Tensor):
        return value.double() if value.is_floating_point() else value
    if isinstance(value, tuple | list):
        items = [double(item) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    return value


def close(actual: torch.Tensor, expected: torch.Tensor, terms: int = 1, roundings: int = 1, size: float = 1.0) -> None:
    """Assert that a result in its dtype is near a float64 one, at its worst element and in the mean square.

    Inputs are normal and weights are scaled by the number of inputs, so results and their terms have values of ``size``
    1. A sum of ``terms`` products in float32 rounds once for each term, up or down. These errors add up like a random
    walk, to about ``2**-24 * sqrt(terms)`` of the size; the worst of some thousand elements is 4 deviations out. The
    few float32 operations that follow (gelu, norm, rotation, softmax) count as 16 more terms. Each of the ``roundings``
    to the dtype itself (1 for the result, plus those inside a kernel) changes a value by half a last place.
    """
    assert actual.shape == expected.shape and actual.is_contiguous()
    assert torch.isfinite(actual).all()
    if not actual.numel():
        return
    error = (actual.double() - expected.double()).abs()
    relative = roundings * ROUNDING[actual.dtype] + 4 * ROUNDING[torch.float32] * (terms + 16) ** 0.5
    rms = expected.double().square().mean().sqrt().item()
    assert error.max() <= relative * max(size, expected.abs().max().item()), f"off by {error.max():.2e}"
    assert error.square().mean().sqrt() <= relative * max(size, rms), f"off by {error.square().mean().sqrt():.2e} RMS"


@contextlib.contextmanager
def operands(tma: bool) -> Iterator[None]:
    """Load operands by descriptors if their strides allow it, or all by pointers."""
    with contextlib.ExitStack() as stack:
        for module in () if tma else (linear_module, qkv_module, attention_module):
            stack.enter_context(mock.patch.object(module, "takes_tma", lambda *_: False))
        yield


def token_index(batch: int, tokens: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
    """Zeros and ones, in a pattern that neither tiles nor samples repeat."""
    return (torch.arange(batch * tokens).mul(7).remainder(11) < 5).view(batch, tokens).to(DEVICE, dtype)


def modulation(batch: int, width: int, seed: int, dtype: torch.dtype, chunk: int = 2) -> torch.Tensor:
    """A modulation ``[B, D]`` as in a model: one of six chunks of a wider tensor, so not contiguous."""
    return make(batch, 6 * width, seed=seed, dtype=dtype).chunk(6, dim=-1)[chunk]


# Adaptive LayerNorm and the gated residual.


@matrix_dtypes
@pytest.mark.parametrize("indexed", [False, True], ids=["sample", "token"])
@pytest.mark.parametrize(
    ("tokens", "width", "rows"),
    [*((s, w, r) for s, w, r in zip(TOKENS, (33, 96, 17, 50, 1), (None, 4, 16, 1, 4))), (7, 1025, None), (33, 96, 16)],
)
def test_ada_layer_norm(dtype, indexed, tokens, width, rows):
    """Slices of joint tensors, whole tiles of rows and ragged ones."""
    batch = 2
    joint = make(batch, tokens + 3, width + 5, seed=1, dtype=dtype)
    # Rows that are further apart than their length.
    x = amid_nan(joint, slice(None), slice(3, None), slice(width))
    index = token_index(batch, tokens, torch.int32) if indexed else None
    scale, shift = (modulation(batch * (1 + indexed), width, 3, dtype, chunk) for chunk in range(2))
    tile = None if rows is None else AdaTile(rows, 4)
    y = pk.ada_layer_norm(x, scale, shift, index, tile=tile)
    # Values reach about 4 deviations times 1 + scale; LayerNorm sums over D twice.
    close(y, pk.ada_layer_norm_reference(*double((x, scale, shift)), index), terms=2 * width)


@matrix_dtypes
@pytest.mark.parametrize("indexed", [False, True], ids=["sample", "token"])
@pytest.mark.parametrize(
    ("tokens", "width", "cols"),
    [(1, 33, None), (7, 96, 32), (63, 17, 16), (64, 50, 32), (65, 1, None), (7, 1025, None)],
)
def test_gated_residual(dtype, indexed, tokens, width, cols):
    """Slices of joint tensors, rows in several pieces, whole tiles and ragged ones."""
    batch = 2
    x = amid_nan(make(batch, tokens + 3, width + 5, seed=1, dtype=dtype), slice(None), slice(3, None), slice(width))
    h = amid_nan(make(batch, tokens + 2, width + 3, seed=2, dtype=dtype), slice(None), slice(tokens), slice(3, None))
    index = token_index(batch, tokens, torch.int32) if indexed else None
    gate = modulation(batch * (1 + indexed), width, 3, dtype)
    tile = None if cols is None else residual_module.Tile(cols, 4)
    y = pk.gated_residual(x, gate, h, index, tile=tile)
    close(y, pk.gated_residual_reference(*double((x, gate, h)), index))


def test_ada_layer_norm_many_tokens():
    """So many tokens that tiles of several rows are chosen."""
    tokens = 1025
    x, scale, shift = make(1, tokens, 50), make(1, 50, seed=1), make(1, 50, seed=2)
    assert CUDA or AdaTile.choose(Target.of(DEVICE), torch.float32, 1, tokens, 50).rows > 1
    close(pk.ada_layer_norm(x, scale, shift), pk.ada_layer_norm_reference(*double((x, scale, shift))), terms=100)


def test_ada_layer_norm_far_from_zero():
    """The variance is that of centred values, so a large mean costs only its own rounding."""
    x, scale, shift = make(1, 3, 64) + 100, make(1, 64, seed=1), make(1, 64, seed=2)
    y = pk.ada_layer_norm(x, scale, shift, eps=1e-3)
    # The mean, which is about 100, is rounded in float32.
    close(y, pk.ada_layer_norm_reference(*double((x, scale, shift)), eps=1e-3), terms=128, size=100.0)
    small = x * 1e-3 - 0.1
    # eps matters: values of size 1e-3 have a smaller variance.
    close(pk.ada_layer_norm(small, scale, shift, eps=1e-3), pk.ada_layer_norm_reference(small, scale, shift, eps=1e-3))


def test_no_tokens():
    """A stream without tokens gives a result without tokens."""
    x, m = make(2, 0, 8), make(2, 8)
    assert pk.ada_layer_norm(x, m, m).shape == (2, 0, 8) and pk.gated_residual(x, m, x).shape == (2, 0, 8)
    assert pk.linear(x, weight(5, 8)).shape == (2, 0, 5)
    assert pk.joint_attention(x[:, :, None], x[:, :, None], x[:, :, None]).shape == (2, 0, 1, 8)


# Linear layers.


def check_groups(groups: Sequence[pk.Linear], activation: Activation = "none", tile: Tile | None = None) -> None:
    outputs = pk.grouped_linear(groups, activation=activation, tile=tile)
    for y, g in zip(outputs, groups, strict=True):
        # SwiGLU multiplies two products, each of size 1 with its own error.
        terms = g.x.shape[-1] * (4 if activation == "swiglu" else 1)
        close(y, pk.Linear(*double(tuple(g))).reference(activation), terms=terms)


def group(
    batch,
    tokens,
    k,
    n,
    dtype,
    seed=0,
    kept=None,
    gate="none",
    bias=True,
    residual=False,
    more=0,
    activation="none",
    rank=0,
) -> pk.Linear:
    """A layer whose x is a slice of a joint tensor; x and weight have ``more`` columns than are kept."""
    kept = n if kept is None else kept
    x, w = make(batch, tokens + 5, k + more, seed=seed, dtype=dtype), weight(n, k + more, seed + 1, dtype)
    b = make(n, seed=seed + 2, dtype=dtype)
    silu_w, silu_b = weight(n, k + more, seed + 5, dtype), make(n, seed=seed + 6, dtype=dtype)
    for matrix, vector in ((w, b), (silu_w, silu_b)):
        amid_nan(matrix, slice(kept), slice(k))
        amid_nan(vector, slice(kept))
    factors = adapter(n, k + more, kept, k, rank, seed + 7, dtype) if rank else (None, None)
    silu_factors = adapter(n, k + more, kept, k, rank, seed + 9, dtype) if rank and activation == "swiglu" else None
    return pk.Linear(
        amid_nan(x, slice(None), slice(5, None), slice(k)),
        w,
        b if bias else None,
        kept,
        None if gate == "none" else modulation(batch * (2 if gate == "token" else 1), kept, seed + 3, dtype),
        token_index(batch, tokens) if gate == "token" else None,
        make(batch, tokens, kept, seed=seed + 4, dtype=dtype) if residual else None,
        silu_w if activation == "swiglu" else None,
        silu_b if activation == "swiglu" and bias else None,
        *factors,
        *(silu_factors or ()),
    )


def adapter(n, columns, kept, k, rank, seed, dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Factors whose product adds values of size 1; what is not kept is NaN, what they are padded with is zero."""
    padded = padded_rank(rank)
    down, up = weight(padded, k + columns, seed, dtype)[:, :columns].contiguous(), weight(n, padded, seed + 1, dtype)
    amid_nan(down, slice(None), slice(k))
    amid_nan(up, slice(kept))
    down[rank:, :k] = 0
    up[:kept, rank:] = 0
    return down, up


@dtypes
@paths
@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize(("k", "n"), [(33, 50), (96, 17), (16, 136)])
def test_linear_sizes(dtype, tma, tokens, k, n):
    """Counts of tokens and channels around the edges of tiles, also with strides that TMA does not take."""
    with operands(tma):
        check_groups([group(2, tokens, k, n, dtype)])


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("activation", ["none", "gelu", "swiglu"])
@pytest.mark.parametrize("gate", ["none", "sample", "token"])
@pytest.mark.parametrize("residual", [False, True])
@dtypes
def test_linear_epilogue(bias, activation, gate, residual, dtype):
    """Every combination of operations after the product."""
    layer = group(2, 19, 32, 40, dtype, gate=gate, bias=bias, residual=residual, activation=activation)
    check_groups([layer], activation, SMALL_TILES[1])


@dtypes
@paths
@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize(("k", "n", "kept"), [(33, 50, 41), (96, 17, 17), (16, 136, 1)])
def test_swiglu_sizes(dtype, tma, tokens, k, n, kept):
    """Counts of tokens and kept channels around the edges of tiles, of which half the columns belong to each weight."""
    with operands(tma):
        check_groups([group(2, tokens, k, n, dtype, kept=kept, more=8, activation="swiglu")], "swiglu")


@dtypes
@paths
@pytest.mark.parametrize("rank", [1, 16, 17])
@pytest.mark.parametrize("activation", ["none", "gelu", "swiglu"])
def test_linear_with_adapters(dtype, tma, rank, activation):
    """Two streams with an adapter each, and next to one without; ranks are padded to what tensor cores take."""
    options = {"kept": 41, "more": 8, "activation": activation, "rank": rank}
    groups = [
        group(2, 7, 33, 50, dtype, seed=10, **options, gate="sample"),
        group(2, 35, 40, 50, dtype, seed=30, **options, gate="token", residual=True),
    ]
    with operands(tma):
        for each in (groups, [groups[0], groups[1]._replace(down=None, up=None)]):
            check_adapted(each, activation, SMALL_TILES[1] if rank == 16 else None)


def check_adapted(groups: Sequence[pk.Linear], activation: Activation, tile: Tile | None = None) -> None:
    """As `check_groups`; what an adapter reads in between is rounded to the dtype as well."""
    outputs = pk.grouped_linear(groups, activation=activation, tile=tile)
    for y, g in zip(outputs, groups, strict=True):
        wanted = pk.Linear(*double(tuple(g))).reference(activation)
        without = pk.Linear(*double(tuple(g[:9]))).reference(activation)
        assert g.down is None or (wanted - without).abs().max() > 0.1
        close(y, wanted, terms=4 * (g.x.shape[-1] + 32), roundings=2, size=2.0)


def interpreted_tiles(dtype: torch.dtype) -> list[Tile]:
    return [*SMALL_TILES, *Tile.candidates(Target.of(DEVICE), dtype)]


@paths
@pytest.mark.parametrize("text", [0, 7])
@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
@pytest.mark.parametrize(
    ("dtype", "tile"), [(dtype, tile) for dtype in DTYPES for tile in (None, *interpreted_tiles(dtype))], ids=str
)
def test_linear_groups(tma, text, dtype, tile, activation):
    """Two streams that differ in everything, on every tile; a thread block continues from one layer to the other."""
    groups = [
        group(2, text, 24, 42, dtype, seed=10, kept=35, gate="sample", more=8, activation=activation),
        group(2, 35, 32, 51, dtype, seed=20, gate="token", residual=True, activation=activation),
    ]
    with operands(tma):
        check_groups(groups, activation=activation, tile=tile)
        if text and tile is None:
            check_groups(groups[::-1], activation)


def test_linear_many_tokens():
    """More tiles of rows than a band has, so that the order of tiles wraps."""
    check_groups([group(1, 300, 16, 20, torch.float32)], tile=SMALL_TILES[0])
    check_groups([group(1, 1472, 33, 50, torch.float32)])


@pytest.mark.parametrize("heads", HEADS)
@dtypes
def test_linear_out_projection(heads, dtype):
    """The out-projection of the tiny preset: the columns of the first heads of a square weight."""
    x, w = make(2, 9, heads * HEAD_DIM, dtype=dtype), weight(DIM, DIM, 1, dtype)
    close(pk.linear(x, w), pk.linear_reference(*double((x, w))), terms=heads * HEAD_DIM)


@sampled
@given(data=st.data())
def test_linear_sampled(data):
    """Random counts of inputs, outputs, tokens and samples."""

    def draw(low, high):
        return data.draw(st.integers(low, high))

    dtype = data.draw(st.sampled_from(DTYPES))
    gate, residual = data.draw(st.sampled_from(["none", "sample", "token"])), data.draw(st.booleans())
    groups, activation = [], data.draw(st.sampled_from(["none", "gelu", "swiglu"]))
    more = {"gate": gate, "residual": residual, "activation": activation}
    for seed in range(draw(1, 2)):
        n = draw(1, 70)
        groups.append(group(2, draw(0, 40), draw(1, 50), n, dtype, seed, draw(1, n), more=draw(0, 9), **more))
    with operands(data.draw(st.booleans())):
        check_groups(groups, activation, data.draw(st.sampled_from([None, *SMALL_TILES[1:]])))


# The MLP.


def mlp_group(batch, tokens, width, full, kept, dtype, seed=0, gate="none", residual=False, swiglu=False) -> pk.Mlp:
    tail = group(batch, tokens, full, width, dtype, seed + 2, gate=gate, residual=residual)
    up = weight(full, width, seed, dtype), make(full, seed=seed + 1, dtype=dtype)
    x = make(batch, tokens + 4, width, seed=seed + 9, dtype=dtype)[:, :tokens]
    silu = (weight(full, width, seed + 7, dtype), make(full, seed=seed + 8, dtype=dtype)) if swiglu else ()
    return pk.Mlp(x, *up, tail.weight, tail.bias, kept, tail.gate, tail.index, tail.residual, *silu)


def check_mlps(groups: Sequence[pk.Mlp], **tiles: Tile) -> None:
    for y, g in zip(pk.grouped_mlp(groups, **tiles), groups, strict=True):
        wanted = pk.mlp_reference(*double(g[:6]), **{name: double(getattr(g, name)) for name in g._fields[6:]})
        # Each hidden channel is rounded to the dtype once; over the channels this averages to less than 1 rounding.
        close(y, wanted, terms=g.x.shape[-1] + g.down.shape[1], roundings=2)


@pytest.mark.parametrize("channels", (*CHANNELS, 50, 1))
@pytest.mark.parametrize("swiglu", [False, True])
@dtypes
def test_mlp(channels, swiglu, dtype):
    """Every count of channels of the tiny preset, and some that no tile divides."""
    check_mlps([mlp_group(2, 7, DIM, CHANNELS[0], channels, dtype, gate="sample", residual=True, swiglu=swiglu)])


@pytest.mark.parametrize("text", [0, 5])
@paths
@matrix_dtypes
def test_mlp_streams(text, tma, dtype):
    """Two streams that keep different counts, all channels where no count is given, tiles passed by name."""
    groups = [
        mlp_group(2, text, 40, 64, 33, dtype, 10, "token"),
        mlp_group(2, 17, 48, 72, None, dtype, 30, "token", residual=True),
    ]
    with operands(tma):
        check_mlps(groups, up_tile=SMALL_TILES[2], down_tile=SMALL_TILES[0])
    g = groups[1]
    alone = pk.mlp(*g[:6], gate=g.gate, index=g.index, residual=g.residual)
    close(alone, double(pk.grouped_mlp(groups)[1]), roundings=2, terms=72)


# Queries, keys and values.


def rope_of(
    tokens: int, head_dim: int, form: str, seed: int = 0
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor] | None:
    """Rotations by random angles: none, one table [S, E/2, 2], two tables [S, E/2], or two of doubled values [S, E]."""
    angles = make(tokens, head_dim // 2, seed=seed, size=3.0)
    cos, sin = angles.cos(), angles.sin()
    return {
        "none": None,
        "table": torch.stack((cos, sin), -1),
        "pairs": (cos, sin),
        "doubled": (cos.repeat_interleave(2, 1), sin.repeat_interleave(2, 1)),
    }[form]


def stream(
    tokens, width, heads, head_dim, dtype, seed, norms=True, biases=True, rope="table", queries=True, rank=0
) -> pk.Stream:
    """A stream of two samples: a slice of a joint tensor, and weights of ``heads`` heads with 8 extra columns."""
    rows = heads * head_dim
    weights = tuple(weight(rows, width + 8, seed + n, dtype) for n in (1, 2, 3))
    for whole in weights:
        amid_nan(whole, slice(None), slice(width))
    return pk.Stream(
        amid_nan(make(2, tokens + 3, width, seed=seed, dtype=dtype), slice(None), slice(3, None)),
        weights,
        tuple(make(rows, seed=seed + n, dtype=dtype) if biases else None for n in (4, 5, 6)),
        tuple(make(head_dim, seed=seed + n, dtype=dtype) if norms else None for n in (7, 8)),
        rope_of(tokens, head_dim, rope, seed + 9),
        queries,
        # q and v, as many adapters have them.
        *zip(
            *[
                adapter(rows, width + 8, rows, width, rank, seed + n, dtype) if n != 11 and rank else (None, None)
                for n in (10, 11, 12)
            ]
        ),
    )


def wide(streams: Sequence[pk.Stream]) -> list[pk.Stream]:
    """Streams in float64; the reference rotates by float32 tables."""
    return [pk.Stream(*double(s[:4]), s.rope, s.queries, *double(s[6:])) for s in streams]


def check_qkv(streams, heads, head_dim, tile=None, eps=1e-6) -> None:
    outputs = pk.qkv_projection(streams, heads, head_dim, eps, tile=tile)
    wanted = pk.qkv_projection_reference(wide(streams), heads, head_dim, eps)
    for out, reference in zip(outputs, wanted, strict=True):
        close(out, reference, terms=streams[0].x.shape[-1] + head_dim)


@dtypes
@paths
@pytest.mark.parametrize("head_dim", [8, 16, 24, 64, 128])
def test_qkv_head_dims(dtype, tma, head_dim):
    """Heads narrower than a tile and as wide as one, and an eps that is large enough to matter."""
    streams = [stream(t, 40, 3, head_dim, dtype, s, rope="pairs") for t, s in ((5, 10), (35, 30))]
    with operands(tma):
        check_qkv(streams, 2, head_dim, eps=0.1)


@pytest.mark.parametrize("norms", [False, True])
@pytest.mark.parametrize("biases", [False, True])
@pytest.mark.parametrize("rope", ["none", "table", "pairs", "doubled"])
@pytest.mark.parametrize("text_queries", [False, True])
def test_qkv_forms(norms, biases, rope, text_queries):
    """Every combination of what a stream may have, also with the image first or alone."""
    options = {"norms": norms, "biases": biases, "rope": rope}
    text = stream(7, 32, 2, 16, torch.float32, 10, **options, queries=text_queries)
    image = stream(18, 32, 2, 16, torch.float32, 30, **options)
    for streams in ([text, image], [image] if text_queries else [image, text]):
        check_qkv(streams, 2, 16)


@matrix_dtypes
@paths
@pytest.mark.parametrize(
    ("head_dim", "parts"), [(16, 1), (24, 2), (64, 1), (64, 2), (64, 4), (24, None)], ids=lambda value: str(value)
)
def test_qkv_tiles(dtype, tma, head_dim, parts):
    """Small tiles, with and without parts, and every candidate."""
    tile = Tile(16, head_cols(head_dim), 16, 4, 2, parts) if parts else None
    image = stream(19, 17 if parts == 1 else 24, 2, head_dim, dtype, 30)
    text = stream(5, image.x.shape[2], 2, head_dim, dtype, 50, queries=parts == 2)
    with operands(tma):
        for one in tile_candidates(Target.of(DEVICE), dtype, head_dim) if tile is None else (tile,):
            check_qkv([text, image], 2, head_dim, one)


@dtypes
@paths
@pytest.mark.parametrize("rank", [1, 30])
def test_qkv_with_adapters(dtype, tma, rank):
    """On both streams, on one, and with heads by number."""
    text, image = (stream(t, 40, 3, 16, dtype, s, rank=rank) for t, s in ((5, 10), (35, 40)))
    listed = torch.tensor([2, 0], device=DEVICE).int()
    with operands(tma):
        for streams, heads in (
            ([text, image], 2),
            ([text._replace(downs=(None,) * 3, ups=(None,) * 3), image], listed),
        ):
            outputs = pk.qkv_projection(streams, heads, 16)
            wanted = pk.qkv_projection_reference(wide(streams), heads, 16)
            without = pk.qkv_projection_reference([pk.Stream(*s[:6]) for s in wide(streams)], heads, 16)
            for out, reference in zip(outputs, wanted, strict=True):
                # Norms of one head divide by its root mean square, which is rounded values away from 1.
                close(out, reference, terms=4 * (40 + 32), roundings=3, size=2.0)
            assert all((a - b).abs().max() > 0.1 for a, b in zip(wanted[::2], without[::2], strict=True))


@dtypes
@pytest.mark.parametrize("queries", [False, True])
def test_qkv_without_text(dtype, queries):
    """A prompt may be empty."""
    text, image = (stream(t, 17, 2, 16, dtype, 10 + t, queries=queries or t > 0) for t in (0, 9))
    check_qkv([text, image], 2, 16)


@pytest.mark.parametrize("tokens", TOKENS)
def test_qkv_tokens(tokens):
    """Odd counts of tokens on either stream."""
    streams = [stream(t, 33, 2, 16, torch.float32, s, queries=s > 10) for t, s in ((tokens, 10), (66 - tokens, 30))]
    check_qkv(streams, 2, 16)


@pytest.mark.parametrize("heads", [*HEADS, [0, 1, 2], [4, 0, 5]], ids=str)
@dtypes
def test_qkv_tiny_preset(heads, dtype):
    """The first heads in rank order, or heads by number in the order of the list."""
    streams = [stream(t, DIM, HEADS[0], HEAD_DIM, dtype, s) for t, s in ((3, 10), (12, 30))]
    check_qkv(streams, torch.tensor(heads, device=DEVICE).int() if isinstance(heads, list) else heads, HEAD_DIM)


@sampled
@given(data=st.data())
def test_qkv_sampled(data):
    """Random sets of heads in random orders, of random head dimensions."""
    held = data.draw(st.integers(1, 4))
    chosen = data.draw(st.permutations(range(held)))[: data.draw(st.integers(1, held))]
    heads = torch.tensor(chosen, dtype=torch.int32, device=DEVICE) if data.draw(st.booleans()) else len(chosen)
    head_dim, width = 2 * data.draw(st.integers(1, 17)), data.draw(st.integers(1, 40))
    dtype, form = data.draw(st.sampled_from(DTYPES)), data.draw(st.sampled_from(["none", "table", "pairs", "doubled"]))
    streams = [stream(data.draw(st.integers(0, 18)), width, held, head_dim, dtype, s, rope=form) for s in (10, 30)]
    with operands(data.draw(st.booleans())):
        check_qkv(streams, heads, head_dim, eps=0.01)


def raw_heads(tokens, heads, head_dim, dtype, seed, queries=True):
    q, k, v = (make(2, tokens, heads, head_dim, seed=seed + n, dtype=dtype) for n in range(3))
    return q if queries else None, k, v


@matrix_dtypes
@pytest.mark.parametrize(
    ("head_dim", "rope"), zip((8, 16, 24, 64, 128), ("table", "none", "pairs", "doubled", "table"))
)
@pytest.mark.parametrize(("text", "queries"), [(0, True), (7, False)])
def test_norm_rope(dtype, head_dim, rope, text, queries):
    """Norm, rotation and joint layout after given products, also for an image stream without norms."""
    raw = [raw_heads(text, 2, head_dim, dtype, 10, queries), raw_heads(35, 2, head_dim, dtype, 20)]
    norms = [tuple(make(head_dim, seed=n, dtype=dtype) for n in pair) for pair in ((1, 2), (3, 4))]
    ropes = [rope_of(part[1].shape[1], head_dim, rope, n) for n, part in enumerate(raw)]
    # Biases of more heads than there are: a prefix is used.
    biases = [tuple(make(3 * head_dim, seed=n, dtype=dtype) for n in three) for three in ((5, 6, 7), (8, 9, 10))]
    biases[1] = (biases[1][0], None, biases[1][2])
    for both, added in ((norms, None), ([norms[0], (None, None)], None), (norms, biases)):
        wanted = pk.norm_rope_reference(double(raw), double(both), ropes, 0.1, None if added is None else double(added))
        for out, reference in zip(pk.norm_rope(raw, both, ropes, 0.1, added), wanted, strict=True):
            close(out, reference, terms=head_dim)


@pytest.mark.parametrize("tokens", TOKENS)
def test_norm_rope_one_stream(tokens):
    """One stream alone, with several counts of heads."""
    raw, norms = [raw_heads(tokens, 5, 16, torch.float32, 0)], [(make(16, seed=1), make(16, seed=2))]
    ropes = [rope_of(tokens, 16, "table")]
    wanted = pk.norm_rope_reference(double(raw), double(norms), ropes)
    for out, reference in zip(pk.norm_rope(raw, norms, ropes), wanted, strict=True):
        close(out, reference, terms=16)


# Attention.


def attention_inputs(queries, keys, heads, head_dim, dtype, batch=2, seed=0):
    """q, k and v with different strides; k and v are slices of wider tensors, as of a cache."""
    q = make(batch, queries, heads, head_dim, seed=seed, dtype=dtype)
    wholes = (make(batch, keys + 3, heads, head_dim, seed=seed + n, dtype=dtype) for n in (1, 2))
    k, v = (amid_nan(whole, slice(None), slice(keys)) for whole in wholes)
    return q, k, v


def check_attention(q, k, v, key_mask=None, key_lengths=None, scale=None, tile=None) -> torch.Tensor:
    y = pk.joint_attention(q, k, v, key_mask, key_lengths, scale, tile=tile)
    wanted = pk.joint_attention_reference(*double((q, k, v)), key_mask, key_lengths, scale)
    # The softmax weights are rounded to the dtype before the product with v, whose values reach 4: at most one rounding
    # of size 4, relative to the largest output, which is smaller than v since it is an average. Scores are sums over E,
    # and their errors are multiplied by the weights; outputs are sums over T.
    close(y, wanted, terms=k.shape[1] + 16 * q.shape[3], roundings=2, size=4.0 if q.dtype != torch.float32 else 1.0)
    return y


def attention_tiles(dtype: torch.dtype, head_dim: int) -> list:
    small = [AttentionTile(16, 16, 4, 2), AttentionTile(16, 32, 4, 1), AttentionTile(32, 16, 4, 2)]
    return [None, *small, *AttentionTile.candidates(Target.of(DEVICE), dtype, head_dim)]


def masks(keys: int, step: int) -> torch.Tensor:
    """Masks, one for each sample, that begin, end and break inside tiles of ``step`` keys and at their edges."""
    at = torch.arange(keys)
    patterns = (
        *(at < 0, at >= 0, at < keys * 2 // 3, at >= keys // 2, (at >= keys // 4) & (at < keys * 3 // 4)),
        *((at < keys // 5) | (at >= keys // 2), at % 3 == 1, at == keys - 1, at // step % 2 == 1),
        *((at < 1) | (at >= 2 * step), (at >= step) & (at < 2 * step), at != 0),
    )
    return torch.stack(patterns).to(DEVICE)


@dtypes
@paths
@pytest.mark.parametrize("head_dim", [8, 16, 17, 24, 64, 128])
def test_attention_head_dims(dtype, tma, head_dim):
    """No mask, a scale that is given, fewer queries than keys."""
    q, k, v = attention_inputs(33, 70, 2, head_dim, dtype)
    with operands(tma):
        check_attention(q, k, v)
        check_attention(q[:, :5], k, v, scale=0.3)


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("keys", [1, 64, 65, 257])
def test_attention_tokens(tokens, keys):
    """Queries and keys around the edges of tiles."""
    check_attention(*attention_inputs(tokens, keys, 1, 16, torch.float32, batch=1))


@pytest.mark.parametrize("heads", HEADS)
def test_attention_tiny_preset(heads):
    """The heads of the tiny preset, also every second head of a wider tensor."""
    q, k, v = attention_inputs(20, 30, 2 * heads, HEAD_DIM, torch.float32)
    check_attention(q[:, :, :heads], k[:, :, :heads], v[:, :, heads:])
    check_attention(q[:, :, ::2], k[:, :, ::2], v[:, :, 1::2])


@paths
@pytest.mark.parametrize(
    ("dtype", "tile"), [(dtype, tile) for dtype in DTYPES for tile in attention_tiles(dtype, 16)], ids=str
)
def test_attention_masks(tma, dtype, tile):
    """Lengths and masks on every tile: cut inside tiles and at their edges, all masked, none masked."""
    step = 16 if tile is None else tile.keys
    keys = 2 * step + step // 2 + 1
    mask = masks(keys, step)
    lengths = torch.tensor((0, 1, keys, step, step + 1, 2 * step, 2 * step + 1, keys - 1, 999), device=DEVICE)
    with operands(tma):
        for some in ({"key_mask": mask}, {"key_lengths": lengths.int() if tma else lengths}):
            q, k, v = attention_inputs(9, keys, 1, 16, dtype, len(*some.values()))
            assert (check_attention(q, k, v, **some, tile=tile)[0] == 0).all()


@sampled
@given(data=st.data())
def test_attention_laws(data):
    """A mask equals attention over the unmasked keys alone; a masked tail equals a length."""
    keys, block = data.draw(st.integers(1, 90)), data.draw(st.sampled_from([1, 1, 8, 16]))
    bits = data.draw(st.lists(st.booleans(), min_size=-(-keys // block), max_size=-(-keys // block)))
    mask = torch.tensor(bits, device=DEVICE).repeat_interleave(block)[:keys]
    q, k, v = attention_inputs(9, keys, 2, 2 * data.draw(st.integers(1, 20)), torch.float32, batch=1)
    tile = data.draw(st.sampled_from(attention_tiles(torch.float32, q.shape[3])))
    with operands(data.draw(st.booleans())):
        y = check_attention(q, k, v, mask[None], tile=tile)
        if mask.any():
            # The same sums, over tiles that begin at other keys.
            gathered = pk.joint_attention(q, k[:, mask], v[:, mask], tile=tile)
            close(y, gathered, terms=keys + 16 * q.shape[3])
        else:
            assert (y == 0).all()
        length = int(mask.sum())
        prefix = torch.arange(keys, device=DEVICE)[None] < length
        by_length = pk.joint_attention(q, k, v, key_lengths=torch.tensor([length], device=DEVICE), tile=tile)
        close(by_length, pk.joint_attention(q, k, v, prefix, tile=tile), terms=keys + 16 * q.shape[3])


def test_attention_many_keys():
    """Many tiles of keys, cut off in the middle."""
    q, k, v = attention_inputs(3, 1472, 1, 16, torch.float32)
    check_attention(q, k, v, key_lengths=torch.tensor([1472, 1025], device=DEVICE))


def test_attention_large_scores():
    """Scores that overflow exp; the maximum changes from tile to tile."""
    q, k, v = attention_inputs(9, 90, 1, 16, torch.float32)
    k = k * torch.linspace(0.1, 30, 90, device=DEVICE)[:, None, None]
    q, lengths = q * 10, torch.tensor([90, 50], device=DEVICE)
    y = pk.joint_attention(q, k, v, key_lengths=lengths, tile=AttentionTile(16, 16, 4, 2))
    # Scores reach a thousand. Their float32 rounding, 2**-24 of that, is a relative error of a softmax weight.
    close(y, pk.joint_attention_reference(*double((q, k, v)), None, lengths), terms=16, size=1000.0)


# What torch expects of an operation.


def samples() -> dict[str, tuple]:
    """Arguments of every raw operation, with two streams if it takes two."""
    x, h, m, w = make(2, 5, 16), make(2, 5, 16, seed=1), make(2, 16, seed=2), weight(16, 16, 3)
    token = token_index(2, 5)
    qkv = [stream(t, 16, 2, 8, torch.float32, s) for t, s in ((3, 10), (5, 30))]
    tables = [table for s in qkv for table in (s.rope[..., 0], s.rope[..., 1])]
    norms, weights = [n for s in qkv for n in s.norms], [w for s in qkv for w in s.weights]
    q, k, v = attention_inputs(5, 7, 2, 8, torch.float32)
    raw = [raw_heads(t, 2, 8, torch.float32, t) for t in (3, 5)]
    two = ([w, w.clone()], [make(16, seed=4), None])
    tail = ([None, make(4, 16, seed=5)], [None, token], [None, h])
    silu = ([weight(16, 16, 6), weight(16, 16, 7)], [None, make(16, seed=8)])
    adapters = ([weight(16, 16, 9), None], [weight(16, 16, 10), None], [None, None], [None, None])
    return {
        "ada_layer_norm": (x, make(4, 16), make(4, 16, seed=6), token, 1e-6, [4, 4]),
        "gated_residual": (x, m, h, None, None),
        "linear": ([x, h], *two, [16, 16], *tail, *silu, *adapters, "swiglu", None),
        "mlp": (
            [x, h],
            *two,
            *([t.clone() if t is not None else t for t in p] for p in two),
            [9, 16],
            *tail,
            *silu,
            None,
            None,
        ),
        "qkv_projection": (
            *([s.x for s in qkv], weights, [b for s in qkv for b in s.biases], norms, tables),
            *([True, True], [None] * 5 + [weight(16, 16, 9)], [None] * 5 + [weight(16, 16, 10)]),
            *(2, None, 8, 1e-6, None),
        ),
        "norm_rope": (*(list(part) for part in zip(*raw)), norms, tables, [make(16), None, make(16)] * 2, 1e-6),
        "joint_attention": (q, k, v, None, torch.tensor([3, 7], device=DEVICE), 0.25, None),
    }


@paths
def test_attention_extreme_lengths(tma):
    """A length below zero masks all keys, a length beyond 32 bits masks none."""
    q, k, v = make(2, 5, 1, 16, seed=1), make(2, 70, 1, 16, seed=2), make(2, 70, 1, 16, seed=3)
    lengths = torch.tensor([-1000, 2**31 + 5], device=DEVICE)
    with operands(tma):
        y = pk.joint_attention(q, k, v, key_lengths=lengths)
    assert (y[0] == 0).all()
    close(y[1], pk.joint_attention_reference(*double((q, k, v)))[1], terms=16)


@pytest.mark.parametrize("name", samples())
def test_opcheck(name):
    """Torch's own checks of schema, fake implementation, autograd registration and tracing."""
    # Outputs without margins: opcheck would see an offset that the fake implementation does not have.
    with mock.patch.object(torch.Tensor, "new_empty", torch._C.TensorBase.new_empty):
        torch.library.opcheck(getattr(torch.ops.ppcl, name).default, samples()[name])


def leaves(value) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value] if value.is_floating_point() else []
    return [leaf for item in value for leaf in leaves(item)] if isinstance(value, tuple | list) else []


@pytest.mark.parametrize("name", samples())
def test_raw_op_has_no_gradient(name):
    """An operation that needs a gradient raises, eagerly and traced; it never returns a zero gradient."""
    arguments, op = samples()[name], getattr(torch.ops.ppcl, name)
    for leaf in leaves(arguments):
        leaf.requires_grad_()
    with pytest.raises(RuntimeError, match=f"ppcl::{name} has no autograd formula"):
        op(*arguments)
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True):
        with pytest.raises(RuntimeError, match=f"ppcl::{name} has no autograd formula"):
            op(*arguments)
        with torch.no_grad():
            assert not any(out.requires_grad for out in leaves(op(*arguments)))


def public_calls() -> dict[str, tuple]:
    """Public function, reference, and the arguments that both take."""
    x, h, m, w, bias = make(2, 5, 16), make(2, 5, 16, seed=1), make(2, 16, seed=2), weight(16, 16, 3), make(16)
    qkv = [stream(t, 16, 2, 8, torch.float32, s, rope="pairs") for t, s in ((3, 10), (5, 30))]
    raw, norms, ropes = [raw_heads(5, 2, 8, torch.float32, 0)], [(make(8), make(8, seed=1))], [qkv[1].rope]
    up = (weight(9, 16, 4), make(9, seed=5), weight(16, 9, 6), None)
    return {
        "ada_layer_norm": (pk.ada_layer_norm, pk.ada_layer_norm_reference, (x, m, m.flip(0))),
        "gated_residual": (pk.gated_residual, pk.gated_residual_reference, (x, m, h)),
        "linear": (
            lambda *a: pk.linear(*a[:3], 9, activation="gelu", gate=a[3], residual=a[4]),
            lambda *a: pk.linear_reference(*a[:3], 9, activation="gelu", gate=a[3], residual=a[4]),
            (x, w, bias, make(2, 9), make(2, 5, 9)),
        ),
        "swiglu": (
            lambda *a: pk.linear(*a[:3], 9, activation="swiglu", silu_weight=a[3], silu_bias=a[4]),
            lambda *a: pk.linear_reference(*a[:3], 9, activation="swiglu", silu_weight=a[3], silu_bias=a[4]),
            (x, w, bias, weight(16, 16, 7), make(16, seed=8)),
        ),
        "linear with an adapter": (
            lambda *a: pk.linear(*a[:3], 9, down=a[3], up=a[4]),
            lambda *a: pk.linear_reference(*a[:3], 9, down=a[3], up=a[4]),
            (x, w, bias, weight(16, 16, 7), weight(16, 16, 8)),
        ),
        "swiglu mlp": (
            lambda *a: pk.mlp(*a[:5], 7, silu=a[5], silu_bias=a[6]),
            lambda *a: pk.mlp_reference(*a[:5], 7, silu=a[5], silu_bias=a[6]),
            (x, *up, weight(9, 16, 9), make(9, seed=10)),
        ),
        "mlp": (
            lambda *a: pk.mlp(*a[:5], 7, gate=a[5], residual=a[6]),
            lambda *a: pk.mlp_reference(*a[:5], 7, gate=a[5], residual=a[6]),
            (x, *up, m, h),
        ),
        "qkv_projection": (
            lambda *a: pk.qkv_projection(a[0], 2, 8),
            lambda *a: pk.qkv_projection_reference(a[0], 2, 8),
            (qkv,),
        ),
        "norm_rope": (
            lambda *a: pk.norm_rope(a[0], a[1], ropes, 1e-6, a[2]),
            lambda *a: pk.norm_rope_reference(a[0], a[1], ropes, 1e-6, a[2]),
            (raw, norms, [tuple(make(raw[0][1].shape[2:].numel(), seed=n) for n in range(3))]),
        ),
        "joint_attention": (
            lambda *a: pk.joint_attention(*a, None, torch.tensor([3, 7], device=DEVICE)),
            lambda *a: pk.joint_attention_reference(*a, None, torch.tensor([3, 7], device=DEVICE)),
            attention_inputs(5, 7, 2, 8, torch.float32),
        ),
    }


@pytest.mark.parametrize("name", public_calls())
def test_gradients(name):
    """If any input needs a gradient, the reference computes it; under no_grad the kernel runs."""
    function, reference, arguments = public_calls()[name]
    inputs = [leaf for leaf in leaves(arguments) if leaf.is_floating_point()]
    with mock.patch.object(Launch, "run", autospec=True, side_effect=Launch.run) as launched:
        for one in inputs:
            if name == "qkv_projection" and one.dim() == 2 and one.shape[-1] == 4:
                # Rope tables are not trained.
                continue
            one.requires_grad_()
            got, wanted = (
                torch.autograd.grad(sum(out.square().sum() for out in leaves(call(*arguments))), one)[0]
                for call in (function, reference)
            )
            assert not launched.called and torch.equal(got, wanted) and got.abs().max() > 0
            one.requires_grad_(False)
        inputs[0].requires_grad_()
        with torch.no_grad():
            outputs = leaves(function(*arguments))
        assert launched.called
    for out, wanted in zip(outputs, leaves(reference(*arguments)), strict=True):
        assert not out.requires_grad
        close(out, wanted.detach(), terms=32, roundings=2)


def test_compile():
    """A compiled graph holds the operations whole, for any count of tokens."""

    def function(x, w, lengths):
        q = pk.linear(x, w, activation="gelu").unflatten(-1, (2, 8))
        return pk.joint_attention(q, q, q, key_lengths=lengths)

    compiled = torch.compile(function, backend="aot_eager", fullgraph=True, dynamic=True)
    for tokens in (5, 9):
        arguments = make(2, tokens, 16), weight(16, 16, 1), torch.tensor([2, tokens], device=DEVICE)
        assert torch.equal(compiled(*arguments), function(*arguments))


# Errors.


X, M, W = (2, 5, 16), (2, 16), (9, 16)
t = make


def qkv(**changes):
    return pk.qkv_projection([stream(5, 16, 2, 8, torch.float32, 10)._replace(**changes)], 2, 8)


def norm_rope(norms=(None, None), rope=None, **changes):
    q, k, v = (changes.get(name, t(2, 5, 2, 8)) for name in "qkv")
    return pk.norm_rope([(q, k, v)], [norms], [rope])


def attend(*, q=(2, 5, 2, 8), k=(2, 7, 2, 8), v=(2, 7, 2, 8), **more):
    return pk.joint_attention(*(t(*s) if isinstance(s, tuple) else s for s in (q, k, v)), **more)


def turned(*shape):
    """A tensor of this shape whose last dimension is not contiguous."""
    return t(*shape).mT.contiguous().mT


HALF, LONG, OTHER = {"dtype": torch.float16}, {"dtype": torch.float64}, torch.device("meta")
ERRORS = {
    "target": (lambda: Target.of(OTHER), "kernels need a GPU"),
    "norm device": (lambda: pk.ada_layer_norm(t(*X), t(*M), t(*M).to(OTHER)), "shift is on meta"),
    "norm index device": (
        lambda: pk.ada_layer_norm(t(*X), t(4, 16), t(4, 16), token_index(2, 5).to(OTHER)),
        "index is on meta",
    ),
    "residual device": (lambda: pk.gated_residual(t(*X), t(*M), t(*X).to(OTHER)), "h is on meta"),
    "linear device": (lambda: pk.linear(t(*X), t(*W).to(OTHER)), "weight is on meta"),
    "mlp device": (lambda: pk.mlp(t(*X), t(*W), None, t(16, 9), t(16).to(OTHER)), "bias is on meta"),
    "qkv rope device": (lambda: qkv(rope=t(5, 4, 2).to(OTHER)), "rope is .* on meta"),
    "norm_rope device": (lambda: norm_rope(v=t(2, 5, 2, 8).to(OTHER)), "v is on meta"),
    "attention device": (lambda: attend(key_mask=token_index(2, 7).bool().to(OTHER)), "on meta, wanted bool"),
    "linear no outputs": (lambda: pk.linear(t(*X), t(*W), None, -1), "out_features is -1, wanted at least 1"),
    "linear weight": (lambda: pk.linear(t(*X), t(9, 16, 3)), r"weight is \[9, 16, 3\], wanted \[outputs, inputs\]"),
    "linear no groups": (lambda: pk.grouped_linear([]), "got 0"),
    "mlp no groups": (lambda: pk.grouped_mlp([]), "got 0"),
    "qkv no heads": (lambda: pk.qkv_projection([pk.Stream(t(*X), (t(16, 16),) * 3)], -1, 8), "heads is -1"),
    "qkv odd head": (lambda: pk.qkv_projection([pk.Stream(t(*X), (t(16, 16),) * 3)], 1, 1), "wanted an even number"),
    "qkv rope pair width": (lambda: qkv(rope=(t(5, 12), t(5, 12))), r"rope is .* wanted two of \[S, 4\] or \[S, 8\]"),
    "qkv rope flat": (lambda: qkv(rope=(t(5), t(5))), "rope is"),
    "qkv rope strides": (lambda: qkv(rope=(t(5, 4), t(5, 8)[:, :4])), "rope's cosines have strides"),
    "norm_rope counts": (lambda: pk.norm_rope([(t(2, 5, 2, 8),) * 3], [], [None]), "1 streams, 0 pairs of norms"),
    "attention scale": (lambda: attend(scale=-0.3), "scale is -0.3, wanted above 0"),
    "attention no scale": (lambda: attend(scale=0.0), "scale is 0.0"),
    "attention flat keys": (lambda: attend(k=(7,)), r"k is \[7\]"),
    "attention empty head": (lambda: attend(q=(2, 5, 2, 0), k=(2, 7, 2, 0), v=(2, 7, 2, 0)), "up to 128"),
    "norm dtype": (lambda: pk.ada_layer_norm(t(*X, **LONG), t(*M, **LONG), t(*M, **LONG)), "float64"),
    "norm mixed": (lambda: pk.ada_layer_norm(t(*X), t(*M, **HALF), t(*M)), "scale is torch.float16"),
    "norm strides": (lambda: pk.ada_layer_norm(turned(*X), t(*M), t(*M)), "x has stride"),
    "norm dim": (lambda: pk.ada_layer_norm(t(5, 16), t(*M), t(*M)), r"wanted \[B, S, D\]"),
    "norm width": (lambda: pk.ada_layer_norm(t(1, 1, 16385), t(1, 16385), t(1, 16385)), "up to 16384"),
    "norm scale": (lambda: pk.ada_layer_norm(t(*X), t(2, 15), t(*M)), r"scale is \[2, 15\], wanted \[2, 16\]"),
    "norm shift": (lambda: pk.ada_layer_norm(t(*X), t(*M), t(1, 16)), "shift is"),
    "norm index rows": (lambda: pk.ada_layer_norm(t(*X), t(*M), t(*M), token_index(2, 5)), r"wanted \[4, 16\]"),
    "norm index": (lambda: pk.ada_layer_norm(t(*X), t(4, 16), t(4, 16), token_index(2, 4)), "index is"),
    "norm index dtype": (lambda: pk.ada_layer_norm(t(*X), t(4, 16), t(4, 16), t(2, 5)), "index is torch.float32"),
    "norm index strides": (
        lambda: pk.ada_layer_norm(t(*X), t(4, 16), t(4, 16), token_index(5, 2).mT),
        "index is .* wanted contiguous",
    ),
    "residual h": (lambda: pk.gated_residual(t(*X), t(*M), t(2, 4, 16)), "h is"),
    "residual gate": (lambda: pk.gated_residual(t(*X), t(3, 16), t(*X)), "gate is"),
    "residual dim": (lambda: pk.gated_residual(t(5, 16), t(*M), t(5, 16)), r"wanted \[B, S, D\]"),
    "linear dtype": (lambda: pk.linear(t(*X, **LONG), t(*W, **LONG)), "float64"),
    "linear mixed": (lambda: pk.linear(t(*X), t(*W, **HALF)), "weight is torch.float16"),
    "linear mixed layers": (
        lambda: pk.grouped_linear([pk.Linear(t(*X), t(*W)), pk.Linear(t(*X, **HALF), t(*W, **HALF))]),
        "x is torch.float16",
    ),
    "linear strides": (lambda: pk.linear(t(*X), turned(*W)), "weight has stride"),
    "linear x strides": (lambda: pk.linear(turned(*X), t(*W)), "x has stride"),
    "linear inputs": (lambda: pk.linear(t(2, 5, 17), t(*W)), "the weight holds 9 of 16"),
    "linear outputs": (lambda: pk.linear(t(*X), t(*W), None, 10), "wanted 10 outputs"),
    "linear dim": (lambda: pk.linear(t(5, 16), t(*W)), r"wanted \[B, S, k\]"),
    "linear batch": (lambda: pk.grouped_linear([pk.Linear(t(b, 5, 16), t(*W)) for b in (1, 2)]), "same B"),
    "linear bias": (lambda: pk.linear(t(*X), t(*W), t(8)), "bias is"),
    "linear gate": (lambda: pk.linear(t(*X), t(*W), gate=t(2, 8)), "gate is"),
    "linear gate rows": (lambda: pk.linear(t(*X), t(*W), gate=t(2, 9), index=token_index(2, 5)), r"wanted \[4, 9\]"),
    "linear index": (lambda: pk.linear(t(*X), t(*W), gate=t(4, 9), index=token_index(5, 2)), "index is"),
    "linear residual": (lambda: pk.linear(t(*X), t(*W), residual=t(2, 5, 8)), "residual is"),
    "linear residual strides": (lambda: pk.linear(t(*X), t(*W), residual=t(2, 6, 9)[:, 1:]), "residual has strides"),
    "linear activation": (lambda: pk.linear(t(*X), t(*W), activation="relu"), "wanted one of none, gelu, swiglu"),
    "swiglu alone": (lambda: pk.linear(t(*X), t(*W), activation="swiglu"), "silu_weight goes with"),
    "swiglu unasked": (lambda: pk.linear(t(*X), t(*W), silu_weight=t(*W)), "silu_weight goes with"),
    "swiglu shapes": (
        lambda: pk.linear(t(*X), t(*W), activation="swiglu", silu_weight=t(8, 16)),
        r"silu_weight is \[8, 16\], wanted \[9, 16\]",
    ),
    "swiglu bias": (
        lambda: pk.linear(t(*X), t(*W), activation="swiglu", silu_weight=t(*W), silu_bias=t(8)),
        "silu_bias is",
    ),
    "one factor": (lambda: pk.linear(t(*X), t(*W), down=t(16, 16)), "one is missing"),
    "factors of a rank": (lambda: pk.linear(t(*X), t(*W), down=t(3, 16), up=t(9, 3)), "the rank of adapters is 3"),
    "factors of a large rank": (lambda: pk.linear(t(*X), t(*W), down=t(64, 16), up=t(9, 64)), "from 16 to 32"),
    "factors of two ranks": (lambda: pk.linear(t(*X), t(*W), down=t(16, 16), up=t(9, 32)), "factors are"),
    "factors too narrow": (lambda: pk.linear(t(*X), t(*W), down=t(16, 15), up=t(9, 16)), r"wanted \[16, 16\]"),
    "factors too short": (lambda: pk.linear(t(*X), t(*W), down=t(16, 16), up=t(8, 16)), r"and \[9, 16\]"),
    "factor strides": (lambda: pk.linear(t(*X), t(*W), down=t(16, 16), up=t(9, 32)[:, :16]), "up has strides"),
    "factors mixed": (lambda: pk.linear(t(*X), t(*W), down=t(16, 16, **HALF), up=t(9, 16)), "down is torch.float16"),
    "linear three layers": (lambda: pk.grouped_linear([pk.Linear(t(*X), t(*W))] * 3), "one or two layers"),
    "mlp channels": (lambda: pk.mlp(t(*X), t(*W), None, t(16, 9), None, 10), "wanted 10 outputs"),
    "mlp down": (lambda: pk.mlp(t(*X), t(*W), None, t(16, 8), None), "the weight holds 16 of 8"),
    "mlp bias": (lambda: pk.mlp(t(*X), t(*W), t(16), t(16, 9), None), "bias is"),
    "mlp mixed": (lambda: pk.mlp(t(*X), t(*W), None, t(16, 9, **HALF), None), "weight is torch.float16"),
    "mlp three": (lambda: pk.grouped_mlp([pk.Mlp(t(*X), t(*W), None, t(16, 9), None)] * 3), "one or two MLPs"),
    "qkv dtype": (lambda: qkv(x=t(*X, **LONG)), "float64"),
    "qkv mixed": (lambda: qkv(x=t(*X, **HALF)), "wanted torch.float16"),
    "qkv strides": (lambda: qkv(x=turned(*X)), "x has stride"),
    "qkv width": (lambda: qkv(x=t(2, 5, 25)), "a weight is"),
    "qkv weights": (lambda: qkv(weights=(t(16, 16), t(16, 16), t(8, 16))), "a weight is"),
    "qkv weight strides": (lambda: qkv(weights=(t(16, 16), t(16, 24)[:, :16], t(16, 16))), "differ in stride"),
    "qkv heads": (lambda: pk.qkv_projection([stream(5, 16, 2, 8, torch.float32, 1)], 3, 8), "the weight holds 2"),
    "qkv bias": (lambda: qkv(biases=(t(15), None, None)), "bias is"),
    "qkv norm": (lambda: qkv(norms=(t(7), t(8))), "norm is"),
    "qkv one norm": (lambda: qkv(norms=(t(8), None)), "q or k alone"),
    "qkv rope": (lambda: qkv(rope=t(4, 4, 2)), "rope"),
    "qkv rope width": (lambda: qkv(rope=(t(5, 3), t(5, 3))), "rope"),
    "qkv rope dtype": (lambda: qkv(rope=t(5, 4, 2, **HALF)), "wanted float32"),
    "qkv factors": (lambda: qkv(downs=(t(16, 16), None, None), ups=(t(8, 16), None, None)), "factors are"),
    "qkv factor strides": (
        lambda: qkv(downs=(t(16, 16), t(16, 24)[:, :16], None), ups=(t(16, 16), t(16, 16), None)),
        "differ in stride",
    ),
    "qkv no queries": (lambda: qkv(queries=False), "no stream has queries"),
    "qkv head dim": (lambda: pk.qkv_projection([stream(5, 16, 2, 130, torch.float32, 1)], 2, 130), "up to 128"),
    "qkv odd head dim": (lambda: pk.qkv_projection([pk.Stream(t(*X), (t(*W),) * 3)], 1, 9), "even"),
    "qkv list": (lambda: pk.qkv_projection([stream(5, 16, 2, 8, torch.float32, 1)], token_index(1, 2)[0], 8), "int32"),
    "qkv three streams": (lambda: pk.qkv_projection([stream(5, 16, 2, 8, torch.float32, 1)] * 3, 2, 8), "one or two"),
    "qkv widths": (
        lambda: pk.qkv_projection([stream(5, w, 2, 8, torch.float32, 1) for w in (16, 24)], 2, 8),
        "same B and D",
    ),
    "norm_rope dtype": (lambda: norm_rope(**{n: t(2, 5, 2, 8, **LONG) for n in "qkv"}), "float64"),
    "norm_rope mixed": (lambda: norm_rope(v=t(2, 5, 2, 8, **HALF)), "v is torch.float16"),
    "norm_rope shape": (lambda: norm_rope(q=t(2, 4, 2, 8)), "q is"),
    "norm_rope strides": (lambda: norm_rope(k=t(2, 6, 2, 8)[:, 1:]), "k has strides"),
    "norm_rope one norm": (lambda: norm_rope((None, t(8))), "q or k alone"),
    "norm_rope norm": (lambda: norm_rope((t(7), t(7))), "norm"),
    "norm_rope rope": (lambda: norm_rope(rope=t(4, 4, 2)), "rope"),
    "norm_rope rope dtype": (lambda: norm_rope(rope=t(5, 4, 2, **HALF)), "rope"),
    "norm_rope bias": (
        lambda: pk.norm_rope([(t(2, 5, 2, 8),) * 3], [(None,) * 2], [None], 1e-6, [(t(15),) * 3]),
        "bias",
    ),
    "norm_rope biases": (
        lambda: pk.norm_rope([(t(2, 5, 2, 8),) * 3], [(None,) * 2], [None], 1e-6, []),
        "biases of 0",
    ),
    "norm_rope no queries": (lambda: norm_rope(q=None), "no stream has queries"),
    "norm_rope head dim": (lambda: norm_rope(**{n: t(2, 5, 2, 130) for n in "qkv"}), "up to 128"),
    "attention dtype": (lambda: attend(q=t(2, 5, 2, 8, **LONG)), "float64"),
    "attention mixed": (lambda: attend(k=t(2, 7, 2, 8, **HALF)), "k is torch.float16"),
    "attention strides": (lambda: attend(v=turned(2, 7, 2, 8)), "v has stride"),
    "attention dim": (lambda: attend(q=(5, 2, 8)), r"wanted \[B, S, H, E\]"),
    "attention head dim": (lambda: attend(q=(2, 5, 1, 129), k=(2, 7, 1, 129), v=(2, 7, 1, 129)), "up to 128"),
    "attention keys": (lambda: attend(k=(2, 7, 3, 8)), "k is"),
    "attention values": (lambda: attend(v=(2, 6, 2, 8)), "v is"),
    "attention mask": (lambda: attend(key_mask=token_index(2, 6).bool()), "key_mask is"),
    "attention mask dtype": (lambda: attend(key_mask=token_index(2, 7)), "wanted bool"),
    "attention lengths": (lambda: attend(key_lengths=token_index(1, 3)[0]), "key_lengths is"),
    "attention lengths dtype": (lambda: attend(key_lengths=t(2)), "key_lengths is torch.float32"),
    "attention both": (lambda: attend(key_mask=token_index(2, 7).bool(), key_lengths=token_index(1, 2)[0]), "both"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors(name):
    """What a kernel cannot compute is refused in one line that says what was given and what was wanted."""
    call, words = ERRORS[name]
    with pytest.raises(ValueError, match=words) as caught:
        call()
    assert "\n" not in str(caught.value)
