"""Prepared operations return what the public functions return, and launch what triton would launch."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

import ppcl_kernels as pk
from ppcl_kernels.ada_layer_norm import prepare_ada_layer_norm
from ppcl_kernels.gated_residual import prepare_gated_residual
from ppcl_kernels.joint_attention import prepare_joint_attention
from ppcl_kernels.linear import prepare_linear
from ppcl_kernels.norm_rope import prepare_norm_rope
from ppcl_kernels.qkv_projection import prepare_qkv_projection

# What a GPU's driver would receive, checked without a GPU.
CHECKS = (
    "every_case",
    "every_operation",
    "memory",
    "alignment",
    "presence",
    "hooks",
    "fallbacks",
    "devices",
    "threads",
    "bench",
)
# In the interpreter numpy warns of overflows in a sigmoid.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


@pytest.fixture(scope="module")
def launches() -> dict[str, str]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    script = Path(__file__).with_name("launches.py")
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)["results"]


@pytest.mark.parametrize("name", CHECKS)
def test_launches(launches, name):
    """What the C launcher receives (`tests/kernels/launches.py` describes each check)."""
    assert set(launches) == set(CHECKS)
    assert not launches[name], launches[name]


@pytest.fixture(autouse=True)
def poisoned() -> Iterator[None]:
    """Fill uninitialised memory with NaN, so that elements which no kernel writes are found."""
    before = (torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory)
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(before[0])
    torch.utils.deterministic.fill_uninitialized_memory = before[1]


def make(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(100 * seed + sum(shape)))


def token_index(tokens: int, seed: int) -> torch.Tensor:
    return (torch.arange(2 * tokens).mul(7 + seed).remainder(11) < 5).long().view(2, tokens)


Arguments = tuple[Any, ...]


def linear_case(index: bool, tokens: tuple[int, ...]) -> tuple[Callable, Callable, Callable[[int], Arguments]]:
    weights = [(make(33, 17, seed=n), None if n else make(33)) for n in range(len(tokens))]

    def arguments(seed: int) -> Arguments:
        # Gates are slices of a wider tensor, as in a model.
        each = [(10 * seed + n, t) for n, t in enumerate(tokens)]
        xs = [make(2, t, 17, seed=n) for n, t in each]
        gates = [make(4 if index else 2, 40, seed=n)[:, 5:36] for n, _ in each]
        indexes = [token_index(t, n) if index else None for n, t in each]
        residuals = [make(2, t, 31, seed=n) for n, t in each]
        return (
            [
                pk.Linear(x, w, bias, 31, gate, i, residual)
                for x, (w, bias), gate, i, residual in zip(xs, weights, gates, indexes, residuals)
            ],
        )

    return (
        lambda groups: prepare_linear(groups, activation="gelu"),
        lambda groups: pk.grouped_linear(groups, activation="gelu"),
        arguments,
    )


def qkv_case(kind: str, queries: bool, chosen: bool) -> tuple[Callable, Callable, Callable[[int], Arguments]]:
    weights = [tuple(make(24, 21, seed=3 * s + n) for n in range(3)) for s in range(2)]
    biases, norms = (make(24), None, make(24, seed=1)), (make(6), make(6, seed=1))

    def rope(tokens: int, seed: int) -> Any:
        return {
            "complex": lambda: make(tokens, 3, 2, seed=seed),
            "pairs": lambda: (make(tokens, 3, seed=seed), make(tokens, 3, seed=seed + 1)),
            "twice": lambda: (make(tokens, 6, seed=seed), make(tokens, 6, seed=seed + 1)),
            "none": lambda: None,
        }[kind]()

    def arguments(seed: int) -> Arguments:
        xs, ropes = [make(2, t, 21, seed=seed) for t in (3, 17)], [rope(t, seed) for t in (3, 17)]
        streams = [pk.Stream(x, w, biases, norms, r, q) for x, w, r, q in zip(xs, weights, ropes, (queries, True))]
        # The choice of heads may change between calls, their number may not.
        return streams, torch.tensor([3, seed % 3], dtype=torch.int32) if chosen else 2

    return (
        lambda streams, heads: prepare_qkv_projection(streams, heads, 6, 1e-5),
        lambda streams, heads: pk.qkv_projection(streams, heads, 6, 1e-5),
        arguments,
    )


def norm_rope_case(kind: str, queries: bool) -> tuple[Callable, Callable, Callable[[int], Arguments]]:
    norms = [(make(6), make(6, seed=1)), (None, None)]
    biases = [(make(15), None, make(12, seed=1)), (None,) * 3] if queries else None
    streams = qkv_case(kind, True, False)[2]

    def arguments(seed: int) -> Arguments:
        raw = [tuple(make(2, t, 2, 6, seed=10 * seed + n) for n in range(3)) for t in (3, 17)]
        ropes = [stream.rope for stream in streams(seed)[0]]
        return [raw[0] if queries else (None, *raw[0][1:]), raw[1]], norms, ropes, biases

    return (
        lambda raw, norms, ropes, biases: prepare_norm_rope(raw, norms, ropes, 1e-5, biases),
        lambda raw, norms, ropes, biases: pk.norm_rope(raw, norms, ropes, 1e-5, biases),
        arguments,
    )


def attention_case(masked: bool) -> tuple[Callable, Callable, Callable[[int], Arguments]]:
    def arguments(seed: int) -> Arguments:
        q, k, v = make(2, 9, 2, 10, seed=seed), make(2, 35, 2, 10, seed=seed), make(2, 35, 2, 10, seed=seed + 1)
        mask = torch.arange(70).mul(4 + seed).remainder(7).gt(2).view(35, 2).t()
        # The mask is not contiguous, so each call copies it.
        return q, k, v, mask if masked else None

    return prepare_joint_attention, pk.joint_attention, arguments


def norm_case(index: bool, gated: bool) -> tuple[Callable, Callable, Callable[[int], Arguments]]:
    def arguments(seed: int) -> Arguments:
        x, h = make(2, 33, 50, seed=seed)[..., :45], make(2, 33, 45, seed=seed + 1)
        first, second = make(4 if index else 2, 90, seed=seed).chunk(2, 1)
        token = token_index(33, seed) if index else None
        return (x, first, h, token) if gated else (x, first, second, token)

    pair = (prepare_gated_residual, pk.gated_residual) if gated else (prepare_ada_layer_norm, pk.ada_layer_norm)
    return *pair, arguments


CASES = {
    "linear": linear_case(False, (17, 7)),
    "linear by token": linear_case(True, (17, 7)),
    "linear without text": linear_case(False, (17, 0)),
    "linear of text alone": linear_case(False, (0, 7)),
    "linear of nothing": linear_case(False, (0,)),
    "qkv_projection": qkv_case("complex", True, False),
    "qkv_projection, rope in two": qkv_case("pairs", False, True),
    "norm_rope": norm_rope_case("complex", True),
    "norm_rope, rope doubled": norm_rope_case("twice", False),
    "norm_rope without rope": norm_rope_case("none", True),
    "joint_attention": attention_case(False),
    "joint_attention with a mask": attention_case(True),
    "ada_layer_norm": norm_case(False, False),
    "ada_layer_norm by token": norm_case(True, False),
    "gated_residual": norm_case(False, True),
    "gated_residual by token": norm_case(True, True),
}


@pytest.mark.parametrize("name", CASES)
def test_equals_public(name):
    """The result is that of the public function, for other tensors than those of the preparation."""
    prepare, public, arguments = CASES[name]
    prepared, given = prepare(*arguments(1)), arguments(2)
    results, wanted = ([r] if isinstance(r, torch.Tensor) else list(r) for r in (prepared(*given), public(*given)))
    assert len(results) == len(wanted)
    for result, want in zip(results, wanted):
        assert torch.isfinite(result).all() and torch.equal(result, want)


def test_refuses_what_public_refuses():
    """Preparation refuses what the public function refuses, in the same words."""
    x, w, m = make(2, 5, 8), make(4, 8), make(2, 8)
    q = make(2, 5, 2, 8)
    both: list[tuple[Callable, Callable]] = [
        (lambda: prepare_linear([pk.Linear(x, w)] * 3), lambda: pk.grouped_linear([pk.Linear(x, w)] * 3)),
        (lambda: prepare_linear([pk.Linear(x, w, None, 5)]), lambda: pk.linear(x, w, None, 5)),
        (lambda: prepare_linear([pk.Linear(x, w.half())]), lambda: pk.linear(x, w.half())),
        (lambda: prepare_ada_layer_norm(x, m, m[:1]), lambda: pk.ada_layer_norm(x, m, m[:1])),
        (lambda: prepare_gated_residual(x, m, x[:, :3]), lambda: pk.gated_residual(x, m, x[:, :3])),
        (lambda: prepare_joint_attention(q, q, q.half()), lambda: pk.joint_attention(q, q, q.half())),
        (lambda: prepare_joint_attention(q, q, q, scale=-1.0), lambda: pk.joint_attention(q, q, q, scale=-1.0)),
        (lambda: prepare_norm_rope([(q, q, q)], [], [None]), lambda: pk.norm_rope([(q, q, q)], [], [None])),
        (
            lambda: prepare_norm_rope([(q, q, q[:, :2])], [(None, None)], [None]),
            lambda: pk.norm_rope([(q, q, q[:, :2])], [(None, None)], [None]),
        ),
        (
            lambda: prepare_qkv_projection([pk.Stream(x, (w, w, w))], 2, 4),
            lambda: pk.qkv_projection([pk.Stream(x, (w, w, w))], 2, 4),
        ),
        (lambda: prepare_qkv_projection([], 2, 4), lambda: pk.qkv_projection([], 2, 4)),
    ]
    for prepare, public in both:
        with pytest.raises(ValueError) as wanted:
            public()
        with pytest.raises(ValueError) as got:
            prepare()
        assert str(got.value) == str(wanted.value)


def test_bench_host(monkeypatch, capsys):
    """Before and after in turn, the median of each, and their ratio (`launches.bench` really measures)."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "bench" / "suites"))
    bench_host = importlib.import_module("bench_host")
    usual = [{"up": 80.0, "block": 90.0}, {"up": 10.0, "block": 11.0}]
    figures = iter([*usual, *usual, {"up": 70.0, "block": 80.0}, {"up": 7.0, "block": 8.0}])
    monkeypatch.setattr(bench_host, "checked_out", lambda revision: nullcontext(Path(revision)))
    monkeypatch.setattr(bench_host, "measured", lambda root, public: next(figures))
    monkeypatch.setattr(sys, "argv", ["bench_host", "--json", "--before", "abc", "--turns", "3"])
    bench_host.main()
    assert json.loads(capsys.readouterr().out) == [
        {"operation": "up", "us": 10.0, "before_us": 80.0, "ratio": 0.125},
        {"operation": "block", "us": 11.0, "before_us": 90.0, "ratio": 0.1222},
    ]
