"""Whether forwards are launch-bound: whether the device waits for the host to launch kernels."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ppcl_rt.model.graphs.backend import Mark


@dataclass
class Meter:
    """Times forwards on the host and on the device, without ever waiting for the device.

    The host is timed while it queues a forward. The device is timed by a mark before the forward and one after it; both
    are read at a later forward. If the device took hardly longer than the host, it was waiting for launches. A forward
    is timed only if it finds the device idle: with a full queue (1,024 launches) the host waits for the device, and
    would seem slow.

    Args:
        clock: seconds on the host.
        share: a forward is launch-bound if the host takes at least this share of the device's time.
        in_a_row: so many timed forwards have to be launch-bound: something else may have delayed one of them.
    """

    clock: Callable[[], float] = time.perf_counter
    share: float = 0.8
    in_a_row: int = 2
    _pending: tuple[Mark, Mark, float] | None = None
    _launch_bound_in_a_row: int = 0

    def run(self, call: Callable[[], Any], idle: Callable[[], bool], mark: Callable[[], Mark]) -> Any:
        """Run a forward; time it if the device is idle and no earlier measurement is pending.

        Args:
            call: the forward.
            idle: whether the device has nothing to do.
            mark: marks the end of what is queued on the device.

        Returns:
            What the forward returns.
        """
        self._read_pending()
        if self._pending is not None or not idle():
            return call()
        before, began = mark(), self.clock()
        result = call()
        host_seconds = self.clock() - began
        self._pending = (before, mark(), host_seconds)
        return result

    def launch_bound(self) -> bool:
        """Whether the last timed forwards were launch-bound."""
        self._read_pending()
        return self._launch_bound_in_a_row >= self.in_a_row

    def _read_pending(self) -> None:
        if self._pending is not None and self._pending[1].done():
            before, after, host_seconds = self._pending
            bound = host_seconds >= self.share * after.since(before)
            self._launch_bound_in_a_row = self._launch_bound_in_a_row + 1 if bound else 0
            self._pending = None
