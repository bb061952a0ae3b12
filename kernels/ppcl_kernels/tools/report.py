"""``ppcl bench``: what was measured on GPUs, as tables, and which of our targets it meets.

Results lie in ``bench/results/<device>/<part>.json``, written by the parts of ``make gpu``
(`ppcl_kernels.tools.gpu_run`).
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer
from rich.console import Console
from rich.table import Table

PARTS = ("fit", "choose", "model", "tests")
# Columns that the tables need; narrower terminals wrap lines.
_WIDTH = 160
_NOTE = 60
# 1024^2 with 4096 image and 512 text tokens: where the targets are set.
_MAIN = {"image": 4096, "text": 512}
_CASE = ("pixels", "image", "text", "batch", "width")
_NUMBER = int | float | None
# What the tables read of a row: names and types.
_COLUMNS: dict[str, dict[str, Any]] = {
    "fit": {"kernel": str, "tile": str, "form": str, "ok": bool, "error_rms": _NUMBER, "limit": _NUMBER},
    "choose": {
        **{"op": str, "key": str, "contestant": str, "taken": bool, "masked": bool},
        **{"ms": _NUMBER, "to_torch": _NUMBER, "rate": _NUMBER, "of_ceiling": _NUMBER},
        **dict.fromkeys(_CASE, int),
    },
    "model": {"group": str, "contestant": str, "plan": str, "size": int, "ms": _NUMBER, "device_ms": _NUMBER},
    "tests": {"name": str, "outcome": str},
}
# Rows hold these where there is something to say.
_OPTIONAL = ("error_rms", "limit", "ms", "to_torch", "rate", "of_ceiling", "device_ms")

Row = dict[str, Any]
Parts = dict[str, dict[str, Any]]
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


class Race:
    """All that was timed for one operation at one shape."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self.case = rows[0]
        self.by_name = {row["contestant"]: row for row in rows if row.get("ms")}

    def ms(self, name: str) -> float | None:
        """Milliseconds of a contestant; ``taken``: of the implementation that is chosen, ``ours``: of our best tile."""
        rows = self.by_name.values()
        if name == "taken":
            return next((row["ms"] for row in rows if row["taken"]), None)
        if name == "ours":
            return min((row["ms"] for row in rows if row["contestant"].split()[0] == "triton"), default=None)
        return self.by_name.get(name, {}).get("ms")

    def speed(self, name: str, *rivals: str) -> float | None:
        """How many times as fast a contestant is as the fastest rival; None where one of the two was not timed."""
        mine, theirs = self.ms(name), [ms for rival in rivals if (ms := self.ms(rival))]
        return min(theirs) / mine if mine and theirs else None

    def __str__(self) -> str:
        return describe(self.case)

    @property
    def taken(self) -> str:
        """Name of the implementation that is chosen."""
        return next((name for name, row in self.by_name.items() if row["taken"]), "nothing")


def describe(row: Row) -> str:
    """Name the case of a row."""
    width = "maps" if not row["width"] else f"{row['width']} % wide" if row["width"] != 100 else ""
    named = (f"{row['image']} + {row['text']} tokens, batch {row['batch']}", width, "masked" if row["masked"] else "")
    return ", ".join(filter(None, named))


def races(rows: Iterable[Row]) -> list[Race]:
    """Rows of ``choose.json`` by operation and shape."""
    by_key: dict[str, list[Row]] = {}
    for row in rows:
        by_key.setdefault(row["key"], []).append(row)
    return [Race(rows) for rows in by_key.values()]


def goals(parts: Parts) -> list[Goal]:
    """Say what should be reached on an H100 or H200, and what was measured of it there (contents by part)."""
    raced = races(parts.get("choose", {}).get("results", []))
    return [*_fit_goals(parts.get("fit", {})), *_kernel_goals(raced), *_model_goals(parts.get("model", {}))]


def _fit_goals(content: Row) -> list[Goal]:
    errors = [
        (max(row["error_rms"], row["error_max"]) / row["limit"], f"{row['kernel']} {row['tile']}, {row['form']}")
        for row in content.get("results", [])
        if row.get("limit") and row.get("error_rms") is not None
    ]
    return [Goal("error of a 64 x 64 tile against float64, to its limit", "<=", 1.0, errors)]


def _kernel_goals(raced: Sequence[Race]) -> list[Goal]:
    def matching(op: str, **where: Any) -> list[Race]:
        wanted = {**_MAIN, "op": op, **where}
        return [race for race in raced if wanted.items() <= race.case.items()]

    def speed_to(op: str, *rivals: str, **where: Any) -> list[tuple[float, str]]:
        return [
            (speed, f"{race}: {race.taken} taken")
            for race in matching(op, **where)
            if (speed := race.speed("taken", *rivals)) is not None
        ]

    def attention() -> list[tuple[float, str]]:
        found = []
        for race in matching("joint_attention", masked=False):
            speed, ours = (race.speed(name, "cudnn", "flash") for name in ("taken", "ours"))
            if speed is not None:
                own = "not timed" if ours is None else f"{ours:.3f}"
                found.append((speed, f"{race}: {race.taken} taken, our kernel {own}"))
        return found

    def share_of(op: str, other: dict[str, Any], of: Callable[[float, float], float], **where: Any) -> Any:
        """Compare with the race of the same shape but for ``other``."""
        found = []
        for race in matching(op, **where):
            shape = {name: race.case[name] for name in (*_CASE, "masked")} | other
            for full in matching(op):
                mine, theirs = race.ms("taken"), full.ms("taken")
                if shape.items() <= full.case.items() and mine and theirs:
                    found.append((of(mine, theirs), str(race)))
        return found

    full, half = {"width": 100}, {"width": 50, "masked": False}
    return [
        Goal("attention: speed to the best of cuDNN and FlashAttention, as chosen", ">=", 0.99, attention()),
        Goal("up + GELU: speed to cuBLAS + eager", ">=", 1.08, speed_to("up_gelu", "torch")),
        Goal("down + gate + residual: speed to cuBLAS + eager", ">=", 1.0, speed_to("down_gate_residual", "torch")),
        Goal("q/k/v: speed to the stock chain, compiled", ">=", 1.05, speed_to("qkv_projection", "compiled")),
        Goal("ada_layer_norm: speed to a copy of the same bytes", ">=", 0.9, speed_to("ada_layer_norm", "copy")),
        Goal(
            "masked attention: speed to unmasked",
            ">=",
            0.97,
            share_of("joint_attention", {"masked": False}, lambda mine, theirs: theirs / mine, masked=True),
        ),
        *(
            Goal(f"{op}: time at half width to full", "<=", 0.55, share_of(op, full, lambda a, b: a / b, **half))
            for op in ("qkv_projection", "up_gelu", "down_gate_residual")
        ),
        Goal(
            "joint_attention, batch 2: time at half width to full",
            "<=",
            0.55,
            share_of("joint_attention", full, lambda a, b: a / b, batch=2, **half),
        ),
    ]


def _model_goals(content: Row) -> list[Goal]:
    def found(what: str, keep: Callable[[Row], bool]) -> list[tuple[float, str]]:
        return [
            (row["value"], f"{row['contestant']}, {row['plan']} {row['ratio']:g}, {row['size']} x {row['size']}")
            for row in content.get("ratios", [])
            if row["what"] == what and row["value"] is not None and keep(row)
        ]

    def dense(contestant: str, size: int) -> Callable[[Row], bool]:
        wanted = {"contestant": contestant, "size": size, "plan": "dense", "group": f"dense-{size}"}
        return lambda row: wanted.items() <= row.items()

    return [
        Goal("Qwen-Image, 1024 x 1024: speed to diffusers", ">=", 1.5, found("speed to eager", dense("ours", 1024))),
        Goal(
            "Qwen-Image, 1024 x 1024: speed to diffusers compiled",
            ">=",
            1.05,
            found("speed to compiled", dense("ours", 1024)),
        ),
        Goal(
            "Qwen-Image, 512 x 512, graphs: speed to diffusers",
            ">=",
            1.5,
            found("speed to eager", dense("ours graphs", 512)),
        ),
        Goal(
            "Qwen-Image, 512 x 512, graphs: speed to diffusers compiled",
            ">=",
            1.05,
            found("speed to compiled", dense("ours graphs", 512)),
        ),
        Goal(
            "time(r) / time(1), to the ratio that was planned",
            "<=",
            1.03,
            found("time ratio over planned ratio", lambda row: True),
        ),
        Goal(
            "a narrow plan: speed to the physically sliced model, compiled",
            ">=",
            0.98,
            found("speed to compiled", lambda row: row["plan"] != "dense"),
        ),
    ]


def goals_table(judged: Sequence[dict[str, Any]], device: str) -> Table:
    """Draw judged goals (`Goal.judged`)."""
    table = Table("target", "wanted", "measured", "", "worst at", title=f"targets, {device}")
    for goal in judged:
        table.add_row(goal["target"], goal["wanted"], *_judgement(goal), goal["where"] or "")
    return table


def _judgement(goal: dict[str, Any]) -> tuple[str, str]:
    measured = "not measured" if goal["value"] is None else f"{goal['value']:.3f}"
    return measured, {None: "", True: "met", False: "missed"}[goal["met"]]


def goals_markdown(judged: Sequence[dict[str, Any]]) -> str:
    """Write judged goals as the table of docs/kernels.md."""
    lines = ["| target | wanted | measured |", "|---|---|---|"]
    for goal in judged:
        measured = ", ".join(filter(None, (*_judgement(goal), goal["where"])))
        lines.append(f"| {goal['target']} | {goal['wanted']} | {measured} |")
    return "\n".join(lines)


def operation_tables(rows: Sequence[Row]) -> list[Table]:
    """Draw rows of ``choose.json``, one table an operation; an x is how many times as fast as plain torch."""
    tables: dict[str, Table] = {}
    last: dict[str, str] = {}
    for row in rows:
        op = row["op"]
        if op not in tables:
            tables[op] = Table(
                *("case", "contestant", "ms", "to torch", row.get("unit") or "rate", "of ceiling", ""),
                title=f"{op}, {row.get('device')}, {row.get('dtype')}",
            )
        tables[op].add_row(
            describe(row) if last.get(op) != row["key"] else "",
            row["contestant"],
            _shown(row, "ms", "{:.4f}"),
            _shown(row, "to_torch", "{:.2f}x"),
            _shown(row, "rate", "{:.1f}"),
            _shown(row, "of_ceiling", "{:.3f}"),
            row.get("failed", "taken" if row["taken"] else "")[:_NOTE],
        )
        last[op] = row["key"]
    return list(tables.values())


def _fit_table(content: Row) -> Table:
    """One line a kernel and tile: how many forms were checked, the worst error, and why it may not run."""
    table = Table("kernel", "tile", "forms", "error to limit", "registers", "", title=f"fit, {content['device']}")
    compiled = {(row["kernel"], row["tile"]): row for row in content.get("compiled", [])}
    units: dict[tuple[str, str], list[Row]] = {}
    for row in content["results"]:
        units.setdefault((row["kernel"], row["tile"]), []).append(row)
    for unit, rows in units.items():
        shares = [
            row["error_rms"] / row["limit"] for row in rows if row.get("limit") and row.get("error_rms") is not None
        ]
        wrong = [f"{row['form']}: {row.get('why')}" for row in rows if not row["ok"]]
        registers = compiled.get(unit, {}).get("registers", "")
        share = f"{max(shares):.2f}" if shares else ""
        table.add_row(*unit, str(len(rows)), share, str(registers), (wrong or [""])[0][: 2 * _NOTE])
    return table


def _model_table(content: Row) -> Table:
    table = Table("group", "contestant", "plan", "ms", "device ms", "", title=f"model, {content['device']}")
    for row in content["results"]:
        note = str(row.get("failed") or row.get("skipped") or "")[:_NOTE]
        plan = f"{row['plan']} {row.get('ratio', '')}"
        ms, device_ms = _shown(row, "ms", "{:.2f}"), _shown(row, "device_ms", "{:.2f}")
        table.add_row(row["group"], row["contestant"], plan, ms, device_ms, note)
    return table


def _shown(row: Row, name: str, form: str) -> str:
    return "" if row.get(name) is None else form.format(row[name])


def read_results(results: Path) -> dict[str, Parts]:
    """Read ``<device>/<part>.json``: content by device, then by part.

    Raises:
        ValueError: a file is no results file.
    """
    found: dict[str, Parts] = {}
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


def _check(content: Row, part: str) -> None:
    """Refuse what the tables could not be drawn from."""
    wanted: list[tuple[str, Any, Any]] = [("device", content["device"], str), ("results", content["results"], list)]
    for row in content["results"]:
        for name, kind in _COLUMNS[part].items():
            wanted.append((name, row.get(name) if name in _OPTIONAL else row[name], kind))
    for row in content.get("ratios", []):
        wanted += [("what", row["what"], str), ("value", row["value"], _NUMBER), ("ratio", row["ratio"], _NUMBER)]
    for name, value, kind in wanted:
        if not isinstance(value, kind):
            raise TypeError(f"{name} is {value!r:.40}")


@app.command()
def report(
    results: Results = Path("bench/results"),
    as_json: Annotated[bool, typer.Option("--json", help="print the targets as JSON")] = False,
    as_markdown: Annotated[
        bool, typer.Option("--markdown", help="print the targets as docs/kernels.md has them")
    ] = False,
) -> None:
    """Draw what was measured, and the targets next to it."""
    found = read_results(results)
    judged = {}
    for parts in found.values():
        device = next(iter(parts.values()))["device"]
        # The targets are set for Hopper.
        if "H100" in device or "H200" in device:
            judged[device] = [goal.judged() for goal in goals(parts)]
    judged = judged or {"an H100 or H200": [goal.judged() for goal in goals({})]}
    if as_json:
        print(json.dumps(judged, indent=1))
        return
    if as_markdown:
        # print, not a console: lines are not to be wrapped.
        for device, goals_of in judged.items():
            print(f"On {device}:\n\n{goals_markdown(goals_of)}")
        return
    console = Console()
    console = Console(width=max(_WIDTH, console.width))
    for parts in found.values():
        for part, content in parts.items():
            console.print(_summary(part, content))
            tables = {
                "fit": lambda content: [_fit_table(content)],
                "choose": lambda content: operation_tables(content["results"]),
                "model": lambda content: [_model_table(content)],
            }.get(part, lambda content: [])(content)
            for table in tables if content["results"] else []:
                console.print(table)
    for device, goals_of in judged.items():
        console.print(goals_table(goals_of, device))


def _summary(part: str, content: Row) -> str:
    versions = ", ".join(
        f"{name} {content[name]}" for name in ("torch", "triton", "cuda", "cudnn", "driver") if content.get(name)
    )
    commit = f"commit {str(content.get('commit'))[:10]}{' and changes' if content.get('dirty') else ''}"
    status: Any = content.get("status")
    ended = {0: "complete", 124: "cut off by its time limit"}.get(status, f"ended with status {status}")
    counts = f" {content['counts']}" if content.get("counts") else ""
    line = f"{part}{counts}: {ended}; {content['device']}, {versions}, {commit}, {content.get('date')}\n"
    return f"{line}  {content.get('command')}"


@app.callback()
def _group() -> None:
    # A callback keeps `report` a command of its own while it is the only one.
    pass


if __name__ == "__main__":
    sys.exit(app())
