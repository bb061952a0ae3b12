"""The stage *select*: which intervals get students."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from ppcl_train.config.settings import RunConfig
from ppcl_train.selectors import cost_table, eq5, selection

OUTPUT = selection.OUTPUT

# By the setting ``select``.
SELECTORS: dict[str, Callable[[RunConfig, Path], None]] = {
    "table": cost_table.select,
    "eq5": eq5.select,
    "eq5-literal": eq5.select,
}


def select(run: RunConfig, folder: Path) -> None:
    """Choose the intervals that get students, with the selector that the config names; writes ``selected.json``."""
    SELECTORS[run.select](run, folder)
