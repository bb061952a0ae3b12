"""Z-Image: the dense plan is diffusers, any other is diffusers with something zeroed, put in or left out."""

from __future__ import annotations

import re
from collections import Counter

import numpy as np
import pytest
import torch
from diffusers import ZImagePipeline, ZImageTransformer2DModel
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from tiny_z_image import (
    CHANNELS,
    CONFIG,
    DEPTH,
    HEADS,
    RAGGED,
    build_inputs,
    build_stock,
    make_checkpoint,
    pipeline_parts,
    residuals,
)
from torch.utils._python_dispatch import TorchDispatchMode

import ppcl_rt
from ppcl_rt import Interval, PlannedBlock, Width
from ppcl_rt.families.z_image import PPCLZImageTransformer2DModel

FULL = Width(heads=HEADS, mlp=CHANNELS)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A checkpoint without compensated layers, and its model with everything resident."""
    made = make_checkpoint(tmp_path_factory.mktemp("z_image") / "plain", compensated=False)
    return made, ppcl_rt.load(made.folder, resident="all")


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
    """The same with compensated layers, which have no biases."""
    made = make_checkpoint(tmp_path_factory.mktemp("z_image") / "fitted", seed=1)
    return made, ppcl_rt.load(made.folder, resident="all")


@pytest.fixture
def all_same(same):
    """Compare lists of images."""

    def compare(got, wanted, tolerance=1e-5):
        assert len(got) == len(wanted)
        for mine, theirs in zip(got, wanted, strict=True):
            same(mine, theirs, tolerance)

    return compare


def moved(got, other):
    """The largest difference of two lists of images."""
    return max((a - b).abs().max() for a, b in zip(got, other, strict=True))


# The dense plan.


@pytest.mark.parametrize(
    "samples",
    [
        RAGGED,
        RAGGED[:1],
        # One length of text and image: no mask anywhere. And joint lengths that are equal while their parts are not.
        ((7, (3, 5)), (20, (4, 6))),
        ((40, (3, 5)), (7, (5, 9))),
        ((1, (1, 1)),),
    ],
    ids=["ragged", "one", "even", "crossed", "least"],
)
def test_dense_is_stock(samples, made, run, all_same):
    """Different sizes and lengths in one batch, with padding tokens and masks as diffusers has them."""
    checkpoint, model = made
    inputs = build_inputs(samples)
    model.set_ratio(1.0)
    wanted = run(checkpoint.stock, inputs)
    all_same(run(model, inputs), wanted)
    assert max(each.abs().max() for each in wanted) > 0.3


def test_every_input_and_both_padding_tokens_matter(made, run):
    """Otherwise the law above would hold for a model that ignores one of them."""
    _, model = made
    inputs, other = build_inputs(), build_inputs(seed=9)
    wanted = run(model, inputs)
    for name in inputs:
        assert moved(run(model, {**inputs, name: other[name]}), wanted) > 1e-2
    for name in ("x_pad_token", "cap_pad_token"):
        kept = getattr(model, name).detach().clone()
        with torch.no_grad():
            getattr(model, name).add_(1)
            assert moved(run(model, inputs), wanted) > 1e-3
            getattr(model, name).copy_(kept)


def test_results_are_diffusers_own(made):
    _, model = made
    inputs = build_inputs()
    with torch.no_grad():
        wrapped, bare = model(**inputs), model(**inputs, return_dict=False)
    assert type(wrapped) is Transformer2DModelOutput and isinstance(bare, tuple) and len(bare) == 1
    assert all(torch.equal(a, b) for a, b in zip(wrapped.sample, bare[0], strict=True))


def test_dense_with_controlnet(made, run, all_same):
    """Residuals come by number in ``layers`` and image first; here the text lies first."""
    checkpoint, model = made
    inputs = build_inputs()
    control = residuals(inputs, (0, 3))
    model.set_ratio(1.0)
    got = run(model, inputs, controlnet_block_samples=control)
    all_same(got, run(checkpoint.stock, inputs, controlnet_block_samples=control))
    assert moved(got, run(model, inputs)) > 1e-2


def test_patches_of_several_sizes(run, all_same):
    stock = build_stock(all_patch_size=(2, 1), all_f_patch_size=(1, 1))
    model = PPCLZImageTransformer2DModel.from_config(stock.config).eval()
    assert list(model.state_dict()) == list(stock.state_dict())
    model.load_state_dict(stock.state_dict())
    inputs = build_inputs(RAGGED[:2])
    all_same(run(model, inputs, patch_size=1), run(stock, inputs, patch_size=1))
    with pytest.raises(ValueError, match="4-1, the model has 2-1, 1-1"):
        run(model, inputs, patch_size=4)


def test_what_is_of_the_omni_variant_is_refused(made, run):
    _, model = made
    inputs = build_inputs()
    for name in ("siglip_feats", "image_noise_mask"):
        with pytest.raises(ValueError, match=f"{name} is of the omni variant"):
            run(model, inputs, **{name: [[None]] * 3})
    with pytest.raises(ValueError, match="list of images a sample"):
        run(model, {**inputs, "x": [[each] for each in inputs["x"]]})
    with pytest.raises(ValueError, match="3 images and 2 captions"):
        run(model, {**inputs, "cap_feats": inputs["cap_feats"][:2]})
    with pytest.raises(ValueError, match="0 images and 0 captions"):
        run(model, {"x": [], "t": torch.zeros(0), "cap_feats": []})
    with pytest.raises(ValueError, match="siglip_feat_dim is set"):
        PPCLZImageTransformer2DModel(**CONFIG, siglip_feat_dim=8)
    with pytest.raises(ValueError, match="does not add up"):
        PPCLZImageTransformer2DModel(**{**CONFIG, "axes_dims": (4, 2, 4)})


@pytest.mark.parametrize(
    ("words", "size", "said"),
    [
        # Padded to 256 tokens, which begin at 1, and one frame after them.
        (225, (6, 10), "225 tokens and its image need [258, 3, 5] positions, the model has [256, 32, 32]"),
        (7, (66, 10), "need [34, 33, 5] positions"),
        (7, (6, 66), "need [34, 3, 33] positions"),
        (7, (7, 10), "1 frames of 7 x 10 latents: wanted multiples of 1 and of 2"),
    ],
)
def test_images_and_captions_without_a_place_are_refused(made, run, words, size, said):
    """Stock looks positions up in a table that is too short; the longest and largest that there are still run."""
    checkpoint, model = made
    channels, features = CONFIG["in_channels"], CONFIG["cap_feat_dim"]

    def inputs(words, size):
        caption, image = torch.randn(words, features), torch.randn(channels, 1, *size)
        return {"x": [image], "t": torch.tensor([0.5]), "cap_feats": [caption]}

    with pytest.raises((IndexError, RuntimeError)):
        run(checkpoint.stock, inputs(words, size))
    with pytest.raises(ValueError, match=re.escape(said)) as caught:
        run(model, inputs(words, size))
    assert "\n" not in str(caught.value)
    most = inputs(224, (64, 2))
    assert run(model, most)[0].shape == run(checkpoint.stock, most)[0].shape == (channels, 1, 64, 2)


# Other plans.


def test_narrow_is_stock_with_columns_zeroed(made, run, all_same):
    """Any counts; the first in rank order stay, and a plain prefix would give something else."""
    checkpoint, model = made
    rng, inputs = np.random.default_rng(0), build_inputs()
    for _ in range(8):
        widths = [Width(heads=int(rng.integers(1, 5)), mlp=int(rng.integers(1, CHANNELS + 1))) for _ in range(DEPTH)]
        plan = checkpoint.catalog.compose(enumerate(widths))
        model.set_plan(plan)
        all_same(run(model, inputs), run(checkpoint.reference(plan), inputs))
    half = checkpoint.catalog.compose((n, Width(heads=2, mlp=40)) for n in range(DEPTH))
    blind = {name: torch.arange(len(t)) if ".order." in name else t for name, t in checkpoint.tensors.items()}
    unordered = type(checkpoint)(checkpoint.folder, checkpoint.stock, checkpoint.catalog, blind)
    assert moved(run(checkpoint.reference(half), inputs), run(unordered.reference(half), inputs)) > 1e-2


def test_compensated_layers_and_maps_have_no_bias(fitted, run, all_same):
    checkpoint, model = fitted
    inputs = build_inputs()
    for width in (FULL.replace(heads=1), FULL.replace(mlp=17), FULL.replace(mlp=0), Width(heads=3, mlp=0)):
        plan = checkpoint.catalog.compose((n, width) for n in range(DEPTH))
        model.set_plan(plan)
        all_same(run(model, inputs), run(checkpoint.reference(plan), inputs))
    replaced = [block.replacements for block in model.resident_blocks()]
    assert all(layer.bias is None for layers in replaced for layer in layers.values()) and any(map(len, replaced))


def test_a_student_is_a_loop_over_stock_blocks(made, run, all_same):
    """diffusers' pieces called by hand, with the student's block in place of layers 1 to 3."""
    checkpoint, model = made
    stock, inputs = checkpoint.stock, build_inputs(RAGGED[:1])
    student = checkpoint.reference_block(PlannedBlock(interval=Interval(5, 7), width=FULL, student=True))
    kept = [(n, FULL) for n in range(5)]
    plan = checkpoint.catalog.compose(kept, [PlannedBlock(interval=Interval(5, 7), width=FULL, student=True)])
    with torch.no_grad():
        temb = stock.t_embedder(inputs["t"] * 1000)
        patches, captions, sizes, places, text_places, padding, text_padding = stock.patchify_and_embed(
            inputs["x"], inputs["cap_feats"], 2, 1
        )
        image = stock.all_x_embedder["2-1"](patches[0])
        image = torch.where(padding[0][:, None], stock.x_pad_token, image)[None]
        text = stock.cap_embedder(captions[0])
        text = torch.where(text_padding[0][:, None], stock.cap_pad_token, text)[None]
        rope = stock.rope_embedder(places[0])[None]
        text_rope = stock.rope_embedder(text_places[0])[None, : text.shape[1]]
        for block in stock.noise_refiner:
            image = block(image, None, rope, temb)
        for block in stock.context_refiner:
            text = block(text, None, text_rope)
        joint, joint_rope = torch.cat([image, text], 1), torch.cat([rope, text_rope], 1)
        for block in (stock.layers[0], student):
            joint = block(joint, None, joint_rope, temb)
        tokens = stock.all_final_layer["2-1"](joint, c=temb)
        wanted = stock.unpatchify([tokens[0]], sizes, 2, 1)
    model.set_plan(plan)
    got = run(model, inputs)
    all_same(got, wanted)
    assert moved(got, run(stock, inputs)) > 1e-2


def test_controlnet_keeps_original_numbers(made, run, all_same):
    """A student takes the residuals of all its blocks, a skipped block its own."""
    checkpoint, model = made
    inputs = build_inputs()
    control = residuals(inputs, range(4))
    student = PlannedBlock(interval=Interval(4, 5), width=FULL, student=True)
    for kept in ((0, 1, 2, 3, 7), (2,), ()):
        plan = checkpoint.catalog.compose([(n, FULL) for n in kept], [student] if kept else [])
        model.set_plan(plan)
        wanted = run(checkpoint.reference(plan), inputs, controlnet_block_samples=control)
        all_same(run(model, inputs, controlnet_block_samples=control), wanted)


@pytest.mark.parametrize("which", ["made", "fitted"])
def test_two_hundred_plans_from_one_model(which, request, run, all_same):
    """Random students, skips and widths all run; every twentieth is checked in full, and against a model of its own."""
    checkpoint, model = request.getfixturevalue(which)
    rng, inputs = np.random.default_rng(7), build_inputs(RAGGED[:2])
    plans = {checkpoint.random_plan(rng, skip=0.15): None for _ in range(100)}
    assert len(plans) > 95
    for n, plan in enumerate(plans):
        model.set_plan(plan)
        got = run(model, inputs)
        assert all(each.isfinite().all() for each in got)
        if n % 20 == 0:
            all_same(got, run(checkpoint.reference(plan), inputs))
            all_same(got, run(ppcl_rt.load(checkpoint.folder, plan=plan), inputs), 1e-6)


# Costs.


def test_parameters_and_flops_are_those_of_the_layers(made):
    checkpoint, _ = made
    architecture = checkpoint.catalog.architecture
    assert architecture.dense_params == sum(p.numel() for p in checkpoint.stock.parameters())
    assert [architecture.kind(n) for n in range(DEPTH)] == ["image"] * 2 + ["text"] * 2 + ["joint"] * 4
    products = 2 * (4 * 32 * 32 + 3 * 32 * CHANNELS)
    modulation = 2 * 32 * 4 * 32
    wanted = [(64, modulation)] * 2 + [(32, 0)] * 2 + [(96, modulation)] * 4
    by_hand = sum(tokens * products + 4 * tokens**2 * 32 + more for tokens, more in wanted)
    assert architecture.dense_flops(checkpoint.catalog.reference) == by_hand


def test_the_planner_keeps_to_ratios(fitted, run):
    checkpoint, model = fitted
    inputs = build_inputs(RAGGED[:1])
    for ratio in (1.0, 0.9, 0.8):
        model.set_ratio(ratio)
        assert checkpoint.catalog.ratio(model.plan) <= ratio
        assert run(model, inputs)[0].isfinite().all()


# What callers do with it.


def test_save_and_load(made, run, all_same, tmp_path):
    """The whole checkpoint, stock order; diffusers' class loads the teacher out of it."""
    checkpoint, _ = made
    model = ppcl_rt.load(checkpoint.folder, 0.8)
    model.save_pretrained(tmp_path)
    inputs = build_inputs()
    again = ppcl_rt.load(tmp_path, plan=ppcl_rt.load(tmp_path, 0.8).plan)
    all_same(run(again, inputs), run(model, inputs), 1e-7)
    all_same(run(ppcl_rt.load(tmp_path), inputs), run(checkpoint.stock, inputs))
    stock = ZImageTransformer2DModel.from_pretrained(tmp_path)
    assert all(torch.equal(t, checkpoint.tensors[name]) for name, t in stock.state_dict().items())


def test_a_stock_checkpoint_loads(run, all_same, tmp_path):
    stock, inputs = build_stock(), build_inputs()
    stock.save_pretrained(tmp_path)
    model = ppcl_rt.load(tmp_path)
    assert isinstance(model, PPCLZImageTransformer2DModel) and isinstance(model, ZImageTransformer2DModel)
    all_same(run(model, inputs), run(stock, inputs))


def test_gradient_checkpointing_changes_nothing(made):
    checkpoint, _ = made
    model, inputs, found = ppcl_rt.load(checkpoint.folder), build_inputs(RAGGED[:2]), []
    model.requires_grad_(True)
    for on in (False, True):
        model.enable_gradient_checkpointing() if on else model.disable_gradient_checkpointing()
        model.zero_grad()
        sum(each.square().sum() for each in model(**inputs)[0]).backward()
        found.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys() and len(found[0]) > 50
    for name, gradient in found[0].items():
        assert torch.equal(found[1][name], gradient), name


def test_precomputed_timesteps_are_looked_up(made, run, all_same):
    checkpoint, _ = made
    model, inputs = ppcl_rt.load(checkpoint.folder), build_inputs()
    wanted = run(model, inputs)
    model.precompute(inputs["t"])
    all_same(run(model, inputs), wanted, 1e-6)


def test_schedules_go_by_falling_noise(made, run):
    """Z-Image's t rises from 0 to 1 while it denoises."""
    checkpoint, _ = made
    model, inputs = ppcl_rt.load(checkpoint.folder), build_inputs(RAGGED[:1])
    model.set_schedule(ppcl_rt.Schedule.warm(dense_steps=1, ratio=0.8))
    outputs = [run(model, {**inputs, "t": torch.tensor([t])}) for t in (0.0, 0.4, 0.8)]
    model.set_ratio(0.8)
    narrow = [run(model, {**inputs, "t": torch.tensor([t])}) for t in (0.0, 0.4, 0.8)]
    assert [moved(a, b) > 1e-3 for a, b in zip(outputs, narrow)] == [True, False, False]


class Kernels(TorchDispatchMode):
    """Counts the ops of kernels that run inside it."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "ppcl":
            self.counts[function.name()] += 1
        return function(*args, **(kwargs or {}))


# The interpreter computes sigmoids with numpy, which warns where exp(large) is infinite, as it should be.
@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
def test_kernels_give_what_plain_torch_gives(fitted, run, all_same, monkeypatch):
    """Rotations that differ from sample to sample, masks, SwiGLU over some channels, maps."""
    checkpoint, _ = fitted
    widths = [FULL, Width(heads=3, mlp=50), Width(heads=1, mlp=17), Width(heads=3, mlp=0)]
    plan = checkpoint.catalog.compose(zip((0, 2, 4, 5), widths, strict=True))
    model, inputs = ppcl_rt.load(checkpoint.folder, plan=plan), build_inputs(RAGGED[:2])
    monkeypatch.setenv("PPCL_BACKEND", "torch")
    wanted = run(model, inputs)
    monkeypatch.setenv("PPCL_BACKEND", "triton")
    with Kernels() as ran:
        got = run(model, inputs)
    all_same(got, wanted, 2e-5)
    # Three launches of linear layers to a block: attention's output, up and down; a map has one in place of two.
    assert ran.counts == {"ppcl::qkv_projection": 4, "ppcl::joint_attention": 4, "ppcl::linear": 3 * 4 - 1}


def test_pipeline(made, tmp_path, all_same):
    """`ZImagePipeline` with guidance, prompts of different lengths: as with diffusers' transformer."""
    checkpoint, _ = made
    parts = pipeline_parts(tmp_path)

    def draw(transformer):
        pipe = ZImagePipeline(**parts, transformer=transformer)
        pipe.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(0)
        drawn = pipe(
            ["a cat", "two very small red squares on a table"],
            negative_prompt=["", "blue"],
            height=32,
            width=24,
            num_inference_steps=2,
            guidance_scale=2.0,
            generator=generator,
            output_type="pt",
        )
        return drawn.images

    model = ppcl_rt.load(checkpoint.folder)
    wanted = draw(checkpoint.stock)
    torch.testing.assert_close(draw(model), wanted, atol=1e-4, rtol=0)
    model.set_ratio(0.8)
    assert (draw(model) - wanted).abs().max() > 1e-3
