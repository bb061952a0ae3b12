"""CUDA graphs as torch has them, with one memory pool and one capturing stream for each device."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch


class _CudaMark:
    def __init__(self, device: torch.device) -> None:
        self.event = torch.cuda.Event(enable_timing=True)
        self.event.record(torch.cuda.current_stream(device))

    def done(self) -> bool:
        return bool(self.event.query())

    def since(self, earlier: _CudaMark) -> float:
        return earlier.event.elapsed_time(self.event) / 1000


class _CudaGraphHandle:
    def __init__(self, graph: torch.cuda.CUDAGraph, outputs: Any, device: torch.device) -> None:
        self.graph, self.outputs, self._device = graph, outputs, device

    def replay(self) -> None:
        self.graph.replay()

    def close(self) -> None:
        # If a graph were destroyed while it runs, and its memory reused meanwhile, results would be wrong in silence.
        torch.cuda.synchronize(self._device)
        self.outputs = None
        CUDA.note_closed(self)
        self.graph.reset()


@contextlib.contextmanager
def _own_workspaces() -> Iterator[None]:
    """Let a capture allocate cuBLAS's workspaces in the memory of the graphs, as ``torch.compile`` does for its graphs.

    Launches hold the address of a workspace, but nothing keeps the workspace alive. One that lies outside the memory of
    the graphs would be freed by ``torch.compile`` with graphs, and (torch 2.12 and later) when any graph of its stream
    is destroyed, while other graphs still write to it.
    """
    torch._C._cuda_clearCublasWorkspaces()
    try:
        yield
    finally:
        torch._C._cuda_clearCublasWorkspaces()


@dataclass
class _CudaPool:
    """What the graphs of one CUDA device share.

    Attributes:
        stream: graphs are captured on it, and nothing else runs on it.
        last_replay: an event, recorded after the last replay.
        last_stream: the stream of the last replay.
        handle: the memory pool; None before the first graph.
        graphs: the graphs that use the pool. Once no graph uses it, a new pool is made: torch forbids to take up an
            empty one again.
    """

    stream: torch.cuda.Stream
    last_replay: torch.cuda.Event
    last_stream: torch.cuda.Stream | None = None
    handle: Any = None
    graphs: weakref.WeakSet[torch.cuda.CUDAGraph] = field(default_factory=weakref.WeakSet)


class Cuda:
    """The `Backend` on CUDA devices."""

    def __init__(self) -> None:
        self._pools: dict[torch.device, _CudaPool] = {}

    def __reduce__(self) -> str:
        # There is one in a process: copies and pickles name it.
        return "CUDA"

    def supports(self, device: torch.device) -> bool:
        """Whether it is a CUDA device."""
        return device.type == "cuda"

    def capturing(self) -> bool:
        """Whether the current stream is being captured."""
        return torch.cuda.is_current_stream_capturing()

    def idle(self, device: torch.device) -> bool:
        """Ask the current stream; the driver answers at once."""
        return bool(torch.cuda.current_stream(device).query())

    def mark(self, device: torch.device) -> _CudaMark:
        """Record an event."""
        return _CudaMark(device)

    def _pool(self, device: torch.device) -> _CudaPool:
        if device not in self._pools:
            self._pools[device] = _CudaPool(torch.cuda.Stream(device), torch.cuda.Event())
        return self._pools[device]

    @contextlib.contextmanager
    def _capturing_stream(self, device: torch.device) -> Iterator[_CudaPool]:
        """Run on the capturing stream, after what the current stream has queued and before what it queues next."""
        pool, outer = self._pool(device), torch.cuda.current_stream(device)
        pool.stream.wait_stream(outer)
        try:
            with torch.cuda.device(device), torch.cuda.stream(pool.stream):
                yield pool
        finally:
            outer.wait_stream(pool.stream)

    def warm(self, device: torch.device, call: Callable[[], Any]) -> None:
        """Run once, on the current stream: kernels are loaded, caches filled (of workspaces, see `_own_workspaces`)."""
        with torch.cuda.device(device):
            call()

    def capture(self, device: torch.device, call: Callable[[], Any]) -> _CudaGraphHandle:
        """Capture as `torch.cuda.graph` does, but return to the outer stream also if ending the capture fails."""
        # Frees as much memory as possible for the graph.
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
        graph = torch.cuda.CUDAGraph()
        with self._capturing_stream(device) as pool, _own_workspaces():
            if not pool.graphs:
                pool.handle = torch.cuda.graph_pool_handle()
            # In this mode other threads may allocate and synchronise during the capture.
            graph.capture_begin(pool=pool.handle, capture_error_mode="thread_local")
            try:
                outputs = call()
                graph.capture_end()
            except BaseException:
                with contextlib.suppress(Exception):
                    graph.capture_end()
                # If ending failed, the allocator may take the capture to be still under way.
                with contextlib.suppress(Exception):
                    torch._C._cuda_endAllocateToPool(pool.stream.device_index, pool.handle)
                pool.graphs.clear()
                raise
            pool.graphs.add(graph)
        return _CudaGraphHandle(graph, outputs, device)

    def note_closed(self, handle: _CudaGraphHandle) -> None:
        """Note that a graph does not use its pool any more."""
        for pool in self._pools.values():
            pool.graphs.discard(handle.graph)

    @contextlib.contextmanager
    def exclusive_memory(self, device: torch.device) -> Iterator[None]:
        """Let the current stream wait, on the device, for the last replay on another stream."""
        pool = self._pool(device)
        with torch.cuda.device(device):
            stream = torch.cuda.current_stream(device)
            if pool.last_stream is not None and pool.last_stream != stream:
                stream.wait_event(pool.last_replay)
            try:
                yield
            finally:
                pool.last_replay.record(stream)
                pool.last_stream = stream


CUDA = Cuda()
