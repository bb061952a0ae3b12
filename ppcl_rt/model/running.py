"""A schedule that is set, and the clocks of the threads and tasks that follow it."""

from __future__ import annotations

import asyncio
import threading
import weakref
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch

from ppcl_rt.planning.plan import Plan
from ppcl_rt.planning.schedule import Schedule


class Running:
    """A schedule that was set, told from one set before or after it by its identity.

    Args:
        schedule: its choices are plans.
    """

    def __init__(self, schedule: Schedule) -> None:
        self.schedule = schedule

    @property
    def plans(self) -> list[Plan]:
        """The plans of its phases."""
        return [choice for _, choice in self.schedule.phases if isinstance(choice, Plan)]

    def plan_at(self, timestep: torch.Tensor | None) -> Plan:
        """The plan of the denoising step that a timestep belongs to, or of the last one; moves the clock on."""
        choice = self.schedule.at(self._denoising_step(timestep))
        assert isinstance(choice, Plan), "made of plans"
        return choice

    def _denoising_step(self, timestep: torch.Tensor | None) -> int:
        """The denoising step of this thread or task, from 0."""
        me, clocks = _runner(), _CLOCKS.get()
        mine = next((c for c in clocks if c.schedule() is self and c.runner() is me), None)
        last, step = (mine.timestep, mine.step) if mine is not None else (float("inf"), -1)
        if timestep is None:
            return max(step, 0)
        # Reading the timestep waits for the device, once a forward, and only where a schedule is set.
        now = float(timestep.reshape(-1)[0])
        if now != last:
            step = step + 1 if now < last else 0
            others = (c for c in clocks if c.schedule() not in (None, self) and c.runner() is me)
            _CLOCKS.set((*others, _Clock(weakref.ref(self), weakref.ref(me), now, step)))
        return step


class _Clock(NamedTuple):
    """Where a thread or task is in a schedule.

    Attributes:
        schedule: that it follows.
        runner: the thread or task. A task begins with a copy of the context, and so of the clock, of its parent: it
            does not go by that.
        timestep: of the last forward.
        step: the denoising step that it belongs to.
    """

    schedule: weakref.ref[Running]
    runner: weakref.ref[Any]
    timestep: float
    step: int


# A context variable, so that clocks end with the thread or task.
_CLOCKS: ContextVar[tuple[_Clock, ...]] = ContextVar("ppcl_clocks", default=())


def _runner() -> Any:
    """The task of asyncio that runs now, or else the thread."""
    return running_task() or threading.current_thread()


def running_task() -> asyncio.Task[Any] | None:
    """The task of asyncio that runs now in this thread."""
    try:
        return asyncio.current_task()
    except RuntimeError:
        # There is no event loop in this thread.
        return None
