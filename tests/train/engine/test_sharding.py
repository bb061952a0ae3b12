"""Recovery on several processes: sharded, stopped and gone on with by another number of them; hangs that end."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist
from tiny import TINY
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import distribute_tensor

from ppcl_train import pipeline
from ppcl_train.config.settings import with_changes
from ppcl_train.data import calibration
from ppcl_train.engine import saving
from ppcl_train.engine.distributed import World, buckets, timeout
from ppcl_train.engine.files import stored_in, write_tensors
from ppcl_train.engine.sharding import drop_unreached
from ppcl_train.stages import recover

RUN = with_changes(
    TINY,
    {
        "save_every": 2,
        "tracker": "none",
        "compress.share": 0.5,
        "recover.steps": 6,
        "recover.warmup": 0,
        # Shared unevenly.
        "recover.batch": 5,
        "recover.clip": 0.5,
        "recover.ema": 0.5,
    },
)
SHARDED = {"recover.shard": True, "recover.checkpointing": True}


# Seven recoveries, five of them on two processes.
pytestmark = pytest.mark.slow


class Stopped(BaseException):
    pass


def recovered(folder, config, stopped_at=None):
    """Run recovery, up to a step or to its end."""
    inputs = calibration.inputs

    def given(run, size, seed, **others):
        if seed == calibration.RECOVER + stopped_at:
            raise Stopped
        return inputs(run, size, seed, **others)

    if stopped_at is None:
        recover.recover(config, folder)
        return
    calibration.inputs = given
    try:
        recover.recover(config, folder)
    except Stopped:
        assert saving.saved_steps(folder, "recover") == (stopped_at // 2 * 2, config.recover.steps)
    finally:
        calibration.inputs = inputs


# Two processes run this over cases [folder, config, the step they stop at or null, processes of a node]. The second
# stops answering in the last of them, and the first has to say so.
WORKER = """
import json, os, signal, socket, sys, torch
from pathlib import Path
sys.path[:0] = json.loads(sys.argv[2])
torch.set_num_threads(1)
with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    port = free.getsockname()[1]
os.environ |= {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
import test_sharding
from ppcl_train.config.settings import RunConfig
from ppcl_train.data import calibration
from ppcl_train.engine import distributed, state
other = os.fork()
rank = "0" if other else "1"
os.environ |= {"RANK": rank, "LOCAL_RANK": rank}
world, save = distributed.join(), state.LoopState.save

def noted(self, saves, done, of, world):
    # Parameters, averages and moments: in this process, and of all.
    held = list(self._tensors().values())
    here = sum(getattr(tensor, "_local_tensor", tensor).nbytes for tensor in held)
    Path(f"{saves._folder.parent}-{rank}.bytes").write_text(json.dumps([here, sum(t.nbytes for t in held)]))
    save(self, saves, done, of, world)

state.LoopState.save = noted
for name, config, stopped_at, local in json.loads(sys.argv[1]):
    os.environ["LOCAL_WORLD_SIZE"] = str(local)
    test_sharding.recovered(Path(name), RunConfig.model_validate(config), stopped_at)
    world.wait()
sys.stdout.flush()
# The second process answers no more.
if not other:
    os.kill(os.getpid(), signal.SIGSTOP)
distributed.timeout = lambda: __import__("datetime").timedelta(seconds=2)
torch.distributed.distributed_c10d._set_pg_timeout(distributed.timeout(), None)
try:
    with world.naming("recover"):
        world.mean(torch.ones(1))
except ValueError as error:
    print(error)
os.kill(other, signal.SIGKILL)
sys.stdout.flush()
os._exit(0)
"""


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """What recovery makes in all cases, its beginning, and what the processes said."""
    root = tmp_path_factory.mktemp("cases")
    torch.manual_seed(0)
    model = RUN.family.build(RUN.teacher.architecture)
    write_tensors(root / "random.safetensors", dict(model.named_parameters()), {})
    pipeline.begin(RUN, root / "begun", root / "random.safetensors")
    pipeline.run_stages(RUN, root / "begun", last="compress")
    sharded = with_changes(RUN, SHARDED)

    def case(name):
        return shutil.copytree(root / "begun", root / name)

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    recovered(case("one"), RUN)
    recovered(case("one, then two"), sharded, 3)
    torch.set_num_threads(threads)
    cases = [
        (str(case("two, sharded")), sharded, None, 2),
        (str(case("two")), RUN, None, 2),
        (str(case("two nodes, sharded")), sharded, None, 1),
        (str(case("two, then one")), sharded, 3, 2),
        (str(root / "one, then two"), sharded, None, 2),
    ]
    script = root / "worker.py"
    script.write_text(WORKER)
    given = json.dumps([(name, config.model_dump(mode="json"), *rest) for name, config, *rest in cases])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PPCL_TIMEOUT": "100"}
    paths = [path for path in sys.path if path]
    done = subprocess.run(
        [sys.executable, str(script), given, json.dumps([os.path.dirname(__file__), *paths])],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    torch.set_num_threads(1)
    recovered(root / "two, then one", sharded)
    torch.set_num_threads(threads)
    return root, done.stdout.splitlines()[-1]


def values(folder):
    held = stored_in(folder / "recovered.safetensors")
    return {name: each.read().float() for name, each in held.items() if ".order." not in name}


def distance(mine, theirs):
    return torch.stack([(tensor - theirs[name]).norm() for name, tensor in mine.items()]).norm()


@pytest.mark.parametrize("name", ["two", "two, sharded", "two nodes, sharded", "two, then one", "one, then two"])
def test_two_processes_recover_what_one_does_sharded_or_not_and_after_a_change_of_their_number(trained, name):
    root, _ = trained
    one = values(root / "one")
    begun = {key: each.read().float() for key, each in before(root).items() if key in one}
    moved = distance({key: one[key] for key in begun if begun[key].shape == one[key].shape}, begun)
    assert moved > 0
    # A gradient is a sum over some 100 tokens in another order: sqrt(100) roundings of 6e-8 are 6e-7 of it. Adam
    # divides it by its own size, so a step is off by as much, and by more in entries that nearly cancel.
    assert values(root / name).keys() == one.keys()
    assert distance(values(root / name), one) < 1e-3 * moved


def before(root):
    return stored_in(root / "begun" / "width.json") | stored_in(root / "begun" / "compressed.json")


def test_a_process_holds_its_share_of_what_is_trained(trained):
    root, _ = trained
    for name, share in (("two, sharded", 0.5), ("two", 1.0), ("two nodes, sharded", 1.0)):
        for rank in range(2):
            here, whole = json.loads((root / f"{name}-{rank}.bytes").read_text())
            # An odd number of rows leaves one process a row more.
            assert here == pytest.approx(share * whole, rel=0.05), name


def test_a_process_that_answers_no_more_is_named(trained):
    assert trained[1].startswith("recover stopped: process 1 of 0..1 died or hangs; what was saved is kept")


def test_a_state_that_is_written_in_the_background_is_the_same(tmp_path):
    tensors = {"a.b": torch.randn(3, 4), "c": torch.arange(5)}
    saves = saving.Saves(tmp_path, "recover", World(), background=True)
    for step in (2, 4):
        saves.write(step, tensors, {"step": step, "of": 8})
        # Training goes on: what is written is what was.
        tensors["c"] += 1
    saves.finish()
    state = saves.newest()
    assert saving.saved_steps(tmp_path, "recover") == (4, 8) and [state] == list(state.parent.iterdir())
    into = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
    saves.read(state, into)
    assert torch.equal(into["a.b"], tensors["a.b"]) and torch.equal(into["c"], tensors["c"] - 1)


def test_buckets_hold_all_tensors_once_of_one_dtype():
    tensors = [torch.zeros(n, dtype=dtype) for n in (3, 1000, 5, 7) for dtype in (torch.float32, torch.bfloat16)]
    found = list(buckets(tensors, 4000))
    assert sorted(id(t) for bucket in found for t in bucket) == sorted(map(id, tensors))
    assert len(found) == 3 and all(len({t.dtype for t in bucket}) == 1 for bucket in found)


def test_settings_that_cannot_be_are_one_line(monkeypatch):
    with pytest.raises(ValueError, match="shard and eight_bit do not go together"):
        with_changes(RUN, {"recover.shard": True, "recover.eight_bit": True})
    with pytest.raises(ValueError, match="shard and muon_lr do not go together"):
        with_changes(RUN, {"refine.shard": True, "refine.muon_lr": 0.01})
    monkeypatch.setenv("PPCL_TIMEOUT", "soon")
    with pytest.raises(ValueError, match="PPCL_TIMEOUT=soon"):
        timeout()


def test_shards_that_ran_to_no_effect_have_no_gradient(tmp_path):
    """FSDP2 gives them zeros, by which Adam's moments would move them on; without it they stay."""
    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        reached, unread, plain = (torch.nn.Parameter(torch.ones(3)) for _ in range(3))
        sharded = [torch.nn.Parameter(distribute_tensor(p.detach(), mesh)) for p in (reached, unread)]
        sharded[0].grad = distribute_tensor(torch.tensor([0.0, 1e-30, 0.0]), mesh)
        sharded[1].grad = distribute_tensor(torch.zeros(3), mesh)
        plain.grad = torch.zeros(3)
        drop_unreached([*sharded, plain], World())
        assert sharded[0].grad is not None and sharded[1].grad is None and plain.grad is not None
    finally:
        dist.destroy_process_group()
