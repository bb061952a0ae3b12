"""Training: the closed forms, the losses, and runs that can be killed."""

import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tiny import ARCHITECTURE, TINY
from torch import nn

import ppcl_rt
from ppcl_rt import Catalog, Interval, PlannedBlock, Streams
from ppcl_rt.planning.sketch import TENSORS, Sketches, choices, measured
from ppcl_train import pipeline
from ppcl_train.closed_form.cka import linear_cka
from ppcl_train.closed_form.least_squares import LeastSquares
from ppcl_train.config.settings import RunConfig, with_changes
from ppcl_train.data import calibration, streams
from ppcl_train.data.teacher_file import load_teacher
from ppcl_train.engine.files import read_content, read_tensors, stored_in
from ppcl_train.engine.queue import RESULTS
from ppcl_train.losses.matching import matching_loss
from ppcl_train.losses.velocity_error import VelocityError
from ppcl_train.selectors.eq5 import find_intervals
from ppcl_train.stages import teacher
from ppcl_train.stages.assembly import assembled, opened
from ppcl_train.stages.sensitivities import sensitivities


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A complete tiny run."""
    folder = tmp_path_factory.mktemp("run")
    pipeline.begin(TINY, folder)
    pipeline.run_stages(TINY, folder)
    return folder


def test_streamed_least_squares_is_least_squares():
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(200, 5, generator=generator) + 3, torch.randn(200, 3, generator=generator)
    fit = LeastSquares(5, 3)
    for start in range(0, 200, 33):
        fit.add(x[start : start + 33], y[start : start + 33])
    weight, bias = fit.solve(ridge=0.0)
    expected = torch.linalg.lstsq(torch.cat([x, torch.ones(200, 1)], 1).double(), y.double()).solution.float()
    assert torch.allclose(weight, expected[:-1].T, atol=1e-5) and torch.allclose(bias, expected[-1], atol=1e-5)


def test_cka_ignores_rotation_and_scale_and_is_low_for_noise():
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(500, 8, generator=generator)
    rotation = torch.linalg.qr(torch.randn(8, 8, generator=generator)).Q
    assert linear_cka(x, 3 * x @ rotation + 5) == pytest.approx(1, abs=1e-6)
    # Independent samples: the expected value is about 8 / 500.
    assert linear_cka(x, torch.randn(500, 8, generator=generator)) < 0.1


def test_intervals_end_at_the_first_rise_of_the_difference():
    # From 0: drops of 0.02, 0.01, 0.05 -> the third is the first rise, so blocks 0..2; from 3 it never rises: 3..5.
    cka = {(0, 0): 0.99, (0, 1): 0.97, (0, 2): 0.96, (0, 3): 0.91, (0, 4): 0.9, (0, 5): 0.9}
    cka |= {(3, 3): 0.99, (3, 4): 0.95, (3, 5): 0.93}
    assert find_intervals(cka, 6, literal=True) == [Interval(0, 2), Interval(3, 5)]


def test_a_last_block_alone_is_no_interval():
    cka = {(0, 0): 1.0, (0, 1): 0.9, (0, 2): 0.5}
    assert find_intervals(cka, 3, literal=True) == [Interval(0, 1)]


def test_matching_loss_is_eq_6():
    generator = torch.Generator().manual_seed(2)
    mine, theirs = (
        Streams(torch.randn(2, 3, 4, generator=generator), torch.randn(2, 5, 4, generator=generator)) for _ in range(2)
    )
    mask = torch.tensor([[1, 1, 0, 0, 1], [1, 0, 0, 0, 0]], dtype=torch.bool)
    assert matching_loss(mine, mine, mask, 1.0) == 0
    by_hand = sum(
        (F.normalize(a, dim=-1) - F.normalize(b, dim=-1)).square().sum(-1).mean()
        for a, b in ((mine.image, theirs.image), (mine.text[mask], theirs.text[mask]))
    )
    assert torch.allclose(matching_loss(mine, theirs, mask, 0.0), by_hand)
    # Direction alone: a student of any length costs nothing, until magnitude is asked for.
    longer = Streams(2 * theirs.image, 2 * theirs.text)
    assert matching_loss(longer, theirs, mask, 0.0) < 1e-10 < matching_loss(longer, theirs, mask, 1.0)


def test_a_trace_is_what_the_model_computes():
    model = teacher.initial(TINY).eval()
    for p in model.parameters():
        nn.init.normal_(p, std=0.1)
    given = calibration.inputs(TINY, 3, calibration.CHECK + 5)
    passed = streams.trace(model, given)
    assert len(passed.streams) == 5
    for block, before, after in zip(model.blocks(), passed.streams, passed.streams[1:]):
        # With gradients, operations do not work in place, and round in another order.
        with torch.no_grad():
            again = streams.run_block(block, before, passed.context)
        assert torch.equal(again.image, after.image) and torch.equal(again.text, after.text)
    assert not model.blocks()[0]._forward_hooks


def test_a_runs_licence_is_the_checkpoints(finished):
    assert ppcl_rt.load(finished / "checkpoint").catalog.license == TINY.license == "apache-2.0"


def test_refinement_goes_on_from_recovery_and_leaves_out_what_no_plan_takes(finished):
    before, after = (read_tensors(finished / f"{stage}.safetensors") for stage in ("recovered", "refined"))
    assert set(after) <= set(before)
    moved = [name for name in after if not torch.equal(before[name], after[name])]
    assert len(moved) > len(after) // 4
    # What it planned by was measured on what recovery left.
    costs = Catalog.model_validate(read_content(finished / "recovered_costs.json"))
    assert costs.sketch is not None and (finished / "recovered_costs.safetensors").exists()


def test_a_run_makes_a_checkpoint_that_holds_its_teacher(finished):
    model = ppcl_rt.load(finished / "checkpoint")
    stock = load_teacher(TINY, finished)
    given = calibration.inputs(TINY, 3, calibration.CHECK + 5).call
    wanted = stock(**given)[0]
    # Rank orders permute sums; 4 blocks of float32.
    assert torch.allclose(model.float()(**given)[0], wanted, atol=1e-5)
    catalog = model.catalog
    assert catalog.compensated and catalog.task["name"] == "scenes"
    # What no plan of the frontier takes is not packed.
    listed = list(choices(catalog))
    taken = [listed[number] for plan in catalog.frontier for number in plan.choices]
    for kind, packed in (("student", catalog.students), ("text_run", catalog.text_runs)):
        assert {each.interval for each in packed} == {choice.interval for choice in taken if choice.kind == kind}
    assert all(option.loss > 0 for widths in catalog.blocks for option in widths.of("image")[1:])


def test_compensated_widths_are_closer_to_the_teacher_than_plain_prefixes(finished):
    catalog = ppcl_rt.load(finished / "checkpoint").catalog
    full, depth = catalog.spec(0).full, catalog.architecture.depth
    half = full.replace(image=full["image"] // 2)
    plan = catalog.compose((n, half) for n in range(depth))
    model = ppcl_rt.load(finished / "checkpoint", plan=plan, dtype=torch.float32)
    plain = ppcl_rt.load(finished / "checkpoint", dtype=torch.float32)
    given = calibration.inputs(TINY, 64, calibration.CHECK + 6)
    dense = plain(**given.call)[0]
    compensated = (model(**given.call)[0] - dense).square().mean()
    # The same plan from the full output layers: one channel more is no count of the catalog's, so it has no layer.
    wider = half.replace(image=half["image"] + 1)
    plain.set_plan(catalog.compose((n, wider) for n in range(depth)))
    assert compensated < 0.8 * (plain(**given.call)[0] - dense).square().mean()


def test_the_last_stages_run_again_leave_the_same_bytes(finished, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    for name in ("sensitivities.json", "checkpoint/run.json"):
        (folder / name).unlink()
    pipeline.run_stages(TINY, folder)
    again, before = (read_tensors(f / "checkpoint/diffusion_pytorch_model.safetensors") for f in (folder, finished))
    assert again.keys() == before.keys() and all(torch.equal(tensor, before[name]) for name, tensor in again.items())


def test_a_teacher_of_another_architecture_is_refused(finished, tmp_path):
    for changes in ({"teacher.architecture": {**ARCHITECTURE, "num_layers": 5}}, {"students.steps": 9}):
        config = with_changes(TINY, changes)
        if "students.steps" in changes:
            # The same architecture is taken, into a run of another config.
            pipeline.begin(config, tmp_path / "b", finished / "teacher.safetensors")
            assert pipeline.is_done(pipeline.STAGES[0], tmp_path / "b")
        else:
            with pytest.raises(ValueError, match="other tensors"):
                pipeline.begin(config, tmp_path / "a", finished / "teacher.safetensors")
            assert not (tmp_path / "a").exists()


def test_a_finished_run_does_nothing_when_run_again(finished):
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*")}
    pipeline.run_stages(TINY, finished)
    assert before == {path: path.stat().st_mtime_ns for path in finished.rglob("*")}


def test_what_no_later_stage_reads_is_deleted_and_made_again_where_it_is_wanted(finished, tmp_path):
    def done():
        return {stage.name for stage in pipeline.STAGES if pipeline.is_done(stage, folder)}

    folder, every = tmp_path / "run", {stage.name for stage in pipeline.STAGES}
    shutil.copytree(finished, folder)
    pipeline.run_stages(with_changes(TINY, {"keep_all": False}), folder)
    gone = {str(path.relative_to(finished)) for path in finished.iterdir()} - {path.name for path in folder.iterdir()}
    assert gone == {
        "students.safetensors", "width.json", "width", "compressed.json", "compressed", "recovered.safetensors"
    }  # fmt: skip
    assert done() == every and {stage.state for stage in pipeline.progress(folder)} == {"done"}
    (folder / "refined.safetensors").unlink()
    assert every - done() == {"width", "students", "compress", "recover", "refine"}


def test_a_run_folder_refuses_another_config(finished):
    with pytest.raises(ValueError, match=r"students\.steps = 8"):
        pipeline.begin(with_changes(TINY, {"students.steps": 9}), finished)


def test_settings_are_checked():
    for changes in (
        {"students.stepz": 1},
        {"nothing.at.all": 1},
        {"students.steps": -1},
        {"table.starts": ["second"]},
        {"select": "eq6"},
    ):
        with pytest.raises(ValueError):
            with_changes(TINY, changes)
    assert RunConfig.model_validate_json(TINY.model_dump_json()) == TINY


def test_divergence_stops_with_the_step_and_keeps_the_last_state(tmp_path):
    config = with_changes(TINY, {"teacher.adamw_lr": 1e30, "teacher.muon_lr": 1e30, "teacher.warmup": 0})
    with pytest.raises(ValueError, match="at step"):
        teacher.train(config, tmp_path)
    assert not (tmp_path / "teacher.safetensors").exists()


def test_the_stage_measure_keeps_a_sketch_of_every_choice_in_order(finished, tmp_path):
    """Rows of the packed checkpoint are those that its choices have when they are measured again, one by one."""
    source = ppcl_rt.Checkpoint(finished / "checkpoint")
    catalog = source.catalog
    model = ppcl_rt.load(finished / "checkpoint", dtype=torch.float32, resident="all")
    assert catalog.sketch is not None and (catalog.sketch.size, catalog.sketch.bands) == (1024, 4)
    rows = [Sketches.of(source.read(name).numpy(), catalog).rows for name in TENSORS]
    again, tensors = sensitivities(model, TINY, tmp_path, lambda **_: None)
    known = list(measured(catalog))
    assert [each.choice for each in known] == list(choices(again)) and {c.choice.kind for c in known} >= {"block"}
    losses = np.array([[each.loss for each in measured(which)] for which in (catalog, again)])
    assert np.allclose(losses[0], losses[1], rtol=1e-4, atol=1e-9)
    for mine, name in zip(rows, TENSORS):
        theirs = Sketches.of(tensors[name].numpy(), again).rows
        # float16 keeps 3 digits.
        assert np.abs(mine - theirs).max() < 2e-3 * np.abs(theirs).max()
        assert np.allclose(np.square(mine).sum(1), losses[0], rtol=1e-9)
    for each in known:
        assert each.loss == pytest.approx(max(sum(each.bands), 1e-14), rel=1e-12)


def test_counts_of_a_student_lose_what_they_change_of_the_student(finished, tmp_path):
    """Neither the student alone nor the count alone: their difference, which is what a sketch of it sums."""
    model = opened(TINY, assembled(TINY, finished, stored_in(finished / "refined.safetensors")))
    torch.manual_seed(0)
    for parameter in model.requires_grad_(False).parameters():
        nn.init.normal_(parameter, std=0.2)
    catalog, error = sensitivities(model, TINY, tmp_path, lambda **_: None)[0], VelocityError(model, TINY)
    student = catalog.students[0]
    full = error.with_block(PlannedBlock(interval=student.interval, width=student.widths.full, student=True))
    count = student.widths.of("image")[1]
    narrower = student.widths.full.replace(image=count.units)
    narrow = error.with_block(PlannedBlock(interval=student.interval, width=narrower, student=True))
    assert sum(error.change(full).bands) == pytest.approx(student.loss, rel=1e-9)
    assert sum(error.change(narrow, error.predictions(full)).bands) == pytest.approx(count.loss, rel=1e-9)
    assert count.loss != pytest.approx(sum(error.change(narrow).bands) - student.loss, rel=1e-3)


def test_what_was_measured_is_measured_again_only_where_it_changed(finished, tmp_path):
    model = ppcl_rt.load(finished / "checkpoint", dtype=torch.float32, resident="all").requires_grad_(False)

    def measured_anew():
        """The choices whose results were not there; and all losses."""
        before = {path.name for path in (tmp_path / RESULTS).glob("*.safetensors")}
        catalog, _ = sensitivities(model, TINY, tmp_path, lambda **_: None)
        names = {path.name for path in (tmp_path / RESULTS).glob("*.safetensors")} - before
        losses = {each.choice: each.loss for each in measured(catalog)}
        return {name.rpartition("-")[0] for name in names}, losses

    every, losses = measured_anew()
    assert len(every) == len(losses) == len(list(choices(model.catalog))) and measured_anew() == (set(), losses)
    block, student = model.blocks()[1], model.catalog.students[0].interval.key
    replaced = next(name for name in block.replacements if name.startswith("mlp_image_"))
    block.replacements[replaced].weight.mul_(1.5)
    units = replaced.rpartition("_")[2]
    again, others = measured_anew()
    assert again == {f"block-1-1-image-{units}"}
    assert {choice.interval for choice in losses if losses[choice] != others[choice]} == {Interval(1, 1)}
    # A student's narrower counts are measured against it.
    next(model.students[student].parameters()).mul_(1.5)
    assert measured_anew()[0] == {name for name in every if name.startswith(f"student-{student}")}
    # All losses are against the teacher.
    next(block.parameters()).mul_(1.001)
    assert measured_anew()[0] == every
