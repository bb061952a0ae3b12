"""The stage *width*: stopped and gone on with, in portions of any size, in several processes, it leaves one result."""

import json
import os
import subprocess
import sys

import pytest
import torch

from ppcl_train.config.presets import PRESETS
from ppcl_train.config.settings import with_changes
from ppcl_train.engine.files import read_tensors, write_tensors
from ppcl_train.engine.parts import Parts
from ppcl_train.stages import teacher, width

SMALL = with_changes(
    PRESETS["scenes"],
    {
        "teacher.architecture": {**PRESETS["scenes"].teacher.architecture, "num_layers": 5, "num_attention_heads": 2},
        "batch": 32,
        "width.samples": 80,
        "width.channels": [0.5],
        "width.heads": [0.5],
        "width.ranks": [4],
        "width.longest_text_run": 3,
        "width.blocks_at_once": 2,
    },
)
BLOCKS, FIRSTS = [f"transformer_blocks.{n}" for n in range(5)], [f"text_runs.{n}" for n in range(4)]
WORKER = """
import json, os, socket, sys, torch
from pathlib import Path
from ppcl_train.config.settings import RunConfig
from ppcl_train.engine import distributed
from ppcl_train.stages import width

torch.set_num_threads(1)
with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    port = free.getsockname()[1]
os.environ |= {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
other = os.fork()
rank = "0" if other else "1"
os.environ |= {"RANK": rank, "LOCAL_RANK": rank}
world = distributed.join()
width.prune(RunConfig.model_validate(json.loads(sys.argv[2])), Path(sys.argv[1]))
world.wait()
torch.distributed.destroy_process_group()
sys.stderr.flush()
os._exit(os.waitpid(other, 0)[1] != 0 if other else 0)
"""


class Killed(BaseException):
    pass


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """As each process of a world has: matrix products are split by threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def model():
    made = teacher.initial(SMALL)
    torch.manual_seed(0)
    return {name: parameter + 0.1 * torch.randn_like(parameter) for name, parameter in made.named_parameters()}


@pytest.fixture(scope="module")
def prepare(model, tmp_path_factory):
    def folder(name):
        path = tmp_path_factory.mktemp("width") / name
        write_tensors(path / "teacher.safetensors", model, {})
        return path

    return folder


@pytest.fixture(scope="module")
def whole(prepare, one_thread):
    """What one process leaves that nothing stops."""
    folder = prepare("whole")
    width.prune(SMALL, folder)
    return folder


def files(folder):
    """All bytes that the stage leaves."""
    assert sorted(path.name for path in (folder / "width").iterdir()) == sorted(
        f"{name}.safetensors" for name in (*BLOCKS, *FIRSTS)
    )
    return {path.name: path.read_bytes() for path in (folder / "width.json", *(folder / "width").iterdir())}


@pytest.mark.parametrize(("at_once", "kept_bytes"), [(64, 0), (1, 0)])
def test_portions_of_any_size_give_the_same_bytes(prepare, whole, at_once, kept_bytes):
    folder = prepare("other")
    width.prune(with_changes(SMALL, {"width.blocks_at_once": at_once, "width.kept_bytes": kept_bytes}), folder)
    assert files(folder) == files(whole)


def test_the_list_names_the_files_in_order(whole):
    listed = json.loads((whole / "width.json").read_bytes())["files"]
    assert listed == [f"width/{name}.safetensors" for name in (*BLOCKS, *FIRSTS)]
    tensors = read_tensors(whole / "width.json")
    assert {".".join(name.split(".")[:2]) for name in tensors} == {*BLOCKS, *FIRSTS}


def test_a_kill_repeats_the_portion_in_work_alone(prepare, whole, monkeypatch):
    killed = prepare("killed")
    written, write, seen = [], Parts.write, []
    observe = width.observe

    def writing(self, name, tensors):
        # Before the first block, in the midst of the second portion, and among text runs.
        if len(written) in {0, 3, 7} and len(written) not in seen:
            seen.append(len(written))
            raise Killed
        write(self, name, tensors)
        written.append(name)

    def observing(passes, portion, *more):
        observed.extend(prefix for prefix, *_ in portion)
        return observe(passes, portion, *more)

    observed = []
    monkeypatch.setattr(Parts, "write", writing)
    monkeypatch.setattr(width, "observe", observing)
    for _ in range(3):
        with pytest.raises(Killed):
            width.prune(SMALL, killed)
        assert not (killed / "width.json").exists()
    width.prune(SMALL, killed)
    assert sorted(written) == sorted([*BLOCKS, *FIRSTS])
    assert observed == [*BLOCKS[:2], *BLOCKS[:2], *BLOCKS[2:4], *BLOCKS[3:]]
    assert files(killed) == files(whole)


@pytest.mark.slow
def test_two_processes_give_the_bytes_of_one(prepare, whole, tmp_path):
    two = prepare("two")
    script = tmp_path / "worker.py"
    script.write_text(WORKER)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    arguments = [sys.executable, str(script), str(two), json.dumps(SMALL.model_dump(mode="json"))]
    done = subprocess.run(arguments, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert files(two) == files(whole)
