"""What runs: ratios, plans and schedules, and the program that each forward walks."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from types import MappingProxyType
from typing import Any, TypeVar

import torch

from ppcl_rt.model.block import PluggableBlock
from ppcl_rt.model.fitting import Room, fitted, room_of
from ppcl_rt.model.offloading import like, weights_at_hand
from ppcl_rt.model.program import BlockCall, Program, TextRunRole
from ppcl_rt.model.residency import READING, Residency
from ppcl_rt.model.running import Running, running_task
from ppcl_rt.model.times import block_times
from ppcl_rt.planning.architecture import Tokens
from ppcl_rt.planning.budget import Budget, costs
from ppcl_rt.planning.costs import Bytes
from ppcl_rt.planning.milliseconds import Times
from ppcl_rt.planning.plan import Plan, PlannedBlock
from ppcl_rt.planning.planner import Planner
from ppcl_rt.planning.schedule import Schedule

_log = logging.getLogger(__name__)
# Programs chosen by `at`, by the identity of the model. A context variable, so that threads and tasks do not see each
# other's.
_CHOSEN: ContextVar[Mapping[int, Program]] = ContextVar("ppcl_chosen", default=MappingProxyType({}))


class _InThread(threading.local):
    """The same for a thread, for guards of compiled code: Dynamo reads no context variable.

    Attributes:
        programs: None stands for what an `at` in a task of asyncio chose, because tasks take turns in a thread.
    """

    def __init__(self) -> None:
        self.programs: Mapping[int, Program | None] = {}


_IN_THREAD = _InThread()
# Held while milliseconds are measured: two measurements at once would slow each other down. Taken before `READING`.
_MEASURING = threading.RLock()
# Programs that are remembered; one is a tuple of references, a few kilobytes.
_MOST_PROGRAMS = 256

Self = TypeVar("Self", bound="Switching")
# What runs: a ratio, any budget, or a plan.
Choice = float | Budget | Plan


class Switching(Residency):
    """Choosing what runs.

    All of it may be called from several threads and tasks at once, while others sample. A forward runs to its end the
    program that was current when it began, whatever is set, read or dropped meanwhile.
    """

    _planner: Planner | None
    # What was set last; None before anything was. One reference, so that a forward sees the old or the new.
    _current: Program | Running | None
    _programs: dict[Plan, Program]
    _times: dict[Tokens, Times]

    @property
    def planner(self) -> Planner:
        """Plans for this model's catalog."""
        if self._planner is None:
            source = self._source if self.catalog.sketch is not None else None
            self._planner = Planner(self.catalog, None if source is None else source.sketches)
        return self._planner

    @property
    def byte_cost(self) -> Bytes:
        """How the bytes of this model's weights are counted."""
        return Bytes(like(self).dtype.itemsize, self._quantisation, self.catalog.compensated)

    @property
    def plan(self) -> Plan:
        """The plan that runs now; with a schedule, that of the denoising step that ran last."""
        return self._program().plan

    def set_ratio(self, ratio: float) -> None:
        """Run at most ``ratio`` times the dense parameters and FLOPs from now on.

        The first visit of a ratio plans (milliseconds to tenths of a second) and reads what is not resident yet; from
        then on it is a look-up.

        Raises:
            ValueError: not in (0, 1], or below the smallest plan.
        """
        self.set_plan(self.planner.plan(ratio))

    def set_budget(self, ratio: float | None = None, **budgets: Any) -> None:
        """Run the best plan within a budget from now on.

        Args:
            ratio, budgets: as `ppcl_rt.planning.budget.Budget` takes them: ``params``, ``flops``, ``memory``,
                ``latency`` and ``fit``, alone or together; the ``shape`` that FLOPs, latency and activations are of;
                ``pipeline`` and ``offload`` for ``fit`` (`room`). With ``memory`` or ``fit``, what the plan does not
                need is dropped, so that the model holds no more than that.

        Raises:
            ValueError: no such budget, or no plan keeps it: the message says the least that can be.
        """
        budget = Budget.of(ratio, **budgets)
        plan = self.plan_of(budget)
        with READING:
            self.set_plan(plan)
            if budget.memory is not None or budget.fit is not None:
                self.trim(to_width=True)

    def set_plan(self, plan: Plan) -> None:
        """Run a plan from now on.

        Raises:
            ValueError: the plan is for another checkpoint or asks for what it does not hold.
        """
        with READING:
            self._current = self.prepare(plan)

    def set_schedule(self, schedule: Schedule) -> None:
        """Choose by denoising step from now on; everything that the schedule names becomes resident now.

        A denoising step is counted each time the timestep changes, and counting starts again when the timestep rises;
        calls at one timestep (the two halves of guidance) are one denoising step. Each thread, and each task of
        asyncio, has a count of its own: the calls of one sampling belong in one of them.
        """
        running = Running(Schedule(phases=tuple((begin, self.plan_of(choice)) for begin, choice in schedule.phases)))
        with READING:
            for plan in running.plans:
                self.prepare(plan)
            self._current = running

    @contextlib.contextmanager
    def at(self: Self, ratio: float | None = None, *, plan: Plan | None = None, **budgets: Any) -> Iterator[Self]:
        """Run at a ratio, within budgets or at a plan inside a ``with``, in this thread or task and tasks made there.

        It wins over all that is set, a schedule too. The weights that it runs live as long as the ``with``: a `trim` of
        another thread takes them out of the model, and so out of `resident_bytes`, but not away.

        Args:
            ratio, budgets: as `set_budget` takes them.

        Raises:
            ValueError: as `set_budget` and `set_plan`, or not exactly one of budget and plan was given.
        """
        given = ratio is not None or bool(budgets)
        if given == (plan is not None):
            raise ValueError("at() takes a ratio, budgets or a plan: give one of them")
        choice: Choice = plan if plan is not None else Budget.of(ratio, **budgets)
        program = self.prepare(self.plan_of(choice))
        token, before = _CHOSEN.set({**_CHOSEN.get(), id(self): program}), _IN_THREAD.programs
        _IN_THREAD.programs = {**before, id(self): None if running_task() else program}
        try:
            yield self
        finally:
            _CHOSEN.reset(token)
            _IN_THREAD.programs = before

    def plan_of(self, choice: Choice) -> Plan:
        """The plan for a ratio or budget; a plan itself.

        Raises:
            ValueError: as `set_budget`.
        """
        if isinstance(choice, Plan):
            return choice
        if not isinstance(choice, Budget):
            return self.planner.plan(choice)
        if choice.fit is not None:
            room = self._room(choice)
            choice = fitted(choice, room, self.planner, self.byte_cost)
            _log.info("%s", room)
        return self.planner.plan_within(choice, lambda: self.byte_cost, self.times)

    def room(self, fit: float | str, **more: Any) -> Room:
        """What the rest of a pipeline leaves of a device for this model, part by part.

        Args:
            fit: memory of the device in bytes, also as ``"24GB"`` (GB is 1e9 bytes).
            more: as `ppcl_rt.planning.budget.Budget` takes them: ``pipeline``, ``offload`` and ``shape``.

        Raises:
            ValueError: not an amount, or no pipeline whose parts can be told.
        """
        return self._room(Budget.of(fit=fit, **more))

    def _room(self, budget: Budget) -> Room:
        return room_of(budget, type(self), self.config, like(self).dtype, self.catalog.reference)

    def costs(self, plan: Plan | None = None, shape: Tokens | None = None, latency: bool = False) -> dict[str, float]:
        """What a plan costs here: ``ratio``, ``params``, ``flops``, ``memory`` in bytes and, if asked, ``latency``.

        Args:
            plan: None for the one that runs now.
            shape: of FLOPs and latency; None for the reference shape.
            latency: whether to look up, or to measure, milliseconds (`times`).
        """
        times = self.times(shape) if latency else None
        return costs(self.catalog, plan or self.plan, self.byte_cost, shape, times)

    def times(self, tokens: Tokens | None = None) -> Times:
        """Milliseconds of this model's blocks on its device, at a shape (`ppcl_rt.model.times`).

        The first call for a shape reads them from the cache folder or measures them, which takes less than a minute.
        """
        tokens = tokens or self.catalog.reference
        if tokens not in self._times:
            with _MEASURING:
                if tokens not in self._times:
                    self._times[tokens] = block_times(self, tokens)
        return self._times[tokens]

    def prepare(self, plan: Plan) -> Program:
        """The program of a plan, its weights resident.

        Raises:
            ValueError: as `set_plan`.
        """
        program = self._programs.get(plan)
        if program is not None:
            return program
        self.catalog.check(plan)
        with READING:
            # Another thread may have been faster.
            program = self._programs.get(plan)
            if program is None:
                with weights_at_hand(self):
                    self.make_resident(plan)
                program = Program(plan, tuple(self._call(plan, planned) for planned in plan.blocks))
                # Inside the lock: a `trim` in between would leave a program over blocks that are gone.
                self._programs[plan] = program
                while len(self._programs) > _MOST_PROGRAMS:
                    del self._programs[next(iter(self._programs))]
        return program

    def move_to(self, grown: Mapping[PluggableBlock, PluggableBlock]) -> None:
        """Have programs run the blocks that theirs have grown to; forwards that have begun keep the old ones."""
        self._programs = {plan: program.over(grown) for plan, program in self._programs.items()}
        if isinstance(self._current, Program):
            self._current = self._current.over(grown)
        self._graphs.drop_all()

    @property
    def _plans_set(self) -> list[Plan]:
        """The plans of what was set last."""
        current = self._current
        if isinstance(current, Running):
            return current.plans
        return [] if current is None else [current.plan]

    def _forget(self, is_kept: Callable[[Program], bool] = lambda _: False) -> None:
        """Forget programs whose blocks were dropped; call it with `READING` held."""
        for program in self._programs.values():
            program.dropped = not is_kept(program)
        self._programs = {plan: program for plan, program in self._programs.items() if not program.dropped}

    def trim(self, to_width: bool = False) -> None:
        """Drop blocks and students that neither the plan or schedule set nor an enclosing `at` runs.

        Args:
            to_width: of the blocks of the plan that is set, if it alone is set, drop what it does not run as well.
                Visiting a wider plan then reads that again.
        """
        with READING:
            plans = list(dict.fromkeys([self.plan, *self._plans_set]))
            self.drop_all_but(plans)
            if to_width and len(plans) == 1:
                self.drop_wide(plans[0])
            resident, runs = set(map(id, self.resident_blocks())), set(self.text_runs)
            self._forget(
                lambda program: (
                    all(id(call.block) in resident for call in program.calls)
                    and {run.key for run in program.plan.text_runs} <= runs
                )
            )
            if to_width and isinstance(self._current, Program):
                self._current = self.prepare(self._current.plan)
            # Once more: no graph of a program that is gone was made meanwhile.
            self._graphs.drop_all()

    def _call(self, plan: Plan, planned: PlannedBlock) -> BlockCall:
        block = self.home(planned).block
        assert block is not None, "a program is made of resident blocks"
        return BlockCall(block, planned.width, planned.interval, self._text_run_role(plan, planned.interval.first))

    def _text_run_role(self, plan: Plan, block: int) -> TextRunRole | None:
        """A block's part in the text run that it is in, None where it is in none."""
        for run in plan.text_runs:
            if block == run.first:
                return TextRunRole(is_first=True)
            if block in run:
                maps = dict(self.text_runs[run.key].named_children())
                exit_map = maps.get("text") if block == run.last else None
                return TextRunRole(is_first=False, input_map=maps[f"z_{block}"], exit_map=exit_map)
        return None

    def _program(self, timestep: torch.Tensor | None = None) -> Program:
        """The program that runs now; ``timestep`` moves the clock of a schedule on."""
        if torch.compiler.is_compiling():
            return self._compiled_program(timestep)
        chosen = _CHOSEN.get().get(id(self))
        if chosen is not None:
            # Its blocks may have grown since. If they were dropped, it still holds them.
            latest = chosen.latest
            return self._programs.get(latest.plan, latest) if latest.dropped else latest
        current = self._current
        if isinstance(current, Running):
            return self.prepare(current.plan_at(timestep))
        if current is not None:
            return current
        program = self.prepare(self.catalog.largest)
        with READING:
            if self._current is None:
                self._current = program
        return program

    def _compiled_program(self, timestep: torch.Tensor | None) -> Program:
        """`_program` as compiled code has it: guards compare what was set; a schedule and tasks break the graph."""
        program = _IN_THREAD.programs.get(id(self), self._current)
        if isinstance(program, Program):
            return program.latest
        return _looked_up(self, timestep)


@torch.compiler.disable(
    reason="a schedule, or `at` in a task of asyncio, is looked up on the host: compile_repeated_blocks"
)
def _looked_up(model: Switching, timestep: torch.Tensor | None) -> Program:
    return model._program(timestep)
