"""The measured loss: guided, over the sampler's own timesteps, by band; and sketches of what changes."""

from collections import Counter

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from tiny import TINY
from torch import nn

from ppcl_rt.planning.legal import Sketch
from ppcl_train.config.presets import PRESETS
from ppcl_train.config.settings import with_changes
from ppcl_train.data import calibration
from ppcl_train.data.calibration import Inputs, stratified
from ppcl_train.families import base as families
from ppcl_train.families.base import Samples
from ppcl_train.losses.sketching import Sketcher, sketch_for
from ppcl_train.losses.velocity_error import Target, VelocityError, band_edges
from ppcl_train.scenes.encoding import encode
from ppcl_train.scenes.sampling import Sampler
from ppcl_train.stages import teacher

GUIDED = with_changes(
    TINY, {"sampler.steps": 5, "sampler.shift": 2.0, "sampler.guidance": 3.0, "measure.samples": 20, "batch": 8}
)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    made = teacher.initial(TINY).eval().requires_grad_(False)
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.2)
    return made


def without(model, *gone):
    """The plan that leaves out some blocks."""
    catalog = model.catalog
    depth = catalog.architecture.depth
    return catalog.compose([(n, catalog.spec(n).full) for n in range(depth) if n not in gone])


def on_all(model, plan, run):
    """What a plan predicts, guided by hand, and the batches: two calls of every batch."""
    found = []
    for batch in calibration.measured(run, run.measure.samples, calibration.MEASURE):
        size, outputs = len(batch.x), []
        for half in (slice(size), slice(size, 2 * size)):
            call = {
                name: value[half] if isinstance(value, (torch.Tensor, list)) and len(value) == 2 * size else value
                for name, value in batch.call.items()
            }
            with torch.no_grad(), model.at(plan=plan):
                outputs.append(model(**call)[0])
        wanted, free = outputs
        found.append((batch, free + run.sampler.guidance * (wanted - free)))
    return found


@pytest.mark.parametrize("samples", [3, 7, 20, 40, 50])
def test_samples_are_spread_evenly_over_the_grid_and_their_shares_make_a_mean(samples):
    times = Sampler(steps=20, shift=2.0).times()[:-1]
    t, shares = stratified(times, samples, np.random.default_rng(3))
    counts = Counter(t.tolist())
    assert max(counts.values()) - min(counts.values()) <= 1
    assert len(counts) == min(samples, 20) and shares.sum() == pytest.approx(1, abs=1e-12)
    value = {float(np.float32(time)): n**2 for n, time in enumerate(times)}
    mean = sum(share * value[time] for time, share in zip(t.tolist(), shares.tolist()))
    assert mean == pytest.approx(np.mean([value[time] for time in counts]), rel=1e-12)
    # Fewer samples than timesteps: one in each of as many equal parts of the grid.
    if samples < 20:
        places = sorted(times.index(min(times, key=lambda each: abs(each - time))) for time in counts)
        assert [int(place * samples / 20) for place in places] == list(range(samples))
    again, other = (stratified(times, samples, np.random.default_rng(seed))[0] for seed in (3, 4))
    assert torch.equal(t, again) and not torch.equal(t, other)


def test_a_loss_is_that_of_the_guided_prediction_by_hand(model):
    plan = without(model, 1)
    measure = VelocityError(model, GUIDED)
    error, signal = np.zeros(4), 0.0
    for (batch, changed), (_, dense) in zip(on_all(model, plan, GUIDED), on_all(model, model.catalog.dense, GUIDED)):
        for n, t in enumerate(batch.t.tolist()):
            # Every timestep of the grid is there four times.
            weight = 1 / 20
            error[min(int(t * 4), 3)] += weight * (changed[n] - dense[n]).double().square().sum()
            signal += weight * (batch.x[n] - dense[n]).double().square().sum()
    bands = measure.of(plan)
    # Two calls of N samples round otherwise than one call of 2 N.
    assert np.allclose(bands, error / signal, rtol=1e-4) and sum(bands) > 1e-3
    assert measure.of(model.catalog.dense) == (0.0,) * 4
    unguided = with_changes(GUIDED, {"sampler.guidance": 1.0})
    assert sum(VelocityError(model, unguided).of(plan)) != pytest.approx(sum(bands), rel=1e-2)


def test_what_is_measured_is_what_the_sampler_calls(model):
    """The calls that the sampler makes on a sample are those that are measured, negative prompt included."""
    calls = []

    class Spy(nn.Module):
        def forward(self, **call):
            calls.append(call)
            return model(**call)

    run = with_changes(GUIDED, {"sampler.negative": "a red square at b2", "measure.samples": 5})
    batches = list(calibration.measured(run, 5, calibration.MEASURE))
    (batch,) = batches[:1]
    run.sampler.sample(Spy(), ["two red squares"] * len(batch.x), batch.x)
    assert {float(call["timestep"][0]) for call in calls} == {float(t) for each in batches for t in each.t}
    size, negative = len(batch.x), encode(["a red square at b2"])
    for call in (calls[0], batch.call):
        embeddings, mask = call["encoder_hidden_states"][size:], call["encoder_hidden_states_mask"][size:]
        assert torch.equal(embeddings, negative[0].expand_as(embeddings)) and torch.equal(
            mask, negative[1].expand_as(mask)
        )
        assert torch.equal(call["hidden_states"][:size], call["hidden_states"][size:])


def test_without_guidance_one_call_is_made():
    run = with_changes(GUIDED, {"sampler.guidance": 1.0})
    batches = list(calibration.measured(run, 12, calibration.CHECK))
    assert [len(batch.x) for batch in batches] == [len(batch.call["hidden_states"]) for batch in batches] == [8, 4]
    guided = list(calibration.measured(GUIDED, 12, calibration.CHECK))
    assert [len(batch.x) for batch in guided] == [4, 4, 4]
    assert {len(batch.call["hidden_states"]) for batch in guided} == {8}


def test_no_caption_is_dropped_where_losses_are_measured():
    run = with_changes(GUIDED, {"teacher.drop_caption": 0.9, "sampler.guidance": 1.0})
    empty, _ = encode([""])
    for batch in calibration.measured(run, 40, calibration.MEASURE):
        assert not any(torch.equal(each, empty[0]) for each in batch.call["encoder_hidden_states"])


def test_bands_without_a_timestep_have_no_part(model):
    run = with_changes(GUIDED, {"sampler.steps": 2, "measure.samples": 4})
    # 1 and 2/3: the third and the fourth band.
    bands = VelocityError(model, run).of(without(model, 0))
    assert bands[0] == bands[1] == 0 < min(bands[2:])


def test_the_preset_for_qwen_image_has_the_timesteps_and_the_guidance_of_its_pipeline():
    # scheduler/scheduler_config.json of Qwen/Qwen-Image, and mu of 4,096 tokens as its pipeline has it.
    settings = {
        "base_image_seq_len": 256,
        "base_shift": 0.5,
        "max_image_seq_len": 8192,
        "max_shift": 0.9,
        "shift_terminal": 0.02,
        "use_dynamic_shifting": True,
        "time_shift_type": "exponential",
    }
    scheduler = FlowMatchEulerDiscreteScheduler(**settings)
    mu = 0.5 + (4096 - 256) * (0.9 - 0.5) / (8192 - 256)
    sampler = PRESETS["qwen-image"].sampler
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / sampler.steps, sampler.steps), mu=mu)
    # exp(mu) is 2.0007, the preset says 2.
    assert np.allclose(sampler.times(), scheduler.sigmas.numpy(), atol=1e-4)
    family = families.of("qwen-image")
    wanted, free = torch.randn(2, 3, 5, 4, generator=torch.Generator().manual_seed(0))
    guided = family.guided(wanted, free, 4.0)
    straight = free + 4.0 * (wanted - free)
    assert torch.allclose(guided.norm(dim=-1), wanted.norm(dim=-1))
    assert torch.allclose(torch.cosine_similarity(guided, straight, dim=-1), torch.ones(3, 5))
    assert family.guided(torch.zeros(1, 1, 4), torch.zeros(1, 1, 4), 4.0).isfinite().all()


# Sketches.


def test_a_sketch_keeps_inner_products_and_bands_by_themselves(model):
    sketch = Sketch(seed=5, size=1024, bands=4)
    measure = VelocityError(model, GUIDED, sketch)
    plans = [without(model, n) for n in range(4)]
    changes = [measure.change(plan) for plan in plans]
    rows = np.stack([change.sketches * np.sqrt(sum(change.bands)) for change in changes], axis=1)
    exact = []
    for plan in plans:
        pairs = zip(on_all(model, plan, GUIDED), on_all(model, model.catalog.dense, GUIDED))
        exact.append(torch.cat([((a - b) / 20**0.5).flatten() for (_, a), (_, b) in pairs]).double().numpy())
    signal = sum(
        (batch.x - dense).double().square().sum() for batch, dense in on_all(model, model.catalog.dense, GUIDED)
    )
    exact = np.stack(exact) / np.sqrt(float(signal) / 20)
    gram = exact @ exact.T
    norms = np.sqrt(np.diag(gram))
    for each in rows:
        # One is the exact loss; an inner product has the standard error |a| |b| / sqrt(buckets of a band), four of it.
        assert np.allclose(np.diag(each @ each.T), np.diag(gram), rtol=1e-4)
        assert np.abs(each @ each.T - gram).max() < 4 * np.max(np.outer(norms, norms)) / 256**0.5
    for n, change in enumerate(changes):
        for band in range(4):
            there = np.square(rows[:, n, sketch.slice(band)]).sum(1)
            assert np.allclose(there, change.bands[band], rtol=1e-9)
    # Two sketches that do not know of each other, both decided by the seed.
    assert abs(rows[0, 0] @ rows[1, 0]) < 4 * gram[0, 0] / 256**0.5
    assert np.array_equal(VelocityError(model, GUIDED, sketch).change(plans[0]).sketches, changes[0].sketches)
    other = VelocityError(model, GUIDED, sketch.model_copy(update={"seed": 6})).change(plans[0])
    assert other.bands == changes[0].bands and not np.array_equal(other.sketches, changes[0].sketches)


def test_a_change_against_another_plan_is_the_difference_of_the_two(model):
    measure = VelocityError(model, GUIDED, Sketch(seed=0, size=64, bands=4))
    one, both = without(model, 1), without(model, 1, 2)
    change = measure.change(both, measure.predictions(one))
    exact = sum(
        (a - b).double().square().sum()
        for (_, a), (_, b) in zip(on_all(model, both, GUIDED), on_all(model, one, GUIDED))
    )
    signal = sum(
        (batch.x - dense).double().square().sum() for batch, dense in on_all(model, model.catalog.dense, GUIDED)
    )
    assert sum(change.bands) == pytest.approx(float(exact / signal), rel=1e-4)
    nothing = measure.change(one, measure.predictions(one))
    assert nothing.bands == (0.0,) * 4 and not nothing.sketches.any()


def test_signs_and_buckets_are_drawn_evenly():
    sketch = Sketch(seed=1, size=10, bands=3)
    batches = list(calibration.measured(GUIDED, 20, calibration.CHECK))
    sketcher = Sketcher(sketch, batches, band_edges(3))
    for batch, places in zip(batches, sketcher._places):
        for buckets, signs in places:
            per_sample = buckets.view(len(batch.x), -1)
            for band, row in zip(batch.bands(band_edges(3)), per_sample):
                there = sketch.slice(int(band))
                assert there.start <= row.min() and row.max() < there.stop
                counts = np.bincount(row.numpy() - there.start)
                # 768 draws among 3 or 4 buckets: six standard deviations.
                assert np.abs(counts - 768 / len(counts)).max() < 6 * (768 / len(counts)) ** 0.5
            assert abs(float(signs.double().mean())) < 6 / len(signs) ** 0.5


def test_many_choices_get_a_larger_sketch():
    assert (sketch_for(426, 0, 4).size, sketch_for(1000, 0, 4).size, sketch_for(1001, 0, 4).size) == (1024, 1024, 4096)


def test_latents_of_four_axes_are_measured_as_packed_ones():
    """The same numbers as [N, C, rows, columns] and as [N, S, C]: the same clean images, losses and sketches."""
    sketch, edges = Sketch(seed=1, size=32, bands=3), band_edges(3)
    generator = torch.Generator().manual_seed(0)
    packed, output, other = torch.randn(3, 5, 6, 8, generator=generator)
    t, shares = torch.tensor([0.1, 0.5, 0.7, 0.8, 1.0]), torch.full((5,), 0.2)
    found = []
    for shape in (packed.shape, (5, 2, 3, 8)):
        batch = Inputs(packed.view(shape), t, {}, "velocity", None, shares)
        target, sketcher = Target.of(batch, output.view(shape)), Sketcher(sketch, [batch], edges)
        sums = sketcher.empty(torch.device("cpu"))
        sketcher.add(sums, 0, batch.weighted(target.difference(other.view(shape))))
        assert target.clean.shape == shape
        found.append((target.clean.view(packed.shape), target.error_by_band(other.view(shape), edges), sums))
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b) and a.any()
    # By hand: (x - t v).
    assert torch.allclose(found[0][0][1], packed[1] - 0.5 * output[1])


def test_noise_of_four_axes_is_mixed_by_sample():
    """Each sample of a training batch at its own timestep."""
    made = Samples(torch.ones(4, 2, 3, 3), torch.zeros(4, 1, 2), torch.ones(4, 1, dtype=torch.bool), (1, 3, 3))
    noise = torch.randn(4, 2, 3, 3, generator=torch.Generator().manual_seed(0))
    mixed = calibration.Drawn(made, torch.tensor([0.0, 0.25, 0.5, 1.0]), noise).mixed()
    assert torch.equal(mixed[0], made.latents[0]) and torch.allclose(mixed[3], noise[3])
    assert torch.allclose(mixed[1], 0.75 + 0.25 * noise[1])
