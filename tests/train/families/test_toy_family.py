"""A family that nothing else knows goes all the way: it trains, packs, plans, loads and runs on plain torch."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file
from toy_family import Toy

import ppcl_rt
from ppcl_rt import Interval, Planner
from ppcl_train import pipeline
from ppcl_train.config.settings import RunConfig, with_changes

# Blocks 0 to 2 are double, 3 to 5 single.
SETTINGS = {
    "table.lengths": [2, 3],
    "table.steps": 4,
    "table.trial_steps": 2,
    "table.batches": 2,
    "table.batch": 4,
    "table.samples": 8,
    "students.steps": 6,
    "students.batch": 4,
    "width.heads": [0.5],
    "width.channels": [0.5, 0.25],
    "width.ranks": [3, 1],
    "width.samples": 64,
    "recover.steps": 4,
    "recover.spacing": 0.2,
    "recover.batch": 4,
    "measure.samples": 16,
    "measure.spacing": 0.25,
    "measure.other_spacing": 0.5,
    "batch": 16,
    "storage": "float32",
    "tracker": "none",
}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """The stock checkpoint of a random toy."""
    folder = tmp_path_factory.mktemp("toy") / "teacher"
    folder.mkdir()
    torch.manual_seed(0)
    model = Toy().eval()
    save_file(model.state_dict(), folder / "diffusion_pytorch_model.safetensors")
    (folder / "config.json").write_text(json.dumps({**model.stock_config}))
    return folder, model


@pytest.fixture(scope="module")
def checkpoint(teacher, tmp_path_factory):
    """What the whole pipeline makes of it."""
    folder = tmp_path_factory.mktemp("toy") / "run"
    run = with_changes(RunConfig(task="toy", teacher={"pretrained": str(teacher[0])}), SETTINGS)
    pipeline.begin(run, folder)
    pipeline.run_stages(run, folder)
    return folder / "checkpoint"


@pytest.fixture
def inputs():
    generator = torch.Generator().manual_seed(1)
    image, text = (torch.randn(2, n, c, generator=generator) for n, c in ((9, 6), (4, 5)))
    return {"hidden_states": image, "encoder_hidden_states": text, "timestep": torch.tensor([0.3, 0.9])}


def test_the_stock_checkpoint_loads_and_is_the_model(teacher, inputs, run):
    folder, model = teacher
    loaded = ppcl_rt.load(folder)
    assert isinstance(loaded, Toy) and torch.equal(run(loaded, inputs), run(model, inputs))
    architecture = loaded.catalog.architecture
    assert architecture.dense_params == sum(p.numel() for p in model.parameters())
    assert [architecture.kind(n) for n in range(6)] == ["double"] * 3 + ["single"] * 3
    assert architecture.place(4) == ("single_blocks", 1)


def test_the_pipeline_makes_a_checkpoint_that_holds_its_teacher(teacher, checkpoint, inputs, run):
    _, model = teacher
    loaded = ppcl_rt.load(checkpoint)
    assert loaded.catalog.family == "toy"
    # Rank orders permute sums of 20 terms.
    torch.testing.assert_close(run(loaded, inputs), run(model, inputs), atol=1e-5, rtol=0)


def test_plans_at_any_ratio_load_grow_and_run(checkpoint, inputs, run):
    catalog = ppcl_rt.Checkpoint(checkpoint).catalog
    assert catalog is not None
    planner = Planner(catalog)
    grown = ppcl_rt.load(checkpoint, planner.smallest)
    for ratio in (planner.smallest, 0.5, 0.65, 0.8, 0.95, 1.0):
        alone = ppcl_rt.load(checkpoint, ratio)
        assert catalog.ratio(alone.plan) <= ratio
        grown.set_ratio(ratio)
        assert torch.equal(run(grown, inputs), run(alone, inputs)) and run(alone, inputs).isfinite().all()
        saved = run(alone, inputs)
        alone.set_ratio(1.0)
        alone.set_plan(grown.plan)
        assert torch.equal(run(alone, inputs), saved)


def test_students_stay_in_their_list(checkpoint):
    catalog = ppcl_rt.Checkpoint(checkpoint).catalog
    assert catalog is not None and catalog.students
    assert all(catalog.architecture.one_kind(student.interval) for student in catalog.students)
    broken = catalog.students[0].model_copy(update={"interval": Interval(2, 3)})
    with pytest.raises(ValueError, match="more than one list or kind"):
        ppcl_rt.Catalog.model_validate({**catalog.model_dump(), "students": [broken.model_dump()]})


def test_a_narrow_block_is_the_dense_one_with_columns_zeroed(teacher, checkpoint, inputs, run):
    """Without replacements: a group's output columns that are left out, in a part that holds two groups, are zero."""
    _, model = teacher
    loaded = ppcl_rt.load(checkpoint, resident="all")
    block = loaded.blocks()[4]
    narrow = {group: max(1, count // 2) for group, count in block.spec.full.items() if group != "rank"}
    width = block.spec.full.replace(**narrow)
    # Counts that the catalog does not offer have no replacement.
    width = width.replace(joint_channels=5)
    context = {"temb": torch.randn(2, 8)}
    streams = torch.randn(2, 9, 8), torch.randn(2, 4, 8)
    for name in list(block.replacements):
        if name.startswith("joint_heads") or name.startswith("joint_channels"):
            del block.replacements[name]
    with torch.no_grad():
        got = block(*streams, **context, width=width)
        reference = Toy.make_block(model.config, "single").eval()
        reference.load_state_dict(model.single_blocks[1].state_dict())
        heads, channels = block.orders["heads"][width["heads"] :], block.orders["joint_channels"][5:]
        for head in heads:
            reference.joint_out.weight[:, head * 4 : head * 4 + 4] = 0
        reference.joint_out.weight[:, 8 + channels] = 0
        wanted = reference(*streams, **context)
    for mine, theirs in zip(got, wanted):
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=0)


def test_saving_keeps_stock_order(teacher, checkpoint, tmp_path):
    folder, _ = teacher
    loaded = ppcl_rt.load(checkpoint, 0.6)
    loaded.set_ratio(1.0)
    loaded.save_pretrained(tmp_path / "saved")
    stock, saved = ppcl_rt.Checkpoint(folder), ppcl_rt.Checkpoint(tmp_path / "saved")
    assert all(torch.equal(saved.read(name), stock.read(name)) for name in stock.names)


def test_flops_and_params_are_those_of_the_layers(checkpoint):
    """Dense costs by hand: five row segments in, two column segments out, a modulation, attention."""
    catalog = ppcl_rt.Checkpoint(checkpoint).catalog
    assert catalog is not None
    architecture, dim, channels = catalog.architecture, 8, 12
    wide = 3 * dim + 2 * channels
    one = wide * (dim + 1) + dim * (dim + channels + 1) + dim * (dim + 1)
    assert architecture.spec(0).params(architecture.spec(0).full) == 2 * one
    assert architecture.spec(5).params(architecture.spec(5).full) == one
    products = 2 * (wide * dim + dim * (dim + channels))
    attention = 4 * 13**2 * dim
    assert architecture.spec(5).flops(architecture.spec(5).full, 9, 4) == 13 * products + 2 * dim**2 + attention
    assert architecture.spec(0).flops(architecture.spec(0).full, 9, 4) == 13 * products + 4 * dim**2 + attention


def test_a_block_with_packed_parts_grows_around_what_was_trained(checkpoint):
    """Five segments of an input layer and two of an output layer: each piece stays where its units are."""
    catalog = ppcl_rt.Checkpoint(checkpoint).catalog
    assert catalog is not None
    narrow = catalog.spec(5).full.replace(heads=1, joint_channels=5)
    model = ppcl_rt.load(checkpoint, plan=catalog.compose([(5, narrow)]))
    [block] = model.blocks()
    before = block.joint_in.weight.detach().clone()
    with torch.no_grad():
        block.joint_in.weight.fill_(7)
    model.set_ratio(1.0)
    grown = model.blocks()[-1].joint_in.weight
    trained = (grown == 7).all(1).nonzero()[:, 0].tolist()
    assert trained == [*range(0, 4), *range(8, 12), *range(16, 20), *range(24, 29), *range(36, 41)]
    assert before.shape[0] == len(trained)


def test_one_plan_goes_into_a_checkpoint_of_its_own(checkpoint, tmp_path, inputs, run):
    """Parts that hold two groups keep what stands in for the columns of each."""
    model = ppcl_rt.load(checkpoint, resident="all")
    model.set_ratio(0.65)
    model.save_plan(tmp_path / "one")
    alone = ppcl_rt.load(tmp_path / "one")
    assert torch.equal(run(alone, inputs), run(model, inputs))
    assert sum(p.numel() for p in alone.parameters()) < sum(p.numel() for p in model.parameters())
