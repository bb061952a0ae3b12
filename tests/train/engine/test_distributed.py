"""Several processes train what one does: samples shared, students shared, the teacher sharded."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from torch import nn

from ppcl_rt import Interval
from ppcl_train import pipeline
from ppcl_train.config.presets import PRESETS
from ppcl_train.config.settings import with_changes
from ppcl_train.data.teacher_file import load_teacher
from ppcl_train.engine.distributed import ALONE, World, owners
from ppcl_train.engine.files import read_tensors, write_tensors
from ppcl_train.selectors import selection
from ppcl_train.stages import students, teacher

TINY = with_changes(
    PRESETS["scenes"],
    {
        "teacher.architecture": {**PRESETS["scenes"].teacher.architecture, "num_layers": 4, "num_attention_heads": 2},
        "teacher.compile": False,
        "students.steps": 6,
        "students.warmup": 0,
        # Not a multiple of two: shares are uneven.
        "students.batch": 5,
        "batch": 16,
        "save_every": 2,
    },
)
# Overlapping, nested and of one start; an odd number.
INTERVALS = (Interval(0, 1), Interval(0, 2), Interval(1, 3))


def prepare(folder):
    """A run folder with a teacher of random weights and a selection."""
    model = teacher.initial(TINY)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    write_tensors(folder / "teacher.safetensors", dict(model.named_parameters()), {})
    selection.write(folder, [selection.Selected(interval, "last") for interval in INTERVALS])
    return folder


# Two processes of a world run this over cases [folder, config, the step that it is interrupted at or null]. They are
# forked, as `torch.distributed.run` would start them but for the seconds in which each imports torch.
WORKER = """
import json, os, socket, sys, torch
from pathlib import Path
from ppcl_train.data import calibration
from ppcl_train.config.settings import RunConfig
from ppcl_train.engine import distributed
from ppcl_train.stages import students

class Killed(BaseException): pass

torch.set_num_threads(1)
with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    port = free.getsockname()[1]
os.environ |= {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
other = os.fork()
rank = "0" if other else "1"
os.environ |= {"RANK": rank, "LOCAL_RANK": rank}
world, inputs = distributed.join(), calibration.inputs
for name, config, killed_at in json.loads(sys.argv[1]):
    def given(run, size, seed, **more):
        if seed == calibration.STUDENTS + killed_at:
            raise Killed
        return inputs(run, size, seed, **more)
    folder = Path(name)
    if killed_at is not None:
        calibration.inputs = given
        try:
            students.distil(RunConfig.model_validate(config), folder)
        except Killed:
            world.wait()
            assert not (folder / "students.safetensors").exists()
        calibration.inputs = inputs
    students.distil(RunConfig.model_validate(config), folder)
    world.wait()
# What is tested is over. As the interpreter is taken down gloo's threads abort now and then (2 of 7 runs seen).
torch.distributed.destroy_process_group()
sys.stderr.flush()
os._exit(os.waitpid(other, 0)[1] != 0 if other else 0)
"""

DATA, INTERVALS_APART = {"students.parallel": "data"}, {"students.parallel": "intervals"}
# Three of the six batches fit, or half of each into the half of each of two processes.
SHARDED, CACHED = {"students.shard_teacher": True}, {"students.cache_bytes": 155_000}
ACCUMULATED = {"students.accumulate": 2, "students.clip": 0.5, "students.ema": 0.5}
# What several processes train: changed settings, and the step at which they are interrupted, to begin again.
CASES = {
    "data": (DATA, None),
    "data, sharded, killed": (DATA | SHARDED, 5),
    "data, cached, killed": (DATA | CACHED, 2),
    "data, accumulated": (DATA | ACCUMULATED, None),
    "intervals": (INTERVALS_APART, None),
    "intervals, sharded, killed": (INTERVALS_APART | SHARDED, 5),
    "intervals, accumulated, killed": (INTERVALS_APART | ACCUMULATED, 9),
    "intervals, cached, sharded": (INTERVALS_APART | CACHED | SHARDED, None),
}
ONE = {"one": {}, "one, cached": CACHED, "one, accumulated": ACCUMULATED}


def start(*arguments):
    """Run a script or module."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True, timeout=600)


def launch(processes, *arguments):
    """Run a script or module in several processes, as a user would."""
    return start("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes), *arguments)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Students of all cases, and of one process."""
    root = tmp_path_factory.mktemp("cases")
    script = root / "worker.py"
    script.write_text(WORKER)
    cases = [
        (str(prepare(root / name)), with_changes(TINY, changes).model_dump(mode="json"), killed_at)
        for name, (changes, killed_at) in CASES.items()
    ]
    done = start(str(script), json.dumps(cases))
    assert done.returncode == 0, done.stderr
    threads = torch.get_num_threads()
    # As many as each of the two processes has: matrix products are split by threads.
    torch.set_num_threads(1)
    for name, changes in ONE.items():
        students.distil(with_changes(TINY, changes), prepare(root / name))
    torch.set_num_threads(threads)
    return {name: read_tensors(root / name / "students.safetensors") for name in [*CASES, *ONE]}


def equal(mine, theirs):
    return mine.keys() == theirs.keys() and all(torch.equal(tensor, theirs[name]) for name, tensor in mine.items())


def distance(mine, theirs):
    return torch.stack([(tensor - theirs[name]).norm() for name, tensor in mine.items()]).norm()


def test_processes_with_students_of_their_own_train_what_one_process_does(trained):
    assert equal(trained["intervals"], trained["one"])
    assert equal(trained["intervals, sharded, killed"], trained["one"])
    assert equal(trained["intervals, cached, sharded"], trained["one, cached"])
    assert equal(trained["intervals, accumulated, killed"], trained["one, accumulated"])


def test_processes_that_share_batches_train_what_one_process_does_with_the_whole(trained, tmp_path):
    blocks = load_teacher(TINY, prepare(tmp_path)).transformer_blocks
    start = {
        f"students.{selected.interval.key}.{name}": parameter
        for selected in selection.read(tmp_path)
        for name, parameter in selection.new_student(blocks, selected).named_parameters()
    }
    # A gradient is a sum over some 100 tokens, in another order: sqrt(100) roundings of 6e-8 are 6e-7. Adam divides it
    # by its own size, so that the relative error of a step is the same, and entries that nearly cancel have more.
    for mine, theirs in (
        ("data", "one"),
        ("data, cached, killed", "one, cached"),
        ("data, accumulated", "one, accumulated"),
    ):
        assert distance(trained[mine], trained[theirs]) < 1e-4 * distance(trained[theirs], start)
    assert equal(trained["data, sharded, killed"], trained["data"])


def test_only_the_main_process_logs(trained, tmp_path_factory):
    root = next(tmp_path_factory.getbasetemp().glob("cases*"))
    for name in CASES:
        events = [json.loads(line) for line in (root / name / "log.jsonl").read_text().splitlines()]
        begun = sum("students" in event for event in events)
        # One that was interrupted while it filled its cache had not begun.
        assert begun == (1 if "cached" in name or "killed" not in name else 2), name
        assert not list((root / name).rglob("*.partial")) and not (root / name / "states").exists()


@pytest.mark.slow
def test_the_pipeline_runs_in_two_processes_and_recovers_what_one_does(tmp_path):
    """Every stage up to recovery, whose batch of three is shared unevenly; and recovery again in one process."""
    changes = {
        "teacher.phases": [{"until": 2, "horizon": 2}],
        "teacher.batch": 4,
        "table.lengths": [2],
        "table.steps": 2,
        "table.trial_steps": 1,
        "table.batches": 1,
        "table.batch": 4,
        "table.samples": 8,
        "students.steps": 2,
        "width.samples": 32,
        "width.channels": [0.5],
        "width.heads": [0.5],
        "width.longest_text_run": 2,
        "measure.samples": 4,
        "measure.spacing": 0.25,
        "measure.other_spacing": 0.5,
        "recover.steps": 4,
        "recover.batch": 3,
        "recover.warmup": 0,
        "keep_all": True,
    }
    config, two, one = with_changes(TINY, changes), tmp_path / "two", tmp_path / "one"
    two.mkdir()
    (two / "config.json").write_text(config.model_dump_json())
    done = launch(2, "-m", "ppcl_rt.cli", "train", "recover", "--out", str(two))
    assert done.returncode == 0, done.stderr
    events = [json.loads(line) for line in (two / "log.jsonl").read_text().splitlines()]
    # The table says what it chose, and distillation what it trains: once each, not once a process.
    assert [event["stage"] for event in events if "students" in event] == ["select", "students"]
    shutil.copytree(two, one)
    (one / "recovered.safetensors").unlink()
    pipeline.run_stages(config, one, last="recover")
    start = read_tensors(two / "compressed.json") | read_tensors(two / "width.json")
    shared, alone = (
        {
            name: tensor
            for name, tensor in read_tensors(folder / "recovered.safetensors").items()
            if ".order." not in name
        }
        for folder in (two, one)
    )
    # As above: a step's relative error is that of a gradient's sum in another order, some 1e-6.
    assert 0 < distance(shared, alone) < 1e-3 * distance(alone, start) or equal(shared, alone)
    assert distance(alone, start) > 0


def test_more_processes_than_students_or_samples_are_refused(tmp_path, monkeypatch):
    prepare(tmp_path)
    monkeypatch.setattr(students, "join", lambda: World(0, 6))
    with pytest.raises(ValueError, match="6 processes have 3 students"):
        students.distil(with_changes(TINY, INTERVALS_APART), tmp_path)
    with pytest.raises(ValueError, match="batch of 5 cannot be shared by 6"):
        students.distil(with_changes(TINY, DATA), tmp_path)


def test_shares_are_disjoint_and_whole():
    for size in (1, 2, 3, 7):
        for samples in (7, 8, 64):
            shares = [list(range(samples)[World(rank, size).share(samples)]) for rank in range(size)]
            assert [sample for share in shares for sample in share] == list(range(samples))
            assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_owners_are_balanced_by_cost():
    costs = [5, 1, 1, 4, 1, 3]
    owner = owners(costs, 2)
    assert [sum(cost for cost, who in zip(costs, owner) if who == rank) for rank in range(2)] == [8, 7]
    assert owners([1] * 5, 5) == [0, 1, 2, 3, 4]


def test_a_process_alone_is_a_world():
    tensor = torch.ones(2, requires_grad=True)
    tensor.grad = torch.full((2,), 3.0)
    ALONE.average([tensor])
    ALONE.wait()
    assert torch.equal(tensor.grad, torch.full((2,), 3.0)) and ALONE.mean(tensor) is tensor
    assert ALONE.agree("x") == "x" and ALONE.any(True) and not ALONE.any(False) and ALONE.is_main
    assert ALONE.gather({"a": tensor})["a"] is tensor and ALONE.share(5) == slice(0, 5)
