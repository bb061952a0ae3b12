"""Baselines: each makes a model no larger than asked, in the steps that all have, and results outlive a kill."""

import itertools
import json

import numpy as np
import pytest
import torch

from ppcl_rt import Interval
from ppcl_train import pipeline
from ppcl_train.compare import harness as compare
from ppcl_train.compare import training, whole_blocks, width_alone
from ppcl_train.compare.entry import Entry, UnreachableError
from ppcl_train.compare.harness import Key, Result
from ppcl_train.compare.methods import METHODS
from ppcl_train.config.presets import PRESETS
from ppcl_train.config.settings import with_changes
from ppcl_train.data import calibration, streams
from ppcl_train.data.seeds import Stage
from ppcl_train.data.teacher_file import check_teacher, extract_teacher
from ppcl_train.engine.files import read_tensors, write_tensors
from ppcl_train.selectors.gates import Gates, gated
from ppcl_train.selectors.uniform import uniform_intervals
from ppcl_train.stages import teacher

ARCHITECTURE = {**PRESETS["scenes"].teacher.architecture, "num_layers": 4, "num_attention_heads": 2}
TINY = with_changes(
    PRESETS["scenes"],
    {
        "teacher.architecture": ARCHITECTURE,
        "probes.samples": 48,
        "probes.cka_samples": 16,
        "probes.steps": 1,
        "table.steps": 2,
        "table.trial_steps": 1,
        "table.batches": 2,
        "table.batch": 4,
        "table.samples": 8,
        "table.lengths": [2, 3],
        "students.steps": 3,
        "students.batch": 4,
        "recover.steps": 3,
        "recover.kept_steps": 2,
        "refine.kept_steps": 2,
        "recover.batch": 4,
        "width.heads": [0.5],
        "width.channels": [0.5],
        "width.samples": 48,
        "measure.samples": 8,
        "measure.spacing": 0.25,
        "measure.other_spacing": 0.5,
        "batch": 16,
        "save_every": 2,
        "tracker": "none",
        "sampler.steps": 2,
        "compare.ratios": [0.6],
        "compare.steps": 8,
        "compare.batch": 4,
        "compare.prompts": 10,
        "compare.seeds": 2,
    },
)


def random_teacher(std=0.2):
    model = teacher.initial(TINY).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(std * torch.randn(parameter.shape, generator=generator))
    return model


@pytest.fixture(scope="module")
def teacher_file(tmp_path_factory):
    file = tmp_path_factory.mktemp("teacher") / "teacher.safetensors"
    write_tensors(file, dict(random_teacher().named_parameters()), {})
    return file


@pytest.fixture(scope="module")
def entry_of(teacher_file, tmp_path_factory):
    """An entry of a method at a ratio; what a seed's entries share is shared by all tests."""
    folder = tmp_path_factory.mktemp("entries")

    def entry(name, ratio=0.6, run=TINY):
        return Entry(run, folder / name, folder / "shared", teacher_file, ratio)

    return entry


@pytest.mark.parametrize("name", [name for name in METHODS if name != "ours"])
def test_a_method_makes_a_model_of_at_most_the_ratio_in_equal_steps(name, entry_of, monkeypatch):
    entry = entry_of(name)
    if name in ("eq5", "eq5-literal", "sequential"):
        # The reference's probes and students are shared: they are counted by themselves, below.
        whole_blocks._eq5_students(entry, "eq5-literal" if name == "eq5-literal" else "eq5")
    asked = []
    inputs = calibration.inputs

    def counted(run, size, seed, **more):
        # Calibration batches take no gradient.
        if seed.stage in (Stage.STUDENTS, Stage.RECOVER):
            asked.append(size)
        return inputs(run, size, seed, **more)

    monkeypatch.setattr(calibration, "inputs", counted)
    model = METHODS[name](entry)
    taken = {"drop": TINY.compare.steps, "sequential": TINY.probes.steps}
    taken |= dict.fromkeys(("eq5", "eq5-literal"), TINY.compare.distil_steps)
    steps = TINY.compare.steps - taken.get(name, 0)
    assert sum(asked) == steps * TINY.compare.batch and set(asked) <= {TINY.compare.batch}
    share = model.catalog.ratio(model.plan)
    assert share <= 0.6 + TINY.compare.slack
    # Nothing is left out for no reason: a block more would be too many. Eq. 5 finds what intervals it finds.
    assert share > 0.6 - 1 / 4 or name in ("eq5", "eq5-literal", "sequential")
    # What is counted is what is there: whole blocks that were left out are gone.
    if name not in ("magnitude", "random"):
        assert model.catalog.architecture.params(model.plan) == sum(p.numel() for p in model.parameters())
    assert torch.isfinite(model(**inputs(TINY, 3, calibration.CHECK + 5).call)[0]).all()


def test_the_reference_distils_for_the_stated_steps(entry_of, monkeypatch, tmp_path, teacher_file):
    asked = []
    inputs = calibration.inputs

    def counted(run, size, seed, **more):
        asked.append((seed, size))
        return inputs(run, size, seed, **more)

    entry = Entry(TINY, tmp_path / "a", tmp_path / "shared", teacher_file, 0.9)
    with monkeypatch.context() as patch:
        patch.setattr(calibration, "inputs", counted)
        first = whole_blocks._eq5_students(entry)
    trains = (Stage.PROBES, Stage.TUNE_PROBES, Stage.STUDENTS, Stage.RECOVER)
    # Batches of exactly the size that is trained with; calibration takes larger ones.
    trained = [seed for seed, size in asked if size == TINY.compare.batch and seed.stage in trains]
    assert len(trained) == TINY.compare.distil_steps and len(set(trained)) == len(trained)
    monkeypatch.setattr(pipeline.students, "distil", None)
    # Once a seed, as the paper has it.
    assert (
        whole_blocks._eq5_students(Entry(TINY, tmp_path / "b", tmp_path / "shared", teacher_file, 0.9)).keys()
        == first.keys()
    )
    config = json.loads((tmp_path / "shared" / "eq5" / "config.json").read_text())
    assert config["select"] == "eq5" and config["students"]["steps"] == 1


@pytest.mark.parametrize("muon_lr", [0.0, 0.002])
def test_training_brings_the_prediction_nearer_to_the_teachers(entry_of, muon_lr):
    run = with_changes(TINY, {"compare.steps": 30, "compare.muon_lr": muon_lr, "save_every": 100})
    stock = entry_of("stock")
    losses = [
        training.calibration_loss(stock, METHODS[name](entry_of(f"near-{name}-{muon_lr}", run=run)), stock.teacher())
        for name in ("drop", "drop+train")
    ]
    assert losses[1] < 0.9 * losses[0]


@pytest.mark.slow
def test_ours_runs_the_pipeline_with_the_steps_of_all(entry_of):
    model = METHODS["ours"](entry_of("ours"))
    assert model.catalog.ratio(model.plan) <= 0.6
    config = json.loads((entry_of("ours").shared / "ours" / "config.json").read_text())
    # Whatever the run trains at all is trained here too, however few the steps and however long the longest stage.
    stages = [config[name]["steps"] for name in ("students", "recover", "refine")]
    stages += [config[name]["kept_steps"] for name in ("recover", "refine")]
    assert min(stages) > 0 and sum(stages) + config["table"]["steps"] == TINY.compare.steps
    # The smallest is a model too; smaller there is none.
    with pytest.raises(UnreachableError):
        METHODS["ours"](entry_of("ours", ratio=0.05))


def test_sequential_students_read_the_students_before_them(entry_of, monkeypatch):
    entry = entry_of("sequence", run=with_changes(TINY, {"compare.steps": 4, "compare.distil": 0.5}))
    stock = entry.teacher().transformer_blocks[0]
    intervals = (Interval(0, 1), Interval(3, 3))
    monkeypatch.setattr(whole_blocks, "_eq5_students", lambda entry: {i: stock.state_dict() for i in intervals})
    monkeypatch.setattr(whole_blocks, "train_end_to_end", lambda entry, model, steps: model)
    calls = []
    run_block = streams.run_block

    def recorded(block, state, context):
        calls.append((state, run_block(block, state, context)))
        return calls[-1][1]

    monkeypatch.setattr(streams, "run_block", recorded)
    model = METHODS["sequential"](entry)
    # A student, the block between that is kept, a student: each reads what came out before.
    assert len(calls) == 3
    for (_, out), (given, _) in itertools.pairwise(calls):
        assert torch.equal(out.image, given.image) and not given.image.requires_grad
    assert model.plan.skipped == (1,) and calls[0][1].image.requires_grad


def test_gates_learn_to_keep_the_block_that_matters(entry_of):
    entry = entry_of("gates-toy", run=with_changes(TINY, {"compare.steps": 40, "compare.distil": 0.5}))
    model = random_teacher()
    with torch.no_grad():
        # With modulations of zero a block does nothing: block 2 alone changes its streams.
        for n in (0, 1, 3):
            for modulation in (model.transformer_blocks[n].img_mod, model.transformer_blocks[n].txt_mod):
                modulation[1].weight.zero_()
                modulation[1].bias.zero_()
    write_tensors(entry.folder.parent / "toy.safetensors", dict(model.named_parameters()), {})
    entry = Entry(entry.run, entry.folder, entry.shared, entry.folder.parent / "toy.safetensors", entry.ratio)
    assert whole_blocks.learnt_blocks(entry, entry.teacher(), kept=1) == [2]


def test_gates_draw_as_many_as_are_kept_and_pass_gradients():
    gates = Gates(depth=12, kept=8, groups=3)
    rng = np.random.default_rng(0)
    drawn = [gates.draw(1.0, rng) for _ in range(50)]
    for mask in drawn:
        assert mask.sum().item() == pytest.approx(8) and all(min(abs(m), abs(m - 1)) < 1e-5 for m in mask.tolist())
    assert len({tuple(mask.round().tolist()) for mask in drawn}) > 10
    (drawn[0] * torch.arange(12.0)).sum().backward()
    assert all(logits.grad.abs().max() > 0 for logits in gates.logits)
    with torch.no_grad():
        # The last way of each group: its last blocks.
        for logits in gates.logits:
            logits[-1] = 5
    assert gates.likeliest() == [1, 2, 3, 6, 7, 9, 10, 11]


def test_gates_change_streams_by_their_share():
    blocks, given = random_teacher(), calibration.inputs(TINY, 3, calibration.CHECK + 5)
    passed = streams.trace(blocks, given)
    block = blocks.transformer_blocks[1]
    with torch.no_grad(), gated([block], torch.tensor([0.25])):
        out = streams.run_block(block, passed.streams[1], passed.context)
    for mixed, before, after in zip(out, passed.streams[1], passed.streams[2]):
        assert torch.allclose(mixed, 0.75 * before + 0.25 * after, atol=1e-5)
    assert not block._forward_hooks


def test_magnitude_keeps_the_largest_units(entry_of, monkeypatch):
    monkeypatch.setattr(width_alone, "train_end_to_end", lambda entry, model, steps: model)
    entry = entry_of("magnitude-order")
    stock, cut = entry.teacher().transformer_blocks[0], METHODS["magnitude"](entry)
    width = cut.plan.blocks[0].width

    def size(block):
        return block.img_mlp.net[0].proj.weight.square().sum(1) + block.img_mlp.net[2].weight.square().sum(0)

    sizes = size(stock) + stock.img_mlp.net[0].proj.bias.square()
    mine = cut.transformer_blocks[0]
    kept = size(mine) + mine.img_mlp.net[0].proj.bias.square()
    assert torch.allclose(kept[: width["image"]], sizes.sort(descending=True).values[: width["image"]])
    # The order alone changes nothing: at full width it is the teacher.
    cut.set_plan(cut.catalog.dense)
    call = calibration.inputs(TINY, 3, calibration.CHECK + 5).call
    assert torch.allclose(cut(**call)[0], entry.teacher()(**call)[0], atol=1e-4)


def test_widths_fill_the_ratio_and_no_more():
    architecture = random_teacher().catalog.architecture
    spec = architecture.spec(0)
    for ratio in (0.95, 0.8, 0.6):
        width = width_alone.width_within(architecture, ratio)
        params = architecture.outer_params + architecture.depth * spec.params(width)
        more = architecture.depth * spec.params(width.replace(image=width["image"] + 1, text=width["text"] + 1))
        assert params <= ratio * architecture.dense_params < architecture.outer_params + more
    with pytest.raises(UnreachableError):
        width_alone.width_within(architecture, 0.2)


def test_equal_intervals_cover_all_blocks():
    assert uniform_intervals(12, 5) == [Interval(*ends) for ends in ((0, 1), (2, 4), (5, 6), (7, 9), (10, 11))]
    for depth in range(2, 20):
        for count in range(1, depth + 1):
            lengths = [len(interval) for interval in uniform_intervals(depth, count)]
            assert sum(lengths) == depth and max(lengths) - min(lengths) <= 1


def test_a_model_that_cannot_be_is_said_to_be_none(entry_of, monkeypatch):
    with pytest.raises(UnreachableError, match="no whole block"):
        METHODS["drop"](entry_of("drop-small", ratio=0.1))
    monkeypatch.setattr(whole_blocks, "_distilled", lambda folder, run: {})
    with pytest.raises(UnreachableError, match="more than 2 blocks"):
        METHODS["eq5"](entry_of("eq5-small"))


@pytest.mark.slow
def test_a_comparison_goes_on_where_it_was_killed(teacher_file, tmp_path, monkeypatch):
    methods = ("eq5", "drop", "random")
    whole = compare.compare(TINY, tmp_path / "whole", teacher_file, methods)
    assert [(row.method, len(row.soft)) for row in whole] == [("teacher", 1), ("eq5", 2), ("drop", 1), ("random", 1)]
    assert (whole[0].share, whole[0].flops) == (1, 1)
    assert all(0.1 < kept <= 0.6 + TINY.compare.slack for row in whole[2:] for kept in (row.share, row.flops))
    count = 0
    step = torch.optim.AdamW.step

    def killed(self, *args, **kwargs):
        nonlocal count
        count += 1
        if count % 7 == 0:
            raise KeyboardInterrupt
        return step(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", killed)
        for _ in range(50):
            try:
                again = compare.compare(TINY, tmp_path / "killed", teacher_file, methods)
                break
            except KeyboardInterrupt:
                continue
    assert count > 7
    assert [row.model_copy(update={"seconds": ()}) for row in again] == [
        row.model_copy(update={"seconds": ()}) for row in whole
    ]
    # All is done: nothing is made again, and a method more is added to what is there.
    with monkeypatch.context() as patch:
        patch.setitem(METHODS, "eq5", None)
        assert compare.compare(TINY, tmp_path / "whole", teacher_file, methods) == whole
    results = json.loads((tmp_path / "whole" / "results.json").read_text())
    assert results["made_by"]["config"]["compare"]["steps"] == 8 and "torch" in results["made_by"]["versions"]
    assert (tmp_path / "whole" / "results.png").read_bytes().startswith(b"\x89PNG")
    assert not list((tmp_path / "whole" / "entries").iterdir())
    with pytest.raises(ValueError, match=r"compare\.steps = 8"):
        compare.compare(with_changes(TINY, {"compare.steps": 9}), tmp_path / "whole", teacher_file, methods)


def test_differences_are_of_the_same_prompts():
    rng = np.random.default_rng(3)
    # Prompts differ much, methods little: unpaired intervals overlap, paired ones do not.
    worse = np.clip(rng.random(400), 0.05, 1)
    scores = {("ours", 0): worse, ("ours", 1): worse, ("drop", 0): worse - 0.05}
    rows = compare.summarise(
        [
            Result(key=Key(method, 0.5, seed), params=1, share=0.5, scores=tuple(values))
            for (method, seed), values in scores.items()
        ]
    )
    ours, drop = rows
    assert (ours.method, ours.less, len(ours.soft)) == ("ours", None, 2)
    assert drop.less.soft.mean == pytest.approx(0.05) and drop.less.soft.high - drop.less.soft.low < 1e-9
    assert drop.quality.soft.high > ours.quality.soft.low
    assert drop.quality.soft.low < worse.mean() - 0.05 < drop.quality.soft.high
    # The interval of a mean: about 1.96 standard errors each way.
    half = (drop.quality.soft.high - drop.quality.soft.low) / 2
    assert half == pytest.approx(1.96 * worse.std() / 20, rel=0.1)


def test_seeds_that_disagree_widen_the_interval():
    prompts = np.full(100, 0.5)
    rows = compare.summarise(
        [
            Result(key=Key("ours", 0.5, seed), share=0.5, scores=tuple(prompts + shift))
            for seed, shift in enumerate((-0.2, 0, 0.2))
        ]
    )
    assert rows[0].quality.soft.low < 0.4 and rows[0].quality.soft.high > 0.6


def test_settings_of_a_comparison_are_checked(teacher_file, tmp_path):
    with pytest.raises(ValueError, match="no method"):
        compare.compare(TINY, tmp_path, teacher_file, ("best",))
    with pytest.raises(ValueError, match="no device"):
        compare.compare(TINY, tmp_path, teacher_file, ("drop",), device="abacus")
    with pytest.raises(ValueError, match="multiple"):
        compare.compare(with_changes(TINY, {"compare.prompts": 7}), tmp_path, teacher_file)
    with pytest.raises(ValueError):
        with_changes(TINY, {"compare.ratios": [0.5, 0.5]})


def test_a_teacher_is_read_out_of_a_checkpoint(teacher_file, tmp_path):
    given = read_tensors(teacher_file)
    extra = {"students.0-1.attn.to_q.weight": torch.zeros(2), "transformer_blocks.0.order.heads": torch.zeros(2)}
    write_tensors(tmp_path / "diffusion_pytorch_model.safetensors", {n: t.half() for n, t in given.items()} | extra, {})
    extract_teacher(TINY, tmp_path, tmp_path / "out" / "teacher.safetensors")
    check_teacher(TINY, tmp_path / "out" / "teacher.safetensors")
    found = read_tensors(tmp_path / "out" / "teacher.safetensors")
    assert all(torch.equal(tensor, given[name].half().float()) for name, tensor in found.items())
    with pytest.raises(ValueError, match="lacks"):
        extract_teacher(TINY, tmp_path / "nowhere", tmp_path / "b.safetensors")
