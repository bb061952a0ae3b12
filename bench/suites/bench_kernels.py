"""Part 2 of ``make gpu``: which implementation of each operation is fastest, at the shapes that a model asks for.

    python bench/suites/bench_kernels.py --out bench/results/nvidia-h200 --seconds 500
    python bench/suites/bench_kernels.py --tiny     (on a CPU, in triton's interpreter; its times mean nothing)

The cases are what a Qwen-Image block asks its operations for: a random block of the real sizes runs once, its calls are
recorded, and each call is a case (`kernel_races.cases`). The contestants of a case are all implementations that
`ppcl_rt.ops` has for it, and rivals: the plain-torch chain compiled, FlexAttention, for a product the product alone,
for a norm a copy of the same bytes (`kernel_races.rivals`).

Every result is compared with that of plain torch before and after it is timed, tile by tile
(`ppcl_rt.ops.agreement.agree`). All contestants of a case are timed in turn, round by round. Before each call a
quarter of a gigabyte is read: inputs then come from memory, and no dirty cache line of an earlier call is written back
inside the timing. The device then waits until python is ahead of it. Milliseconds are medians. FLOPs and bytes are the
least that the operation needs: inputs read once, outputs written once.

``choose.json`` holds every time. ``implementations.json`` holds the winners in the format that `ppcl_rt.ops.table`
reads; the package ships copies as ``ppcl_rt/ops/tables/<device>.json``. Both files are rewritten after each case. The
races run in a program of their own (`kernel_races.worker`). A contestant that hangs or ends that process is named and
left out, and a new process continues without it.

Exit status: 0 all was measured, 1 something failed or was not reached, 2 bad usage or no device.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

if "--tiny" in sys.argv:
    # Triton reads this when a kernel is defined, which the imports below do.
    os.environ.setdefault("TRITON_INTERPRET", "1")

# This process may not touch the driver of CUDA before it starts others: torch then asks NVML instead.
os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")

from kernel_races import LOST

from ppcl_kernels.tools.children import Job, Outcome, run_all, terminated_as_exit
from ppcl_kernels.tools.machine import write_json

ROOT = Path(__file__).resolve().parents[2]
SUITES = Path(__file__).resolve().parent
WORKER = SUITES / "kernel_races" / "worker.py"
_ENDS = {LOST: "a fault of the device", -signal.SIGALRM: "hangs"}


def _program(arguments: Sequence[str], program: Sequence[str], lines: Path) -> list[str]:
    """Return the command of a process that races; runs in that process, before it becomes the program."""
    folders = (SUITES, ROOT, ROOT / "kernels", ROOT / "train")
    paths = [*map(str, folders), os.environ.get("PYTHONPATH", "")]
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    return [sys.executable, *program, *arguments, str(lines)]


def race_all(
    preset: str, out: Path, seconds: float, stall: int, command: str, program: Sequence[str] = (str(WORKER),)
) -> int:
    """Race in child processes until nothing is left; what ended a process is left out of the next.

    Args:
        preset: its name.
        out: folder of choose.json and implementations.json.
        seconds: for everything.
        stall: seconds that one contestant may take.
        command: the command line, for the file.
        program: the python script that races (`kernel_races.worker`).

    Returns:
        The exit status.
    """
    deadline = time.monotonic() + seconds
    out.mkdir(parents=True, exist_ok=True)
    content: dict[str, Any] = {"part": "choose", "device": None, "status": None, "command": command}
    write_json(out / "choose.json", content | {"complete": False, "left_out": {}, "results": []})
    (out / "implementations.json").unlink(missing_ok=True)
    running = out / ".choose.running"
    while True:
        ended: list[Outcome] = []
        arguments = (preset, str(out.resolve()), str(deadline - 2), str(stall))
        running.write_text("")
        # The child prints one line for each case.
        start = functools.partial(_program, arguments, program)
        run_all([Job("races", seconds, command=start, prints=True)], 1, deadline, ended.append)
        (outcome,) = ended
        said: dict[str, Any] = {}
        for row in outcome.said:
            said |= row
        if "no_device" in said:
            print("bench_kernels: no CUDA device: run on a machine with one, or with --tiny", file=sys.stderr)
            return 2
        culprit = running.read_text()
        running.unlink()
        content = json.loads((out / "choose.json").read_text())
        if "complete" in said or outcome.late or not culprit or culprit in content["left_out"]:
            break
        how = _ENDS.get(outcome.status or 0, outcome.how)
        key, _, names = culprit.partition(": ")
        # Of several that were timed in turn the culprit is not known: all are left out.
        content["left_out"] |= {culprit: how, **{f"{key}: {name}": how for name in names.split(", ") if name}}
        write_json(out / "choose.json", content)
        print(f"left out: {culprit}: {how}", flush=True)
    failed = [row for row in content["results"] if "failed" in row and row["implementation"]]
    content["complete"] = said.get("complete", False)
    write_json(out / "choose.json", content)
    for row in failed:
        print(f"failed: {row['op']}, {row['key']}, {row['contestant']}: {row['failed']}")
    winners = sum(row["taken"] for row in content["results"])
    print(f"{winners} winners in {out / 'implementations.json'}", flush=True)
    return 0 if content["complete"] and not failed and not content["left_out"] else 1


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    assert __doc__
    parser = argparse.ArgumentParser(prog="python bench/suites/bench_kernels.py", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="folder of choose.json and implementations.json (a temporary one)")
    parser.add_argument("--seconds", type=float, default=500, help="for everything (%(default)s)")
    parser.add_argument("--stall", type=int, default=60, help="seconds that one contestant may take (%(default)s)")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes on a CPU")
    options = parser.parse_args(arguments)
    command = " ".join(["python bench/suites/bench_kernels.py", *(sys.argv[1:] if arguments is None else arguments)])
    preset = "tiny" if options.tiny else "full"
    with terminated_as_exit(), tempfile.TemporaryDirectory() as folder:
        return race_all(preset, options.out or Path(folder), options.seconds, options.stall, command)


if __name__ == "__main__":
    sys.exit(main())
