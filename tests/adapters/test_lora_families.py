"""Adapters on the other families: dense they give what stock gives with the adapter in its weights; narrow, fused."""

from __future__ import annotations

import copy
import sys
from pathlib import Path

import diffusers
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import ppcl_rt

sys.path.insert(0, str(Path(__file__).parents[1] / "families"))
import tiny_flux
import tiny_sd3
import tiny_z_image
from random_checkpoint import RandomCheckpoint
from test_flux import COUNTS

pytest.importorskip("peft")


def make_flux(folder):
    made = RandomCheckpoint.make(
        folder, ppcl_rt.PPCLFluxTransformer2DModel, tiny_flux.build_stock(), COUNTS, ((0, 1), (3, 4)), ((0, 1),), True
    )
    return made.folder, made.stock, tiny_flux.build_inputs()


def make_sd3(folder):
    made = tiny_sd3.make_checkpoint(folder, "medium")
    return made.folder, made.stock, tiny_sd3.build_inputs()


def make_z_image(folder):
    made = tiny_z_image.make_checkpoint(folder)
    return made.folder, made.stock, tiny_z_image.build_inputs()


@pytest.fixture(scope="module", params=[make_flux, make_sd3, make_z_image], ids=["flux", "sd3", "z-image"])
def made(request, tmp_path_factory):
    return request.param(tmp_path_factory.mktemp("adapters") / "checkpoint")


def make_lora(stock, rank=2, seed=0):
    """Factors for every linear layer."""
    generator, state = torch.Generator().manual_seed(seed), {}
    for path, module in stock.named_modules():
        if isinstance(module, nn.Linear):
            rows, columns = module.weight.shape
            state[f"transformer.{path}.lora_A.weight"] = torch.randn(rank, columns, generator=generator) * 0.1
            state[f"transformer.{path}.lora_B.weight"] = torch.randn(rows, rank, generator=generator) * 0.1
    return state


def merged(stock, state):
    model = copy.deepcopy(stock)
    with torch.no_grad():
        for name, down in state.items():
            if name.endswith("lora_A.weight"):
                path = name.removeprefix("transformer.").removesuffix(".lora_A.weight")
                model.get_submodule(path).weight += state[name.replace("lora_A", "lora_B")] @ down
    return model


def equal(got, wanted, same):
    # Z-Image gives an image for each sample.
    for one, other in zip(got, wanted, strict=True):
        same(one, other, 2e-5)


def test_at_ratio_one_it_is_that_of_stock(made, run, same):
    folder, stock, given = made
    state = make_lora(stock)
    wanted = run(merged(stock, state), given)
    model = ppcl_rt.load(folder)
    before = run(model, given)
    model.load_lora_adapter(state, adapter_name="one")
    equal(run(model, given), wanted, same)
    assert max((one - other).abs().max() for one, other in zip(before, wanted, strict=True)) > 1e-2
    model.fuse_lora()
    equal(run(model, given), wanted, same)
    model.unfuse_lora()
    equal(run(model, given), wanted, same)
    model.unload_lora()
    equal(run(model, given), before, same)


def test_visited_later_and_fused(made, run, same):
    folder, stock, given = made
    state = make_lora(stock)
    smallest = ppcl_rt.load(folder).planner.smallest
    first, *others = (smallest + (1 - smallest) * share for share in (0.2, 0.6, 1.0, 0.01))
    later, fused = ppcl_rt.load(folder, first), ppcl_rt.load(folder, first)
    for model in (later, fused):
        model.load_lora_adapter(state, adapter_name="one")
    fused.fuse_lora()
    fused.unload_lora()
    for ratio in (first, *others):
        fresh = ppcl_rt.load(folder, ratio)
        plain = run(fresh, given)
        fresh.load_lora_adapter(state, adapter_name="one")
        wanted = run(fresh, given)
        assert max((one - other).abs().max() for one, other in zip(plain, wanted, strict=True)) > 1e-2
        for model in (later, fused):
            model.set_ratio(ratio)
            equal(run(model, given), wanted, same)


def test_a_new_adapter_on_narrow_blocks(made, run, same):
    """Trained a step on what is resident, it goes along when blocks grow."""
    from peft import LoraConfig

    folder, _, given = made
    smallest = ppcl_rt.load(folder).planner.smallest
    model = ppcl_rt.load(folder, smallest + 0.3 * (1 - smallest))
    before = run(model, given)
    model.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_out.0"], lora_alpha=4))
    trained = [parameter for name, parameter in model.named_parameters() if ".lora_" in name]
    for _ in range(2):
        output = model(**given, return_dict=False)[0]
        sum(each.square().mean() for each in output).backward()
        torch.optim.SGD(trained, 1.0).step()
    narrow, wanted = model.plan, run(model, given)
    assert max((one - other).abs().max() for one, other in zip(before, wanted, strict=True)) > 1e-3
    model.set_ratio(1.0)
    model.set_plan(narrow)
    equal(run(model, given), wanted, same)


def test_hot_swap(made, run, same):
    """Another adapter, of another rank, in place of one of the same name, also in what is read later."""
    folder, stock, given = made
    smallest = ppcl_rt.load(folder).planner.smallest
    model, fresh = (ppcl_rt.load(folder, smallest + 0.2 * (1 - smallest)) for _ in range(2))
    model.enable_lora_hotswap(target_rank=3)
    model.load_lora_adapter(make_lora(stock, rank=3), adapter_name="one")
    model.load_lora_adapter(make_lora(stock, rank=2, seed=1), adapter_name="one", hotswap=True)
    fresh.load_lora_adapter(make_lora(stock, rank=2, seed=1), adapter_name="one")
    for each in (model, fresh):
        each.set_ratio(smallest + 0.6 * (1 - smallest))
    equal(run(model, given), run(fresh, given), same)


PIPELINES = {
    "flux": (tiny_flux.pipeline_parts, "FluxPipeline"),
    "sd3": (tiny_sd3.pipeline_parts, "StableDiffusion3Pipeline"),
    "z-image": (tiny_z_image.pipeline_parts, "ZImagePipeline"),
}


def test_through_the_pipeline(made, tmp_path, run, same):
    """`load_lora_weights`, `set_adapters`, `fuse_lora` and `unload_lora_weights` of diffusers, on narrow blocks."""
    folder, stock, given = made
    state = make_lora(stock)
    model = ppcl_rt.load(folder)
    smallest = model.planner.smallest
    model = ppcl_rt.load(folder, smallest + 0.3 * (1 - smallest))
    before = run(model, given)
    parts, name = PIPELINES[model.family]
    pipe = getattr(diffusers, name)(**parts(tmp_path), transformer=model)
    save_file(state, tmp_path / "style.safetensors")
    pipe.load_lora_weights(tmp_path, weight_name="style.safetensors", adapter_name="style")
    wanted = ppcl_rt.load(folder, smallest + 0.3 * (1 - smallest))
    wanted.load_lora_adapter(state, adapter_name="style")
    equal(run(model, given), run(wanted, given), same)
    assert pipe.get_active_adapters() == ["style"] and pipe.get_list_adapters() == {"transformer": ["style"]}
    pipe.set_adapters(["style"], [0.4])
    wanted.set_adapters(["style"], [0.4])
    half = run(wanted, given)
    equal(run(model, given), half, same)
    pipe.fuse_lora(adapter_names=["style"])
    pipe.unload_lora_weights()
    equal(run(model, given), half, same)
    assert max((one - other).abs().max() for one, other in zip(before, half, strict=True)) > 1e-2
