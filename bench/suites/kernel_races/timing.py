"""Median milliseconds of calls that are timed in turn, and the ceilings of the device."""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable
from typing import Any

import torch
from clock import Clock

from kernel_races.presets import Preset

Call = Callable[[], Any]


class RaceClock(Clock):
    """Times calls on the device of a preset."""

    def __init__(self, preset: Preset) -> None:
        super().__init__(preset.device)
        self.preset = preset
        self.filler = torch.ones(preset.flush // 4, dtype=torch.int32, device=preset.device)

    def paired_ms(self, calls: dict[str, Call], rounds: int) -> dict[str, float]:
        """Return the median milliseconds of each call; in each round all are timed in turn."""
        marks: dict[str, list[tuple[Any, Any]]] = {name: [] for name in calls}
        for _ in range(rounds):
            for name, call in calls.items():
                self.filler.max()
                if self.cuda:
                    torch.cuda._sleep(self.preset.ahead)
                start = self.stamp()
                call()
                marks[name].append((start, self.stamp()))
        self.wait()
        return {name: statistics.median(self.between(*pair) for pair in pairs) for name, pairs in marks.items()}

    def ceilings(self) -> dict[str, float]:
        """Measure what the device reaches now: TFLOP/s of a large product, GB/s of a large copy.

        Three inputs of each take turns, so that none is found in the cache.
        """
        side = self.preset.matrix
        like: dict[str, Any] = {"device": self.preset.device, "dtype": self.preset.dtype}
        pairs = [(torch.randn(side, side, **like), torch.randn(side, side, **like)) for _ in range(3)]
        sources = [torch.ones(self.preset.copied // 4, dtype=torch.int32, device=self.preset.device) for _ in range(3)]
        target = torch.empty_like(sources[0])
        calls: dict[str, Call] = {f"product {n}": functools.partial(torch.mm, *pair) for n, pair in enumerate(pairs)}
        calls |= {f"copy {n}": functools.partial(target.copy_, source) for n, source in enumerate(sources)}
        self.paired_ms(calls, 2)
        ms = self.paired_ms(calls, self.preset.rounds)
        product, copy = (
            statistics.median(value for name, value in ms.items() if name.startswith(kind))
            for kind in ("product", "copy")
        )
        return {"tflops": 2 * side**3 / product / 1e9, "gbs": 2 * self.preset.copied / copy / 1e6}


def kernel_names(call: Call) -> list[str]:
    """Return the names of the kernels that a call launches on a GPU."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as run:
        call()
        torch.cuda.synchronize()
    return sorted({event.name for event in run.events() if event.device_type.name == "CUDA"})
