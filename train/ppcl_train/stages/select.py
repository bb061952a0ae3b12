"""The stage *select*: which intervals get students."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from ppcl_rt import Catalog
from ppcl_train.config.settings import RunConfig
from ppcl_train.engine.distributed import join
from ppcl_train.engine.files import read_content, stored_in, write_json
from ppcl_train.engine.log import Log
from ppcl_train.selectors import cost_table, eq5, selection
from ppcl_train.stages import width
from ppcl_train.stages.assembly import assembled
from ppcl_train.stages.sensitivities import sensitivities
from ppcl_train.stages.trained import opened_as_factors

OUTPUT = selection.OUTPUT
# What the closed forms lose, each alone: what a student has to be better than.
_COSTS = "costs.json"


def select(run: RunConfig, folder: Path) -> None:
    """Choose the intervals that get students, with the selector that the config names; writes ``selected.json``.

    Every process of a world calls this; eq. 5 is computed by the first alone.
    """
    _SELECTORS[run.select](run, folder)


def take_part(run: RunConfig, folder: Path, log: Callable[..., None]) -> None:
    """Measure closed forms or candidates, whichever is under way, together with all processes that call this."""
    if (folder / _COSTS).exists():
        cost_table.measured(run, folder, log)
    else:
        _closed_forms(run, folder, log)


def _closed_forms(run: RunConfig, folder: Path, log: Callable[..., None]) -> Catalog:
    model, _ = opened_as_factors(run, assembled(run, folder, stored_in(folder / width.OUTPUT)), trains=False)
    return sensitivities(model, run, folder, log)[0]


def _by_table(run: RunConfig, folder: Path) -> None:
    log, world = Log(folder, "select"), join()
    if run.table.most_students == 0:
        # Nothing has to be measured to choose nothing.
        if world.is_main:
            selection.write(folder, [])
        return
    if not (folder / _COSTS).exists():
        measured = _closed_forms(run, folder, log)
        if world.is_main:
            write_json(folder / _COSTS, measured.model_dump(mode="json"))
    world.wait()
    cost_table.select(run, folder, Catalog.model_validate(read_content(folder / _COSTS)))


def _by_eq5(run: RunConfig, folder: Path) -> None:
    if join().is_main:
        eq5.select(run, folder)


# By the setting ``select``.
_SELECTORS: dict[str, Callable[[RunConfig, Path], None]] = {"table": _by_table, "eq5": _by_eq5, "eq5-literal": _by_eq5}
