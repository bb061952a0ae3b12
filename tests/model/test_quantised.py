"""Weights in eight bits: a model over them is the dense model with its weights rounded, at every width."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import ppcl_rt
from ppcl_rt import Budget, Quantisation
from ppcl_rt.model.quantising import check_device, understood
from ppcl_rt.ops.quantised import QuantisedLinear, rounded

sys.path.insert(0, str(Path(__file__).parents[1] / "families"))
import tiny_flux
import tiny_sd3
import tiny_z_image
from random_checkpoint import RandomCheckpoint
from test_flux import COUNTS

# Weights alone are rounded: the dense model over the rounded weights is another order of the same sums.
WEIGHT_ONLY = ("int8", "float8")


def layers_of(model):
    return {path: m for path, m in model.named_modules() if isinstance(m, QuantisedLinear)}


def rounded_like(model, quantised):
    """A dense model with the weights that a quantised one holds."""
    for path, layer in layers_of(quantised).items():
        path = path.removesuffix(".base_layer")
        held = model.get_submodule(path)
        assert held.weight.shape == layer.weight.shape
        held.weight.data = layer.product(torch.eye(layer.in_features)).T.contiguous()
    return model


@pytest.mark.parametrize("format", ["int8", "float8", "float8-dynamic"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_layer(format, dtype):
    """Every width of a layer is that of the weight within half a step of its format, and moves and casts keep it."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(33, 47, generator=generator) * torch.logspace(-2, 0, 33)[:, None]
    weight[3] = 0
    x = torch.randn(2, 5, 47, generator=generator).to(dtype) * 30
    layer = QuantisedLinear(format)
    layer.bias = torch.nn.Parameter(torch.randn(33, generator=generator))
    layer.hold(weight)
    before = [layer.weight.clone(), layer.scale.clone()]
    layer.to(dtype)
    assert all(map(torch.equal, before, [layer.weight, layer.scale])) and layer.bias.dtype == dtype
    assert layer.weight.itemsize == 1
    # The largest error of a weight is half a step: of int8 1/127 of the row's largest, of float8 2^-3 of itself.
    step = weight.abs().amax(1, keepdim=True) / 127 if format == "int8" else weight.abs() / 8
    stored = layer.weight if format == "int8" else layer.weight.view(torch.float8_e4m3fn)
    held = stored.float() * layer.scale[:, None]
    assert ((held - weight).abs() <= 0.51 * step + 1e-3 * weight.abs().amax(1, keepdim=True)).all()
    for rows, first, columns in ((None, 0, 47), (17, 0, 47), (17, 5, 11), (33, 36, 11)):
        wanted = x[..., :columns].double() @ held[:rows, first : first + columns].double().T
        wanted = wanted + layer.bias[:rows].double()
        size = x[..., :columns].double().abs() @ held[:rows, first : first + columns].double().abs().T
        got = layer(x[..., :columns], rows, first).double()
        # Of each product a rounding of the dtype, of the result one more; float8 inputs are off by 2^-4 each.
        step = {torch.float32: 1e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}[dtype]
        step += 2**-4 if format == "float8-dynamic" else 0
        assert got.isfinite().all() and ((got - wanted).abs() <= step * (size + wanted.abs()) + 2e-3).all()


def test_gradients_pass_through_a_layer():
    for format in ("int8", "float8", "float8-dynamic"):
        layer = QuantisedLinear(format)
        layer.hold(torch.randn(6, 4))
        x = torch.randn(3, 4, requires_grad=True)
        layer(x).sum().backward()
        torch.testing.assert_close(x.grad, layer.product(torch.eye(4)).sum(1).expand(3, 4).detach())


@pytest.mark.parametrize("fixture", ["made", "compensated", "mapped"])
@pytest.mark.parametrize("format", WEIGHT_ONLY)
def test_it_is_the_model_with_rounded_weights(fixture, format, request, build_inputs, run, same):
    folder, given = request.getfixturevalue(fixture).folder, build_inputs()
    for ratio in (1.0, 0.6, 0.45):
        model = ppcl_rt.load(folder, ratio, quantize=format)
        dense = ppcl_rt.load(folder, ratio)
        before = run(dense, given)
        got = run(model, given)
        assert len(layers_of(model)) >= 8 and (got - before).abs().max() > 1e-3
        same(got, run(rounded_like(dense, model), given))


def make_flux(folder):
    kind = ppcl_rt.PPCLFluxTransformer2DModel
    made = RandomCheckpoint.make(folder, kind, tiny_flux.build_stock(), COUNTS, ((0, 1),), ((0, 1),), True)
    return made.folder, tiny_flux.build_inputs()


def make_sd3(folder):
    return tiny_sd3.make_checkpoint(folder, "medium").folder, tiny_sd3.build_inputs()


def make_z_image(folder):
    return tiny_z_image.make_checkpoint(folder).folder, tiny_z_image.build_inputs()


@pytest.mark.parametrize("make", [make_flux, make_sd3, make_z_image], ids=["flux", "sd3", "z-image"])
def test_other_families(make, tmp_path, run, same):
    folder, given = make(tmp_path / "checkpoint")
    for ratio in (1.0, 0.8):
        model = ppcl_rt.load(folder, ratio, quantize="int8")
        assert layers_of(model)
        got, wanted = run(model, given), run(rounded_like(ppcl_rt.load(folder, ratio), model), given)
        for one, other in zip(*((y if isinstance(y, list) else [y]) for y in (got, wanted)), strict=True):
            same(one, other)


def test_growing_quantises_what_is_read(made, build_inputs, run, same):
    """A block that grows is rounded anew from the checkpoint; one that is narrow again runs at its width."""
    given, model = build_inputs(), ppcl_rt.load(made.folder, 0.45, quantize="int8")
    model.set_ratio(1.0)
    wide = run(ppcl_rt.load(made.folder, quantize="int8"), given)
    assert torch.equal(run(model, given), wide)
    read, product = [], QuantisedLinear.product

    def recorded(self, x, out_features=None, first=0):
        read.append((x.shape[-1] * (out_features or self.out_features), self.weight.numel()))
        return product(self, x, out_features, first)

    model.set_ratio(0.45)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(QuantisedLinear, "product", recorded)
        got = run(model, given)
    assert sum(used for used, _ in read) < 0.8 * sum(held for _, held in read)
    same(got, run(rounded_like(grown(made), model), given))
    model.trim(to_width=True)
    assert torch.equal(run(model, given), run(ppcl_rt.load(made.folder, 0.45, quantize="int8"), given))


def grown(made):
    """The dense model that went the same way."""
    model = ppcl_rt.load(made.folder, 0.45)
    model.set_ratio(1.0)
    model.set_ratio(0.45)
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_planner_counts_the_bytes_that_are_held(mapped, compensated, dtype):
    for folder in (mapped.folder, compensated.folder):
        dense = ppcl_rt.load(folder, dtype=dtype)
        for how in ("int8", Quantisation(format="float8", keep=())):
            model = ppcl_rt.load(folder, quantize=how, dtype=dtype)
            whole = model.resident_bytes
            assert whole == model.costs()["memory"] < 0.9 * dense.resident_bytes
            # The same bytes hold more of the model.
            assert model.costs()["params"] > dense.costs(dense.plan_of(Budget.of(memory=whole)))["params"]
            for share in (0.8, 0.7):
                model.set_budget(memory=share * whole)
                assert model.resident_bytes == model.costs()["memory"] <= share * whole
                loaded = ppcl_rt.load(folder, memory=share * whole, quantize=how, dtype=dtype)
                assert loaded.plan == model.plan and loaded.resident_bytes == model.resident_bytes


@pytest.mark.parametrize("make", [make_flux, make_sd3, make_z_image], ids=["flux", "sd3", "z-image"])
def test_the_planner_counts_for_every_family(make, tmp_path):
    """Also what outputs hold that share a layer: columns that a replacement stands in for, and its scales."""
    folder, _ = make(tmp_path / "checkpoint")
    for quantize in (None, "int8"):
        for ratio in (1.0, 0.8):
            model = ppcl_rt.load(folder, ratio, quantize=quantize, dtype=torch.bfloat16)
            assert model.resident_bytes == model.costs()["memory"]


def test_fit_of_a_quantised_model_that_is_offloaded(made):
    """Eight bits and model offload together: what is left holds more of the model."""
    dense = ppcl_rt.load(made.folder)
    how = {"shape": (16, 12), "offload": "model"}
    fit = dense.room(1e9, **how).rest + 0.6 * dense.resident_bytes
    model, plain = (ppcl_rt.load(made.folder, fit=fit, quantize=q, **how) for q in ("int8", None))
    assert model.resident_bytes == model.costs()["memory"] <= 0.6 * dense.resident_bytes
    assert model.costs()["params"] > plain.costs()["params"]


def test_the_program_takes_quantize(ppcl, made):
    """``ppcl plan --quantize`` counts eight bits, and refuses formats that there are not."""
    status, out, _ = ppcl("plan", made.folder, "--ratio", 0.6, "--quantize", "int8", "--json")
    assert status == 0
    model = ppcl_rt.load(made.folder, 0.6, quantize="int8")
    assert json.loads(out)["granted"]["memory"] == model.resident_bytes
    status, _, err = ppcl("plan", made.folder, "--quantize", "int4")
    assert status == 2 and 'quantize is one of "int8"' in err


@pytest.mark.parametrize("ratio", [1.0, 0.7, 0.5])
def test_round_trip_at_every_ratio(mapped, ratio, build_inputs, run, tmp_path):
    given, model = build_inputs(), ppcl_rt.load(mapped.folder, ratio, quantize="int8")
    model.save_pretrained(tmp_path / "saved")
    assert torch.equal(run(ppcl_rt.load(tmp_path / "saved", ratio, quantize="int8"), given), run(model, given))


def test_what_stays_as_it_is(made):
    model = ppcl_rt.load(made.folder, quantize="int8")
    held = {path.split(".", 2)[2] for path in layers_of(model)}
    assert "img_mlp.net.2" not in held and {"attn.to_q", "attn.to_out.0", "txt_mlp.net.2"} <= held
    assert not any("mod" in path for path in held)
    assert all(path.startswith("transformer_blocks.") for path in layers_of(model))
    model = ppcl_rt.load(made.folder, quantize=Quantisation(format="int8", keep=("attn.to_q", "mlp_text")))
    held = {path.split(".", 2)[2] for path in layers_of(model)}
    assert "img_mlp.net.2" in held and not held & {"attn.to_q", "txt_mlp.net.2"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_round_trip(made, build_inputs, run, tmp_path, dtype):
    """What is saved is the checkpoint as it was, in the model's dtype: loaded alike it is the same model."""
    given = build_inputs()
    given = {k: v.to(dtype) if torch.is_tensor(v) and v.is_floating_point() else v for k, v in given.items()}
    model = ppcl_rt.load(made.folder, 0.6, quantize="float8", dtype=dtype)
    model.save_pretrained(tmp_path / "saved")
    again = ppcl_rt.load(tmp_path / "saved", 0.6, quantize="float8")
    assert torch.equal(run(again, given), run(model, given))
    plain = ppcl_rt.load(tmp_path / "saved", 0.6)
    assert torch.equal(run(plain, given), run(ppcl_rt.load(made.folder, 0.6, dtype=dtype), given))
    assert {name for name, _ in again.state_dict().items()} == {name for name, _ in model.state_dict().items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adapters_beside_it(made, build_inputs, run, same, dtype):
    """An adapter adds what it adds to the rounded weights, narrow and grown; it is not put into them."""
    pytest.importorskip("peft")
    given = {k: v.to(dtype) if torch.is_tensor(v) and v.is_floating_point() else v for k, v in build_inputs().items()}
    generator, state = torch.Generator().manual_seed(0), {}
    for n in range(len(made.stock.transformer_blocks)):
        for layer in ("attn.to_q", "attn.to_out.0", "txt_mlp.net.0.proj", "txt_mlp.net.2"):
            path = f"transformer_blocks.{n}.{layer}"
            rows, columns = made.stock.get_submodule(path).weight.shape
            state[f"transformer.{path}.lora_A.weight"] = torch.randn(2, columns, generator=generator) * 0.15
            state[f"transformer.{path}.lora_B.weight"] = torch.randn(rows, 2, generator=generator) * 0.15
    model = ppcl_rt.load(made.folder, 0.6, quantize="int8", dtype=dtype)
    without = run(model, given)
    model.load_lora_adapter(state, adapter_name="one")
    for ratio in (0.6, 0.5, 1.0):
        model.set_ratio(ratio)
        dense = None
        if dtype == torch.float32:
            # It has gone the same way, so that it has the same students.
            dense = ppcl_rt.load(made.folder, 0.6)
            dense.set_ratio(ratio)
            rounded_like(dense, model)
        got = run(model, given)
        assert all(p.dtype == dtype for name, p in model.named_parameters() if ".lora_" in name)
        if dense is not None:
            dense.load_lora_adapter(state, adapter_name="one")
            same(got, run(dense, given))
        assert got.dtype == dtype and (got - without).abs().max() > 1e-2
    with pytest.raises(ValueError, match=r"int8 cannot take adapters in: leave them beside, or load without quantize"):
        model.fuse_lora()


def test_a_checkpoint_of_one_plan(made, build_inputs, run, same, tmp_path):
    given = build_inputs()
    with pytest.raises(ValueError, match="int8 cannot be saved as a plan: load without quantize"):
        ppcl_rt.load(made.folder, 0.6, quantize="int8").save_plan(tmp_path / "no")
    dense = ppcl_rt.load(made.folder, 0.6)
    dense.save_plan(tmp_path / "one")
    model = ppcl_rt.load(tmp_path / "one", quantize="int8")
    same(run(model, given), run(ppcl_rt.load(made.folder, 0.6, quantize="int8"), given))


class Config:
    """Stands for a config of another library, under its class's name."""

    def __new__(cls, name, **attributes):
        return type(name, (), attributes)()


def test_configs_of_others(made, build_inputs, run):
    ours = ppcl_rt.PPCLQwenImageTransformer2DModel
    given, wanted = build_inputs(), run(ppcl_rt.load(made.folder, quantize="int8"), build_inputs())
    torchao = Config("Int8WeightOnlyConfig")
    for config in ("int8", torchao, Config("TorchAoConfig", quant_type=torchao), Quantisation(format="int8")):
        assert torch.equal(run(ours.from_pretrained(made.folder, quantization_config=config), given), wanted)
    assert understood(Config("Float8WeightOnlyConfig")).format == "float8"
    assert understood(Config("Float8DynamicActivationFloat8WeightConfig")).format == "float8-dynamic"
    kept = Config("TorchAoConfig", quant_type=torchao, modules_to_not_convert=["attn.to_q"])
    assert understood(kept).keep == ("attn.to_q",)
    for config, said in (
        (Config("BitsAndBytesConfig", quant_method="bitsandbytes"), "bitsandbytes"),
        (Config("GGUFQuantizationConfig", quant_method="gguf"), "gguf"),
        (Config("QuantoConfig", quant_method=SimpleNamespace(value="quanto")), "quanto"),
        (Config("TorchAoConfig", quant_type=Config("Int4WeightOnlyConfig")), "Int4WeightOnlyConfig"),
    ):
        with pytest.raises(ValueError, match=f'{said}.* cannot be had at every ratio: take quantize="int8"'):
            ours.from_pretrained(made.folder, quantization_config=config)
    with pytest.raises(ValueError, match="say the same: give one of them"):
        ours.from_pretrained(made.folder, quantize="int8", quantization_config="int8")


def test_what_cannot_be_had(made, monkeypatch):
    with pytest.raises(
        ValueError, match=r'quantize is one of "int8", "float8", "float8-dynamic", or a Quant.*not "?\'int4'
    ):
        ppcl_rt.load(made.folder, quantize="int4")
    with pytest.raises(ValueError, match=r"no block has a part proj to keep: there are .*mlp_image"):
        ppcl_rt.load(made.folder, quantize=Quantisation(format="int8", keep=("proj",)))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
    for format in ("float8", "float8-dynamic"):
        with pytest.raises(ValueError, match=r'8.9 or above, this one has 8.6: take quantize="int8"'):
            check_device(Quantisation(format=format), torch.device("cuda"))
    check_device(Quantisation(format="int8"), torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 9))
    check_device(Quantisation(format="float8"), torch.device("cuda"))


def test_rows_of_zeros_and_no_columns():
    for format in ("int8", "float8"):
        bits, scale = rounded(torch.zeros(2, 3), format)
        assert not bits.any() and scale.isfinite().all() and (scale > 0).all()
        assert rounded(torch.zeros(2, 0), format)[0].shape == (2, 0)
