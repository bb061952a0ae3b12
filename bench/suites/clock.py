"""Time on a CUDA device or on a CPU."""

from __future__ import annotations

import time
from typing import Any

import torch


class Clock:
    """Takes time stamps on the current CUDA stream, or on a CPU."""

    def __init__(self, device: str) -> None:
        self.cuda = device == "cuda"

    def wait(self) -> None:
        """Wait for the device; raises the error of what failed there."""
        if self.cuda:
            torch.cuda.synchronize()

    def stamp(self) -> Any:
        """Take a time stamp; on a CUDA device an event, which the device reaches after the work queued before it."""
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def between(self, start: Any, end: Any) -> float:
        """Return the milliseconds between two stamps; on a CUDA device `wait` has to come first."""
        return start.elapsed_time(end) if self.cuda else 1e3 * (end - start)
