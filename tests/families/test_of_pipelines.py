"""What diffusers' pipelines do with a transformer: ControlNet, training steps, skip-layer guidance by hooks."""

from __future__ import annotations

import inspect

import diffusers
import fixtures
import numpy as np
import pytest
import tiny_flux
import tiny_sd3
import tiny_z_image
import torch
from diffusers.hooks import LayerSkipConfig, apply_layer_skip
from test_caches import MAKERS, narrow
from test_of_diffusers import CONFIGS, built, first, inputs_of

import ppcl_rt
from ppcl_rt.pipelines.drawing import How
from ppcl_rt.pipelines.task import task_of


def net_of(of_class, stock, **changes):
    """A ControlNet of a model's sizes."""
    names = set(inspect.signature(of_class.__init__).parameters)
    return of_class(**{name: value for name, value in stock.config.items() if name in names} | changes)


def of_flux(folder, parts):
    stock = tiny_flux.build_stock(pooled_projection_dim=768)
    net = net_of(diffusers.FluxControlNetModel, stock, num_layers=2, num_single_layers=1)
    return stock, net, tiny_flux.pipeline_parts(folder), diffusers.FluxControlNetPipeline


def of_sd3(folder, parts):
    stock = tiny_sd3.build_stock("medium", pooled_projection_dim=2048)
    net = net_of(diffusers.SD3ControlNetModel, stock, num_layers=2, extra_conditioning_channels=0)
    return stock, net, tiny_sd3.pipeline_parts(folder), diffusers.StableDiffusion3ControlNetPipeline


def of_qwen(folder, parts):
    stock = fixtures._build_stock()
    net = net_of(diffusers.QwenImageControlNetModel, stock, num_layers=2)
    return (
        stock,
        net,
        {name: parts[name] for name in ("scheduler", "vae", "text_encoder", "tokenizer")},
        (diffusers.QwenImageControlNetPipeline),
    )


def flux_pipeline(folder):
    stock = tiny_flux.build_stock(pooled_projection_dim=768)
    return diffusers.FluxPipeline(**tiny_flux.pipeline_parts(folder), transformer=stock)


def sd3_pipeline(folder):
    stock = tiny_sd3.build_stock("medium", pooled_projection_dim=2048)
    return diffusers.StableDiffusion3Pipeline(**tiny_sd3.pipeline_parts(folder), transformer=stock)


def z_image_pipeline(folder):
    stock = tiny_z_image.make_checkpoint(folder / "checkpoint", compensated=False).stock
    return diffusers.ZImagePipeline(**tiny_z_image.pipeline_parts(folder), transformer=stock)


@pytest.mark.parametrize("make", [flux_pipeline, sd3_pipeline, z_image_pipeline])
def test_a_folder_draws_through_its_pipeline(make, tmp_path):
    """As diffusers' pipeline of the family, and what it calls the transformer with is an example of a forward."""
    stock, folder = make(tmp_path), tmp_path / "pipeline"
    stock.save_pretrained(folder)
    stock.set_progress_bar_config(disable=True)
    model = ppcl_rt.load(folder / "transformer")
    task, how = task_of(model.catalog, folder), How(steps=2, guidance=2.0, size=(16, 16))
    [drawn] = task.sample(model, ["a"], 3, how)
    given = {"negative_prompt": " ", "num_inference_steps": 2, "guidance_scale": 2.0, "height": 16, "width": 16}
    [wanted] = stock("a", **given, generator=torch.Generator().manual_seed(3)).images
    # Whole numbers up to 255: where sums of another order fall on the other side of a half, they differ by 1.
    np.testing.assert_allclose(np.asarray(drawn, dtype=int), np.asarray(wanted, dtype=int), atol=1)
    task.usual = how
    first_of = model(**task.example(model, 1))[0]
    assert torch.isfinite(torch.as_tensor(first_of[0])).all()


@pytest.mark.parametrize("make", [of_flux, of_sd3, of_qwen])
def test_controlnet_through_the_pipeline(make, tmp_path, parts):
    """Dense as diffusers' class; with a block left out, residuals of all blocks are still added."""
    stock, net, of_pipeline, pipeline = make(tmp_path, parts)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    stock.save_pretrained(tmp_path / "stock")
    model, pictures = ppcl_rt.load(tmp_path / "stock"), []
    blocks = [block for block in model.catalog.dense.blocks if block.interval.first != 1]
    without = model.catalog.dense.model_copy(update={"blocks": tuple(blocks)})
    for transformer, plan, scale in (
        (stock, None, 1.0),
        (model, model.catalog.dense, 1.0),
        (model, without, 1.0),
        (model, without, 0.0),
    ):
        if plan is not None:
            transformer.set_plan(plan)
        pipe = pipeline(**of_pipeline, transformer=transformer, controlnet=net.eval())
        pipe.set_progress_bar_config(disable=True)
        # SD3's pipeline encodes the control image by the process's generator.
        torch.manual_seed(0)
        generator = torch.Generator().manual_seed(0)
        given = {"prompt": "a", "num_inference_steps": 2, "output_type": "pt", "height": 16, "width": 16}
        given |= {"control_image": torch.linspace(0, 1, 768).view(1, 3, 16, 16), "generator": generator}
        pictures.append(pipe(**given, controlnet_conditioning_scale=scale).images)
    torch.testing.assert_close(pictures[1], pictures[0], atol=2e-5, rtol=0)
    assert (pictures[2] - pictures[1]).abs().max() > 1e-4 and (pictures[3] - pictures[2]).abs().max() > 1e-4


@pytest.mark.parametrize("family", MAKERS)
def test_a_training_step_with_checkpointing(family, tmp_path):
    """At a narrow plan, gradients with checkpointing are those without, and a step of an optimiser lessens the loss."""
    made, inputs = MAKERS[family](tmp_path / "made")
    gradients = []
    for checkpointing in (False, True):
        model = ppcl_rt.load(made.folder, plan=narrow(made)).train()
        if checkpointing:
            model.enable_gradient_checkpointing()

        def loss(model=model):
            output = model(**inputs(1), return_dict=False)[0]
            return (output if isinstance(output, torch.Tensor) else torch.stack(output)).square().mean()

        before = loss()
        before.backward()
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
        torch.optim.SGD(model.parameters(), 1e-4).step()
        assert loss() < before
    assert len(gradients[0]) > 20
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5 * max(1.0, float(one.abs().max())), rtol=0)


# Of these diffusers' hooks find nothing in its own classes either.
_UNKNOWN = {("ZImage", "skip_attention"), ("FluxTr", "skip_ff"), ("SD3Tra", "skip_ff")}


@pytest.mark.parametrize(
    ("name", "what"),
    [
        (name, what)
        for name in CONFIGS
        for what in ({}, {"skip_ff": False}, {"skip_attention": False})
        if (name[:6], *what) not in _UNKNOWN
    ],
)
def test_layer_skip_hooks_are_refused(name, what):
    """diffusers' hooks that leave a block, its attention or its MLPs out."""
    model = built(name)
    path = "layers" if name.startswith("ZImage") else "transformer_blocks"
    apply_layer_skip(model, LayerSkipConfig(indices=[1], fqn=path, **what))
    with pytest.raises(ValueError, match=r"skip-layer guidance by diffusers' hooks .* does not run here: remove them"):
        first(model, inputs_of(name))
