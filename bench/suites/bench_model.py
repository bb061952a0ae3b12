"""Times of the shipped checkpoint at several ratios, of one block of Qwen-Image's size, and of switching ratios.

    python -m pytest bench/suites/bench_model.py --benchmark-only          (or: make bench)

The baselines are the stock diffusers classes. Every ratio is timed in turn with the dense model, so a machine that
slows down slows both. ``extra_info`` holds parameters, FLOPs, bytes in memory, and the time relative to the dense
forwards of the same run.
"""

import dataclasses
import functools
import statistics
import sys
import time
from pathlib import Path

import pytest
import torch
from diffusers import QwenImageTransformer2DModel
from diffusers.models.transformers.transformer_qwenimage import QwenImageTransformerBlock
from diffusers.utils import logging as diffusers_logging

import ppcl_rt
from ppcl_rt.families.qwen_image import PPCLQwenImageTransformerBlock
from ppcl_rt.pipelines.task import task_of
from ppcl_rt.planning.width import Width

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CHECKPOINT = Path(__file__).parents[2] / "examples" / "scenes"
RATIOS = (1.0, 0.7, 0.5, 0.35)
BATCH = 64
PAIRS = 15


@pytest.fixture(scope="module")
def dense():
    return ppcl_rt.load(CHECKPOINT, 1.0, dtype=torch.float32, device=DEVICE)


def on_device(call) -> dict:
    return {name: value.to(DEVICE) if torch.is_tensor(value) else value for name, value in call.items()}


def device_name() -> str:
    return f"CPU, {torch.get_num_threads()} threads" if DEVICE == "cpu" else torch.cuda.get_device_name()


def about(model, task) -> dict:
    catalog, architecture = model.catalog, model.catalog.architecture
    return {
        "command": " ".join(["python -m pytest", *sys.argv[1:]]),
        "device": device_name(),
        "dtype": str(model.dtype),
        "shape": f"batch {BATCH}, {catalog.reference.image} image and {catalog.reference.text} text tokens, "
        f"width {architecture.dim}",
        "torch": torch.__version__,
        "params": architecture.params(model.plan),
        "params_ratio": round(model.catalog.ratio(model.plan), 4),
        "flops": architecture.flops(model.plan, *catalog.reference[:2], BATCH),
        "bytes": model.resident_bytes,
    }


def synchronize() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def seconds(model, call) -> float:
    synchronize()
    start = time.perf_counter()
    model(**call)
    synchronize()
    return time.perf_counter() - start


def paired(model, other, call) -> float:
    """Return the median of a forward's time over the time of another model's forward right after it."""
    return statistics.median(seconds(model, call) / seconds(other, call) for _ in range(PAIRS))


@pytest.mark.parametrize("ratio", RATIOS)
def test_forward(benchmark, dense, ratio):
    """One forward at a ratio, with only the weights of that plan resident."""
    model = ppcl_rt.load(CHECKPOINT, ratio, dtype=torch.float32, device=DEVICE)
    task = task_of(model.catalog)
    call = on_device(task.example(model, BATCH))
    with torch.no_grad():
        # Check, then time: a model that holds everything gives the same output at this plan.
        with dense.at(ratio=ratio):
            # The two models may run different kernels, which sum float32 in another order.
            assert torch.allclose(dense(**call)[0], model(**call)[0], atol=5e-5)
        benchmark.pedantic(lambda: seconds(model, call), rounds=PAIRS, warmup_rounds=2)
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
    """The baseline: diffusers' own class with the same weights."""
    # Else it warns of a thousand tensors that it does not know.
    diffusers_logging.set_verbosity_error()
    stock = QwenImageTransformer2DModel.from_pretrained(CHECKPOINT, torch_dtype=torch.float32).eval().to(DEVICE)
    task = task_of(dense.catalog)
    call = on_device(task.example(dense, BATCH))
    with torch.no_grad():
        assert torch.allclose(stock(**call)[0], dense(**call)[0], atol=5e-5)
        benchmark.pedantic(lambda: seconds(stock, call), rounds=PAIRS, warmup_rounds=2)
        benchmark.extra_info.update(about(dense, task))
        benchmark.extra_info["time_to_dense"] = round(paired(stock, dense, call), 3)
    print(f"\nstock diffusers: {benchmark.extra_info['time_to_dense']:.3f} of the time of ours at ratio 1")


@dataclasses.dataclass(frozen=True)
class Size:
    """Size of a block, and counts of its tokens."""

    heads: int
    head_dim: int
    image: int
    text: int
    dtype: torch.dtype


SIZE = Size(24, 128, 4096, 512, torch.bfloat16) if DEVICE == "cuda" else Size(4, 16, 64, 16, torch.float32)


@pytest.fixture(scope="module")
def blocks():
    """The stock block, our block with the same weights, and the arguments of both."""
    torch.manual_seed(0)
    dim = SIZE.heads * SIZE.head_dim
    stock = QwenImageTransformerBlock(dim, SIZE.heads, SIZE.head_dim).to(DEVICE, SIZE.dtype).eval()
    ours = PPCLQwenImageTransformerBlock(dim, SIZE.heads, SIZE.head_dim).to(DEVICE, SIZE.dtype).eval()
    ours.load_state_dict(stock.state_dict())
    angles = [torch.rand(tokens, SIZE.head_dim // 2, device=DEVICE) * 6.28 for tokens in (SIZE.image, SIZE.text)]
    image, text, temb = (
        torch.randn(1, *shape, device=DEVICE, dtype=SIZE.dtype)
        for shape in ((SIZE.image, dim), (SIZE.text, dim), (dim,))
    )
    call = {
        "hidden_states": image,
        "encoder_hidden_states": text,
        "encoder_hidden_states_mask": None,
        "temb": temb,
        "image_rotary_emb": tuple(torch.polar(torch.ones_like(a), a) for a in angles),
    }
    return stock, ours, call


def captured(call):
    """Capture a call as a CUDA graph; returns its replay, which ignores arguments."""
    for _ in range(3):
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return lambda **_: graph.replay()


@pytest.mark.parametrize("width", [100, 50])
@pytest.mark.parametrize(
    "contestant", ["ours auto", "ours auto graph", "ours triton", "ours torch", "stock graph", "stock compiled"]
)
def test_block(benchmark, blocks, monkeypatch, contestant, width):
    """One block, relative to the eager stock block of the same run; ``width`` is per cent of heads and channels.

    A short eager block may be limited by python; a CUDA graph is not.
    """
    stock, ours, call = blocks
    whose, how, *graph = contestant.split()
    if DEVICE == "cpu" and (graph or how not in ("auto", "torch")):
        pytest.skip("needs a GPU")
    # Modulations stay whole: a block made by hand has no factors of a lower rank.
    narrow = {group: ours.width[group] * width // 100 for group in ours.spec.unit_groups}
    model, options = ours, {"width": Width({**ours.width, **narrow})}
    if whose == "stock":
        if width != 100:
            pytest.skip("the stock block has one width")
        model, options, graph = stock, {}, how == "graph"
        if how == "compiled":
            torch.compiler.reset()
            model = torch.compile(stock, dynamic=False)
    else:
        monkeypatch.setenv("PPCL_BACKEND", how)
    with torch.no_grad():
        wanted, got = stock(**call), model(**call)
        for a, b in zip(got, wanted, strict=True):
            # bf16 rounds by up to 2^-9, about ten times on the way to the output of either block.
            limit = 1e-5 if SIZE.dtype == torch.float32 else 10 * 2**-9
            assert (a - b).float().square().mean().sqrt() < limit * b.float().square().mean().sqrt()
        run = functools.partial(model, **options)
        if graph:
            run = captured(functools.partial(run, **call))
        benchmark.pedantic(lambda: seconds(run, call), rounds=PAIRS, warmup_rounds=2)
        to_stock = round(paired(run, stock, call), 3)
    benchmark.extra_info.update(
        {
            "device": device_name(),
            "dtype": str(SIZE.dtype),
            "shape": str(SIZE),
            "torch": torch.__version__,
            "width": width,
            "time_to_dense": to_stock,
        }
    )
    print(f"\nblock, {contestant}, {width} % wide: {to_stock:.3f} of the stock block's time; {device_name()}, {SIZE}")


def test_switch(benchmark):
    """`set_ratio` between two ratios that were set before."""
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
    """The exact planner, at ratios that it was not asked for before."""
    ratios = iter(0.5 + n / 1e5 for n in range(1, 10_000))
    benchmark.pedantic(lambda: ppcl_rt.Planner(dense.catalog).plan(next(ratios)), rounds=5)
