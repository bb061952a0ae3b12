"""Alter copies of tiny checkpoints at random: each is refused in one line, or gives the outputs of the unaltered one.

    python tests/fuzz.py --copies 10000 --processes 2
    python tests/fuzz.py --seed 3 --only 4711        # one copy again, and what came of it

A copy is named by the seed and its number, and by nothing else. Copies are judged in forked processes, a few dozen in
each: one that hangs is ended by its alarm, one that crashes is told by its end, and the peak of the memory is the
process's own. The exit status is 1 if anything was found.
"""

from __future__ import annotations

import argparse
import collections
import itertools
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import fixtures
import torch
from alterations import alter
from diffusers.utils import logging
from formats import as_format_1, as_small, change_config

import ppcl_rt
from ppcl_rt.checkpoint.names import CHECKSUM_KEY, CONFIG
from ppcl_rt.messages import MOST_CHARACTERS

RATIOS = (1.0, 0.6)
# A copy takes a tenth of a second.
SECONDS = 20
MOST_BYTES = 10**9
# Of one process, which begins with a load of its own.
BATCH = 40
GROUPS = {"heads": (3, 1), "image": (96, 50, 0), "text": (31, 0), "modulation": (7, 1)}
FORM: dict[str, Any] = {
    "num_layers": 3,
    "students": ((0, 1), (2, 2)),
    "text_runs": ((0, 1), (0, 2)),
    "compensated": True,
    "groups": GROUPS,
}


class Verdict(NamedTuple):
    """What came of a copy.

    Attributes:
        kind: refused, equal, untold (`Base.untold`), or found.
        said: the message, or what is wrong.
    """

    kind: str
    said: str = ""


@dataclass(frozen=True)
class Base:
    """A checkpoint to be altered.

    Attributes:
        others: folders with files of the same names that are sound by themselves.
        untold: file -> why other outputs after a change of it are no finding: what a file cannot tell.
        wanted: outputs at `RATIOS`.
    """

    folder: Path
    others: tuple[Path, ...]
    untold: dict[str, str]
    wanted: tuple[torch.Tensor, ...]


def outputs(folder: Path) -> tuple[torch.Tensor, ...]:
    """Outputs of a checkpoint at `RATIOS`, on fixed inputs."""
    model, made = ppcl_rt.load(folder, RATIOS[0]), []
    for ratio in RATIOS:
        model.set_ratio(ratio)
        with torch.no_grad():
            made.append(model(**fixtures._build_inputs(batch=1, images=((1, 3, 4),)), return_dict=False)[0])
    return tuple(made)


def make_bases(root: Path) -> list[Base]:
    """Write checkpoints of every form."""
    made = fixtures._make_checkpoint(root / "whole", **FORM)
    other = fixtures._make_checkpoint(root / "other", seed=5, **FORM)
    small, _ = as_small(made)
    ppcl_rt.write_checkpoint(root / "small", made.config, made.catalog, small)
    ppcl_rt.write_checkpoint(root / "sharded", made.config, made.catalog, made.tensors, max_shard_size=300_000)
    ppcl_rt.write_checkpoint(root / "sharded-other", made.config, made.catalog, other.tensors, max_shard_size=300_000)
    shutil.copytree(root / "whole", root / "old")
    as_format_1(root / "old")
    shutil.copytree(root / "small", root / "without")
    change_config(root / "without", lambda config: config.pop(CHECKSUM_KEY))
    for name in ("whole", "other"):
        ppcl_rt.load(root / name, RATIOS[1]).save_plan(root / f"{name}-alone")
    # Settings that no tensor's shape depends on, and losses, which the planner goes by, were written without a checksum
    # before there was one. Nothing but a checksum can tell them, so that these two are only asked not to crash, hang,
    # swell or chatter when config.json was altered. Tensors have their checksums there too.
    unsealed = {CONFIG: "written before settings and catalogs had a checksum"}
    forms: list[tuple[str, str, dict[str, str]]] = [
        ("whole", "other", {}),
        ("small", "whole", {}),
        ("sharded", "sharded-other", {}),
        ("whole-alone", "other-alone", {}),
        ("old", "whole", unsealed),
        ("without", "other", unsealed),
    ]
    return [Base(root / name, (root / other,), untold, outputs(root / name)) for name, other, untold in forms]


def judge(base: Base, copy: Path, changed: str) -> Verdict:
    """Load a copy and run it."""
    try:
        got = outputs(copy)
    except ValueError as error:
        said = str(error)
        # `ppcl_rt.load` documents ValueError; a subclass is a library's own, with a message of its own.
        if type(error) is not ValueError:
            return Verdict("found", f"{type(error).__name__}: {said[:200]}")
        if not said or len(said) > MOST_CHARACTERS or not said.isprintable():
            return Verdict("found", f"a message of {len(said)} characters: {said[:200]!r}")
        return Verdict("refused", said)
    except BaseException as error:
        return Verdict("found", f"{type(error).__name__}: {str(error)[:200]}")
    if all(map(torch.equal, got, base.wanted)):
        return Verdict("equal")
    if changed in base.untold:
        return Verdict("untold", base.untold[changed])
    return Verdict("found", "it loads, with other outputs")


def made_copy(bases: Sequence[Base], seed: int, number: int, folder: Path) -> tuple[Base, str, str]:
    """Write copy ``number``; returns its base, the name of the altered file and what was done to it."""
    rng = random.Random(f"{seed}-{number}")
    base = rng.choice(bases)
    shutil.copytree(base.folder, folder)
    changed, what = alter(folder, base.others, rng)
    return base, changed, f"{base.folder.name}: {changed}: {what}"


def peak() -> int:
    """Most bytes that this process ever held."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def work(bases: Sequence[Base], seed: int, numbers: Sequence[int], root: Path, notes: Path) -> None:
    """Judge copies one after the other; a line to ``notes`` before and after each."""
    warnings.simplefilter("ignore")
    logging.set_verbosity_error()
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    outputs(bases[0].folder)
    with notes.open("w") as file:
        for number in numbers:
            folder = root / f"copy-{number}"
            base, changed, what = made_copy(bases, seed, number, folder)
            print(json.dumps([number, what]), file=file, flush=True)
            before = peak()
            # Not caught: a library that never returns to python is ended too, and the end says what it was.
            signal.alarm(SECONDS)
            verdict = judge(base, folder, changed)
            signal.alarm(0)
            if (more := peak() - before) > MOST_BYTES:
                verdict = Verdict("found", f"it takes {more / 1e9:.1f} GB more than a load ({verdict.said})")
            shutil.rmtree(folder)
            print(json.dumps([number, what, *verdict]), file=file, flush=True)
            if more > MOST_BYTES // 4:
                # The peak would hide what the next ones take.
                return


def start(bases: Sequence[Base], seed: int, numbers: Sequence[int], root: Path, notes: Path) -> int:
    """Fork a process that judges copies; returns its id."""
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        work(bases, seed, numbers, root, notes)
        status = 0
    except BaseException as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
    finally:
        os._exit(status)


def read_notes(notes: Path, status: int) -> Iterator[tuple[int, str, Verdict]]:
    """What a process wrote; the copy at which it ended is told by how it ended."""
    begun = None
    for line in notes.read_text().splitlines() if notes.exists() else ():
        number, what, *verdict = json.loads(line)
        begun = None if verdict else (number, what)
        if verdict:
            yield number, what, Verdict(*verdict)
    if begun is not None:
        how = signal.Signals(os.WTERMSIG(status)).name if os.WIFSIGNALED(status) else f"status {status}"
        hung = f"it takes more than {SECONDS} seconds"
        yield *begun, Verdict("found", hung if how == "SIGALRM" else f"the process ended by {how}")


def fuzz(
    bases: Sequence[Base], seed: int, numbers: Sequence[int], root: Path, processes: int = 1, batch: int = BATCH
) -> Iterator[tuple[int, str, Verdict]]:
    """Alter and judge copies; yields number, what was done, verdict.

    Raises:
        RuntimeError: a process ended without having begun a copy.
    """
    left, running, batches = collections.deque(numbers), dict[int, tuple[list[int], Path]](), itertools.count()
    try:
        while left or running:
            while left and len(running) < processes:
                taken, notes = [left.popleft() for _ in range(min(batch, len(left)))], root / f"notes-{next(batches)}"
                running[start(bases, seed, taken, root, notes)] = taken, notes
            child, status = wait(running)
            taken, notes = running.pop(child)
            done = {number: (what, verdict) for number, what, verdict in read_notes(notes, status)}
            if not done:
                raise RuntimeError(f"a process of copies {taken[0]} to {taken[-1]} ended with status {status}")
            yield from ((number, *told) for number, told in done.items())
            left.extendleft(number for number in reversed(taken) if number not in done)
    finally:
        for child in running:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)


def wait(children: Iterable[int]) -> tuple[int, int]:
    """The first of some processes to end, and its status; the process may have other children."""
    while True:
        for child in children:
            ended, status = os.waitpid(child, os.WNOHANG)
            if ended:
                return child, status
        time.sleep(0.02)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--copies", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, help="the number of one copy, which is judged and told about")
    parser.add_argument("--processes", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(1)
    numbers = range(options.copies) if options.only is None else [options.only]
    counts, began = collections.Counter[str](), time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        bases = make_bases(Path(name))
        for number, what, verdict in fuzz(bases, options.seed, numbers, Path(name), options.processes):
            counts[verdict.kind] += 1
            if verdict.kind == "found" or options.only is not None:
                print(f"--seed {options.seed} --only {number}: {what}: {verdict.kind}: {verdict.said}", flush=True)
            if (done := counts.total()) % 500 == 0:
                print(f"{done} of {len(numbers)}, {time.monotonic() - began:.0f} s: {dict(counts)}", flush=True)
    print(f"seed {options.seed}, {counts.total()} copies, {time.monotonic() - began:.0f} s: {dict(counts)}")
    return 1 if counts["found"] else 0


if __name__ == "__main__":
    sys.exit(main())
