"""The plan that a command asks for, found before its weights are read."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

import ppcl_rt
from ppcl_rt.cli.values import bytes_of, check_device, no_times, opened, without_fit
from ppcl_rt.convert.whole import whole_blocks
from ppcl_rt.planning.budget import Budget, costs
from ppcl_rt.planning.milliseconds import Times
from ppcl_rt.planning.plan import Plan
from ppcl_rt.planning.planner import Planner


class Planned(NamedTuple):
    """A plan for a budget.

    Attributes:
        planner: of the checkpoint.
        plan: the plan.
        granted: what it costs, by currency.
        room: what the rest of a pipeline takes, of a budget with ``fit``.
        within: has another planner make a plan for the same budget.
    """

    planner: Planner
    plan: Plan
    granted: dict[str, float]
    room: ppcl_rt.Room | None
    within: Callable[[Planner], Plan]


def planned(
    checkpoint: str,
    asked: Budget,
    dtype: torch.dtype | None = None,
    device: str = "cpu",
    whole: bool = False,
    quantize: str | None = None,
) -> Planned:
    """Plan for a budget. Weights are read only where milliseconds are asked for.

    Args:
        quantize: how weights of blocks are held, as `ppcl_rt.load` takes it.
        whole: take whole blocks and students at full width alone.

    Raises:
        ValueError: no plan is within the budget, or the checkpoint has no catalog.
    """
    source, catalog, planner = opened(checkpoint)
    weights = bytes_of(catalog, dtype or source.dtype, quantize)
    limited, room = without_fit(asked, source, planner, dtype or source.dtype, weights)
    times: Callable[[ppcl_rt.Tokens], Times] = no_times
    if limited.latency is not None:
        check_device(device)
        smallest = planner.plan(planner.smallest_in_digits)
        times = ppcl_rt.load(checkpoint, plan=smallest, dtype=dtype, device=device, quantize=quantize).times

    def within(other: Planner) -> Plan:
        return other.plan_within(limited, lambda: weights, times)

    made = within(planner.among(whole_blocks(catalog)) if whole else planner)
    measured = times(asked.shape or catalog.reference) if limited.latency is not None else None
    granted = costs(catalog, made, weights, asked.shape, measured)
    return Planned(planner, made, granted, room, within)
