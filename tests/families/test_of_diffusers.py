"""What diffusers' own tests ask of its transformers, asked of ours: seeds, variants, processors, caches, tracing."""

from __future__ import annotations

import functools
import logging

import diffusers
import pytest
import tiny_flux
import tiny_sd3
import tiny_z_image
import torch

import ppcl_rt

QWEN = {
    "patch_size": 2,
    "in_channels": 16,
    "out_channels": 4,
    "num_layers": 2,
    "attention_head_dim": 8,
    "num_attention_heads": 4,
    "joint_attention_dim": 12,
    "axes_dims_rope": (2, 2, 4),
}
CONFIGS = {
    "QwenImageTransformer2DModel": QWEN,
    "FluxTransformer2DModel": {**tiny_flux.CONFIG, "num_layers": 2, "num_single_layers": 2},
    "SD3Transformer2DModel": {**tiny_sd3.CONFIG, "num_layers": 3, **tiny_sd3.VARIANTS["medium"]},
    "ZImageTransformer2DModel": {**tiny_z_image.CONFIG, "n_layers": 2, "n_refiner_layers": 1},
}


def built(name, ours=True, seed=0):
    torch.manual_seed(seed)
    return getattr(ppcl_rt if ours else diffusers, ("PPCL" if ours else "") + name)(**CONFIGS[name]).eval()


@pytest.mark.parametrize("name", CONFIGS)
def test_a_seed_draws_the_weights_of_the_stock_class(name):
    """Built by hand under a seed, a model has the weights that diffusers' class has under it."""
    wanted, got = built(name, ours=False).state_dict(), built(name).state_dict()
    assert list(got) == list(wanted)
    assert all(torch.equal(got[key], wanted[key]) for key in wanted)


@pytest.mark.parametrize("size", ["10GB", "20KB"])
@pytest.mark.parametrize("name", CONFIGS)
def test_variants(name, size, tmp_path):
    """`save_pretrained` names files as diffusers does for a variant; both classes read them, and only as that."""
    model, folder = built(name), tmp_path / "saved"
    model.save_pretrained(folder, variant="fp16", max_shard_size=size)
    files = sorted(path.name for path in folder.glob("*.safetensors*"))
    if size == "10GB":
        assert files == ["diffusion_pytorch_model.fp16.safetensors"]
    else:
        assert files[0].startswith("diffusion_pytorch_model.fp16-00001-of-000")
        assert files[-1] == "diffusion_pytorch_model.safetensors.index.fp16.json"
    wanted = model.state_dict()
    stock = getattr(diffusers, name).from_pretrained(folder, variant="fp16")
    for read in (ppcl_rt.load(folder, variant="fp16"), type(model).from_pretrained(folder, variant="fp16"), stock):
        got = read.state_dict()
        assert all(torch.equal(got[key], wanted[key]) for key in wanted)
    # diffusers' callers catch OSError and look for these words; ours get a ValueError.
    for error in (OSError, ValueError):
        with pytest.raises(error, match=r'no file named diffusion_pytorch_model.bin found.*say variant="fp16"'):
            type(model).from_pretrained(folder)
    with pytest.raises(ValueError, match='say variant="fp16"'):
        ppcl_rt.load(folder, variant="bf16")
    with pytest.raises(ValueError, match="holds weights of variant fp16, weights without a variant need a folder of"):
        model.save_pretrained(folder)
    assert sorted(path.name for path in folder.glob("*.safetensors*")) == files


def test_a_stock_folder_with_two_variants(tmp_path):
    """A folder of diffusers may hold several: each is read by its name."""
    name = "QwenImageTransformer2DModel"
    plain, other = built(name, ours=False), built(name, ours=False, seed=1)
    plain.save_pretrained(tmp_path)
    other.save_pretrained(tmp_path, variant="ema")
    for variant, wanted in ((None, plain), ("ema", other)):
        got = ppcl_rt.load(tmp_path, variant=variant).state_dict()
        assert all(torch.equal(got[key], value) for key, value in wanted.state_dict().items())


def test_no_pickle(tmp_path, caplog):
    """`safe_serialization=False` writes safetensors all the same; the log says so once."""
    ppcl_rt.messages.say_once.cache_clear()
    with caplog.at_level(logging.WARNING):
        for again in ("first", "second"):
            built("QwenImageTransformer2DModel").save_pretrained(tmp_path / again, safe_serialization=False)
            assert [path.name for path in (tmp_path / again).glob("diffusion*")] == [
                "diffusion_pytorch_model.safetensors"
            ]
    assert [record.message for record in caplog.records if "safetensors" in record.message] == [
        "safe_serialization=False would write pickle: safetensors are written all the same"
    ]


def attentions(model):
    """The attention modules of a model, in order."""
    return [module for module in model.modules() if hasattr(module, "to_q") and hasattr(module, "processor")]


def inputs_of(name, seed=1):
    """A batch of two for a forward of either class."""
    model = built(name)
    torch.manual_seed(seed)
    return model.example(ppcl_rt.Tokens(image=6, text=5, batch=2))


def first(model, inputs):
    with torch.no_grad():
        output = model(**inputs)[0]
    return output if isinstance(output, torch.Tensor) else torch.stack(output)


def counting(processor, calls):
    """A processor of somebody's own, which does what the stock one does and counts."""

    class Counting(type(processor)):
        # diffusers passes what the signature names, and drops all else.
        @functools.wraps(type(processor).__call__)
        def __call__(self, *args, **kwargs):
            calls.append(type(self).__name__)
            return super().__call__(*args, **kwargs)

    return Counting()


@pytest.mark.parametrize("name", CONFIGS)
def test_attention_processors_are_called(name, caplog):
    """A processor gets what diffusers' block gives it, the log says so once, and heads are left out by name only."""
    stock, model, inputs, calls = built(name, ours=False), built(name), inputs_of(name), []
    wanted = first(stock, inputs)
    for attn in attentions(model):
        attn.set_processor(counting(attn.processor, calls))
    ppcl_rt.messages.say_once.cache_clear()
    with caplog.at_level(logging.WARNING):
        got = first(model, inputs)
    assert len(calls) == len(attentions(stock))
    assert len([record for record in caplog.records if "processor Counting" in record.message]) == 1
    torch.testing.assert_close(got, wanted, atol=1e-5, rtol=0)
    block = model.blocks()[0]
    spec = block.spec
    width = ppcl_rt.Width({**spec.full, "heads": spec.groups["heads"].count - 1})
    calls.clear()
    with pytest.raises(ValueError, match=r"processor Counting computes over all heads.* runs 3 of 4.*: run at ratio 1"):
        narrow(model, inputs, width)
    assert not calls


def narrow(model, inputs, width):
    """A forward in which the first block has a width, whatever the plan."""
    block = model.blocks()[0]
    forward = type(block).forward
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            type(block),
            "forward",
            lambda self, *args, **kwargs: forward(
                self, *args, **{**kwargs, "width": width if self is block else kwargs["width"]}
            ),
        )
        return first(model, inputs)


@pytest.mark.parametrize("name", CONFIGS)
def test_pyramid_attention(name):
    """What Pyramid-Attention Broadcast caches and skips is what it does in the stock class; at a narrow width, too."""
    config = diffusers.PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2, current_timestep_callback=lambda: 500
    )
    stock, model = built(name, ours=False), built(name)
    width = ppcl_rt.Width({**model.blocks()[0].spec.full, "heads": 3})
    uncached = first(model, inputs_of(name, 2))
    unhooked = narrow(model, inputs_of(name, 2), width)
    for each in (stock, model):
        diffusers.apply_pyramid_attention_broadcast(each, config)
    for seed in (1, 2, 3):
        wanted, got = first(stock, inputs_of(name, seed)), first(model, inputs_of(name, seed))
        torch.testing.assert_close(got, wanted, atol=1e-5, rtol=0)
        assert seed != 2 or (got - uncached).abs().max() > 1e-3
    again = built(name)
    diffusers.apply_pyramid_attention_broadcast(again, config)
    torch.testing.assert_close(narrow(again, inputs_of(name, 2), width), unhooked, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["QwenImageTransformer2DModel", "FluxTransformer2DModel"])
@pytest.mark.parametrize("kind", ["taylorseer", "first-block", "mag"])
def test_caches(name, kind):
    """The caches of diffusers give with our blocks what they give with its own."""
    config = {
        "taylorseer": lambda: diffusers.TaylorSeerCacheConfig(
            cache_interval=3, disable_cache_before_step=1, max_order=1, taylor_factors_dtype=torch.float32
        ),
        "first-block": lambda: diffusers.FirstBlockCacheConfig(threshold=10.0),
        "mag": lambda: diffusers.MagCacheConfig(
            num_inference_steps=3, retention_ratio=0.0, threshold=100.0, mag_ratios=[1.0, 1.0, 1.0]
        ),
    }[kind]
    stock, model = built(name, ours=False), built(name)
    uncached = first(model, inputs_of(name, 2))
    for each in (stock, model):
        each.enable_cache(config())
    for seed in (1, 2):
        outputs = []
        for each in (stock, model):
            with each.cache_context("cond"):
                outputs.append(first(each, inputs_of(name, seed)))
        torch.testing.assert_close(outputs[1], outputs[0], atol=1e-5, rtol=0)
    assert (outputs[1] - uncached).abs().max() > 1e-3
