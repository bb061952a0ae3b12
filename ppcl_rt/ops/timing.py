"""The clock that implementations are compared with on a CUDA device."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import torch

_REPEATS = 10


def cuda_milliseconds(call: Callable[[], Any], device: torch.device) -> float:
    """Measure the median time of a call on the current stream of a device, in milliseconds.

    Two calls go before those that are timed: one compiles, one warms up.
    """
    with torch.cuda.device(device):
        for _ in range(2):
            call()
        # 256 MB, larger than any L2 cache. It is read before each call, so that the call finds its inputs in memory, as
        # it does in a model; it is not written, so that the call has no cache lines but its own to write back.
        filler = torch.ones(2**26, dtype=torch.int32, device=device)
        events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(_REPEATS)]
        for start, end in events:
            filler.max()
            # The device sleeps for half a millisecond. Meanwhile python queues the call: the kernel is timed, not its
            # launch.
            torch.cuda._sleep(1_000_000)
            start.record()
            call()
            end.record()
        torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in events)
