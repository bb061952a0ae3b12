"""Adapters of the base model on a pluggable one: as on the dense model, cut as the weights are."""

from __future__ import annotations

import copy
import json

import numpy as np
import pytest
import torch
from fixtures import DIM, SPEC, Made
from safetensors.torch import load_file, save_file

import ppcl_rt
from ppcl_rt import Width

pytest.importorskip("peft")

# Of each block: what is in both streams, what goes in and out of attention and MLPs, modulations.
LAYERS = (
    *("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0", "attn.add_q_proj", "attn.add_v_proj", "attn.to_add_out"),
    *("img_mlp.net.0.proj", "img_mlp.net.2", "txt_mlp.net.0.proj", "txt_mlp.net.2", "img_mod.1", "txt_mod.1"),
)
OUTSIDE = ("img_in", "time_text_embed.timestep_embedder.linear_1", "norm_out.linear", "proj_out")


def make_lora(stock, layers=LAYERS, outside=OUTSIDE, rank=3, seed=0, size=0.15):
    """The factors of an adapter, by the names that a file has."""
    generator, state = torch.Generator().manual_seed(seed), {}
    paths = [f"transformer_blocks.{n}.{layer}" for n in range(len(stock.transformer_blocks)) for layer in layers]
    for path in (*paths, *outside):
        rows, columns = stock.get_submodule(path).weight.shape
        state[f"transformer.{path}.lora_A.weight"] = torch.randn(rank, columns, generator=generator) * size
        state[f"transformer.{path}.lora_B.weight"] = torch.randn(rows, rank, generator=generator) * size
    return state


def merged(model, state, scale=1.0):
    """A stock model with an adapter added to its weights."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        for name, down in state.items():
            if name.endswith("lora_A.weight"):
                path = name.removeprefix("transformer.").removesuffix(".lora_A.weight")
                model.get_submodule(path).weight += scale * state[name.replace("lora_A", "lora_B")] @ down
    return model


def test_at_ratio_one_it_is_that_of_the_teacher(made, build_inputs, run, same):
    state, given = make_lora(made.stock), build_inputs()
    model = ppcl_rt.load(made.folder)
    before = run(model, given)
    model.load_lora_adapter(state, adapter_name="one")
    wanted = run(merged(made.stock, state), given)
    assert (wanted - before).abs().max() > 0.1
    same(run(model, given), wanted)
    model.set_adapters(["one"], [0.5])
    same(run(model, given), run(merged(made.stock, state, 0.5), given))
    same(run(model, given, attention_kwargs={"scale": 0.5}), run(merged(made.stock, state, 0.25), given))
    model.disable_lora()
    same(run(model, given), before)
    model.enable_lora()
    model.unload_lora()
    same(run(model, given), before)


@pytest.mark.parametrize("fixture", ["made", "compensated", "mapped"])
def test_ratios_visited_later_have_it(fixture, request, build_inputs, run, same):
    """A block that grows or comes later gets its part: the order of visits makes no difference."""
    made = request.getfixturevalue(fixture)
    state, given = make_lora(made.stock), build_inputs()
    model = ppcl_rt.load(made.folder, 0.45)
    model.load_lora_adapter(state, adapter_name="one")
    model.set_adapters(["one"], [0.7])
    for ratio in (0.45, 0.7, 1.0, 0.6):
        fresh = ppcl_rt.load(made.folder, ratio)
        without = run(fresh, given)
        fresh.load_lora_adapter(state, adapter_name="one")
        fresh.set_adapters(["one"], [0.7])
        model.set_ratio(ratio)
        got = run(model, given)
        same(got, run(fresh, given))
        assert (got - without).abs().max() > 1e-2
    same(run(ppcl_rt.load(made.folder, 1.0), given), run(made.stock, given))
    model.set_ratio(1.0)
    same(run(model, given), run(merged(made.stock, state, 0.7), given))


class Adapted(Made):
    """What a plan runs, by the law of it, with an adapter added to the layers of the dense model that are left."""

    def added(self, planned, path):
        origin = f"transformer.transformer_blocks.{planned.interval.first}.{path}"
        return self.state[f"{origin}.lora_B.weight"] @ self.state[f"{origin}.lora_A.weight"]

    def reference_block(self, planned):
        block = super().reference_block(planned)
        inputs = {output.part.path: output.segment.group for output in SPEC.outputs}
        with torch.no_grad():
            for layer in LAYERS:
                weight, delta = block.get_submodule(layer).weight, self.added(planned, layer)
                if layer in inputs:
                    group = inputs[layer]
                    if planned.width.get(group, 0) == 0:
                        continue
                    kept = torch.zeros(delta.shape[1])
                    kept[self.kept(planned, group)] = 1
                    delta = delta * kept
                stream = {"img_mod.1": "image", "txt_mod.1": "text"}.get(layer)
                if stream is not None and planned.width.get(stream) == 0:
                    # The gate of the MLP half: `Made` set it, because a linear map has none.
                    delta[5 * DIM :] = 0
                weight += delta
        return block

    def reference(self, plan):
        outside = {n: t for n, t in self.state.items() if "transformer_blocks" not in n}
        return merged(super().reference(plan), outside)


@pytest.mark.parametrize("fixture", ["made", "compensated", "mapped"])
def test_narrow_is_stock_with_columns_zeroed(fixture, request, build_inputs, run, same):
    """Twenty random plans: blocks left out, students, replaced and factored layers, maps, text runs."""
    made = request.getfixturevalue(fixture)
    adapted = Adapted(**vars(made))
    adapted.state, given = make_lora(made.stock), build_inputs()
    model = ppcl_rt.load(made.folder, 0.45)
    model.load_lora_adapter(adapted.state, adapter_name="one")
    rng = np.random.default_rng(0)
    for _ in range(20):
        plan = made.random_plan(rng, skip=0.2, legal=True)
        model.set_plan(plan)
        same(run(model, given), run(adapted.reference(plan), given), 2e-5)


@pytest.mark.parametrize("fixture", ["made", "compensated", "mapped"])
def test_fused(fixture, request, build_inputs, run, same):
    """In the weights it gives what it gives beside them, at ratios that are visited before, then and after."""
    made = request.getfixturevalue(fixture)
    state, second, given = make_lora(made.stock), make_lora(made.stock, seed=1, rank=2, size=0.1), build_inputs()
    beside, model = ppcl_rt.load(made.folder, 0.6), ppcl_rt.load(made.folder, 0.6)
    plain = {ratio: run(ppcl_rt.load(made.folder, ratio), given) for ratio in (0.6, 0.8, 0.45, 1.0)}
    for each in (beside, model):
        each.load_lora_adapter(state, adapter_name="one")
        each.load_lora_adapter(second, adapter_name="two")
        each.set_adapters(["one", "two"], [0.6, 0.8])
    model.fuse_lora()
    same(run(model, given), run(beside, given))
    for unload in (False, True):
        if unload:
            model.unload_lora()
            assert not any("lora" in name for name, _ in model.named_modules())
        for ratio in (0.8, 0.45, 1.0, 0.6):
            model.set_ratio(ratio)
            beside.set_ratio(ratio)
            same(run(model, given), run(beside, given), 2e-5)
        model.trim()
    model = ppcl_rt.load(made.folder, 0.6)
    model.load_lora_adapter(state, adapter_name="one")
    model.load_lora_adapter(second, adapter_name="two")
    model.fuse_lora(adapter_names=["two"])
    model.set_ratio(0.8)
    model.unfuse_lora()
    model.unload_lora()
    for ratio, wanted in plain.items():
        model.set_ratio(ratio)
        same(run(model, given), wanted, 2e-5)


def test_what_a_plan_takes(mapped):
    """One block skipped, one student, one text run, one linear map; all else exactly or over what is kept."""
    state = make_lora(mapped.stock)
    model = ppcl_rt.load(mapped.folder)
    model.load_lora_adapter(state, adapter_name="one")
    assert model.adapter_report("one") == (len(state) // 2, {}, {})
    full, narrow = dict(mapped.catalog.spec(0).full), mapped.catalog.blocks[0]
    heads = narrow.of("heads")[-1].units
    assert heads < full["heads"]
    plan = mapped.catalog.compose([(0, Width({**full, "heads": heads, "image": 0})), (3, Width(full))])
    model.set_plan(plan)
    report = model.adapter_report("one")
    over = "over the heads and channels that are kept; the layer makes up for the others"
    assert report.approximately == {over: 2}
    assert report.left_out == {"block not run": 26, "a linear map runs in place of the MLP": 2}
    assert report.exactly == 2 * 13 - 4 + len(OUTSIDE)
    assert "26 layers left out: block not run" in str(report)
    with pytest.raises(ValueError, match="no adapter two was loaded; there are one"):
        model.adapter_report("two")


def test_what_a_plan_takes_on_the_command_line(mapped, ppcl, tmp_path):
    state = make_lora(mapped.stock)
    save_file(state, tmp_path / "style.safetensors")
    status, said, error = ppcl(
        "info", mapped.folder, "--lora", tmp_path / "style.safetensors", "--ratio", 0.6, "--json"
    )
    assert status == 0, error
    model = ppcl_rt.load(mapped.folder, 0.6)
    model.load_lora_adapter(state, adapter_name="one")
    exactly, approximately, left_out = json.loads(said).values()
    assert (exactly, approximately, left_out) == model.adapter_report("one")
    assert exactly + sum(approximately.values()) + sum(left_out.values()) == len(state) // 2
    status, said, _ = ppcl("info", mapped.folder, "--lora", tmp_path / "style.safetensors")
    assert status == 0 and said == f"{len(state) // 2} layers exactly\n"
    save_file({"transformer.x.lora_A.weight": torch.zeros(2, 2)}, tmp_path / "style.safetensors")
    status, _, error = ppcl("info", mapped.folder, "--lora", tmp_path / "style.safetensors")
    assert status == 2 and error.count("\n") == 1


def test_trained_and_saved(mapped, tmp_path, build_inputs, run, same):
    """What is trained on narrow blocks is saved in stock order, and goes with them when they grow."""
    state, given = make_lora(mapped.stock), build_inputs()
    model = ppcl_rt.load(mapped.folder, 0.6)
    model.load_lora_adapter(state, adapter_name="one")
    narrow = model.plan
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_" in name:
                parameter.mul_(1.3)
    wanted = run(model, given)
    model.save_lora_adapter(tmp_path, "one", weight_name="x.safetensors")
    model.set_ratio(1.0)
    model.set_plan(narrow)
    same(run(model, given), wanted)
    model.save_lora_adapter(tmp_path, "one", weight_name="y.safetensors")
    for name in ("x", "y"):
        saved = load_file(tmp_path / f"{name}.safetensors")
        assert {f"transformer.{path}" for path in saved} == set(state)
        again = ppcl_rt.load(mapped.folder, 0.6)
        again.load_lora_adapter(tmp_path, weight_name=f"{name}.safetensors", prefix=None)
        # Students have what their block had, and not what they were trained to.
        if not any(block.student for block in narrow.blocks):
            same(run(again, given), wanted)
    assert not list(tmp_path.glob(".*"))


def test_a_new_adapter_on_narrow_blocks(mapped, build_inputs, run, same):
    """peft makes it on what is resident; blocks that grow add nothing to it."""
    from peft import LoraConfig

    model, given = ppcl_rt.load(mapped.folder, 0.6), build_inputs()
    before = run(model, given)
    model.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_out.0", "net.2", "img_mod.1"], lora_alpha=4))
    same(run(model, given), before)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_B" in name:
                parameter.normal_(0, 0.1, generator=torch.Generator().manual_seed(len(name)))
    narrow, wanted = model.plan, run(model, given)
    assert (wanted - before).abs().max() > 1e-2
    model.set_ratio(1.0)
    model.set_plan(narrow)
    same(run(model, given), wanted)


@pytest.mark.parametrize(("room", "rank"), [(None, 3), (None, 2), (4, 2), (4, 4)])
def test_hot_swap(mapped, build_inputs, run, same, room, rank):
    one, two, given = make_lora(mapped.stock), make_lora(mapped.stock, rank=rank, seed=1), build_inputs()
    model, fresh = ppcl_rt.load(mapped.folder, 0.6), ppcl_rt.load(mapped.folder, 0.6)
    if room is not None:
        model.enable_lora_hotswap(target_rank=room)
    model.load_lora_adapter(one, adapter_name="one")
    model.load_lora_adapter(two, adapter_name="one", hotswap=True)
    fresh.load_lora_adapter(two, adapter_name="one")
    for ratio in (0.6, 0.8):
        model.set_ratio(ratio)
        fresh.set_ratio(ratio)
        same(run(model, given), run(fresh, given))


def test_alphas(made, build_inputs, run, same):
    """Of a file of kohya's, of peft's settings, and of blocks that come later."""
    state, given = make_lora(made.stock), build_inputs()
    settings = {"transformer.r": 3, "transformer.lora_alpha": 6, "transformer.alpha_pattern": {"to_q": 1.5}}
    alphas = {name.replace(".lora_A.weight", ".alpha"): 6.0 for name in state if "lora_A" in name}
    alphas |= {name: 1.5 for name in alphas if "to_q" in name}
    scaled = {n: t * ((0.5 if "to_q" in n else 2) if "lora_B" in n else 1) for n, t in state.items()}
    wanted = ppcl_rt.load(made.folder, 0.5)
    wanted.load_lora_adapter(scaled)
    for more in ({"metadata": settings}, {"network_alphas": alphas}):
        model = ppcl_rt.load(made.folder, 0.5)
        model.load_lora_adapter(state, **more)
        for ratio in (0.5, 1.0):
            model.set_ratio(ratio)
            wanted.set_ratio(ratio)
            same(run(model, given), run(wanted, given))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"transformer.transformer_blocks.0.attn.nothing": (32, 32)}, "has no layer transformer_blocks.0.attn.nothing"),
        ({"transformer.transformer_blocks.9.attn.to_q": (32, 32)}, "has no layer transformer_blocks.9.attn.to_q"),
        (
            {"transformer.transformer_blocks.0.attn.to_q": (32, 48)},
            r"adds \[32, 48\] to transformer_blocks.0.attn.to_q",
        ),
        ({"transformer.proj_out": (7, 32)}, r"adds \[7, 32\] to proj_out"),
        ({"transformer.transformer_blocks.0.attn.to_q.lora_magnitude_vector": None}, "wanted a plain LoRA"),
        ({"transformer.transformer_blocks.0.attn.to_k.lora_A.weight": None}, "wanted both"),
    ],
)
def test_other_adapters_are_refused(made, build_inputs, run, change, message):
    """In one line, with nothing changed."""
    model, given, state = ppcl_rt.load(made.folder), build_inputs(), {}
    before = run(model, given)
    for path, shape in change.items():
        if shape is None:
            state[path] = torch.zeros(2, 32)
        else:
            state |= {f"{path}.lora_A.weight": torch.zeros(2, shape[1])}
            state |= {f"{path}.lora_B.weight": torch.zeros(shape[0], 2)}
    with pytest.raises(ValueError, match=message):
        model.load_lora_adapter(state, adapter_name="one")
    assert torch.equal(run(model, given), before)
    assert not any("lora" in name for name, _ in model.named_modules())


def test_one_after_another_under_one_name(mapped, build_inputs, run, same):
    """Each fused and unloaded before the next: all are in the weights, in those that are read later too."""
    states, given = [make_lora(mapped.stock, seed=seed, size=0.1) for seed in (0, 1)], build_inputs()
    beside, model = ppcl_rt.load(mapped.folder, 0.6), ppcl_rt.load(mapped.folder, 0.6)
    for number, state in enumerate(states):
        beside.load_lora_adapter(state, adapter_name=f"number {number}")
        model.load_lora_adapter(state, adapter_name="one")
        model.fuse_lora()
        with pytest.raises(ValueError, match="adapter one is fused: unfuse_lora takes it out, unload_lora leaves it"):
            model.delete_adapters("one")
        model.unload_lora()
    beside.set_adapters(["number 0", "number 1"])
    for ratio in (0.6, 0.8, 1.0, 0.45):
        model.set_ratio(ratio)
        beside.set_ratio(ratio)
        same(run(model, given), run(beside, given), 2e-5)


def test_precomputed_modulations(mapped, build_inputs, run, same):
    """Tables are not looked up while an adapter is on modulations, and are made anew once it is in the weights."""
    state, given = make_lora(mapped.stock), build_inputs()
    model, plain = ppcl_rt.load(mapped.folder, 0.6), ppcl_rt.load(mapped.folder, 0.6)
    model.precompute(given["timestep"])
    run(model, given)
    for each in (model, plain):
        each.load_lora_adapter(state, adapter_name="one")
    same(run(model, given), run(plain, given))
    same(run(model, given, attention_kwargs={"scale": 0.5}), run(plain, given, attention_kwargs={"scale": 0.5}))
    for each in (model, plain):
        each.fuse_lora()
        each.unload_lora()
    same(run(model, given), run(plain, given))
    model.precompute(given["timestep"], keep_weights=False)
    same(run(model, given), run(plain, given))
    model.load_lora_adapter(make_lora(mapped.stock, seed=1), adapter_name="two")
    with pytest.raises(ValueError, match="adapters on modulations need their weights"):
        run(model, given)


def test_saved_with_what_is_fused(compensated, mapped, tmp_path, build_inputs, run, same):
    """In the weights at every ratio; where modulations come at a low rank there is no place for it."""
    state, given = make_lora(compensated.stock), build_inputs()
    model = ppcl_rt.load(compensated.folder, 0.6)
    model.load_lora_adapter(state, adapter_name="one")
    model.save_pretrained(tmp_path / "beside")
    model.fuse_lora()
    model.save_pretrained(tmp_path / "fused")
    model.save_plan(tmp_path / "plan")
    same(run(ppcl_rt.load(tmp_path / "plan"), given), run(model, given))
    for ratio in (0.6, 1.0):
        model.set_ratio(ratio)
        same(run(ppcl_rt.load(tmp_path / "fused", ratio), given), run(model, given))
        same(run(ppcl_rt.load(tmp_path / "beside", ratio), given), run(ppcl_rt.load(compensated.folder, ratio), given))
    model = ppcl_rt.load(mapped.folder, 0.6)
    model.load_lora_adapter(state, adapter_name="one")
    model.fuse_lora()
    for save in (model.save_pretrained, model.save_plan):
        with pytest.raises(ValueError, match="fused into modulations of a low rank"):
            save(tmp_path / "refused")
    assert not (tmp_path / "refused").exists()
    model.unfuse_lora()
    model.save_plan(tmp_path / "unfused")
