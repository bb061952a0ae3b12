"""The references, made from the code: of the program ``ppcl``, of ``ppcl_rt`` and of ``ppcl_kernels``, as Markdown."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import typer.main

import ppcl_kernels
import ppcl_rt
import ppcl_rt.cli.main
from ppcl_rt.families import registry

# What people call, group by group; every other public name comes last.
GROUPS = {
    "Load": ("load", "locate"),
    "A model that changes its size": ("Pluggable",),
    "Budgets and schedules": ("Budget", "Schedule", "Tokens", "Room", "Quantisation"),
    "Plans": ("Planner", "Plan", "PlannedBlock", "Interval", "Width", "LINEAR_MAP"),
    "Checkpoints": ("Catalog", "LegalWidths", "LegalCount", "Student", "TextRun", "Checkpoint", "write_checkpoint"),
}
# Of `Pluggable`, which has as many methods again for families and for diffusers.
MEMBERS = (
    "from_pretrained",
    "save_pretrained",
    "save_plan",
    "set_ratio",
    "set_budget",
    "set_plan",
    "set_schedule",
    "set_graphs",
    "at",
    "trim",
    "precompute",
    "plan",
    "planner",
    "catalog",
    "costs",
    "times",
    "room",
    "resident_bytes",
    "graphs",
    "load_lora_adapter",
    "add_adapter",
    "adapter_report",
    "save_lora_adapter",
    "enable_group_offload",
    "enable_layerwise_casting",
    "enable_cache",
    "enable_parallelism",
)


def python() -> str:
    """The public names of ``ppcl_rt``, as `mkdocstrings` is asked for them."""
    classes = registry.class_names()
    named = {name for names in GROUPS.values() for name in names}
    others = [name for name in ppcl_rt.__all__ if name not in {*named, *classes, "__version__"}]
    lines: list[str] = []
    for title, names in {**GROUPS, "For families and tools": tuple(others)}.items():
        lines += [f"## {title}", ""]
        for name in names:
            lines += _asked_for(f"ppcl_rt.{name}", MEMBERS if name == "Pluggable" else ())
    lines += [
        "## Classes of families",
        "",
        "`load` finds the class; each is a `Pluggable` and a subclass of diffusers'.",
        "",
    ]
    lines += ["| class | of diffusers |", "|---|---|"]
    for name in classes:
        stock = next(base for base in getattr(ppcl_rt, name).__mro__ if base.__module__.startswith("diffusers."))
        lines.append(f"| `ppcl_rt.{name}` | `{stock.__name__}` |")
    return "\n".join(lines)


def kernels() -> str:
    """The public names of ``ppcl_kernels``."""
    return "\n".join(line for name in ppcl_kernels.__all__ for line in _asked_for(f"ppcl_kernels.{name}"))


def _asked_for(name: str, members: tuple[str, ...] = ()) -> list[str]:
    inherited = ["      inherited_members: true", f"      members: [{', '.join(members)}]"] if members else []
    return [f"::: {name}", "    options:", "      heading_level: 3", *inherited, ""]


def cli() -> str:
    """Every command of ``ppcl``: usage, arguments and options, as ``--help`` has them."""
    return "\n".join(_commands("ppcl", program()))


def program() -> Any:
    """The program with the commands that training and the kernels add, as a click command."""
    return typer.main.get_command(ppcl_rt.cli.main.program())


def _commands(name: str, command: Any) -> Iterator[str]:
    if hasattr(command, "commands"):
        if name != "ppcl":
            yield from (f"## {name}", "", _prose(command.help or ""), "")
        for part, each in sorted(command.commands.items()):
            yield from _commands(f"{name} {part}", each)
        return
    context = command.make_context(name, [], resilient_parsing=True)
    usage = " ".join([name, *command.collect_usage_pieces(context)])
    level = "##" if name.count(" ") == 1 else "###"
    yield from (f"{level} {name}", "", _prose(command.help or ""), "", "```", usage, "```", "")
    rows = [found for each in command.params if (found := each.get_help_record(context)) is not None]
    if rows:
        yield from ("| | |", "|---|---|")
        yield from (f"| `{_cell(left)}` | {_cell(_prose(right))} |" for left, right in rows)
        yield ""


def _prose(text: str) -> str:
    """Help as Markdown: in one line, with nothing that reads as HTML."""
    return " ".join(text.split()).replace("<", "&lt;").replace("*", r"\*")


def _cell(text: str) -> str:
    return text.replace("|", r"\|")


MADE: dict[str, Callable[[], str]] = {"python": python, "kernels": kernels, "cli": cli}
