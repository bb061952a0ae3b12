"""The device that models are timed on."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from clock import Clock

from model_races import FAULT

# The most milliseconds that the device is kept busy ahead of a call.
_AHEAD_MS = 100.0

Call = Callable[[], Any]


class CallClock(Clock):
    """Times single calls."""

    def timed(self, call: Call, ahead_ms: float = 0.0) -> tuple[float, float]:
        """Time a call.

        Args:
            call: what is timed.
            ahead_ms: milliseconds that the device is kept busy before the call, so that python is ahead of the device
                and the time of python is not measured.

        Returns:
            Milliseconds on the device, and milliseconds until the call returned.
        """
        self.wait()
        if self.cuda and ahead_ms:
            # Hopper runs at up to 1.98 GHz.
            torch.cuda._sleep(int(min(ahead_ms, _AHEAD_MS) * 1.98e6))
        begin = time.perf_counter()
        start = self.stamp()
        call()
        end = self.stamp()
        host_ms = (time.perf_counter() - begin) * 1e3
        self.wait()
        return self.between(start, end), host_ms


def end_if_lost(clock: Clock) -> None:
    """End this process if nothing more can run on the device."""
    try:
        clock.wait()
    except RuntimeError:
        # Python's own clean-up would wait for the device.
        os._exit(FAULT)


@contextlib.contextmanager
def backend(name: str) -> Iterator[None]:
    """Set ``PPCL_BACKEND`` inside a ``with``."""
    before = os.environ.get("PPCL_BACKEND")
    os.environ["PPCL_BACKEND"] = name
    try:
        yield
    finally:
        del os.environ["PPCL_BACKEND"]
        if before is not None:
            os.environ["PPCL_BACKEND"] = before
