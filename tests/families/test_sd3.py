"""Stable Diffusion 3: the dense plan is diffusers, any other is diffusers with something zeroed, put in or left out."""

from __future__ import annotations

import copy
from collections import Counter

import numpy as np
import pytest
import torch
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from tiny_sd3 import CHANNELS, DEPTH, DIM, HEADS, VARIANTS, build_inputs, build_stock, make_checkpoint, residuals
from torch.utils._python_dispatch import TorchDispatchMode

import ppcl_rt
from ppcl_rt import Interval, Plan, PlannedBlock, Width

EVERY = pytest.mark.parametrize("variant", list(VARIANTS))
# Large is medium without dual attention.
EACH = pytest.mark.parametrize("variant", ["sd3", "medium", pytest.param("large", marks=pytest.mark.slow)])


@pytest.fixture(scope="module")
def of(tmp_path_factory):
    """The checkpoint of a variant, made once, and its model with everything resident."""
    made = {}

    def get(variant, compensated=True):
        key = (variant, compensated)
        if key not in made:
            folder = tmp_path_factory.mktemp("sd3") / "checkpoint"
            checkpoint = make_checkpoint(folder, variant, len(made), compensated)
            made[key] = checkpoint, ppcl_rt.load(folder, resident="all")
        return made[key]

    return get


def one_kind_each(catalog):
    """The first block of each kind."""
    kinds = [catalog.architecture.kind(n) for n in range(DEPTH)]
    return [kinds.index(kind) for kind in dict.fromkeys(kinds)]


# The dense plan.


@EVERY
@pytest.mark.parametrize(("text", "size"), [(7, (3, 5)), (1, (1, 1)), (63, (5, 7)), (2, (7, 1))])
def test_dense_is_stock(variant, text, size, of, run, same):
    made, model = of(variant)
    model.set_ratio(1.0)
    inputs = build_inputs(seed=text, text=text, size=size)
    wanted = run(made.stock, inputs)
    same(run(model, inputs), wanted)
    assert wanted.abs().max() > 0.5


@EVERY
def test_every_input_matters(variant, of, run):
    """Otherwise the law above would hold for a model that ignores one of them."""
    made, _ = of(variant)
    inputs, other = build_inputs(), build_inputs(seed=9)
    for name in inputs:
        assert (run(made.stock, inputs) - run(made.stock, {**inputs, name: other[name]})).abs().max() > 1e-2


@EACH
@pytest.mark.parametrize("count", [1, 3, 6, 7])
def test_dense_with_controlnet(variant, count, of, run, same):
    """Residuals land after the blocks that diffusers adds them after: shares need not be whole, the last has none."""
    made, model = of(variant)
    inputs = build_inputs()
    control = residuals(count, inputs)
    model.set_ratio(1.0)
    got = run(model, inputs, block_controlnet_hidden_states=control)
    same(got, run(made.stock, inputs, block_controlnet_hidden_states=control))
    assert (got - run(model, inputs)).abs().max() > 1e-2


@EACH
@pytest.mark.parametrize("skipped", [[], [0], [1, 2], [6], [2, 5, 6], [99], torch.tensor([1, 2])], ids=str)
def test_dense_with_skipped_layers(variant, skipped, of, run, same):
    """By original number, residuals stay where they were."""
    made, model = of(variant)
    inputs = build_inputs()
    more = {"skip_layers": skipped, "block_controlnet_hidden_states": residuals(2, inputs)}
    model.set_ratio(1.0)
    same(run(model, inputs, **more), run(made.stock, inputs, **more))


@EACH
def test_skipped_layers_of_a_plan(variant, of, run, same):
    """Equal to the plan without those blocks. A student runs as long as one of its blocks would."""
    made, model = of(variant)
    inputs, catalog = build_inputs(), made.catalog
    student = catalog.student(Interval(3, 4))
    full = {n: catalog.spec(n).full for n in range(DEPTH)}
    stands = PlannedBlock(interval=student.interval, width=student.widths.full, student=True)

    def plan(*kept, students=(stands,)):
        return catalog.compose([(n, full[n]) for n in kept], students)

    for skipped, same_as in (
        ([1], plan(0, 2, 5, 6)),
        ([3], plan(0, 1, 2, 5, 6)),
        ([3, 4], plan(0, 1, 2, 5, 6, students=())),
        ([0, 3, 4, 6], plan(1, 2, 5, students=())),
    ):
        model.set_plan(plan(0, 1, 2, 5, 6))
        got = run(model, inputs, skip_layers=skipped)
        model.set_plan(same_as)
        same(got, run(model, inputs))


@EVERY
def test_the_forms_of_calls_and_results(variant, of, run, same):
    made, model = of(variant)
    inputs = build_inputs()
    model.set_ratio(1.0)
    with torch.no_grad():
        wrapped, bare = model(**inputs), model(*inputs.values(), return_dict=False)
    assert type(wrapped) is Transformer2DModelOutput and isinstance(bare, tuple) and torch.equal(wrapped[0], bare[0])
    for kwargs in ({}, {"scale": 0.5}):
        same(run(model, inputs, joint_attention_kwargs=kwargs), run(made.stock, inputs, joint_attention_kwargs=kwargs))


@EVERY
def test_built_by_hand(variant, run, same):
    """The class built from its config, with stock weights, is the stock model; what it counts is what it holds."""
    stock, inputs = build_stock(variant), build_inputs()
    model = ppcl_rt.PPCLSD3Transformer2DModel.from_config(stock.config).eval()
    assert list(model.state_dict()) == list(stock.state_dict())
    model.load_state_dict(stock.state_dict())
    same(run(model, inputs), run(stock, inputs))
    # The positions are a buffer, which is stored.
    assert model.catalog.architecture.dense_params == sum(t.numel() for t in stock.state_dict().values())


def test_a_model_that_was_built_by_hand_is_saved_and_loaded(tmp_path, run):
    torch.manual_seed(0)
    model, inputs = ppcl_rt.PPCLSD3Transformer2DModel.from_config(build_stock("medium").config).eval(), build_inputs()
    model.save_pretrained(tmp_path)
    assert torch.equal(run(ppcl_rt.load(tmp_path), inputs), run(model, inputs))


def test_stock_checkpoint_loads(tmp_path, run, same):
    stock, inputs = build_stock("medium"), build_inputs()
    stock.save_pretrained(tmp_path)
    model = ppcl_rt.load(tmp_path)
    assert isinstance(model, ppcl_rt.PPCLSD3Transformer2DModel) and model.catalog.family == "sd3"
    same(run(model, inputs), run(stock, inputs))
    lists = [(each.path, each.kind, each.depth) for each in model.catalog.architecture.lists]
    path = "transformer_blocks"
    assert lists == [(path, "dual-attention", 3), (path, "two-stream", 3), (path, "last", 1)]


@pytest.mark.parametrize("dual", [(6,), (1, 3), (0, 2, 4, 6)])
def test_dual_attention_anywhere(tmp_path, dual, run, same):
    """Also in the last block, and in turns: kinds alternate in one list."""
    stock, inputs = build_stock("medium", dual_attention_layers=dual), build_inputs()
    stock.save_pretrained(tmp_path)
    model = ppcl_rt.load(tmp_path)
    same(run(model, inputs), run(stock, inputs))
    kinds = [model.catalog.architecture.kind(n) for n in range(DEPTH)]
    assert [n for n in range(DEPTH) if kinds[n].startswith("dual-attention")] == list(dual)
    assert kinds[6] == ("dual-attention-last" if 6 in dual else "last")


# Other plans.


@EACH
def test_narrow_is_stock_with_columns_zeroed(variant, of, run, same):
    """Any counts in each kind of block; the first in rank order stay."""
    made, model = of(variant, compensated=False)
    catalog, inputs, rng = made.catalog, build_inputs(), np.random.default_rng(5)
    for alone in (*one_kind_each(catalog), None):
        stock, kept = copy.deepcopy(made.stock), []
        for n, block in enumerate(stock.transformer_blocks):
            spec = catalog.spec(n)
            width = spec.full
            if alone in (n, None):
                width = spec.full.replace(**{g: int(rng.integers(1, spec.full[g])) for g in spec.unit_groups})
            kept.append((n, width))
            order = {g: made.tensors[f"transformer_blocks.{n}.order.{g}"][width[g] :] for g in spec.unit_groups}
            with torch.no_grad():
                for head in order["heads"]:
                    block.attn.to_out[0].weight[:, head * 8 : head * 8 + 8] = 0
                    if n < DEPTH - 1:
                        block.attn.to_add_out.weight[:, head * 8 : head * 8 + 8] = 0
                for head in order.get("image_heads", ()):
                    block.attn2.to_out[0].weight[:, head * 8 : head * 8 + 8] = 0
                block.ff.net[2].weight[:, order["image"]] = 0
                if n < DEPTH - 1:
                    block.ff_context.net[2].weight[:, order["text"]] = 0
        model.set_plan(catalog.compose(kept))
        wanted = run(stock, inputs)
        same(run(model, inputs), wanted)
        assert (wanted - run(made.stock, inputs)).abs().max() > 1e-3


@EACH
@pytest.mark.parametrize("group", ["heads", "image_heads", "image", "text", "modulation"])
def test_each_group_by_hand(variant, group, of, run, same):
    """Every legal count of a group in all blocks that have it: fitted columns, linear maps, low ranks."""
    made, model = of(variant)
    catalog, inputs = made.catalog, build_inputs()
    have = [n for n in range(DEPTH) if group in catalog.spec(n).groups]
    assert have or (group == "image_heads" and variant != "medium")
    for count in [each.units for each in catalog.blocks[have[0]].of(group)[1:]] if have else ():
        widths = {n: catalog.spec(n).full for n in range(DEPTH)}
        widths |= {n: widths[n].replace(**{group: count}) for n in have}
        plan = catalog.compose(widths.items())
        model.set_plan(plan)
        wanted = made.by_hand(plan, inputs)
        same(run(model, inputs), wanted, 2e-5)
        assert (wanted - run(made.stock, inputs)).abs().max() > 1e-3


@EACH
def test_students_and_text_runs_by_hand(variant, of, run, same):
    """A student in place of each interval; each text run, its first block at full width and narrow; ControlNet too."""
    made, model = of(variant)
    catalog, inputs = made.catalog, build_inputs()
    full = {n: catalog.spec(n).full for n in range(DEPTH)}
    control = residuals(3, inputs)
    plans = []
    for student in catalog.students:
        stands = PlannedBlock(interval=student.interval, width=student.widths.full, student=True)
        plans.append(catalog.compose([(n, full[n]) for n in range(DEPTH) if n not in student.interval], [stands]))
    for text_run in catalog.text_runs:
        for narrow in ({}, {"heads": 2, "image": 0, "text": 31, "modulation": 3}):
            widths = {n: full[n].replace(**narrow) if n in text_run.interval else full[n] for n in range(DEPTH)}
            plans.append(catalog.compose(widths.items(), text_runs=[text_run.interval]))
    assert len(plans) >= 3 + 2 * 3
    for plan in plans:
        model.set_plan(plan)
        same(run(model, inputs), made.by_hand(plan, inputs), 2e-5)
        got = run(model, inputs, block_controlnet_hidden_states=control)
        same(got, made.by_hand(plan, inputs, control), 2e-5)
        assert (got - run(made.stock, inputs, block_controlnet_hidden_states=control)).abs().max() > 1e-3


def test_the_hand_written_loop_is_stock(of, run, same):
    for variant in VARIANTS:
        made, _ = of(variant)
        inputs = build_inputs()
        control = residuals(4, inputs)
        wanted = run(made.stock, inputs, block_controlnet_hidden_states=control)
        same(made.by_hand(made.catalog.dense, inputs, control), wanted)


@EACH
def test_two_hundred_plans(variant, of, run, same):
    """Random legal plans all run; every tenth is checked in full."""
    made, model = of(variant)
    rng, inputs = np.random.default_rng(7), build_inputs()
    plans = list(dict.fromkeys(made.random_plan(rng) for _ in range(200)))
    assert len(plans) == 200
    for n, plan in enumerate(plans):
        model.set_plan(plan)
        got = run(model, inputs)
        assert torch.isfinite(got).all()
        if n % 10 == 0:
            same(got, made.by_hand(plan, inputs), 5e-5)


@EACH
def test_plans_load_alone_grow_and_hold_what_they_count(variant, of, run, same):
    made, _ = of(variant)
    rng, inputs = np.random.default_rng(3), build_inputs()
    grown = None
    for _ in range(5):
        plan = made.random_plan(rng)
        alone = ppcl_rt.load(made.folder, plan=plan)
        assert sum(t.numel() for t in alone.state_dict().values()) == made.catalog.architecture.params(plan)
        grown = grown or alone
        grown.set_plan(plan)
        same(run(grown, inputs), run(alone, inputs), 2e-5)
    grown.set_ratio(1.0)
    same(run(grown, inputs), run(made.stock, inputs))


@EACH
def test_ratios_are_planned(variant, of, run):
    """The planner knows all kinds: its plans keep the ratio and run."""
    made, _ = of(variant)
    planner = ppcl_rt.Planner(made.catalog)
    for ratio in (planner.smallest, 0.5, 0.75, 0.9):
        model = ppcl_rt.load(made.folder, ratio)
        assert made.catalog.ratio(model.plan) <= ratio and run(model, build_inputs()).isfinite().all()


def test_flops_are_those_of_the_products(of):
    """By hand, of a dual-attention block and of the last one."""
    made, _ = of("medium")
    architecture, image, text = made.catalog.architecture, 16, 7
    both, square = image + text, DIM * DIM
    # q, k, v and output of both streams, again of the image; MLPs; modulations; two attentions.
    dual = 2 * (both * 4 * square + image * 4 * square + both * 2 * DIM * CHANNELS + (9 + 6) * square)
    dual += 4 * DIM * (both**2 + image**2)
    assert architecture.spec(0).flops(architecture.spec(0).full, image, text) == dual
    last = 2 * (image * 4 * square + text * 3 * square + image * 2 * DIM * CHANNELS + (6 + 2) * square)
    assert architecture.spec(6).flops(architecture.spec(6).full, image, text) == last + 4 * DIM * both**2


def test_saving_keeps_everything(tmp_path, of, run, same):
    made, _ = of("medium")
    rng, inputs = np.random.default_rng(3), build_inputs()
    model = ppcl_rt.load(made.folder, plan=made.random_plan(rng))
    model.set_plan(made.random_plan(rng))
    plan = model.plan
    model.save_pretrained(tmp_path / "again")
    again = ppcl_rt.Checkpoint(tmp_path / "again")
    assert set(again.names) == set(made.tensors) and again.catalog is not None
    assert all(torch.equal(again.read(name), tensor) for name, tensor in made.tensors.items())
    assert again.catalog.fingerprint == made.catalog.fingerprint
    assert torch.equal(run(ppcl_rt.load(tmp_path / "again", plan=plan), inputs), run(model, inputs))


@EACH
def test_gradient_checkpointing(variant, of, same):
    """The same output and gradients, with dense and with random plans."""
    made, _ = of(variant)
    inputs, rng = build_inputs(), np.random.default_rng(1)
    for plan in (made.catalog.dense, made.random_plan(rng), made.random_plan(rng)):
        found = []
        for on in (False, True):
            model = ppcl_rt.load(made.folder, plan=plan)
            model.requires_grad_(True)
            if on:
                model.enable_gradient_checkpointing()
            output = model(**inputs)[0]
            output.square().sum().backward()
            found.append((output.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}))
        (wanted, gradients), (got, again) = found
        same(got, wanted)
        assert gradients.keys() == again.keys() and len(gradients) > 20
        for name, gradient in gradients.items():
            same(again[name], gradient, 1e-5 * (1 + gradient.abs().max().item()))


def test_the_example_has_the_shape_that_was_asked_for(of, run):
    _, model = of("medium")
    model.set_ratio(1.0)
    with torch.no_grad():
        assert model(**model.example(ppcl_rt.Tokens(15, 9, 3)))[0].shape == (3, 4, 6, 10)


def test_attention_backends_are_those_of_diffusers(of, run, same):
    made, _ = of("medium")
    model, inputs = ppcl_rt.load(made.folder, 0.9), build_inputs()
    model.set_attention_backend("_native_math")
    backends = {block.attn.processor._attention_backend for block in model.blocks()}
    assert [backend.value for backend in backends] == ["_native_math"]
    model.set_ratio(1.0)
    assert {
        block.attn2.processor._attention_backend for block in model.blocks() if block.use_dual_attention
    } == backends
    same(run(model, inputs), run(made.stock, inputs))


class Kernels(TorchDispatchMode):
    """Counts the ops of kernels that run inside it."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "ppcl":
            self.counts[function.name()] += 1
        return function(*args, **(kwargs or {}))


# The interpreter computes the sigmoid of GELU with numpy, which warns where exp(large) is infinite, as it should be.
@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
@pytest.mark.parametrize(
    ("variant", "narrow"),
    [
        ("sd3", False),
        ("medium", True),
        pytest.param("sd3", True, marks=pytest.mark.slow),
        pytest.param("medium", False, marks=pytest.mark.slow),
    ],
)
def test_kernels_give_what_plain_torch_gives(variant, narrow, of, run, same, monkeypatch):
    """A block of each kind and a text run, on kernels (in triton's interpreter on a CPU): all of it runs on kernels."""
    made, _ = of(variant)
    catalog, inputs, rng = made.catalog, build_inputs(), np.random.default_rng(2)
    kept = sorted({*one_kind_each(catalog), 4, 5})
    widths = {n: catalog.spec(n).full for n in kept}
    if narrow:
        for n, width in widths.items():
            counts = {group: int(rng.integers(1, width[group])) for group in catalog.spec(n).unit_groups}
            widths[n] = width.replace(**counts)
    plan = catalog.compose(widths.items(), text_runs=[Interval(4, 5)] if narrow else [])
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = ppcl_rt.load(made.folder, plan=plan, device=device)
    inputs = {name: value.to(device) for name, value in inputs.items()}
    monkeypatch.setenv("PPCL_BACKEND", "torch")
    wanted = run(model, inputs)
    monkeypatch.setenv("PPCL_BACKEND", "triton")
    with Kernels() as fused:
        got = run(model, inputs)
    same(got, wanted, 2e-5)
    dual, updating = int(variant == "medium"), len(kept) - 1 - narrow
    # A last block reads the text by a norm of its own; a text run's first block is asked for its input once more.
    norms = 2 * len(kept) + dual + 2 * updating + 1 + narrow
    assert fused.counts == {
        "ppcl::ada_layer_norm": norms,
        "ppcl::qkv_projection": len(kept) + dual,
        "ppcl::joint_attention": len(kept) + dual,
        "ppcl::linear": 3 * len(kept) + dual,
    }


# What is refused.


def test_what_cannot_be_is_refused(of):
    made, model = of("medium")
    inputs = build_inputs()
    for name in ("ip_adapter_image_embeds", "ip_hidden_states"):
        with pytest.raises(ValueError, match=f"no IP-adapter is loaded: call load_ip_adapter, or leave {name} out"):
            model(**inputs, joint_attention_kwargs={name: [torch.zeros(1)]})
    with pytest.raises(ValueError, match="family sd3 do not come from the timestep alone"):
        model.precompute([500.0])
    with pytest.raises(ValueError, match="fuse_qkv_projections"):
        model.fuse_qkv_projections()
    with pytest.raises(ValueError, match="forward chunking"):
        model.enable_forward_chunking()
    for changes, wrong in (({"qk_norm": "layer_norm"}, "qk_norm"), ({"caption_projection_dim": 16}, "width 32")):
        with pytest.raises(ValueError, match=wrong):
            ppcl_rt.PPCLSD3Transformer2DModel.from_config({**made.stock.config, **changes})


def test_students_and_text_runs_stay_within_a_kind(of):
    """Block 3 follows the dual-attention blocks, block 6 does not update the text."""
    made, _ = of("medium")
    student, text_run = made.catalog.students[0], made.catalog.text_runs[0]
    content = made.catalog.model_dump()
    for pair in ((2, 3), (5, 6), (0, 6)):
        for name, choice in (("students", student), ("text_runs", text_run)):
            moved = choice.model_copy(update={"interval": Interval(*pair)}).model_dump()
            with pytest.raises(ValueError, match="more than one list or kind"):
                ppcl_rt.Catalog.model_validate({**content, name: [moved]})
    with pytest.raises(ValueError, match="wanted: heads, image, modulation"):
        width = Width(heads=HEADS, image=CHANNELS, text=CHANNELS, modulation=DIM)
        blocks = (PlannedBlock(interval=Interval(6, 6), width=width),)
        made.catalog.check(Plan(checkpoint=made.catalog.fingerprint, depth=DEPTH, blocks=blocks))
