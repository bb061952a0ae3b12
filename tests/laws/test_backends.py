"""A model gives the same on both backends: plain torch, and kernels (on a CPU in triton's interpreter)."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from loras import make_lora
from torch.utils._python_dispatch import TorchDispatchMode

import ppcl_kernels as kernels
import ppcl_rt
from ppcl_rt import ops
from ppcl_rt.pipelines.task import task_of

# The interpreter computes the sigmoid of GELU with numpy, which warns where exp(large) is infinite, as it should be.
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SCENES = Path(__file__).parents[2] / "examples" / "scenes"


def more(*values):
    """Cases for `make full`, where each takes seconds in triton's interpreter; on a GPU all are quick."""
    return [pytest.param(value, marks=() if DEVICE == "cuda" else pytest.mark.slow) for value in values]


def kernels_of(calls):
    """Count how often each kernel runs in these block calls.

    A block runs four norms, one q/k/v projection, one attention, and three launches of linear layers: attention output,
    MLP up, MLP down. A linear map in place of an MLP has a launch of its own and no norm; if both MLPs are linear maps,
    the up and down launches are gone. A text stream that is not updated has no norm and no MLP. The block that begins a
    text run normalises the text once more.
    """
    counts = Counter()
    for call in calls:
        begins_run = call.text_run is not None and call.text_run.is_first
        not_updated = call.text_run is not None and not call.text_run.is_first
        mlps = [call.width["image"]] + ([] if not_updated else [call.width["text"]])
        maps, norms = mlps.count(ppcl_rt.LINEAR_MAP), 1 + (not not_updated) + begins_run
        counts["ppcl::ada_layer_norm"] += norms + len(mlps) - maps
        counts["ppcl::linear"] += 1 + maps + (2 if maps < len(mlps) else 0)
        counts["ppcl::qkv_projection"] += 1
        counts["ppcl::joint_attention"] += 1
    return counts


def two_blocks(catalog):
    """A plan of two blocks at full width, for what more blocks would only repeat."""
    return catalog.compose([(n, catalog.spec(n).full) for n in (0, 3)])


def load(*arguments, **options):
    """Load a model to where kernels run: a GPU, or a CPU with the interpreter."""
    return ppcl_rt.load(*arguments, device=DEVICE, **options)


@pytest.fixture
def build_inputs(build_inputs):
    """Make inputs on the device of the model."""
    return lambda **options: on_device(build_inputs(**options))


def on_device(inputs):
    return {name: value.to(DEVICE) if torch.is_tensor(value) else value for name, value in inputs.items()}


class Kernels(TorchDispatchMode):
    """Counts the ops of kernels that run inside it."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "ppcl":
            self.counts[function.name()] += 1
        return function(*args, **(kwargs or {}))


@pytest.fixture
def both(monkeypatch, run):
    """Run a model on both backends; check that the second ran on kernels, in all blocks or in the first ``blocks``."""

    def _both(model, inputs, blocks=None):
        monkeypatch.setenv("PPCL_BACKEND", "torch")
        with Kernels() as plain:
            wanted = run(model, inputs)
        monkeypatch.setenv("PPCL_BACKEND", "triton")
        with Kernels() as fused:
            got = run(model, inputs)
        calls = model._program().calls
        assert not plain.counts
        assert fused.counts == kernels_of(calls if blocks is None else calls[:blocks])
        return got, wanted

    return _both


@pytest.mark.parametrize("ratio", [*more(1.0, 0.7, 0.35), 0.16])
def test_scenes(both, same, ratio):
    model = load(SCENES, ratio, dtype=torch.float32)
    call = task_of(model.catalog).example(model, 1)
    got, wanted = both(model, on_device({name: value for name, value in call.items() if name != "return_dict"}))
    # float32 sums in another order over 12 blocks: 5e-6 seen.
    same(got, wanted, 2e-5)


@pytest.mark.parametrize("mask", [*more("none"), "random", *more("rows", "prefix")])
def test_random_plans(made, build_inputs, both, same, mask):
    """LegalWidths that no tile divides, students, compensated layers, any mask of the text."""
    model = load(made.folder)
    model.set_plan(made.random_plan(np.random.default_rng(len(mask))))
    same(*both(model, build_inputs(mask=mask)), 2e-5)


@pytest.mark.parametrize("seed", [0, *more(1, 2)])
def test_random_plans_with_maps_and_text_runs(mapped, build_inputs, both, same, seed):
    """Linear maps, modulations of low rank, text that is not updated."""
    model = load(mapped.folder)
    model.set_plan(mapped.random_plan(np.random.default_rng(seed), legal=True))
    same(*both(model, build_inputs()), 2e-5)


def test_edit_model(tmp_path, make_checkpoint, build_inputs, both, same):
    """Two modulations for each sample, chosen by token (``zero_cond_t``)."""
    made = make_checkpoint(tmp_path / "checkpoint", zero_cond_t=True)
    model = load(made.folder)
    model.set_plan(two_blocks(made.catalog))
    same(*both(model, build_inputs(batch=2, images=((1, 3, 5), (1, 2, 3)))), 2e-5)


def test_half_precision(made, build_inputs, both):
    """float16 on both backends: each rounds a few times in a block, the kernels less often."""
    model = load(made.folder, dtype=torch.float16)
    plan = two_blocks(made.catalog)
    model.set_plan(plan)
    inputs = {k: v.half() if torch.is_tensor(v) and v.is_floating_point() else v for k, v in build_inputs().items()}
    got, wanted = both(model, inputs)
    exact = load(made.folder, plan=plan, dtype=torch.float32)
    with torch.no_grad():
        exact = exact(
            **{k: v.float() if torch.is_tensor(v) and v.is_floating_point() else v for k, v in inputs.items()}
        )
    error, plain_error = ((x.float() - exact[0]).square().mean().sqrt() for x in (got, wanted))
    # Both errors contain that of the rounded weights. A tenth more is noise.
    assert error <= 1.1 * plain_error


@pytest.mark.parametrize("fixture", ["compensated", *more("made", "mapped")])
def test_adapters(fixture, request, build_inputs, both, run, same):
    """Two adapters at scales of their own, at ratio 1 and narrow, take no launch more than none."""
    pytest.importorskip("peft")
    made = request.getfixturevalue(fixture)
    model, inputs = load(made.folder, plan=two_blocks(made.catalog)), build_inputs()
    without = run(model, inputs)
    for name, seed, rank in (("one", 0, 3), ("two", 1, 17)):
        model.load_lora_adapter(make_lora(made.stock, seed=seed, rank=rank, size=0.1), adapter_name=name)
    model.set_adapters(["one", "two"], [0.7, -0.4])
    got, wanted = both(model, inputs)
    assert (wanted - without).abs().max() > 1e-2
    same(got, wanted, 2e-5)
    model.set_plan(made.random_plan(np.random.default_rng(1), legal=True))
    same(*both(model, inputs), 2e-5)


def test_hooked_layers_are_called(made, build_inputs, both, run, monkeypatch):
    """A layer with a hook is called as a module, and the rest of the block runs on kernels."""
    model = load(made.folder, plan=two_blocks(made.catalog))
    called = []
    handle = model.transformer_blocks[0].attn.to_k.register_forward_hook(lambda *_: called.append(1))
    monkeypatch.setenv("PPCL_BACKEND", "triton")
    with Kernels() as ran:
        run(model, build_inputs())
    calls = len(model._program().calls)
    assert called
    assert ran.counts["ppcl::qkv_projection"] == calls - 1
    assert ran.counts["ppcl::linear"] == 3 * calls
    handle.remove()


def test_gradients(made, build_inputs, monkeypatch):
    """Training with the backend ``triton`` gives the gradients of plain torch, never zeros in silence."""
    model, inputs, gradients = load(made.folder), build_inputs(), []
    for backend in ("torch", "triton"):
        monkeypatch.setenv("PPCL_BACKEND", backend)
        model.zero_grad()
        model.requires_grad_(True)
        model(**inputs)[0].square().sum().backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys() and len(gradients[0]) > 50
    for name, gradient in gradients[0].items():
        # The same operations; on a GPU sums may be taken in another order.
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-4, atol=1e-5 * gradient.abs().max().item())


def test_gradient_of_the_input_alone(made, build_inputs, same, monkeypatch):
    """Weights are frozen, as in guidance by a gradient; what needs no gradient (the text at first) runs on kernels."""
    model, inputs = load(made.folder).requires_grad_(False), build_inputs()
    gradients = []
    for backend in ("torch", "triton"):
        monkeypatch.setenv("PPCL_BACKEND", backend)
        latents = inputs["hidden_states"].clone().requires_grad_()
        model(**{**inputs, "hidden_states": latents})[0].square().sum().backward()
        gradients.append(latents.grad)
    assert gradients[0].abs().max() > 0
    same(*gradients, 1e-5 * gradients[0].abs().max().item())


def test_autocast_is_left_to_torch(made, build_inputs, run, monkeypatch):
    model = load(made.folder)
    monkeypatch.setenv("PPCL_BACKEND", "triton")
    with Kernels() as ran, torch.autocast(DEVICE, torch.bfloat16):
        run(model, build_inputs())
    assert not ran.counts


@pytest.mark.parametrize("in_float32", ["modulation", "residual"])
def test_other_dtypes_are_left_to_torch(monkeypatch, same, in_float32):
    """A modulation or a residual in float32 with a model in float16: torch promotes, a kernel would refuse."""
    torch.manual_seed(0)
    x, vector = torch.randn(2, 5, 8, device=DEVICE).half(), torch.randn(2, 8, device=DEVICE)
    norm, layer = torch.nn.LayerNorm(8, elementwise_affine=False), torch.nn.Linear(8, 8, device=DEVICE).half()
    results = []
    for backend in ("torch", "triton"):
        monkeypatch.setenv("PPCL_BACKEND", backend)
        with torch.no_grad():
            if in_float32 == "modulation":
                results.append(ops.ada_layer_norm(x, norm, vector, vector))
            else:
                results += ops.linears([ops.Layer(layer, x, None, vector.half(), None, x.float())])
    assert results[0].dtype == torch.float32
    same(*results, 0.0)


def test_compiles_without_a_break(made, build_inputs, run, same, monkeypatch):
    """`torch.compile` records operations as ops; the implementation is chosen inside the op."""
    model, inputs = load(made.folder, plan=two_blocks(made.catalog)), build_inputs(batch=2)
    monkeypatch.setenv("PPCL_BACKEND", "triton")
    wanted = run(model, inputs)
    taken = Counter()

    def backend(graph, _):
        taken.update(str(node.target) for node in graph.graph.nodes if str(node.target).startswith("ppcl_rt."))
        return graph

    torch._dynamo.reset()
    for call in model._program().calls:
        call.block.compile(backend=backend, fullgraph=True)
    same(run(model, inputs), wanted, 1e-6)
    torch._dynamo.reset()
    # Blocks of one shape share a compiled graph.
    assert taken["ppcl_rt.linear.default"] >= 3 and taken["ppcl_rt.joint_attention.default"] >= 1


@pytest.mark.parametrize("form", ["qwen", "flux"])
def test_rotations_are_those_of_diffusers(same, form):
    """Both forms of RoPE tables, as the pipelines of the two families give them, rotate q and k as diffusers does."""
    from diffusers.models.embeddings import apply_rotary_emb
    from diffusers.models.transformers.transformer_flux import FluxPosEmbed
    from diffusers.models.transformers.transformer_qwenimage import QwenEmbedRope, apply_rotary_emb_qwen

    torch.manual_seed(0)
    x, weight, tokens, head_dim = torch.randn(2, 15, 32, device=DEVICE), torch.randn(32, 32, device=DEVICE), 15, 16
    raw = (x @ weight.T).unflatten(-1, (2, head_dim))
    if form == "qwen":
        table = QwenEmbedRope(10_000, [4, 4, 8])([(1, 3, 5)], device=DEVICE, max_txt_seq_len=1)[0]
        rope, wanted = torch.view_as_real(table), apply_rotary_emb_qwen(raw, table, use_real=False)
    else:
        positions = torch.stack(torch.meshgrid(torch.arange(1), torch.arange(3), torch.arange(5), indexing="ij"), -1)
        rope = FluxPosEmbed(10_000, [4, 4, 8])(positions.flatten(0, 2).to(DEVICE))
        rope = tuple(table.float() for table in rope)
        wanted = apply_rotary_emb(raw, rope, sequence_dim=1)
    assert wanted.shape[1] == tokens
    q, k, v = kernels.qkv_projection([kernels.Stream(x, (weight,) * 3, rope=rope)], 2, head_dim)
    # Sums of 32 products of size 1.
    same(q, wanted, 1e-4)
    same(k, wanted, 1e-4)
    same(v, raw, 1e-4)
    same(kernels.apply_rope_reference(raw, rope), wanted)
