"""Whole forwards of the shipped checkpoint at several ratios, against the stock diffusers class; and switching ratios.

    python -m pytest bench --benchmark-only          (or: make bench)

Figures of one table come from one run: every ratio is timed in turn with the dense model, so a machine that slows down
slows both. ``extra_info`` says parameters, FLOPs, bytes held, and the time as a ratio to the dense forward beside it.
"""

import statistics
import sys
import time
from pathlib import Path

import pytest
import torch
from diffusers import QwenImageTransformer2DModel
from diffusers.utils import logging as diffusers_logging

import ppcl_rt
from ppcl_rt.task import task_of

CHECKPOINT = Path(__file__).parents[1] / "examples" / "scenes"
RATIOS = (1.0, 0.85, 0.7, 0.5)
BATCH = 64
PAIRS = 15


@pytest.fixture(scope="module")
def dense():
    return ppcl_rt.load(CHECKPOINT, 1.0, dtype=torch.float32)


def about(model, task) -> dict:
    shape = model.catalog.shape
    return {
        "command": " ".join(["python -m pytest", *sys.argv[1:]]),
        "device": f"CPU, {torch.get_num_threads()} threads"
        if model.device.type == "cpu"
        else torch.cuda.get_device_name(),
        "dtype": str(model.dtype),
        "shape": f"batch {BATCH}, {task.image_tokens} image and {task.text_tokens} text tokens, width {shape.dim}",
        "torch": torch.__version__,
        "params": shape.params(model.plan),
        "params_ratio": round(model.catalog.ratio(model.plan), 4),
        "flops": shape.flops(model.plan, task.image_tokens, task.text_tokens, BATCH),
        "bytes": model.resident_bytes,
    }


def seconds(model, call) -> float:
    start = time.perf_counter()
    model(**call)
    return time.perf_counter() - start


def paired(model, other, call) -> float:
    """Median ratio of a forward's time to that of another model right beside it."""
    return statistics.median(seconds(model, call) / seconds(other, call) for _ in range(PAIRS))


@pytest.mark.parametrize("ratio", RATIOS)
def test_forward(benchmark, dense, ratio):
    """One forward at a ratio: plain torch operations, weights of that plan alone resident."""
    model = ppcl_rt.load(CHECKPOINT, ratio, dtype=torch.float32)
    task = task_of(model.catalog)
    call = task.example(BATCH)
    with torch.no_grad():
        # Check, then time: the same plan out of a model that holds everything gives the same.
        with dense.at(ratio=ratio):
            assert torch.allclose(dense(**call)[0], model(**call)[0], atol=1e-5)
        benchmark.pedantic(lambda: model(**call), rounds=PAIRS, warmup_rounds=2)
        benchmark.extra_info.update(about(model, task))
        benchmark.extra_info["time_to_dense"] = round(paired(model, dense, call), 3)
        fresh = ppcl_rt.load(CHECKPOINT, 1.0, dtype=torch.float32).resident_bytes
        benchmark.extra_info["bytes_to_dense"] = round(model.resident_bytes / fresh, 3)
    info = benchmark.extra_info
    print(
        f"\nratio {ratio:g}: {info['params_ratio']:.3f} of parameters, {info['time_to_dense']:.3f} of the dense time, "
        f"{info['bytes_to_dense']:.3f} of the dense bytes, {info['flops'] / 1e9:.2f} GFLOPs; {info['device']}, "
        f"{info['dtype']}, {info['shape']}"
    )


def test_stock_forward(benchmark, dense):
    """The baseline: diffusers' own class, same weights."""
    # It names a thousand tensors that it does not know.
    diffusers_logging.set_verbosity_error()
    stock = QwenImageTransformer2DModel.from_pretrained(CHECKPOINT, torch_dtype=torch.float32).eval()
    task = task_of(dense.catalog)
    call = task.example(BATCH)
    with torch.no_grad():
        assert torch.allclose(stock(**call)[0], dense(**call)[0], atol=1e-5)
        benchmark.pedantic(lambda: stock(**call), rounds=PAIRS, warmup_rounds=2)
        benchmark.extra_info.update(about(dense, task))
        benchmark.extra_info["time_to_dense"] = round(paired(stock, dense, call), 3)
    print(f"\nstock diffusers: {benchmark.extra_info['time_to_dense']:.3f} of the time of ours at ratio 1")


def test_switch(benchmark):
    """`set_ratio` between two ratios that were visited before."""
    model = ppcl_rt.load(CHECKPOINT, 1.0, resident="all")
    for ratio in (0.5, 0.7):
        model.set_ratio(ratio)

    def switch():
        model.set_ratio(0.5)
        model.set_ratio(0.7)

    benchmark(switch)
    if benchmark.stats is None:
        return
    benchmark.extra_info["microseconds_a_switch"] = round(benchmark.stats.stats.median / 2 * 1e6, 1)
    print(f"\nset_ratio, visited before: {benchmark.extra_info['microseconds_a_switch']} microseconds")


def test_plan(benchmark, dense):
    """The exact planner, at a ratio that it was not asked for before."""
    ratios = iter(0.5 + n / 1e5 for n in range(1, 10_000))
    benchmark.pedantic(lambda: ppcl_rt.Planner(dense.catalog).plan(next(ratios)), rounds=5)
