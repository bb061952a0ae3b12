"""Ahead-of-time compiles: kernels compile for sm_80 and sm_90, do not spill, fit shared memory, and use wgmma."""

import json
import os
import subprocess
import sys

import pytest

from ppcl_kernels.launch import TARGETS

COMPILING = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}


def run(*arguments: str, script: str | None = None) -> subprocess.CompletedProcess:
    """Compile in a new process: in this one triton interprets."""
    command = [sys.executable, *(["-m", "ppcl_kernels.tools.aot", *arguments] if script is None else ["-c", script])]
    return subprocess.run(command, env=COMPILING, capture_output=True, text=True)


# One case of each kernel, and with adapters, of its smallest tile: 18 compiles instead of 124, which take minutes.
SMALLEST = """
import sys
from ppcl_kernels.tools import aot
every = aot.cases
aot.cases = lambda target: iter({(case.kernel, "rank" in case.shape): case for case in every(target)}.values())
sys.exit(aot.main(["--arch", "sm_80", "--arch", "sm_90", "--json"]))
"""


@pytest.mark.parametrize("script", [SMALLEST, pytest.param(None, marks=pytest.mark.slow)], ids=["smallest", "all"])
def test_every_kernel_compiles(script):
    done = run("--arch", "sm_80", "--arch", "sm_90", "--json", script=script)
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout)
    kernels = {r["kernel"] for r in results}
    assert kernels >= {"ada_layer_norm", "qkv_projection", "joint_attention", "linear", "norm_rope", "key_ranges"}
    for arch in ("sm_80", "sm_90"):
        assert {r["kernel"] for r in results if r["arch"] == arch} == kernels
    for r in results:
        matrix = r["kernel"] in ("qkv_projection", "joint_attention", "linear")
        assert r["mma"] == ({"sm_80": "mma", "sm_90": "wgmma"}[r["arch"]] if matrix else "none"), r
        assert r["spilled_bytes"] == 0 and 0 < r["registers"] <= 255, r
        assert r["shared_bytes"] <= TARGETS[r["arch"]].shared_bytes, r


# Tiles that must never be chosen: among them one whose accumulator alone takes 256 registers of a thread, and one with
# 16 stages.
FAULTS = {
    "spills": ((128, 256, 64, 4, 2), "sm_80"),
    "shared memory": ((64, 64, 64, 4, 16), "sm_90"),
    "no wgmma": ((32, 64, 64, 4, 2), "sm_90"),
    "power of 2": ((128, 100, 64, 4, 2), "sm_90"),
}
BAD_ARGUMENTS = {
    "invalid choice: 'sm_70'": ("--arch", "sm_70"),
    "no kernel is called softmax: there are ada_layer_norm": ("--kernel", "softmax"),
}


@pytest.fixture(scope="module")
def refused():
    """Problem -> exit status, output and errors: of all of them in one process, which takes seconds to start."""
    script = f"""
import contextlib, io, json
from concurrent.futures import ThreadPoolExecutor
from ppcl_kernels.matmul import Tile
from ppcl_kernels.tools import aot

def said(arguments):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            status = aot.main(arguments)
        except SystemExit as end:
            status = end.code
    return status, out.getvalue(), err.getvalue()

found = {{problem: said(list(arguments)) for problem, arguments in {BAD_ARGUMENTS!r}.items()}}
aot.ProcessPoolExecutor = ThreadPoolExecutor
# One of the four forms of the layer: they differ in what follows the product.
every = aot.cases
aot.cases = lambda target: iter({{case.kernel: case for case in every(target)}}.values())
for problem, (tile, arch) in {FAULTS!r}.items():
    Tile.candidates = classmethod(lambda cls, target, dtype, two_weights=False, rank=0, tile=tile: (Tile(*tile),))
    found[problem] = said(["--arch", arch, "--kernel", "linear", "--json"])
print(json.dumps(found))
"""
    done = run(script=script)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("problem", [*FAULTS, *BAD_ARGUMENTS])
def test_finds_fault(refused, problem):
    """A tile that must never be chosen gives exit status 1, bad arguments status 2, and the reason."""
    status, out, err = refused[problem]
    assert status == (1 if problem in FAULTS else 2), err
    assert problem in err
    if problem in FAULTS:
        assert any(problem in r["problem"] for r in json.loads(out)), out


def test_no_width_compiles_anew():
    """Every count of heads, channels and tokens has the same source, so the same compiled kernel, at batch 1 and 2."""
    script = """
import torch
from ppcl_kernels.joint_attention import Tile as AttentionTile, launch_joint_attention
from ppcl_kernels.launch import TARGETS
from ppcl_kernels.linear import Linear, launch_linear
from ppcl_kernels.matmul import Tile
from ppcl_kernels.qkv_projection import Stream, joint_outputs, launch_qkv_projection

target, tile = TARGETS["sm_90"], Tile(128, 128, 64, 8, 3)
meta = lambda *shape: torch.empty(*shape, dtype=torch.bfloat16, device="meta")
sources = {"linear": set(), "qkv_projection": set(), "joint_attention": set()}
for heads, channels, text, batch in ((24, 12288, 512, 2), (18, 9216, 37, 1), (12, 6144, 1, 2), (1, 128, 1000, 1)):
    groups = [Linear(meta(batch, s, 3072), meta(12288, 3072), meta(12288), channels) for s in (4096, text)]
    outputs = [meta(batch, s, channels) for s in (4096, text)]
    streams = [Stream(meta(batch, s, 3072), (meta(3072, 3072),) * 3) for s in (text, 4096)]
    joint = joint_outputs(streams[0].x, (text, 4096), (True, True), heads, 128)
    attention = AttentionTile(128, 128, 8, 2)
    for name, launch in (
        ("linear", launch_linear(groups, outputs, "gelu", tile, target)),
        ("qkv_projection", launch_qkv_projection(streams, joint, heads, None, 128, 1e-6, tile, target)),
        ("joint_attention", launch_joint_attention(*joint, joint[0], None, None, None, 1.0, attention, target)),
    ):
        source = launch.source()
        sources[name].add(repr((source.signature, source.constants, source.attrs)))
print({name: len(different) for name, different in sources.items()})
"""
    done = run(script=script)
    assert done.stdout.strip() == "{'linear': 1, 'qkv_projection': 1, 'joint_attention': 1}", done.stdout + done.stderr


def test_compiles_what_would_run():
    """`Launch.source` specialises as triton's JIT does, so what is compiled ahead of time is what runs.

    Every launch goes through the JIT up to the compilation; its driver is fake, so no device is needed. The shapes are
    those of the ahead-of-time compiles, then small and odd ones, then starts that are not multiples of 16 bytes, and
    strides beyond 32 bits.
    """
    script = """
import torch, triton
from triton.backends.compiler import GPUTarget
from ppcl_kernels.tools import aot
from ppcl_kernels.gated_residual import Tile, launch_gated_residual
from ppcl_kernels.launch import TARGETS

class Driver:
    get_current_device = get_current_stream = lambda self, *_: 0
    get_current_target = lambda self: GPUTarget("cuda", 90, 32)

triton.runtime.driver.set_active(Driver())

def by_jit(launch):
    compiled = []
    # Empty attributes are compared too: the cache of compiled kernels depends on them.
    launch.kernel._do_compile = lambda key, signature, device, constants, options, attributes, *_, **__: (
        compiled.append((signature, constants, attributes))
    )
    launch.kernel.device_caches.clear()
    launch.kernel[launch.grid](**launch.arguments, **launch._options(amd=False))
    return compiled[0]

launches = []
for aot.BATCH, aot.IMAGE, aot.TEXT, aot.HEADS, aot.HEAD_DIM, aot.HIDDEN in (
    (2, 4096, 512, 24, 128, 12288), (1, 1, 7, 3, 18, 50), (1, 64, 16, 1, 16, 1),
):
    aot.DIM = aot.HEADS * aot.HEAD_DIM
    launches += [case.launch() for arch in ("sm_90", "sm_80") for case in aot.cases(TARGETS[arch])]
x, h, y = (torch.empty(2 * 3 * 24 + 4)[start:][: 2 * 3 * 24].view(2, 3, 24) for start in (0, 2, 4))
for index in (None, torch.zeros(2, 3, dtype=torch.int64), torch.zeros(7, dtype=torch.int32)[1:].view(2, 3)):
    launches.append(launch_gated_residual(x, h[:, 0], h, index, y, Tile(16, 4)))
far = torch.empty_strided((2, 3, 16), (2**31 + 16, 16, 1), device="meta")
launches.append(launch_gated_residual(far, far[:, 0], far, None, y, Tile(16, 4)))
found = set()
for launch in launches:
    source = launch.source()
    said = {name: kind.replace(" ", "") for name, kind in source.signature.items()}, source.constants, source.attrs
    signature, constants, attributes = by_jit(launch)
    wanted = {name: str(kind).replace(" ", "") for name, kind in signature.items()}, constants, attributes
    for what, one, other in zip(("signature", "constants", "attributes"), said, wanted):
        assert one == other, (launch, what, one, other)
    found |= set(said[0].values()) | {str(sorted(said[2].items()))}
print(len(launches), len(found))
"""
    done = run(script=script)
    assert done.returncode == 0, done.stderr[-2000:]
    launches, different = map(int, done.stdout.split())
    # Descriptors, pointers, numbers and None, aligned and not.
    assert launches > 150 and different > 30


def test_refuses_to_interpret():
    done = subprocess.run(
        [sys.executable, "-m", "ppcl_kernels.tools.aot"],
        env={**COMPILING, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and "TRITON_INTERPRET unset" in done.stderr
