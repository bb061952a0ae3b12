"""Tasks: what a checkpoint is sampled and judged on. Found by name, so that the runtime imports no training code."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import entry_points
from typing import Any, Protocol

from PIL import Image

from ppcl_rt.planning.catalog import Catalog


class Task(Protocol):
    """What ``ppcl sample``, ``ppcl eval`` and ``ppcl demo`` need."""

    # Tokens of one sample, from which FLOPs are counted.
    image_tokens: int
    text_tokens: int
    demo_prompts: Sequence[str]

    def check(self, prompts: Sequence[str]) -> None:
        """Raise ValueError, in one line, where a prompt cannot be drawn."""

    def sample(self, model: Any, prompts: Sequence[str], seed: int) -> list[Image.Image]:
        """Draw a picture for every prompt."""

    def example(self, batch: int) -> dict[str, Any]:
        """What the transformer is called with for ``batch`` samples; for timing."""

    def judge(self, model: Any, prompts: int, seed: int) -> dict[str, Any]:
        """Scores over unseen prompts: ``strict``, ``strict_ci``, ``soft``, ``soft_ci`` and the same per kind."""


def task_of(catalog: Catalog) -> Task:
    """The task that a checkpoint was made for.

    Raises:
        ValueError: it names none, or one that is not installed.
    """
    if catalog.task is None or not isinstance(catalog.task.get("name"), str):
        raise ValueError("this checkpoint names no task that could sample or judge it: use it in a diffusers pipeline")
    found = {entry.name: entry for entry in entry_points(group="ppcl.tasks")}
    name = catalog.task["name"]
    if name not in found:
        raise ValueError(f'the task "{name}" is not installed; there are: {", ".join(found) or "none"}')
    try:
        task: Task = found[name].load()(**{key: value for key, value in catalog.task.items() if key != "name"})
    except TypeError as error:
        raise ValueError(f'the checkpoint\'s settings of its task "{name}" are not what it takes: {error}') from None
    return task
