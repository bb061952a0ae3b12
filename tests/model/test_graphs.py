"""CUDA graphs, with a recorder in place of CUDA: which forwards are replayed, which are not, and the reason given."""

from __future__ import annotations

import contextlib
import copy
import gc
import importlib
import logging
import pickle
import threading
import weakref
from pathlib import Path

import pytest
import torch
from diffusers.hooks import HookRegistry, ModelHook
from diffusers.models.attention_dispatch import attention_backend
from loras import LAYERS, make_lora
from recorder import Recorder, Tape
from torch import nn
from torch.overrides import TorchFunctionMode

import ppcl_rt
from ppcl_rt import Interval, PlannedBlock, Schedule, Width
from ppcl_rt.model.graphs import CUDA, Cuda, Graphs, Meter, Weights, graphs
from ppcl_rt.ops import eager

SCENES = Path(__file__).parents[2] / "examples" / "scenes"
# The package exports functions with the names of its modules.
linear_module, qkv_module = (importlib.import_module(f"ppcl_rt.ops.{name}") for name in ("linear", "qkv_projection"))
FULL = Width(heads=4, image=128, text=128, modulation=32)


@pytest.fixture(scope="module")
def loaded(make_checkpoint, tmp_path_factory):
    """A model of two blocks, and a student of both, which is not resident."""
    folder = tmp_path_factory.mktemp("graphs") / "checkpoint"
    return ppcl_rt.load(make_checkpoint(folder, students=((0, 1),), num_layers=2).folder)


@pytest.fixture
def model(loaded):
    """A copy at the dense plan, with a recorder: the second forward is captured."""
    model = copy.deepcopy(loaded)
    model._graphs = Graphs(True, backend=Recorder())
    return model


def fewer_heads(model):
    """The dense plan with fewer heads."""
    blocks = [
        planned.model_copy(update={"width": planned.width.replace(heads=2)}) for planned in model.catalog.dense.blocks
    ]
    return model.catalog.dense.model_copy(update={"blocks": tuple(blocks)})


def student(model):
    """The plan of the student."""
    block = PlannedBlock(interval=Interval(0, 1), width=Width(heads=3, image=50, text=64, modulation=32), student=True)
    return ppcl_rt.Plan(checkpoint=model.catalog.fingerprint, depth=2, blocks=(block,))


@pytest.fixture
def check(run):
    """Run three times, compare each result with an eager forward, and return how many of the three were replayed."""

    def _check(model, inputs, **more):
        kept, before = model._graphs, model.graphs.replays
        # Not on a copy of the model: its weights may be aligned in another way, and summed in another order.
        model._graphs = Graphs(False)
        wanted = run(model, inputs, **more)
        model._graphs = kept
        for _ in range(3):
            assert torch.equal(run(model, inputs, **more), wanted)
        return model.graphs.replays - before

    return _check


def test_the_shipped_checkpoint(check):
    """Replays equal eager forwards, at two widths, for other inputs of the same shape."""
    model = ppcl_rt.load(SCENES, dtype=torch.float32)
    model._graphs = Graphs(True, backend=Recorder())
    generator = torch.Generator().manual_seed(0)
    for plan in (model.catalog.dense, fewer_heads(model)):
        model.set_plan(plan)
        for n in range(2):
            inputs = {
                "hidden_states": torch.randn(2, 16, model.config.in_channels, generator=generator),
                "encoder_hidden_states": torch.randn(2, 7, model.config.joint_attention_dim, generator=generator),
                "timestep": torch.rand(2, generator=generator),
                "img_shapes": [[(1, 4, 4)]] * 2,
            }
            assert check(model, inputs) == 2 + n
    assert model.graphs.captures == 2 and model.graphs.eager_reason == ""


@pytest.mark.parametrize("keep_weights", [True, False])
def test_precomputed_modulations_are_inputs(model, build_inputs, run, check, keep_weights):
    """One graph serves all timesteps of a table: what was looked up is no part of it."""
    timesteps = [0.9, 0.5, 0.1]
    model.precompute(timesteps, keep_weights=keep_weights)
    inputs, results = build_inputs(), []
    for n, timestep in enumerate(timesteps):
        inputs["timestep"] = torch.full_like(inputs["timestep"], timestep)
        assert check(model, inputs) == 2 + (n > 0)
        results.append(run(model, inputs))
    assert model.graphs.captures == 1 and not torch.equal(results[0], results[1])
    # Another table, another graph.
    model.precompute(timesteps[:2], keep_weights=keep_weights)
    inputs["timestep"] = torch.full_like(inputs["timestep"], 0.5)
    assert check(model, inputs) == 2


def test_results_and_inputs_are_copies(model, build_inputs, run):
    """A result outlives the next replay, and inputs may be written to or freed after the call."""
    first, second = build_inputs(seed=0), build_inputs(seed=1)
    for _ in range(2):
        run(model, first)
    a = run(model, first)
    kept = a.clone()
    for value in first.values():
        if isinstance(value, torch.Tensor):
            value.zero_()
    b = run(model, second)
    assert model.graphs.replays == 3 and torch.equal(a, kept) and not torch.equal(a, b)
    # A graph does not write to the inputs of the call that it was captured at either.
    assert not first["hidden_states"].any()
    with torch.inference_mode():
        c = model(**second, return_dict=False)[0]
    assert c.is_inference() and torch.equal(c, b) and model.graphs.replays == 4
    assert torch.equal(run(model, second), b)


def test_captured_in_inference_mode(model, build_inputs, run):
    """A graph that was captured in inference mode is replayed outside of it too."""
    with torch.inference_mode():
        for _ in range(2):
            wanted = model(**build_inputs()).sample
    assert model.graphs.captures == 1
    assert torch.equal(run(model, build_inputs()), wanted) and model.graphs.replays == 2


def test_return_value(model, build_inputs, run):
    """``return_dict`` is not part of the key."""
    inputs = build_inputs()
    for _ in range(2):
        wanted = run(model, inputs)
    with torch.no_grad():
        assert torch.equal(model(**inputs).sample, wanted)
    assert model.graphs.captures == 1 and model.graphs.replays == 2


def _strided(inputs):
    x = inputs["hidden_states"]
    return {**inputs, "hidden_states": x.transpose(0, 1).contiguous().transpose(0, 1)}


def _timestep(inputs, tensor):
    return {**inputs, "timestep": tensor}


CHANGES = {
    "mask": lambda build, x: {**x, "encoder_hidden_states_mask": None},
    "tokens of text": lambda build, x: build(text=6),
    "tokens of image": lambda build, x: build(images=((1, 3, 4),)),
    "images": lambda build, x: build(images=((1, 3, 5), (1, 2, 2))),
    "batch": lambda build, x: build(batch=2),
    "strides": lambda build, x: _strided(x),
    "expanded": lambda build, x: _timestep(x, x["timestep"][:1].expand(3)),
    "dtype": lambda build, x: _timestep(x, (x["timestep"] * 1000).long()),
    "control": lambda build, x: {**x, "controlnet_block_samples": [torch.ones(3, 15, 32)] * 2},
    "a number": lambda build, x: {**x, "attention_kwargs": {"strength": 1}},
}


@pytest.mark.parametrize("change", CHANGES)
def test_key_of_inputs(model, build_inputs, check, change):
    """Another shape, stride, dtype, tree or number makes another graph, and the first graph is kept."""
    inputs = build_inputs()
    assert check(model, inputs) == 2 and model.graphs.captures == 1
    assert check(model, CHANGES[change](build_inputs, inputs)) == 2 and model.graphs.captures == 2
    assert check(model, inputs) == 3 and model.graphs.captures == 2


def test_numbers_of_another_type_are_another_key(model, build_inputs, check):
    for n, strength in enumerate((1, 1.0, True, 2)):
        assert check(model, {**build_inputs(), "attention_kwargs": {"strength": strength}}) == 2
        assert model.graphs.captures == n + 1


def test_key_of_settings(model, build_inputs, check, monkeypatch):
    """Another attention backend, ``PPCL_BACKEND``, train mode or setting of torch makes another graph."""
    inputs, number = build_inputs(), 1
    assert check(model, inputs) == 2
    with attention_backend("_native_math"):
        assert check(model, inputs) == 2 and model.graphs.captures == (number := number + 1)
    model.set_attention_backend("native")
    assert check(model, inputs) == 2 and model.graphs.captures == (number := number + 1)
    model.reset_attention_backend()
    monkeypatch.setenv("PPCL_BACKEND", "torch")
    assert check(model, inputs) == 2 and model.graphs.captures == (number := number + 1)
    monkeypatch.delenv("PPCL_BACKEND")
    model.train()
    assert check(model, inputs) == 2 and model.graphs.captures == (number := number + 1)
    model.eval()
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        assert check(model, inputs) == 2 and model.graphs.captures == number + 1
    finally:
        torch.set_float32_matmul_precision(before)
    assert check(model, inputs) == 3


def test_one_graph_for_images_of_one_size(model, build_inputs, check):
    """Rotations are inputs: images of 3 x 5 and 5 x 3 tokens share a graph, and each gets its own rotations."""
    assert check(model, build_inputs(images=((1, 3, 5),))) == 2
    assert check(model, build_inputs(images=((1, 5, 3),))) == 3
    assert model.graphs.captures == 1


def test_edit_models(make_checkpoint, tmp_path, build_inputs, check):
    """The token index of edit models is made on the host, and is an input too."""
    made = make_checkpoint(tmp_path / "edit", zero_cond_t=True)
    model = ppcl_rt.load(made.folder)
    model._graphs = Graphs(True, backend=Recorder())
    assert check(model, build_inputs(images=((1, 3, 5), (1, 2, 2)))) == 2
    assert check(model, build_inputs(images=((1, 2, 2), (1, 3, 5)))) == 3


def test_plans_pick_their_graphs(model, build_inputs, run):
    """`set_plan`, `at` and schedules switch from one graph to another; nothing is captured twice."""
    inputs, wanted, plans = build_inputs(), {}, [model.catalog.dense, student(model), fewer_heads(model)]
    kept, model._graphs = model._graphs, Graphs(False)
    for plan in plans:
        with model.at(plan=plan):
            wanted[plan] = run(model, inputs)
    model._graphs = kept
    for _ in range(2):
        for plan in plans:
            with model.at(plan=plan):
                assert torch.equal(run(model, inputs), wanted[plan])
    assert (kept.captures, kept.replays) == (3, 3)
    assert [each.program.plan for each in kept.captured] == plans
    for plan in (plans[1], plans[0]):
        model.set_plan(plan)
        assert torch.equal(run(model, inputs), wanted[plan])
    model.set_schedule(Schedule(phases=((0, plans[0]), (2, plans[1]))))
    eager = copy.deepcopy(model)
    eager.set_graphs(False)
    for time in (0.9, 0.9, 0.7, 0.5, 0.3, 0.9):
        now = {**inputs, "timestep": torch.full((3,), time)}
        torch.testing.assert_close(run(model, now), run(eager, now), rtol=0, atol=1e-5)
    assert (kept.captures, kept.replays) == (3, 11)


class Doubled(nn.Linear):
    """Stands for an adapter that replaces a layer; its factor is a python number, which a graph would not read anew."""

    def forward(self, x):
        return 2 * super().forward(x)


def _adapt(model):
    layer = model.transformer_blocks[1].attn.to_q
    adapted = Doubled(layer.in_features, layer.out_features)
    adapted.load_state_dict(layer.state_dict())
    model.transformer_blocks[1].attn.to_q = adapted


def _read_more(model):
    before = model.plan
    model.set_plan(student(model))
    model.set_plan(before)


def _replace_parameter(model):
    layer = model.transformer_blocks[1].img_mlp.net[2]
    layer.weight = nn.Parameter(layer.weight * 1.5)


def _put_parameter(model):
    """As accelerate does, without any setter."""
    layer = model.transformer_blocks[1].img_mlp.net[2]
    layer._parameters["bias"] = nn.Parameter(layer.bias + 1)


def _replace_data(model):
    model.norm_out.linear.weight.data = model.norm_out.linear.weight * 1.5


def _replace_module(model):
    model.proj_out = nn.Linear(32, 16)


def _swap(model):
    model.load_state_dict({name: tensor * 1.1 for name, tensor in model.state_dict().items()}, assign=True)


def _add_bias(model):
    layer = nn.Linear(32, 16, bias=False)
    model.proj_out = layer
    model.proj_out.register_parameter("bias", nn.Parameter(torch.ones(16)))


def _to_double_and_back(model):
    model.to(torch.float64)
    model.to(torch.float32)


STALE = [
    _read_more, _to_double_and_back, _replace_parameter, _put_parameter, _replace_data, _replace_module, _swap,
    _add_bias,
]  # fmt: skip


@pytest.mark.parametrize("change", STALE)
def test_stale_weights_are_refused(model, build_inputs, check, change):
    """After weights were read, dropped, moved or replaced, the old graph is not replayed; a new one is captured."""
    inputs = build_inputs()
    assert check(model, inputs) == 2
    [old] = model.graphs._backend.made
    generation = model.graphs.generation
    change(model)
    assert check(model, inputs) == 2
    assert old.closed and model.graphs.generation > generation
    assert len(model.graphs.captured) == 1 and model.graphs.captures == 2


@pytest.fixture
def adapted(loaded, monkeypatch):
    """A model with an adapter on attention and MLPs, which operations read as on a GPU: as matrices, in plain torch."""
    pytest.importorskip("peft")
    for module in (linear_module, qkv_module):
        monkeypatch.setattr(module, "reads_stacks", lambda _: True)
    monkeypatch.setattr(eager, "suits", lambda _: False)
    model = copy.deepcopy(loaded)
    for name, rank in (("one", 3), ("two", 5), ("large", 20)):
        inside = [layer for layer in LAYERS if "mod" not in layer]
        model.load_lora_adapter(make_lora(model, inside, (), rank, seed=rank), adapter_name=name)
    model.set_adapters(["one"], [0.7])
    model._graphs = Graphs(True, backend=Recorder())
    return model


def test_scales_of_adapters_need_no_other_graph(adapted, build_inputs, run, check):
    """Scales, also of one call, and factors that are trained, are written to where the graph reads them."""
    inputs = build_inputs()
    first = run(adapted, inputs)
    assert check(adapted, inputs) == 3
    assert adapted.graphs.captures == 1
    for change in (
        lambda: adapted.set_adapters(["one"], [-0.3]),
        lambda: adapted.set_adapters(["two"], [0.5]),
        lambda: adapted.set_adapters(["one", "two"], [0.5, 0.7]),
        lambda: adapted.transformer_blocks[0].attn.to_q.lora_A["one"].weight.mul_(3),
    ):
        with torch.no_grad():
            change()
        assert check(adapted, inputs) == 3
        assert not torch.equal(run(adapted, inputs), first)
    assert check(adapted, inputs, attention_kwargs={"scale": 0.3}) == 3
    assert check(adapted, inputs) == 3
    assert adapted.graphs.captures == 1


def test_other_adapters_need_another_graph(adapted, build_inputs, check):
    """Adapters that are off, of a larger rank, loaded or unloaded; and scales of layers that are called."""
    inputs, captures = build_inputs(), 1
    assert check(adapted, inputs) == 2
    for change in (
        adapted.disable_lora,
        adapted.enable_lora,
        lambda: adapted.set_adapters(["large"], [0.5]),
        lambda: adapted.load_lora_adapter(make_lora(adapted, ["img_mod.1"], (), 2), adapter_name="on modulations"),
        lambda: adapted.set_adapters(["on modulations"], [0.5]),
        lambda: adapted.set_adapters(["on modulations"], [0.7]),
        adapted.fuse_lora,
        adapted.unload_lora,
    ):
        change()
        captures += 1
        assert check(adapted, inputs) >= 1
        assert adapted.graphs.captures == captures, change


def test_trim_drops_graphs(model, build_inputs, check):
    """`trim` frees the memory of graphs too, at once."""
    model.prepare(student(model))
    assert check(model, build_inputs()) == 2
    model.set_plan(student(model))
    assert check(model, build_inputs()) == 2 and len(model.graphs.captured) == 2
    dropped = weakref.ref(model.transformer_blocks[1])
    model.trim()
    gc.collect()
    assert dropped() is None and not model.graphs.captured
    assert all(recording.closed for recording in model.graphs._backend.made)


@pytest.mark.parametrize(
    "change", [lambda model: model.to(torch.float64), lambda model: model.load_state_dict(model.state_dict())]
)
def test_moving_drops_graphs(model, build_inputs, check, change):
    """At once, not at the next forward: the memory of graphs is freed before the weights take memory elsewhere."""
    assert check(model, build_inputs()) == 2
    change(model)
    assert not model.graphs.captured and all(recording.closed for recording in model.graphs._backend.made)


def test_other_plans_weights_may_go(model, build_inputs, check):
    """Weights that the program does not read may be replaced without a new capture."""
    model.prepare(student(model))
    assert check(model, build_inputs()) == 2
    layer = model.students["0-1"].attn.to_q
    layer.weight = nn.Parameter(torch.zeros_like(layer.weight))
    assert check(model, build_inputs()) == 3


def test_a_replay_of_stale_weights_would_show(model, build_inputs, run, monkeypatch):
    """The recorder does not notice new weights, as a graph does not: without the check it gives the old result."""
    inputs = build_inputs()
    for _ in range(2):
        old = run(model, inputs)
    monkeypatch.setattr(Weights, "unchanged", lambda self: True)
    _replace_parameter(model)
    assert torch.equal(run(model, inputs), old)
    monkeypatch.undo()
    assert not torch.equal(run(model, inputs), old)


def test_training_in_place_is_read(model, build_inputs, check):
    """A weight that changes in place is read anew by each replay: no new capture."""
    assert check(model, build_inputs()) == 2
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.05)
    assert check(model, build_inputs()) == 3 and model.graphs.captures == 1


def _hook(model):
    return model.transformer_blocks[1].attn.norm_q.register_forward_hook(lambda *_: None)


def _hook_before(model):
    return model.img_in.register_forward_pre_hook(lambda *_: None)


def _hook_root(model):
    return model.register_forward_hook(lambda *_: None)


def _hook_everything(model):
    return nn.modules.module.register_module_forward_hook(lambda *_: None)


class Undo:
    def __init__(self, remove):
        self.remove = remove


def _hook_of_diffusers(model):
    registry = HookRegistry.check_if_exists_or_initialize(model.transformer_blocks[0])
    registry.register_hook(ModelHook(), "mine")
    return Undo(lambda: registry.remove_hook("mine"))


def _hook_of_accelerate(model):
    from accelerate import hooks

    layer = model.transformer_blocks[0].attn.to_q
    hooks.add_hook_to_module(layer, hooks.ModelHook())
    return Undo(lambda: hooks.remove_hook_from_module(layer))


def _replaced_forward(model):
    layer = model.time_text_embed
    original = layer.forward
    layer.forward = lambda *a, **k: original(*a, **k) * 2
    return Undo(lambda: delattr(layer, "forward"))


HOOKS = {
    "forward hooks": (_hook, _hook_before, _hook_root, _hook_everything),
    "hooks of diffusers": (_hook_of_diffusers,),
    "hooks of accelerate": (_hook_of_accelerate,),
    "a replaced forward": (_replaced_forward,),
    "a Doubled of": (lambda model: _adapt(model),),
}


@pytest.mark.parametrize("why, add", [(why, add) for why, adds in HOOKS.items() for add in adds])
def test_no_graph_with_hooks(model, build_inputs, run, check, caplog, why, add):
    """Hooks and adapters run: no forward is replayed while they are there, and the log says so once."""
    inputs = build_inputs()
    assert check(model, inputs) == 2
    caplog.set_level(logging.INFO, "ppcl_rt.model.graphs")
    caplog.clear()
    undo = add(model)
    try:
        assert check(model, inputs) == 0 and why in model.graphs.eager_reason
        run(model, inputs)
        told = [record for record in caplog.records if why in record.message]
        assert len(told) == 1 and told[0].levelno == logging.WARNING
    finally:
        if undo is not None:
            undo.remove()
    if undo is not None:
        for _ in range(graphs._FORWARDS_BETWEEN_CHECKS):
            run(model, inputs)
        assert check(model, inputs) > 0


def test_a_forward_that_is_replaced_twice(model, build_inputs, check):
    """diffusers leaves a layer's own forward among its attributes; a forward that replaces it is noticed."""
    layer = model.transformer_blocks[0].attn.norm_k
    registry = HookRegistry.check_if_exists_or_initialize(layer)
    registry.register_hook(ModelHook(), "mine")
    registry.remove_hook("mine")
    assert "forward" in layer.__dict__ and check(model, build_inputs()) == 2
    original = layer.forward
    layer.forward = lambda x: original(x) * 2
    assert check(model, build_inputs()) == 0 and model.graphs.eager_reason == "a replaced forward"


def test_hooks_run_every_time(model, build_inputs, run):
    for _ in range(3):
        run(model, build_inputs())
    seen = []
    model.transformer_blocks[0].register_forward_hook(lambda *_: seen.append(1))
    for _ in range(3):
        run(model, build_inputs())
    assert len(seen) == 3


def test_compiled_layers(model, build_inputs, run):
    run(model, build_inputs())
    model.transformer_blocks[0]._compiled_call_impl = model.transformer_blocks[0]._call_impl
    run(model, build_inputs())
    assert model.graphs.eager_reason == "compiled layers" and not model.graphs.captures


class Mode(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "why, around",
    [
        ("autocast", lambda: torch.autocast("cpu", dtype=torch.bfloat16)),
        ("a dispatch mode", Tape),
        ("a function mode", Mode),
        ("gradients", torch.enable_grad),
        ("gradients", torch.autograd.forward_ad.dual_level),
    ],
)
def test_no_graph_in_modes(model, build_inputs, run, why, around):
    """Inside a mode that a replay would ignore, forwards run eagerly; after it they are replayed again."""
    inputs = build_inputs()
    for _ in range(2):
        run(model, inputs)
    with torch.no_grad(), around():
        for _ in range(2):
            model(**inputs)
    assert model.graphs.eager_reason == why and model.graphs.replays == 1
    run(model, inputs)
    assert model.graphs.replays == 2


def test_gradients_only_where_something_requires_them(model, build_inputs):
    """With gradients enabled, a model of frozen weights has graphs, unless an input or a weight requires a gradient."""
    inputs = build_inputs()
    model.requires_grad_(False)
    for _ in range(2):
        model(**inputs)
    assert model.graphs.replays == 1
    inputs["hidden_states"].requires_grad_()
    model(**inputs).sample.sum().backward()
    assert model.graphs.replays == 1 and model.graphs.eager_reason == "gradients"
    assert inputs["hidden_states"].grad is not None
    inputs["hidden_states"].requires_grad_(False)
    model.enable_gradient_checkpointing()
    model(**inputs)
    assert model.graphs.replays == 1 and model.graphs.eager_reason == "gradient checkpointing"


def test_no_graph_with_caches(model, build_inputs, run):
    """A cache that is enabled prevents graphs; the cache context that pipelines always set does not."""
    from diffusers.hooks import FirstBlockCacheConfig

    inputs = build_inputs()
    for n in range(3):
        with model.cache_context("cond"):
            run(model, inputs)
        assert model.graphs.replays == n
    model.enable_cache(FirstBlockCacheConfig(threshold=0.0))
    with model.cache_context("cond"):
        run(model, inputs)
    assert model.graphs.eager_reason == "a cache of diffusers" and model.graphs.replays == 2
    model.disable_cache()
    for _ in range(graphs._FORWARDS_BETWEEN_CHECKS + 2):
        with model.cache_context("cond"):
            run(model, inputs)
    assert model.graphs.replays > 2


def test_no_graph_elsewhere(model, build_inputs, run, monkeypatch):
    """No graph inside another capture, for inputs without a value to compare, for weights elsewhere, without a GPU."""
    inputs = build_inputs()
    model.graphs._backend.inside = True
    run(model, inputs)
    assert model.graphs.eager_reason == "inside another capture"
    model.graphs._backend.inside = False
    for _ in range(2):
        run(model, inputs, attention_kwargs={"what": object()})
    assert model.graphs.eager_reason == "an input that is a object" and not model.graphs.captures
    monkeypatch.setattr(Weights, "__init__", _elsewhere(Weights.__init__))
    for _ in range(2):
        run(model, inputs)
    assert model.graphs.eager_reason == "weights on another device than the inputs" and not model.graphs.captures
    model._graphs = Graphs(True)
    for _ in range(2):
        run(model, inputs)
    assert model.graphs.eager_reason == "not on a CUDA device"


def _elsewhere(init):
    def made(self, *args):
        init(self, *args)
        self.tensors.append(torch.empty(1, device="meta"))

    return made


def test_default_device_is_no_obstacle(model, build_inputs, check):
    """``torch.device`` as a context is a function mode too, but it changes nothing in a forward."""
    with torch.device("cpu"):
        assert check(model, build_inputs()) == 2


def test_log_in_auto(model, build_inputs, run, caplog):
    """In mode "auto" a forward without a graph is no warning, and on a CPU it is not logged."""
    caplog.set_level(logging.INFO, "ppcl_rt.model.graphs")
    model.set_graphs("auto")
    run(model, build_inputs())
    assert not caplog.records and model.graphs.eager_reason == "not on a CUDA device"
    model._graphs = Graphs("auto", backend=Recorder())
    model.register_forward_hook(lambda *_: None)
    for _ in range(2):
        run(model, build_inputs())
    assert [record.levelno for record in caplog.records] == [logging.INFO]


def test_the_least_recently_used_goes(model, build_inputs, check, run):
    """Two graphs are kept. A replay counts as use. A dropped graph is freed, and captured again when needed."""
    model._graphs = Graphs(True, backend=Recorder(), limit=2)
    a, b, c = (build_inputs(batch=n) for n in (1, 2, 3))
    for inputs in (a, b):
        assert check(model, inputs) == 2
    run(model, a)
    assert check(model, c) == 2
    assert [each.closed for each in model.graphs._backend.made] == [False, True, False]
    assert [each.input_shapes[0][0] for each in model.graphs.captured] == [1, 3]
    assert check(model, a) == 3 and check(model, b) == 2
    assert [each.closed for each in model.graphs._backend.made] == [False, True, True, False]


def test_a_capture_that_fails(model, build_inputs, check, run, caplog):
    """A shape that cannot be captured runs eagerly from then on, and is logged once; other shapes are captured."""
    walk, tried = type(model)._walk, []

    def _walk(self, program, *, hidden_states, **inputs):
        output = walk(self, program, hidden_states=hidden_states, **inputs)
        if len(hidden_states) == 2 and len(self.graphs.captured) < 9:
            tried.append(1)
            # `item` waits for the device, which a capture does not allow.
            output = output + 0 * output.sum().item()
        return output

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(model), "_walk", _walk)
        inputs = build_inputs(batch=2)
        for _ in range(5):
            run(model, inputs)
        assert model.graphs.eager_reason == "capturing failed: operation not permitted when stream is capturing"
        # Five eager forwards, one to warm up, one captured.
        assert len(tried) == 7 and not model.graphs.replays
        assert len([record for record in caplog.records if "capturing failed" in record.message]) == 1
        assert check(model, build_inputs(batch=3)) == 2
        # Errors of the caller are raised.
        with pytest.raises(RuntimeError):
            run(model, {**inputs, "encoder_hidden_states": torch.zeros(2, 7, 99)})


def test_implementations_are_known_first(model, build_inputs, run, monkeypatch):
    """A forward that still chooses implementations is not captured; a capture that chose one is dropped."""
    chosen = iter([1, 2, 3, 3, 3, 3, 4, 4, 4])
    monkeypatch.setattr(graphs, "choices_made", lambda: next(chosen))
    inputs = build_inputs()
    run(model, inputs)  # 1 before, 2 after
    assert "chosen" in model.graphs.eager_reason
    run(model, inputs)  # 3, 3
    run(model, inputs)  # 3 before the capture, 3 after
    assert (model.graphs.captures, model.graphs.replays) == (1, 1)
    other = build_inputs(batch=1)
    chosen = iter([5, 5, 5, 6, 6, 6, 6, 6])
    for _ in range(3):
        run(model, other)
    assert model.graphs.captures == 1 and "changed while" in model.graphs.eager_reason
    assert model.graphs._backend.made[-1].closed


class Clock:
    """The clocks of host and device: each forward takes a given number of seconds on each."""

    def __init__(self, host, device):
        self.host, self.device, self.now, self.ready = host, device, 0.0, 0.0

    def __call__(self):
        return self.now

    def mark(self, *_):
        self.ready = max(self.ready, self.now)
        return Moment(self, self.ready)

    def idle(self, *_):
        return self.ready <= self.now

    def forward(self):
        began = max(self.ready, self.now)
        self.now += self.host
        self.ready = max(began + self.device, self.now)


class Moment:
    def __init__(self, clock, when):
        self.clock, self.when = clock, when

    def done(self):
        return self.when <= self.clock.now

    def since(self, earlier):
        assert self.done() and earlier.done()
        return self.when - earlier.when


@pytest.mark.parametrize("host, device, bound", [(0.05, 0.02, True), (0.05, 0.06, True), (0.05, 0.07, False)])
def test_meter(host, device, bound):
    """A forward is launch-bound if the device takes hardly longer than the host, twice in a row."""
    clock = Clock(host, device)
    meter = Meter(clock)
    assert not meter.launch_bound()
    for n in range(3):
        meter.run(clock.forward, clock.idle, clock.mark)
        clock.now += 0.1
        assert meter.launch_bound() == (bound and n >= 1)


def test_meter_waits_for_nothing():
    """A measurement that is not ready is read later, and no forward after a full queue is measured."""
    clock = Clock(0.01, 0.5)
    meter = Meter(clock)
    marks = 0

    def mark():
        nonlocal marks
        marks += 1
        return clock.mark()

    for _ in range(10):
        meter.run(clock.forward, clock.idle, mark)
    assert marks == 2 and not meter.launch_bound()
    # Now the host waits for the queue: it is as slow as the device, which does not mean launch-bound.
    clock.host = 0.5
    for _ in range(5):
        clock.ready = clock.now + 1
        meter.run(clock.forward, clock.idle, mark)
    assert marks == 2 and not meter.launch_bound()


def test_meter_forgets_what_was_held_up():
    clock = Clock(0.01, 0.1)
    meter = Meter(clock)
    for host in (1.0, 0.01, 1.0):
        clock.host = host
        meter.run(clock.forward, clock.idle, clock.mark)
        clock.now += 1
        assert not meter.launch_bound()


@pytest.mark.parametrize("device, captured", [(0.01, 1), (0.5, 0)])
def test_auto(model, build_inputs, run, device, captured):
    """In mode "auto" a forward is captured if the host was slower than the device, never if it was faster."""
    clock = Clock(0.05, device)
    backend = Recorder()
    backend.mark, backend.idle = clock.mark, clock.idle
    model._graphs = Graphs("auto", backend=backend, meter=lambda: Meter(clock))
    walk = type(model)._walk

    def _walk(self, *args, **kwargs):
        clock.forward()
        return walk(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(model), "_walk", _walk)
        results = []
        for n in range(6):
            results.append(run(model, build_inputs()))
            clock.now += 1.0
            # The first forward loads kernels and is not measured; the second and the third are.
            assert model.graphs.captures == (captured if n >= 3 else 0)
    assert all(torch.equal(result, results[0]) for result in results)
    assert model.graphs.replays == 3 * captured


def test_off(model, build_inputs, run):
    model.set_graphs(False)
    for _ in range(3):
        run(model, build_inputs())
    assert model.graphs.mode is False and not model.graphs.captured and not model.graphs._candidates


def test_turning_off_frees(model, build_inputs, check):
    check(model, build_inputs())
    [recording] = model.graphs._backend.made
    model.set_graphs(False)
    assert recording.closed


def test_arguments(loaded):
    """`load` and ``from_pretrained`` take a mode, and refuse anything else."""
    cls = ppcl_rt.PPCLQwenImageTransformer2DModel
    folder = loaded._source.folder
    assert ppcl_rt.load(folder, graphs=False).graphs.mode is False
    assert cls.from_pretrained(folder, graphs=True).graphs.mode is True
    assert loaded.graphs.mode == "auto"
    for wrong in (1, "on", None):
        with pytest.raises(ValueError, match="graphs are"):
            ppcl_rt.load(folder, graphs=wrong)
        with pytest.raises(ValueError, match="graphs are"):
            loaded.set_graphs(wrong)


def test_copies_carry_none(model, build_inputs, check):
    """A copy of a model, and unpickled `Graphs`, start without graphs; the copy captures its own."""
    assert check(model, build_inputs()) == 2
    other = copy.deepcopy(model)
    assert not other.graphs.captured and other.graphs.mode is True and other.graphs.generation == 0
    with torch.no_grad():
        other.proj_out.weight.mul_(2)
    assert check(other, build_inputs()) == 2 and check(model, build_inputs()) == 3
    again = pickle.loads(pickle.dumps(Graphs("auto")))
    assert again.mode == "auto" and again._backend is CUDA
    assert "captured" in repr(model.graphs) and "1 captured, 5 replayed" in repr(model.graphs)


def test_threads(model, build_inputs, run):
    """Threads that run one model at different plans replay its graphs, and each gets the results of its plan."""
    plans = (model.catalog.dense, student(model), fewer_heads(model))
    inputs = {plan: build_inputs(seed=n) for n, plan in enumerate(plans)}
    kept, model._graphs, wanted, wrong = model._graphs, Graphs(False), {}, []
    for plan in inputs:
        with model.at(plan=plan):
            wanted[plan] = run(model, inputs[plan])
    model._graphs = kept

    def work(plan):
        with model.at(plan=plan):
            wrong.extend(plan for _ in range(6) if not torch.equal(run(model, inputs[plan]), wanted[plan]))

    threads = [threading.Thread(target=work, args=(plan,)) for plan in inputs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and kept.captures == 3 and kept.replays == 15


def test_text_runs(mapped, build_inputs, check):
    """Linear maps of text runs are outside the blocks, and are compared too."""
    plan = mapped.catalog.compose([(n, FULL) for n in range(4)], text_runs=[Interval(0, 2)])
    model = ppcl_rt.load(mapped.folder, plan=plan)
    model._graphs = Graphs(True, backend=Recorder())
    assert check(model, build_inputs()) == 2
    layer = model.text_runs["0-2"]["z_1"]
    layer.weight = nn.Parameter(layer.weight * 2)
    assert check(model, build_inputs()) == 2 and model.graphs.captures == 2
    generation = model.graphs.generation
    model.make_resident(plan)
    assert model.graphs.generation == generation
    del model.text_runs["0-2"]
    model.make_resident(plan)
    assert model.graphs.generation > generation


def test_a_block_that_grows(loaded, build_inputs, check):
    """Reading a wider plan moves the weights of the narrower one; a plan that reads nothing keeps all graphs."""
    model = ppcl_rt.load(loaded._source.folder, plan=fewer_heads(loaded))
    model._graphs = Graphs(True, backend=Recorder())
    assert check(model, build_inputs()) == 2
    model.set_plan(model.catalog.dense)
    assert check(model, build_inputs()) == 2 and len(model.graphs.captured) == 1
    model.set_plan(fewer_heads(model))
    assert check(model, build_inputs()) == 2 and len(model.graphs.captured) == 2
    model.set_plan(model.catalog.dense)
    assert check(model, build_inputs()) == 3


def test_workspaces_of_cublas(monkeypatch):
    """A capture allocates workspaces in the memory of the graphs: those made before are outside of it and are freed."""
    log, current = [], ["user's"]

    class Stream:
        device_index = 0

        def __init__(self, *_):
            self.name = "capturing"

        def wait_stream(self, other):
            pass

    class Graph:
        def capture_begin(self, pool, capture_error_mode):
            log.append("begin")

        def capture_end(self):
            log.append("end")

    @contextlib.contextmanager
    def on(stream):
        before, current[0] = current[0], stream.name
        yield
        current[0] = before

    class Users(Stream):
        def __init__(self):
            self.name = "user's"

    stand_ins = {
        "Stream": Stream,
        "Event": object,
        "CUDAGraph": Graph,
        "stream": on,
        "device": lambda _: contextlib.nullcontext(),
        "current_stream": lambda _: Users(),
        "graph_pool_handle": lambda: (0, 1),
        "synchronize": lambda _: None,
        "empty_cache": lambda: None,
    }
    for name, stand_in in stand_ins.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    monkeypatch.setattr(torch._C, "_cuda_clearCublasWorkspaces", lambda: log.append("clear"), raising=False)
    backend, device = Cuda(), torch.device("cuda:0")
    for _ in range(2):
        backend.warm(device, lambda: log.append(current[0]))
        backend.capture(device, lambda: log.append(current[0]))
    once = ["user's", "clear", "begin", "capturing", "end", "clear"]
    assert log == once + once
    with pytest.raises(ZeroDivisionError):
        backend.capture(device, lambda: 1 / 0)
    assert log[len(once) * 2 :] == ["clear", "begin", "end", "clear"]
