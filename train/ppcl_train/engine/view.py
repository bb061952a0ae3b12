"""What shows where a training loop is: a live view on a terminal, and curves in a tracker."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from rich.columns import Columns
from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

from ppcl_train.config.settings import RunConfig
from ppcl_train.engine.distributed import World
from ppcl_train.engine.divergence import WatchedLoss
from ppcl_train.engine.log import Log


class View:
    """A progress bar with the running mean of every loss by name.

    Attributes:
        live: what draws on the terminal; None if the output is no terminal, and in all processes but the first.
    """

    def __init__(self, stage: str, steps: int, first: int, losses: Mapping[str, WatchedLoss], world: World) -> None:
        console = Console()
        self._losses = losses
        shown = console.is_terminal and world.is_main
        self._progress = Progress(
            TextColumn(f"{stage:>9}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), auto_refresh=False
        )
        self._task = self._progress.add_task(stage, total=steps, completed=first)
        self.live = Live(get_renderable=self._render, console=console, transient=True) if shown else None

    def _render(self) -> Group:
        losses = [
            Text.assemble(f"{name or 'loss'} ", (f"{loss.mean:.4g}", "bold"))
            for name, loss in list(self._losses.items())
        ]
        return Group(self._progress, Columns(losses, padding=(0, 3)))

    def __call__(self, done: int) -> None:
        """Show that ``done`` steps are done."""
        self._progress.update(self._task, completed=done)


@contextlib.contextmanager
def view(stage: str, steps: int, first: int, losses: Mapping[str, WatchedLoss], world: World) -> Iterator[View]:
    """Show a `View` while the ``with`` block runs."""
    shown = View(stage, steps, first, losses, world)
    with shown.live or contextlib.nullcontext():
        yield shown


@contextlib.contextmanager
def tracker(run: RunConfig, log: Log, first: int, world: World) -> Iterator[Callable[[dict[str, float], int], None]]:
    """Yield ``(values, step)`` -> write a point of each curve, through accelerate.

    Tensorboard's files lie in the run folder, in ``tracking/``, a folder a stage.
    """
    if run.tracker == "none" or not world.is_main:
        yield lambda values, step: None
        return
    # Imported here: the import takes a second.
    accelerate = importlib.import_module("accelerate.tracking")
    if run.tracker not in map(str, accelerate.get_available_trackers()):
        log(tracker=f"{run.tracker} is not installed: the losses are in log.jsonl alone")
        yield lambda values, step: None
        return
    kind: Any = accelerate.LOGGER_TYPE_TO_CLASS[run.tracker]
    if run.tracker == "tensorboard":
        # Points that a killed run wrote after its last save are written again.
        opened = kind(log.stage, logging_dir=log.folder / "tracking", purge_step=first)
    elif kind.requires_logging_directory:
        opened = kind(f"{log.folder.name}-{log.stage}", logging_dir=log.folder / "tracking")
    else:
        opened = kind(f"{log.folder.name}-{log.stage}")
    opened.start()
    try:
        yield lambda values, step: opened.log(values, step=step)
    finally:
        opened.finish()
