"""Inside diffusers: the pipeline, its files, and what its tools look for in a transformer."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, QwenImagePipeline, QwenImageTransformer2DModel
from loras import make_lora, merged
from safetensors.torch import save_file

import ppcl_rt
from ppcl_rt import Interval, PlannedBlock, Schedule, Width
from ppcl_rt.families.qwen_image import PPCLQwenImageTransformerBlock

PROMPT, NEGATIVE = "two red squares", "blur"


@pytest.fixture(scope="module")
def draw(parts):
    """Sample two pictures at 32x48 with guidance: ``draw(transformer)``, seeded."""

    def _draw(transformer, steps=2, pipe=None, **more):
        pipe = pipe or QwenImagePipeline(
            **{**parts, "scheduler": FlowMatchEulerDiscreteScheduler()}, transformer=transformer
        )
        pipe.set_progress_bar_config(disable=True)
        return pipe(
            prompt=[PROMPT, "a"],
            negative_prompt=[NEGATIVE, ""],
            true_cfg_scale=3.0,
            height=32,
            width=48,
            num_inference_steps=steps,
            generator=torch.Generator().manual_seed(0),
            output_type="np",
            **more,
        ).images

    return _draw


@pytest.fixture(scope="module")
def stock_pictures(made, draw):
    pictures = draw(made.stock)
    assert pictures.shape == (2, 32, 48, 3) and np.isfinite(pictures).all() and pictures.std() > 1e-3
    return pictures


def close(got, wanted):
    # Values in [0, 1] after two steps with guidance 3 and a decoder: outputs that differ by 1e-5 at most make 1e-4.
    np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-4)


def test_pipeline_at_ratio_one(made, draw, stock_pictures):
    """The pipeline draws the same pictures with the dense plan as with diffusers' transformer."""
    close(draw(ppcl_rt.load(made.folder)), stock_pictures)


def test_pipeline_at_lower_ratios(made, draw, stock_pictures):
    """Lower ratios draw what diffusers' blocks draw for that plan, chosen by `set_ratio` or `at`."""
    model = ppcl_rt.load(made.folder, 0.5)
    half = draw(model)
    close(half, draw(made.reference(model.plan)))
    assert np.abs(half - stock_pictures).max() > 1e-3
    with model.at(ratio=0.7):
        pictures = draw(model)
    close(pictures, draw(made.reference(model.planner.plan(0.7))))
    model.set_ratio(1.0)
    close(draw(model), stock_pictures)


def test_an_adapter_through_the_pipeline(made, draw, parts, tmp_path, stock_pictures):
    """`load_lora_weights`, `set_adapters`, the scale of a call, `fuse_lora`: as with the adapter in stock weights."""
    pytest.importorskip("peft")
    state, model = make_lora(made.stock, size=0.1), ppcl_rt.load(made.folder)
    save_file(state, tmp_path / "style.safetensors")
    pipe = QwenImagePipeline(**{**parts, "scheduler": FlowMatchEulerDiscreteScheduler()}, transformer=model)
    pipe.load_lora_weights(tmp_path, weight_name="style.safetensors", adapter_name="style")
    pipe.set_adapters(["style"], [0.5])
    half = draw(merged(made.stock, state, 0.5))
    assert np.abs(half - stock_pictures).max() > 1e-3
    close(draw(model, pipe=pipe), half)
    close(draw(model, pipe=pipe, attention_kwargs={"scale": 0.5}), draw(merged(made.stock, state, 0.25)))
    pipe.fuse_lora(adapter_names=["style"])
    pipe.unload_lora_weights()
    close(draw(model, pipe=pipe), half)


def test_pipeline_with_schedule(made, draw, stock_pictures):
    """With guidance and a schedule, steps are steps: dense first, small after, in every run anew."""
    model, plans = ppcl_rt.load(made.folder), []
    model.set_schedule(Schedule.warm(dense_steps=1, ratio=0.5))
    original = type(model)._program

    def watched(self, timestep=None):
        program = original(self, timestep)
        if timestep is not None:
            plans.append(program.plan)
        return program

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(model), "_program", watched)
        first, second = draw(model, steps=3), draw(model, steps=3)
    small = model.planner.plan(0.5)
    assert plans == [made.catalog.dense] * 2 + [small] * 4 + [made.catalog.dense] * 2 + [small] * 4
    np.testing.assert_array_equal(first, second)
    model.set_schedule(Schedule.warm(dense_steps=2, ratio=0.5))
    close(draw(model), stock_pictures)


@pytest.mark.parametrize("max_shard_size", ["10GB", "100KB"])
@pytest.mark.parametrize("kind", ["made", "compensated"])
def test_save_and_load(tmp_path, kind, request, build_inputs, run, same, max_shard_size):
    """``save_pretrained`` from a model that holds a part -> ``from_pretrained``: same name, tensors and outputs."""
    made = request.getfixturevalue(kind)
    inputs, rng = build_inputs(), np.random.default_rng(0)
    model = ppcl_rt.load(made.folder, 0.6)
    model.save_pretrained(tmp_path / "saved", max_shard_size=max_shard_size)
    assert (len(list((tmp_path / "saved").glob("*.safetensors"))) > 1) == (max_shard_size == "100KB")
    again = ppcl_rt.PPCLQwenImageTransformer2DModel.from_pretrained(tmp_path / "saved")
    assert again.catalog == made.catalog and again.catalog.fingerprint == made.catalog.fingerprint
    state = again.full_state()
    assert state.keys() == made.tensors.keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in made.tensors.items())
    for plan in (made.catalog.dense, model.plan, *(made.random_plan(rng, skip=0.2) for _ in range(3))):
        again.set_plan(plan)
        same(run(again, inputs), run(made.reference(plan), inputs))
    assert ppcl_rt.load(tmp_path / "saved", 0.6).plan == model.plan


def test_saving_keeps_what_was_changed(tmp_path, made, build_inputs, run, same):
    """Weights that were changed in memory are saved where they belong in stock order; the rest as it was."""
    plan = made.plan(
        PlannedBlock(interval=Interval(0, 1), width=Width(heads=2, image=50, text=31, modulation=32), student=True),
        PlannedBlock(interval=Interval(3, 3), width=Width(heads=3, image=9, text=5, modulation=32)),
    )
    model = ppcl_rt.load(made.folder, plan=plan)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    inputs = build_inputs()
    wanted = run(model, inputs)
    model.save_pretrained(tmp_path / "saved")
    again = ppcl_rt.load(tmp_path / "saved")
    assert again.catalog.fingerprint != made.catalog.fingerprint
    state = again.full_state()
    for name in ("transformer_blocks.1.attn.to_q.weight", "students.1-2.img_mod.1.bias", "students.0-1.order.heads"):
        assert torch.equal(state[name], made.tensors[name])
    left_out = made.tensors["transformer_blocks.3.order.image"][9:]
    for name, rows in (("transformer_blocks.3.img_mlp.net.0.proj.weight", left_out),):
        assert torch.equal(state[name][rows], made.tensors[name][rows])
        assert not torch.equal(state[name], made.tensors[name])
    again.set_plan(plan.model_copy(update={"checkpoint": again.catalog.fingerprint}))
    same(run(again, inputs), wanted)


def test_saving_over_its_own_folder(tmp_path, make_checkpoint, build_inputs, run, same):
    """A model that is saved to the folder that it came from still reads the rest of its weights from there."""
    made = make_checkpoint(tmp_path / "checkpoint")
    model = ppcl_rt.load(made.folder, 0.6)
    model.save_pretrained(made.folder, max_shard_size="100KB")
    model.set_ratio(1.0)
    same(run(model, build_inputs()), run(made.stock, build_inputs()))
    same(run(ppcl_rt.load(made.folder), build_inputs()), run(made.stock, build_inputs()))


def test_saving_in_another_dtype(tmp_path, made):
    """A model in bfloat16 saves bfloat16 throughout, rank orders aside."""
    model = ppcl_rt.load(made.folder, 0.6, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "saved")
    state = ppcl_rt.load(tmp_path / "saved").full_state()
    assert {tensor.dtype for name, tensor in state.items() if ".order." not in name} == {torch.bfloat16}
    for name, tensor in made.tensors.items():
        assert torch.equal(state[name], tensor if ".order." in name else tensor.bfloat16())


def test_saving_what_was_built_by_hand(tmp_path, build_stock, build_inputs, run, same):
    """A model without a checkpoint saves one that both classes load."""
    stock = build_stock()
    model = ppcl_rt.PPCLQwenImageTransformer2DModel.from_config(stock.config).eval()
    model.load_state_dict(stock.state_dict())
    model.save_pretrained(tmp_path / "saved")
    for again in (ppcl_rt.load(tmp_path / "saved"), QwenImageTransformer2DModel.from_pretrained(tmp_path / "saved")):
        same(run(again, build_inputs()), run(stock, build_inputs()))


@pytest.mark.parametrize("kind", ["made", "compensated"])
def test_stock_class_loads_the_teacher(kind, request, build_inputs, run):
    """diffusers' own ``from_pretrained`` finds the whole teacher in the same folder."""
    made = request.getfixturevalue(kind)
    stock, info = QwenImageTransformer2DModel.from_pretrained(made.folder, output_loading_info=True)
    assert type(stock) is QwenImageTransformer2DModel
    assert not info["missing_keys"] and not info["mismatched_keys"]
    assert all(
        name.startswith("students.") or ".order." in name or ".replacements." in name
        for name in info["unexpected_keys"]
    )
    # The same code on the same weights.
    assert torch.equal(run(stock, build_inputs()), run(made.stock, build_inputs()))


def test_from_pretrained_arguments(made):
    """diffusers' arguments and those of `load`; what cannot be done is refused."""
    cls = ppcl_rt.PPCLQwenImageTransformer2DModel
    model = cls.from_pretrained(made.folder.parent, subfolder=made.folder.name, ratio=0.6, torch_dtype=torch.bfloat16)
    assert model.dtype == torch.bfloat16 and made.catalog.ratio(model.plan) <= 0.6
    for refused in ({"quantization_config": object()}, {"device_map": "auto"}):
        with pytest.raises(ValueError, match=next(iter(refused))):
            cls.from_pretrained(made.folder, **refused)


def test_pipeline_round_trip(tmp_path, made, parts, draw, stock_pictures):
    """A saved pipeline comes back with the pluggable transformer, at any ratio, without being told of it."""
    pipe = QwenImagePipeline(**parts, transformer=ppcl_rt.load(made.folder, 0.6))
    pipe.save_pretrained(tmp_path)
    again = QwenImagePipeline.from_pretrained(tmp_path)
    assert type(again.transformer) is ppcl_rt.PPCLQwenImageTransformer2DModel
    assert again.transformer.catalog.fingerprint == made.catalog.fingerprint
    close(draw(None, pipe=again), stock_pictures)
    # And with a transformer that is given, as the README does it.
    given = QwenImagePipeline.from_pretrained(tmp_path, transformer=ppcl_rt.load(tmp_path / "transformer"))
    close(draw(None, pipe=given), stock_pictures)


def test_offload_and_repeated_blocks_know_the_block(made):
    """diffusers' tools look blocks up by class name."""
    model = ppcl_rt.load(made.folder)
    name = PPCLQwenImageTransformerBlock.__name__
    assert model._no_split_modules == [name] == model._repeated_blocks
    assert all(type(block).__name__ == name for block in (*model.transformer_blocks, *model.students.values()))


def test_caches_know_the_block():
    """diffusers' cache hooks find a block's metadata by its exact class, and it says what the stock block's says."""
    from diffusers.hooks._helpers import TransformerBlockRegistry
    from diffusers.models.transformers.transformer_qwenimage import QwenImageTransformerBlock

    ours = TransformerBlockRegistry.get(PPCLQwenImageTransformerBlock)
    theirs = TransformerBlockRegistry.get(QwenImageTransformerBlock)
    for field in ("return_hidden_states_index", "return_encoder_hidden_states_index"):
        assert getattr(ours, field) == getattr(theirs, field)


def test_first_block_cache(made, draw, stock_pictures):
    """First-block cache with a threshold that never skips draws the same pictures."""
    from diffusers.hooks import FirstBlockCacheConfig

    model = ppcl_rt.load(made.folder)
    model.enable_cache(FirstBlockCacheConfig(threshold=0.0))
    close(draw(model), stock_pictures)


def test_layerwise_casting(made, build_inputs, run, same):
    """Weights stored in bfloat16 and computed in float32 give what bfloat16 weights give, also replacements."""
    rng, inputs = np.random.default_rng(2), build_inputs()
    plan = made.random_plan(rng)
    model = ppcl_rt.load(made.folder, plan=plan)
    model.enable_layerwise_casting(storage_dtype=torch.bfloat16, compute_dtype=torch.float32)
    rounded = ppcl_rt.load(made.folder, plan=plan)
    kept = {id(p) for n, p in model.named_parameters() if p.dtype == torch.float32}
    with torch.no_grad():
        for mine, theirs in zip(rounded.parameters(), model.parameters(), strict=True):
            if id(theirs) not in kept:
                mine.copy_(mine.bfloat16())
    assert len(kept) < len(list(model.parameters())) / 2
    same(run(model, inputs), run(rounded, inputs))


def test_group_offload(made, build_inputs, run, same):
    """diffusers' group offload (here from CPU to CPU) leaves the result alone."""
    model, inputs = ppcl_rt.load(made.folder, 0.6), build_inputs()
    wanted = run(copy.deepcopy(model), inputs)
    model.enable_group_offload(onload_device=torch.device("cpu"), offload_type="block_level", num_blocks_per_group=1)
    same(run(model, inputs), wanted)
