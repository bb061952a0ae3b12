"""Part 3 of ``make gpu``: whole forwards at Qwen-Image's real sizes, and what a block costs at every width.

    python bench/suites/bench_gpu_model.py --out bench/results/nvidia-h100 --seconds 500
        (--only GROUP ..., --tiny on a CPU)

The models have random blocks (`model_races.models`). Each group of contestants runs in a process of its own
(`model_races.worker`). A contestant that hangs or ends that process is left out, and a new process continues without
it. ``model.json`` and ``sweep.json`` (docs/formats.md) are rewritten as results come in.

Run it after parts 1 and 2: they leave compiled kernels and a table of implementations. Without them our models spend
the time on compiling and on choosing.

Exit status: 0 when all was measured, 1 when something failed or was not reached, 2 for wrong arguments and without a
CUDA device.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from model_races import FAULT

ROOT = Path(__file__).resolve().parents[2]
SUITES = Path(__file__).resolve().parent
WORKER = SUITES / "model_races" / "worker.py"
# Seconds that each group may take of 500, in this order; the groups after it share what a group leaves.
GROUPS = {
    "dense-1024": 110,
    "dense-512": 95,
    "plans-1024": 85,
    "plans-512": 70,
    "sweep": 90,
    "short-1024": 25,
    "short-512": 25,
}
# Seconds kept for writing the last figures and ending processes.
_RESERVE = 4.0
# With fewer seconds left, a group does not start again.
_LEAST = 5.0

Row = dict[str, Any]


def write(path: Path, content: Any) -> None:
    """Write a file as a whole (`ppcl_kernels.tools.machine.write_json`)."""
    # Imported at the first use: importing torch takes seconds, in which the first process already works.
    from ppcl_kernels.tools.machine import write_json

    write_json(path, content)


def read(path: Path) -> dict[str, Any]:
    """Read what a process has written so far; empty if it has written nothing."""
    return json.loads(path.read_text()) if path.exists() else {}


class Bench:
    """Runs the groups, and keeps ``model.json`` and ``sweep.json`` up to date."""

    def __init__(self, arguments: argparse.Namespace, command: str) -> None:
        self.arguments, self.out = arguments, arguments.out
        self.command = command
        self.end = time.monotonic() + arguments.seconds - _RESERVE
        self.groups: dict[str, dict[str, Any]] = {}
        self.children: list[subprocess.Popen[str]] = []
        self.spare = self._start()

    def _start(self) -> subprocess.Popen[str]:
        """Start a process that imports and then waits, so that the next group does not wait for imports."""
        folders = (SUITES, ROOT, ROOT / "kernels", ROOT / "train")
        paths = [*map(str, folders), os.environ.get("PYTHONPATH", "")]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
        child = subprocess.Popen(
            [sys.executable, str(WORKER)],
            stdin=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env=environment,
            # Compilers start processes of their own: the whole session is ended.
            start_new_session=True,
        )
        self.children.append(child)
        return child

    def _file(self, group: str) -> Path:
        return Path(self.out).resolve() / f".model-{group}.json"

    def run(self) -> int:
        """Run the groups in turn; returns the exit status."""
        names = self.arguments.only or list(GROUPS)
        for name in names:
            self._file(name).unlink(missing_ok=True)
        try:
            for number, name in enumerate(names):
                left = sum(GROUPS[each] for each in names[number:])
                seconds = (self.end - time.monotonic()) * GROUPS[name] / left
                self.groups[name] = {"seconds": None, "status": "running", "failed": {}}
                begin = time.monotonic()
                status = self._group(name, begin + seconds)
                if status == "no CUDA device":
                    print("bench_gpu_model: no CUDA device: run on a machine with one, or with --tiny", file=sys.stderr)
                    return 2
                self.groups[name] |= {"status": status, "seconds": round(time.monotonic() - begin, 1)}
                self._write()
                print(f"{name}: {status}, {self.groups[name]['seconds']} s", flush=True)
        finally:
            for child in self.children:
                end(child)
            for name in self.groups:
                if self.groups[name]["status"] == "running":
                    self.groups[name]["status"] = "cut off"
            found = any(self._file(name).exists() for name in self.groups)
            if found:
                self._write()
            for name in names:
                self._file(name).unlink(missing_ok=True)
                self._file(name).with_suffix(".running").unlink(missing_ok=True)
        nothing: dict[str, Any] = {"results": [], "complete": False}
        content = read(self.out / "model.json") if found else nothing
        for row in content["results"]:
            if "failed" in row:
                print(f"  {row['key']} at {row['size']}: {row['failed']}", flush=True)
        return 0 if content["complete"] else 1

    def _group(self, name: str, end_at: float) -> str:
        """Run a group, again without each contestant that ended its process; returns how it ended."""
        failed = self.groups[name]["failed"]
        file = self._file(name)
        while True:
            limit = end_at - time.monotonic()
            if limit < _LEAST:
                return "out of time"
            child, self.spare = self.spare, self._start()
            spec = {
                "group": name,
                "file": str(file),
                "tiny": self.arguments.tiny,
                # The process ends by itself before it is killed.
                "seconds": 0.85 * limit,
                "limit": limit,
                "leave_out": failed,
                "inject": dict(each.rsplit("=", 1) for each in self.arguments.inject),
                "command": self.command,
            }
            file.with_suffix(".running").write_text("")
            assert child.stdin is not None
            # The process may have died at an import.
            with contextlib.suppress(BrokenPipeError):
                child.stdin.write(json.dumps(spec) + "\n")
                child.stdin.close()
            why = self._watch(child, file, end_at, self.arguments.stall or 0.6 * limit)
            if why is None:
                return "ended"
            if child.returncode == 2:
                return "no CUDA device"
            if child.returncode != FAULT:
                culprit = file.with_suffix(".running").read_text()
                if not culprit or culprit in failed:
                    return f"failed: {why}"
                failed[culprit] = why
            print(f"{name}: {why}; once more without {list(failed)[-1:] or 'it'}", file=sys.stderr, flush=True)

    def _watch(self, child: subprocess.Popen[str], file: Path, end_at: float, stall: float) -> str | None:
        """Wait for a process, and write what it measures; returns why it ended, None if all went well."""
        seen, begin = 0, time.monotonic()
        moved = begin
        while True:
            status = child.poll()
            now = max(each.stat().st_mtime_ns for each in (file, file.with_suffix(".running")) if each.exists())
            if now != seen:
                seen, moved = now, time.monotonic()
                self._write()
            if status is not None:
                if status < 0:
                    return f"killed by {signal.Signals(-status).name} after {time.monotonic() - begin:.0f} s"
                return {0: None, FAULT: "a fault of the device"}.get(status, f"exit status {status}")
            late = time.monotonic() > end_at
            if late or time.monotonic() - moved > stall:
                end(child)
                return "no time was left" if late else f"no answer for {stall:.0f} s"
            time.sleep(0.05)

    def _write(self) -> None:
        """Merge and write what all processes have measured so far."""
        parts = {name: read(self._file(name)) for name in self.groups}
        about: dict[str, Any] = next((part["machine"] for part in parts.values() if "machine" in part), {})
        rows = [self._row(name, row) for name, part in parts.items() for row in part.get("results", [])]
        predicted: dict[str, Any] = next((part["predicted"] for part in parts.values() if "predicted" in part), {})
        if table := parts.get("sweep", {}).get("table"):
            self.groups["sweep"]["failed"] |= table["left_out"]
            write(self.out / "sweep.json", {**table, "left_out": self.groups["sweep"]["failed"]})
        ended = all(group["status"] == "ended" and not group["failed"] for group in self.groups.values())
        write(
            self.out / "model.json",
            {
                "format": 2,
                "part": "model",
                **about,
                "command": self.command,
                "tiny": self.arguments.tiny,
                "complete": ended and not any("failed" in row for row in rows),
                "model": next((part["preset"] for part in parts.values() if "preset" in part), {}),
                "groups": self.groups,
                "planned": {name: plan for part in parts.values() for name, plan in part.get("planned", {}).items()},
                "predicted": predicted,
                "results": rows,
                "ratios": ratios(rows, predicted),
            },
        )

    def _row(self, group: str, row: Row) -> Row:
        why = self.groups[group]["failed"].get(row["key"])
        if why:
            return {**row, "ms": None, "host_ms": None, "device_ms": None, "failed": why}
        over = self.groups[group]["status"] != "running"
        if over and row["ms"] is None and not {"failed", "skipped"} & set(row):
            return {**row, "failed": "not reached: no time was left"}
        return row


def ratios(rows: Iterable[Row], predicted: dict[str, dict[str, float]]) -> list[dict[str, Any]]:
    """Compute the ratios that the targets ask for; both times of a ratio come from one process that took turns.

    Args:
        rows: of ``model.json``.
        predicted: size -> plan -> milliseconds by the table of costs.
    """
    timed = {
        (row["group"], row["contestant"], f"{row['plan']} {row['ratio']:g}"): row
        for row in rows
        if row["ms"] and "failed" not in row
    }
    made: list[dict[str, Any]] = []

    def add(what: str, wanted: str | None, value: float, row: Row, **more: Any) -> None:
        about = {name: row[name] for name in ("group", "contestant", "size", "text_tokens", "plan", "ratio")}
        made.append({"what": what, "wanted": wanted, "value": round(value, 4), **about, **more})

    for (group, contestant, plan), row in timed.items():
        if not contestant.startswith("ours"):
            continue
        small, graphs = row["size"] == 512, contestant == "ours graphs"
        for rival in ("eager", "compiled", "compiled real RoPE", "reduce-overhead"):
            other = timed.get((group, rival, plan))
            if other is None:
                continue
            wanted = None
            if plan != "dense 1":
                wanted = ">= 0.98" if rival == "compiled" else None
            elif group.startswith("dense") and small == graphs:
                # The targets at 512 x 512 are for CUDA graphs, those at 1024 x 1024 are not.
                wanted = {"eager": ">= 1.5", "compiled": ">= 1.05"}.get(rival)
            add(f"speed to {rival}", wanted, other["ms"] / row["ms"], row)
        dense = timed.get((group, contestant, "dense 1"))
        if dense is None or plan == "dense 1":
            continue
        share = row["ms"] / dense["ms"]
        add("time ratio over FLOPs ratio", None, share / row["flops_ratio"], row, time_ratio=round(share, 4))
        costs = predicted.get(str(row["size"]), {})
        if {plan, "dense 1"} <= set(costs):
            planned = costs[plan] / costs["dense 1"]
            add("time ratio over planned ratio", "<= 1.03", share / planned, row, time_ratio=round(share, 4))
    return made


def end(child: subprocess.Popen[str]) -> None:
    """Kill a process and all processes that it started."""
    if child.poll() is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        child.wait()


def main(given: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of model.json and sweep.json")
    parser.add_argument("--seconds", type=float, default=500.0, help="for everything")
    parser.add_argument("--only", nargs="+", choices=list(GROUPS), help="these groups, in this order")
    parser.add_argument("--tiny", action="store_true", help="the same code on a CPU, at sizes whose times mean nothing")
    parser.add_argument("--stall", type=float, help="seconds without news after which a process is ended")
    parser.add_argument(
        "--inject", action="append", default=[], metavar="NAME=raise|kill|hang", help="a fault, for tests"
    )
    arguments = parser.parse_args(given)
    arguments.out.mkdir(parents=True, exist_ok=True)
    shown = given if given is not None else sys.argv[1:]
    bench = Bench(arguments, " ".join(["python bench/suites/bench_gpu_model.py", *shown]))
    # A time limit from outside then ends the processes too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    return bench.run()


if __name__ == "__main__":
    sys.exit(main())
