"""What recovery trains: factors in the place of weights, in the order in which a checkpoint has them."""

import random

import pytest
import torch
from tiny import TINY

from ppcl_train import pipeline
from ppcl_train.config.settings import with_changes
from ppcl_train.data import calibration
from ppcl_train.engine.files import stored_in, write_tensors
from ppcl_train.stages.assembly import assembled, opened
from ppcl_train.stages.recover import matrices, random_plan
from ppcl_train.stages.trained import Trained

# Every candidate is taken, and hardly anything is stored whole.
RUN = with_changes(
    TINY, {"compress.share": 0.5, "compress.student_share": 0.5, "table.ratio_step": 0.01, "students.lr": 0.05}
)


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    """A run as it is before recovery: its folder, and what it has made."""
    folder = tmp_path_factory.mktemp("run")
    torch.manual_seed(0)
    # A teacher of a few steps would hardly feel its blocks: modulations begin at zero.
    model = RUN.family.build(RUN.teacher.architecture)
    write_tensors(folder / "random.safetensors", dict(model.named_parameters()), {})
    pipeline.begin(RUN, folder, folder / "random.safetensors")
    pipeline.run_stages(RUN, folder, last="compress")
    return folder, stored_in(folder / "width.json") | stored_in(folder / "compressed.json")


def training(folder, tensors, everything=False):
    source = assembled(RUN, folder, tensors)
    trained = Trained(source, everything)
    model = opened(RUN, source, trained.add_block)
    trained.add_outside(model)
    return model, trained


def outputs(model):
    """Of the dense plan and of random ones, which between them run everything."""
    rng, given = random.Random(3), calibration.inputs(RUN, 4, calibration.CHECK + 5).call
    plans = [model.catalog.dense, *(random_plan(model.catalog, rng) for _ in range(12))]
    found = []
    for plan in plans:
        with torch.no_grad(), model.at(plan=plan):
            found.append(model(**given)[0])
    return torch.stack(found)


def test_muon_takes_whole_matrices_of_blocks_and_students(begun):
    folder, tensors = begun
    model, trained = training(folder, tensors)
    # Students are factors here: AdamW trains those, and all that lies next to the teacher's blocks.
    assert matrices(RUN, model, trained.parameters) == set()
    model, trained = training(folder, tensors, everything=True)
    found = matrices(RUN, model, trained.parameters)
    students = {name.split(".")[1] for name in found if name.startswith("students.")}
    assert students == {student.interval.key for student in model.catalog.students}
    assert {"transformer_blocks.0.attn.to_q.weight", "transformer_blocks.2.img_mlp.net.2.weight"} <= found
    assert all(trained.parameters[name].ndim == 2 for name in found)
    assert not any(part in name for name in found for part in ("_mod.", "replacements.", "img_in", "text_runs"))


def test_a_model_that_is_trained_runs_as_before(begun):
    folder, tensors = begun
    model, trained = training(folder, tensors)
    assert sum(name.endswith(".up") for name in trained.parameters) > 10
    students = {name.split(".")[1] for name in trained.parameters if name.startswith("students.")}
    assert students == {student.interval.key for student in model.catalog.students} != set()
    # Sums of float32 in another order.
    assert torch.allclose(outputs(model), outputs(opened(RUN, assembled(RUN, folder, tensors))), atol=2e-5)


@pytest.mark.parametrize("everything", [False, True])
def test_what_was_trained_is_what_is_read_afterwards(begun, everything):
    """Rank orders permute units in memory; stored they are in stock order."""
    folder, tensors = begun
    model, trained = training(folder, tensors, everything)
    before = outputs(model)
    names = set(trained.parameters)
    assert everything == ("transformer_blocks.0.attn.to_q.weight" in names) == ("img_in.weight" in names)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in trained.parameters.values():
            assert parameter.dtype == torch.float32 and parameter.requires_grad
            parameter += 0.05 * parameter.abs().mean() * torch.randn_like(parameter)
    after = outputs(model)
    moved = (after - before).abs().flatten(1).amax(1)
    assert bool((moved[1:] > 1e-4).all()) and bool(moved[0] > 1e-4) == everything
    outcome = trained.outcome(tensors, trained.parameters)
    assert set(tensors) <= set(outcome) or everything
    assert torch.allclose(outputs(opened(RUN, assembled(RUN, folder, outcome))), after, atol=5e-5)


def test_gradients_reach_factors_and_nothing_of_the_teacher(begun):
    folder, tensors = begun
    model, trained = training(folder, tensors)
    rng, given = random.Random(3), calibration.inputs(RUN, 4, calibration.CHECK + 5).call
    for _ in range(60):
        with model.at(plan=random_plan(model.catalog, rng)):
            output = model(**given)[0]
        # Not of a plan that takes no choice but prefixes of the teacher's own weights.
        if output.requires_grad:
            output.square().sum().backward()
    reached = {name for name, parameter in trained.parameters.items() if parameter.grad is not None}
    assert len(reached) > 0.8 * len(trained.parameters)
    ours = {id(parameter) for parameter in trained.parameters.values()}
    assert all(parameter.grad is None for parameter in model.parameters() if id(parameter) not in ours)
