"""Run checks and benches on a machine with a GPU, in parts of a few minutes.

    [PYTHON=python3] bash bench/gpu.sh [PART ...]          or: make gpu [PART=1]

    1  fit      check which kernels are fit to run here (`ppcl_kernels.tools.fit`)                    240 s
    2  choose   which implementation is the fastest (bench/suites/bench_kernels.py)                   500 s
    3  model    whole forwards, and a sweep over widths (bench/suites/bench_gpu_model.py)             500 s
       tests    the tests that need a GPU; only when named                                            300 s

Without a part: 1, 2 and 3. After part 1 only kernels that passed it are run. If part 1 ended before it had listed the
kernels, none is run: part 3 runs plain torch, part 2 and the tests are left out with status 1. Each part writes its own
``bench/results/<device>/<part>.json`` while it runs, so it leaves its results however it ends. How it ended is added to
the file. ``RESULTS`` names another folder than bench/results.

Exit status: 0 all parts passed, 1 one did not, 2 bad usage or no CUDA device.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ppcl_kernels.allowed import VARIABLE
from ppcl_kernels.tools.children import terminated_as_exit
from ppcl_kernels.tools.machine import slug, write_json

# Seconds that a part has to write its last results after it was asked to end.
GRACE = 10.0
# A part is told this many seconds less than it has, so that it ends by itself.
_SPARE = 8.0


class Part(NamedTuple):
    """A part: its number on the command line, its seconds, and its command, given a folder and seconds."""

    number: str
    seconds: float
    command: Callable[[Path, float], list[str]]


def _fit(folder: Path, seconds: float) -> list[str]:
    return ["-m", "ppcl_kernels.tools.fit", "--out", str(folder), "--seconds", f"{seconds:g}"]


def _choose(folder: Path, seconds: float) -> list[str]:
    return ["bench/suites/bench_kernels.py", "--out", str(folder), "--seconds", f"{seconds:g}"]


def _model(folder: Path, seconds: float) -> list[str]:
    return ["bench/suites/bench_gpu_model.py", "--out", str(folder), "--seconds", f"{seconds:g}"]


def _tests(folder: Path, seconds: float) -> list[str]:
    # Tests marked gpu, and the tests of kernels and of models that use them, which run natively on a GPU. They compile
    # hundreds of small kernels: on all cores if pytest-xdist is installed.
    workers = ["-n", "12"] if importlib.util.find_spec("xdist") else []
    # A file that cannot be imported there is reported, and the others run.
    options = ["-p", "ppcl_kernels.tools.pytest_log", "--continue-on-collection-errors", *workers]
    return ["-m", "pytest", *options, *GPU_TESTS]


# Files named one by one: a package that only another test imports may be missing on that machine.
GPU_TESTS = ("tests/laws/test_gpu.py", "tests/kernels/test_kernels.py", "tests/laws/test_backends.py")
PARTS = {
    "fit": Part("1", 240, _fit),
    "choose": Part("2", 500, _choose),
    "model": Part("3", 500, _model),
    "tests": Part("tests", 300, _tests),
}
# Parts that mean nothing without our kernels.
_KERNELS_ONLY = ("choose", "tests")
# Runs in a process of its own: this process has to survive a fault of the driver.
_ASK = (
    "import json, torch; from ppcl_kernels.tools.machine import machine; "
    "assert torch.cuda.is_available(); print(json.dumps(machine()))"
)


def about_device() -> dict[str, Any] | None:
    """Return device and versions (`ppcl_kernels.tools.machine`), None if python sees no CUDA device."""
    try:
        done = subprocess.run([sys.executable, "-c", _ASK], capture_output=True, text=True, timeout=120)
        return json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else None
    except (subprocess.SubprocessError, ValueError, IndexError):
        return None


def run_part(name: str, folder: Path, about: dict[str, Any], checked: bool = False) -> int:
    """Run a part within its time limit, and add to its file how it ended.

    Args:
        name: of the part.
        folder: for results.
        about: device and versions.
        checked: whether part 1 came before it in this run, and so has to have listed the kernels.

    Returns:
        The exit status of the part.
    """
    part, path, allowed = PARTS[name], folder / f"{name}.json", folder / "allowed.json"
    command = [sys.executable, *part.command(folder.resolve(), part.seconds - _SPARE)]
    # Results of an earlier run would be taken for those of this one.
    for stale in (path, allowed) if name == "fit" else (path,):
        stale.unlink(missing_ok=True)
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", "PPCL_TESTS_JSON": str(path.resolve())}
    # Kernels have to run natively.
    environment.pop("TRITON_INTERPRET", None)
    # The tables of implementations that a model makes are results too.
    environment.setdefault("PPCL_CACHE", str(folder.resolve() / "cache"))
    why = ""
    if name != "fit" and allowed.exists():
        environment[VARIABLE] = str(allowed.resolve())
    if name != "fit" and (checked or allowed.exists()) and not _read(allowed).get("kernels"):
        # An empty list would allow every kernel, also one that hangs.
        why = "part 1 ended before it had listed the kernels that are fit"
        environment.pop(VARIABLE, None)
        environment["PPCL_BACKEND"] = "torch"
    print(f"== {part.number} {name}, at most {part.seconds:g} s: {' '.join(command)}", flush=True)
    started = time.monotonic()
    if why and name in _KERNELS_ONLY:
        print(f"== {name} is left out: {why}", flush=True)
        status = 1
    else:
        if why:
            print(f"== {name} runs without our kernels: {why}", flush=True)
        status = _limited(command, environment, part.seconds)
    content = _read(path) | ({"without_kernels": why} if why else {})
    content = {"part": name, **about, **{k: v for k, v in content.items() if v is not None}, "status": status}
    content["seconds"] = round(time.monotonic() - started, 1)
    content["command"] = f"bash bench/gpu.sh {name}"
    write_json(path, {**content, "results": content.get("results", [])})
    print(f"== {name} ended with status {status} after {content['seconds']:.0f} s: {path}", flush=True)
    return status


def _limited(command: Sequence[str], environment: dict[str, str], seconds: float) -> int:
    """Run a command within a time limit; returns its exit status, or 124 (as `timeout` does) if it was ended."""
    # A session of its own, which is ended as a whole.
    process = subprocess.Popen(command, env=environment, start_new_session=True)
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(GRACE)
        return 124
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    assert __doc__
    parser = argparse.ArgumentParser(prog="bash bench/gpu.sh", description=__doc__.splitlines()[0])
    parser.add_argument("part", nargs="*", help="1 or fit, 2 or choose, 3 or model, tests; none for 1, 2 and 3")
    parser.add_argument("--results", type=Path, default=Path(os.environ.get("RESULTS", "bench/results")))
    options = parser.parse_args(arguments)
    numbers = {part.number: name for name, part in PARTS.items()}
    names = [numbers.get(name, name) for name in options.part] or ["fit", "choose", "model"]
    for name in names:
        if name not in PARTS:
            there = ", ".join(dict.fromkeys(word for other, part in PARTS.items() for word in (part.number, other)))
            print(f"gpu.sh: there is no part {name}; there are: {there}", file=sys.stderr)
            return 2
    about = about_device()
    if about is None:
        print(
            f"gpu.sh: {sys.executable} sees no CUDA device: run on a machine with one, or name a python by PYTHON=...",
            file=sys.stderr,
        )
        return 2
    folder = options.results / slug(about["device"])
    with terminated_as_exit():
        statuses = [run_part(name, folder, about, "fit" in names[:place]) for place, name in enumerate(names)]
    return 1 if any(statuses) else 0


if __name__ == "__main__":
    sys.exit(main())
