"""What a launch costs the host: microseconds of python for each of the nine launches of a Qwen-Image block.

    python bench/suites/bench_host.py [--json] [--before REV] [--public]

No device is needed: triton binds, specialises and launches on a fake driver (`fake_driver`), whose C functions take
their arguments and do nothing. The shapes are those of Qwen-Image at 512 x 512: batch 1, 1024 image and 64 text tokens,
3072 channels a token, 24 heads of 128, 12288 MLP channels, bf16. Nothing is computed. What is measured is what a model
calls for a launch whose shapes it has met before: the check that the prepared launch still fits, the allocation of the
outputs, and the launch. ``--before`` also measures the public functions of another revision, in turn in the same run.

Prints a table, or with ``--json`` a list of objects: ``operation`` (``block`` is all nine, one after the other),
``us``, and with ``--before`` also ``before_us`` and ``ratio``.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

ROOT = Path(__file__).resolve().parents[2]
BATCH, IMAGE, TEXT, HEADS, HEAD_DIM, CHANNELS = 1, 1024, 64, 24, 128, 12288
WIDTH = HEADS * HEAD_DIM
# Each turn starts a process, which takes the best of its rounds; the result is the median of the turns. All rounds last
# equally long, for cheap and for costly calls, and less than a time slice of the scheduler, so that a busy machine
# treats all calls alike.
ROUNDS, ROUND_SECONDS = 60, 1.5e-3
Calls = dict[str, Callable[[], Any]]


def block() -> Any:
    """Make the tensors and modules of a block; their memory is never touched, so it is never paged in."""
    import torch
    from torch import nn

    def make(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.empty(*shape, dtype=dtype)

    def layer(n: int, k: int) -> nn.Linear:
        module = nn.Linear(k, n, device="meta")
        module.weight, module.bias = (nn.Parameter(make(*size), requires_grad=False) for size in ((n, k), (n,)))
        return module

    def scale() -> Any:
        module = nn.RMSNorm(HEAD_DIM, device="meta")
        module.weight = nn.Parameter(make(HEAD_DIM), requires_grad=False)
        return module

    tokens = (TEXT, IMAGE)
    return SimpleNamespace(
        x=[make(BATCH, s, WIDTH) for s in tokens],
        attended=[make(BATCH, s, WIDTH) for s in tokens],
        hidden=[make(BATCH, s, CHANNELS) for s in tokens],
        modulation=[make(BATCH, 6 * WIDTH).chunk(6, -1) for _ in tokens],
        ropes=[make(s, HEAD_DIM // 2, 2, dtype=torch.float32) for s in tokens],
        qkv=[[layer(WIDTH, WIDTH) for _ in range(3)] for _ in tokens],
        norms=[[scale(), scale()] for _ in tokens],
        out=[layer(WIDTH, WIDTH) for _ in tokens],
        up=[layer(CHANNELS, WIDTH) for _ in tokens],
        down=[layer(WIDTH, CHANNELS) for _ in tokens],
        joint=[make(BATCH, TEXT + IMAGE, HEADS, HEAD_DIM) for _ in range(3)],
    )


def public_calls(b: Any) -> Calls:
    """Return calls of the public functions, as the models of older revisions made them."""
    import ppcl_kernels as pk

    def linear(x: list, layers: list, activation: str = "none", gate: list | None = None) -> Any:
        gates, residuals = gate or (None, None), b.x if gate else (None, None)
        groups = [
            pk.Linear(x, m.weight, m.bias, m.weight.shape[0], g, None, r)
            for x, m, g, r in zip(x, layers, gates, residuals, strict=True)
        ]
        return pk.grouped_linear(groups, activation=activation)

    def qkv() -> Any:
        streams = [
            pk.Stream(x, tuple(m.weight for m in layers), tuple(m.bias for m in layers), (q.weight, k.weight), rope)
            for x, layers, (q, k), rope in zip(b.x, b.qkv, b.norms, b.ropes, strict=True)
        ]
        return pk.qkv_projection(streams, HEADS, HEAD_DIM)

    calls: Calls = {}
    for half, (scale, shift) in enumerate(((0, 1), (3, 4)), 1):
        for stream, name in enumerate(("text", "image")):
            m = b.modulation[stream]
            calls[f"ada_layer_norm_{half}_{name}"] = lambda s=stream, m=m, a=scale, c=shift: pk.ada_layer_norm(
                b.x[s], m[a], m[c]
            )
    gates = [[m[i] for m in b.modulation] for i in (2, 5)]
    return calls | {
        "qkv_projection": qkv,
        "joint_attention": lambda: pk.joint_attention(*b.joint),
        "out": lambda: linear(b.attended, b.out, gate=gates[0]),
        "up": lambda: linear(b.x, b.up, activation="gelu"),
        "down": lambda: linear(b.hidden, b.down, gate=gates[1]),
    }


def model_calls(b: Any) -> Calls:
    """Return the calls that a model makes: operations on modules, whose launches are prepared at the first call."""
    from diffusers.models.normalization import RMSNorm
    from torch import nn

    from ppcl_rt import ops

    norm = nn.LayerNorm(WIDTH, elementwise_affine=False, eps=1e-6)
    projections = []
    for layers, pair in zip(b.qkv, b.norms, strict=True):
        norms = []
        for plain in pair:
            norms.append(RMSNorm(HEAD_DIM, eps=1e-6))
            norms[-1].weight = plain.weight
        projections.append(ops.Projection(*layers, *norms))

    def linears(xs: list, layers: list, activation: str = "none", gates: list | None = None) -> Any:
        # The image first, as the block passes them.
        more = [(g, None, x) for g, x in zip(gates, b.x, strict=True)] if gates else [(None, None, None)] * 2
        given = [ops.Layer(m, x, m.out_features, *rest) for m, x, rest in zip(layers, xs, more, strict=True)]
        return ops.linears(given[::-1], activation=activation)

    calls: Calls = {}
    for half, (scale, shift) in enumerate(((0, 1), (3, 4)), 1):
        for stream, name in enumerate(("text", "image")):
            m = b.modulation[stream]
            calls[f"ada_layer_norm_{half}_{name}"] = lambda s=stream, m=m, a=scale, c=shift: ops.ada_layer_norm(
                b.x[s], norm, m[a], m[c]
            )
    gates = [[m[i] for m in b.modulation] for i in (2, 5)]
    return calls | {
        "qkv_projection": lambda: ops.qkv_projection(
            [ops.ProjectedStream(*s) for s in zip(b.x, projections, b.ropes, strict=True)], HEADS, HEAD_DIM
        ),
        "joint_attention": lambda: ops.joint_attention(*b.joint, None),
        "out": lambda: linears(b.attended, b.out, gates=gates[0]),
        "up": lambda: linears(b.x, b.up, activation="gelu"),
        "down": lambda: linears(b.hidden, b.down, gates=gates[1]),
    }


def microseconds(call: Callable[[], Any]) -> float:
    def once(repeats: int) -> float:
        start = time.perf_counter()
        for _ in range(repeats):
            call()
        return (time.perf_counter() - start) / repeats

    guess = min(once(1) for _ in range(20))
    repeats = max(round(ROUND_SECONDS / guess), 1)
    return min(once(repeats) for _ in range(ROUNDS)) * 1e6


def work(public: bool) -> dict[str, float]:
    """Measure in this process; returns microseconds by operation."""
    import fake_driver
    import torch

    import ppcl_kernels
    from ppcl_kernels import launch

    made: deque[tuple] = deque(maxlen=4)
    fake_driver.install(lambda *taken: made.append(taken), lambda *about: object())
    launch.Target.of = classmethod(lambda cls, device: launch.TARGETS["sm_90"])
    # Models ask whether kernels can run before they launch one; on a GPU the answer is yes.
    ppcl_kernels.can_run = lambda x: True
    os.environ["PPCL_BACKEND"] = "triton"
    tensors = block()
    with torch.no_grad():
        calls = (public_calls if public else model_calls)(tensors)
        for name, call in calls.items():
            call(), call()
            assert len(made) == 2, f"{name} launches {len(made)} times in two calls"
            made.clear()
        walk = list(calls.values())
        timed = calls | {"block": lambda: [call() for call in walk]}
        # A prepared launch must not go through triton's JIT.
        detour = mock.patch.object(launch.Launch, "run", side_effect=AssertionError("a prepared launch was described"))
        with nullcontext() if public else detour:
            return {name: microseconds(call) for name, call in timed.items()}


@contextmanager
def checked_out(revision: str) -> Iterator[Path]:
    """Check out a revision in a work tree of its own inside the ``with``."""
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "before"
        git = ["git", "-C", str(ROOT), "worktree"]
        subprocess.run([*git, "add", "--detach", "--quiet", str(tree), revision], check=True)
        try:
            yield tree
        finally:
            subprocess.run([*git, "remove", "--force", str(tree)], check=True)


def measured(root: Path, public: bool) -> dict[str, float]:
    """Measure the checkout at ``root`` in a new process."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    paths = [str(root), str(root / "kernels"), *filter(None, [environment.get("PYTHONPATH")])]
    environment |= {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, "--work", *(["--public"] if public else [])]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(done.returncode)
    return json.loads(done.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="a list of objects instead of a table")
    parser.add_argument("--before", metavar="REV", help="measure the public functions of this revision too")
    parser.add_argument(
        "--public", action="store_true", help="this revision's public functions, not what a model calls"
    )
    parser.add_argument("--turns", type=int, default=5, help="how often to measure each, in a process of its own")
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        print(json.dumps(work(options.public)))
        return
    now, before = [], []
    with checked_out(options.before) if options.before else nullcontext() as tree:
        for _ in range(options.turns):
            if tree:
                before.append(measured(tree, public=True))
            now.append(measured(ROOT, options.public))
    results = []
    for name in now[0]:
        result: dict[str, Any] = {"operation": name, "us": round(statistics.median(turn[name] for turn in now), 2)}
        if before:
            result["before_us"] = round(statistics.median(turn[name] for turn in before), 2)
            result["ratio"] = round(result["us"] / result["before_us"], 4)
        results.append(result)
    if options.json:
        print(json.dumps(results, indent=1))
        return
    for result in results:
        print(f"{result['operation']:26}", *(f"{value:9}" for value in list(result.values())[1:]))
    if before:
        single = [r for r in results if r["operation"] != "block"]
        costliest = [max(r[key] for r in single) for key in ("us", "before_us")]
        print(f"{'costliest single launch':26} {costliest[0]:9} {costliest[1]:9} {costliest[0] / costliest[1]:9.4f}")


if __name__ == "__main__":
    main()
