"""Distillation: streams handed over on the way, one student's memory at a time, states on disk."""

import math

import pytest
import torch
from torch import nn

from ppcl_rt import Interval, Streams
from ppcl_train.config.presets import PRESETS
from ppcl_train.config.settings import with_changes
from ppcl_train.data import calibration, stream_cache, streams
from ppcl_train.data.teacher_file import load_teacher
from ppcl_train.engine.files import read_tensors, write_tensors
from ppcl_train.engine.live_bytes import LiveBytes
from ppcl_train.engine.optimisers import adamw
from ppcl_train.engine.saving import delete_states
from ppcl_train.losses.matching import matching_loss
from ppcl_train.selectors import selection
from ppcl_train.stages import students, teacher

TINY = with_changes(
    PRESETS["scenes"],
    {
        "teacher.architecture": {**PRESETS["scenes"].teacher.architecture, "num_layers": 6, "num_attention_heads": 2},
        "teacher.compile": False,
        "students.steps": 4,
        "students.batch": 4,
        "students.warmup": 0,
        "batch": 16,
        "save_every": 2,
    },
)
# Overlapping, nested, of one start, of one end, and one behind the others.
INTERVALS = (Interval(0, 1), Interval(0, 2), Interval(1, 2), Interval(1, 4), Interval(5, 5))


def prepare(folder, intervals=INTERVALS, config=TINY):
    """A run folder with a teacher of random weights and a selection; returns the teacher."""
    model = teacher.initial(config)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    write_tensors(folder / "teacher.safetensors", dict(model.named_parameters()), {})
    selection.write(folder, [selection.Selected(interval, "last") for interval in intervals])
    return load_teacher(config, folder)


def distilled(folder, changes):
    students.distil(with_changes(TINY, changes), folder)
    trained = read_tensors(folder / "students.safetensors")
    (folder / "students.safetensors").unlink()
    delete_states(folder, "students")
    return trained


def test_distilling_on_the_way_is_distilling_on_kept_states(tmp_path):
    model, config = prepare(tmp_path), TINY.students
    learners = {
        selected.interval: selection.new_student(model.transformer_blocks, selected)
        for selected in selection.read(tmp_path)
    }
    # One optimiser for all, which steps when all have their gradients.
    trained = [p for student in learners.values() for p in student.parameters()]
    optimiser = adamw(trained, lr=config.lr, weight_decay=config.weight_decay)
    for step in range(config.steps):
        for group in optimiser.param_groups:
            group["lr"] = config.lr * 0.5 * (1 + math.cos(math.pi * step / config.steps))
        batch = calibration.inputs(TINY, config.batch, calibration.STUDENTS + step)
        passed = streams.trace(model, batch)
        for interval, student in learners.items():
            out = streams.run_block(student, passed.streams[interval.first], passed.context)
            matching_loss(out, passed.streams[interval.last + 1], batch.mask, config.magnitude).backward()
        optimiser.step()
        optimiser.zero_grad()
    students.distil(TINY, tmp_path)
    trained = read_tensors(tmp_path / "students.safetensors")
    expected = {f"students.{i.key}.{n}": p for i, student in learners.items() for n, p in student.named_parameters()}
    assert trained.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in trained.items())


def test_intervals_are_visited_at_their_end_and_only_open_ones_are_held(tmp_path):
    model = prepare(tmp_path)
    given = calibration.inputs(TINY, 3, 5)
    passed = streams.trace(model, given)
    visited, bytes_of = [], 4 * sum(stream.numel() for stream in passed.streams[0])

    def visit(interval, before, after, context):
        visited.append(interval)
        for mine, theirs in zip(
            [*before, *after], [*passed.streams[interval.first], *passed.streams[interval.last + 1]]
        ):
            assert torch.equal(mine, theirs)
        assert context["temb"] is not None and "width" not in context

    streams.walk_intervals(model, given, INTERVALS, visit)
    assert [interval.last for interval in visited] == [1, 2, 2, 4, 5] and set(visited) == set(INTERVALS)
    peaks = []
    for intervals in ([Interval(0, 0)], [Interval(n, n) for n in range(6)], [Interval(n, 5) for n in range(6)]):
        with LiveBytes() as live:
            streams.walk_intervals(model, given, intervals, lambda *_: None)
        peaks.append(live.peak)
    # The last holds the inputs of all blocks until the end; of the first no more than a pass holds anyway.
    assert peaks[0] == peaks[1] and peaks[2] >= peaks[0] + 3 * bytes_of


def test_memory_is_that_of_a_teacher_pass_and_one_student_whatever_their_number(tmp_path):
    config = with_changes(
        TINY,
        {"teacher.architecture": {**TINY.teacher.architecture, "num_layers": 12}, "students.batch": 16},
    )
    model = prepare(tmp_path, config=config)
    batch = calibration.inputs(config, 16, 5)

    def learner(interval):
        block = selection.new_student(model.transformer_blocks, selection.Selected(interval, "first"))
        return students.Learner(block, config.students, 1.0)

    def peak(intervals):
        """Bytes beyond weights and the optimisers' state, in a step that is not the first."""
        learners = {interval: learner(interval) for interval in intervals}

        def learn(interval, before, after, context):
            learners[interval].learn(before, after, context, batch.mask)

        streams.walk_intervals(model, batch, intervals, learn)
        with LiveBytes() as live:
            streams.walk_intervals(model, batch, intervals, learn)
        return live.peak

    with LiveBytes() as forward:
        streams.walk(model, batch, lambda *_: None)
    passed, alone = streams.trace(model, batch), learner(Interval(0, 1))
    alone.learn(passed.streams[0], passed.streams[2], passed.context, batch.mask)
    with LiveBytes() as training:
        alone.learn(passed.streams[0], passed.streams[2], passed.context, batch.mask)
    pairs = [Interval(n, n + 1) for n in range(0, 12, 2)]
    peaks = [peak(pairs[:1]), peak(pairs[:3]), peak(pairs)]
    assert max(peaks) <= 1.3 * (forward.peak + training.peak)
    # Flat: what is still to be collected may be a stream more or less, and where intervals overlap another is held.
    stream = 4 * sum(stream.numel() for stream in passed.streams[0])
    assert max(peaks) - min(peaks) <= stream
    assert peak([Interval(n, n + 1) for n in range(11)]) <= min(peaks) + 2 * stream


def test_live_bytes_are_those_of_storages_that_are_alive():
    before = torch.ones(100)
    with LiveBytes() as live:
        a = before + 1
        b = a.view(10, 10)[:5]
        del a
        c = b * 2
        del b, c
        d = torch.zeros(150)
        d.add_(1)
    assert live.peak == 4 * max(100 + 50, 150)


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_checkpointing_changes_nothing_and_precision_a_little(tmp_path, precision):
    prepare(tmp_path)
    plain, again = (
        distilled(tmp_path, {"students.precision": precision, "students.checkpointing": checkpointing})
        for checkpointing in (False, True)
    )
    assert all(torch.equal(tensor, again[name]) for name, tensor in plain.items())
    assert all(tensor.dtype == torch.float32 and tensor.isfinite().all() for tensor in plain.values())


def test_bfloat16_learns_what_float32_learns(tmp_path, monkeypatch):
    model, config = prepare(tmp_path), with_changes(TINY, {"students.precision": "bf16"}).students
    batch = calibration.inputs(TINY, 4, 5)
    gradients = []
    for precise in (TINY.students, config):
        learner = students.Learner(
            selection.new_student(model.transformer_blocks, selection.Selected(Interval(0, 1), "last")), precise, 1.0
        )
        monkeypatch.setattr(learner.optimiser, "zero_grad", lambda: None)
        passed = streams.trace(model, batch)
        learner.learn(passed.streams[0], passed.streams[2], passed.context, batch.mask)
        gradients.append(torch.cat([p.grad.flatten() for p in learner.student.parameters()]))
    # bfloat16 rounds by up to 2^-9 = 0.2 %, at each of some ten products one behind the other, forth and back.
    assert 1e-4 < (gradients[0] - gradients[1]).norm() / gradients[0].norm() < 0.05


def test_a_loss_that_is_not_finite_names_student_and_step_and_changes_nothing(tmp_path):
    prepare(tmp_path)
    with pytest.raises(ValueError, match=r"loss of students\.\d-\d is (nan|inf) at step \d"):
        students.distil(with_changes(TINY, {"students.lr": 1e30}), tmp_path)
    assert not (tmp_path / "students.safetensors").exists()


def test_states_on_disk_are_those_of_the_teacher(tmp_path):
    model = prepare(tmp_path)
    batches = [calibration.inputs(TINY, 3, seed) for seed in range(3)]
    cache = stream_cache.StreamCache(tmp_path / "states", torch.float32)
    assert 0 not in cache and cache.fill(model, batches, 10**9) == 3
    for number, given in enumerate(batches):
        passed, context = streams.trace(model, given), cache.context(number)
        for block, stored in enumerate(passed.streams):
            assert all(torch.equal(a, b) for a, b in zip(cache.read(number, block), stored, strict=True))
        assert context.keys() == passed.context.keys() and torch.equal(context["temb"], passed.context["temb"])
        out = streams.run_block(model.transformer_blocks[2], cache.read(number, 2), context)
        assert torch.equal(out.image, passed.streams[3].image)

    def visit(interval, before, after, context):
        for mine, theirs in zip(
            [*before, *after], [*passed.streams[interval.first], *passed.streams[interval.last + 1]]
        ):
            assert torch.equal(mine, theirs)
        seen.append(interval)

    seen = []
    cache.walk_intervals(2, INTERVALS, visit, torch.device("cpu"))
    assert seen == list(INTERVALS)


def test_a_cache_keeps_to_its_budget_and_goes_on_where_it_was_stopped(tmp_path, monkeypatch):
    model = prepare(tmp_path)
    batches = [calibration.inputs(TINY, 3, seed) for seed in range(4)]
    cache = stream_cache.StreamCache(tmp_path / "states", torch.bfloat16)
    all_of_them = stream_cache.StreamCache(tmp_path / "all", torch.bfloat16)
    assert all_of_them.fill(model, batches, 10**9) == 4 and cache.fill(model, batches[:1], 10**9) == 1
    sizes = [all_of_them.bytes_of(number) for number in range(4)]
    budget, written = sizes[0] + sizes[1] + sizes[2] // 2, []
    monkeypatch.setattr(
        stream_cache, "write_tensors", lambda path, *rest: (written.append(path), write_tensors(path, *rest))
    )
    assert cache.fill(model, batches, budget) == 2
    assert {path.parent.name for path in written} == {"000001"}
    assert [cache.bytes_of(number) for number in range(4)] == [*sizes[:2], 0, 0]
    # A batch whose last file is missing is made again.
    written[-1].unlink()
    assert 1 not in cache and cache.fill(model, batches, budget) == 2 and 1 in cache
    rounded = streams.trace(model, batches[1]).streams[4]
    assert isinstance(cache.read(1, 4), Streams) and cache.read(1, 4).image.dtype == torch.bfloat16
    assert torch.equal(cache.read(1, 4).image, rounded.image.bfloat16())


def test_a_cache_that_holds_nothing_is_refused(tmp_path):
    prepare(tmp_path)
    with pytest.raises(ValueError, match="does not hold one batch"):
        students.distil(with_changes(TINY, {"students.cache_bytes": 1000}), tmp_path)
