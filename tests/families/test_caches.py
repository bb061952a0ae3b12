"""Caches across denoising steps: at any plan what they are with diffusers' blocks, and nothing of another plan."""

from __future__ import annotations

import diffusers
import fixtures
import pytest
import tiny_flux
import tiny_sd3
import tiny_z_image
import torch
from random_checkpoint import RandomCheckpoint
from test_flux import COUNTS

import ppcl_rt
from ppcl_rt import Interval, PlannedBlock

TIMESTEP = {"now": 500}


def at(timestep):
    TIMESTEP["now"] = timestep


# Each skips what it can from the second call on.
CACHES = {
    "first-block": lambda: diffusers.FirstBlockCacheConfig(threshold=10.0),
    "mag": lambda: diffusers.MagCacheConfig(
        num_inference_steps=4, retention_ratio=0.0, threshold=100.0, mag_ratios=[1.0, 1.1, 0.9, 1.0]
    ),
    "taylorseer": lambda: diffusers.TaylorSeerCacheConfig(
        cache_interval=3, disable_cache_before_step=1, max_order=1, taylor_factors_dtype=torch.float32
    ),
    "pyramid": lambda: diffusers.PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2, current_timestep_callback=lambda: TIMESTEP["now"]
    ),
    "faster": lambda: diffusers.FasterCacheConfig(
        is_guidance_distilled=True, tensor_format="BCHW", current_timestep_callback=lambda: TIMESTEP["now"]
    ),
}


def make_flux(folder):
    return RandomCheckpoint.make(
        folder, ppcl_rt.PPCLFluxTransformer2DModel, tiny_flux.build_stock(), COUNTS, ((0, 1), (3, 4)), ((1, 2),), True
    ), tiny_flux.build_inputs


def make_qwen(folder):
    def inputs(seed):
        return fixtures._build_inputs(seed, mask="none")

    of = ppcl_rt.PPCLQwenImageTransformer2DModel
    counts = {"two-stream": fixtures.WITH_MAPS}
    stock = fixtures._build_stock(num_layers=6)
    return RandomCheckpoint.make(folder, of, stock, counts, ((2, 3),), ((0, 1),), True), inputs


def make_sd3(folder):
    return tiny_sd3.make_checkpoint(folder, "medium"), tiny_sd3.build_inputs


def make_z_image(folder):
    return tiny_z_image.make_checkpoint(folder), lambda seed: tiny_z_image.build_inputs(((7, (3, 5)),), seed)


MAKERS = {"qwen-image": make_qwen, "flux": make_flux, "sd3": make_sd3, "z-image": make_z_image}
_MADE = {}


@pytest.fixture
def of(tmp_path_factory):
    """A family's checkpoint, made once, and its inputs by seed."""

    def of(family):
        if family not in _MADE:
            _MADE[family] = MAKERS[family](tmp_path_factory.mktemp(family) / "checkpoint")
        return _MADE[family]

    return of


def narrow(made):
    """A plan without the first and the last block, with a student, narrower, at a low rank of modulations."""
    student = next(s.interval for s in made.catalog.students if s.interval.first and s.interval.first < s.interval.last)
    depth, planned = made.catalog.architecture.depth, []
    for block in range(1, depth - 1):
        full = made.catalog.spec(block).full
        width = full.replace(heads=3, **({"modulation": 7} if "modulation" in full else {}))
        if block == student.first:
            planned.append(PlannedBlock(interval=student, width=width, student=True))
        elif block not in student:
            planned.append(PlannedBlock(interval=Interval(block, block), width=width))
    return made.plan(*planned)


def sampled(model, build_inputs, seeds=(1, 2, 3), context=True):
    """Outputs of forwards, one after the other, from other inputs each."""
    outputs = []
    with torch.no_grad():
        for seed in seeds:
            if context:
                with model.cache_context("cond"):
                    output = model(**build_inputs(seed), return_dict=False)[0]
            else:
                output = model(**build_inputs(seed), return_dict=False)[0]
            outputs.append(output if isinstance(output, torch.Tensor) else torch.stack(output))
    return outputs


def equal(got, wanted, same):
    for one, other in zip(got, wanted, strict=True):
        same(one, other, 2e-5)


@pytest.mark.parametrize(
    "kind, family", [*((kind, "flux") for kind in CACHES), ("first-block", "qwen-image"), ("taylorseer", "qwen-image")]
)
def test_at_a_narrow_plan_it_is_that_of_stock(of, same, kind, family):
    """The first block that runs decides, the last that runs is remembered; students are among them."""
    made, inputs = of(family)
    plan = narrow(made)
    stock, model = made.reference(plan), ppcl_rt.load(made.folder, plan=plan)
    # FasterCache of diffusers cannot begin within its timesteps.
    for each in (stock, model):
        each.enable_cache(CACHES[kind]())
    at(900)
    outputs = [sampled(each, inputs, (1,)) for each in (stock, model)]
    at(500)
    for of_each, each in zip(outputs, (stock, model), strict=True):
        of_each += sampled(each, inputs, (2, 3))
    equal(outputs[1], outputs[0], same)
    model.disable_cache()
    assert (outputs[1][1] - sampled(model, inputs, (2,))[0]).abs().max() > 1e-3
    assert not model.is_cache_enabled and not model._forward_pre_hooks


@pytest.mark.parametrize(
    "kind, family",
    [
        *(("first-block", f) for f in MAKERS),
        ("taylorseer", "flux"),
        ("pyramid", "sd3"),
        ("faster", "flux"),
        ("mag", "z-image"),
    ],
)
def test_nothing_of_another_plan_is_taken(of, same, kind, family):
    """Where another plan runs, also by `at`, the first forward is computed, and later ones are not."""
    made, inputs = of(family)
    at(500)
    # Blocks that are read later have the hooks, too.
    model, plain = ppcl_rt.load(made.folder, plan=narrow(made)), ppcl_rt.load(made.folder)
    model.enable_cache(CACHES[kind]())
    for n, plan in enumerate((made.catalog.dense, narrow(made))):
        for each in (model, plain):
            each.set_plan(plan)
        wanted, got = (sampled(each, inputs, (n, n + 1)) for each in (plain, model))
        equal(got[:1], wanted[:1], same)
        assert (got[1] - wanted[1]).abs().max() > 1e-4
    with model.at(plan=made.catalog.dense), plain.at(plan=made.catalog.dense):
        equal(sampled(model, inputs, (9,)), sampled(plain, inputs, (9,)), same)


def timed(build_inputs, name):
    """Inputs of denoising step 0, 1, 2, ... of a sampling of four."""

    def build(step):
        inputs = build_inputs(step)
        noise = 1 - step / 4
        inputs[name] = torch.full_like(inputs[name], noise if name == "timestep" else 1 - noise)
        return inputs

    return build


@pytest.mark.parametrize("family", ["qwen-image", "z-image"])
def test_schedules(of, same, family):
    """What the steps before a change of plan computed is not taken; steps are counted on; images begin anew."""
    made, inputs = of(family)
    inputs = timed(inputs, "t" if family == "z-image" else "timestep")
    schedule = ppcl_rt.Schedule(phases=((0, made.catalog.dense), (2, narrow(made))))
    model, plain = ppcl_rt.load(made.folder), ppcl_rt.load(made.folder)
    for each in (model, plain):
        each.set_schedule(schedule)
    model.enable_cache(CACHES["mag"]())
    for _ in "two images":
        got, wanted = (sampled(each, inputs, range(4), context=family != "z-image") for each in (model, plain))
        for step, (one, other) in enumerate(zip(got, wanted, strict=True)):
            if step in (0, 2):
                same(one, other, 2e-5)
            else:
                assert (one - other).abs().max() > 1e-4
            # The last step is the fourth, also of the cache: it then begins anew.
        [manager] = model._state_managers()
        assert {state.step_index for state in manager._state_cache.values()} == {0}


def test_with_an_adapter(of, same):
    """A cache and a LoRA: as one without the other, and the cache skips."""
    pytest.importorskip("peft")
    made, inputs = of("flux")
    path = "transformer_blocks.1.attn.to_q"
    state = {f"{path}.lora_A.weight": torch.randn(2, 32) * 0.3, f"{path}.lora_B.weight": torch.randn(32, 2) * 0.3}
    adapted, cached = (ppcl_rt.load(made.folder, plan=narrow(made)) for _ in range(2))
    cached.enable_cache(CACHES["first-block"]())
    before = sampled(adapted, inputs, (1,))
    for model in (adapted, cached):
        model.load_lora_adapter(state, adapter_name="one", prefix=None)
    got, wanted = (sampled(model, inputs, (1, 2)) for model in (cached, adapted))
    same(got[0], wanted[0], 2e-5)
    assert (got[1] - wanted[1]).abs().max() > 1e-3 and (before[0] - got[0]).abs().max() > 1e-4


@pytest.mark.parametrize("family, pipeline", [("sd3", "StableDiffusion3Pipeline"), ("z-image", "ZImagePipeline")])
def test_pipelines_that_name_no_context(of, tmp_path, family, pipeline):
    """Where diffusers' class has no caches and its pipeline no `cache_context`, they work all the same."""
    if family == "sd3":
        tiny_sd3.build_stock("medium", pooled_projection_dim=2048).save_pretrained(tmp_path / "stock")
        model, parts = ppcl_rt.load(tmp_path / "stock"), tiny_sd3.pipeline_parts(tmp_path)
    else:
        made, _ = of(family)
        model, parts = ppcl_rt.load(made.folder, plan=narrow(made)), tiny_z_image.pipeline_parts(tmp_path)
    pipe = getattr(diffusers, pipeline)(**parts, transformer=model)
    pipe.set_progress_bar_config(disable=True)
    pictures = []
    for threshold in (None, 0.0, 10.0):
        if threshold is not None:
            pipe.transformer.enable_cache(diffusers.FirstBlockCacheConfig(threshold=threshold))
        generator = torch.Generator().manual_seed(0)
        given = {"prompt": "a", "num_inference_steps": 3, "output_type": "pt", "height": 16, "width": 16}
        pictures.append(pipe(generator=generator, **given).images)
        if threshold is not None:
            pipe.transformer.disable_cache()
    torch.testing.assert_close(pictures[1], pictures[0], atol=1e-5, rtol=0)
    assert (pictures[2] - pictures[0]).abs().max() > 1e-4


def test_refusals(of):
    """Caches of other models, that find nothing here, or that have too few blocks, are refused by name."""
    model = ppcl_rt.load(of("z-image")[0].folder)
    for kind in ("taylorseer", "faster"):
        with pytest.raises(ValueError, match="finds nothing to skip in PPCLZImageTransformer2DModel: name its"):
            model.enable_cache(CACHES[kind]())
        assert not model.is_cache_enabled and not model._forward_pre_hooks
    if hasattr(diffusers, "TextKVCacheConfig"):
        with pytest.raises(ValueError, match="TextKVCacheConfig is of no cache for these models: take one of First"):
            model.enable_cache(diffusers.TextKVCacheConfig())
    made, inputs = of("flux")
    model = ppcl_rt.load(made.folder)
    model.enable_cache(CACHES["first-block"]())
    with pytest.raises(ValueError, match="already been enabled"):
        model.enable_cache(CACHES["mag"]())
    full = made.catalog.spec(1).full
    model.set_plan(made.plan(PlannedBlock(interval=Interval(1, 1), width=full)))
    with pytest.raises(
        ValueError, match="FirstBlockCacheConfig needs two blocks or more, the plan runs 1: set a larger"
    ):
        sampled(model, inputs, (1,))
