"""What a checkpoint draws with: the pipeline that it lies in, or the task that it was made for.

Tasks are found by name, so that the runtime imports no training code.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

from PIL import Image

from ppcl_rt.checkpoint.places import TRANSFORMER
from ppcl_rt.pipelines.drawing import USUAL, Drawing, How, OnStep, is_pipeline, no_report
from ppcl_rt.planning.catalog import Catalog


class Task(Protocol):
    """What draws pictures with a model.

    Attributes:
        demo_prompts: prompts that show what it can do.
        timed_batch: samples of the forward whose milliseconds stand for its speed.
        usual: how it samples unless it is told otherwise.
    """

    demo_prompts: Sequence[str]
    timed_batch: int
    usual: How

    def check(self, prompts: Sequence[str]) -> list[str]:
        """Say what of some prompts is not drawn, a line each.

        Raises:
            ValueError: a prompt cannot be drawn, in one line.
        """

    def label(self, prompt: str) -> str:
        """What stands above the pictures of a prompt."""

    def sample(
        self, model: Any, prompts: Sequence[str], seed: int, how: How = USUAL, on_step: OnStep = no_report
    ) -> list[Image.Image]:
        """Draw a picture for every prompt; prompt ``i`` has the same noise whatever the ratio.

        Raises:
            ValueError: as `check`, or it cannot sample in this way.
        """

    def example(self, model: Any, batch: int) -> dict[str, Any]:
        """What the transformer is called with for ``batch`` samples; for timing."""


@runtime_checkable
class JudgedTask(Task, Protocol):
    """A task whose pictures are judged without people."""

    def judge(self, model: Any, prompts: int, seed: int) -> dict[str, Any]:
        """Scores over that many prompts: ``strict``, ``strict_ci``, ``soft``, ``soft_ci``, and more by ``kinds``."""


class PipelineTask:
    """Draws through a diffusers pipeline.

    Args:
        folder: of the pipeline.
    """

    demo_prompts: Sequence[str] = ("a red cup on a wooden table",)
    timed_batch = 1
    usual = USUAL
    negative = " "

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self._drawing: Drawing | None = None

    def drawing(self, model: Any) -> Drawing:
        """The pipeline with this model as its transformer; all else is opened once."""
        if self._drawing is None:
            self._drawing = Drawing.open(self.folder, model, model.dtype, model.device)
        # Another model, or another thread's: what is shared is read alone.
        return self._drawing.around(model)

    def check(self, prompts: Sequence[str]) -> list[str]:
        """See `Task.check`; what words are known is found when they are drawn."""
        if not all(prompt.strip() for prompt in prompts):
            raise ValueError("a prompt is empty: say what to draw")
        return [] if self._drawing is None else self._drawing.notes(prompts)

    def label(self, prompt: str) -> str:
        """See `Task.label`."""
        return prompt

    def sample(
        self, model: Any, prompts: Sequence[str], seed: int, how: How = USUAL, on_step: OnStep = no_report
    ) -> list[Image.Image]:
        """See `Task.sample`: the noise of prompt ``i`` is that of a generator with seed ``seed + i``."""
        self.check(prompts)
        return self.drawing(model).draw(prompts, seed, how.over(self.usual), negative=self.negative, on_step=on_step)

    def example(self, model: Any, batch: int) -> dict[str, Any]:
        """See `Task.example`: what the pipeline itself calls the transformer with."""
        called: list[dict[str, Any]] = []
        forward = inspect.signature(model.forward)

        def note(_: Any, args: tuple[Any, ...], given: dict[str, Any]) -> None:
            called.append(dict(forward.bind(*args, **given).arguments))

        hook = model.register_forward_pre_hook(note, with_kwargs=True)
        try:
            prompts = [self.demo_prompts[0]] * batch
            self.drawing(model).draw(prompts, 0, How(1, size=self.usual.size), as_latents=True)
        finally:
            hook.remove()
        return called[0]


class Places(NamedTuple):
    """Where a checkpoint lies, and the pipeline that it draws through, if there is one."""

    transformer: str
    pipeline: Path | None


def places(path: str, transformer: str | None = None) -> Places:
    """Find what a path names: a pipeline folder, the transformer in one, or a checkpoint alone.

    Args:
        transformer: a checkpoint that takes the place of the pipeline's own.

    Raises:
        ValueError: there is a ``transformer`` and no pipeline.
    """
    if is_pipeline(path):
        return Places(transformer or str(Path(path) / TRANSFORMER), Path(path))
    if transformer is not None:
        raise ValueError(f"{path} is no folder of a pipeline that could draw with {transformer}")
    parent = Path(path).resolve().parent
    return Places(path, parent if Path(path).is_dir() and is_pipeline(parent) else None)


def task_of(catalog: Catalog, pipeline: Path | None = None) -> Task:
    """What draws with a checkpoint: the task that it was made for, else its pipeline.

    Raises:
        ValueError: there is neither, or the task is not installed.
    """
    if catalog.task is None or not isinstance(catalog.task.get("name"), str):
        if pipeline is not None:
            return PipelineTask(pipeline)
        raise ValueError("this checkpoint names no task that could sample or judge it: use it in a diffusers pipeline")
    found = {entry.name: entry for entry in entry_points(group="ppcl.tasks")}
    name, settings = catalog.task["name"], {key: value for key, value in catalog.task.items() if key != "name"}
    if name not in found:
        raise ValueError(f'the task "{name}" is not installed; there are: {", ".join(found) or "none"}')
    kind = found[name].load()
    if "folder" in inspect.signature(kind).parameters:
        if pipeline is None:
            raise ValueError(f'the task "{name}" draws through a pipeline: name its folder, and this as --transformer')
        settings["folder"] = pipeline
    try:
        task: Task = kind(**settings)
    except TypeError as error:
        raise ValueError(f'the checkpoint\'s settings of its task "{name}" are not what it takes: {error}') from None
    return task
