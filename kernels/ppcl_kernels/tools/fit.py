"""Check which kernels and tiles are fit to run on this machine, before anything else runs them.

    python -m ppcl_kernels.tools.fit --out bench/results/nvidia-h200 --seconds 240

A fault on a CUDA device makes its process useless, and a kernel that hangs takes all the time that is left. So each
kernel and tile is checked in a process of its own, four at a time, with 25 s each. The stages are:

1. *look*: the device, and which kernels and tiles there are.
2. *compile*: all kernels, for this device, on all cores; next to that, what can be imported for later parts.
3. *check*: each kernel and tile on full-size inputs in bf16. Every 64 x 64 tile of every result is compared with
   float64. Results are poisoned first, and nothing around them may be written. 200 runs have to be equal bit by bit,
   and so have prepared launches and two replays of a captured graph.
4. *sanitize*: compute-sanitizer on small shapes, if it is installed, in the time that is left.

``fit.json`` holds what was found, ``allowed.json`` which tiles may run (`ppcl_kernels.allowed`). Both are rewritten
after each process, so a run that is ended leaves its results. A tile that was not reached may not run.

Without a GPU the same stages run in triton's interpreter (TRITON_INTERPRET=1), on tiny shapes and in float32.

Exit status: 0 all are fit, 1 something was left out, 2 bad usage or no device.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import shutil
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

# Forks need CUDA's driver untouched in this process: torch asks NVML instead, where anything asks for devices.
os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")

import torch

from ppcl_kernels._triton import INTERPRETED, triton
from ppcl_kernels.allowed import VARIABLE, tile_name
from ppcl_kernels.launch import Target
from ppcl_kernels.tools import aot
from ppcl_kernels.tools.cases import FULL, SMALL, TINY, Case, Setting, Shape
from ppcl_kernels.tools.check import check
from ppcl_kernels.tools.children import NOT_REACHED, Job, Outcome, Say, run_all, terminated_as_exit
from ppcl_kernels.tools.machine import machine, write_json

ALL_CASES = "ppcl_kernels.tools.cases:all_cases"
# Modules that later parts import; missing ones are reported. Of the runtime one that imports what it is built on.
RUNTIME = "ppcl_rt.model.pluggable"
LATER = ("diffusers", "pydantic", RUNTIME, "pytest", "pytest_benchmark", "safetensors", "scipy", "rich", "typer")
# The compile stage ends at this share of the whole time; compute-sanitizer starts only if this many seconds are left.
_COMPILE_SHARE, _SANITIZER_SECONDS = 0.35, 15.0
_LOOK_SECONDS, _COMPILE_SECONDS = 60.0, 60.0

Unit = tuple[str, str]
Cases = Callable[[Setting], Sequence[Case]]


class _Findings:
    """What was found so far; `save` writes it to disk."""

    def __init__(self, out: Path, command: str) -> None:
        self.out = out
        self.units: dict[Unit, dict[str, Any]] = {}
        self.content: dict[str, Any] = {
            "part": "fit",
            "device": None,
            "status": None,
            "command": command,
            "imports": {},
            "compiled": [],
            "sanitized": [],
            "results": [],
        }
        self.started = time.monotonic()

    def expect(self, units: Sequence[Unit]) -> None:
        """Set which kernels and tiles there are; none may run until it was checked."""
        self.units = {unit: {"ok": False, "why": NOT_REACHED} for unit in units}

    def judge(self, unit: Unit, why: str) -> None:
        """Record that a kernel and tile is fit, or why it is not; the first reason stays."""
        before = self.units[unit]
        if not before["ok"] and before["why"] != NOT_REACHED:
            return
        self.units[unit] = {"ok": not why} | ({"why": why} if why else {})

    def save(self, status: int | None = None) -> None:
        """Write both files."""
        kernels: dict[str, dict[str, Any]] = {}
        for (kernel, tile), verdict in self.units.items():
            kernels.setdefault(kernel, {})[tile] = verdict
        self.content |= {"status": status, "seconds": round(time.monotonic() - self.started, 1)}
        versions = {name: self.content.get(name) for name in ("torch", "triton", "cuda", "cudnn", "driver")}
        write_json(self.out / "fit.json", self.content)
        about = {"device": self.content["device"], "versions": versions}
        write_json(self.out / "allowed.json", {**about, "kernels": kernels})


def _unit(case: Case) -> Unit:
    return case.kernel, tile_name(case.tile)


def _setting(device: str, shape: Shape) -> Setting:
    cuda = device == "cuda"
    return Setting(torch.device(device), torch.bfloat16 if cuda else torch.float32, shape if cuda else TINY)


def _look(cases: Cases, device: str, say: Say) -> None:
    """Report the device, the versions, and the kernels and tiles; runs in a child, since it uses CUDA."""
    say({"imports": {"torch": torch.__version__, "triton": getattr(triton, "__version__", None)}})
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        say({"no_device": "torch sees no CUDA device: run on a machine with one, or --device cpu"})
        return
    if device == "cpu" and not INTERPRETED:
        say({"no_device": "no CUDA device: run on a machine with one, or set TRITON_INTERPRET=1 (tiny shapes)"})
        return
    target = Target.of(torch.device(device))
    limits = (target.arch, target.shared_bytes, target.multiprocessors)
    say({"kind": device, "target": limits, "machine": machine()})
    count = Counter[Unit](map(_unit, cases(_setting(device, FULL))))
    say({"units": [(*unit, forms) for unit, forms in count.items()]})


def _import(names: Sequence[str], say: Say) -> None:
    """Report which modules can be imported, and their versions; runs in a child."""
    for name in names:
        try:
            say({name: str(getattr(importlib.import_module(name), "__version__", "there"))})
        except Exception as error:
            say({name: f"missing: {' '.join(str(error).split())}"[:200]})


def _compile(target: Target, number: int, say: Say) -> None:
    """Compile one case of `aot` into triton's cache, where later processes find it; runs in a child."""
    case = list(aot.cases(target))[number]
    started = time.monotonic()
    try:
        binary = case.launch().compile(target)
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[-1]
        say({"why": f"does not compile: {reason}"[:300]})
        return
    about = {"why": "", "seconds": round(time.monotonic() - started, 1), "shared_bytes": binary.metadata.shared}
    try:
        about["registers"], about["spilled_bytes"], about["mma"] = aot.inspect(binary)
    except Exception as error:
        # Without a disassembler these figures are missing, which does no harm.
        about["inspect"] = str(error)[:200]
    say(about)


def _check_unit(cases: Cases, setting: Setting, unit: Unit, repeats: int, say: Say) -> None:
    """Check all forms of one kernel and tile until one raises, which may have lost the device; runs in a child."""
    torch.set_num_threads(1)
    raised = False

    def listen(row: dict[str, Any]) -> None:
        nonlocal raised
        raised = raised or bool(row.get("raised"))
        say(row)

    with torch.no_grad():
        for case in cases(setting):
            if _unit(case) == unit and not raised:
                check(case, setting.device, repeats, listen)


def _run_small(cases: Cases, device: str, kernel: str, tiles: Sequence[str], lines: Path) -> int:
    """Run small shapes of a kernel once each; a program of its own, under compute-sanitizer."""
    setting = _setting(device, SMALL)
    # If the tool cannot work with the device, it fails here, before any kernel could be blamed.
    torch.ones(1, device=setting.device).sum().item()
    with torch.no_grad(), lines.open("a") as file:
        for case in cases(setting):
            if case.kernel == kernel and tile_name(case.tile) in tiles:
                print(json.dumps({"tile": tile_name(case.tile), "form": case.form}), file=file, flush=True)
                case.make().call()
                if device == "cuda":
                    torch.cuda.synchronize()
        print(json.dumps({"finished": True}), file=file, flush=True)
    return 0


def _listed(name: str) -> Cases:
    module, _, function = name.partition(":")
    try:
        found: Cases = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f'--cases is "{name}", wanted module:function ({error})') from None
    return found


def _in_turn(units: Sequence[Unit]) -> list[Unit]:
    """Order units by tile, the best guess of every kernel first, since the time may run out."""
    place: Counter[str] = Counter()
    order: list[tuple[int, int, Unit]] = []
    for unit in units:
        order.append((place[unit[0]], len(order), unit))
        place[unit[0]] += 1
    return [unit for _, _, unit in sorted(order)]


class _Fit:
    """A run; its methods are the stages, in their order."""

    def __init__(self, options: argparse.Namespace, cases: Cases, command: str) -> None:
        self.options, self.cases = options, cases
        self.deadline = time.monotonic() + options.seconds
        self.findings = _Findings(options.out, command)
        self.kind, self.target = "", Target("", 0, 0)
        self.forms: dict[Unit, int] = {}

    def look(self) -> str:
        """Record the device and what there is to check; returns why nothing can be checked, empty if it can."""
        findings, problem = self.findings, ""

        def done(outcome: Outcome) -> None:
            nonlocal problem
            said: dict[str, Any] = {}
            for row in outcome.said:
                said |= row
            findings.content |= said.get("machine", {})
            findings.content["imports"] |= said.get("imports", {})
            problem = said.get("no_device", "")
            if not problem and "units" not in said:
                problem = f"looking at the device failed: {outcome.how or 'no kernels'} {' '.join(outcome.log[-1:])}"
            elif not problem:
                self.kind, self.target = said["kind"], Target(*said["target"])
                self.forms = {(kernel, tile): forms for kernel, tile, forms in said["units"]}
                findings.expect(_in_turn(list(self.forms)))
            findings.save()

        run_all([Job("device", _LOOK_SECONDS, partial(_look, self.cases, self.options.device))], 1, self.deadline, done)
        if not problem:
            about = findings.content
            names = ("torch", "triton", "cuda", "cudnn", "driver", "python")
            print(f"{about['device']}: " + ", ".join(f"{name} {about[name]}" for name in names), flush=True)
        return problem

    def _imported(self, outcome: Outcome) -> None:
        """Record what later parts can import; nothing of this part waits for it."""
        imports = self.findings.content["imports"]
        for row in outcome.said:
            imports |= row
        # The process died in the first of these imports.
        imports |= {name: f"missing: {outcome.how}" for name in LATER if name not in imports}
        missing = [name for name in LATER if imports[name].startswith("missing")]
        print(
            f"imports: all of this part; {', '.join(missing) or 'nothing'} missing for the parts after it", flush=True
        )

    def compile(self) -> None:
        """Compile everything on all cores, and import what later parts need; what does not compile is not checked.

        Without a GPU nothing is compiled: triton's interpreter runs the kernels.
        """
        every = enumerate(aot.cases(self.target)) if self.kind != "cpu" else ()
        numbers = {number: (case.kernel, case.tile, case.shape) for number, case in every}
        order = {unit: place for place, unit in enumerate(self.findings.units)}
        numbers = dict(sorted(numbers.items(), key=lambda item: order.get(item[1][:2], len(order))))

        def done(outcome: Outcome) -> None:
            if outcome.job.name == "imports":
                self._imported(outcome)
                self.findings.save()
                return
            kernel, tile, shape = numbers[outcome.job.name]
            row: dict[str, Any] = {"kernel": kernel, "tile": tile, "shape": shape}
            # A compile that was cut off or not begun decides nothing: the check of the kernel compiles it.
            unknown = outcome.late or outcome.status is None
            row |= outcome.said[-1] if outcome.said else {"why": "" if unknown else outcome.how, "cut": outcome.how}
            self.findings.content["compiled"].append(row)
            if row["why"] and (kernel, tile) in self.forms:
                self.findings.judge((kernel, tile), f"{shape}: {row['why']}")
            self.findings.save()

        until = self.findings.started + _COMPILE_SHARE * self.options.seconds
        jobs = [Job("imports", _LOOK_SECONDS, partial(_import, LATER))]
        jobs += [Job(number, _COMPILE_SECONDS, partial(_compile, self.target, number)) for number in numbers]
        run_all(jobs, os.cpu_count() or 1, min(until, self.deadline), done)
        rows = self.findings.content["compiled"]
        failed = sum(bool(row["why"]) for row in rows)
        took = time.monotonic() - self.findings.started
        if numbers:
            print(f"{took:4.0f} s  compiled {len(rows) - failed} of {len(rows)} kernels, {failed} failed", flush=True)

    def check(self) -> None:
        """Check each kernel and tile that compiled, in a process of its own."""
        setting = _setting(self.kind, FULL)

        def done(outcome: Outcome) -> None:
            unit = outcome.job.name
            rows = [{"kernel": unit[0], "tile": unit[1], **row} for row in outcome.said if "ok" in row]
            self.findings.content["results"] += rows
            self.findings.judge(unit, self._why(outcome, rows))
            self.findings.save()
            for row in rows:
                print(self._line(unit, row), flush=True)
            if len(rows) < self.forms[unit]:
                print(self._line(unit, {"form": "", "ok": False, "why": self.findings.units[unit]["why"]}), flush=True)

        jobs = [
            Job(unit, self.options.unit_seconds, partial(_check_unit, self.cases, setting, unit, self.options.repeats))
            for unit, verdict in self.findings.units.items()
            if verdict["ok"] or verdict["why"] == NOT_REACHED
        ]
        run_all(jobs, self.options.at_once, self.deadline, done)

    def _why(self, outcome: Outcome, rows: Sequence[dict[str, Any]]) -> str:
        """Return what is wrong with a kernel and tile, empty if nothing is."""
        for row in rows:
            if not row["ok"]:
                return f"{row['form']}: {row['why']}"
        if outcome.status == 0 and len(rows) == self.forms[outcome.job.name]:
            return ""
        how = outcome.how or f"ended after {len(rows)} of {self.forms[outcome.job.name]} forms"
        last = outcome.said[-1] if outcome.said else {}
        if "stage" in last:
            return f"{last['form']}: {how} in {last['stage']}"
        return " ".join([how, *outcome.log[-1:]])

    def _line(self, unit: Unit, row: dict[str, Any]) -> str:
        took = time.monotonic() - self.findings.started
        found = row.get("why", "")
        if row["ok"]:
            share = max(row["error_rms"], row["error_max"]) / row["limit"] if row["limit"] else 0.0
            detours = [f"prepared launches go through triton: {why}" for why in row.get("detours", ())]
            found = f"fit, error {share:.2f} of its limit in {row['tiles']} tiles, {row['repeats']} runs equal"
            found = ", ".join((found, *detours))
        return f"{took:4.0f} s  {' '.join(unit)}: {', '.join(filter(None, (row['form'], found)))}"

    def sanitize(self) -> None:
        """Run compute-sanitizer on small shapes of what is fit so far, one process for each kernel."""
        tool = self.options.sanitizer
        if tool is None or self.deadline - time.monotonic() < _SANITIZER_SECONDS:
            why = "there is no compute-sanitizer" if tool is None else "no time left"
            self.findings.content["sanitized"].append({"kernel": "all", "ok": None, "why": why})
            return
        fit: dict[str, list[str]] = {}
        for (kernel, tile), verdict in self.findings.units.items():
            if verdict["ok"]:
                fit.setdefault(kernel, []).append(tile)

        def command(kernel: str, lines: Path) -> list[str]:
            # Freed memory is returned at once, so that no other tensor's memory follows a tensor.
            os.environ["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"
            program = [sys.executable, "-m", "ppcl_kernels.tools.fit", "--cases", self.options.cases]
            small = [
                "--sanitized",
                kernel,
                "--tiles",
                ",".join(fit[kernel]),
                "--lines",
                str(lines),
                "--device",
                self.kind,
            ]
            # Libraries ask the driver for features that it lacks, and continue: only errors of kernels count.
            memcheck = [tool, "--tool", "memcheck", "--report-api-errors", "no", "--error-exitcode", "99"]
            return [*memcheck, *program, *small, "--out", str(lines.parent)]

        def done(outcome: Outcome) -> None:
            kernel = outcome.job.name
            last = outcome.said[-1] if outcome.said else {}
            row: dict[str, Any] = {"kernel": kernel, "ok": None, "why": outcome.how, "log": outcome.log}
            if outcome.status == 0 and "finished" in last:
                row = {"kernel": kernel, "ok": True, "tiles": fit[kernel]}
            elif outcome.status == 99 and "tile" in last:
                # The first error of a kernel ends the CUDA context, so the tile that ran last has it. Any other end of
                # the process is the tool's or the machine's: all this ran without the tool before.
                said = [line.lstrip("= ") for line in outcome.log if line.startswith("========= ")]
                wrong = [line for line in said if any(word in line for word in ("Invalid", "Misaligned", "Error"))]
                row |= {"ok": False, "why": f"compute-sanitizer: {(wrong or said or [outcome.how])[0]}"}
                self.findings.judge((kernel, last["tile"]), f"{last['form']}: {row['why']}")
            self.findings.content["sanitized"].append(row)
            self.findings.save()
            took = time.monotonic() - self.findings.started
            found = {True: "no error", False: row.get("why"), None: f"not finished, {row.get('why')}"}[row["ok"]]
            print(f"{took:4.0f} s  compute-sanitizer, {kernel}: {found}", flush=True)

        jobs = [Job(kernel, self.options.seconds, command=partial(command, kernel)) for kernel in fit]
        run_all(jobs, self.options.at_once, self.deadline, done)


def _parser() -> argparse.ArgumentParser:
    assert __doc__
    parser = argparse.ArgumentParser(prog="python -m ppcl_kernels.tools.fit", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of fit.json and allowed.json")
    parser.add_argument("--seconds", type=float, default=240, help="for everything (%(default)s)")
    parser.add_argument("--unit-seconds", type=float, default=25, help="for a kernel and tile (%(default)s)")
    parser.add_argument("--at-once", type=int, default=4, help="processes on the device (%(default)s)")
    parser.add_argument("--repeats", type=int, help="runs that have to be equal (200; 2 in the interpreter)")
    parser.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto")
    parser.add_argument("--sanitizer", default=shutil.which("compute-sanitizer"), help="its path (%(default)s)")
    parser.add_argument("--cases", default=ALL_CASES, help="module:function that lists them (%(default)s)")
    # Options of the program that runs under compute-sanitizer.
    for name in ("--sanitized", "--tiles"):
        parser.add_argument(name, help=argparse.SUPPRESS)
    parser.add_argument("--lines", type=Path, help=argparse.SUPPRESS)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = _parser()
    options = parser.parse_args(arguments)
    try:
        cases = _listed(options.cases)
    except ValueError as error:
        parser.error(str(error))
    # Check everything, also what an earlier run left out.
    os.environ.pop(VARIABLE, None)
    if options.sanitized:
        return _run_small(cases, options.device, options.sanitized, options.tiles.split(","), options.lines)
    options.repeats = options.repeats or (2 if INTERPRETED else 200)
    command = " ".join(["python -m ppcl_kernels.tools.fit", *(sys.argv[1:] if arguments is None else arguments)])
    with terminated_as_exit():
        run = _Fit(options, cases, command)
        if problem := run.look():
            print(f"fit: {problem}", file=sys.stderr)
            run.findings.save(2)
            return 2
        run.compile()
        run.check()
        run.sanitize()
        return _finish(run)


def _finish(run: _Fit) -> int:
    left_out = {unit: verdict["why"] for unit, verdict in run.findings.units.items() if not verdict["ok"]}
    status = 1 if left_out else 0
    run.findings.save(status)
    for unit, why in left_out.items():
        print(f"left out: {' '.join(unit)}: {why}")
    took = time.monotonic() - run.findings.started
    print(f"{len(run.findings.units) - len(left_out)} of {len(run.findings.units)} are fit, {took:.0f} s", flush=True)
    return status


if __name__ == "__main__":
    sys.exit(main())
