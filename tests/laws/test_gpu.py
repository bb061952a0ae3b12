"""What only a GPU can show: no plan compiles anything anew, graphs capture, implementations are measured for real."""

import copy
import json

import pytest
import torch

import ppcl_kernels as kernels
import ppcl_rt
from ppcl_kernels.joint_attention import Tile as AttentionTile
from ppcl_kernels.matmul import Tile
from ppcl_rt import ops
from ppcl_rt.families.qwen_image import PPCLQwenImageTransformerBlock
from ppcl_rt.model.graphs import Graphs
from ppcl_rt.ops import table as tables
from ppcl_rt.ops.agreement import agree
from ppcl_rt.ops.implementation import TORCH
from ppcl_rt.ops.joint_attention import Attention
from ppcl_rt.ops.linear import Linears
from ppcl_rt.ops.qkv_projection import QKV
from ppcl_rt.planning.plan import Width

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
HEADS, HEAD_DIM, TEXT, IMAGE, BATCH = 8, 64, 33, 257, 2
DIM, CHANNELS = HEADS * HEAD_DIM, 4 * HEADS * HEAD_DIM
# Beside plain torch and our kernels.
MORE = {
    "ada_layer_norm": set(),
    "qkv_projection": {"cublas"},
    # A mask leaves FlashAttention out.
    "joint_attention": {"cudnn"},
    "linear": set(),
}
NARROW = Width(heads=5, image=CHANNELS // 2, text=CHANNELS // 4, modulation=DIM)


@pytest.fixture
def block():
    torch.manual_seed(0)
    return PPCLQwenImageTransformerBlock(DIM, HEADS, HEAD_DIM).to("cuda", torch.bfloat16).requires_grad_(False)


@pytest.fixture
def call():
    torch.manual_seed(1)
    text, image, temb = (
        torch.randn(BATCH, *shape, device="cuda", dtype=torch.bfloat16) for shape in ((TEXT, DIM), (IMAGE, DIM), (DIM,))
    )
    angles = [torch.rand(tokens, HEAD_DIM // 2, device="cuda") * 6.28 for tokens in (IMAGE, TEXT)]
    return {
        "hidden_states": image,
        "encoder_hidden_states": text,
        "encoder_hidden_states_mask": torch.rand(BATCH, TEXT, device="cuda") < 0.7,
        "temb": temb,
        "image_rotary_emb": tuple(torch.stack((a.cos(), a.sin()), dim=-1) for a in angles),
    }


def close(got, wanted):
    """bf16 rounds to 2^-9 relative, some ten times on the way through a block, either way."""
    for a, b in zip(got, wanted, strict=True):
        error = (a.float() - b.float()).square().mean().sqrt() / b.float().square().mean().sqrt()
        assert error < 10 * 2**-9, error


def test_no_width_compiles_anew(monkeypatch):
    """Heads, channels and tokens are run-time arguments: after the first width nothing is compiled."""
    import triton

    compiled = []
    monkeypatch.setattr(triton.knobs.runtime, "jit_post_compile_hook", lambda **about: compiled.append(about))
    bf16 = {"device": "cuda", "dtype": torch.bfloat16}
    weight, up, down = (
        torch.randn(DIM, DIM, **bf16),
        torch.randn(CHANNELS, DIM, **bf16),
        torch.randn(DIM, CHANNELS, **bf16),
    )
    tile = Tile(64, 64, 64, 4, 3)
    seen = []
    for heads, channels, tokens in ((8, 2048, 256), (5, 1024, 257), (3, 512, 1), (1, 128, 1000)):
        x = torch.randn(1, tokens, DIM, **bf16)
        q, k, v = kernels.qkv_projection([kernels.Stream(x, (weight,) * 3)], heads, HEAD_DIM, tile=tile)
        kernels.joint_attention(q, k, v, tile=AttentionTile(64, 64, 4, 2))
        hidden = kernels.linear(x, up, None, channels, activation="gelu", tile=tile)
        kernels.linear(hidden, down, tile=tile)
        seen.append(len(compiled))
    assert seen[0] > 0 and seen[-1] == seen[0], seen


def test_graph_captures_a_block(monkeypatch, block, call):
    monkeypatch.setenv("PPCL_BACKEND", "triton")
    with torch.no_grad():
        for _ in range(3):
            wanted = block(**call, width=NARROW)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            got = block(**call, width=NARROW)
        for part in got:
            part.fill_(float("nan"))
        graph.replay()
        torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))


@pytest.mark.parametrize("width", [None, NARROW])
def test_implementations_are_measured_once(monkeypatch, tmp_path, block, call, width):
    monkeypatch.setenv("PPCL_CACHE", str(tmp_path))
    tables.table_of.cache_clear()
    ops.drop_prepared_calls()
    results = {}
    with torch.no_grad():
        for backend in ("torch", "triton", "auto"):
            monkeypatch.setenv("PPCL_BACKEND", backend)
            results[backend] = block(**call, width=width)
        (path,) = tmp_path.glob("implementations-*.json")
        written = path.read_text()
        monkeypatch.setattr(tables, "cuda_milliseconds", lambda call, device: pytest.fail("measured again"))
        tables.table_of.cache_clear()
        ops.drop_prepared_calls()
        close(block(**call, width=width), results["auto"])
    assert path.read_text() == written
    table = json.loads(written)
    assert table["about"]["device"] == torch.cuda.get_device_name()
    assert {key.split()[0] for key in table["implementations"]} == set(MORE)
    for key, entry in table["implementations"].items():
        # Every implementation works here, and was timed.
        assert {name.split()[0] for name in entry["milliseconds"]} >= {"torch", "triton"} | MORE[key.split()[0]], key
    close(results["triton"], results["torch"])
    close(results["auto"], results["torch"])
    tables.table_of.cache_clear()
    ops.drop_prepared_calls()


@pytest.mark.parametrize("masked", [False, True])
def test_implementations_agree_in_bfloat16(masked):
    """Those that only a GPU has: cuBLASLt's GELU, cuDNN and FlashAttention, one product for q, k and v."""
    torch.manual_seed(0)
    bf16 = {"device": "cuda", "dtype": torch.bfloat16}
    q, k, v = (torch.randn(BATCH, 300, HEADS, HEAD_DIM, **bf16) for _ in range(3))
    mask = torch.rand(BATCH, 300, device="cuda") < 0.7 if masked else None
    x, bias = torch.randn(BATCH, 300, DIM, **bf16), torch.randn(CHANNELS, **bf16)
    up = torch.randn(CHANNELS, DIM, **bf16) / DIM**0.5
    weights = (torch.randn(3, DIM, DIM, **bf16) / DIM**0.5).unbind()
    biases = torch.randn(3, DIM, **bf16).unbind()
    stream = kernels.Stream(x, tuple(weights), tuple(biases), (torch.ones(HEAD_DIM, **bf16),) * 2)
    seen = set()
    for call in (
        Attention(q, k, v, mask),
        Linears((kernels.Linear(x, up, bias, CHANNELS // 2),), activation="gelu"),
        QKV((stream,), HEADS - 1, HEAD_DIM),
    ):
        operation = ops.OPERATIONS[{Attention: "joint_attention", Linears: "linear", QKV: "qkv_projection"}[type(call)]]
        wanted = operation.run(call, TORCH)
        for implementation in operation.implementations(call):
            seen.add(implementation.kind)
            assert agree(operation.run(call, implementation), wanted), implementation
    assert seen >= {"torch", "triton", "cudnn", "cublaslt", "packed", "cublas"} | (set() if masked else {"flash"})


def test_no_more_error_than_torch(monkeypatch, block, call):
    """bf16 against float64: a fused block rounds less often than one of separate operations."""
    exact = {n: v.double() if torch.is_tensor(v) and v.is_floating_point() else v for n, v in call.items()}
    results = {}
    with torch.no_grad():
        for backend in ("torch", "triton"):
            monkeypatch.setenv("PPCL_BACKEND", backend)
            results[backend] = block(**call)
        monkeypatch.setenv("PPCL_BACKEND", "torch")
        wanted = block.double()(**exact)
    for number in range(2):
        error, plain = (
            (results[b][number].double() - wanted[number]).square().mean().sqrt() for b in ("triton", "torch")
        )
        # Two draws of the same roundings differ by a few per cent.
        assert error <= 1.05 * plain


def test_compiled_block(monkeypatch, block, call):
    """Inductor takes the kernels as they are, without a graph break."""
    monkeypatch.setenv("PPCL_BACKEND", "triton")
    with torch.no_grad():
        wanted = block(**call, width=NARROW)
        torch.compiler.reset()
        block.compile(fullgraph=True)
        close(block(**call, width=NARROW), wanted)
    torch.compiler.reset()


def test_second_device():
    """Tensors need not be on the current device."""
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    x, weight = torch.randn(1, 70, 64, device="cuda:1"), torch.randn(48, 64, device="cuda:1")
    close([kernels.linear(x, weight)], [kernels.linear_reference(x, weight)])


def test_graphs_of_a_model(made, build_inputs):
    """Replays of a whole forward are what eager forwards are: at two ratios, and after weights went and came back."""
    model = ppcl_rt.load(made.folder, 1.0, device="cuda", graphs=False).requires_grad_(False)

    def on_gpu(seed):
        return {n: v.cuda() if torch.is_tensor(v) else v for n, v in build_inputs(seed=seed).items()}

    def check():
        """Two forwards that settle and capture, three that are replayed, each against an eager one."""
        for seed in range(5):
            inputs, replays = on_gpu(seed), model.graphs.replays
            kept, model._graphs = model._graphs, Graphs(False)
            wanted = model(**inputs).sample
            model._graphs = kept
            got = model(**inputs).sample
            torch.cuda.synchronize()
            # The same kernels on the same numbers; only the addresses differ.
            assert torch.equal(got, wanted), (got - wanted).abs().max()
        assert model.graphs.replays > replays, model.graphs
        assert not model.graphs.eager_reason.startswith("capturing failed"), model.graphs

    with torch.no_grad():
        for ratio in (1.0, 0.6):
            model.set_ratio(ratio)
            model(**on_gpu(0))
        model.set_graphs(True)
        for ratio in (1.0, 0.6, 1.0):
            model.set_ratio(ratio)
            check()
        assert model.graphs.captures == 2
        model.set_ratio(0.6)
        model.trim()
        assert not model.graphs.captured
        check()
        model.set_ratio(1.0)
        check()
        # A capture that fails leaves the device as it was.
        walk = type(model)._walk
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(type(model), "_walk", lambda *a, **k: walk(*a, **k) * float(k["timestep"].sum().item() > -1))
            model.set_graphs(True)
            for _ in range(3):
                model(**on_gpu(0))
            assert model.graphs.eager_reason.startswith("capturing failed") and not model.graphs.captures
        model.set_graphs(True)
        check()
        # Another stream waits for the last replay, and a copy of the model has graphs of its own.
        with torch.cuda.stream(torch.cuda.Stream()):
            check()
        other = copy.deepcopy(model)
        assert not other.graphs.captured
