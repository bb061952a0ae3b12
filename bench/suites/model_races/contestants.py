"""Who takes part in a race of whole forwards."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from model_races.device import Call
from model_races.models import Models
from model_races.presets import RATIOS, Preset
from ppcl_rt.planning.plan import Plan


class Missing(Exception):
    """A contestant does not exist here; this is no failure."""


@dataclass
class Contestant:
    """A contestant and what is known of it.

    Attributes:
        plan: one of `model_races.plans.PLANS`.
        build: makes the call that is timed.
        call: that call, once it was made.
        row: the contestant's row of the results.
        times: milliseconds, of the host and of the device, for each round.
    """

    name: str
    plan: str
    build: Callable[[], Call]
    call: Call | None = None
    row: dict[str, Any] = field(default_factory=dict)
    times: list[tuple[float, float, float]] = field(default_factory=list)

    @property
    def key(self) -> str:
        return f"{self.name}, {self.plan}"


def compiled(model: Any, preset: Preset, **options: Any) -> Any:
    model.compile_repeated_blocks(**preset.compiled, **options)
    return model


def reduced(model: Any, preset: Preset) -> Call:
    if preset.device != "cuda":
        raise Missing("CUDA graphs need a CUDA device")
    compiled(model, preset, mode="reduce-overhead")

    def forward(**call: Any) -> Any:
        # One CUDA graph step for the whole forward: otherwise every block begins a step, which frees its inputs.
        torch.compiler.cudagraph_mark_step_begin()
        return model(**call)

    return forward


def contestants(kind: str, size: int, models: Models, call: dict[str, Any]) -> list[Contestant]:
    """List the contestants of a group, the most useful first."""
    preset = models.preset

    def entry(name: str, plan: str, make: Callable[[Plan], Any]) -> Contestant:
        return Contestant(name, plan, lambda: functools.partial(make(models.plan(plan).plan), **call))

    def eager(plan: str) -> Contestant:
        return entry("eager", plan, models.stock)

    def ours(plan: str) -> Contestant:
        return entry("ours", plan, models.ours)

    def graphs(plan: str) -> Contestant:
        return entry("ours graphs", plan, functools.partial(models.ours, graphs=True))

    def sliced(plan: str) -> Contestant:
        return entry("compiled", plan, lambda p: compiled(models.stock(p), preset))

    dense = "dense 1"
    if kind == "dense":
        entries = [eager(dense), ours(dense), sliced(dense), graphs(dense)]
        if size == min(preset.sizes):
            entries.append(entry("reduce-overhead", dense, lambda p: reduced(models.stock(p), preset)))
        else:
            entries.append(
                entry("compiled real RoPE", dense, lambda p: compiled(models.stock(p, real_rope=True), preset))
            )
        return entries
    if kind == "short":
        return [eager(dense), ours(dense), graphs(dense)]
    # Compiled models take longest to start: they come last, so that the others are timed if the time runs out.
    plans = [f"{kind} {ratio:g}" for kind in ("width", "mixed", "depth") for ratio in RATIOS]
    entries = [*map(ours, (dense, *plans)), *map(sliced, plans[: len(RATIOS)])]
    if size == min(preset.sizes):
        entries[1 + len(plans) : 1 + len(plans)] = map(graphs, (dense, *plans))
    return entries
