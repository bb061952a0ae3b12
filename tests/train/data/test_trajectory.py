"""What a teacher's own sampler reaches: the states, the batches made of them, and a whole run on them."""

import shutil
from itertools import pairwise

import pytest
import torch
from tiny import ARCHITECTURE, TINY
from torch import nn

import ppcl_rt
from ppcl_train import cli, pipeline
from ppcl_train.config.settings import with_changes
from ppcl_train.data import calibration
from ppcl_train.data.source import source
from ppcl_train.data.trajectory import reached
from ppcl_train.losses.velocity_error import Target, VelocityError
from ppcl_train.scenes.encoding import encode
from ppcl_train.scenes.language import Caption
from ppcl_train.scenes.sampling import Sampler, arguments
from ppcl_train.stages import teacher

FEW = with_changes(TINY, {"data.trajectory": True, "sampler": {"steps": 4, "shift": 2.0}, "batch": 8})
TIMES = FEW.sampler.times()
# Two blocks and few choices: for whole runs.
SHORT = {
    "teacher.architecture": {**ARCHITECTURE, "num_layers": 2},
    "table.lengths": [2],
    "width.longest_text_run": 1,
    "width.ranks": [2],
    "refine.steps": 0,
}


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    made = teacher.initial(TINY).eval().requires_grad_(False)
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.2)
    return made


def test_a_walk_takes_the_samplers_steps_and_a_part_of_the_one_that_crosses():
    """With ``x_0`` always 0, a step from t to t' scales the state by t' / t: at t it is t times the noise."""
    asked = []

    def nothing(x, now, numbers):
        asked.append((round(float(now[0]), 4), numbers.tolist()))
        return torch.zeros_like(x)

    noise, t = torch.randn(4, 2, 3, 5), torch.tensor([1.0, TIMES[2], 0.5, 0.1])
    assert torch.allclose(reached(nothing, TIMES, noise, t), t.view(-1, 1, 1, 1) * noise, atol=1e-6)
    # t = 0.5 lies in the third step, from 0.6667 to 0.4; t = 0.1 in the last. A sample that is there is asked no more.
    assert asked == [(1.0, [1, 2, 3]), (0.8571, [1, 2, 3]), (0.6667, [2, 3]), (0.4, [3])]


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_states_are_those_of_the_sampler_itself(model, guidance):
    """Its last step from a state ends in the picture that it draws from the same noise under the same prompt."""
    run = with_changes(FEW, {"sampler.guidance": guidance, "teacher.drop_caption": 0.0})
    seed = calibration.CHECK + 5
    batch, drawn = calibration.inputs(run, 8, seed, teacher=model), calibration.draw(run, 8, seed)
    made, (embeddings, mask) = drawn.samples, encode([""] * 8)
    for n in range(8):
        x = drawn.noise[n : n + 1]
        for now, then in pairwise(TIMES):
            if torch.tensor(now) <= batch.t[n]:
                break
            each = [(made.embeddings[n : n + 1], made.mask[n : n + 1]), (embeddings[:1], mask[:1])]
            wanted, free = (model(**arguments(x, torch.tensor([now]), *text))[0] for text in each)
            x = x + (then - now) * (x - (free + guidance * (wanted - free))) / now
        assert torch.allclose(batch.x[n], x[0], atol=1e-4 * float(x.abs().max())), n
    # A process makes its share of them.
    share = calibration.inputs(run, 8, seed, share=slice(2, 5), teacher=model)
    assert torch.allclose(share.x, batch.x[2:5], atol=1e-5) and torch.equal(share.t, batch.t[2:5])
    prompts = ["a red square at b2", "two green circles"]
    embeddings, mask = encode(prompts)
    few, start = Sampler(steps=4, shift=2.0), torch.randn(2, 16, 48)

    def clean(x, now, numbers):
        return model(**arguments(x, now, embeddings[numbers], mask[numbers]))[0]

    last = reached(clean, TIMES, start, torch.full((2,), TIMES[3]))
    drawn = few.sample(model, [str(Caption.parse(prompt)) for prompt in prompts], start)
    assert torch.allclose(clean(last, torch.full((2,), TIMES[3]), torch.arange(2)).clip(-1, 1), drawn, atol=1e-4)


def test_batches_lie_on_the_grid_and_seeds_decide_them(model):
    batches = [calibration.inputs(FEW, 8, calibration.CHECK + seed, teacher=model) for seed in range(20)]
    counts = torch.cat([batch.t for batch in batches]).unique(return_counts=True)
    assert counts[0].tolist() == pytest.approx(sorted(TIMES[:-1])) and counts[1].min() > 20
    again = calibration.inputs(FEW, 8, calibration.CHECK + 3, teacher=model)
    assert torch.equal(again.x, batches[3].x) and not torch.equal(again.x, batches[4].x)
    assert again.data is None and again.part(slice(2, 5)).data is None
    # The states are the teacher's, whatever plan its model runs at the time.
    catalog = model.catalog
    with model.at(plan=catalog.compose([(0, catalog.spec(0).full)])):
        assert torch.equal(calibration.inputs(FEW, 8, calibration.CHECK + 3, teacher=model).x, again.x)
    measured = list(calibration.measured(FEW, 12, calibration.CHECK, teacher=model))
    assert torch.cat([batch.t for batch in measured]).unique().tolist() == pytest.approx(sorted(TIMES[:-1]))
    assert not VelocityError(model, FEW).of(catalog.dense)[0]


def test_a_batch_of_data_holds_the_data_and_is_compared_with_them(model):
    batch = calibration.inputs(TINY, 6, calibration.CHECK + 5)
    assert torch.equal(batch.data, source(TINY).samples(6, calibration.CHECK + 5).latents)
    part = batch.part(slice(2, 5))
    assert torch.equal(part.data, batch.data[2:5])
    target = Target.of(part, torch.zeros_like(part.x))
    # The family predicts x_0: the data themselves have no error, whatever the teacher says.
    assert not target.data_error(part.data).any() and target.squared_error(part.data).any()
    assert torch.allclose(target.data_error(torch.zeros_like(part.x)), part.data.square())


def test_flow_matching_pulls_recovery_towards_the_data(tmp_path):
    """The first step's loss is that against the teacher plus the weight times that against the data."""
    losses = []
    for weight in (0.0, 0.5, 1.0):
        run = with_changes(TINY, {**SHORT, "recover.flow_matching": weight, "recover.steps": 1})
        folder = tmp_path / str(weight)
        pipeline.begin(run, folder)
        # All but the last stage once.
        for path in (tmp_path / "0.0").iterdir() if losses else ():
            if path.name not in (pipeline.CONFIG, "log.jsonl", "recovered.safetensors", "lock"):
                copied = shutil.copytree if path.is_dir() else shutil.copy
                copied(path, folder / path.name)
        pipeline.run_stages(run, folder, last="recover")
        [step] = [e for e in pipeline.read_log(folder) if e["stage"] == "recover" and "step" in e and "loss" in e]
        losses.append(step["loss"])
    # The log rounds.
    assert losses[1] - losses[0] > 0.01 and losses[2] - losses[0] == pytest.approx(
        2 * (losses[1] - losses[0]), rel=1e-2
    )


def test_a_trajectory_has_no_data_to_match():
    with pytest.raises(ValueError, match=r"recover\.flow_matching compares with data, and a trajectory"):
        with_changes(FEW, {"recover.flow_matching": 1.0})


def test_sampler_steps_are_short_for_two_settings(tmp_path):
    run = cli._begin("scenes", tmp_path / "a", None, None, sampler_steps=4)
    assert run.sampler.steps == 4 and run.data.trajectory
    assert cli._begin("scenes", tmp_path / "a", None, None) == run


@pytest.mark.slow
def test_a_run_on_a_trajectory_makes_a_checkpoint(tmp_path):
    run = with_changes(FEW, SHORT)
    pipeline.begin(run, tmp_path)
    pipeline.run_stages(run, tmp_path)
    model = ppcl_rt.load(tmp_path / "checkpoint", 0.7, dtype=torch.float32)
    assert model.catalog.task["sampler"]["steps"] == 4 and model.catalog.ratio(model.plan) <= 0.7
