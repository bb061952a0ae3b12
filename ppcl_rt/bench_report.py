"""``ppcl bench``: what was measured on GPUs, as tables, and which of our targets it meets.

Results lie in ``bench/results/<device>/<part>.json``, written by ``bench/gpu.sh``. This module imports nothing of ours,
so that a machine without diffusers can load it by its path.
"""

from __future__ import annotations

import json
import platform
import re
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple
from xml.etree import ElementTree

import typer
from rich.console import Console
from rich.table import Table

PARTS = ("tests", "kernels", "model")
# Columns that the tables need; narrower terminals wrap lines.
_WIDTH = 160
_NOTE = 60
# 1024^2 with 4096 image and 512 text tokens: where the targets are set.
_MAIN = {"image": 4096, "text": 512}
_CASE = ("op", "image", "text", "batch", "width", "masked")
_NUMBERS = ("ms", "error_max", "error_rms", "over_eager", "of_ceiling", "rate", "time_to_dense")

Row = dict[str, Any]
Results = Annotated[Path, typer.Option(help="folder of <device>/<part>.json")]

app = typer.Typer(help="What was measured on GPUs, and how it compares with the targets.")


class Goal(NamedTuple):
    """A target, and what was measured for it.

    Attributes:
        name: what is compared with what.
        sign: ``>=`` or ``<=``.
        bound: the target.
        measured: (value, where) of every case that it asks about; the worst counts.
    """

    name: str
    sign: str
    bound: float
    measured: list[tuple[float, str]]

    def judged(self) -> dict[str, Any]:
        """Return the goal with its worst value; value, where and met are None where nothing was measured."""
        pick = min if self.sign == ">=" else max
        value, where = pick(self.measured) if self.measured else (None, None)
        met = None if value is None else value >= self.bound if self.sign == ">=" else value <= self.bound
        return {
            "target": self.name,
            "wanted": f"{self.sign} {self.bound:g}",
            "value": value,
            "met": met,
            "where": where,
        }


def describe(row: Row) -> str:
    """Name the case of a row."""
    width = f", {row['width']} % wide" if row["width"] != 100 else ""
    return f"{row['image']} + {row['text']} tokens, batch {row['batch']}{width}{', masked' if row['masked'] else ''}"


def _races(rows: Iterable[Row]) -> dict[tuple, dict[str, Row]]:
    """Rows by case, then by contestant; those that were not timed left out."""
    races: dict[tuple, dict[str, Row]] = {}
    for row in rows:
        if row.get("ms"):
            races.setdefault(tuple(row[name] for name in _CASE), {})[row["contestant"]] = row
    return races


def goals(rows: Sequence[Row]) -> list[Goal]:
    """Say what the kernels should reach, and what rows of ``bench_kernels`` measured of it."""
    races = _races(rows)

    def matching(op: str, **where: Any) -> list[dict[str, Row]]:
        wanted = {**_MAIN, "op": op, **where}
        return [
            race
            for case, race in races.items()
            if "triton" in race and wanted.items() <= dict(zip(_CASE, case, strict=True)).items()
        ]

    def speed_to(op: str, *rivals: str, **where: Any) -> list[tuple[float, str]]:
        """How many times as fast as the fastest rival, in the same race."""
        speeds = []
        for race in matching(op, **where):
            times = [race[rival]["ms"] for rival in rivals if rival in race]
            if times:
                speeds.append((min(times) / race["triton"]["ms"], describe(race["triton"])))
        return speeds

    def half_to_full(op: str, **where: Any) -> list[tuple[float, str]]:
        found = []
        for race in matching(op, width=50, **where):
            half = race["triton"]
            full = races.get(tuple({**half, "width": 100}[name] for name in _CASE), {}).get("triton")
            if full:
                found.append((half["ms"] / full["ms"], describe(half)))
        return found

    errors = [
        (
            race["triton"]["error_max"] / race["eager"]["error_max"],
            f"{race['triton']['op']}, {describe(race['triton'])}",
        )
        for race in races.values()
        if {"triton", "eager"} <= set(race)
        and race["triton"].get("dtype") == "torch.bfloat16"
        and race["triton"].get("error_max") is not None
        and race["eager"].get("error_max")
    ]
    bandwidth = [
        (race["triton"]["of_ceiling"], describe(race["triton"]))
        for race in matching("ada_layer_norm")
        if race["triton"].get("of_ceiling") is not None
    ]
    sdpa = ("sdpa flash", "sdpa cudnn", "sdpa efficient", "sdpa math")
    return [
        *(
            Goal(
                f"attention, batch {batch}, {heads} heads: speed to the best of cuDNN and FlashAttention",
                ">=",
                0.85,
                speed_to("joint_attention", "sdpa cudnn", "sdpa flash", batch=batch, width=width, masked=False),
            )
            for batch in (1, 2)
            for width, heads in ((100, 24), (75, 18), (50, 12))
        ),
        Goal(
            "masked attention: speed to unmasked",
            ">=",
            0.97,
            speed_to("joint_attention", "triton unmasked", masked=True),
        ),
        Goal("masked attention: speed to SDPA with a mask", ">=", 1.2, speed_to("joint_attention", *sdpa, masked=True)),
        Goal("up + GELU: speed to cuBLAS + eager", ">=", 1.05, speed_to("up_gelu", "eager")),
        Goal("down + gate + residual: speed to cuBLAS + eager", ">=", 1.05, speed_to("down_gate_residual", "eager")),
        Goal("ada_layer_norm: share of the copy bandwidth", ">=", 0.85, bandwidth),
        Goal("grouped q/k/v: speed to the stock chain, compiled", ">=", 1.1, speed_to("qkv_projection", "compiled")),
        *(
            Goal(f"{op}: time at half width to full", "<=", 0.55, half_to_full(op))
            for op in ("qkv_projection", "up_gelu", "down_gate_residual", "mlp")
        ),
        Goal(
            "joint_attention, batch 2: time at half width to full", "<=", 0.55, half_to_full("joint_attention", batch=2)
        ),
        Goal("bf16 error against float64 to that of the stock chain", "<=", 1.0, errors),
    ]


def goals_table(judged: Sequence[dict[str, Any]], device: str) -> Table:
    """Draw judged goals (`Goal.judged`)."""
    table = Table("target", "wanted", "measured", "", "worst at", title=f"targets, {device}")
    for goal in judged:
        measured = "not measured" if goal["value"] is None else f"{goal['value']:.3f}"
        met = {None: "", True: "met", False: "missed"}[goal["met"]]
        table.add_row(goal["target"], goal["wanted"], measured, met, goal["where"] or "")
    return table


def operation_tables(rows: Sequence[Row]) -> list[Table]:
    """Draw rows of ``bench_kernels``, one table an operation; an x is how many times as fast as eager."""
    tables: dict[str, Table] = {}
    last: dict[str, str] = {}
    for row in rows:
        op = row["op"]
        if op not in tables:
            tables[op] = Table(
                *("case", "contestant", "ms", "to eager", row.get("unit") or "rate", "of ceiling", "max error", ""),
                title=f"{op}, {row.get('device')}, {row.get('dtype')}",
            )
        case = describe(row)
        tile = f"tile {' '.join(map(str, row['tile']))}" if row.get("tile") else ""
        tables[op].add_row(
            case if last.get(op) != case else "",
            row["contestant"],
            _shown(row, "ms", "{:.4f}"),
            _shown(row, "over_eager", "{:.2f}x"),
            _shown(row, "rate", "{:.1f}"),
            _shown(row, "of_ceiling", "{:.3f}"),
            _shown(row, "error_max", "{:.2e}"),
            (row.get("failed") or row.get("skipped") or tile)[:_NOTE],
        )
        last[op] = case
    return list(tables.values())


def _shown(row: Row, name: str, form: str) -> str:
    return "" if row.get(name) is None else form.format(row[name])


def read_results(results: Path) -> dict[str, dict[str, dict[str, Any]]]:
    """Read ``<device>/<part>.json``: content by device, then by part.

    Raises:
        ValueError: a file is no results file.
    """
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for path in sorted(results.glob("*/*.json")):
        if path.stem not in PARTS:
            continue
        try:
            content = json.loads(path.read_text())
            _check(content, path.stem)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            what = f"{type(error).__name__}: {error}"
            raise ValueError(f"{path} is no results file ({what}): run bench/gpu.sh {path.stem} again") from None
        found.setdefault(path.parent.name, {})[path.stem] = content
    return found


def _check(content: dict[str, Any], part: str) -> None:
    """Refuse what the tables could not be drawn from."""
    number = int | float | None
    wanted: list[tuple[str, Any, Any]] = [("device", content["device"], str), ("results", content["results"], list)]
    for item in content["results"]:
        row = item.get("extra_info", {})
        wanted += [("name", item["name"], str), ("median", item.get("median"), number), ("extra_info", row, dict)]
        wanted += [(name, row.get(name), number) for name in _NUMBERS]
        if part == "kernels":
            wanted += [(name, row[name], str) for name in ("op", "contestant")]
            wanted += [(name, row[name], int) for name in _CASE[1:]]
    for name, value, kind in wanted:
        if not isinstance(value, kind):
            raise TypeError(f"{name} is {value!r:.40}")


@app.command()
def report(
    results: Results = Path("bench/results"),
    as_json: Annotated[bool, typer.Option("--json", help="print the targets as JSON")] = False,
) -> None:
    """Draw what was measured, and the targets beside it."""
    found = read_results(results)
    judged = {}
    # The targets are set for Hopper.
    for parts in found.values():
        if "kernels" in parts and ("H100" in parts["kernels"]["device"] or "H200" in parts["kernels"]["device"]):
            rows = [item["extra_info"] for item in parts["kernels"]["results"]]
            judged[parts["kernels"]["device"]] = [goal.judged() for goal in goals(rows)]
    judged = judged or {"an H100 or H200": [goal.judged() for goal in goals([])]}
    if as_json:
        print(json.dumps(judged, indent=1))
        return
    console = Console()
    console = Console(width=max(_WIDTH, console.width))
    for parts in found.values():
        for part, content in parts.items():
            console.print(_summary(part, content))
            if part == "kernels":
                for table in operation_tables([item["extra_info"] for item in content["results"]]):
                    console.print(table)
            elif part == "model" and content["results"]:
                console.print(_model_table(content["results"]))
    for device, goals_of in judged.items():
        console.print(goals_table(goals_of, device))


def _summary(part: str, content: dict[str, Any]) -> str:
    versions = ", ".join(
        f"{name} {content[name]}" for name in ("torch", "triton", "cuda", "driver") if content.get(name)
    )
    commit = f"commit {str(content.get('commit'))[:10]}{' and changes' if content.get('dirty') else ''}"
    status: Any = content.get("status")
    ended = {0: "complete", 124: "cut off by its time limit"}.get(status, f"ended with status {status}")
    counts = f" {content['counts']}" if content.get("counts") else ""
    line = f"{part}{counts}: {ended}; {content['device']}, {versions}, {commit}, {content.get('date')}\n"
    return f"{line}  {content.get('command')}"


def _model_table(results: Sequence[dict[str, Any]]) -> Table:
    table = Table("bench", "ms", "time to dense", "device", title="model")
    for item in results:
        median, info = item.get("median"), item.get("extra_info", {})
        ms = "" if median is None else f"{median * 1e3:.3f}"
        table.add_row(item["name"], ms, _shown(info, "time_to_dense", "{:.3f}"), str(info.get("device", "")))
    return table


def slug(device: str) -> str:
    """Turn a device's name into that of its folder: NVIDIA H200 -> nvidia-h200."""
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")


def write_json(path: Path, content: Any) -> None:
    """Write beside ``path``, then rename: a reader, or who is killed, never leaves half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.partial")
    beside.write_text(json.dumps(content, indent=1) + "\n")
    beside.replace(path)


def _said(*command: str) -> str | None:
    """What a program prints, None where it is missing or fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def machine() -> dict[str, Any]:
    """Say what runs here: device, driver, versions, commit."""
    import torch

    try:
        import triton
    except ImportError:
        triton = None
    cuda = torch.cuda.is_available()
    driver = _said("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") if cuda else None
    changes = _said("git", "status", "--porcelain")
    return {
        "device": torch.cuda.get_device_name() if cuda else f"CPU {platform.machine()}",
        "driver": driver and driver.splitlines()[0],
        "torch": torch.__version__,
        "triton": getattr(triton, "__version__", None),
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "commit": _said("git", "rev-parse", "HEAD"),
        "dirty": None if changes is None else bool(changes),
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def benchmarks(path: Path) -> list[dict[str, Any]]:
    """Read a file of pytest-benchmark: names, medians (seconds) and extra_info, without the raw times."""
    return [
        {"name": item["name"], "median": item["stats"]["median"], "extra_info": item["extra_info"]}
        for item in json.loads(path.read_text())["benchmarks"]
    ]


def tests(path: Path) -> list[dict[str, Any]]:
    """Read a JUnit file: name, seconds and outcome of each test, and why where it did not pass."""
    results = []
    for case in ElementTree.parse(path).iter("testcase"):
        row = {"name": f"{case.get('classname')}.{case.get('name')}", "outcome": "passed"}
        row["seconds"] = case.get("time", "")
        for outcome in ("skipped", "failure", "error"):
            if (found := case.find(outcome)) is not None:
                row |= {"outcome": outcome, "why": (found.get("message") or "")[:300]}
        results.append(row)
    return results


@app.command(hidden=True)
def record(
    part: str,
    status: Annotated[int, typer.Option(help="exit status of the part")],
    command: Annotated[str, typer.Option(help="what was run")],
    output: Annotated[Path, typer.Option(help="what it left: pytest-benchmark's JSON or a JUnit file, where it did")],
    results: Results = Path("bench/results"),
) -> None:
    """Write what a part of bench/gpu.sh measured, also where it was cut off."""
    rows: list[dict[str, Any]] = []
    if output.exists() and output.stat().st_size:
        rows = tests(output) if output.suffix == ".xml" else benchmarks(output)
    content = {"part": part, "status": status, "command": command, **machine()}
    if part == "tests":
        outcomes = [row["outcome"] for row in rows]
        content["counts"] = {outcome: outcomes.count(outcome) for outcome in sorted(set(outcomes))}
    path = results / slug(content["device"]) / f"{part}.json"
    write_json(path, {**content, "results": rows})
    print(f"wrote {path}: {len(rows)} results, exit status {status}")


if __name__ == "__main__":
    sys.exit(app())
