"""Qwen-Image-Edit (``zero_cond_t``, several images) and Qwen-Image-Layered by the laws of the plain model."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from fixtures import TEXT_RUNS, WITH_MAPS

import ppcl_rt

CONFIGS = {
    "edit": {"zero_cond_t": True},
    "layered": {"use_layer3d_rope": True, "use_additional_t_cond": True},
}
# The picture and its references, of other sizes; layers and the picture that they are taken from, all of one size.
IMAGES = {"edit": ((1, 3, 5), (1, 2, 3), (1, 1, 4)), "layered": ((1, 3, 4),) * 3}
TOKENS = {"edit": 15 + 6 + 4, "layered": 36}
EVERY = pytest.mark.parametrize("variant", list(CONFIGS))


@pytest.fixture(scope="module")
def of(tmp_path_factory, make_checkpoint):
    """The checkpoint of a variant with everything in it, and its model, everything resident; each is made once."""
    made = {}

    def get(variant, **more):
        key = (variant, bool(more))
        if key not in made:
            folder = tmp_path_factory.mktemp(variant) / "checkpoint"
            checkpoint = make_checkpoint(folder, seed=len(made), **CONFIGS[variant], **more)
            made[key] = checkpoint, ppcl_rt.load(folder, resident="all")
        return made[key]

    return get


@pytest.fixture
def inputs_of(build_inputs):
    def build(variant, seed=0, mask="random", images=None):
        more = {"additional_t_cond": torch.tensor([0, 1, 1])} if variant == "layered" else {}
        return {**build_inputs(seed=seed, images=images or IMAGES[variant], mask=mask), **more}

    return build


@EVERY
@pytest.mark.parametrize("mask", ["none", "random", "scattered", "rows", "prefix"])
def test_dense_is_stock(variant, mask, of, inputs_of, run, same):
    """With several images and any mask."""
    made, model = of(variant)
    inputs = inputs_of(variant, mask=mask)
    model.set_ratio(1.0)
    same(run(model, inputs), run(made.stock, inputs))


@EVERY
def test_any_number_of_images(variant, of, inputs_of, run, same):
    """From none beside the picture on; tokens of a reference are not those of the picture."""
    made, model = of(variant)
    model.set_ratio(1.0)
    for count in (1, 2, 3):
        inputs = inputs_of(variant, images=IMAGES[variant][:count])
        same(run(model, inputs), run(made.stock, inputs))
    moved = {**inputs, "img_shapes": [[IMAGES[variant][-1], *IMAGES[variant][:-1]]] * 3}
    if variant == "edit":
        assert (run(model, moved) - run(model, inputs)).abs().max() > 1e-2
    else:
        other = {**inputs, "additional_t_cond": 1 - inputs["additional_t_cond"]}
        same(run(model, other), run(made.stock, other))
        assert (run(model, other) - run(model, inputs)).abs().max() > 1e-3


@EVERY
@pytest.mark.parametrize("count", [1, 2, 4])
def test_controlnet(variant, count, of, inputs_of, run, same):
    made, model = of(variant)
    inputs = inputs_of(variant)
    shape = (3, TOKENS[variant], 32)
    residuals = [torch.randn(shape, generator=torch.Generator().manual_seed(n)) for n in range(count)]
    model.set_ratio(1.0)
    got = run(model, inputs, controlnet_block_samples=residuals)
    same(got, run(made.stock, inputs, controlnet_block_samples=residuals))
    assert (got - run(model, inputs)).abs().max() > 1e-2


@EVERY
@pytest.mark.parametrize("mask", ["none", "random"])
def test_narrow_plans_are_stock_with_columns_zeroed(variant, mask, of, inputs_of, run, same):
    """Any counts, students, skipped blocks, with ControlNet residuals where no block is left out."""
    made, model = of(variant)
    rng, inputs = np.random.default_rng(4), inputs_of(variant, mask=mask)
    for skip in (0.0, 0.0, 0.3, 0.3):
        plan = made.random_plan(rng, skip=skip)
        model.set_plan(plan)
        same(run(model, inputs), run(made.reference(plan), inputs))


@EVERY
def test_maps_low_ranks_and_text_runs(variant, of, inputs_of, run, same):
    """Everything that a catalog can offer, by the law of it; a text run's maps see the text alone."""
    made, model = of(variant, compensated=True, groups=WITH_MAPS, text_runs=TEXT_RUNS)
    rng, inputs, runs = np.random.default_rng(8), inputs_of(variant), 0
    for _ in range(8):
        plan = made.random_plan(rng, legal=True)
        runs += len(plan.text_runs)
        model.set_plan(plan)
        same(run(model, inputs), run(made.reference(plan), inputs), 2e-5)
    assert runs >= 2


def test_modulations_are_known_beforehand_where_they_can_be(of, inputs_of, run, same):
    """Of the edited picture and its references; those of layers depend on more than the timestep."""
    made, _ = of("edit")
    model, inputs = ppcl_rt.load(made.folder), inputs_of("edit")
    inputs["timestep"] = torch.tensor([0.25, 0.5, 0.25])
    wanted = run(model, inputs)
    model.precompute([0.5, 0.25], keep_weights=False)
    same(run(model, inputs), wanted, 2e-6)
    layered, _ = of("layered")
    with pytest.raises(ValueError, match="do not come from the timestep alone"):
        ppcl_rt.load(layered.folder).precompute([0.5])
