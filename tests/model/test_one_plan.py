"""A checkpoint of one plan: what is saved of a model that runs a plan, loaded again, is that model and nothing else."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import QwenImageTransformer2DModel

import ppcl_rt


@pytest.fixture(scope="module", params=[False, True], ids=["plain", "compensated"])
def source(request, make_checkpoint, tmp_path_factory):
    folder = tmp_path_factory.mktemp("one") / "source"
    return make_checkpoint(folder, compensated=request.param, text_runs=[(0, 1), (1, 3)])


@pytest.mark.parametrize("seed", range(4))
def test_it_gives_what_the_model_gave(source, tmp_path, build_inputs, run, seed):
    plan = source.random_plan(np.random.default_rng(seed))
    grown = ppcl_rt.load(source.folder, resident="all")
    grown.set_plan(plan)
    catalog = grown.save_plan(tmp_path / "one")
    alone = ppcl_rt.load(tmp_path / "one")
    given = build_inputs(seed)
    # Blocks that hold more than the plan runs are cut to it.
    assert torch.equal(run(alone, given), run(ppcl_rt.load(source.folder, plan=plan), given))
    assert (alone.plan.blocks, alone.plan.text_runs) == (plan.blocks, plan.text_runs)
    assert sum(p.numel() for p in alone.parameters()) == source.catalog.architecture.params(plan)
    stored = {name for name in ppcl_rt.Checkpoint(tmp_path / "one").names if ".order." not in name}
    assert stored == set(alone.state_dict()) and catalog.fingerprint == alone.catalog.fingerprint


def test_it_holds_one_plan(source, tmp_path, build_inputs, run):
    model = ppcl_rt.load(source.folder, 0.6)
    model.save_plan(tmp_path / "one")
    alone = ppcl_rt.load(tmp_path / "one")
    ratio = alone.catalog.ratio(alone.plan)
    assert ratio == source.catalog.ratio(model.plan) and alone.planner.smallest == ratio
    for budget in (0.99, 0.6, 1.0):
        alone.set_ratio(budget)
        assert alone.plan == alone.catalog.largest
    with pytest.raises(ValueError, match=r"ratio 0\.2 is below the smallest plan of this checkpoint, 0\."):
        alone.set_ratio(0.2)
    with pytest.raises(ValueError, match="the least is"):
        alone.set_budget(params=10)
    with pytest.raises(ValueError, match="holds one plan, and this is another"):
        alone.set_plan(alone.catalog.dense)
    # It says what was predicted, and is itself saved as it is.
    assert alone.planner.loss(alone.plan) == pytest.approx(model.planner.loss(model.plan))
    with torch.no_grad():
        alone.blocks()[0].attn.to_q.weight.mul_(2)
    alone.save_pretrained(tmp_path / "again")
    given = build_inputs(1)
    assert torch.equal(run(ppcl_rt.load(tmp_path / "again"), given), run(alone, given))


def test_modulations_that_were_dropped_are_read_again(source, tmp_path, build_inputs, run):
    ppcl_rt.load(source.folder, 0.6).save_plan(tmp_path / "one")
    alone, given = ppcl_rt.load(tmp_path / "one"), build_inputs(3)
    wanted = run(alone, given)
    alone.precompute(given["timestep"], keep_weights=False)
    assert sum(p.numel() for p in alone.parameters()) < alone.catalog.architecture.params(alone.plan)
    alone.precompute([])
    torch.testing.assert_close(run(alone, given), wanted, atol=1e-6, rtol=1e-6)


def test_other_plans_than_a_frontier_are_refused(source):
    catalog = source.catalog
    only = {"blocks": catalog.dense.blocks}
    with pytest.raises(ValueError, match="holds one plan, but its catalog lists choices"):
        ppcl_rt.Catalog.model_validate({**catalog.model_dump(), "only": only})


def test_stock_does_not_take_it_for_its_own(source, tmp_path):
    ppcl_rt.load(source.folder, 0.6).save_plan(tmp_path / "one")
    config = QwenImageTransformer2DModel.load_config(tmp_path / "one")
    assert config["_class_name"] == "PPCLQwenImageTransformer2DModel"


def test_a_tensor_of_another_width_is_refused(source, tmp_path):
    model = ppcl_rt.load(source.folder, 0.6)
    catalog = model.save_plan(tmp_path / "one")
    written = ppcl_rt.Checkpoint(tmp_path / "one")
    tensors = {name: written.read(name) for name in written.names}
    name = next(name for name in tensors if name.endswith("attn.to_q.weight"))
    ppcl_rt.write_checkpoint(tmp_path / "cut", model.one_plan_config, catalog, tensors | {name: tensors[name][:-1]})
    with pytest.raises(ValueError, match="the catalog asks for"):
        ppcl_rt.load(tmp_path / "cut")
    del tensors[name]
    ppcl_rt.write_checkpoint(tmp_path / "less", model.one_plan_config, catalog, tensors)
    with pytest.raises(ValueError, match=name):
        ppcl_rt.load(tmp_path / "less")
