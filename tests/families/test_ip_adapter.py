"""IP-adapters of FLUX and SD3.5: at ratio 1 as diffusers' class runs them, heads in rank order; refused elsewhere."""

from __future__ import annotations

import copy
import sys
from pathlib import Path

import pytest
import tiny_sd3
import torch
from diffusers.models.attention_processor import SD3IPAdapterJointAttnProcessor2_0
from diffusers.models.embeddings import ImageProjection, IPAdapterTimeImageProjection
from diffusers.models.transformers.transformer_flux import FluxIPAdapterAttnProcessor

import ppcl_rt

sys.path.insert(0, str(Path(__file__).parents[1] / "adapters"))
from test_lora_families import make_flux


def flux(folder):
    """A checkpoint in rank order, the dense model, the arguments of a forward, and an IP-adapter as files hold it."""
    folder, stock, given = make_flux(folder)
    torch.manual_seed(1)
    adapter, dim = {}, stock.config.num_attention_heads * stock.config.attention_head_dim
    text = stock.config.joint_attention_dim
    for n in range(stock.config.num_layers):
        processor = FluxIPAdapterAttnProcessor(hidden_size=dim, cross_attention_dim=text)
        adapter |= {f"{n}.{name.replace('.0', '')}": t for name, t in processor.state_dict().items()}
    projection = ImageProjection(cross_attention_dim=text, image_embed_dim=6, num_image_text_embeds=4).state_dict()
    projection = {name.replace("image_embeds", "proj"): tensor for name, tensor in projection.items()}
    batch = given["hidden_states"].shape[0]
    return folder, stock, given, [{"image_proj": projection, "ip_adapter": adapter}], [torch.randn(batch, 1, 6)]


def sd3(folder):
    made = tiny_sd3.make_checkpoint(folder, "large")
    given, dim = tiny_sd3.build_inputs(), tiny_sd3.DIM
    torch.manual_seed(1)
    projection = IPAdapterTimeImageProjection(
        embed_dim=6, output_dim=dim, hidden_dim=16, heads=1, num_queries=4, timestep_in_dim=8
    )
    adapter = {}
    for n in range(tiny_sd3.DEPTH):
        processor = SD3IPAdapterJointAttnProcessor2_0(
            hidden_size=dim, ip_hidden_states_dim=dim, head_dim=tiny_sd3.HEAD_DIM, timesteps_emb_dim=16
        )
        adapter |= {f"{n}.{name}": t for name, t in processor.state_dict().items()}
    state = {"image_proj": projection.state_dict(), "ip_adapter": adapter}
    return made.folder, made.stock, given, state, torch.randn(given["hidden_states"].shape[0], 3, 6)


@pytest.fixture(scope="module", params=[flux, sd3], ids=["flux", "sd3"])
def made(request, tmp_path_factory):
    return request.param(tmp_path_factory.mktemp("ip") / "checkpoint")


def test_at_ratio_one_it_is_that_of_stock(made, run, same):
    folder, stock, given, state, embeds = made
    stock, model = copy.deepcopy(stock), ppcl_rt.load(folder)
    without, outputs = run(model, given), []
    for each in (stock, model):
        each._load_ip_adapter_weights(copy.deepcopy(state), low_cpu_mem_usage=False)
        outputs.append(run(each, given, joint_attention_kwargs={"ip_adapter_image_embeds": embeds}))
    same(outputs[1], outputs[0])
    assert (outputs[1] - without).abs().max() > 1e-3


def test_elsewhere_it_is_refused(made, run):
    folder, _, given, state, embeds = made
    model = ppcl_rt.load(folder, 0.8)
    with pytest.raises(ValueError, match=r"run at ratio 1 alone: call set_ratio\(1\) and trim\(\) before load_ip_ad"):
        model._load_ip_adapter_weights(copy.deepcopy(state))
    with pytest.raises(ValueError, match="no IP-adapter is loaded: call load_ip_adapter, or leave"):
        run(model, given, joint_attention_kwargs={"ip_adapter_image_embeds": embeds})
    model = ppcl_rt.load(folder)
    model._load_ip_adapter_weights(copy.deepcopy(state), low_cpu_mem_usage=False)
    narrow = model.catalog.compose([(0, model.catalog.spec(0).full.replace(heads=3))])
    with pytest.raises(
        ValueError, match="computes over all heads and both streams, the plan runs 3 of 4: run at ratio"
    ):
        model.set_plan(narrow)
        run(model, given, joint_attention_kwargs={"ip_adapter_image_embeds": embeds})
    interval = model.catalog.students[0].interval
    student = ppcl_rt.PlannedBlock(interval=interval, width=model.catalog.spec(interval.first).full, student=True)
    with pytest.raises(ValueError, match="has weights for each block, and none for those that are read now"):
        model.set_plan(model.catalog.compose([], [student]))


def test_models_with_a_second_attention_refuse_it(tmp_path):
    model = ppcl_rt.load(tiny_sd3.make_checkpoint(tmp_path / "checkpoint", "medium").folder)
    with pytest.raises(ValueError, match="do not run on models with dual_attention_layers: take one without"):
        model._load_ip_adapter_weights({})


def test_what_it_is_called_with(made, run):
    """A pipeline passes nothing of an IP-adapter where it got no picture: then nothing is said."""
    folder, _, given, _, _ = made
    run(ppcl_rt.load(folder, 0.8), given, joint_attention_kwargs={"scale": 1.0})
