"""The stage *select*: which intervals get students."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from ppcl_rt import Catalog
from ppcl_train.config.settings import RunConfig
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
    """Choose the intervals that get students, with the selector that the config names; writes ``selected.json``."""
    _SELECTORS[run.select](run, folder)


def _by_table(run: RunConfig, folder: Path) -> None:
    log = Log(folder, "select")
    if not (folder / _COSTS).exists():
        model, _ = opened_as_factors(run, assembled(run, folder, stored_in(folder / width.OUTPUT)), trains=False)
        measured, _ = sensitivities(model, run, log)
        write_json(folder / _COSTS, measured.model_dump(mode="json"))
    cost_table.select(run, folder, Catalog.model_validate(read_content(folder / _COSTS)))


# By the setting ``select``.
_SELECTORS: dict[str, Callable[[RunConfig, Path], None]] = {"table": _by_table, "eq5": eq5.select}
