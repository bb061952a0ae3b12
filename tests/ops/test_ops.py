"""Operations: all implementations agree, prepared calls read current weights, and the compiler sees one op."""

import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

import ppcl_kernels as kernels
from ppcl_rt import ops
from ppcl_rt.ops import operation as operation_module
from ppcl_rt.ops.ada_layer_norm import AdaLayerNorm
from ppcl_rt.ops.agreement import agree
from ppcl_rt.ops.implementation import CUBLAS, CUBLASLT, CUDNN, PACKED, TORCH, Implementation
from ppcl_rt.ops.joint_attention import JOINT_ATTENTION, Attention
from ppcl_rt.ops.linear import LINEARS, Linears
from ppcl_rt.ops.packing import pack, side_by_side
from ppcl_rt.ops.qkv_projection import QKV, QKV_PROJECTION
from ppcl_rt.ops.table import ImplementationTable

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
B, TEXT, IMAGE, HEADS, E = 2, 5, 33, 3, 8
D = HEADS * E
# The interpreter computes the sigmoid of GELU with numpy, which warns where exp(large) is infinite, as it should be.
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")


def make(*shape, seed=0):
    generator = torch.Generator().manual_seed(1000 * seed + sum(shape))
    return torch.randn(*shape, generator=generator).to(DEVICE)


def angles(tokens):
    table = make(tokens, E // 2, seed=7)
    return torch.stack((table.cos(), table.sin()), dim=-1)


def stream(tokens, seed, packed=True, bias=True, norm=True, rope=True):
    weights = [make(D, D, seed=seed + n) / D**0.5 for n in range(3)]
    biases = [make(D, seed=seed + n) for n in range(3)] if bias else [None] * 3
    if packed:
        weights, biases = torch.stack(weights).unbind(), torch.stack(biases).unbind() if bias else biases
    norms = (1 + 0.1 * make(E, seed=seed + 4), 1 + 0.1 * make(E, seed=seed + 5)) if norm else (None, None)
    x = make(B, tokens, D, seed=seed + 6)
    return kernels.Stream(x, tuple(weights), tuple(biases), norms, angles(tokens) if rope else None)


def linear_call(activation="none", gate=False, residual=False, index=False, n=29, k=D):
    groups = []
    for tokens in (IMAGE, TEXT):
        rows = 2 * B if index else B
        groups.append(
            kernels.Linear(
                make(B, tokens, k, seed=1),
                make(64, D, seed=2) / D**0.5,
                make(64, seed=3),
                n,
                make(rows, n, seed=4) if gate else None,
                torch.arange(B * tokens, device=DEVICE).view(B, tokens) % 2 if index else None,
                make(B, tokens, n, seed=5) if residual else None,
                *((make(64, D, seed=6) / D**0.5, make(64, seed=7)) if activation == "swiglu" else ()),
            )
        )
    return Linears(tuple(groups), activation)


def with_adapters(call):
    """A call whose second stream has factors of rank 16 beside each weight."""

    def pair(seed, rows=64):
        return make(16, D, seed=seed) / D**0.5, make(rows, 16, seed=seed + 1) / 4

    if isinstance(call, QKV):
        text, image = call.streams
        downs, ups = zip(*(pair(seed, D) for seed in (50, 60, 70)), strict=True)
        return call._replace(streams=(text, image._replace(downs=downs, ups=ups)))
    first, second = call.groups
    (down, up), (silu_down, silu_up) = pair(50), pair(60) if second.silu_weight is not None else (None, None)
    second = second._replace(down=down, up=up, silu_down=silu_down, silu_up=silu_up)
    return call._replace(groups=(first, second))


CALLS = {
    "ada_layer_norm": lambda: AdaLayerNorm(make(B, IMAGE, D), make(B, D, seed=1), make(B, D, seed=2)),
    "joint_attention": lambda: Attention(*(make(B, TEXT + IMAGE, HEADS, E, seed=n) for n in range(3))),
    "masked attention": lambda: CALLS["joint_attention"]()._replace(key_mask=make(B, TEXT + IMAGE, seed=9) < 0.5),
    "up": lambda: linear_call(activation="gelu"),
    "swiglu": lambda: linear_call(activation="swiglu"),
    "down": lambda: linear_call(gate=True, residual=True, k=23),
    "edit": lambda: linear_call(gate=True, residual=True, index=True),
    "residual": lambda: linear_call(residual=True),
    "plain": linear_call,
    "q/k/v": lambda: QKV((stream(TEXT, 10), stream(IMAGE, 20)), 2, E),
    "q/k/v, no bias": lambda: QKV((stream(TEXT, 10, bias=False), stream(IMAGE, 20, norm=False, rope=False)), 3, E),
    "q/k/v, one stream": lambda: QKV((stream(IMAGE, 20),), 2, E),
    "down, adapters": lambda: with_adapters(linear_call(gate=True, residual=True, k=23)),
    "swiglu, adapters": lambda: with_adapters(linear_call(activation="swiglu")),
    "q/k/v, adapters": lambda: with_adapters(QKV((stream(TEXT, 10), stream(IMAGE, 20)), 2, E)),
}
OPERATION_OF = {
    AdaLayerNorm: ops.OPERATIONS["ada_layer_norm"],
    Attention: ops.OPERATIONS["joint_attention"],
    Linears: LINEARS,
    QKV: QKV_PROJECTION,
}


def close(got, wanted, limit=1e-5):
    """Compare float32 sums of some fifty terms of size 1 in another order: 1e-6 seen."""
    got, wanted = ([x] if isinstance(x, torch.Tensor) else list(x) for x in (got, wanted))
    for a, b in zip(got, wanted, strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=limit, atol=limit)


@pytest.mark.parametrize("name", CALLS)
def test_implementations_agree(name):
    """Every implementation that a table may choose gives the result of plain torch, also by `agree`."""
    call = CALLS[name]()
    operation = OPERATION_OF[type(call)]
    wanted, listed = operation.run(call, TORCH), operation.implementations(call)
    assert TORCH in listed and len(set(listed)) == len(listed)
    assert any(each.kind == "triton" for each in listed)
    for implementation in listed:
        got = operation.run(call, implementation)
        close(got, wanted)
        assert agree(got, wanted)


FAULTS = {
    "zeros": lambda g: g._replace(weight=torch.zeros_like(g.weight), bias=torch.zeros_like(g.bias)),
    "rows of other tokens": lambda g: g._replace(x=g.x.roll(1, 1)),
    "half of K is missing": lambda g: g._replace(x=g.x[..., : g.x.shape[2] // 2]),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("name", ["out", "down", "up"])
def test_wrong_products_are_found_under_a_residual(monkeypatch, tmp_path, name, fault):
    """A residual of a hundred times the product hides faults from a comparison of sums; the clock runs it as it is."""
    call = (
        linear_call(activation="gelu")
        if name == "up"
        else linear_call(gate=True, residual=True, k=D if name == "out" else 22)
    )
    call = call._replace(
        groups=tuple(g if g.residual is None else g._replace(residual=100 * g.residual) for g in call.groups)
    )
    faulty, run, timed = Implementation("triton", (1,)), LINEARS.run, []

    def run_faulty(call, implementation):
        if implementation == faulty:
            call = call._replace(groups=tuple(map(FAULTS[fault], call.groups)))
        return run(call, TORCH)

    def clock(timed_call):
        timed.append(timed_call.args[-1])
        seen.append(timed_call())
        return 1.0 if timed[-1] == faulty else 2.0

    seen, wanted = [], run(call, TORCH)
    table = ImplementationTable(tmp_path / "table.json", {}, clock)
    monkeypatch.setattr(LINEARS, "run", run_faulty)
    monkeypatch.setattr(LINEARS, "implementations", lambda call: [faulty, TORCH])
    assert agree(run_faulty(call, faulty), wanted) == (name != "up")
    monkeypatch.setattr(operation_module, "table_of", lambda index: table)
    monkeypatch.setattr(kernels, "can_run", lambda x: True)
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert LINEARS.choose(call) == TORCH
    assert timed == [TORCH]
    close(seen[0], wanted)


def test_what_is_offered():
    """cuBLAS where a small kernel has something to add; one batched product where q, k and v lie side by side."""
    assert CUBLAS in LINEARS.implementations(CALLS["down"]()) and CUBLAS not in LINEARS.implementations(CALLS["up"]())
    assert PACKED in QKV_PROJECTION.implementations(CALLS["q/k/v"]())
    assert PACKED in QKV_PROJECTION.implementations(CALLS["q/k/v, no bias"]())
    apart = QKV((stream(TEXT, 10), stream(IMAGE, 20, packed=False)), 2, E)
    assert PACKED not in QKV_PROJECTION.implementations(apart)
    # It has no room for adapters; kernels have, up to a rank.
    assert PACKED not in QKV_PROJECTION.implementations(CALLS["q/k/v, adapters"]())
    for call in (CALLS["down, adapters"](), CALLS["q/k/v, adapters"]()):
        operation, field = OPERATION_OF[type(call)], "groups" if isinstance(call, Linears) else "streams"
        parts = getattr(call, field)
        large = [part if not part.rank else _of_rank(part, 128) for part in parts]
        for each, offered in ((parts, True), (large, False)):
            listed = operation.implementations(call._replace(**{field: tuple(each)}))
            assert any(one.kind == "triton" for one in listed) == offered and TORCH in listed


def _of_rank(part, rank):
    """A layer or stream whose factors are padded to a rank."""

    def down(t):
        return nn.functional.pad(t, (0, 0, 0, rank - len(t)))

    if isinstance(part, kernels.Linear):
        return part._replace(down=down(part.down), up=nn.functional.pad(part.up, (0, rank - part.up.shape[1])))
    ups = tuple(nn.functional.pad(t, (0, rank - t.shape[1])) for t in part.ups)
    return part._replace(downs=tuple(map(down, part.downs)), ups=ups)


def test_lt_epilogue(monkeypatch):
    """cuBLASLt's product over prefixes and both streams. Only on CUDA its GELU is the tanh form."""
    plain = torch.addmm

    def product(bias, x, weight, use_gelu):
        assert use_gelu
        return torch.nn.functional.gelu(plain(bias, x, weight), approximate="tanh")

    if DEVICE == "cpu":
        monkeypatch.setattr(torch, "_addmm_activation", product)
    call = CALLS["up"]()
    close(LINEARS.run(call, CUBLASLT), LINEARS.run(call, TORCH), 1e-4)


@pytest.mark.parametrize("name", ["joint_attention", "masked attention"])
def test_cudnn_is_called_without_flags_of_the_process(monkeypatch, name):
    """Another thread may attend at the same time: the operator is called by name, and takes the mask as a bias."""
    call = CALLS[name]()
    # Fewer queries than keys, as where the queries of text are not computed.
    call = call._replace(q=call.q[:, :IMAGE])
    wanted = JOINT_ATTENTION.run(call, TORCH)
    switched = []
    for switch in ("enable_flash_sdp", "enable_mem_efficient_sdp", "enable_math_sdp", "enable_cudnn_sdp"):
        monkeypatch.setattr(torch.backends.cuda, switch, switched.append)

    def attend(q, k, v, bias, compute_log_sumexp):
        assert bias is None or (bias.shape == (B, 1, IMAGE, TEXT + IMAGE) and bias.dtype == q.dtype)
        return (torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=bias),)

    monkeypatch.setattr(torch.ops.aten, "_scaled_dot_product_cudnn_attention", attend)
    close(JOINT_ATTENTION.run(call, CUDNN), wanted)
    assert not switched


def key(call):
    return OPERATION_OF[type(call)].key(call)


def test_keys_say_what_changes_the_time():
    """Everything that changes the speed of a product changes the form of its key; another size makes a neighbour."""
    base = linear_call(gate=True, residual=True, k=24)
    first, *others = base.groups

    def changed(**fields):
        return base._replace(groups=(first._replace(**fields), *others))

    forms = [key(base).form]
    for call in (
        changed(bias=None),
        changed(gate=None),
        changed(gate=None, residual=None),
        CALLS["edit"](),
        changed(x=make(B, 2 * IMAGE, D)[:, ::2, :24]),
        # TMA needs strides that are multiples of 16 bytes.
        changed(weight=make(64, D + 1)),
        base._replace(activation="gelu"),
        CALLS["swiglu"](),
        changed(down=make(16, D), up=make(64, 16)),
        changed(down=make(32, D), up=make(64, 32)),
    ):
        forms.append(key(call).form)
    assert len(set(forms)) == len(forms), forms
    narrower = changed(out_features=17, gate=make(B, 17), residual=make(B, IMAGE, 17))
    assert key(narrower).form == key(base).form and key(narrower).sizes != key(base).sizes
    # 36 and 40 tiles of rows: two keys, which are neighbours.
    near, far = (key(Attention(*(torch.zeros(1, s, 1, 8, device=DEVICE),) * 3)) for s in (4608, 5120))
    assert near != far and near.distance(far) < 0.5
    forms = {key(CALLS[name]()).form for name in ("q/k/v", "q/k/v, no bias", "q/k/v, one stream")}
    apart = QKV((stream(TEXT, 10), stream(IMAGE, 20, packed=False)), 2, E)
    assert len({*forms, key(apart).form}) == 4
    assert key(CALLS["joint_attention"]()).form != key(CALLS["masked attention"]()).form


@pytest.mark.parametrize("name", ["ada_layer_norm", "masked attention", "edit", "swiglu", "q/k/v"])
def test_prepared_calls_follow_their_arguments(monkeypatch, name):
    """The second call at a shape runs what the first has prepared, on its own tensors."""
    monkeypatch.setenv("PPCL_BACKEND", "triton")
    operation = OPERATION_OF[type(CALLS[name]())]
    operation._prepared.clear()
    for seed in range(2):
        torch.manual_seed(seed)
        call = torch.utils._pytree.tree_map_only(
            torch.Tensor, lambda t: torch.randn_like(t) if t.is_floating_point() and t.dim() == 3 else t, CALLS[name]()
        )
        close(operation(call), operation.run(call, TORCH))


def test_launches_read_adapters_as_they_are_now(monkeypatch):
    """Scales, factors and which adapters are active change between calls; memory stays while there is room in it."""
    monkeypatch.setenv("PPCL_BACKEND", "triton")
    torch.manual_seed(0)
    layer, x = adapted_layer(D, 32, 3, 5, 20), make(B, IMAGE, D)
    launched = []
    monkeypatch.setattr(LINEARS, "prepare", lambda *a: launched.append(a) or type(LINEARS).prepare(LINEARS, *a))

    def check(prepared):
        with torch.no_grad():
            [got] = ops.linears([ops.Layer(layer, x, 29)])
            close(got, layer(x)[..., :29], 1e-4)
        assert len(launched) == prepared

    check(1)
    layer.scaling["0"] = 0.3
    check(1)
    with torch.no_grad():
        layer.lora_A["0"].weight.mul_(2)
    check(1)
    layer.lora_B["0"].weight.data = torch.randn_like(layer.lora_B["0"].weight)
    check(1)
    layer.set_adapter("1")
    check(1)
    layer.set_adapter(["0", "1"])
    check(1)
    layer.enable_adapters(False)
    check(2)
    layer.enable_adapters(True)
    check(2)
    layer.set_adapter("2")
    check(3)
    layer.set_adapter("0")
    # A stack never shrinks.
    check(3)
    layer.merge()
    check(3)


def test_prepared_calls_see_new_weights(monkeypatch):
    """Weights are replaced, moved within their parameter, or changed in place: each call reads the current values."""
    monkeypatch.setenv("PPCL_BACKEND", "triton")
    layer, x = nn.Linear(D, 32).to(DEVICE).requires_grad_(False), make(B, IMAGE, D)

    def check():
        [got] = ops.linears([ops.Layer(layer, x)])
        close(got, layer(x))

    check()
    layer.weight = nn.Parameter(torch.randn_like(layer.weight), requires_grad=False)
    check()
    layer.weight.data = torch.randn_like(layer.weight)
    check()
    layer.weight.copy_(torch.randn_like(layer.weight))
    check()
    layer.weight.data = torch.randn(64, 2 * D, device=DEVICE)[::2, ::2].contiguous()
    check()


FIXED = {
    Linears: ("weight", "bias", "silu_weight", "silu_bias", "down", "up", "silu_down", "silu_up"),
    QKV: ("weights", "biases", "norms", "downs", "ups"),
    AdaLayerNorm: (),
    Attention: (),
}


SIGNED = ("ada_layer_norm", "masked attention", "edit", "swiglu", "q/k/v", "swiglu, adapters", "q/k/v, adapters")


@pytest.mark.parametrize("name", SIGNED)
def test_signatures_tell_stale_from_moved(name):
    """A signature depends on the addresses of weights, and only on the layout of activations."""
    call = CALLS[name]()
    operation = OPERATION_OF[type(call)]
    signature = operation.signature(call)
    groups = getattr(call, "groups", None) or getattr(call, "streams", None) or [call]
    weights = {
        id(t) for g in groups for part in FIXED[type(call)] for t in tree_leaves(getattr(g, part)) if t is not None
    }
    leaves, spec = tree_flatten(call)
    seen = 0
    for place, leaf in enumerate(leaves):
        if not isinstance(leaf, torch.Tensor):
            continue
        seen += id(leaf) in weights

        def with_leaf(tensor, place=place):
            return operation.signature(tree_unflatten([*leaves[:place], tensor, *leaves[place + 1 :]], spec))

        same = with_leaf(leaf.clone()) == signature
        assert same == (id(leaf) not in weights)
        strided = torch.empty_strided(leaf.shape, [2 * step for step in leaf.stride()], dtype=leaf.dtype)
        for other in (leaf[:-1], leaf.view(torch.int16), strided.to(DEVICE), None):
            assert with_leaf(other) != signature
        # The same address with other strides.
        assert with_leaf(leaf.as_strided(leaf.shape, [0] * leaf.dim())) != signature
    assert seen == len(weights)


def test_a_shape_is_prepared_once(monkeypatch):
    monkeypatch.setenv("PPCL_BACKEND", "triton")
    prepared, plain = [], LINEARS.prepare
    monkeypatch.setattr(LINEARS, "prepare", lambda call, chosen: prepared.append(chosen) or plain(call, chosen))
    LINEARS._prepared.clear()
    call = CALLS["down"]()
    for _ in range(3):
        LINEARS(call)
    assert len(prepared) == 1
    LINEARS(CALLS["up"]())
    assert len(prepared) == 2
    monkeypatch.setattr("ppcl_rt.ops.operation._MOST_PREPARED", 2)
    LINEARS(CALLS["plain"]())
    assert len(LINEARS._prepared) == 1


def test_full_memory_does_not_end_a_forward(monkeypatch, caplog):
    """Plain torch runs once, and nothing is prepared; the next call chooses again. Other errors are passed on."""
    monkeypatch.setenv("PPCL_BACKEND", "triton")
    choose, errors = LINEARS.choose, [torch.OutOfMemoryError("full"), RuntimeError("nothing works")]

    def fails(call):
        raise errors.pop(0)

    monkeypatch.setattr(LINEARS, "choose", fails)
    call = CALLS["up"]()
    LINEARS._prepared.clear()
    close(LINEARS(call), LINEARS.run(call, TORCH))
    assert not LINEARS._prepared and "memory ran out while implementations were compared" in caplog.text
    with pytest.raises(RuntimeError, match="nothing works"):
        LINEARS(call)
    monkeypatch.setattr(LINEARS, "choose", choose)
    close(LINEARS(call), LINEARS.run(call, TORCH))
    assert len(LINEARS._prepared) == 1


@pytest.mark.parametrize("name", CALLS)
def test_compiler_sees_one_op(monkeypatch, name):
    """The op that torch.compile records passes `opcheck`, and its result is that of the operation."""
    monkeypatch.setenv("PPCL_BACKEND", "torch")
    call = CALLS[name]()
    operation, recorded = OPERATION_OF[type(call)], []
    module = __import__(type(operation).__module__, fromlist=["_OP"])
    op = module._OP
    monkeypatch.setattr(module, "_OP", lambda *arguments: recorded.append(arguments) or op(*arguments))
    close(operation.run_custom_op(call), operation.run(call, TORCH))
    torch.library.opcheck(op, recorded[0], test_utils=("test_schema", "test_faketensor"))


def test_hooks_adapters_and_backends_are_honoured(monkeypatch):
    """A forward that a user put on a layer, and an attention backend that a user chose, are called."""
    monkeypatch.setenv("PPCL_BACKEND", "triton")
    monkeypatch.setattr(LINEARS, "run", lambda *_: pytest.fail("read past the module"))
    layer, x = nn.Linear(D, 32).to(DEVICE).requires_grad_(False), make(B, IMAGE, D)
    layer.forward = lambda x: nn.functional.linear(x, layer.weight, layer.bias) + 1
    close(ops.linears([ops.Layer(layer, x)]), [layer(x)])
    from diffusers import attention_backend

    operation = ops.OPERATIONS["joint_attention"]
    monkeypatch.setattr(operation, "run", lambda *_: pytest.fail("another backend was asked for"))
    q, k, v, _ = CALLS["joint_attention"]()
    with attention_backend("_native_math"):
        ops.joint_attention(q, k, v, None)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("replaced", [(), (0,), (1,), (0, 1)])
def test_inputs_that_lie_next_to_each_other(monkeypatch, backend, replaced):
    """A layer of two inputs, at some of its columns, with layers in place of them: as one product over all of them."""
    monkeypatch.setenv("PPCL_BACKEND", backend)
    torch.manual_seed(0)
    layer = nn.Linear(40, 32).to(DEVICE).requires_grad_(False)
    gate, residual = make(B, 32, seed=1), make(B, IMAGE, 32, seed=2)
    columns, inputs, weight = (slice(0, 11), slice(16, 36)), [], torch.zeros(32, 40, device=DEVICE)
    for number, part in enumerate(columns):
        other = None
        if number in replaced:
            other = nn.Linear(part.stop - part.start, 32, bias=False).to(DEVICE).requires_grad_(False)
        inputs.append(ops.Columns(make(B, IMAGE, part.stop - part.start, seed=3 + number), part.start, other))
        weight[:, part] = layer.weight[:, part] if other is None else other.weight
    x = torch.zeros(B, IMAGE, 40, device=DEVICE)
    for part, each in zip(columns, inputs, strict=True):
        x[..., part] = each.x
    wanted = residual + gate[:, None] * nn.functional.linear(x, weight, layer.bias)
    close(ops.joined(layer, inputs, gate, residual), wanted)
    # One of several inputs alone.
    alone = residual + gate[:, None] * nn.functional.linear(x[..., columns[0]], weight[:, columns[0]], layer.bias)
    close(ops.joined(layer, inputs[:1], gate, residual), alone)
    # With gradients, of the columns that are multiplied.
    leaf = inputs[0].x.requires_grad_()
    with_gradient = ops.joined(layer, inputs, gate, residual)
    close(with_gradient.detach(), wanted)
    close(torch.autograd.grad(with_gradient.sum(), leaf)[0], (gate @ weight[:, columns[0]])[:, None].expand_as(leaf))
    leaf.requires_grad_(False)
    # Through the modules, where they may not be read past.
    seen = []
    for module in (layer, *(each.replacement for each in inputs if each.replacement is not None)):
        module.register_forward_hook(lambda _, args, __: seen.append(args[0].shape[-1]))
    close(ops.joined(layer, inputs, gate, residual), wanted)
    assert seen == [40, *(inputs[number].x.shape[-1] for number in replaced)]


def adapted_layer(columns, rows, *ranks):
    """A linear layer with adapters "0", "1", ... of these ranks, of which the first is active."""
    peft = pytest.importorskip("peft")
    holder = nn.ModuleDict({"layer": nn.Linear(columns, rows)}).to(DEVICE)
    for name, rank in enumerate(ranks):
        config = peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=["layer"], init_lora_weights=False)
        peft.inject_adapter_in_model(config, holder, str(name))
    holder.layer.set_adapter("0")
    return holder.layer.requires_grad_(False)


def test_inputs_that_lie_next_to_each_other_with_an_adapter(monkeypatch):
    """Each input is multiplied by its own columns of the adapter, also one that another layer multiplies."""
    torch.manual_seed(0)
    layer, other = adapted_layer(40, 32, 3), nn.Linear(20, 32, bias=False).to(DEVICE).requires_grad_(False)
    gate, residual = make(B, 32, seed=1), make(B, IMAGE, 32, seed=2)
    inputs = [ops.Columns(make(B, IMAGE, 11, seed=3)), ops.Columns(make(B, IMAGE, 20, seed=4), 16, other)]
    results, ran = [], []
    monkeypatch.setattr(LINEARS, "prepare", lambda *a: ran.append(a) or type(LINEARS).prepare(LINEARS, *a))
    for backend in ("torch", "triton"):
        monkeypatch.setenv("PPCL_BACKEND", backend)
        results.append(ops.joined(layer, inputs, gate, residual))
    close(*results)
    assert len(ran) == len(inputs)


def test_factors_of_another_dtype_are_called(monkeypatch):
    """An adapter in float32 next to a weight in float16: peft casts, a kernel would refuse."""
    monkeypatch.setenv("PPCL_BACKEND", "triton")
    layer, x = adapted_layer(D, 32, 3), make(B, IMAGE, D).half()
    layer.base_layer.half()
    close(ops.linears([ops.Layer(layer, x)]), [layer(x)], 1e-3)


@pytest.mark.parametrize("bias", [True, False])
def test_pack(bias):
    """Names, values and requires_grad stay; the weights are views of one tensor, and train as before."""
    layers = [nn.Linear(6, 8, bias=bias) for _ in range(3)]
    layers[1].weight.requires_grad_(False)
    before = [{n: p.detach().clone() for n, p in layer.named_parameters()} for layer in layers]
    assert side_by_side([layer.weight for layer in layers]) is None
    pack(*layers)
    together = side_by_side([layer.weight for layer in layers])
    assert together is not None and together.shape == (3, 8, 6)
    address = together.data_ptr()
    pack(*layers)
    assert side_by_side([layer.weight for layer in layers]).data_ptr() == address
    for layer, old in zip(layers, before, strict=True):
        assert all(torch.equal(p, old[n]) for n, p in layer.named_parameters())
        assert [n for n, _ in layer.named_parameters()] == list(old)
    assert [layer.weight.requires_grad for layer in layers] == [True, False, True]
    # A prefix of rows can be viewed too, and a changed weight shows in the view.
    layers[2].weight.data[0, 0] = 7.0
    assert together[:, :2][2, 0, 0] == 7.0
    layers[1].weight = nn.Parameter(torch.zeros(8, 6))
    assert side_by_side([layer.weight for layer in layers]) is None


def test_pack_in_inference_mode():
    """Ordinary parameters can be trained later; those made in inference mode are not packed."""
    ordinary = [nn.Linear(8, 6) for _ in range(3)]
    with torch.inference_mode():
        made_inside = [nn.Linear(8, 6) for _ in range(3)]
        pack(*ordinary)
        pack(*made_inside)
    pack(*made_inside)
    assert side_by_side([layer.weight for layer in ordinary]) is not None
    assert not any(layer.weight.is_inference() for layer in ordinary)
    assert side_by_side([layer.weight for layer in made_inside]) is None


def test_side_by_side_is_strict():
    parts = torch.zeros(4, 8, 6)
    assert side_by_side([parts[0], parts[2]]).shape == (2, 8, 6)
    assert side_by_side([parts[0], parts[1], parts[3]]) is None
    assert side_by_side([parts[1], parts[0]]) is None
    assert side_by_side([parts[0], parts[1][:4]]) is None
    assert side_by_side([parts[0][:, :3], parts[0][:, 3:]]) is None
    assert side_by_side([parts[0], None]) is None and side_by_side([None, None]) is None


def test_functions_take_operations():
    """The functions that models call give the same through operations and through the modules."""
    torch.manual_seed(0)
    layers = [nn.Linear(D, D).to(DEVICE) for _ in range(6)]
    from diffusers.models.normalization import RMSNorm

    norms = [RMSNorm(E, eps=1e-6).to(DEVICE) for _ in range(4)]
    streams = [
        ops.ProjectedStream(make(B, TEXT, D), ops.Projection(*layers[:3], *norms[:2]), angles(TEXT)),
        ops.ProjectedStream(make(B, IMAGE, D), ops.Projection(*layers[3:], *norms[2:]), angles(IMAGE)),
    ]
    wanted = ops.qkv_projection(streams, 2, E)
    with torch.no_grad():
        close(ops.qkv_projection(streams, 2, E), [part.detach() for part in wanted])
    assert all(part.requires_grad for part in wanted)
