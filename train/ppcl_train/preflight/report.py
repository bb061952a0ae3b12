"""Preflight: the table of what every stage takes, whether it fits, and which setting makes it fit."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table

from ppcl_train.config.settings import RunConfig, with_changes
from ppcl_train.engine.distributed import join
from ppcl_train.preflight.needs import STAGES, Needs
from ppcl_train.preflight.sizes import Sizes
from ppcl_train.stages.letting_go import LETS_GO

# What a device is left besides what is counted: workspaces of libraries, and gaps between tensors.
_SPARE = 0.05
_TABLE_WIDTH = 120


class Machine(NamedTuple):
    """Where a run is to fit.

    Attributes:
        gpus: devices of a node.
        nodes: how many.
        memory: bytes of a device.
        host: bytes of a node's memory; None: not asked about.
        disk: free bytes where the run folder lies; None: not asked about.
        tflops: sustained, of a device in the dtype that the teacher computes in.
    """

    gpus: int = 1
    nodes: int = 1
    memory: float = 80e9
    host: float | None = None
    disk: float | None = None
    tflops: float = 400.0

    @property
    def processes(self) -> int:
        """One for each device."""
        return self.gpus * self.nodes

    @classmethod
    def here(cls, folder: Path) -> Machine:
        """This machine, and the processes that were started together."""
        world = join()
        gpus = int(os.environ.get("LOCAL_WORLD_SIZE", world.size))
        host = float(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
        existing = next(path for path in (folder, *folder.resolve().parents) if path.exists())
        memory = host / gpus
        if world.device.type == "cuda":
            memory = float(torch.cuda.get_device_properties(world.device).total_memory)
        return cls(gpus, max(1, world.size // gpus), memory, host, float(shutil.disk_usage(existing).free))


class Row(NamedTuple):
    """A stage in the report.

    Attributes:
        needs: what it takes.
        hours: at the machine's FLOP/s, with nothing lost to waiting.
        disk: bytes of the run folder when it holds most, with what earlier stages left.
        lacks: what there is too little of; ``""`` where the stage fits.
    """

    stage: str
    needs: Needs
    hours: float
    disk: float
    lacks: str


def rows(run: RunConfig, machine: Machine) -> list[Row]:
    """Work out every stage of a run."""
    sizes, found, left = Sizes(run), [], dict[str, float]()
    for stage, needs_of in STAGES.items():
        needs = needs_of(sizes, machine.processes)
        devices = machine.processes if needs.shared else 1
        hours = needs.flops / (machine.tflops * 1e12 * devices) / 3600
        disk = sum(left.values()) + needs.leaves + needs.during
        found.append(Row(stage, needs, hours, disk, _lacks(stage, needs, machine, disk)))
        left[stage] = needs.leaves
        for name in () if run.keep_all else LETS_GO.get(stage, ()):
            left[name] = 0.0
    return found


def _lacks(stage: str, needs: Needs, machine: Machine, disk: float) -> str:
    room = machine.memory * (1 - _SPARE)
    if needs.peak > room:
        largest = sorted(needs.device.items(), key=lambda item: -item[1])
        parts = ", ".join(f"{what} {_gb(size)}" for what, size in largest[:3])
        of = f"of {_gb(machine.memory)}, {_gb(room)} are there"
        return f"{stage} takes {_gb(needs.peak)} on each device ({parts}), {of}"
    host = needs.on_host * machine.gpus
    if machine.host is not None and host > machine.host * (1 - _SPARE):
        return f"{stage} takes {_gb(host)} of a host's {_gb(machine.host)}"
    if machine.disk is not None and disk > machine.disk:
        return f"{stage} takes {_gb(disk)} on disk, {_gb(machine.disk)} are free"
    return ""


def _gb(size: float) -> str:
    return f"{size / 1e9:.1f} GB"


# Settings that make a stage smaller, in the order in which they cost least: each gives its next value, None where there
# is none.


def _halved(least: int = 1) -> Callable[[Any], Any]:
    return lambda value: value // 2 if value // 2 >= least else None


def _on(value: Any) -> Any:
    return None if value else True


_REMEDIES: dict[str, dict[str, Callable[[Any], Any]]] = {
    "width": {"width.blocks_at_once": _halved(), "batch": _halved()},
    "select": {
        "table.batch": _halved(),
        "probes.at_once": _halved(),
        "batch": _halved(2),
        "compress.most_rank": _halved(16),
    },
    "students": {
        "students.shard_teacher": _on,
        "students.at_once": _halved(),
        "students.checkpointing": _on,
        "students.batch": _halved(),
        "students.eight_bit": _on,
    },
    "compress": {"width.blocks_at_once": _halved(), "batch": _halved()},
    "recover": {
        "recover.shard": _on,
        "recover.checkpointing": _on,
        "recover.batch": _halved(),
        "compress.most_rank": _halved(16),
    },
    "measure": {"batch": _halved(2), "compress.most_rank": _halved(16)},
}
_REMEDIES["refine"] = {name.replace("recover.", "refine."): change for name, change in _REMEDIES["recover"].items()}
_REMEDIES["pack"] = _REMEDIES["measure"]


def remedy(run: RunConfig, machine: Machine, stage: str) -> dict[str, Any]:
    """Find settings with which a stage fits: one of them if one is enough, else several.

    Returns:
        Values by name; nothing where no settings are known that would do.
    """

    def fits(changes: dict[str, Any]) -> bool:
        needs = STAGES[stage](Sizes(with_changes(run, changes)), machine.processes)
        return not _lacks(stage, needs, machine, 0.0)

    known = _REMEDIES.get(stage, {})
    known = {name: change for name, change in known.items() if machine.processes > 1 or "shard" not in name}
    for name, change in known.items():
        for value in _values(run, name, change):
            if fits({name: value}):
                return {name: value}
    changes: dict[str, Any] = {}
    for name, change in known.items():
        for value in _values(run, name, change):
            changes[name] = value
            if fits(changes):
                return changes
    return {}


def _values(run: RunConfig, name: str, change: Callable[[Any], Any]) -> Iterator[Any]:
    value: Any = run.model_dump()
    for part in name.split("."):
        value = value[part]
    while value is not None and (value := change(value)) is not None:
        yield value


def check(run: RunConfig, machine: Machine) -> list[Row]:
    """Work out every stage, and refuse what cannot fit.

    Raises:
        ValueError: a stage takes more than there is; one line says how much of what, and which settings would do.
    """
    found = rows(run, machine)
    for row in found:
        if row.lacks:
            changes = remedy(run, machine, row.stage)
            settings = " ".join(f"--set {name}={str(value).lower()}" for name, value in changes.items())
            raise ValueError(f"{row.lacks}: {f'it fits with {settings}' if settings else 'take a larger machine'}")
    return found


def show(found: list[Row], machine: Machine) -> None:
    """Print a table, a stage a line."""
    where = f"{machine.nodes} x {machine.gpus} x {_gb(machine.memory)}"
    table = Table("stage", "on each device", "of that", "host", "disk", "hours", title=f"for {where}")
    for row in found:
        needs = row.needs
        parts = [f"{what} {size / 1e9:.1f}" for what, size in needs.device.items() if size > 0.01 * needs.peak]
        host = needs.on_host
        table.add_row(
            row.stage,
            _gb(needs.peak),
            ", ".join(parts),
            _gb(host),
            _gb(row.disk),
            f"{row.hours:.1f}",
            style="red" if row.lacks else None,
        )
    console = Console()
    Console(width=max(_TABLE_WIDTH, console.width)).print(table)


def fitting(found: list[Row]) -> str:
    """Say in a line what a run takes that fits."""
    largest = max(found, key=lambda row: row.needs.peak)
    disk = max(row.disk for row in found)
    hours = sum(row.hours for row in found)
    return (
        f"fits: at most {_gb(largest.needs.peak)} on a device ({largest.stage}), {_gb(disk)} on disk, "
        f"{hours:.2g} hours if no FLOP is lost"
    )


def as_rows(found: list[Row]) -> list[dict[str, Any]]:
    """The same for programs: bytes and hours."""
    return [
        {
            "stage": row.stage,
            "device": {"peak": row.needs.peak, **row.needs.device},
            "host": {"peak": row.needs.on_host, **row.needs.host},
            "leaves": row.needs.leaves,
            "during": row.needs.during,
            "disk": row.disk,
            "hours": row.hours,
            "fits": not row.lacks,
        }
        for row in found
    ]
