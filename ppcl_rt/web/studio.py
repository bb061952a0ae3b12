"""Pictures of one checkpoint at any budget, for several people at once, with what each picture cost."""

from __future__ import annotations

import io
import itertools
import statistics
import threading
import time
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from PIL import Image

import ppcl_rt
from ppcl_rt.pipelines.drawing import How, OnStep, no_report
from ppcl_rt.pipelines.plan_picture import draw_plan
from ppcl_rt.pipelines.sheet import Made, described, enlarged, grid
from ppcl_rt.pipelines.task import Task, places, task_of
from ppcl_rt.planning.budget import Budget
from ppcl_rt.planning.plan import Plan
from ppcl_rt.web.asking import Ask

# Of one prompt, next to each other; below the smallest plan, the smallest plan.
STRIP = (1.0, 0.8, 0.65, 0.5, 0.35, 0.2)
# Pictures that are remembered; the dense one and those of a strip are asked for again and again.
_REMEMBERED = 32


class Cost(NamedTuple):
    """What a picture cost.

    Attributes:
        ratio: of the plan.
        params: parameters that ran.
        flops: of one forward, at the checkpoint's reference shape.
        memory: bytes of the weights that ran.
        step_ms: milliseconds of a denoising step: the median of this picture's.
        ms: milliseconds of the whole picture.
        alone: whether nothing else was drawn meanwhile, which would take time from it.
    """

    ratio: float
    params: int
    flops: float
    memory: int
    step_ms: float
    ms: float
    alone: bool


class Drawn(NamedTuple):
    """A picture, what it was drawn with, and what it cost."""

    picture: Image.Image
    made: Made
    cost: Cost


class Studio:
    """One checkpoint that draws; several threads may ask at once, each at a budget of its own.

    Args:
        checkpoint: what it is called in pictures.
        model: a transformer of ours.
        task: what draws with it.
        smallest: the least ratio that it has.
    """

    def __init__(self, checkpoint: str, model: Any, task: Task) -> None:
        self.checkpoint, self.model, self.task = checkpoint, model, task
        self.smallest: float = model.planner.smallest_in_digits
        self._lock = threading.Lock()
        self._remembered: OrderedDict[tuple[Any, ...], Drawn] = OrderedDict()
        # Of pictures that are drawn now: who asks for the same one waits for it.
        self._turns: dict[tuple[Any, ...], threading.Lock] = {}
        # Drawings that run now, and those that ever began.
        self._running = self._begun = 0

    @classmethod
    def open(
        cls,
        checkpoint: str,
        *,
        ratio: float = 0.5,
        transformer: str | None = None,
        quantize: str | None = None,
        device: str = "cpu",
    ) -> Studio:
        """Open a pipeline folder or a checkpoint of a task, in float32, and draw once with one step.

        What pictures share (autoencoder, words) is open from then on, before several threads ask for it.

        Raises:
            ValueError: it cannot be opened, draws nothing, or has no plan for this ratio.
        """
        where = places(checkpoint, transformer)
        model = ppcl_rt.load(where.transformer, ratio, dtype=torch.float32, device=device, quantize=quantize)
        studio = cls(checkpoint, model, task_of(model.catalog, where.pipeline))
        studio.task.sample(model, studio.task.demo_prompts[:1], 0, How(steps=1))
        return studio

    @property
    def title(self) -> str:
        """The checkpoint and its size, for people."""
        return f"{self.checkpoint}: {self.model.catalog.architecture.dense_params:,} parameters, at any ratio"

    def notes(self, prompt: str) -> list[str]:
        """Say what of a prompt is not drawn, a line each.

        Raises:
            ValueError: it cannot be drawn at all.
        """
        return self.task.check([prompt])

    def draw(self, ask: Ask, on_step: OnStep = no_report) -> Drawn:
        """Draw a picture; the same one that was drawn lately is remembered, with what it cost then.

        Raises:
            ValueError: no plan keeps the budget, or the prompt cannot be drawn.
            OSError: the weights of this plan cannot be read any more.
        """
        self.task.check([ask.prompt])
        plan = self.model.plan_of(ask.choice)
        key = (plan, ask.prompt, ask.seed, ask.steps)
        with self._lock:
            turn = self._turns.setdefault(key, threading.Lock())
        try:
            with turn:
                found = self._found(key)
                if found is not None:
                    return found._replace(made=found.made._replace(asked=_called(ask.choice, found.cost.ratio)))
                drawn = self._drawn(ask, plan, on_step)
                with self._lock:
                    self._remembered[key] = drawn
                    while len(self._remembered) > _REMEMBERED:
                        self._remembered.popitem(last=False)
                return drawn
        finally:
            # Those who wait have the lock already; whoever comes later finds the picture.
            with self._lock:
                self._turns.pop(key, None)

    def _found(self, key: tuple[Any, ...]) -> Drawn | None:
        with self._lock:
            if key in self._remembered:
                self._remembered.move_to_end(key)
            return self._remembered.get(key)

    def dense(self, ask: Ask, on_step: OnStep = no_report) -> Drawn:
        """Draw the same at the largest plan there is: the dense one, unless the checkpoint was cut to a plan."""
        return self.draw(ask._replace(choice=self.model.catalog.largest), on_step)

    def strip(self, ask: Ask, on_step: OnStep = no_report) -> Iterator[list[Drawn]]:
        """Draw the same prompt and seed at the ratios of `STRIP`; yields what is there after each."""
        drawn: list[Drawn] = []
        for ratio in dict.fromkeys(max(ratio, self.smallest) for ratio in STRIP):
            drawn.append(self.draw(ask._replace(choice=Budget.of(ratio)), on_step))
            yield list(drawn)

    def png(self, ask: Ask, drawn: Sequence[Drawn]) -> bytes:
        """The PNG of one picture, or of several in a row with their ratios above.

        Its text chunks say prompt, seed, ratio, plan and checkpoint, as those of ``ppcl sample`` do.
        """
        pictures = [each.picture for each in drawn]
        one = enlarged(pictures[0])
        sheet = one if len(drawn) == 1 else grid([pictures], [f"{each.cost.ratio:.3f}" for each in drawn], [""])
        made = [each.made for each in drawn]
        return _png(sheet, described(self.checkpoint, [ask.prompt], ask.seed, made))

    def plan_png(self, plan: Plan) -> bytes:
        """The PNG of a picture of what a plan removes."""
        return _png(draw_plan(self.model.catalog, plan))

    def _drawn(self, ask: Ask, plan: Plan, on_step: OnStep) -> Drawn:
        ends: list[float] = []

        def report(done: int, of: int) -> None:
            ends.append(time.perf_counter())
            on_step(done, of)

        # Reads what the plan needs, which is no time of the picture.
        with self.model.at(plan=plan):
            with self._lock:
                alone, self._running, self._begun = self._running == 0, self._running + 1, self._begun + 1
                begun = self._begun
            try:
                start = time.perf_counter()
                picture = self.task.sample(self.model, [ask.prompt], ask.seed, How(ask.steps), report)[0]
                ms = 1e3 * (time.perf_counter() - start)
            finally:
                with self._lock:
                    self._running -= 1
                    alone = alone and self._begun == begun
            costs = self.model.costs(plan)
        steps = [1e3 * (end - begin) for begin, end in itertools.pairwise(ends)]
        cost = Cost(
            costs["ratio"],
            int(costs["params"]),
            costs["flops"],
            int(costs["memory"]),
            statistics.median(steps) if steps else ms,
            ms,
            alone,
        )
        return Drawn(picture, Made(_called(ask.choice, cost.ratio), cost.ratio, plan), cost)


def _png(picture: Image.Image, info: Any = None) -> bytes:
    written = io.BytesIO()
    picture.save(written, format="PNG", pnginfo=info)
    return written.getvalue()


def _called(choice: Budget | Plan, ratio: float) -> str:
    return str(choice) if isinstance(choice, Budget) else f"ratio {ratio:g}"
