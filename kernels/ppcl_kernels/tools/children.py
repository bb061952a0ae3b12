"""Run jobs that may hang or die, each in a forked process of its own, and keep what each reported until then.

A fork takes milliseconds, while a new interpreter takes seconds to import torch. The parent must not have used CUDA,
which does not survive a fork: a parent that may have can only start programs (`Job.command`). A child
leads a process group, which is killed as a whole, and dies with its parent.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Say = Callable[[dict[str, Any]], None]

NOT_REACHED = "not reached before the time was over"

_PR_SET_PDEATHSIG = 1
# Seconds that a killed process may take to leave the device before the next process starts in its place.
_GRACE = 10.0
_POLL = 0.02
_LOG_LINES = 20


@dataclass(frozen=True)
class Job:
    """What one process does.

    Attributes:
        name: identifies the job to readers of its outcome.
        seconds: time limit, after which the process is killed.
        work: function that runs in the child. Its argument is a function that keeps a dictionary for the parent.
        command: instead of ``work``, the program that the child becomes. Its argument is a file to which the program
            appends dictionaries, as JSON lines.
        prints: True to show what the process prints; otherwise the last lines are kept in the outcome.
    """

    name: Any
    seconds: float
    work: Callable[[Say], None] | None = None
    command: Callable[[Path], Sequence[str]] | None = None
    prints: bool = False


@dataclass
class Outcome:
    """How a process ended.

    Attributes:
        job: what it had to do.
        said: the dictionaries that it kept, also if it was killed.
        status: exit status, negative for a signal as in `subprocess`; None if it was never started.
        seconds: how long it ran.
        late: whether it was killed for taking too long.
        log: the last lines that it printed.
    """

    job: Job
    said: list[dict[str, Any]] = field(default_factory=list)
    status: int | None = None
    seconds: float = 0.0
    late: bool = False
    log: list[str] = field(default_factory=list)

    @property
    def how(self) -> str:
        """How it ended, in words; empty for exit status 0."""
        if self.late:
            return f"no result after {self.seconds:.0f} s: killed"
        if self.status is None:
            return NOT_REACHED
        if self.status < 0:
            try:
                return f"killed by {signal.Signals(-self.status).name}"
            except ValueError:
                return f"killed by signal {-self.status}"
        return f"exit status {self.status}" if self.status else ""


@dataclass
class _Child:
    outcome: Outcome
    pid: int
    started: float
    ends: float
    lines: Path
    log: Path
    killed: float | None = None

    def kill(self) -> None:
        """Kill its process group; a second call does nothing."""
        self.killed = self.killed or time.monotonic()
        for kill in (os.killpg, os.kill):
            try:
                kill(self.pid, signal.SIGKILL)
                return
            except ProcessLookupError:
                # The child may not have made its group yet.
                continue

    def reaped(self) -> bool:
        """Return whether the process has ended, or was killed so long ago that it is not waited for any longer."""
        pid, status = os.waitpid(self.pid, os.WNOHANG)
        if pid:
            self.outcome.status = os.waitstatus_to_exitcode(status)
        elif self.killed is not None and time.monotonic() > self.killed + _GRACE:
            self.outcome.status = -signal.SIGKILL
        else:
            return False
        with contextlib.suppress(ProcessLookupError, PermissionError):
            # Ends the processes that it left running.
            os.killpg(self.pid, signal.SIGKILL)
        self.outcome.seconds = time.monotonic() - self.started
        self.outcome.said = _read(self.lines)
        if self.log.exists():
            self.outcome.log = self.log.read_text(errors="replace").splitlines()[-_LOG_LINES:]
        return True


def run_all(jobs: Sequence[Job], at_once: int, deadline: float, done: Callable[[Outcome], None]) -> None:
    """Run jobs in their order, and pass each outcome to ``done`` as soon as its process has ended.

    Args:
        jobs: what to run.
        at_once: how many processes run at a time.
        deadline: a value of `time.monotonic`. Then running jobs are killed, and the outcomes of the others have no
            status.
        done: called in this process.
    """
    waiting, running = list(jobs), list[_Child]()
    with tempfile.TemporaryDirectory(prefix="ppcl-") as folder:
        try:
            while waiting or running:
                now = time.monotonic()
                while waiting and len(running) < at_once and now < deadline:
                    running.append(_start(waiting.pop(0), deadline, Path(folder)))
                for child in list(running):
                    if child.reaped():
                        running.remove(child)
                        done(child.outcome)
                    elif child.killed is None and now > child.ends:
                        child.outcome.late = True
                        child.kill()
                if now >= deadline:
                    for job in waiting:
                        done(Outcome(job))
                    waiting.clear()
                time.sleep(_POLL)
        finally:
            for child in running:
                child.kill()


def _why_no_fork() -> str:
    """Return what shows that this process may have used CUDA, empty if nothing does."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        return "this process has used CUDA"
    # Its imports ask CUDA for its devices, which starts the driver.
    return "this process has imported diffusers" if "diffusers" in sys.modules else ""


def _start(job: Job, deadline: float, folder: Path) -> _Child:
    if job.command is None and (why := _why_no_fork()):
        raise RuntimeError(f"cannot fork for {job.name}: {why}, and CUDA does not survive a fork: give it a command")
    fd, name = tempfile.mkstemp(suffix=".jsonl", dir=folder)
    os.close(fd)
    lines, log = Path(name), Path(name).with_suffix(".log")
    parent = os.getpid()
    sys.stdout.flush()
    sys.stderr.flush()
    with warnings.catch_warnings():
        # Python 3.12 warns of a fork in a process with threads. Libraries keep idle ones, which hold no lock here.
        warnings.simplefilter("ignore", DeprecationWarning)
        pid = os.fork()
    if pid == 0:
        _be_child(job, parent, lines, log)
    started = time.monotonic()
    return _Child(Outcome(job), pid, started, min(started + job.seconds, deadline), lines, log)


def _be_child(job: Job, parent: int, lines: Path, log: Path) -> None:
    """Do the job and exit; never returns."""
    status = 1
    try:
        os.setpgid(0, 0)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_DFL)
        if sys.platform == "linux":
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
            # The parent may have died before that call.
            if os.getppid() != parent:
                os._exit(1)
        if not job.prints:
            target = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(target, 1)
            os.dup2(target, 2)
        if job.command is not None:
            command = list(job.command(lines))
            os.execvp(command[0], command)
        assert job.work is not None
        with lines.open("a") as file:

            def say(what: dict[str, Any]) -> None:
                file.write(json.dumps(what) + "\n")
                file.flush()

            job.work(say)
        status = 0
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _read(lines: Path) -> list[dict[str, Any]]:
    """Read the lines that were completely written."""
    said = []
    for line in lines.read_text(errors="replace").splitlines():
        try:
            said.append(json.loads(line))
        except ValueError:
            # The process was killed while it wrote this line.
            continue
    return said


@contextlib.contextmanager
def terminated_as_exit() -> Iterator[None]:
    """Make SIGTERM (as `timeout` sends it) raise SystemExit, so that children are ended and results are written."""

    def leave(number: int, frame: Any) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
