"""Kill a tiny training run at random moments, again and again, and see that it ends as if nothing had happened.

    python tests/kill.py --kills 50

A process that has everything imported forks the runs, so that a life costs its work alone.
"""

from __future__ import annotations

import argparse
import collections
import itertools
import math
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

import torch
from tiny import TINY

from ppcl_train import pipeline
from ppcl_train.config.settings import RunConfig, with_changes


def start(config: RunConfig, folder: Path) -> int:
    """Fork a process that runs what is left of a run; returns its id."""
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        pipeline.run_stages(config, folder)
        status = 0
    except BaseException as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
    finally:
        os._exit(status)


def begun(config: RunConfig, folder: Path) -> Path:
    """Begin a run folder."""
    pipeline.begin(config, folder)
    return folder


def ended(child: int) -> bool:
    """Whether a process has ended by itself.

    Raises:
        RuntimeError: it failed.
    """
    found, status = os.waitpid(child, os.WNOHANG)
    if found and status:
        raise RuntimeError(f"a run failed: status {status}")
    return bool(found)


def position(folder: Path) -> tuple[int, float]:
    """The number of the stage that a run is in, and the share of its steps that is saved."""
    stages = pipeline.progress(folder)
    number = next((n for n, stage in enumerate(stages) if stage.state != "done"), len(stages))
    return number, stages[number].step / max(stages[number].of, 1) if number < len(stages) else 0.0


def kill(child: int, folder: Path, stage: int, share: float, length: float) -> bool:
    """Kill a process when a share of a stage of some length in seconds has run; False where it was done before."""
    until = math.inf
    while time.monotonic() < until:
        if ended(child):
            return False
        if until == math.inf:
            at, saved = position(folder)
            if at >= stage:
                until = time.monotonic() + (max(share - saved, 0) * length if at == stage else 0)
        time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return True


def contents(folder: Path) -> dict[str, bytes]:
    """All that a run leaves but its log, its curves and its lock, which hold times."""
    files = {path.relative_to(folder): path for path in folder.rglob("*") if path.is_file()}
    return {
        str(name): path.read_bytes()
        for name, path in files.items()
        if name.parts[0] not in ("log.jsonl", "tracking", ".lock")
        and not any(part.endswith(".partial") for part in name.parts)
    }


# As it is for users: what no later stage reads is deleted on the way.
RUN = with_changes(TINY, {"keep_all": False})


def main(kills: int, seed: int, config: RunConfig = RUN) -> str:
    """Compare an undisturbed run with one that is killed so many times, spread over all of it; says what happened.

    A run that ends before the last kill is compared too, and another is begun.

    Raises:
        RuntimeError: a run failed, or left other bytes.
    """
    torch.set_num_threads(1)
    rng = random.Random(seed)
    names = [stage.name for stage in pipeline.STAGES]
    with tempfile.TemporaryDirectory() as place:
        folder = begun(config, Path(place, "undisturbed"))
        child, began = start(config, folder), [time.monotonic()]
        while not ended(child):
            began += [time.monotonic()] * (position(folder)[0] + 1 - len(began))
            # A look at the folder takes milliseconds of the core that the run may need.
            time.sleep(0.02)
        began += [time.monotonic()] * (len(names) + 1 - len(began))
        lengths = [after - before for before, after in itertools.pairwise(began)]
        expected = contents(folder)

        def compare(folder: Path) -> None:
            found = contents(folder)
            if different := [name for name in {**expected, **found} if expected.get(name) != found.get(name)]:
                raise RuntimeError(f"seed {seed}: other bytes in {', '.join(sorted(different))}")

        done, runs, hit = 0, 1, collections.Counter[str]()
        folder = begun(config, Path(place, "killed-1"))
        while done < kills:
            # One moment in each of so many equal parts of the undisturbed run.
            moment = began[0] + (done + rng.random()) / kills * (began[-1] - began[0])
            stage = max(n for n, start in enumerate(began[:-1]) if start <= moment)
            share = (moment - began[stage]) / max(lengths[stage], 1e-9)
            if kill(start(config, folder), folder, stage, share, lengths[stage]):
                done += 1
                hit[[*names, "(done)"][position(folder)[0]]] += 1
                seconds = time.monotonic() - began[-1]
                print(f"kill {done} of {kills}, after {seconds:.0f} s: {dict(hit)}", file=sys.stderr)
                hit["(while writing)"] += any(path.name.endswith(".partial") for path in folder.rglob("*"))
                continue
            compare(folder)
            runs += 1
            folder = begun(config, Path(place, f"killed-{runs}"))
        child = start(config, folder)
        while not ended(child):
            time.sleep(0.01)
        compare(folder)
    where = ", ".join(f"{name} {count}" for name, count in hit.items())
    what = f"{kills} kills over {runs} run(s) of {sum(lengths):.1f} s, seed {seed}: {where}"
    return f"{what}; {len(expected)} files the same"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=time.time_ns() % 1_000_000)
    print(main(**vars(parser.parse_args())))
