"""Jobs on disk: taken by any process, lost one at a time, never done twice."""

import contextlib
import os
import signal
import threading
import time

import pytest
import torch

from ppcl_train.engine import digests, queue
from ppcl_train.engine.lock import attended, claimed
from ppcl_train.engine.queue import RESULTS, Job, Queue, Result, work_under_way

JOBS = [Job(f"{group}-{n}", group) for group in ("a", "b", "c") for n in range(4)]


def silent(**_):
    """A log that says nothing."""


def doing(folder, slow=()):
    """Computes a job, and notes who did; waits a while in those that are ``slow``."""

    def do(job):
        with (folder / "done.txt").open("a") as file:
            file.write(f"{job.name} {os.getpid()}\n")
        time.sleep(30 if job.name in slow else 0.01)
        return Result({"value": torch.tensor(float(JOBS.index(job)))}, {"name": job.name})

    return do


def done(folder):
    """Job -> the processes that began it, in order."""
    found = {}
    for line in (folder / "done.txt").read_text().splitlines():
        name, who = line.split()
        found.setdefault(name, []).append(int(who))
    return found


def forked(folder, jobs=JOBS, slow=()):
    """A process that works at a queue; returns its id."""
    child = os.fork()
    if not child:
        try:
            Queue(folder, jobs).work(doing(folder, slow), silent)
        finally:
            os._exit(0)
    return child


def leftovers(folder):
    return [path.name for path in (folder / RESULTS).iterdir() if path.suffix != ".safetensors"]


def test_results_come_in_the_order_of_the_jobs_and_are_made_once(tmp_path):
    results = Queue(tmp_path, JOBS).work(doing(tmp_path), silent)
    assert [result.note["name"] for result in results] == [job.name for job in JOBS]
    assert [result.tensors["value"].item() for result in results] == list(range(len(JOBS)))
    # Another queue that shares some of the jobs, as the stages after do.
    more = [*JOBS[2:4], Job("d-0", "d")]
    again = Queue(tmp_path, more).work(lambda job: Result({}, {"name": job.name}), silent)
    assert [result.note["name"] for result in again] == [job.name for job in more]
    assert all(len(by) == 1 for by in done(tmp_path).values()) and not leftovers(tmp_path)


def test_a_job_that_fails_stops_its_process_and_keeps_the_others(tmp_path):
    def fails(job):
        if job.name == "b-1":
            raise ValueError("not finite")
        return doing(tmp_path)(job)

    with pytest.raises(ValueError, match="not finite"):
        Queue(tmp_path, JOBS).work(fails, silent)
    assert len(Queue(tmp_path, JOBS).left) == len(JOBS) - 5
    Queue(tmp_path, JOBS).work(doing(tmp_path), silent)
    assert all(len(by) == 1 for by in done(tmp_path).values()) and not leftovers(tmp_path)


def test_a_process_that_is_killed_loses_one_job_and_two_processes_share_the_others(tmp_path):
    child = forked(tmp_path, slow=("a-1",))
    while "a-1" not in ((tmp_path / "done.txt").read_text() if (tmp_path / "done.txt").exists() else ""):
        time.sleep(0.01)
    assert work_under_way(tmp_path)
    other = forked(tmp_path)
    # The other one goes where nobody is, and then helps: all but the job that is being done.
    while len(Queue(tmp_path, JOBS).left) > 1:
        time.sleep(0.01)
    assert [job.name for job in Queue(tmp_path, JOBS).left] == ["a-1"]
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert os.waitpid(other, 0)[1] == 0
    assert done(tmp_path)["a-1"] == [child, other]
    assert all(len(by) == 1 for name, by in done(tmp_path).items() if name != "a-1")
    assert not leftovers(tmp_path) and work_under_way(tmp_path) is None


def test_a_process_that_leaves_the_queue_before_is_waited_for(tmp_path):
    before, stays = Queue(tmp_path, JOBS[:1])._open_file, contextlib.ExitStack()
    stays.enter_context(attended(before))
    threading.Timer(0.3, stays.close).start()
    Queue(tmp_path, JOBS[1:]).work(doing(tmp_path), silent)
    assert not before.exists() and len(done(tmp_path)) == len(JOBS) - 1


def test_processes_that_make_other_results_do_not_work_at_one_run(tmp_path, monkeypatch):
    monkeypatch.setattr(queue, "_PATIENCE", 0.2)
    child = forked(tmp_path, slow=("a-0",))
    while not work_under_way(tmp_path):
        time.sleep(0.01)
    with pytest.raises(ValueError, match="same settings, versions and kind of device"):
        Queue(tmp_path, JOBS[1:]).work(doing(tmp_path), silent)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    # What a killed process leaves of its locks stands for nothing.
    assert leftovers(tmp_path) and work_under_way(tmp_path) is None
    Queue(tmp_path, JOBS[1:]).work(doing(tmp_path), silent)


def test_a_lock_is_had_by_one_and_its_file_goes_with_it(tmp_path):
    path = tmp_path / "x.lock"
    with claimed(path) as mine, claimed(path) as theirs:
        assert mine and not theirs
    assert not path.exists()
    with claimed(path) as mine:
        path.unlink()
        # A file of this name that was made since is another lock, and stays with whoever has that.
        with claimed(path) as theirs:
            assert mine and theirs
        assert not path.exists()
    with attended(path), attended(path):
        assert path.exists()
    assert not path.exists()


def test_digests_see_every_bit_and_every_name():
    layer = torch.nn.Linear(3, 3)
    before = digests.of_module(layer)
    assert digests.of_module(layer) == before
    assert digests.of_module(layer.half().float()) != before
    layer = torch.nn.Linear(3, 3).requires_grad_(False)
    before = digests.of_module(layer)
    layer.weight.copy_(layer.weight.T.clone())
    assert digests.of_module(layer) != before and digests.of_module(layer, without=".weight") != before
    values = torch.zeros(2, 3)
    assert digests.of_tensors([values]) != digests.of_tensors([values.T]) != digests.of_tensors([values.T.bfloat16()])
    assert digests.of_tree({"a": [values, 1], "b": None}) == digests.of_tensors([values])
    assert digests.of_values(1, "a", [2.5]) != digests.of_values(1, "a", [2.0])
