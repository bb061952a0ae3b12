"""Modulations of a sampler's timesteps, computed once: looked up, moved, dropped, read again."""

import pytest
import torch

import ppcl_rt

TIMESTEPS = [0.9, 0.5, 0.1]


def inputs_at(build_inputs, timestep, **changes):
    inputs = build_inputs(**changes)
    return {**inputs, "timestep": torch.full_like(inputs["timestep"], timestep)}


def modulation_layers(model):
    return [name for name, _ in model.named_parameters() if "_mod." in name or "replacements.modulation" in name]


@pytest.fixture
def model(made):
    return ppcl_rt.load(made.folder, 1.0)


@pytest.mark.parametrize("keep_weights", [True, False])
def test_gives_what_computing_gives_at_any_ratio(made, model, build_inputs, run, same, keep_weights):
    fresh = ppcl_rt.load(made.folder, 1.0)
    model.precompute(TIMESTEPS, keep_weights=keep_weights)
    for ratio in (1.0, 0.6, 0.8, 1.0):
        for either in (model, fresh):
            either.set_ratio(ratio)
        for timestep in TIMESTEPS:
            inputs = inputs_at(build_inputs, timestep)
            same(run(model, inputs), run(fresh, inputs), 1e-6)
        assert bool(modulation_layers(model)) == keep_weights
    with model.at(ratio=0.7), fresh.at(ratio=0.7):
        same(run(model, inputs), run(fresh, inputs), 1e-6)
    for either in (model, fresh):
        either.set_schedule(ppcl_rt.Schedule(phases=((0, 1.0), (1, 0.6))))
    for timestep in TIMESTEPS:
        inputs = inputs_at(build_inputs, timestep)
        same(run(model, inputs), run(fresh, inputs), 1e-6)


def test_looks_up_and_computes_nothing(made, model, build_inputs, run):
    model.precompute(TIMESTEPS)
    wanted = run(model, inputs_at(build_inputs, 0.5))
    with torch.no_grad():
        for name in modulation_layers(model):
            model.get_parameter(name).fill_(float("nan"))
    assert torch.equal(run(model, inputs_at(build_inputs, 0.5)), wanted)
    # Another timestep is computed, with the weights as they are.
    assert run(model, inputs_at(build_inputs, 0.3)).isnan().all()
    # No timesteps: an end of it.
    model.precompute([])
    assert run(model, inputs_at(build_inputs, 0.5)).isnan().all()


def test_rows_have_the_same_bits_in_every_batch(model):
    model.precompute(TIMESTEPS)
    program = model._program()
    alone = model._rows(program, torch.tensor([0.5]))
    among = model._rows(program, torch.tensor([0.9, 0.5, 0.1]))
    half = model._rows(program, torch.tensor([0.5] * 4))
    assert torch.equal(alone[0], among[1]) and torch.equal(alone, half)
    again = ppcl_rt.load(model._source.folder, 1.0)
    again.precompute(TIMESTEPS)
    assert torch.equal(again._rows(again._program(), torch.tensor([0.5])), alone)


def test_text_runs(mapped, build_inputs, run, same):
    """A block inside a text run computes no modulations of the text, and has none in the table."""
    model = ppcl_rt.load(mapped.folder, 1.0)
    kept = [(n, model.catalog.spec(n).full) for n in range(model.catalog.architecture.depth)]
    model.set_plan(model.catalog.compose(kept, text_runs=[model.catalog.text_runs[0].interval]))
    inputs = inputs_at(build_inputs, 0.5)
    wanted = run(model, inputs)
    model.precompute(TIMESTEPS, keep_weights=False)
    same(run(model, inputs), wanted, 1e-6)


def test_reference_images(make_checkpoint, build_inputs, run, same, tmp_path):
    """Tokens of a reference image take timestep 0, which is in the table unasked."""
    made = make_checkpoint(tmp_path / "checkpoint", zero_cond_t=True)
    model = ppcl_rt.load(made.folder, 1.0)
    inputs = inputs_at(build_inputs, 0.5, images=((1, 3, 5), (1, 2, 3)))
    wanted = run(model, inputs)
    model.precompute(TIMESTEPS, keep_weights=False)
    same(run(model, inputs), wanted, 1e-6)


def test_training_computes(model, build_inputs, run):
    """In training the weights change from step to step: tables are for evaluation."""
    model.precompute(TIMESTEPS)
    assert model.train()._rows(model._program(), torch.tensor([0.5])) is None
    assert model.eval()._rows(model._program(), torch.tensor([0.5])) is not None


def test_timesteps_of_a_batch_may_differ(made, model, build_inputs, run, same):
    inputs = build_inputs()
    inputs["timestep"] = torch.tensor(TIMESTEPS * len(inputs["timestep"]))[: len(inputs["timestep"])]
    wanted = run(model, inputs)
    model.precompute(TIMESTEPS)
    same(run(model, inputs), wanted, 1e-6)


def test_weights_leave_and_come_back(made, model, build_inputs, run, same):
    inputs, before = inputs_at(build_inputs, 0.5), model.resident_bytes
    wanted = run(model, inputs)
    model.precompute(TIMESTEPS, keep_weights=False)
    table = sum(t.rows.numel() * t.rows.element_size() for t in model._precomputed.tables.values())
    assert (
        table > 0
        and model.resident_bytes
        == sum(t.numel() * t.element_size() for t in [*model.parameters(), *model.buffers()]) + table
    )
    assert model.resident_bytes < before
    with pytest.raises(ValueError, match="precompute it") as refused:
        run(model, inputs_at(build_inputs, 0.3))
    assert "\n" not in str(refused.value)
    model.precompute([])
    assert model.resident_bytes == before
    assert torch.equal(run(model, inputs), wanted)


def test_moves(made, model, build_inputs, run, same):
    model.precompute(TIMESTEPS, keep_weights=False)
    wanted = run(model, inputs_at(build_inputs, 0.5))
    model.to(torch.float64).to(torch.float32)
    assert torch.equal(run(model, inputs_at(build_inputs, 0.5)), wanted)
    model.to(torch.bfloat16)
    half = {
        key: value.bfloat16() if torch.is_tensor(value) and value.is_floating_point() else value
        for key, value in inputs_at(build_inputs, 0.5).items()
    }
    assert run(model, half).dtype == torch.bfloat16


def test_saves_from_the_checkpoint(made, model, build_inputs, run, tmp_path):
    wanted = run(model, inputs_at(build_inputs, 0.5))
    model.precompute(TIMESTEPS, keep_weights=False)
    model.save_pretrained(tmp_path)
    assert torch.equal(run(ppcl_rt.load(tmp_path, 1.0), inputs_at(build_inputs, 0.5)), wanted)


def test_tables_go_with_their_plans(model):
    model.precompute(TIMESTEPS)
    model.set_ratio(0.6)
    assert len(model._precomputed.tables) == 2
    model.trim()
    assert len(model._precomputed.tables) == 1


def test_bad_arguments(made, model, build_stock):
    layered = type(model)(**{**build_stock().config, "use_additional_t_cond": True})
    with pytest.raises(ValueError, match="timestep alone"):
        layered.precompute(TIMESTEPS)
    for wrong in ([[0.5]], [float("nan")]):
        with pytest.raises(ValueError, match="finite timesteps"):
            model.precompute(wrong)
    dense = type(model)(**build_stock().config)
    with pytest.raises(ValueError, match="keep the weights"):
        dense.precompute(TIMESTEPS, keep_weights=False)
