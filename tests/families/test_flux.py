"""FLUX.1: the laws of a model (`tests/laws`), for double and single blocks."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import FluxPipeline, FluxTransformer2DModel
from random_checkpoint import RandomCheckpoint
from tiny_flux import CONFIG, DIM, DOUBLE, HEADS, SINGLE, build_inputs, build_stock, pipeline_parts

import ppcl_rt
from ppcl_rt import Interval, PlannedBlock, Width
from ppcl_rt.families.flux import (
    PPCLFluxSingleTransformerBlock,
    PPCLFluxTransformer2DModel,
    PPCLFluxTransformerBlock,
)

# The interpreter computes the sigmoid of GELU with numpy, which warns where exp(large) is infinite, as it should be.
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")

# Some counts (50, 31, 17) that no tile divides; 0 is the linear map.
COUNTS = {
    "double": {"heads": (3, 1), "image": (50, 17, 0), "text": (64, 31, 0), "modulation": (7, 5, 1)},
    "single": {"heads": (3, 2), "mlp": (100, 31, 0), "modulation": (7, 3)},
}
FULL = {"double": Width(heads=4, image=128, text=128, modulation=32), "single": Width(heads=4, mlp=128, modulation=32)}


def residuals(count, seed=0):
    return [torch.randn(2, 15, DIM, generator=torch.Generator().manual_seed(seed + n)) for n in range(count)]


def kept(number, **counts):
    """One block of the teacher, full but for some counts."""
    full = FULL["double" if number < DOUBLE else "single"]
    return PlannedBlock(interval=Interval(number, number), width=full.replace(**counts))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Students, maps, low ranks, text runs, and compensated outputs."""
    return RandomCheckpoint.make(
        tmp_path_factory.mktemp("flux") / "checkpoint",
        PPCLFluxTransformer2DModel,
        build_stock(),
        COUNTS,
        students=((0, 1), (3, 4), (5, 5)),
        text_runs=((0, 1), (0, 2), (1, 2)),
        compensated=True,
    )


@pytest.fixture(scope="module")
def everything(made):
    return ppcl_rt.load(made.folder, resident="all")


# The dense plan.


@pytest.mark.parametrize(
    ("batch", "text", "rows", "columns"), [(2, 7, 3, 5), (1, 1, 1, 1), (2, 63, 5, 13), (3, 2, 7, 1)]
)
@pytest.mark.parametrize("guided", [True, False])
def test_dense_is_stock(tmp_path, run, same, guided, batch, text, rows, columns):
    """At odd sizes, with and without an embedding of guidance."""
    stock = build_stock(guidance_embeds=guided)
    stock.save_pretrained(tmp_path)
    model, inputs = ppcl_rt.load(tmp_path), build_inputs(text, batch, text, rows, columns, guided)
    assert type(model) is PPCLFluxTransformer2DModel and model.plan == model.catalog.dense
    assert model.catalog.architecture.dense_params == sum(p.numel() for p in stock.parameters())
    same(run(model, inputs), run(stock, inputs))


def test_every_input_matters(made, everything, run, same):
    """Positions, guidance and pooled text change the output: a model that ignored one would be noticed."""
    everything.set_ratio(1.0)
    inputs = build_inputs()
    wanted = run(everything, inputs)
    same(wanted, run(made.stock, inputs))
    for name in ("img_ids", "txt_ids", "guidance", "pooled_projections", "timestep"):
        rising = torch.arange(inputs[name].numel()).reshape(inputs[name].shape)
        moved = {**inputs, name: inputs[name] * 0.5 + 0.1 * rising}
        same(run(everything, moved), run(made.stock, moved))
        assert (run(everything, moved) - wanted).abs().max() > 1e-3, name
    batched = {**inputs, **{name: inputs[name].expand(2, -1, -1) for name in ("img_ids", "txt_ids")}}
    same(run(everything, batched), wanted)


@pytest.mark.parametrize("repeat", [False, True])
@pytest.mark.parametrize(("double", "single"), [(1, 3), (2, 2), (3, 1), (2, 0), (0, 2)])
def test_dense_with_controlnet(made, everything, run, same, double, single, repeat):
    inputs, more = build_inputs(), {"controlnet_blocks_repeat": repeat}
    for name, count in (("controlnet_block_samples", double), ("controlnet_single_block_samples", single)):
        more[name] = residuals(count, count) if count else None
    everything.set_ratio(1.0)
    got = run(everything, inputs, **more)
    same(got, run(made.stock, inputs, **more))
    assert (got - run(everything, inputs)).abs().max() > 1e-2


def test_built_by_hand(run, same):
    stock = build_stock()
    model = PPCLFluxTransformer2DModel.from_config(stock.config).eval()
    assert list(model.state_dict()) == list(stock.state_dict())
    model.load_state_dict(stock.state_dict())
    same(run(model, build_inputs()), run(stock, build_inputs()))
    text = build_inputs()["encoder_hidden_states"]
    assert model.example(ppcl_rt.Tokens(15, 7, 2))["encoder_hidden_states"].shape == text.shape
    with torch.no_grad():
        assert model(**model.example(ppcl_rt.Tokens(15, 7, 2)))[0].shape == (2, 15, 16)


# Narrower plans.


@pytest.mark.parametrize("seed", range(3))
def test_narrow_is_stock_with_columns_zeroed(tmp_path_factory, run, same, seed):
    """Fewer heads and channels = diffusers with the output columns of the others zeroed; first in rank order stay."""
    rng = np.random.default_rng(seed)
    counts = {kind: {**groups, "modulation": ()} for kind, groups in COUNTS.items()}
    folder, stock = tmp_path_factory.mktemp("plain") / "checkpoint", build_stock(seed)
    plain = RandomCheckpoint.make(folder, PPCLFluxTransformer2DModel, stock, counts, seed=seed)
    model, inputs = ppcl_rt.load(plain.folder, resident="all" if seed % 2 else "plan"), build_inputs(seed)
    blocks = [
        kept(n, **{g: int(rng.integers(1, full + 1)) for g, full in FULL[kind].items() if g != "modulation"})
        for n, kind in enumerate(["double"] * DOUBLE + ["single"] * SINGLE)
    ]
    for plan in (plain.plan(*blocks), plain.plan(*blocks[1:]), plain.dense_but(blocks[0], blocks[4])):
        model.set_plan(plan)
        got = run(model, inputs)
        same(got, run(plain.reference(plan), inputs))
        assert (got - run(plain.stock, inputs)).abs().max() > 1e-2
        # Alone, a plan holds what it counts.
        alone = ppcl_rt.load(plain.folder, plan=plan)
        assert sum(p.numel() for p in alone.parameters()) == plain.catalog.architecture.params(plan)
        same(run(alone, inputs), got)


@pytest.mark.parametrize("replaced", [{"heads": 2}, {"mlp": 31}, {"heads": 3, "mlp": 100}, {"heads": 2, "mlp": 50}])
def test_a_layer_that_serves_two_groups_is_compensated_for_each(made, everything, run, same, replaced):
    """Replacements of heads and of channels, one of them, both (then only the bias of the layer itself is left)."""
    plan, inputs = made.dense_but(*(kept(n, **replaced) for n in (3, 4, 5))), build_inputs()
    wanted = run(made.reference(plan), inputs)
    everything.set_plan(plan)
    same(run(everything, inputs), wanted)
    same(run(ppcl_rt.load(made.folder, plan=plan), inputs), wanted)
    # Through modules, as adapters and hooks need them.
    seen = []
    handle = everything.single_transformer_blocks[1].proj_out.register_forward_hook(lambda *args: seen.append(args))
    same(run(everything, inputs), wanted)
    handle.remove()
    assert len(seen) == 1


def test_students_of_both_lists_by_hand(made, everything, run, same):
    """diffusers' pieces called by hand, with the students' blocks in place of their intervals'."""
    inputs, stock = build_inputs(), made.stock
    students = [
        PlannedBlock(interval=Interval(0, 1), width=FULL["double"], student=True),
        PlannedBlock(interval=Interval(3, 4), width=FULL["single"], student=True),
    ]
    double, single = map(made.block, students)
    with torch.no_grad():
        image, text, temb, rope = begun(stock, inputs)
        for block in (double, stock.transformer_blocks[2], single, stock.single_transformer_blocks[2]):
            text, image = block(hidden_states=image, encoder_hidden_states=text, temb=temb, image_rotary_emb=rope)
        wanted = stock.proj_out(stock.norm_out(image, temb))
    everything.set_plan(made.dense_but(*students))
    got = run(everything, inputs)
    same(got, wanted)
    assert (got - run(stock, inputs)).abs().max() > 1e-2


def test_controlnet_keeps_original_numbers(made, everything, run, same):
    """A student takes the residuals of all its blocks, a skipped block its own."""
    inputs, stock = build_inputs(), made.stock
    double, single = residuals(2), residuals(3, 10)
    students = [
        PlannedBlock(interval=Interval(0, 1), width=FULL["double"], student=True),
        PlannedBlock(interval=Interval(3, 4), width=FULL["single"], student=True),
    ]
    first, last = map(made.block, students)
    for repeat in (False, True):
        with torch.no_grad():
            image, text, temb, rope = begun(stock, inputs)
            text, image = first(hidden_states=image, encoder_hidden_states=text, temb=temb, image_rotary_emb=rope)
            # Three blocks, two residuals: 0 0 1, or, going round, 0 1 0. Block 2 is skipped.
            image = image + double[0] + double[int(repeat)]
            image = image + double[int(not repeat)]
            text, image = last(hidden_states=image, encoder_hidden_states=text, temb=temb, image_rotary_emb=rope)
            image = image + single[0] + single[1] + single[2]
            wanted = stock.proj_out(stock.norm_out(image, temb))
        everything.set_plan(made.plan(*students))
        more = {"controlnet_block_samples": double, "controlnet_single_block_samples": single}
        same(run(everything, inputs, **more, controlnet_blocks_repeat=repeat), wanted)


def begun(stock, inputs):
    """What enters diffusers' first block: both streams, the condition, rotations."""
    image, text = stock.x_embedder(inputs["hidden_states"]), stock.context_embedder(inputs["encoder_hidden_states"])
    temb = stock.time_text_embed(inputs["timestep"] * 1000, inputs["guidance"] * 1000, inputs["pooled_projections"])
    return image, text, temb, stock.pos_embed(torch.cat([inputs["txt_ids"], inputs["img_ids"]]))


def mapped(made, name, x):
    return F.linear(x, made.tensors[f"{name}.weight"], made.tensors.get(f"{name}.bias"))


def double_by_hand(made, planned, image, text, temb, rope, read=None):
    """A double block in plain steps: linear maps where counts are 0; with ``read`` the text is not updated."""
    block, prefix = made.block(planned), made.prefix(planned)
    image_normed, image_gate, *image_mlp = block.norm1(image, emb=temb)
    text_normed, text_gate, *text_mlp = block.norm1_context(text, emb=temb)
    attended = block.attn(image_normed, text_normed if read is None else read, image_rotary_emb=rope)

    def after(x, stream, gate, attention, norm, mlp, modulations):
        x = x + gate[:, None] * attention
        if planned.width[stream] == 0:
            return x + mapped(made, f"{prefix}replacements.mlp_{stream}_0", x)
        shift, scale, gate = modulations
        return x + gate[:, None] * mlp(norm(x) * (1 + scale[:, None]) + shift[:, None])

    image = after(image, "image", image_gate, attended[0], block.norm2, block.ff, image_mlp)
    if read is None:
        text = after(text, "text", text_gate, attended[1], block.norm2_context, block.ff_context, text_mlp)
    return text, image, text_normed


def single_by_hand(made, planned, image, text, temb, rope):
    """A single block in plain steps, whose MLP a linear map stands in for."""
    block, joint = made.block(planned), torch.cat([text, image], 1)
    normed, gate = block.norm(joint, emb=temb)
    attended = block.attn(normed, image_rotary_emb=rope)
    joint = joint + gate[:, None] * F.linear(attended, block.proj_out.weight[:, :DIM], block.proj_out.bias)
    joint = joint + mapped(made, f"{made.prefix(planned)}replacements.out_mlp_0", joint)
    return joint[:, : text.shape[1]], joint[:, text.shape[1] :]


@pytest.mark.parametrize("counts", [{"image": 0}, {"text": 0}, {"image": 0, "text": 0, "heads": 3, "modulation": 5}])
def test_linear_maps_by_hand(made, everything, run, same, counts):
    """``x + l(x)`` in place of an MLP: of either stream of a double block, and of a single block."""
    inputs, stock = build_inputs(), made.stock
    double, single = kept(1, **counts), kept(4, mlp=0, heads=counts.get("heads", HEADS))
    with torch.no_grad():
        image, text, temb, rope = begun(stock, inputs)
        for n, block in enumerate((*stock.transformer_blocks, *stock.single_transformer_blocks)):
            if n == 1:
                text, image, _ = double_by_hand(made, double, image, text, temb, rope)
            elif n == 4:
                text, image = single_by_hand(made, single, image, text, temb, rope)
            else:
                text, image = block(hidden_states=image, encoder_hidden_states=text, temb=temb, image_rotary_emb=rope)
        wanted = stock.proj_out(stock.norm_out(image, temb))
    everything.set_plan(made.dense_but(double, single))
    got = run(everything, inputs)
    # Weights of maps of size 0.2: outputs are larger than 1.
    same(got, wanted, 2e-5)
    assert (got - run(stock, inputs)).abs().max() > 1e-2


@pytest.mark.parametrize("runs", [[(0, 1)], [(0, 2)], [(1, 2)]])
def test_text_runs_by_hand(made, run, same, runs):
    """Later blocks of a run read ``z + l(z)`` of what its first block read and leave the text as it was. Single blocks
    read the text, so a run that ends with the last double block has a map after it as well."""
    inputs, stock = build_inputs(), made.stock
    [(first, last)] = runs
    path, anchor = f"text_runs.{first}-{last}", torch.tensor(torch.nan)
    with torch.no_grad():
        image, text, temb, rope = begun(stock, inputs)
        for n in range(DOUBLE):
            read = anchor + mapped(made, f"{path}.z_{n}", anchor) if first < n <= last else None
            text, image, normed = double_by_hand(made, kept(n), image, text, temb, rope, read)
            if n == first:
                anchor = normed
            if n == last:
                text = text + mapped(made, f"{path}.text", text)
        for block in stock.single_transformer_blocks:
            text, image = block(hidden_states=image, encoder_hidden_states=text, temb=temb, image_rotary_emb=rope)
        wanted = stock.proj_out(stock.norm_out(image, temb))
    plan = made.dense_but(text_runs=runs)
    assert made.catalog.architecture.run_maps(Interval(first, last))[-1] == "text"
    model = ppcl_rt.load(made.folder, plan=plan)
    assert sum(p.numel() for p in model.parameters()) == made.catalog.architecture.params(plan)
    got = run(model, inputs)
    same(got, wanted, 2e-5)
    assert (got - run(stock, inputs)).abs().max() > 1e-2


def test_runs_and_students_stay_in_their_list(made):
    """No single block can leave the text as it was, and nothing reaches from one list into the next."""
    dump = made.catalog.model_dump()
    for field, interval, wrong in (
        ("text_runs", Interval(3, 4), "cannot leave the text"),
        ("text_runs", Interval(2, 3), "more than one list or kind"),
        ("students", Interval(2, 3), "more than one list or kind"),
    ):
        choice = getattr(made.catalog, field)[0].model_copy(update={"interval": interval}).model_dump()
        with pytest.raises(ValueError, match=wrong):
            ppcl_rt.Catalog.model_validate({**dump, field: [choice]})


# Any plan.


def test_two_hundred_plans_from_one_model(made, everything, run, same):
    """Random students, skips, widths, maps and text runs: all run; each tenth without maps is checked in full."""
    rng, inputs = np.random.default_rng(7), build_inputs()
    plans = {made.random_plan(rng, maps=n % 10 > 0): n for n in range(200)}
    assert len(plans) == 200 and any(plan.text_runs for plan in plans)
    for plan, n in plans.items():
        made.catalog.check(plan)
        everything.set_plan(plan)
        got = run(everything, inputs)
        assert torch.isfinite(got).all()
        if n % 10 == 0:
            same(got, run(made.reference(plan), inputs), 2e-5)


def test_growing_and_n_models(made, run, same):
    """n plans of one model that grows from plan to plan = n models loaded at one plan each; at ratio 1, diffusers."""
    rng, inputs = np.random.default_rng(11), build_inputs()
    plans = [made.random_plan(rng) for _ in range(6)]
    alone = [run(ppcl_rt.load(made.folder, plan=plan), inputs) for plan in plans]
    model = ppcl_rt.load(made.folder, plan=plans[0])
    for n in [*range(6), *rng.permutation(6)]:
        model.set_plan(plans[n])
        same(run(model, inputs), alone[n], 2e-5)
    model.set_ratio(1.0)
    same(run(model, inputs), run(made.stock, inputs))
    for a, b in itertools.combinations(alone, 2):
        assert (a - b).abs().max() > 1e-3


def test_planner_keeps_its_budget(made, run):
    model = ppcl_rt.load(made.folder)
    for ratio in (model.planner.smallest, 0.3, 0.5, 0.8):
        model.set_ratio(ratio)
        assert made.catalog.ratio(model.plan) <= ratio
        assert run(model, build_inputs()).isfinite().all()


@pytest.mark.parametrize("seed", [0, 1])
def test_both_backends(made, run, same, monkeypatch, seed):
    """Kernels, on a CPU in triton's interpreter, give what plain torch gives."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = ppcl_rt.load(made.folder, device=device)
    of_one_count = made.dense_but(kept(3, heads=2))
    model.set_plan(made.random_plan(np.random.default_rng(seed), skip=0.5) if seed else of_one_count)
    inputs = {n: v.to(device) for n, v in build_inputs(seed).items()}
    outputs = []
    for backend in ("torch", "triton"):
        monkeypatch.setenv("PPCL_BACKEND", backend)
        outputs.append(run(model, inputs))
    assert not torch.equal(*outputs)
    # float32 sums in another order.
    same(*outputs, 2e-5)


# Inside diffusers.


def test_saving_and_the_stock_class(tmp_path, made, run):
    """A model that was grown from a small plan saves the whole checkpoint; diffusers' class loads the teacher of it."""
    rng = np.random.default_rng(3)
    model = ppcl_rt.load(made.folder, plan=made.random_plan(rng))
    model.set_plan(made.random_plan(rng))
    model.save_pretrained(tmp_path / "again")
    again = ppcl_rt.Checkpoint(tmp_path / "again")
    assert set(again.names) == set(made.tensors)
    assert all(torch.equal(again.read(name), tensor) for name, tensor in made.tensors.items())
    stock, info = FluxTransformer2DModel.from_pretrained(tmp_path / "again", output_loading_info=True)
    assert not info["missing_keys"] and not info["mismatched_keys"]
    assert torch.equal(run(stock, build_inputs()), run(made.stock, build_inputs()))
    loaded = PPCLFluxTransformer2DModel.from_pretrained(tmp_path / "again", ratio=0.5)
    assert made.catalog.ratio(loaded.plan) <= 0.5


def test_gradients_and_checkpointing(made):
    """Gradients of every parameter are those of diffusers, with gradient checkpointing as without."""
    inputs, gradients = build_inputs(), []
    for checkpointing in (None, False, True):
        model = build_stock() if checkpointing is None else ppcl_rt.load(made.folder)
        model.train().requires_grad_(True)
        if checkpointing:
            model.enable_gradient_checkpointing()
        model(**inputs, return_dict=False)[0].square().sum().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    stock, plain, checkpointed = gradients
    assert plain.keys() == stock.keys() == checkpointed.keys() and len(stock) > 100
    for name, gradient in plain.items():
        assert torch.equal(checkpointed[name], gradient), name
        # Ours lie in rank order, which moves rows and columns and leaves the norm.
        torch.testing.assert_close(gradient.norm(), stock[name].norm(), rtol=1e-4, atol=1e-5)


def test_what_is_refused(made, everything):
    inputs = build_inputs()
    for name in ("ip_adapter_image_embeds", "ip_hidden_states", "ip_adapter_masks"):
        with pytest.raises(ValueError, match="no IP-adapter is loaded: call load_ip_adapter, or leave"):
            everything(**inputs, joint_attention_kwargs={name: [torch.zeros(1)], "scale": 1.0})
    with pytest.raises(ValueError, match="take scale and an IP-adapter's here, not attention_mask"):
        everything(**inputs, joint_attention_kwargs={"attention_mask": torch.ones(1)})
    with pytest.raises(ValueError, match="embeds a guidance"):
        everything(**{**inputs, "guidance": None})
    without = PPCLFluxTransformer2DModel.from_config({**CONFIG, "guidance_embeds": False})
    with pytest.raises(ValueError, match="no embedding for guidance"):
        without(**inputs)
    with pytest.raises(ValueError, match="do not come from the timestep alone"):
        everything.precompute([0.5])
    with pytest.raises(ValueError, match="add up to heads of 8"):
        PPCLFluxTransformer2DModel(**{**CONFIG, "axes_dims_rope": (2, 2, 2)})


def test_diffusers_tools_know_the_blocks(made, everything, run, same):
    """Names that offload and regional compiling go by, what caches know, and attention backends by name."""
    from diffusers.hooks import FirstBlockCacheConfig
    from diffusers.hooks._helpers import TransformerBlockRegistry
    from diffusers.models.transformers.transformer_flux import FluxSingleTransformerBlock, FluxTransformerBlock

    names = [PPCLFluxTransformerBlock.__name__, PPCLFluxSingleTransformerBlock.__name__]
    assert everything._no_split_modules == names == everything._repeated_blocks
    for ours, theirs in (
        (PPCLFluxTransformerBlock, FluxTransformerBlock),
        (PPCLFluxSingleTransformerBlock, FluxSingleTransformerBlock),
    ):
        for field in ("return_hidden_states_index", "return_encoder_hidden_states_index"):
            assert getattr(TransformerBlockRegistry.get(ours), field) == getattr(
                TransformerBlockRegistry.get(theirs), field
            )
    model = ppcl_rt.load(made.folder)
    model.enable_cache(FirstBlockCacheConfig(threshold=0.0))
    with model.cache_context("cond"):
        same(run(model, build_inputs()), run(made.stock, build_inputs()))
    model.disable_cache()
    model.set_attention_backend("native")
    same(run(model, build_inputs()), run(made.stock, build_inputs()))


def test_the_pipeline_draws_at_any_ratio(tmp_path, run):
    """`FluxPipeline` with all of its parts, tiny and random: at ratio 1 diffusers' pictures, saved and opened again."""
    parts, stock = pipeline_parts(tmp_path), build_stock(pooled_projection_dim=768)
    made = RandomCheckpoint.make(tmp_path / "checkpoint", PPCLFluxTransformer2DModel, stock, COUNTS)

    def draw(pipe):
        pipe.set_progress_bar_config(disable=True)
        return pipe(
            prompt=["two red squares", "a"],
            negative_prompt=["blur", ""],
            true_cfg_scale=2.0,
            height=16,
            width=24,
            num_inference_steps=2,
            max_sequence_length=8,
            generator=torch.Generator().manual_seed(0),
            output_type="pt",
        ).images

    wanted = draw(FluxPipeline(**parts, transformer=stock))
    assert wanted.std() > 1e-2
    model = ppcl_rt.load(made.folder)
    latents = model.latents_of(parts["vae"].config, ppcl_rt.Tokens(24, 8, 2))
    with torch.no_grad():
        # 4 x 6 tokens, 2 x 2 latents a token, 2 x 2 pixels a latent.
        assert parts["vae"].decode(torch.zeros(latents)).sample.shape == (2, 3, 16, 24)
    pipe = FluxPipeline(**parts, transformer=model)
    # Values in [0, 1] after two steps and a decoder: outputs that differ by 1e-5 at most make 1e-4.
    torch.testing.assert_close(draw(pipe), wanted, rtol=0, atol=1e-4)
    with model.at(ratio=0.5):
        small = draw(pipe)
    assert small.isfinite().all() and (small - wanted).abs().max() > 1e-3
    pipe.save_pretrained(tmp_path / "pipeline")
    again = FluxPipeline.from_pretrained(tmp_path / "pipeline")
    assert type(again.transformer) is PPCLFluxTransformer2DModel
    torch.testing.assert_close(draw(again), wanted, rtol=0, atol=1e-4)
    with pytest.raises(ValueError, match="no IP-adapter is loaded: call load_ip_adapter"):
        more = {"height": 16, "width": 16, "num_inference_steps": 1}
        pipe(prompt="a", joint_attention_kwargs={"ip_adapter_image_embeds": [torch.zeros(1, 1, 4)]}, **more)
