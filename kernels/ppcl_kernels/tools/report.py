"""``ppcl bench``: what was measured on GPUs, as tables, and which goals it meets (`ppcl_kernels.tools.goals`).

The results are ``bench/results/<device>/<part>.json``, which the parts of ``make gpu`` write
(`ppcl_kernels.tools.gpu_run`).
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from ppcl_kernels.tools.goals import CASE, Parts, Row, describe, goals

PARTS = ("fit", "choose", "model", "tests")
# Characters of a line that the tables need, also where the terminal is narrower.
_WIDTH = 160
# Characters that are shown of a note.
_NOTE = 60
_NUMBER = int | float | None
# Names and types of what the tables read of a row.
_COLUMNS: dict[str, dict[str, Any]] = {
    "fit": {"kernel": str, "tile": str, "form": str, "ok": bool, "error_rms": _NUMBER, "limit": _NUMBER},
    "choose": {
        **{"op": str, "key": str, "contestant": str, "taken": bool, "masked": bool},
        **{"ms": _NUMBER, "to_torch": _NUMBER, "rate": _NUMBER, "of_ceiling": _NUMBER},
        **dict.fromkeys(CASE, int),
    },
    "model": {"group": str, "contestant": str, "plan": str, "size": int, "ms": _NUMBER, "device_ms": _NUMBER},
    "tests": {"name": str, "outcome": str},
}
# Columns that a row may lack.
_OPTIONAL = ("error_rms", "limit", "ms", "to_torch", "rate", "of_ceiling", "device_ms")

Results = Annotated[Path, typer.Option(help="folder of <device>/<part>.json")]

app = typer.Typer(help="What was measured on GPUs, and which targets it meets.")


def goals_table(judged: Sequence[dict[str, Any]], device: str) -> Table:
    """Draw a table of judged goals (`ppcl_kernels.tools.goals.Goal.judged`)."""
    table = Table("target", "wanted", "measured", "", "worst at", title=f"targets, {device}")
    for goal in judged:
        table.add_row(goal["target"], goal["wanted"], *_judgement(goal), goal["where"] or "")
    return table


def _judgement(goal: dict[str, Any]) -> tuple[str, str]:
    measured = "not measured" if goal["value"] is None else f"{goal['value']:.3f}"
    return measured, {None: "", True: "met", False: "missed"}[goal["met"]]


def goals_markdown(judged: Sequence[dict[str, Any]]) -> str:
    """Write judged goals as a table in markdown, as in docs/kernels.md."""
    lines = ["| target | wanted | measured |", "|---|---|---|"]
    for goal in judged:
        measured = ", ".join(filter(None, (*_judgement(goal), goal["where"])))
        lines.append(f"| {goal['target']} | {goal['wanted']} | {measured} |")
    return "\n".join(lines)


def operation_tables(rows: Sequence[Row]) -> list[Table]:
    """Draw rows of ``choose.json``, one table for each operation; ``2.00x`` is twice as fast as plain torch."""
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
    """Draw a line for each kernel and tile: forms that were checked, worst error, and why it may not run."""
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
    """Read all ``<device>/<part>.json``; returns contents by device, then by part.

    Raises:
        ValueError: a file does not have the form of results.
    """
    found: dict[str, Parts] = {}
    for path in sorted(results.glob("*/*.json")):
        if path.stem not in PARTS:
            continue
        try:
            content = json.loads(path.read_text())
            check_part(content, path.stem)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            what = f"{type(error).__name__}: {error}"
            raise ValueError(f"{path} is no results file ({what}): run bench/gpu.sh {path.stem} again") from None
        found.setdefault(path.parent.name, {})[path.stem] = content
    return found


def check_part(content: Row, part: str) -> None:
    """Refuse content that the tables cannot be drawn from.

    Raises:
        KeyError: something is missing.
        TypeError, AttributeError: something is of another type.
    """
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
    """Print what was measured, and the targets."""
    found = read_results(results)
    judged = {}
    for parts in found.values():
        device = next(iter(parts.values()))["device"]
        if has_goals(device):
            judged[device] = [goal.judged() for goal in goals(parts)]
    judged = judged or {"an H100 or H200": [goal.judged() for goal in goals({})]}
    if as_json:
        print(json.dumps(judged, indent=1))
        return
    if as_markdown:
        # A console would wrap the lines.
        for device, goals_of in judged.items():
            print(f"On {device}:\n\n{goals_markdown(goals_of)}")
        return
    console = Console()
    console = Console(width=max(_WIDTH, console.width))
    for parts in found.values():
        for part, content in parts.items():
            console.print(summary(part, content))
            for table in tables_of(part, content) if content["results"] else []:
                console.print(table)
    for device, goals_of in judged.items():
        console.print(goals_table(goals_of, device))


def has_goals(device: str) -> bool:
    """Whether the targets are about a device: they are for Hopper only."""
    return "H100" in device or "H200" in device


def tables_of(part: str, content: Row) -> list[Table]:
    """Draw the tables of a part that has results."""
    if part == "fit":
        return [_fit_table(content)]
    if part == "choose":
        return operation_tables(content["results"])
    return [_model_table(content)] if part == "model" else []


def summary(part: str, content: Row) -> str:
    """Say in a line how a part ended, on what and when, and in another line its command."""
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
    # With a callback `report` is a subcommand, though it is the only command.
    pass


if __name__ == "__main__":
    sys.exit(app())
