"""Several processes measure and select together: those of one world, and others that come to help."""

import os
import shutil
import signal
import socket
import time

import pytest
from tiny import TINY

from ppcl_train import pipeline
from ppcl_train.config.settings import with_changes
from ppcl_train.engine import distributed
from ppcl_train.engine.queue import RESULTS, work_under_way
from ppcl_train.selectors import cost_table
from ppcl_train.stages import sensitivities, teacher, width

# No training but that of the candidates.
RUN = with_changes(TINY, {"table.lengths": [2], "table.samples": 4, "measure.samples": 4, "width.samples": 16})
OUTPUTS = ("costs.json", "table.json", "selected.json")


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """What one process selects."""
    folder = tmp_path_factory.mktemp("alone") / "run"
    pipeline.begin(RUN, folder)
    pipeline.run_stages(RUN, folder, last="select")
    return folder


def begun(folder, alone):
    """A run folder that has come to the stage *select*."""
    folder.mkdir()
    shutil.copytree(alone / "width", folder / "width")
    for name in (pipeline.CONFIG, teacher.OUTPUT, width.OUTPUT):
        shutil.copyfile(alone / name, folder / name)
    return folder


def forked(what):
    """A process that does something; returns its id."""
    child = os.fork()
    if not child:
        status = 1
        try:
            what()
            status = 0
        finally:
            # Threads of the group must not outlive what was to be done.
            os._exit(status)
    return child


def same(folder, other, outputs=OUTPUTS):
    names = sorted(path.name for path in (folder / RESULTS).iterdir())
    assert names == sorted(path.name for path in (other / RESULTS).iterdir())
    for name in (*outputs, *(f"{RESULTS}/{name}" for name in names)):
        assert (folder / name).read_bytes() == (other / name).read_bytes(), name


def as_rank(rank, folder, port, last="select"):
    """Run stages as one process of a world of two."""
    world = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ |= {**world, "RANK": str(rank), "LOCAL_RANK": str(rank)}
    distributed.join.cache_clear()
    note_measuring(folder / f"rank-{rank}", folder / f"rank-{1 - rank}")
    pipeline.run_stages(RUN, folder, last=last)


def in_two_processes(folder, last):
    """Run stages in a world of two."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = [forked(lambda rank=rank: as_rank(rank, folder, port, last)) for rank in (0, 1)]
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0]


def note_measuring(file, waits_for):
    """Have all that measures in this process note that it began, and then wait until another process did."""

    def noting(once):
        def measure(*args):
            with file.open("a") as notes:
                notes.write("job\n")
            until = time.monotonic() + 300
            while not waits_for.exists() and time.monotonic() < until:
                time.sleep(0.01)
            return once(*args)

        return measure

    sensitivities._Measuring.measure = noting(sensitivities._Measuring.measure)
    cost_table.measure_candidate = noting(cost_table.measure_candidate)


def noted(file):
    """How many jobs a process was at."""
    return len(file.read_text().split()) if file.exists() else 0


def test_two_processes_of_a_world_select_as_one_does(alone, tmp_path):
    folder = begun(tmp_path / "run", alone)
    in_two_processes(folder, "select")
    did = [noted(folder / f"rank-{rank}") for rank in (0, 1)]
    # Both measured, and nothing was measured twice.
    assert all(did) and sum(did) == len(list((folder / RESULTS).iterdir()))
    same(folder, alone)


def test_a_process_that_helps_may_be_killed_and_another_come(alone, tmp_path):
    folder = begun(tmp_path / "run", alone)
    with pytest.raises(ValueError, match="nobody works at"):
        pipeline.work(folder)

    def main():
        note_measuring(folder / "main", folder / "second")
        pipeline.run_stages(RUN, folder, last="select")

    def helper(name, waits_for):
        note_measuring(folder / name, folder / waits_for)
        pipeline.work(folder)

    child = forked(main)
    while not work_under_way(folder):
        time.sleep(0.01)
    first = forked(lambda: helper("first", "never"))
    while not noted(folder / "first"):
        time.sleep(0.001)
    os.kill(first, signal.SIGKILL)
    os.waitpid(first, 0)
    second = forked(lambda: helper("second", "main"))
    assert [os.waitpid(each, 0)[1] for each in (child, second)] == [0, 0]
    # One job was begun twice: that of the process that was killed in it.
    did = [noted(folder / name) for name in ("main", "first", "second")]
    assert did[1] == 1 and did[2] and sum(did) == len(list((folder / RESULTS).iterdir())) + 1
    same(folder, alone)


@pytest.mark.slow
def test_two_processes_measure_and_pack_as_one_does(tmp_path):
    folder, other = tmp_path / "one", tmp_path / "two"
    pipeline.begin(RUN, folder)
    pipeline.run_stages(RUN, folder)
    shutil.copytree(folder, other)
    last = ["sensitivities.json", "sketches.safetensors", "plans.json", "checkpoint/run.json"]
    for name in last:
        (other / name).unlink()
    for result in (other / RESULTS).iterdir():
        result.unlink()
    in_two_processes(other, "pack")
    assert all(noted(other / f"rank-{rank}") for rank in (0, 1))
    for result in {path.name for path in (folder / RESULTS).iterdir()} - {p.name for p in (other / RESULTS).iterdir()}:
        # Of earlier stages, which were not run again.
        (folder / RESULTS / result).unlink()
    packed = [f"checkpoint/{path.name}" for path in (folder / "checkpoint").iterdir()]
    same(other, folder, [*last, *packed])
