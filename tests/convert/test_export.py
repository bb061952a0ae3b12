"""A plan in other formats gives what it gives in place; what a format cannot hold is refused with the nearest plan."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from diffusers import QwenImageTransformer2DModel
from safetensors import safe_open
from safetensors.torch import load_file

import ppcl_rt
from ppcl_rt.checkpoint.card import CARD, Origin, read_origin
from ppcl_rt.convert.export import export
from ppcl_rt.convert.whole import obstacle, whole_blocks

ORIGIN = {"base_model": "a/b", "license": "apache-2.0"}


@pytest.fixture(scope="module")
def source(mapped, tmp_path_factory):
    """The checkpoint with everything, and an origin."""
    folder = tmp_path_factory.mktemp("export") / "source"
    catalog = mapped.catalog.model_copy(update=ORIGIN)
    ppcl_rt.write_checkpoint(folder, mapped.config, catalog, mapped.tensors)
    return mapped, folder


def plans(catalog):
    """Whole plans: with students, without, with a block skipped."""
    full = catalog.spec(0).full
    student = ppcl_rt.PlannedBlock(interval=ppcl_rt.Interval(1, 2), width=full, student=True)
    return {
        "dense": catalog.compose([(n, full) for n in range(4)]),
        "student": catalog.compose([(0, full), (3, full)], [student]),
        "skipped": catalog.compose([(0, full), (2, full)]),
    }


@pytest.mark.parametrize("name", ["dense", "student", "skipped"])
def test_stock_runs_what_ran_in_place(source, tmp_path, build_inputs, run, same, name):
    made, folder = source
    model = ppcl_rt.load(folder)
    model.set_plan(plans(model.catalog)[name])
    export(model, tmp_path / "stock", "diffusers")
    export(model, tmp_path / "one.safetensors", "single-file")
    stock = QwenImageTransformer2DModel.from_pretrained(tmp_path / "stock")
    given = build_inputs(1)
    wanted = run(model, given)
    same(run(stock, given), wanted)
    assert len(stock.transformer_blocks) == stock.config.num_layers == len(model.plan.blocks)
    single = QwenImageTransformer2DModel.from_single_file(
        str(tmp_path / "one.safetensors"), config=str(tmp_path / "stock")
    )
    assert torch.equal(run(single, given), run(stock, given))
    # Units lie in stock order, so that adapters of the base model mean what they meant.
    first = "transformer_blocks.0.attn.to_q.weight"
    assert torch.equal(stock.state_dict()[first], made.tensors[first])
    # It is a source like any stock folder.
    same(run(ppcl_rt.load(tmp_path / "stock"), given), wanted)


def test_origin_travels(source, tmp_path):
    _, folder = source
    model = ppcl_rt.load(folder)
    for format in ("ppcl", "diffusers"):
        export(model, tmp_path / format, format)
        assert read_origin(tmp_path / format) == Origin(**ORIGIN)
    text = (tmp_path / "diffusers" / CARD).read_text()
    assert "QwenImageTransformer2DModel" in text and "ratio" not in text
    export(model, tmp_path / "one.safetensors", "single-file")
    for file in (tmp_path / "one.safetensors", next((tmp_path / "diffusers").glob("*.safetensors"))):
        with safe_open(file, "pt") as opened:
            assert ORIGIN.items() <= opened.metadata().items()


def test_every_other_plan_is_refused_with_the_nearest(source, ppcl, tmp_path, build_inputs, run, same):
    _, folder = source
    status, _, err = ppcl("export", folder, tmp_path / "out", "--ratio", 0.85, "--format", "diffusers")
    assert status == 2 and err.count("\n") == 1 and "the format diffusers holds whole blocks" in err
    assert not list(tmp_path.iterdir())
    # What it says to do works, and gives the best whole plan within the budget.
    ratio = err.split("--ratio ")[1].split()[0]
    status, out, err = ppcl(
        "export", folder, tmp_path / "out", "--ratio", ratio, "--whole", "--format", "diffusers", "--json"
    )
    assert status == 0, err
    said = json.loads(out)
    whole = whole_blocks(ppcl_rt.load(folder).catalog)
    best = ppcl_rt.Planner(whole).plan(0.85)
    assert said["ratio"] == whole.ratio(best) <= float(ratio) <= 0.85
    assert said["bytes"] > 4 * said["params"]
    given = build_inputs(2)
    model = ppcl_rt.load(folder, plan=best)
    same(run(QwenImageTransformer2DModel.from_pretrained(tmp_path / "out"), given), run(model, given))


def test_below_all_whole_plans_the_least_is_named(source, ppcl, tmp_path):
    _, folder = source
    least = ppcl_rt.Planner(whole_blocks(ppcl_rt.load(folder).catalog)).smallest_in_digits
    status, _, err = ppcl("export", folder, tmp_path / "out", "--ratio", 0.3, "--format", "single-file")
    assert status == 2 and f"--ratio {least:g} --whole" in err
    status, _, err = ppcl("export", folder, tmp_path / "out", "--ratio", 0.3, "--whole")
    assert status == 2 and f"smallest plan of this checkpoint, {least:.4f}" in err
    assert not list(tmp_path.iterdir())


def test_what_is_in_the_way_is_named(source):
    made, _ = source
    catalog = made.catalog
    full = catalog.spec(0).full

    def said(width, runs=(), block=1):
        kept = [(n, width if n == block else full) for n in range(4)]
        return obstacle(catalog, catalog.compose(kept, text_runs=runs))

    assert said(full) == ""
    assert said(full.replace(heads=3)) == "block 1 runs heads 3/4"
    assert said(full.replace(image=0)) == "block 1 runs image 0/128"
    assert said(full.replace(modulation=5), block=2) == "block 2 runs modulation 5/32"
    assert "text stream is not updated over blocks 1..2" in said(full, [ppcl_rt.Interval(1, 2)])
    narrow = ppcl_rt.PlannedBlock(interval=ppcl_rt.Interval(0, 1), width=full.replace(text=64), student=True)
    assert obstacle(catalog, catalog.compose([(2, full), (3, full)], [narrow])).startswith("the student of 0")


def test_a_checkpoint_of_one_plan_says_where_to_go(source, ppcl, tmp_path):
    _, folder = source
    assert ppcl("export", folder, tmp_path / "one", "--ratio", 0.6)[0] == 0
    status, _, err = ppcl("export", tmp_path / "one", tmp_path / "out", "--format", "diffusers")
    assert status == 2 and "the checkpoint that this one was made from" in err
    assert {path.name for path in tmp_path.iterdir()} == {"one"}


def test_ppcl_is_the_plan_alone(source, ppcl, tmp_path, build_inputs, run):
    _, folder = source
    status, out, err = ppcl("export", folder, tmp_path / "one", "--params", "60k", "--dtype", "bfloat16")
    assert status == 0 and "ppcl, " in out, err
    alone = ppcl_rt.load(tmp_path / "one")
    assert alone.dtype == torch.bfloat16
    given = build_inputs(3)
    given = {k: v.bfloat16() if torch.is_tensor(v) and v.is_floating_point() else v for k, v in given.items()}
    model = ppcl_rt.load(folder, plan=ppcl_rt.load(folder, params="60k").plan, dtype=torch.bfloat16)
    assert torch.equal(run(alone, given), run(model, given))


def test_a_stock_folder_becomes_a_single_file(build_stock, ppcl, tmp_path):
    stock = build_stock(3)
    stock.save_pretrained(tmp_path / "stock")
    assert ppcl("export", tmp_path / "stock", tmp_path / "x.safetensors", "--format", "single-file")[0] == 0
    written, wanted = load_file(tmp_path / "x.safetensors"), stock.state_dict()
    assert set(written) == set(wanted) and all(torch.equal(written[name], wanted[name]) for name in wanted)
    status, _, err = ppcl("export", tmp_path / "stock", tmp_path / "y", "--ratio", 0.5)
    assert status == 2 and "ratio 0.5 is below the smallest plan" in err and not (tmp_path / "y").exists()


def test_blocks_that_were_trained_are_written_as_they_are(source, tmp_path, build_inputs, run, same):
    _, folder = source
    model = ppcl_rt.load(folder)
    with torch.no_grad():
        model.blocks()[2].attn.to_k.weight.mul_(1.5)
    export(model, tmp_path / "stock", "diffusers")
    given = build_inputs(4)
    same(run(QwenImageTransformer2DModel.from_pretrained(tmp_path / "stock"), given), run(model, given))


def test_planning_whole_blocks_goes_by_the_sketches(source):
    """The rows of students at full width are those of the whole catalog."""
    made, _ = source
    rng = np.random.default_rng(0)
    from ppcl_rt.planning import sketch

    catalog = made.catalog.model_copy(update={"sketch": ppcl_rt.planning.legal.Sketch(seed=0, size=8, bands=1)})
    rows = rng.normal(size=(len(list(sketch.choices(catalog))), 8))
    planner = ppcl_rt.Planner(catalog, lambda: [rows, rows])
    whole = planner.among(whole_blocks(catalog))
    plan = plans(catalog)["student"]
    assert whole.loss(plan) == pytest.approx(planner.loss(plan))


BAD = {
    "the checkpoint itself": ("{source}", "{source}"),
    "a plan and a budget": ("{source}", "{out}", "--plan", "p.json", "--ratio", "0.5"),
    "no such format": ("{source}", "{out}", "--format", "pickle"),
    "no checkpoint": ("/nowhere/at/all", "{out}"),
    "no dtype": ("{source}", "{out}", "--dtype", "int8"),
    "a ratio of nothing": ("{source}", "{out}", "--ratio", "0"),
    "a folder as a file": ("{source}", "{source}", "--format", "single-file"),
}


@pytest.mark.parametrize("arguments", BAD.values(), ids=BAD)
def test_bad_input_is_one_line_and_status_2(source, ppcl, tmp_path, arguments):
    places = {"source": str(source[1]), "out": str(tmp_path / "out")}
    status, _, err = ppcl("export", *(argument.format(**places) for argument in arguments))
    assert status == 2 and err.count("\n") == 1
    assert not list(tmp_path.iterdir()) and ppcl_rt.load(source[1])
