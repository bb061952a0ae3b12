"""`ppcl slim`: factors keep the error that was asked for, and what is written is the dense plan with them."""

from __future__ import annotations

import json
import math
import weakref

import pytest
import tiny_flux
import tiny_sd3
import tiny_z_image
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

import ppcl_rt
from ppcl_rt.checkpoint.composed import ComposedCheckpoint
from ppcl_rt.convert.low_rank import Inputs, LowRank
from ppcl_rt.convert.slim import Slimming, slim
from ppcl_rt.model.block import PluggableBlock


def modulation_errors(slim_folder, stock, conditions):
    """The largest relative squared error of a modulation layer over conditions ``[n, E]``, by hand."""
    model, errors = ppcl_rt.load(slim_folder, dtype=torch.float32), []
    for planned, block in zip(model.plan.blocks, model.blocks(), strict=True):
        x = block.modulation_input(conditions)
        theirs = stock.blocks()[planned.interval.first]
        for part in block.spec.factored_by("modulation"):
            got = block.factored(part.name, x, "modulation", planned.width["modulation"])
            wanted = theirs.get_submodule(part.path)(x)
            errors.append(((got - wanted).square().sum() / wanted.square().sum()).item())
    return max(errors)


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    """The shipped checkpoint, whose modulations are trained, made slim."""
    out = tmp_path_factory.mktemp("slim") / "out"
    made = slim("examples/scenes", out, Slimming(error=1e-6))
    return out, made.catalog, made.blocks


def test_the_error_is_kept_at_timesteps_that_were_not_fitted(scenes):
    out, _, done = scenes
    teacher = ppcl_rt.load("examples/scenes", dtype=torch.float32)
    times = torch.rand(10_000, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        error = modulation_errors(out, teacher, teacher.embed_timesteps(times))
    assert error <= 1e-6 and 0 < max(block.error for block in done) <= 1e-6
    # Not by far: a lower rank would not do.
    assert error > 1e-8


def test_a_quarter_of_the_parameters_goes_and_the_output_stays(scenes, run):
    out, catalog, done = scenes
    whole, less = ppcl_rt.load("examples/scenes", dtype=torch.float32), ppcl_rt.load(out, dtype=torch.float32)
    assert less.catalog.license == whole.catalog.license and less.catalog.task == whole.catalog.task
    held = sum(p.numel() for p in less.parameters())
    assert held == catalog.architecture.params(catalog.largest) < 0.75 * catalog.architecture.dense_params
    assert {block.rank for block in done} == {p.width["modulation"] for p in less.plan.blocks}
    inputs = whole.example(ppcl_rt.Tokens(16, 7, 4))
    wanted = run(whole, {k: v for k, v in inputs.items() if k != "return_dict"})
    got = run(less, {k: v for k, v in inputs.items() if k != "return_dict"})
    assert (got - wanted).square().mean() < 1e-5 * wanted.square().mean()


def test_all_else_is_the_teachers_bit_for_bit(scenes):
    out, _, _ = scenes
    source, made = ppcl_rt.Checkpoint(ppcl_rt.locate("examples/scenes")), ppcl_rt.Checkpoint(out)
    same = [name for name in made.names if ".replacements." not in name]
    assert len(same) > 200 and not any("_mod." in name for name in made.names)
    assert all(torch.equal(made.read(name), source.read(name)) for name in same)
    assert made.read("transformer_blocks.0.replacements.modulation_down.weight").dtype == torch.float32


def test_factors_in_bfloat16_keep_a_coarser_error(tmp_path):
    done = slim("examples/scenes", tmp_path / "out", Slimming(error=1e-5, factors=torch.bfloat16)).blocks
    name = "transformer_blocks.0.replacements.modulation_down.weight"
    assert ppcl_rt.Checkpoint(tmp_path / "out").read(name).dtype == torch.bfloat16
    assert max(block.error for block in done) <= 1e-5
    # Their own rounding is about 7e-7: what asks for less gets the layers as they were.
    whole = slim("examples/scenes", tmp_path / "whole", Slimming(error=1e-7, factors=torch.bfloat16)).blocks
    assert {block.rank for block in whole} == {96}


def test_every_value_of_an_additional_condition_is_covered(tmp_path, build_stock):
    stock = build_stock(0, use_additional_t_cond=True)
    # As trained ones are: near a line, so that a low rank holds them.
    stock.save_pretrained(tmp_path / "stock")
    model = ppcl_rt.load(tmp_path / "stock")
    times = torch.linspace(0, 1, 5)
    with torch.no_grad():
        found = model.every_condition(times)
        for value in (0, 1):
            wanted = model.time_text_embed(times, next(model.parameters()), torch.full((5,), value))
            assert torch.equal(found[5 * value : 5 * value + 5], wanted)
        slim(tmp_path / "stock", tmp_path / "out", Slimming(error=1e-2))
        assert modulation_errors(tmp_path / "out", model, model.every_condition(torch.rand(500))) <= 1.2e-2


def test_factors_are_fitted_on_what_the_blocks_say_that_they_read(tmp_path, build_stock, monkeypatch):
    """Of a family whose modulations do not read ``silu`` of the condition."""
    build_stock(0).save_pretrained(tmp_path / "stock")
    monkeypatch.setattr(PluggableBlock, "modulation_input", lambda block, condition: torch.sin(3 * condition))
    model = ppcl_rt.load(tmp_path / "stock")
    with torch.no_grad():
        slim(tmp_path / "stock", tmp_path / "out", Slimming(error=1e-2))
        assert modulation_errors(tmp_path / "out", model, model.every_condition(torch.rand(500))) <= 1.2e-2


@pytest.mark.parametrize("family", ["flux", "sd3"])
def test_families_that_see_the_pooled_text_need_prompts(family, tmp_path, ppcl):
    stock = tiny_flux.build_stock() if family == "flux" else tiny_sd3.build_stock(next(iter(tiny_sd3.VARIANTS)))
    stock.save_pretrained(tmp_path / "stock")
    status, _, err = ppcl("slim", tmp_path / "stock", tmp_path / "out")
    assert status == 2 and "pooled text: say --prompts FILE" in err and not (tmp_path / "out").exists()
    size = stock.config.pooled_projection_dim
    # Prompts that are much alike: their embeddings have few directions.
    pooled = torch.randn(1, size) + 1e-3 * torch.randn(6, size)
    save_file({"pooled": pooled}, tmp_path / "prompts.safetensors")
    guided = ["--guidance", "3.5"] if getattr(stock.config, "guidance_embeds", False) else []
    arguments = ("slim", tmp_path / "stock", tmp_path / "out", "--prompts", tmp_path / "prompts.safetensors", *guided)
    status, said, err = ppcl(*arguments, "--error", "1e-3")
    assert status == 0, err
    assert "6 prompts" in said and "not covered" in said
    model, slimmed = ppcl_rt.load(tmp_path / "stock"), ppcl_rt.load(tmp_path / "out")
    guidance = (3.5,) if guided else ()
    with torch.no_grad():
        seen = model.every_condition(torch.rand(50), pooled, guidance)
    assert slimmed.plan.blocks and modulation_errors_of_any(slimmed, model, seen) <= 2e-3


def modulation_errors_of_any(slimmed, model, conditions):
    """As `modulation_errors`, for blocks of several kinds, factored or whole."""
    x, errors = F.silu(conditions), [0.0]
    for planned, block in zip(slimmed.plan.blocks, slimmed.blocks(), strict=True):
        for part in block.spec.factored_by("modulation"):
            got = block.factored(part.name, x, "modulation", planned.width["modulation"])
            wanted = model.blocks()[planned.interval.first].get_submodule(part.path)(x)
            errors.append(((got - wanted).square().sum() / wanted.square().sum()).item())
    return max(errors)


def test_the_program_says_what_it_did(tmp_path, ppcl):
    status, said, err = ppcl("slim", "examples/scenes", tmp_path / "out", "--error", "1e-4", "--json")
    assert status == 0, err
    content = json.loads(said)
    assert content["params"] < content["params_before"] and content["bytes"] < content["bytes_before"]
    assert len(content["ranks"]) == 12 and 0 < content["error"] <= content["error_asked"] == 1e-4
    assert content["peak_bytes"] > 1e8 and math.isfinite(content["seconds"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("{tmp}/nothing", "{tmp}/out"), "nothing"),
        (("examples/scenes", "examples/scenes/out"), "lies in"),
        (("examples/scenes", "examples/scenes"), "lies in"),
        (("examples/scenes", "examples"), "or around it"),
        (("examples/scenes", "README.md"), "is a file"),
        (("examples/scenes", "{tmp}/out", "--error", "1"), "an error is 1e-07 to 0.01"),
        (("examples/scenes", "{tmp}/out", "--factors", "float16"), "float32 or bfloat16"),
        (("examples/scenes", "{tmp}/out", "--guidance", "3"), "no prompts and no guidance"),
        (("examples/scenes", "{tmp}/out", "--guidance", "much"), "numbers with commas"),
        (("examples/scenes", "{tmp}/out", "--prompts", "README.md"), "no safetensors file"),
    ],
)
def test_bad_input_is_one_line_and_status_2(arguments, message, tmp_path, ppcl):
    status, _, err = ppcl("slim", *(each.format(tmp=tmp_path) for each in arguments))
    assert status == 2 and message in err and len(err.strip().splitlines()) == 1, err
    assert not any(tmp_path.iterdir())


def test_what_is_slim_already_and_what_has_nothing_to_slim(scenes, tmp_path, ppcl):
    status, _, err = ppcl("slim", scenes[0], tmp_path / "out")
    assert status == 2 and "holds one plan already" in err
    tiny_z_image.build_stock().save_pretrained(tmp_path / "stock")
    status, _, err = ppcl("slim", tmp_path / "stock", tmp_path / "out")
    assert status == 2 and "no modulations of each block" in err and not (tmp_path / "out").exists()


def slow(model):
    """Have the embedding read nothing that turns more than three times between timesteps 0 and 1, as trained ones."""
    weight = model.time_text_embed.timestep_embedder.linear_1.weight
    frequencies = 1000 * torch.exp(-torch.arange(128) / 128 * torch.log(torch.tensor(1e4)))
    with torch.no_grad():
        weight[:, (frequencies > 6 * torch.pi).repeat(2)] = 0
    return model


@pytest.mark.parametrize("variant", [{}, {"zero_cond_t": True}, {"use_additional_t_cond": True}])
def test_variants_run_as_stock_does(variant, tmp_path, build_stock, build_inputs, run):
    stock, given = slow(build_stock(**variant)), build_inputs(1)
    if "use_additional_t_cond" in variant:
        given["additional_t_cond"] = torch.tensor([0, 1, 1])
        with torch.no_grad():
            # The second of them is far off: factors for the first alone would not do.
            stock.time_text_embed.addition_t_embedding.weight[1] *= 3
    stock.save_pretrained(tmp_path / "stock")
    made = slim(tmp_path / "stock", tmp_path / "out", Slimming(error=1e-5))
    assert max(block.rank for block in made.blocks) < 32
    assert made.bytes_after < made.bytes_before == sum(tensor.nbytes for tensor in stock.state_dict().values())
    written = ppcl_rt.Checkpoint(tmp_path / "out")
    assert made.bytes_after == sum(written.read(name).nbytes for name in written.names)
    wanted = run(stock, given)
    # Modulations are off by 1e-5, squared and relative; four random blocks make some times as much of it.
    assert 0 < (run(ppcl_rt.load(tmp_path / "out"), given) - wanted).square().mean() < 1e-3 * wanted.var()


def test_one_block_is_in_memory(tmp_path, build_stock, monkeypatch):
    """When a block is begun, what was read of those before is gone."""
    slow(build_stock()).save_pretrained(tmp_path / "stock")
    alive, read, counts = weakref.WeakSet(), ComposedCheckpoint.read, []

    def watched(self, name):
        tensor = read(self, name)
        if name.startswith("transformer_blocks."):
            alive.add(tensor)
        return tensor

    def progress(blocks):
        for block in blocks:
            counts.append(len(alive))
            yield block

    monkeypatch.setattr(ComposedCheckpoint, "read", watched)
    slim(tmp_path / "stock", tmp_path / "out", Slimming(error=1e-4), progress)
    assert counts == [0, 0, 0, 0]


def test_a_stop_leaves_what_was_there(tmp_path, build_stock):
    slow(build_stock()).save_pretrained(tmp_path / "stock")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "config.json").write_text("mine")

    def stopped(blocks):
        yield from blocks[:2]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        slim(tmp_path / "stock", tmp_path / "out", Slimming(error=1e-4), stopped)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "stock"]
    assert [path.read_text() for path in (tmp_path / "out").iterdir()] == ["mine"]


def test_a_transformer_of_a_pipeline(tmp_path, build_stock, ppcl):
    slow(build_stock()).save_pretrained(tmp_path / "pipeline" / "transformer")
    status, said, err = ppcl("slim", tmp_path / "pipeline", tmp_path / "out", "--subfolder", "transformer")
    assert status == 0 and "covered: every timestep" in said and "where it is largest" in said, err


def test_one_of_ours_counts_the_bytes_of_its_teacher(mapped, tmp_path):
    made = slim(mapped.folder, tmp_path / "out", Slimming(error=1e-2))
    names = ppcl_rt.Checkpoint(tmp_path / "out").names
    assert not [name for name in names if name.startswith(("students", "text_runs")) or ".order." in name]
    assert made.bytes_before == sum(tensor.nbytes for tensor in mapped.stock.state_dict().values())


def test_prompts_go_round_on_the_whole_grid(tmp_path):
    """Each timestep is met, each text with each guidance too, and no more at once than memory is meant for."""
    stock = tiny_flux.build_stock()
    stock.save_pretrained(tmp_path / "stock")
    model, size = ppcl_rt.load(tmp_path / "stock"), stock.config.pooled_projection_dim
    with torch.no_grad():
        few = model.every_condition(torch.linspace(0, 1, 3), torch.randn(5, size), (1.0, 3.5))
        assert len(few) == 30 == len(few.unique(dim=0))
        many = model.every_condition(torch.linspace(0, 1, 2001), torch.randn(1000, size), (1.0, 3.5))
    assert 2001 <= len(many) <= 4096


def test_the_rank_is_the_lowest():
    generator = torch.Generator().manual_seed(1)
    layers = [(torch.randn(20, 12, generator=generator), torch.randn(20, generator=generator))]
    found = LowRank(layers, Inputs.of(torch.randn(99, 12, generator=generator)), relative=True)
    for error in (0.3, 1e-2, 1e-12):
        rank = found.rank_for(error)
        assert found.errors[rank].max() <= error < found.errors[rank - 1].max()
    assert found.rank_for(2.0) == 1


def test_a_layer_that_is_small_or_zero():
    """Errors are relative: a layer of small outputs is kept as well as its neighbour; one of zeros costs no rank."""
    generator = torch.Generator().manual_seed(2)
    weights = [size * torch.randn(9, 12, generator=generator) for size in (1.0, 1e-3, 0.0)]
    x = torch.randn(99, 12, generator=generator)
    layers = [(weight, torch.zeros(9)) for weight in weights]
    found = LowRank(layers, Inputs.of(x), relative=True)
    down, ups = found.factors(found.rank_for(1e-2))
    for layer, up in zip(layers, ups, strict=True):
        wanted, got = F.linear(x, *layer).double(), F.linear(F.linear(x.double(), *down), *up)
        assert (got - wanted).square().sum() <= 1e-2 * wanted.square().sum()
    assert not ups[2][0].any() and not found.errors[:, 2].any()


def test_directions_are_left_out_by_their_share():
    x = torch.randn(500, 4, generator=torch.Generator().manual_seed(3)) * torch.tensor([1.0, 1e-2, 1e-4, 1e-9])
    assert [Inputs.of(x, share).root.shape[1] for share in (0.0, 1e-12, 1e-6, 1e-3)] == [4, 3, 2, 1]


def test_factors_are_the_best_of_their_rank():
    """Against a singular value decomposition of the layers' outputs themselves."""
    generator = torch.Generator().manual_seed(0)
    x = (
        torch.randn(400, 12, generator=generator, dtype=torch.float64)
        @ torch.randn(12, 12, generator=generator).double()
    )
    layers = [(torch.randn(n, 12, generator=generator).double(), torch.randn(n).double()) for n in (20, 7)]
    low = LowRank(layers, Inputs.of(x))
    centred = torch.cat([(x - x.mean(0)) @ weight.T for weight, _ in layers], dim=1)
    values = torch.linalg.svdvals(centred)
    for rank in (1, 4, 9):
        down, ups = low.factors(rank)
        lost = sum(
            (F.linear(F.linear(x, *down), *up) - F.linear(x, *layer)).square().sum()
            for layer, up in zip(layers, ups, strict=True)
        )
        torch.testing.assert_close(lost, values[rank:].square().sum(), rtol=1e-6, atol=1e-8)
        errors = low.errors[rank] * torch.stack([F.linear(x, *layer).square().sum() for layer in layers])
        torch.testing.assert_close(errors.sum(), lost, rtol=1e-6, atol=1e-8)
