"""Trust: whatever stops a run, what it leaves is whole, says what made it and what is next, and goes on as it was."""

import errno
import json
import math
import os
import resource
import shutil
import signal
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tiny import TINY
from torch import nn

from ppcl_train import pipeline
from ppcl_train.config.settings import RunConfig, with_changes
from ppcl_train.config.stages import LoopConfig
from ppcl_train.engine import files as runs
from ppcl_train.engine import lock, loop, provenance, saving
from ppcl_train.engine import log as logs

RUN = with_changes(TINY, {"save_every": 5, "tracker": "none"})
LOOP = LoopConfig(steps=20, lr=0.1, warmup=0)


def two_students() -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return {
        f"students.{key}.{name}": nn.Parameter(torch.randn(shape, generator=generator))
        for key in ("0-1", "2-3")
        for name, shape in (("weight", (3, 3)), ("bias", (3,)))
    }


def regression(parameters, scale=1.0, batch=8):
    """A step's losses by student: each fits its own map."""

    def step_loss(number: int) -> dict[str, float]:
        x = torch.randn(batch, 3, generator=torch.Generator().manual_seed(number))
        losses = {}
        for n, name in enumerate(("students.0-1", "students.2-3")):
            out = x @ parameters[f"{name}.weight"] + parameters[f"{name}.bias"]
            loss = scale * (out - (n + 1) * x).square().mean()
            loss.backward()
            losses[name] = loss.item()
        return losses

    step_loss.parameters = parameters
    return step_loss


def train(folder, config=LOOP, run=RUN, wrap=lambda step_loss: step_loss, scale=1.0, stage="students", batch=8):
    parameters = two_students()
    step_loss = wrap(regression(parameters, scale, batch))
    return loop.train_loop(run, config, logs.Log(folder, stage), parameters, step_loss)


class Stopped(Exception):
    pass


def stopping_at(step):
    def wrap(step_loss):
        def stops(number):
            if number == step:
                raise Stopped
            return step_loss(number)

        return stops

    return wrap


def newest_state(folder):
    return saving.newest(folder, "students")


def tensors_of(state):
    [file] = state.glob("*.safetensors")
    return runs.read_tensors(file)


def step_of(state):
    return runs.read_content(state / "note.json")["step"]


def same(mine, theirs) -> bool:
    return mine.keys() == theirs.keys() and all(torch.equal(tensor, theirs[name]) for name, tensor in mine.items())


@pytest.mark.parametrize(
    "changes",
    [{}, {"ema": 0.9}, {"accumulate": 2, "clip": 0.5}, {"precision": "bf16"}],
    ids=["plain", "ema", "accumulate", "bf16"],
)
def test_a_stopped_loop_goes_on_bit_for_bit(tmp_path, changes):
    config = LOOP.model_copy(update=changes)
    whole = train(tmp_path / "whole", config)
    for folder, stops in (("once", [18]), ("twice", [13, 18])):
        for step in stops:
            with pytest.raises(Stopped):
                train(tmp_path / folder, config, wrap=stopping_at(step * config.accumulate))
    states = [newest_state(tmp_path / name) for name in ("once", "twice")]
    # Averages, moments and running means too. (Notes in the headers of the files come in any order.)
    assert step_of(states[0]) == 15 and any("exp_avg" in name for name in tensors_of(states[0]))
    assert (
        same(*map(tensors_of, states))
        and (states[0] / "note.json").read_bytes() == (states[1] / "note.json").read_bytes()
    )
    for name in ("once", "twice"):
        assert same(train(tmp_path / name, config), whole)
    # One state, and nothing that is half written.
    assert [path.name for path in (tmp_path / "twice" / "students.state").iterdir()] == ["000000020"]


@pytest.mark.parametrize("ema", [0.0, 0.9])
def test_the_last_state_is_what_the_loop_returns(tmp_path, ema):
    config = LOOP.model_copy(update={"ema": ema})
    trained = train(tmp_path, config)
    kept = tensors_of(newest_state(tmp_path))
    assert same(kept, {f"{'average' if ema else 'model'}.{name}": tensor for name, tensor in trained.items()})
    # A kill before the stage has written its output: no step is run again.
    assert same(train(tmp_path, config, wrap=stopping_at(0)), trained)
    with pytest.raises(ValueError, match="is the state of another training"):
        train(tmp_path, config.model_copy(update={"steps": 30}))


def test_a_state_is_saved_when_its_time_has_come(tmp_path, monkeypatch):
    now = 0.0

    def tick(step_loss):
        def ticks(number):
            nonlocal now
            now += 10.0
            return step_loss(number)

        return ticks

    monkeypatch.setattr(saving.time, "monotonic", lambda: now)
    rare = with_changes(RUN, {"save_every": 500, "save_seconds": 30})
    with pytest.raises(Stopped):
        train(tmp_path, run=rare, wrap=lambda step_loss: tick(stopping_at(8)(step_loss)))
    assert step_of(newest_state(tmp_path)) == 6
    monkeypatch.undo()
    assert same(train(tmp_path, run=rare), train(tmp_path / "whole"))


def test_accumulated_batches_are_one_larger_batch(tmp_path):
    # Each number draws 8 samples, the larger batch the same 16 at once.
    def merged(step_loss):
        return lambda step: {k: v for n in (2 * step, 2 * step + 1) for k, v in step_loss(n).items()}

    halved = train(tmp_path / "a", LOOP, wrap=merged, scale=0.5)
    accumulated = train(tmp_path / "b", LOOP.model_copy(update={"accumulate": 2}))
    assert all(torch.allclose(halved[name], tensor, atol=1e-5) for name, tensor in accumulated.items())


def test_averages_are_what_is_returned_and_smooth_what_is_trained(tmp_path):
    averaging = LOOP.model_copy(update={"ema": 0.9})
    for name, config in (("a", LOOP), ("b", averaging)):
        with pytest.raises(Stopped):
            train(tmp_path / name, config, wrap=stopping_at(18))
    plain, held = (tensors_of(newest_state(tmp_path / name)) for name in ("a", "b"))
    trained = {name for name in plain if name.startswith("model.")}
    assert trained and all(torch.equal(held[name], plain[name]) for name in trained)
    last, averaged = train(tmp_path / "a"), train(tmp_path / "b", averaging)
    held = tensors_of(newest_state(tmp_path / "b"))
    assert same({name: held[f"average.{name}"] for name in last}, averaged) and not same(averaged, last)


def test_a_clipped_student_leaves_the_others_alone(tmp_path):
    clipped = LOOP.model_copy(update={"clip": 0.1})
    both = train(tmp_path / "both", clipped)

    def alone(step_loss):
        def first(number):
            losses = step_loss(number)
            for name, p in step_loss.parameters.items():
                if name.startswith("students.2-3"):
                    p.grad = None
            return {"students.0-1": losses["students.0-1"]}

        return first

    one = train(tmp_path / "one", clipped, wrap=alone)
    assert all(torch.equal(both[name], one[name]) for name in both if "0-1" in name)
    # Adam divides its own scale out, so the limit shows where it varies from step to step.
    assert not same(both, train(tmp_path / "free"))


def test_eight_bits_where_bitsandbytes_is_and_one_line_where_not(tmp_path, monkeypatch, capsys):
    config = LOOP.model_copy(update={"eight_bit": True})
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    assert same(train(tmp_path / "without", config), train(tmp_path / "plain"))
    assert capsys.readouterr().out.count("bitsandbytes is not installed") == 1

    class AdamW8bit(torch.optim.SGD):
        """Counts steps in a plain number, as bitsandbytes does."""

        def __init__(self, groups, lr, betas):
            super().__init__(groups, lr=lr, momentum=0.9)

        def step(self, closure=None):
            super().step(closure)
            for group in self.param_groups:
                for p in group["params"]:
                    assert type(self.state[p].get("step", 0)) is int
                    self.state[p]["step"] = self.state[p].get("step", 0) + 1

    fake = types.SimpleNamespace(optim=types.SimpleNamespace(AdamW8bit=AdamW8bit))
    monkeypatch.setitem(sys.modules, "bitsandbytes", fake)
    slow = config.model_copy(update={"lr": 0.01})
    whole = train(tmp_path / "whole", slow)
    with pytest.raises(Stopped):
        train(tmp_path / "stopped", slow, wrap=stopping_at(13))
    assert same(train(tmp_path / "stopped", slow), whole)


def test_curves_lie_in_the_run_folder(tmp_path):
    train(tmp_path, run=RUN.model_copy(update={"tracker": "tensorboard"}))
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "tracking" / "students"))
    events.Reload()
    assert {"loss", "lr", "loss/students.0-1", "loss/students.2-3"} <= set(events.Tags()["scalars"])
    logged = [event for event in logs.read_log(tmp_path) if "loss" in event][-1]
    assert events.Scalars("loss/students.2-3")[-1].value == pytest.approx(logged["losses"]["students.2-3"])


def test_a_tracker_that_is_not_installed_is_one_line(tmp_path, capsys):
    train(tmp_path, run=RUN.model_copy(update={"tracker": "dvclive"}))
    assert capsys.readouterr().out.count("dvclive is not installed") == 1


def test_a_terminal_sees_every_student(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("FORCE_COLOR", "1")
    train(tmp_path)
    shown = capsys.readouterr().out
    assert "students.0-1" in shown and "students.2-3" in shown and "20/20" in shown


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_names_step_and_student(tmp_path, value):
    def wrap(step_loss):
        return lambda number: {**step_loss(number), **({"students.2-3": value} if number == 12 else {})}

    with pytest.raises(ValueError, match=rf"students\.2-3 is {value} at step 12: .* holds the last good state"):
        train(tmp_path, wrap=wrap)
    assert step_of(newest_state(tmp_path)) == 10


def test_a_state_is_never_overwritten_by_one_that_is_not_finite(tmp_path):
    def wrap(step_loss):
        def breaks(number):
            losses = step_loss(number)
            if number == 14:
                # The loss of this step is fine; what it does to the weights is not.
                step_loss.parameters["students.2-3.bias"].grad.fill_(math.nan)
            return losses

        return breaks

    with pytest.raises(ValueError, match=r"students\.2-3\.bias is not finite at step 14"):
        train(tmp_path, wrap=wrap)
    state = newest_state(tmp_path)
    assert step_of(state) == 10 and all(tensor.isfinite().all() for tensor in tensors_of(state).values())


def test_divergence_stops_and_keeps_the_state_from_before(tmp_path):
    def wrap(step_loss):
        def explodes(number):
            losses = step_loss(number)
            return {**losses, "students.0-1": 1.0 if number < 100 else 1e6, "students.2-3": 1.0}

        return explodes

    config = LOOP.model_copy(update={"steps": 400})
    with pytest.raises(ValueError, match=r"students\.0-1 has been over 20 for 100 steps.* at step 200"):
        train(tmp_path, config, wrap=wrap)
    assert step_of(newest_state(tmp_path)) == 100
    # Through a stop in between it is the same step.
    with pytest.raises(Stopped):
        train(tmp_path / "b", config, wrap=lambda step_loss: wrap(stopping_at(150)(step_loss)))
    with pytest.raises(ValueError, match="at step 200"):
        train(tmp_path / "b", config, wrap=wrap)


def test_noise_and_a_hard_start_are_no_divergence(tmp_path):
    def wrap(step_loss):
        generator = torch.Generator().manual_seed(0)
        noise = torch.exp(2 * torch.randn(400, generator=generator)).tolist()

        def noisy(number):
            # Three orders of magnitude down, under noise that spans four.
            return {**step_loss(number), "students.0-1": noise[number] * 10 ** (-number / 130)}

        return noisy

    train(tmp_path, LOOP.model_copy(update={"steps": 400}), wrap=wrap)


@pytest.mark.parametrize("damage", ["cut", "emptied", "of another stage"])
def test_a_broken_state_names_the_file_to_delete(tmp_path, damage):
    with pytest.raises(Stopped):
        train(tmp_path, wrap=stopping_at(13))
    state = newest_state(tmp_path)
    [file] = state.glob("*.safetensors")
    if damage == "of another stage":
        save_file({"model.other": torch.zeros(2)}, file)
    else:
        os.truncate(file, file.stat().st_size // 2 if damage == "cut" else 0)
    with pytest.raises(ValueError, match=rf"^{state} .*delete it") as raised:
        train(tmp_path)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("content", ["tensors", "json"])
def test_a_full_disk_keeps_what_was_there_and_leaves_nothing_beside(tmp_path, content):
    def write(size: int) -> None:
        if content == "tensors":
            runs.write_tensors(tmp_path / "file", {"x": torch.full((size,), 1.0)}, {"size": size})
        else:
            runs.write_json(tmp_path / "file", {"x": [1.0] * size})

    write(10)
    before = (tmp_path / "file").read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    # The system itself ends the write half way, as it does on a full disk.
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(ValueError, match=r"file cannot be written: .*; what was there before is kept") as raised:
            write(1_000_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert "\n" not in str(raised.value)
    assert (tmp_path / "file").read_bytes() == before and [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.fixture(scope="module")
def half_way(tmp_path_factory):
    """A run of the first stage alone, done."""
    folder = tmp_path_factory.mktemp("run")
    pipeline.begin(TINY, folder)
    pipeline.run_stages(TINY, folder, last=pipeline.STAGES[0].name)
    return folder


@pytest.fixture
def begun(half_way, tmp_path):
    """A copy of it."""
    return shutil.copytree(half_way, tmp_path / "run")


def test_a_full_disk_ends_a_stage_in_one_line(begun, ppcl, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    # Wherever it hits, also where nobody thought of it.
    monkeypatch.setattr(torch.nn.Module, "state_dict", full)
    monkeypatch.setattr(torch.nn.Module, "load_state_dict", full)
    status, _, err = ppcl("train", "run", "--out", begun)
    assert status == 2 and err.count("\n") == 1 and "No space left" in err
    assert pipeline.STAGES[1].name in err


@pytest.mark.parametrize("name", ["teacher.safetensors", "config.json"])
def test_cut_files_of_a_run_are_one_line(begun, ppcl, name):
    os.truncate(begun / name, (begun / name).stat().st_size // 2)
    status, _, err = ppcl("train", "run", "--out", begun)
    assert status == 2 and err.count("\n") == 1 and name in err
    assert not list(begun.glob(".*.partial")) and not pipeline.is_done(pipeline.STAGES[1], begun)


def test_outputs_say_what_made_them(begun):
    with safe_open(begun / "teacher.safetensors", "pt") as file:
        made = json.loads(file.metadata()["note"])[provenance.MADE_BY]
    assert made["stage"] == "teacher" and RunConfig.model_validate(made["config"]) == TINY and made["seed"] == TINY.seed
    assert made["versions"]["torch"] == torch.__version__ and {"python", "diffusers", "ppcl-rt"} <= set(
        made["versions"]
    )
    root = Path(__file__).parents[3]
    if (root / ".git").exists():
        commit = subprocess.run(["git", "-C", root, "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
        assert made["commit"].removesuffix("-dirty") == commit
    with provenance.making(TINY, "some"):
        runs.write_json(begun / "x.json", {"a": 1})
    assert json.loads((begun / "x.json").read_text())[provenance.MADE_BY]["stage"] == "some"
    assert runs.read_content(begun / "x.json") == {"a": 1}
    # What is written outside a stage says nothing.
    runs.write_json(begun / "y.json", {"a": 1})
    assert json.loads((begun / "y.json").read_text()) == {"a": 1}


def test_status_says_what_is_done_begun_and_next(begun, ppcl, monkeypatch):
    second, third = pipeline.STAGES[1], pipeline.STAGES[2]

    def statuses():
        return {stage.stage: (stage.state, stage.step, stage.of) for stage in pipeline.progress(begun)}

    assert statuses()["teacher"][0] == "done" and statuses()[second.name] == ("waiting", 0, 0)
    seen = {}

    def stage(run, folder):
        seen["before"] = statuses()[second.name]
        for name, step, of in ((second.name, 4, 8), (f"{second.name}.part", 0, 2)):
            runs.write_json(saving.state_folder(folder, name) / "000000004" / "note.json", {"step": step, "of": of})
        seen["later"] = statuses()[second.name]
        raise ValueError("stopped")

    stages = tuple(s._replace(run=stage) if s is second else s for s in pipeline.STAGES)
    monkeypatch.setattr(pipeline, "STAGES", stages)
    with pytest.raises(ValueError, match="stopped"):
        pipeline.run_stages(TINY, begun)
    assert seen == {"before": ("running", 0, 0), "later": ("running", 4, 10)}
    assert statuses()[second.name] == ("begun", 4, 10) and statuses()[third.name] == ("waiting", 0, 0)
    status, out, _ = ppcl("train", "status", "--out", begun)
    assert status == 0 and "begun, 4 of 10 steps saved" in out and f"next: {second.name}" in out
    status, out, _ = ppcl("train", "status", "--out", begun, "--json")
    assert status == 0 and json.loads(out)["next"] == second.name
    assert json.loads(out)["stages"][1]["state"] == "begun"


def test_a_second_process_is_refused_and_a_dead_one_is_not_in_the_way(begun, ppcl):
    held, holding = os.pipe()
    holder = os.fork()
    if not holder:
        try:
            with lock.locked(begun):
                os.write(holding, b"held")
                signal.pause()
        finally:
            os._exit(1)
    try:
        assert os.read(held, 4) == b"held"
        assert lock.in_use(begun)
        for command in ("run", pipeline.STAGES[1].name):
            status, _, err = ppcl("train", command, "--out", begun)
            assert status == 2 and f"written by process {holder}" in err and err.count("\n") == 1
    finally:
        os.kill(holder, signal.SIGKILL)
        os.waitpid(holder, 0)
    assert (begun / ".lock").exists() and not lock.in_use(begun)
    with lock.locked(begun):
        assert lock.in_use(begun)


def test_a_cut_line_of_the_log_spoils_no_other(tmp_path):
    log = logs.Log(tmp_path, "teacher")
    log(a=1)
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write('{"stage": "teac')
    logs.Log(tmp_path, "teacher")(b=2)
    assert [event.get("a") or event.get("b") for event in logs.read_log(tmp_path)] == [1, 2]


@pytest.mark.parametrize("kills", [1, pytest.param(12, marks=pytest.mark.slow)])
def test_kills_leave_the_bytes_of_a_run_that_nothing_disturbed(kills):
    # `make kill` does it fifty times.
    script = Path(__file__).parents[2] / "kill.py"
    # Models too small for two threads, which would only wait for each other.
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, script, "--kills", str(kills)], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr[-2000:]
