"""Every operation of a block at the widths of its plans: our kernels against eager, compiled, cuBLAS and specialists.

    python -m pytest bench/bench_kernels.py --benchmark-only -s        (the first PPCL_BENCH_SECONDS=230 of it)

A case is an operation at a shape. Its contestants are checked against float64, then timed in turn, round by round, so
that a ratio comes from one run; the cache is flushed before every call. On a GPU that flush also lets the host run
ahead: what is timed is the device. Milliseconds are medians; pytest-benchmark's own figures hold the host's part too.
`eager` is the chain of diffusers' stock block (separate products, norms, rotation, cat, SDPA, gate, residual). Weights
are prefixes of full ones, for all contestants. FLOPs and bytes are those that cannot be spared: inputs read once,
outputs written once, no mask taken off.

Without a GPU the same runs on tiny shapes, our kernels in triton's interpreter: those times say nothing about kernels.
PPCL_BENCH_JSON names a file that holds all results after each case.
"""

import dataclasses
import functools
import importlib.util
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_iter, tree_map_only

if not torch.cuda.is_available():
    # Read when a kernel is defined: before the imports below.
    os.environ.setdefault("TRITON_INTERPRET", "1")

from ppcl_kernels import ada_layer_norm as norm_op
from ppcl_kernels import gated_residual as gated_residual_op
from ppcl_kernels._triton import INTERPRETED, triton
from ppcl_kernels.ada_layer_norm import Tile as NormTile
from ppcl_kernels.ada_layer_norm import ada_layer_norm_reference
from ppcl_kernels.gated_residual import Tile as ResidualTile
from ppcl_kernels.gated_residual import gated_residual_reference
from ppcl_kernels.joint_attention import Tile as AttentionTile
from ppcl_kernels.joint_attention import joint_attention
from ppcl_kernels.launch import Target
from ppcl_kernels.linear import Linear, grouped_linear, linear_reference
from ppcl_kernels.matmul import Tile
from ppcl_kernels.mlp import Mlp, grouped_mlp, mlp_reference
from ppcl_kernels.norm_rope import norm_rope
from ppcl_kernels.qkv_projection import Stream, choose_tile, qkv_projection, qkv_projection_reference, tile_candidates

# By path: the package imports diffusers, which kernels do without.
_spec = importlib.util.spec_from_file_location(
    "bench_report", Path(__file__).parents[1] / "ppcl_rt" / "bench_report.py"
)
bench_report = sys.modules.setdefault(_spec.name, importlib.util.module_from_spec(_spec))
_spec.loader.exec_module(bench_report)

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CUDA = DEVICE.type == "cuda"


@dataclasses.dataclass(frozen=True)
class Preset:
    """Shapes to measure; the first image, text, width and batch are the main ones.

    Attributes:
        images: pixels a side -> image tokens.
        widths: per cent of the heads and hidden channels that are kept.
        compiled: (operation, width) that torch.compile and FlexAttention take part in (5 to 10 s each), None for all
            operations at 100 and 50 %; main image, text and batch alone.
        rounds: timed, of all contestants of a case; screening: of all tiles.
        flush: bytes written before each call: more than any L2 (60 MB on an H200), and half a millisecond for the host.
        matrix, copied: of the two ceilings: side of a square product, bytes of a copy.
    """

    heads: int
    head_dim: int
    hidden: int
    images: dict[int, int]
    texts: tuple[int, ...]
    widths: tuple[int, ...]
    batches: tuple[int, ...]
    compiled: tuple[tuple[str, int], ...] | None
    dtype: torch.dtype
    rounds: int
    screening: int
    flush: int
    matrix: int
    copied: int

    @property
    def dim(self) -> int:
        return self.heads * self.head_dim


PRESETS = {
    # Qwen-Image and FLUX.
    "production": Preset(
        heads=24,
        head_dim=128,
        hidden=12288,
        images={1024: 4096, 512: 1024, 1328: 6889},
        texts=(512, 32),
        widths=(100, 75, 50, 25),
        batches=(1, 2),
        compiled=None,
        dtype=torch.bfloat16,
        rounds=25,
        screening=7,
        flush=2**31,
        matrix=8192,
        copied=2**31,
    ),
    "tiny": Preset(
        heads=2,
        head_dim=16,
        hidden=128,
        images={96: 33},
        texts=(7,),
        widths=(100, 50),
        batches=(1,),
        compiled=(("gated_residual", 100),),
        dtype=torch.float32,
        rounds=3,
        screening=1,
        flush=2**20,
        matrix=256,
        copied=2**20,
    ),
}
PRESET = PRESETS["production" if CUDA else "tiny"]

# Operations whose cost depends on the width of a plan, and those whose does not.
PRUNED = ("joint_attention", "qkv_projection", "up_gelu", "down_gate_residual", "mlp")
WHOLE = ("ada_layer_norm", "gated_residual", "stand_in_residual")
# Contestants that run a kernel of ours.
OURS = ("triton", "cublas + fused")
SDPA = {
    "sdpa flash": SDPBackend.FLASH_ATTENTION,
    "sdpa cudnn": SDPBackend.CUDNN_ATTENTION,
    "sdpa efficient": SDPBackend.EFFICIENT_ATTENTION,
    "sdpa math": SDPBackend.MATH,
}
# In eps of the dtype, relative to the RMS and the largest value: the stock chains in bf16, with a rounding a step, are
# off by up to 0.46 and 1.3. And float32 sums of up to 12288 terms: 100 roundings of 6e-8.
RMS_LIMIT, MAX_LIMIT = 1, 4
SUMS_LIMIT = 1e-5


class Case(NamedTuple):
    """An operation at a shape; ``width`` in per cent."""

    op: str
    pixels: int
    image: int
    text: int
    batch: int
    width: int
    masked: bool = False

    def __str__(self) -> str:
        masked = "-masked" if self.masked else ""
        return f"{self.op}-{self.pixels}px-text{self.text}-batch{self.batch}-width{self.width}{masked}"


def cases(preset: Preset) -> list[Case]:
    """Not the product of all axes but a cross through the main shape, which comes first: time may run out."""
    (main, image), *others = preset.images.items()
    text, *texts = preset.texts
    full, half = preset.widths[0], 50
    made = []
    for batch in preset.batches:
        made += [Case(op, main, image, text, batch, width) for op in PRUNED for width in preset.widths]
        made += [Case("joint_attention", main, image, text, batch, width, masked=True) for width in (full, half)]
        made += [Case(op, main, image, text, batch, full) for op in WHOLE]
    for pixels, tokens in others:
        made += [Case(op, pixels, tokens, text, 1, width) for op in PRUNED for width in (full, half)]
        made += [Case(op, pixels, tokens, text, 1, full) for op in WHOLE]
    return made + [Case(op, main, image, short, 1, full) for short in texts for op in PRUNED]


def contestants(case: Case, preset: Preset) -> list[str]:
    """Who takes part in a case; ours first."""
    names = ["triton"]
    # The gate alone has one tile.
    names += ["triton best tile"] if case.op != "gated_residual" else []
    names += ["triton unmasked"] if case.masked else []
    names += ["eager"]
    main = (case.pixels, case.text, case.batch) == (next(iter(preset.images)), preset.texts[0], 1)
    listed = case.width in (100, 50) if preset.compiled is None else (case.op, case.width) in preset.compiled
    if case.op == "joint_attention":
        return names + [*SDPA] + (["flex"] if main and listed else [])
    names += ["cublas + fused"] if case.op in ("qkv_projection", "down_gate_residual", "mlp") else []
    return names + (["compiled"] if main and listed else [])


@dataclasses.dataclass
class Contest:
    """What a case runs.

    Attributes:
        inputs: tensors, nested.
        chain: the stock chain, a function of ``inputs``; in float64 it is the definition.
        ours: our kernel with a tile, None for the one that it chooses.
        chosen, tiles: the tile that it chooses, and all that are worth measuring.
        flops: 0 where memory is the limit.
        others: further contestants.
    """

    inputs: Any
    chain: Callable[..., Any]
    ours: Callable[[Any], Any]
    chosen: Callable[[], Any]
    tiles: Callable[[], tuple]
    flops: int = 0
    others: dict[str, Callable[[], Any]] = dataclasses.field(default_factory=dict)

    def exact(self) -> list[torch.Tensor]:
        """Outputs in float64; in a rotation float32, whose roundings are 2^16 times as fine as bf16's."""
        dtype = PRESET.dtype
        wide = tree_map_only(torch.Tensor, lambda t: t.double() if t.dtype == dtype else t, self.inputs)
        return list(tree_iter(self.chain(*wide)))

    def bytes(self, outputs: list[torch.Tensor]) -> int:
        tensors = {id(t): t for t in (*tree_iter(self.inputs), *outputs) if isinstance(t, torch.Tensor)}
        return sum(t.numel() * t.itemsize for t in tensors.values())


def normal(*shape: int, scale: float = 1.0) -> torch.Tensor:
    return torch.randn(shape, dtype=PRESET.dtype, device=DEVICE) * scale


def weight(outputs: int, inputs: int, kept_outputs: int, kept_inputs: int) -> torch.Tensor:
    """Prefix of a weight in rank order: a view with the full one's steps."""
    return normal(outputs, inputs, scale=kept_inputs**-0.5)[:kept_outputs, :kept_inputs]


def modulations(batch: int, count: int) -> tuple[torch.Tensor, ...]:
    """Of the six that a modulation layer gives at once."""
    return normal(batch, 6 * PRESET.dim).chunk(6, dim=-1)[:count]


def tokens_of(case: Case) -> tuple[int, int]:
    """Image first: linear layers want the long stream first, attention the text (their docstrings)."""
    return case.image, case.text


def matmul_tiles() -> tuple:
    return Tile.candidates(Target.of(DEVICE), PRESET.dtype)


def matmul_choice(case: Case, cols: int) -> Any:
    return Tile.choose(Target.of(DEVICE), PRESET.dtype, tokens_of(case), case.batch, cols)


def norm_contest(case: Case) -> Contest:
    """The two that memory limits, on the image stream."""
    shape = (case.batch, case.image, PRESET.dim)
    x, h = normal(*shape), normal(*shape)
    gate, scale, shift = modulations(case.batch, 3)
    target, dtype = Target.of(DEVICE), PRESET.dtype
    if case.op == "gated_residual":
        return Contest(
            (x, gate, h),
            gated_residual_reference,
            lambda tile: gated_residual_op(x, gate, h, tile=tile),
            lambda: ResidualTile.choose(target, dtype, *shape),
            lambda: ResidualTile.candidates(target, dtype),
        )
    return Contest(
        (x, scale, shift),
        ada_layer_norm_reference,
        lambda tile: norm_op(x, scale, shift, tile=tile),
        lambda: NormTile.choose(target, dtype, *shape),
        lambda: NormTile.candidates(target, dtype, PRESET.dim),
    )


def linear_contest(case: Case) -> Contest:
    """One linear layer a stream, both in one launch, and what follows it."""
    dim, kept = PRESET.dim, PRESET.hidden * case.width // 100
    groups = []
    for tokens in tokens_of(case):
        if case.op == "up_gelu":
            x = normal(case.batch, tokens, dim)
            groups.append(Linear(x, weight(PRESET.hidden, dim, kept, dim), normal(kept)))
        elif case.op == "down_gate_residual":
            x, residual = normal(case.batch, tokens, kept), normal(case.batch, tokens, dim)
            (gate,) = modulations(case.batch, 1)
            w = weight(dim, PRESET.hidden, dim, kept)
            groups.append(Linear(x, w, normal(dim), gate=gate, residual=residual))
        else:
            x = normal(case.batch, tokens, dim)
            groups.append(Linear(x, weight(dim, dim, dim, dim), normal(dim), residual=x))
    gelu = case.op == "up_gelu"

    def chain(*groups: Linear) -> list[torch.Tensor]:
        return [linear_reference(*g[:4], gelu=gelu, gate=g.gate, residual=g.residual) for g in groups]

    def fused() -> list[torch.Tensor]:
        return [gated_residual_op(g.residual, g.gate, F.linear(g.x, g.weight, g.bias)) for g in groups]

    return Contest(
        groups,
        chain,
        lambda tile: grouped_linear(groups, gelu=gelu, tile=tile),
        lambda: matmul_choice(case, groups[0].weight.shape[0]),
        matmul_tiles,
        flops=sum(2 * g.x.shape[:2].numel() * g.weight.numel() for g in groups),
        others={"cublas + fused": fused},
    )


def mlp_contest(case: Case) -> Contest:
    """Both MLPs with gate and residual: two launches."""
    dim, kept = PRESET.dim, PRESET.hidden * case.width // 100
    groups = [
        Mlp(
            normal(case.batch, tokens, dim),
            weight(PRESET.hidden, dim, kept, dim),
            normal(kept),
            weight(dim, PRESET.hidden, dim, kept),
            normal(dim),
            gate=modulations(case.batch, 1)[0],
            residual=normal(case.batch, tokens, dim),
        )
        for tokens in tokens_of(case)
    ]

    def chain(*groups: Mlp) -> list[torch.Tensor]:
        return [mlp_reference(*g[:6], gate=g.gate, residual=g.residual) for g in groups]

    def fused() -> list[torch.Tensor]:
        hidden = [F.gelu(F.linear(g.x, g.up, g.up_bias), approximate="tanh") for g in groups]
        downs = [F.linear(h, g.down, g.down_bias) for g, h in zip(groups, hidden)]
        return [gated_residual_op(g.residual, g.gate, h) for g, h in zip(groups, downs)]

    return Contest(
        groups,
        chain,
        lambda tile: grouped_mlp(groups, up_tile=tile, down_tile=tile),
        lambda: (*matmul_choice(case, kept), *matmul_choice(case, dim)),
        matmul_tiles,
        flops=sum(4 * g.x.shape[:2].numel() * g.up.numel() for g in groups),
        others={"cublas + fused": fused},
    )


def qkv_contest(case: Case) -> Contest:
    """Products, norms and rotations of both streams, text first."""
    dim, e, heads = PRESET.dim, PRESET.head_dim, PRESET.heads * case.width // 100
    streams = []
    for tokens in (case.text, case.image):
        angles = torch.rand(tokens, e // 2, device=DEVICE) * 6.28
        streams.append(
            Stream(
                normal(case.batch, tokens, dim),
                tuple(weight(dim, dim, heads * e, dim) for _ in range(3)),
                tuple(normal(heads * e) for _ in range(3)),
                (1 + normal(e, scale=0.1), 1 + normal(e, scale=0.1)),
                torch.stack((angles.cos(), angles.sin()), dim=-1),
            )
        )

    def chain(*streams: Stream) -> tuple[torch.Tensor, ...]:
        return qkv_projection_reference(streams, heads, e)

    def fused() -> tuple[torch.Tensor, ...]:
        raw = [
            tuple(F.linear(s.x, w, b).unflatten(-1, (heads, e)) for w, b in zip(s.weights, s.biases)) for s in streams
        ]
        return norm_rope(raw, [s.norms for s in streams], [s.rope for s in streams])

    tokens = [case.text, case.image]
    return Contest(
        streams,
        chain,
        lambda tile: qkv_projection(streams, heads, e, tile=tile),
        lambda: choose_tile(Target.of(DEVICE), PRESET.dtype, tokens, case.batch, heads, e),
        lambda: tile_candidates(Target.of(DEVICE), PRESET.dtype, e),
        flops=2 * case.batch * sum(tokens) * dim * 3 * heads * e,
        others={"cublas + fused": fused},
    )


def stock_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """What diffusers does by default: SDPA, whichever backend torch prefers."""
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    mask = None if mask is None else mask[:, None, None, :]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)


def attention_contest(case: Case) -> Contest:
    """Attention over both streams; a mask leaves out four in ten text keys, in no order, and no image key."""
    heads, tokens = PRESET.heads * case.width // 100, case.text + case.image
    q, k, v = (normal(case.batch, tokens, heads, PRESET.head_dim) for _ in range(3))
    mask = None
    if case.masked:
        mask = torch.ones(case.batch, tokens, dtype=torch.bool, device=DEVICE)
        mask[:, : case.text] = torch.rand(case.batch, case.text, device=DEVICE) < 0.6

    def on(backend: SDPBackend) -> torch.Tensor:
        with sdpa_kernel(backend):
            return stock_attention(q, k, v, mask)

    def unmasked() -> torch.Tensor:
        return joint_attention(q, k, v)

    def flex() -> Callable[[], torch.Tensor]:
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        blocks = None
        if mask is not None:
            blocks = create_block_mask(
                lambda b, h, i, j: mask[b, j], case.batch, None, tokens, tokens, device=DEVICE.type
            )
        attend = compiled(flex_attention)
        parts = [t.transpose(1, 2) for t in (q, k, v)]
        return lambda: attend(*parts, block_mask=blocks).transpose(1, 2)

    return Contest(
        (q, k, v, mask),
        stock_attention,
        lambda tile: joint_attention(q, k, v, mask, tile=tile),
        lambda: AttentionTile.choose(Target.of(DEVICE), PRESET.dtype, *q.shape),
        lambda: AttentionTile.candidates(Target.of(DEVICE), PRESET.dtype, PRESET.head_dim),
        flops=4 * case.batch * heads * tokens**2 * PRESET.head_dim,
        others={
            "triton unmasked": unmasked,
            **{name: functools.partial(on, backend) for name, backend in SDPA.items()},
            "flex": once(flex),
        },
    )


CONTESTS = {
    **dict.fromkeys(("ada_layer_norm", "gated_residual"), norm_contest),
    **dict.fromkeys(("up_gelu", "down_gate_residual", "stand_in_residual"), linear_contest),
    "mlp": mlp_contest,
    "qkv_projection": qkv_contest,
    "joint_attention": attention_contest,
}


def compiled(function: Callable) -> Callable:
    """Compile for one shape, with nothing left of the shapes before it: they count towards a limit."""
    torch.compiler.reset()
    return torch.compile(function, dynamic=False)


def once(make: Callable[[], Callable]) -> Callable[[], Any]:
    """Make a function at its first call."""
    made = functools.cache(make)
    return lambda: made()()


def mark() -> Any:
    """A point in time, of the device where there is one."""
    if not CUDA:
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def between(start: Any, end: Any) -> float:
    """Milliseconds."""
    return start.elapsed_time(end) if CUDA else 1e3 * (end - start)


@functools.cache
def cache_filler() -> torch.Tensor:
    return torch.empty(PRESET.flush, dtype=torch.uint8, device=DEVICE)


def paired_ms(calls: dict[Any, Callable[[], Any]], rounds: int) -> dict[Any, float]:
    """Median milliseconds of each call; all are timed in turn, round by round, with the cache flushed before each."""
    marks: dict[Any, list] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            cache_filler().zero_()
            start = mark()
            call()
            marks[name].append((start, mark()))
    if CUDA:
        torch.cuda.synchronize()
    return {name: statistics.median(between(*pair) for pair in pairs) for name, pairs in marks.items()}


@functools.cache
def ceilings() -> dict[str, float]:
    """What this device reaches today: TFLOP/s of a large product, GB/s of a large copy (bytes read and written)."""
    a, b = (normal(PRESET.matrix, PRESET.matrix) for _ in range(2))
    source = torch.ones(PRESET.copied, dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    calls = {"matrix": lambda: a @ b, "copy": lambda: target.copy_(source)}
    paired_ms(calls, 3)
    ms = paired_ms(calls, PRESET.rounds)
    found = {"tflops": 2 * PRESET.matrix**3 / ms["matrix"] / 1e9, "gbs": 2 * PRESET.copied / ms["copy"] / 1e6}
    print(f"\nceilings: product {found['tflops']:.1f} TFLOP/s, copy {found['gbs']:.0f} GB/s", flush=True)
    return found


def errors(outputs: list[torch.Tensor], exact: list[torch.Tensor]) -> tuple[float, float]:
    """Largest error to the largest value, and RMS error to the RMS value; the worst output counts."""
    assert [t.shape for t in outputs] == [t.shape for t in exact]
    found = []
    for out, wanted in zip(outputs, exact, strict=True):
        off = out.double() - wanted
        found.append((off.abs().max() / wanted.abs().max(), off.square().mean().sqrt() / wanted.square().mean().sqrt()))
    return tuple(float(torch.stack(column).max()) for column in zip(*found, strict=True))


def why(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:200]


def best_tile(contest: Contest) -> tuple[Any, dict[str, float | str]]:
    """The fastest tile, and the milliseconds of each, or why there are none."""
    calls, failed = {}, {}
    for tile in contest.tiles():
        try:
            contest.ours(tile)
            calls[tile] = functools.partial(contest.ours, tile)
        except Exception as error:
            failed[" ".join(map(str, tile))] = why(error)
    if not calls:
        raise RuntimeError(f"no tile runs: {failed}")
    ms = paired_ms(calls, PRESET.screening)
    return min(ms, key=ms.get), {" ".join(map(str, tile)): round(ms[tile], 5) for tile in ms} | failed


def enter(contest: Contest, name: str, row: dict[str, Any]) -> Callable[[], Any]:
    """The call of a contestant."""
    if name.startswith(OURS) and not (CUDA or INTERPRETED):
        pytest.skip("kernels need a GPU, or TRITON_INTERPRET=1")
    if name == "triton":
        row["tile"] = list(contest.chosen())
        return functools.partial(contest.ours, None)
    if name == "triton best tile":
        tile, row["tiles"] = best_tile(contest)
        row["tile"] = list(tile)
        return functools.partial(contest.ours, tile)
    if name == "eager":
        return functools.partial(contest.chain, *contest.inputs)
    if name == "compiled":
        return functools.partial(compiled(contest.chain), *contest.inputs)
    return contest.others[name]


def begin(case: Case, contestant: str) -> dict[str, Any]:
    """A row with no time yet."""
    kept = {"heads": PRESET.heads * case.width // 100, "channels": PRESET.hidden * case.width // 100}
    return {**case._asdict(), "contestant": contestant, "ms": None, "dim": PRESET.dim, **kept, **about()}


def measure(case: Case) -> tuple[list[dict[str, Any]], dict[str, Callable[[], Any]]]:
    """Check all contestants of a case, then time them in turn; rows, and the calls of those that were timed."""
    limit = ceilings()
    torch.manual_seed(0)
    contest = CONTESTS[case.op](case)
    exact = contest.exact()
    size = contest.bytes(exact) - sum(t.numel() * (8 - PRESET.dtype.itemsize) for t in exact)
    eps = torch.finfo(PRESET.dtype).eps
    rows, calls = {}, {}
    for name in contestants(case, PRESET):
        row = rows[name] = begin(case, name)
        try:
            call = enter(contest, name, row)
            outputs = list(tree_iter(call()))
            if name != "triton unmasked":
                # The unmasked case checks that one.
                row["error_max"], row["error_rms"] = errors(outputs, exact)
                if not (
                    row["error_rms"] <= RMS_LIMIT * eps + SUMS_LIMIT
                    and row["error_max"] <= MAX_LIMIT * eps + SUMS_LIMIT
                ):
                    row["failed"] = f"wrong: error {row['error_max']:.2e}, RMS {row['error_rms']:.2e}"
                    continue
            calls[name] = call
        except pytest.skip.Exception as skip:
            row["skipped"] = str(skip)
        except Exception as error:
            # Others may not run everywhere; ours have to.
            row["failed" if name.startswith(OURS) else "skipped"] = why(error)
    del exact
    # Warm up.
    paired_ms(calls, 1 + PRESET.screening // 3)
    ms = paired_ms(calls, PRESET.rounds)
    rivals = [ms[name] for name in ms if not name.startswith("triton")]
    for name, taken in ms.items():
        row = rows[name]
        work, unit, scale = (contest.flops, "tflops", 1e9) if contest.flops else (size, "gbs", 1e6)
        rate = work / taken / scale
        row |= {
            "ms": round(taken, 5),
            "flops": contest.flops,
            "bytes": size,
            "rate": round(rate, 2),
            "unit": {"tflops": "TFLOP/s", "gbs": "GB/s"}[unit],
            "of_ceiling": round(rate / limit[unit], 4),
            "ceiling": round(limit[unit], 1),
            "over_eager": round(ms["eager"] / taken, 3) if "eager" in ms else None,
            "over_best_other": round(min(rivals) / taken, 3) if rivals else None,
        }
        full = _full_width_ms.setdefault((case._replace(width=100), name), taken if case.width == 100 else None)
        row["to_full_width"] = round(taken / full, 3) if full else None
    return list(rows.values()), calls


@functools.cache
def about() -> dict[str, Any]:
    return {
        "dtype": str(PRESET.dtype),
        "device": torch.cuda.get_device_name() if CUDA else f"CPU, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
        "triton": getattr(triton, "__version__", None),
        "command": " ".join(["python -m pytest", *sys.argv[1:]]),
    }


_rows: list[dict[str, Any]] = []
_full_width_ms: dict[tuple, float | None] = {}
# Inputs and calls of the latest case alone.
_latest: dict[Case, tuple[dict[str, dict], dict[str, Callable]]] = {}
_started: list[float] = []


def raced(case: Case) -> tuple[dict[str, dict], dict[str, Callable]]:
    """Rows and calls of a case by contestant; measured when the first of them asks, and dumped."""
    if case not in _latest:
        _started.append(time.monotonic())
        spent, budget = time.monotonic() - _started[0], float(os.environ.get("PPCL_BENCH_SECONDS", 230))
        if spent > budget:
            pytest.skip(f"{budget:.0f} s are over: raise PPCL_BENCH_SECONDS")
        _latest.clear()
        try:
            rows, calls = measure(case)
        except Exception as error:
            rows = [begin(case, name) | {"failed": why(error)} for name in contestants(case, PRESET)]
            calls = {}
        _rows.extend(rows)
        _latest[case] = ({row["contestant"]: row for row in rows}, calls)
        said = "  ".join(f"{row['contestant']} {row['ms']:.4g}" for row in rows if row["ms"])
        print(f"\n{spent:4.0f} s  {case}, ms: {said}", flush=True)
        if path := os.environ.get("PPCL_BENCH_JSON"):
            # As pytest-benchmark writes it.
            done = [
                {
                    "name": f"{Case(*(row[name] for name in Case._fields))}-{row['contestant']}",
                    "stats": {"median": row["ms"] and row["ms"] / 1e3},
                    "extra_info": row,
                }
                for row in _rows
            ]
            bench_report.write_json(Path(path), {"benchmarks": done})
    return _latest[case]


@pytest.fixture(scope="module", autouse=True)
def tables():
    threads = torch.get_num_threads()
    if not CUDA:
        # Too small for two.
        torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    console = bench_report.Console(width=150)
    for table in bench_report.operation_tables(_rows):
        console.print(table)


@pytest.mark.parametrize(
    ("case", "contestant"),
    [pytest.param(case, name, id=f"{case}-{name}") for case in cases(PRESET) for name in contestants(case, PRESET)],
)
def test_kernel(benchmark, case, contestant):
    """One contestant of a case; ``extra_info`` holds what was measured beside the others."""
    with torch.no_grad():
        rows, calls = raced(case)
        row = rows[contestant]
        if "skipped" in row:
            pytest.skip(row["skipped"])
        assert "failed" not in row, row["failed"]

        def call():
            calls[contestant]()
            if CUDA:
                torch.cuda.synchronize()

        benchmark.pedantic(call, rounds=5 if CUDA else 1)
        benchmark.extra_info.update(row)
