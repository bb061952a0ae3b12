"""Compile every kernel for every architecture, without a GPU, and report registers, spills and instructions.

    python -m ppcl_kernels.tools.aot [--arch sm_90] [--kernel linear] [--json]

The shapes are those of a 20B two-stream model at 1024 x 1024 (model dimension 3072, 24 heads of 128, MLP 12288, 4096
image and 512 text tokens, batch 2), in bf16, of blocks of the same sizes that run both streams as one, what is other
with heads of 64 and no rotations, and SwiGLU of a 6B single-stream model (model dimension 3840, MLP 10240). The tiles
are all that can be chosen there. Launches are built on meta tensors by the same functions that run them, so what is
compiled is what a model would compile. Compiled kernels stay in triton's cache.

Exit status: 1 when a kernel does not compile, spills, needs more shared memory than its architecture has, or is a
matrix kernel without tensor-core instructions (on sm_90: without wgmma); 2 on bad arguments.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ppcl_kernels._triton import INTERPRETED, triton
from ppcl_kernels.ada_layer_norm import Tile as NormTile
from ppcl_kernels.ada_layer_norm import launch_ada_layer_norm
from ppcl_kernels.allowed import tile_name
from ppcl_kernels.gated_residual import Tile as ResidualTile
from ppcl_kernels.gated_residual import launch_gated_residual
from ppcl_kernels.heads import joint_outputs
from ppcl_kernels.joint_attention import Tile as AttentionTile
from ppcl_kernels.joint_attention import launch_joint_attention, launch_key_ranges
from ppcl_kernels.launch import TARGETS, Launch, Target
from ppcl_kernels.linear import Linear, launch_linear
from ppcl_kernels.matmul import Tile
from ppcl_kernels.norm_rope import Tile as NormRopeTile
from ppcl_kernels.norm_rope import launch_norm_rope
from ppcl_kernels.qkv_projection import Stream, launch_qkv_projection, tile_candidates

BATCH, IMAGE, TEXT = 2, 4096, 512
# Heads of 64 in streams whose width is no multiple of 256, a text of odd length, no rotations: an 8B two-stream model.
# Its 2.5B sibling has the same heads in streams of width 1536.
SMALL_HEADS, SMALL_HEAD_DIM, ODD_TEXT, SMALLER_DIM = 38, 64, 333, 1536
HEADS, HEAD_DIM, HIDDEN = 24, 128, 12288
DIM = HEADS * HEAD_DIM
# Of adapters, where there are some.
RANK = 16
# Of the single-stream model.
SINGLE_HEADS, SINGLE_HIDDEN = 30, 10240
SINGLE_DIM = SINGLE_HEADS * HEAD_DIM


def _meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def _modulation() -> torch.Tensor:
    """Make one of the six modulations that a modulation layer returns as one tensor."""
    return _meta(BATCH, 6 * DIM)[:, :DIM]


@dataclass(frozen=True)
class Case:
    """One kernel at one shape with one tile; ``matrix``: it multiplies matrices; ``launch`` builds its launch."""

    kernel: str
    shape: str
    tile: str
    matrix: bool
    launch: Callable[[], Launch]


@dataclass(frozen=True)
class Compiled:
    """What the compiler made of a case; ``mma`` names its tensor-core instructions, ``problem`` what is wrong."""

    kernel: str
    arch: str
    shape: str
    tile: str
    registers: int
    spilled_bytes: int
    shared_bytes: int
    mma: str
    problem: str


def _factors(n: int, k: int, rank: int) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Make the two factors of an adapter, None for rank 0."""
    return (_meta(rank, k), _meta(n, rank)) if rank else (None, None)


def _linear(target: Target, tile: Tile, what: str, rank: int = 0) -> Launch:
    n, k = (HIDDEN, DIM) if what == "up" else (DIM, DIM if what == "map" else HIDDEN)
    groups, outputs = [], []
    for tokens in (IMAGE, TEXT):
        y = _meta(BATCH, tokens, n)
        gate = _modulation() if what in ("down", "edit") else None
        index = _meta(BATCH, tokens, dtype=torch.int64) if what == "edit" else None
        residual = None if what == "up" else y
        layer = Linear(_meta(BATCH, tokens, k), _meta(n, k), _meta(n), n, gate, index, residual)
        down, up = _factors(n, k, rank)
        groups.append(layer._replace(down=down, up=up))
        outputs.append(y)
    return launch_linear(groups, outputs, "gelu" if what == "up" else "none", tile, target)


def _gated(target: Target, tile: Tile, what: str, rank: int = 0) -> Launch:
    """Make a launch of the single-stream model, whose layers have no biases."""
    n = SINGLE_HIDDEN if what == "up" else SINGLE_DIM
    k = SINGLE_HIDDEN if what == "down" else SINGLE_DIM
    x, weight, y = _meta(BATCH, TEXT + IMAGE, k), _meta(n, k), _meta(BATCH, TEXT + IMAGE, n)
    layer = Linear(x, weight, None, n, silu_weight=weight if what == "up" else None)
    down, up = _factors(n, k, rank)
    layer = layer._replace(down=down, up=up, silu_down=down, silu_up=up)
    return launch_linear([layer], [y], "swiglu" if what == "up" else "none", tile, target)


def _single(target: Target, tile: Tile, what: str) -> Launch:
    """Make a launch of a block that runs both streams as one, whose output layer reads heads and channels."""
    n, k = {"up": (HIDDEN, DIM), "heads": (DIM, DIM), "channels": (DIM, HIDDEN)}[what]
    x, y, bias = _meta(BATCH, TEXT + IMAGE, k), _meta(BATCH, TEXT + IMAGE, n), _meta(n)
    if what == "up":
        return launch_linear([Linear(x, _meta(n, k), bias)], [y], "gelu", tile, target)
    first = 0 if what == "heads" else DIM
    weight = _meta(DIM, DIM + HIDDEN)[:, first : first + k]
    layer = Linear(x, weight, bias if what == "heads" else None, n, _modulation(), None, y)
    return launch_linear([layer], [y], "none", tile, target)


def _single_qkv(target: Target, tile: Tile) -> Launch:
    rope = _meta(TEXT + IMAGE, HEAD_DIM // 2, 2, dtype=torch.float32)
    x = _meta(BATCH, TEXT + IMAGE, DIM)
    stream = Stream(x, (_meta(DIM, DIM),) * 3, (_meta(DIM),) * 3, (_meta(HEAD_DIM),) * 2, rope)
    outputs = joint_outputs(x, (TEXT + IMAGE,), (True,), HEADS, HEAD_DIM)
    return launch_qkv_projection([stream], outputs, HEADS, None, HEAD_DIM, 1e-6, tile, target)


def _qkv(target: Target, tile: Tile, queries: bool, norms: bool, rope: bool, chosen: bool, rank: int = 0) -> Launch:
    down, up = _factors(DIM, DIM, rank)
    weights, biases = (_meta(DIM, DIM),) * 3, (_meta(DIM),) * 3
    streams = [
        Stream(
            _meta(BATCH, tokens, DIM),
            weights,
            biases,
            (_meta(HEAD_DIM),) * 2 if norms else (None, None),
            _meta(tokens, HEAD_DIM // 2, 2, dtype=torch.float32) if rope else None,
            asked,
            (down,) * 3,
            (up,) * 3,
        )
        for tokens, asked in ((TEXT, queries), (IMAGE, True))
    ]
    outputs = joint_outputs(streams[0].x, (TEXT, IMAGE), (queries, True), HEADS, HEAD_DIM)
    heads = _meta(HEADS, dtype=torch.int32) if chosen else None
    return launch_qkv_projection(streams, outputs, HEADS, heads, HEAD_DIM, 1e-6, tile, target)


def _attention(target: Target, tile: AttentionTile, mask: str) -> Launch:
    q = _meta(BATCH, TEXT + IMAGE, HEADS, HEAD_DIM)
    key_mask = _meta(BATCH, TEXT + IMAGE, dtype=torch.uint8) if mask == "mask" else None
    ranges = _meta(BATCH, 4, dtype=torch.int32) if mask == "mask" else None
    lengths = _meta(BATCH, dtype=torch.int32) if mask == "lengths" else None
    return launch_joint_attention(q, q, q, q, key_mask, ranges, lengths, 1.0, tile, target)


def _norm(tile: NormTile, indexed: bool) -> Launch:
    x, scale = _meta(BATCH, IMAGE, DIM), _modulation()
    return launch_ada_layer_norm(x, scale, scale, _index(indexed), x, 1e-6, tile)


def _residual(tile: ResidualTile, indexed: bool) -> Launch:
    x = _meta(BATCH, IMAGE, DIM)
    return launch_gated_residual(x, _modulation(), x, _index(indexed), x, tile)


def _index(indexed: bool) -> torch.Tensor | None:
    return _meta(BATCH, IMAGE, dtype=torch.int64) if indexed else None


def _norm_rope(tile: NormRopeTile, queries: bool, biased: bool) -> Launch:
    raw = _meta(BATCH, IMAGE, HEADS, HEAD_DIM)
    rope = _meta(IMAGE, HEAD_DIM // 2, 2, dtype=torch.float32)
    norms, biases = (_meta(HEAD_DIM),) * 2, ((_meta(DIM) if biased else None),) * 3
    parts = (raw if queries else None, raw, raw)
    return launch_norm_rope(parts, norms, rope, (raw, raw, raw), 0, 0, 1e-6, tile, biases)


def _small_qkv(target: Target, tile: Tile, norms: bool, text: bool) -> Launch:
    """Make a launch of both streams, or of the image alone."""
    dim = SMALL_HEADS * SMALL_HEAD_DIM
    weights, biases = (_meta(dim, dim),) * 3, (_meta(dim),) * 3
    of_heads = (_meta(SMALL_HEAD_DIM),) * 2 if norms else (None, None)
    tokens = (ODD_TEXT, IMAGE) if text else (IMAGE,)
    streams = [Stream(_meta(BATCH, count, dim), weights, biases, of_heads, None, True) for count in tokens]
    outputs = joint_outputs(streams[0].x, tokens, (True,) * len(tokens), SMALL_HEADS, SMALL_HEAD_DIM)
    return launch_qkv_projection(streams, outputs, SMALL_HEADS, None, SMALL_HEAD_DIM, 1e-6, tile, target)


def _small_attention(target: Target, tile: AttentionTile, tokens: int) -> Launch:
    q = _meta(BATCH, tokens, SMALL_HEADS, SMALL_HEAD_DIM)
    return launch_joint_attention(q, q, q, q, None, None, None, 1.0, tile, target)


def _small_linear(target: Target, tile: Tile, what: str) -> Launch:
    dim = SMALL_HEADS * SMALL_HEAD_DIM
    n, k = (4 * dim, dim) if what == "up" else (dim, 4 * dim)
    groups, outputs = [], []
    for tokens in (IMAGE, ODD_TEXT):
        y = _meta(BATCH, tokens, n)
        gate, residual = (None, None) if what == "up" else (_meta(BATCH, 6 * dim)[:, :dim], y)
        groups.append(Linear(_meta(BATCH, tokens, k), _meta(n, k), _meta(n), n, gate, None, residual))
        outputs.append(y)
    return launch_linear(groups, outputs, "gelu" if what == "up" else "none", tile, target)


def _small_norm(tile: NormTile, tokens: int, dim: int) -> Launch:
    # One of nine modulations of a layer.
    x, scale = _meta(BATCH, tokens, dim), _meta(BATCH, 9 * dim)[:, :dim]
    return launch_ada_layer_norm(x, scale, scale, None, x, 1e-6, tile)


def _small_norm_rope(tile: NormRopeTile, norms: bool) -> Launch:
    raw = _meta(BATCH, ODD_TEXT, SMALL_HEADS, SMALL_HEAD_DIM)
    of_heads, biases = (_meta(SMALL_HEAD_DIM) if norms else None,) * 2, (_meta(SMALL_HEADS * SMALL_HEAD_DIM),) * 3
    return launch_norm_rope((raw, raw, raw), of_heads, None, (raw, raw, raw), 0, 0, 1e-6, tile, biases)


def _small_cases(target: Target) -> Iterator[Case]:
    """Yield what compiles to something else at heads of 64."""
    dim, tokens = SMALL_HEADS * SMALL_HEAD_DIM, f"B {BATCH}, S {ODD_TEXT}+{IMAGE}"
    tile: Any
    for tile in Tile.candidates(target, torch.bfloat16):
        for what, shape in (("up", f"{dim} to {4 * dim}, GELU"), ("down", f"{4 * dim} to {dim}, gate, residual")):
            launch = partial(_small_linear, target, tile, what)
            yield Case("linear", f"{tokens}, {shape}", tile_name(tile), True, launch)
    for tile in tile_candidates(target, torch.bfloat16, SMALL_HEAD_DIM):
        for shape, norms, text in (("plain", False, True), ("norm", True, True), ("norm, image alone", True, False)):
            launch = partial(_small_qkv, target, tile, norms, text)
            yield Case("qkv_projection", f"{tokens}, H {SMALL_HEADS} x 64, {shape}", tile_name(tile), True, launch)
    for tile in AttentionTile.candidates(target, torch.bfloat16, SMALL_HEAD_DIM):
        for count in (ODD_TEXT + IMAGE, IMAGE):
            launch = partial(_small_attention, target, tile, count)
            yield Case("joint_attention", f"B {BATCH}, S {count}, H {SMALL_HEADS} x 64", tile_name(tile), True, launch)
    for width in (dim, SMALLER_DIM):
        for tile in NormTile.candidates(target, torch.bfloat16, width):
            for count in (IMAGE, ODD_TEXT):
                launch = partial(_small_norm, tile, count, width)
                yield Case("ada_layer_norm", f"B {BATCH}, S {count}, D {width}", tile_name(tile), False, launch)
    for tile in NormRopeTile.candidates(target, torch.bfloat16):
        for shape, norms in (("bias", False), ("norm, bias", True)):
            launch = partial(_small_norm_rope, tile, norms)
            yield Case(
                "norm_rope", f"B {BATCH}, S {ODD_TEXT}, H {SMALL_HEADS} x 64, {shape}", tile_name(tile), False, launch
            )


def cases(target: Target) -> Iterator[Case]:
    """Yield all kernels at the production shapes, with every tile that can be chosen there on ``target``."""
    yield from _small_cases(target)
    tokens, joint = f"B {BATCH}, S {TEXT}+{IMAGE}", f"B {BATCH}, S {TEXT + IMAGE}"
    tile: Any
    for tile in Tile.candidates(target, torch.bfloat16):
        for what, shape in (
            ("up", f"{DIM} to {HIDDEN}, GELU"),
            ("down", f"{HIDDEN} to {DIM}, gate, residual"),
            ("edit", f"{HIDDEN} to {DIM}, gate by token, residual"),
            ("map", f"{DIM} to {DIM}, residual"),
        ):
            yield Case("linear", f"{tokens}, {shape}", tile_name(tile), True, partial(_linear, target, tile, what))
            if what in ("up", "down") and tile in Tile.candidates(target, torch.bfloat16, rank=RANK):
                launch = partial(_linear, target, tile, what, RANK)
                yield Case("linear", f"{tokens}, {shape}, rank {RANK}", tile_name(tile), True, launch)
        for what, shape in (
            ("up", f"{DIM} to {HIDDEN}, GELU"),
            ("heads", f"{DIM} of {DIM + HIDDEN} to {DIM}, gate, residual"),
            ("channels", f"{HIDDEN} of {DIM + HIDDEN} to {DIM}, no bias, gate, residual"),
        ):
            yield Case("linear", f"{joint}, {shape}", tile_name(tile), True, partial(_single, target, tile, what))
        for what, shape in (
            ("up", f"{SINGLE_DIM} to {SINGLE_HIDDEN}, SwiGLU"),
            ("down", f"{SINGLE_HIDDEN} to {SINGLE_DIM}"),
            ("out", f"{SINGLE_DIM} to {SINGLE_DIM}"),
        ):
            if what == "up" and tile not in Tile.candidates(target, torch.bfloat16, two_weights=True):
                continue
            yield Case("linear", f"{joint}, {shape}", tile_name(tile), True, partial(_gated, target, tile, what))
            if what == "up" and tile in Tile.candidates(target, torch.bfloat16, two_weights=True, rank=RANK):
                launch = partial(_gated, target, tile, what, RANK)
                yield Case("linear", f"{joint}, {shape}, rank {RANK}", tile_name(tile), True, launch)
    for tile in tile_candidates(target, torch.bfloat16, HEAD_DIM):
        for shape, *options in (
            ("norm, RoPE", True, True, True, False),
            ("norm, RoPE, no text queries", False, True, True, False),
            ("list of heads", True, True, True, True),
            ("plain", True, False, False, False),
        ):
            launch = partial(_qkv, target, tile, *options)
            yield Case("qkv_projection", f"{tokens}, H {HEADS}, {shape}", tile_name(tile), True, launch)
        if tile in tile_candidates(target, torch.bfloat16, HEAD_DIM, RANK):
            launch = partial(_qkv, target, tile, True, True, True, False, RANK)
            shape = f"{tokens}, H {HEADS}, norm, RoPE, rank {RANK}"
            yield Case("qkv_projection", shape, tile_name(tile), True, launch)
        launch = partial(_single_qkv, target, tile)
        yield Case("qkv_projection", f"{joint}, H {HEADS}, norm, RoPE", tile_name(tile), True, launch)
    for tile in AttentionTile.candidates(target, torch.bfloat16, HEAD_DIM):
        for mask in ("none", "lengths", "mask"):
            shape = f"B {BATCH}, S {TEXT + IMAGE}, H {HEADS}, {mask}"
            yield Case("joint_attention", shape, tile_name(tile), True, partial(_attention, target, tile, mask))
    for keys in sorted({t.keys for t in AttentionTile.candidates(target, torch.bfloat16, HEAD_DIM)}):
        key_mask, ranges = _meta(BATCH, TEXT + IMAGE, dtype=torch.uint8), _meta(BATCH, 4, dtype=torch.int32)
        launch = partial(launch_key_ranges, key_mask, ranges, keys)
        yield Case("key_ranges", f"B {BATCH}, S {TEXT + IMAGE}", str(keys), False, launch)
    for indexed in (False, True):
        shape = f"B {BATCH}, S {IMAGE}, D {DIM}" + (", by token" if indexed else "")
        for tile in NormTile.candidates(target, torch.bfloat16, DIM):
            yield Case("ada_layer_norm", shape, tile_name(tile), False, partial(_norm, tile, indexed))
        for tile in ResidualTile.candidates(target, torch.bfloat16):
            yield Case("gated_residual", shape, tile_name(tile), False, partial(_residual, tile, indexed))
    for tile in NormRopeTile.candidates(target, torch.bfloat16):
        for what, queries, biased in (("", True, False), (", bias", True, True), (", no queries", False, False)):
            shape = f"B {BATCH}, S {IMAGE}, H {HEADS}{what}"
            yield Case("norm_rope", shape, tile_name(tile), False, partial(_norm_rope, tile, queries, biased))


# The first kind that a kernel has counts. Whole words, so that HMMA is not found in HGMMA.
_INSTRUCTIONS = {"wgmma": r"\bHGMMA\b", "tcgen05": r"\bUTC\w*MMA\b", "mma": r"\bHMMA\b", "mfma": r"\bv_mfma"}


def _figure(pattern: str, text: str) -> int:
    found = re.search(pattern + r":\s*(\d+)", text)
    assert found, f"the listing has no {pattern}"
    return int(found[1])


def inspect(binary: Any) -> tuple[int, int, str]:
    """Return (registers of a thread, bytes spilled, kind of tensor-core instruction) of a compiled kernel."""
    if "amdgcn" in binary.asm:
        listing = binary.asm["amdgcn"]
        # Scratch memory counts as spilled; scalar registers that are kept in vector registers do not.
        registers, spilled = (_figure(rf"\.{name}", listing) for name in ("vgpr_count", "private_segment_fixed_size"))
    else:
        tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        with tempfile.TemporaryDirectory() as folder:
            cubin = Path(folder) / "kernel.cubin"
            cubin.write_bytes(binary.asm["cubin"])
            usage, listing = (
                subprocess.run([tool, option, cubin], capture_output=True, text=True, check=True).stdout
                for option in ("-res-usage", "-sass")
            )
        registers, spilled = (_figure(name, usage) for name in ("REG", "STACK"))
    kinds = [name for name, pattern in _INSTRUCTIONS.items() if re.search(pattern, listing)]
    return registers, spilled, kinds[0] if kinds else "none"


def compile_case(arch: str, number: int) -> Compiled:
    """Compile the ``number``-th case of ``arch``; the result's ``problem`` says what is wrong."""
    target = TARGETS[arch]
    case = list(cases(target))[number]
    about = {"kernel": case.kernel, "arch": arch, "shape": case.shape, "tile": case.tile}
    try:
        binary = case.launch().compile(target)
    # Whatever the compiler raises is a result here.
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[-1]
        return Compiled(**about, registers=0, spilled_bytes=0, shared_bytes=0, mma="none", problem=reason[:200])
    registers, spilled, mma = inspect(binary)
    shared = binary.metadata.shared
    problems = []
    if spilled:
        problems.append(f"spills {spilled} bytes")
    if shared > target.shared_bytes:
        problems.append(f"wants {shared} bytes of shared memory, there are {target.shared_bytes}")
    if case.matrix and mma == "none":
        problems.append("no tensor-core instruction")
    if case.matrix and arch == "sm_90" and mma != "wgmma":
        problems.append("no wgmma")
    return Compiled(
        **about, registers=registers, spilled_bytes=spilled, shared_bytes=shared, mma=mma, problem="; ".join(problems)
    )


def _table(results: list[Compiled]) -> Any:
    from rich.table import Table

    columns = ("kernel", "arch", "shape", "tile", "registers", "spilled", "shared / limit", "tensor cores", "")
    table = Table(*columns, title=f"bf16, triton {triton.__version__}")
    for r in results:
        shared = f"{r.shared_bytes:,} / {TARGETS[r.arch].shared_bytes:,}"
        problem = f"[red]{r.problem}[/red]" if r.problem else ""
        table.add_row(r.kernel, r.arch, r.shape, r.tile, str(r.registers), str(r.spilled_bytes), shared, r.mma, problem)
    return table


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m ppcl_kernels.tools.aot", description=__doc__.splitlines()[0])
    parser.add_argument("--arch", action="append", choices=TARGETS, help="repeat for several; all of them by default")
    parser.add_argument("--kernel", action="append", help="names to compile, e.g. linear; all of them by default")
    parser.add_argument("--json", action="store_true", help="a list of objects instead of a table")
    options = parser.parse_args(arguments)
    if triton is None or INTERPRETED:
        parser.error("compiling needs triton, and TRITON_INTERPRET unset")
    work = [
        (arch, number)
        for arch in options.arch or TARGETS
        for number, case in enumerate(cases(TARGETS[arch]))
        if not options.kernel or case.kernel in options.kernel
    ]
    if not work:
        names = sorted({case.kernel for case in cases(TARGETS["sm_90"])})
        parser.error(f"no kernel is called {' or '.join(options.kernel)}: there are {', '.join(names)}")
    from rich.console import Console
    from rich.progress import track

    errors = Console(stderr=True)
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        jobs = pool.map(compile_case, *zip(*work, strict=True))
        results = list(track(jobs, "compiling", len(work), console=errors, disable=not errors.is_terminal))
    if options.json:
        print(json.dumps([asdict(result) for result in results], indent=1))
    else:
        Console(width=None if sys.stdout.isatty() else 200).print(_table(results))
    failed = [result for result in results if result.problem]
    for result in failed:
        errors.print(f"{result.kernel} on {result.arch}, tile {result.tile}, {result.shape}: {result.problem}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
