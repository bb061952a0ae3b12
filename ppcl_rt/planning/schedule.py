"""Schedules: which plan runs at which denoising step. Plain data, no torch."""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import field_validator

from ppcl_rt.planning.budget import check_ratio
from ppcl_rt.planning.frozen import Frozen
from ppcl_rt.planning.plan import Plan
from ppcl_rt.planning.planner import Planner


class Schedule(Frozen):
    """Phases ``(first denoising step, ratio or plan)``; a phase lasts until the next begins.

    Raises:
        ValueError: the first phase does not begin at denoising step 0, phases do not follow one another, or a ratio is
            out of range.
    """

    phases: tuple[tuple[int, float | Plan], ...]

    @field_validator("phases")
    @classmethod
    def _rising(cls, phases: tuple[tuple[int, float | Plan], ...]) -> tuple[tuple[int, float | Plan], ...]:
        begins = [begin for begin, _ in phases]
        if not begins or begins[0] != 0 or begins != sorted(set(begins)):
            raise ValueError(f"phases begin at denoising step 0 and then rise, not {begins}")
        for _, choice in phases:
            if not isinstance(choice, Plan):
                check_ratio(choice)
        return phases

    @classmethod
    def constant(cls, choice: float | Plan) -> Schedule:
        """One ratio or plan throughout."""
        return cls(phases=((0, choice),))

    @classmethod
    def warm(cls, dense_steps: int, ratio: float | Plan) -> Schedule:
        """Dense for the first ``dense_steps`` denoising steps, then ``ratio``."""
        return cls(phases=((0, 1.0), (dense_steps, ratio))) if dense_steps else cls.constant(ratio)

    @classmethod
    def near(cls, planner: Planner, ratio: float, timesteps: Sequence[float]) -> Schedule:
        """At each denoising step the plan that loses least near its timestep, all of one ratio.

        Args:
            timesteps: of the denoising steps, in [0, 1], 1 is noise (diffusers' ``scheduler.timesteps / 1000``).

        Raises:
            ValueError: as `Planner.plan`, or there is no timestep.
        """
        phases: list[tuple[int, Plan]] = []
        for denoising_step, timestep in enumerate(timesteps):
            plan = planner.plan(ratio, float(timestep))
            if not phases or plan != phases[-1][1]:
                phases.append((denoising_step, plan))
        return cls(phases=tuple(phases))

    def at(self, denoising_step: int) -> float | Plan:
        """What runs at a denoising step, counted from 0."""
        return [choice for begin, choice in self.phases if begin <= denoising_step][-1]
