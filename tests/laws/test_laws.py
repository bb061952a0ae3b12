"""Laws of the model: the dense plan is diffusers; any other is diffusers with something zeroed, put in or left out."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.transformers.transformer_qwenimage import QwenImageTransformerBlock
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import ppcl_rt
from ppcl_rt import Interval, Plan, PlannedBlock, Schedule, Width

HEADS, CHANNELS, DEPTH = 4, 128, 4
FULL = Width(heads=HEADS, image=CHANNELS, text=CHANNELS, modulation=32)
# Derandomised: a failure is the same one on every machine.
seeded = settings(deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(scope="module")
def everything(made):
    """All of the plain checkpoint, resident."""
    return ppcl_rt.load(made.folder, resident="all")


@pytest.fixture(scope="module")
def fitted(compensated):
    """All of the compensated checkpoint, resident."""
    return ppcl_rt.load(compensated.folder, resident="all")


# The dense plan.


@pytest.mark.parametrize("mask", ["none", "random", "scattered", "rows", "prefix"])
@pytest.mark.parametrize(("text", "image"), [(7, (1, 3, 5)), (1, (1, 1, 1)), (63, (1, 5, 13)), (2, (3, 1, 7))])
def test_dense_is_stock(made, everything, build_inputs, run, same, text, image, mask):
    """Dense plan = diffusers, at odd sizes, with any mask, also one that leaves no text."""
    inputs = build_inputs(seed=text, text=text, images=(image,), mask=mask)
    everything.set_ratio(1.0)
    assert everything.plan == made.catalog.dense
    same(run(everything, inputs), run(made.stock, inputs))


def test_mask_matters(made, build_inputs, run):
    """The masks of these tests change the output, so that ignoring one would be noticed."""
    outputs = [
        run(made.stock, {**build_inputs(seed=1), "encoder_hidden_states_mask": build_inputs(mask=mask)[key]})
        for mask in ("none", "random", "scattered", "rows")
        for key in ("encoder_hidden_states_mask",)
    ]
    for a, b in itertools.combinations(outputs, 2):
        assert (a - b).abs().max() > 1e-2


def test_integer_and_float_masks(made, everything, build_inputs, run, same):
    """A mask of ones and zeros means the same in any dtype."""
    inputs = build_inputs()
    wanted = run(made.stock, inputs)
    everything.set_ratio(1.0)
    for dtype in (torch.int64, torch.float32):
        mask = inputs["encoder_hidden_states_mask"].to(dtype)
        same(run(everything, {**inputs, "encoder_hidden_states_mask": mask}), wanted)


def test_return_dict(made, everything, build_inputs):
    """Both kinds of result are diffusers' own."""
    inputs = build_inputs()
    with torch.no_grad():
        wrapped, bare = everything(**inputs), everything(**inputs, return_dict=False)
    assert type(wrapped) is Transformer2DModelOutput and isinstance(bare, tuple) and len(bare) == 1
    assert torch.equal(wrapped.sample, bare[0])


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_dense_with_controlnet(made, everything, build_inputs, run, same, count):
    """ControlNet residuals land after the blocks that diffusers adds them after."""
    inputs = build_inputs()
    residuals = [torch.randn(3, 15, 32, generator=torch.Generator().manual_seed(n)) for n in range(count)]
    everything.set_ratio(1.0)
    got = run(everything, inputs, controlnet_block_samples=residuals)
    same(got, run(made.stock, inputs, controlnet_block_samples=residuals))
    assert (got - run(everything, inputs)).abs().max() > 1e-2


@pytest.mark.parametrize("mask", ["none", "random"])
def test_dense_edit_model(tmp_path, make_checkpoint, build_inputs, run, same, mask):
    """Qwen-Image-Edit: condition images are modulated for timestep 0 (``zero_cond_t``)."""
    made = make_checkpoint(tmp_path / "checkpoint", zero_cond_t=True)
    inputs = build_inputs(images=((1, 3, 5), (1, 2, 3)), mask=mask)
    model = ppcl_rt.load(made.folder)
    same(run(model, inputs), run(made.stock, inputs))
    plan = made.random_plan(np.random.default_rng(3))
    model.set_plan(plan)
    same(run(model, inputs), run(made.reference(plan), inputs))


def test_dense_additional_condition(tmp_path, make_checkpoint, build_inputs, run, same):
    """``use_additional_t_cond`` and layered RoPE, as Qwen-Image-Layered has them."""
    made = make_checkpoint(tmp_path / "checkpoint", use_additional_t_cond=True, use_layer3d_rope=True)
    inputs = build_inputs(images=((1, 3, 5), (1, 3, 5)))
    model, condition = ppcl_rt.load(made.folder), torch.tensor([0, 1, 1])
    got = run(model, inputs, additional_t_cond=condition)
    same(got, run(made.stock, inputs, additional_t_cond=condition))
    assert (got - run(model, inputs, additional_t_cond=1 - condition)).abs().max() > 1e-3


def test_stock_checkpoint_loads(tmp_path, build_stock, build_inputs, run, same):
    """A stock checkpoint is one whose only plan is the dense one."""
    stock, inputs = build_stock(), build_inputs()
    stock.save_pretrained(tmp_path)
    model = ppcl_rt.load(tmp_path)
    same(run(model, inputs), run(stock, inputs))
    with pytest.raises(ValueError, match="smallest"):
        model.set_ratio(0.5)


def test_built_by_hand(build_stock, build_inputs, run, same):
    """The class built from its config, with stock weights, is the stock model."""
    stock, inputs = build_stock(), build_inputs()
    model = ppcl_rt.PPCLQwenImageTransformer2DModel.from_config(stock.config).eval()
    assert list(model.state_dict()) == list(stock.state_dict())
    model.load_state_dict(stock.state_dict())
    same(run(model, inputs), run(stock, inputs))


# Narrower plans.


@settings(seeded, max_examples=25)
@given(
    widths=st.lists(
        st.builds(
            Width,
            heads=st.integers(1, HEADS),
            image=st.integers(1, CHANNELS),
            text=st.integers(1, CHANNELS),
            modulation=st.just(32),
        ),
        min_size=DEPTH,
        max_size=DEPTH,
    )
)
def test_narrow_is_stock_with_columns_zeroed(made, everything, build_inputs, run, same, widths):
    """Fewer heads and channels = diffusers with the output columns of the others zeroed; first in rank order stay."""
    inputs = build_inputs()
    stock = made.reference(made.catalog.dense)
    for n, (width, block) in enumerate(zip(widths, stock.transformer_blocks, strict=True)):
        order = {g: made.tensors[f"transformer_blocks.{n}.order.{g}"] for g in ("heads", "image", "text")}
        with torch.no_grad():
            for head in order["heads"][width["heads"] :]:
                block.attn.to_out[0].weight[:, head * 8 : head * 8 + 8] = 0
                block.attn.to_add_out.weight[:, head * 8 : head * 8 + 8] = 0
            block.img_mlp.net[2].weight[:, order["image"][width["image"] :]] = 0
            block.txt_mlp.net[2].weight[:, order["text"][width["text"] :]] = 0
    steps = (PlannedBlock(interval=Interval(n, n), width=width) for n, width in enumerate(widths))
    everything.set_plan(made.plan(*steps))
    same(run(everything, inputs), run(stock, inputs))


def test_order_matters(made, build_inputs, run):
    """What the plan keeps is not what a plain prefix would keep: the law above has teeth."""
    plan = made.plan(
        *(
            PlannedBlock(interval=Interval(n, n), width=Width(heads=2, image=64, text=64, modulation=32))
            for n in range(DEPTH)
        )
    )
    unordered = {name: tensor for name, tensor in made.tensors.items() if ".order." not in name}
    blind = type(made)(made.folder, made.stock, made.config, made.catalog, unordered)
    inputs = build_inputs()
    outputs = [run(each, inputs) for each in (made.stock, made.reference(plan), blind.reference(plan))]
    for a, b in itertools.combinations(outputs, 2):
        assert (a - b).abs().max() > 1e-2


# Students and skipped blocks.


def test_student_is_a_loop_over_stock_blocks(made, everything, build_inputs, run, same):
    """A plan with a student = diffusers' pieces called by hand, with the student's block in place of its interval's."""
    inputs, stock = build_inputs(), made.stock
    student = QwenImageTransformerBlock(32, 4, 8).eval()
    prefix = "students.1-2."
    student.load_state_dict({name: made.tensors[prefix + name] for name in student.state_dict()})
    with torch.no_grad():
        image = stock.img_in(inputs["hidden_states"])
        text = stock.txt_in(stock.txt_norm(inputs["encoder_hidden_states"]))
        temb = stock.time_text_embed(inputs["timestep"], image)
        rope = stock.pos_embed(inputs["img_shapes"], max_txt_seq_len=text.shape[1], device=image.device)
        for block in (stock.transformer_blocks[0], student, stock.transformer_blocks[3]):
            text, image = block(
                hidden_states=image,
                encoder_hidden_states=text,
                encoder_hidden_states_mask=inputs["encoder_hidden_states_mask"],
                temb=temb,
                image_rotary_emb=rope,
            )
        wanted = stock.proj_out(stock.norm_out(image, temb))
    everything.set_plan(
        made.plan(
            PlannedBlock(interval=Interval(0, 0), width=FULL),
            PlannedBlock(interval=Interval(1, 2), width=FULL, student=True),
            PlannedBlock(interval=Interval(3, 3), width=FULL),
        )
    )
    got = run(everything, inputs)
    same(got, wanted)
    assert (got - run(stock, inputs)).abs().max() > 1e-2


@pytest.mark.parametrize("kept", [(), (0,), (3,), (1, 2), (0, 2, 3)])
def test_skipped_blocks_are_left_out(made, everything, build_inputs, run, same, kept):
    """A plan that skips blocks = the stock model without them; no block at all is a plan, too."""
    plan = made.plan(*(PlannedBlock(interval=Interval(n, n), width=FULL) for n in kept))
    assert set(plan.skipped) == set(range(DEPTH)) - set(kept)
    stock = made.reference(made.catalog.dense)
    stock.transformer_blocks = torch.nn.ModuleList([stock.transformer_blocks[n] for n in kept])
    everything.set_plan(plan)
    inputs = build_inputs()
    same(run(everything, inputs), run(stock, inputs))


def test_controlnet_keeps_original_numbers(made, everything, build_inputs, run, same):
    """Residuals are spread over the original blocks, whatever the plan makes of these."""
    inputs, stock = build_inputs(), made.stock
    residuals = [torch.randn(3, 15, 32, generator=torch.Generator().manual_seed(n)) for n in range(2)]
    plan = made.plan(
        PlannedBlock(interval=Interval(1, 2), width=FULL, student=True),
        PlannedBlock(interval=Interval(3, 3), width=Width(heads=2, image=50, text=31, modulation=32)),
    )
    student, last = map(made.reference_block, plan.blocks)
    with torch.no_grad():
        image = stock.img_in(inputs["hidden_states"])
        text = stock.txt_in(stock.txt_norm(inputs["encoder_hidden_states"]))
        temb = stock.time_text_embed(inputs["timestep"], image)
        rope = stock.pos_embed(inputs["img_shapes"], max_txt_seq_len=text.shape[1], device=image.device)
        mask = inputs["encoder_hidden_states_mask"]
        # Four blocks, two residuals: the first is of blocks 0 and 1, the second of 2 and 3.
        image = image + residuals[0]
        text, image = student(image, text, mask, temb, rope)
        image = image + residuals[0] + residuals[1]
        text, image = last(image, text, mask, temb, rope)
        wanted = stock.proj_out(stock.norm_out(image + residuals[1], temb))
    everything.set_plan(plan)
    same(run(everything, inputs, controlnet_block_samples=residuals), wanted)


# Any plan.


def test_two_hundred_plans_from_one_model(made, everything, build_inputs, run, same):
    """Random students, skips and widths, also counts that no catalog lists: all run; every tenth is checked in full."""
    rng, inputs = np.random.default_rng(7), build_inputs()
    plans = {made.random_plan(rng, skip=0.2): None for _ in range(200)}
    assert len(plans) == 200
    for n, plan in enumerate(plans):
        everything.set_plan(plan)
        got = run(everything, inputs)
        assert torch.isfinite(got).all()
        if n % 10 == 0:
            same(got, run(made.reference(plan), inputs))


@pytest.mark.parametrize("kind", ["made", "compensated"])
def test_n_plans_equal_n_models(kind, request, build_inputs, run, same):
    """n plans of one resident model = n models loaded at one plan each, whatever the order of switching."""
    made = request.getfixturevalue(kind)
    rng, inputs = np.random.default_rng(11), build_inputs()
    plans = [made.random_plan(rng, legal=legal) for legal in (True, False) * 3]
    alone = []
    for plan in plans:
        model = ppcl_rt.load(made.folder, plan=plan)
        assert model.plan == plan
        alone.append(run(model, inputs))
    model = ppcl_rt.load(made.folder, resident="all")
    for n in [*range(6), *rng.permutation(6), *rng.permutation(6)]:
        model.set_plan(plans[n])
        same(run(model, inputs), alone[n])
    for a, b in itertools.combinations(alone, 2):
        assert (a - b).abs().max() > 1e-3


@pytest.mark.parametrize("kind", ["made", "compensated"])
def test_growing(kind, request, build_inputs, run, same):
    """Loaded small and grown plan by plan = loaded whole, in any order; grown to ratio 1 = diffusers."""
    made = request.getfixturevalue(kind)
    rng, inputs = np.random.default_rng(13), build_inputs()
    plans = [made.random_plan(rng, legal=legal) for legal in (True, False) * 3]
    for order in (plans, plans[::-1]):
        model = ppcl_rt.load(made.folder, ratio=0.6)
        for plan in order:
            model.set_plan(plan)
            same(run(model, inputs), run(made.reference(plan), inputs))
        model.set_ratio(1.0)
        same(run(model, inputs), run(made.stock, inputs))
        # What was set before still means the same in the grown model.
        for plan in order:
            model.set_plan(plan)
            same(run(model, inputs), run(made.reference(plan), inputs))


# Linear maps and modulations of a low rank.


def test_maps_and_low_ranks_by_the_law(mapped, build_inputs, run, same):
    """A map in place of an MLP is ``g + l(g)``; a rank is a prefix of two factors: against diffusers' blocks with
    gate 1 and an MLP that sees the stream, and with the factors' product for a modulation."""
    model, inputs = ppcl_rt.load(mapped.folder, resident="all"), build_inputs()
    for width in (
        FULL.replace(image=0),
        FULL.replace(text=0),
        FULL.replace(modulation=7),
        FULL.replace(modulation=3),
        Width(heads=2, image=0, text=0, modulation=1),
        Width(heads=3, image=50, text=0, modulation=5),
    ):
        steps = [PlannedBlock(interval=Interval(n, n), width=width) for n in range(1, 3)]
        plan = mapped.plan(
            PlannedBlock(interval=Interval(0, 0), width=FULL), *steps, PlannedBlock(interval=Interval(3, 3), width=FULL)
        )
        model.set_plan(plan)
        got = run(model, inputs)
        same(got, run(mapped.reference(plan), inputs), tolerance=2e-5)
        assert (got - run(mapped.stock, inputs)).abs().max() > 1e-2


@settings(seeded, max_examples=8)
@given(seed=st.integers(0, 10**6))
def test_random_plans_with_maps_grow_and_count_what_they_hold(seed, mapped, build_inputs, run, same):
    """In any order of plans, weights that come later leave what was there right; a lone plan holds what it counts."""
    rng, inputs, model = np.random.default_rng(seed), build_inputs(), None
    for legal in (True, False, True):
        plan = mapped.random_plan(rng, legal=legal)
        if model is None:
            model = ppcl_rt.load(mapped.folder, plan=plan)
            assert sum(p.numel() for p in model.parameters()) == mapped.catalog.architecture.params(plan)
        model.set_plan(plan)
        same(run(model, inputs), run(mapped.reference(plan), inputs), tolerance=2e-5)


@pytest.mark.parametrize("runs", [[(0, 1)], [(0, 2)], [(2, 3)], [(0, 1), (2, 3)], [(1, 2)]])
def test_text_runs_by_the_law(runs, mapped, build_inputs, run, same):
    """Blocks of a text run read ``z + l(z)`` of its first block's input and do not update the text. After the run one
    map brings the text up to date. Compared with diffusers' blocks with gates 0 and hooks, at any width."""
    inputs = build_inputs()
    for width in (FULL, Width(heads=2, image=50, text=31, modulation=5)):
        kept = [(n, width) for n in range(DEPTH)]
        plan = mapped.catalog.compose(kept, text_runs=[Interval(*pair) for pair in runs])
        model = ppcl_rt.load(mapped.folder, plan=plan)
        assert sum(p.numel() for p in model.parameters()) == mapped.catalog.architecture.params(plan)
        got = run(model, inputs)
        same(got, run(mapped.reference(plan), inputs), tolerance=2e-5)
        without = run(mapped.reference(mapped.catalog.compose(kept)), inputs)
        assert (got - without).abs().max() > 1e-3
        # Grown to the whole model, and back.
        model.set_ratio(1.0)
        same(run(model, inputs), run(mapped.stock, inputs))
        model.set_plan(plan)
        same(run(model, inputs), got)


def test_text_runs_that_are_not_there_are_refused(mapped):
    kept = [(n, FULL) for n in range(DEPTH)]
    with pytest.raises(ValueError, match=r"no text run over 1\.\.3"):
        mapped.catalog.check(mapped.catalog.compose(kept, text_runs=[Interval(1, 3)]))
    for runs, wrong in (([Interval(0, 1), Interval(1, 2)], "overlaps"), ([Interval(2, 2)], "two or more")):
        with pytest.raises(ValueError, match=wrong):
            Plan.of("x", DEPTH, kept, text_runs=runs)
    student = PlannedBlock(interval=Interval(0, 1), width=FULL, student=True)
    with pytest.raises(ValueError, match="blocks of the teacher"):
        Plan.of("x", DEPTH, kept[2:], [student], text_runs=[Interval(1, 2)])


def test_maps_survive_saving(tmp_path, mapped):
    """A model that was grown from a small plan saves the whole checkpoint."""
    rng = np.random.default_rng(3)
    model = ppcl_rt.load(mapped.folder, plan=mapped.random_plan(rng, legal=True))
    model.set_plan(mapped.random_plan(rng, legal=True))
    model.save_pretrained(tmp_path / "again")
    again = ppcl_rt.Checkpoint(tmp_path / "again")
    assert set(again.names) == set(mapped.tensors)
    assert all(torch.equal(again.read(name), tensor) for name, tensor in mapped.tensors.items())


@pytest.mark.parametrize(("rank", "wrong"), [(8, "up to 7"), (31, "up to 7")])
def test_ranks_that_are_not_there_are_refused(mapped, rank, wrong):
    width = Width(heads=2, image=96, text=31, modulation=rank)
    with pytest.raises(ValueError, match=wrong):
        mapped.catalog.check(mapped.plan(PlannedBlock(interval=Interval(1, 1), width=width)))


def test_maps_that_are_not_there_are_refused(made):
    for width in (FULL.replace(image=0), FULL.replace(text=0)):
        with pytest.raises(ValueError, match="no linear map"):
            made.catalog.check(made.plan(PlannedBlock(interval=Interval(1, 1), width=width)))


# Compensated outputs.


def test_compensated_layers_are_used(compensated, fitted, build_inputs, run, same):
    """At a catalog's count the fitted layer runs, at any other a prefix of the full one."""
    inputs = build_inputs()
    for width in (
        Width(heads=2, image=96, text=31, modulation=32),
        Width(heads=4, image=50, text=64, modulation=32),
        Width(heads=1, image=17, text=128, modulation=32),
        Width(heads=3, image=97, text=64, modulation=32),
        Width(heads=2, image=18, text=30, modulation=32),
    ):
        plan = compensated.plan(*(PlannedBlock(interval=Interval(n, n), width=width) for n in range(DEPTH)))
        fitted.set_plan(plan)
        same(run(fitted, inputs), run(compensated.reference(plan), inputs))


def test_compensated_block_by_hand(compensated, fitted, build_inputs):
    """The image MLP at a fitted count is ``gelu(x U[order]^T + u[order]) N^T + n``, N and n from the checkpoint."""
    key, count = "transformer_blocks.2.", 50
    plan = compensated.plan(PlannedBlock(interval=Interval(2, 2), width=FULL.replace(image=count)))
    fitted.set_plan(plan)
    block = fitted.transformer_blocks[2]
    seen = []
    handle = block.replacements[f"mlp_image_{count}"].register_forward_hook(
        lambda _m, args, out: seen.append((args[0], out))
    )
    inner = []
    other = block.img_mlp.net[0].proj.register_forward_hook(lambda _m, args, _o: inner.append(args[0]))
    with torch.no_grad():
        fitted(**build_inputs())
    handle.remove()
    other.remove()
    order = compensated.tensors[key + "order.image"][:count]
    up, bias = (compensated.tensors[f"{key}img_mlp.net.0.proj.{part}"][order] for part in ("weight", "bias"))
    hidden = torch.nn.functional.gelu(inner[0] @ up.T + bias, approximate="tanh")
    narrow = f"{key}replacements.mlp_image_{count}"
    wanted = hidden @ compensated.tensors[f"{narrow}.weight"].T + compensated.tensors[f"{narrow}.bias"]
    # 128 terms of size 1 summed in another order, float32.
    torch.testing.assert_close(seen[0][1], wanted, rtol=1e-5, atol=1e-5)


# Plain data.


@st.composite
def plans(draw):
    depth = draw(st.integers(1, 12))
    blocks, block = [], 0
    while block < depth:
        last = draw(st.integers(block, min(block + 3, depth - 1)))
        kind = draw(st.sampled_from(["skip", "teacher", "student"]))
        if kind != "skip":
            last = last if kind == "student" else block
            width = Width({group: draw(st.integers(1, 20000)) for group in FULL})
            blocks.append(PlannedBlock(interval=Interval(block, last), width=width, student=kind == "student"))
        block = last + 1
    return Plan(checkpoint=draw(st.text(max_size=20)), depth=depth, blocks=tuple(blocks))


@settings(seeded, max_examples=100)
@given(plan=plans())
def test_plan_json_round_trip(plan):
    """Plan -> JSON -> plan changes nothing, hash and types included."""
    back = Plan.from_json(plan.to_json())
    assert back == plan and hash(back) == hash(plan)
    assert all(type(planned.width) is Width and type(planned.interval) is Interval for planned in back.blocks)
    assert Plan.from_json(plan.to_json().encode()) == plan


@settings(seeded, max_examples=50)
@given(
    losses=st.lists(st.floats(0, 1e300, exclude_min=True), min_size=6, max_size=6),
    outer=st.integers(0, 10**15),
    task=st.none() | st.dictionaries(st.text(), st.integers() | st.text() | st.lists(st.floats(0, 1))),
)
def test_catalog_json_round_trip(losses, outer, task):
    """Catalog -> JSON -> catalog changes nothing, not even the last bit of a loss."""
    widths = [
        ppcl_rt.LegalWidths(
            heads=((4, 0.0), (2, losses[n])),
            image=((128, 0.0), (9, losses[n + 1])),
            text=((128, 0.0), (5, losses[n + 2])),
            modulation=((32, 0.0),),
        )
        for n in range(2)
    ]
    student = ppcl_rt.Student(interval=Interval(0, 1), start="last", loss=losses[5], widths=widths[0])
    catalog = ppcl_rt.Catalog(
        family="qwen-image",
        reference=ppcl_rt.Tokens(16, 7),
        architecture=ppcl_rt.PPCLQwenImageTransformer2DModel.architecture_of(
            {"num_layers": 2, "num_attention_heads": HEADS, "attention_head_dim": 8}, outer
        ),
        blocks=tuple(widths),
        students=(student,),
        checksums={"a": "0", "b": "1"},
        task=task,
    )
    back = ppcl_rt.Catalog.model_validate_json(catalog.model_dump_json())
    assert back == catalog and back.fingerprint == catalog.fingerprint and back.dense == catalog.dense


def test_fingerprint_names_the_weights(tmp_path, make_checkpoint):
    """Equal weights have one name, however they are split into files; one number changed is another name."""
    first = make_checkpoint(tmp_path / "a").catalog.fingerprint
    assert first == make_checkpoint(tmp_path / "b", max_shard_size=100_000).catalog.fingerprint

    def nudge(_config, tensors):
        tensors["proj_out.bias"][0] += 1

    assert first != make_checkpoint(tmp_path / "c", edit=nudge).catalog.fingerprint


def test_loss_is_the_sum_of_choices(made):
    """Predicted loss: 0 for dense, sums of single losses else, NaN for what was not measured."""
    catalog = made.catalog
    assert catalog.loss(catalog.dense) == 0 and catalog.ratio(catalog.dense) == 1
    student = catalog.student(Interval(0, 1))
    plan = made.plan(
        PlannedBlock(
            interval=Interval(0, 1), width=Width(heads=2, image=CHANNELS, text=64, modulation=32), student=True
        ),
        PlannedBlock(interval=Interval(2, 2), width=FULL.replace(image=17)),
        PlannedBlock(interval=Interval(3, 3), width=FULL),
    )
    of_student = student.widths.of("heads")[2].loss + student.widths.of("text")[2].loss
    wanted = student.loss + of_student + catalog.blocks[2].of("image")[3].loss
    assert catalog.loss(plan) == pytest.approx(wanted, rel=1e-12)
    assert np.isnan(catalog.loss(made.plan(*plan.blocks[1:])))
    odd = PlannedBlock(interval=Interval(3, 3), width=FULL.replace(image=18))
    assert np.isnan(catalog.loss(made.plan(*plan.blocks[:2], odd)))


def test_schedule(made):
    """Phases last until the next begins; a schedule that cannot be is refused."""
    dense = made.catalog.dense
    warm = Schedule.warm(dense_steps=2, ratio=0.5)
    assert [warm.at(step) for step in range(5)] == [1.0, 1.0, 0.5, 0.5, 0.5]
    assert Schedule.warm(dense_steps=0, ratio=0.5) == Schedule.constant(0.5)
    assert Schedule.constant(dense).at(99) == dense
    mixed = Schedule(phases=((0, 0.7), (1, dense), (9, 1.0)))
    assert Schedule.model_validate_json(mixed.model_dump_json()) == mixed
    assert [mixed.at(step) for step in (0, 1, 8, 9)] == [0.7, dense, dense, 1.0]
    for phases in ((), ((1, 0.5),), ((0, 0.5), (0, 0.7)), ((0, 0.5), (4, 0.7), (3, 1.0)), ((0, 0.0),), ((0, 1.5),)):
        with pytest.raises(ValueError):
            Schedule(phases=phases)
    for steps, ratio in ((-1, 0.5), (2, float("nan")), (2, "half")):
        with pytest.raises(ValueError):
            Schedule.warm(dense_steps=steps, ratio=ratio)
