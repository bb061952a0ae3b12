"""CUDA graphs of whole forwards: what python would launch once more is replayed instead.

A graph reads the memory that it was captured on: copies of the inputs, which every replay fills anew, and the weights.
So it stands for one program, one set of shapes, and the weights that were there: a `Weights` is compared with the model
before each replay, and a graph whose weights were read again, moved, replaced or adapted since is dropped, not
replayed. A weight that is trained in place is read as it is now: its address has not changed.

Nothing here knows a family: a forward is a callable, a tree of inputs and the modules that it reads.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import threading
import time
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import chain
from operator import is_
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import nn
from torch.autograd import forward_ad
from torch.nn.modules.module import _has_any_global_hook
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten

from ppcl_rt.ops.table import choices_made

# Graphs of one model. A schedule of eight plans under guidance, whose two prompts differ in length, takes sixteen. They
# share their intermediate results, so one more costs its inputs, its outputs and its list of launches: a few MB.
MOST_GRAPHS = 16
# Forwards that are remembered while it is not known whether a graph pays.
_MOST_NOTES = 256
# Forwards for which layers that no graph can hold are not looked through again: that takes milliseconds.
_REST = 20
# Held while graphs are captured or replayed: those of a device share memory. One for all: a replay is queued in less
# than a millisecond, and a lock in a model could not be copied.
_TURN = threading.RLock()
# Inputs that a graph is captured for by value.
_PLAIN = (type(None), bool, int, float, str, torch.dtype, torch.device)
_NO_DEVICE = "not on a CUDA device"
_log = logging.getLogger(__name__)

Mode = Literal["auto", True, False]


class Mark(Protocol):
    """A point in a device's queue."""

    def done(self) -> bool:
        """Whether the device has come past it; does not wait."""

    def since(self, earlier: Any) -> float:
        """Seconds on the device since an earlier mark; both are done."""


class Handle(Protocol):
    """A captured graph."""

    outputs: Any

    def replay(self) -> None:
        """Queue the graph; ``outputs`` are written anew."""

    def close(self) -> None:
        """Wait for what was queued, then free the graph."""


class Backend(Protocol):
    """What captures and replays; tests put a recorder in the place of CUDA."""

    def takes(self, device: torch.device) -> bool:
        """Whether graphs can be captured on a device."""

    def capturing(self) -> bool:
        """Whether a capture is under way already, whoever began it."""

    def idle(self, device: torch.device) -> bool:
        """Whether a device has done all that was queued on the current stream; does not wait."""

    def mark(self, device: torch.device) -> Mark:
        """Mark the end of what is queued on the current stream."""

    def warm(self, device: torch.device, call: Callable[[], Any]) -> None:
        """Run eagerly where `capture` will run."""

    def capture(self, device: torch.device, call: Callable[[], Any]) -> Handle:
        """Capture a call; whatever it raises comes through, and the device can be used as before."""

    def turn(self, device: torch.device) -> contextlib.AbstractContextManager[None]:
        """Inside, the current stream has the memory that all graphs of a device share to itself."""


class _CudaMark:
    def __init__(self, device: torch.device) -> None:
        self.event = torch.cuda.Event(enable_timing=True)
        self.event.record(torch.cuda.current_stream(device))

    def done(self) -> bool:
        return bool(self.event.query())

    def since(self, earlier: _CudaMark) -> float:
        return earlier.event.elapsed_time(self.event) / 1000


class _CudaHandle:
    def __init__(self, graph: torch.cuda.CUDAGraph, outputs: Any, device: torch.device) -> None:
        self.graph, self.outputs, self._device = graph, outputs, device

    def replay(self) -> None:
        self.graph.replay()

    def close(self) -> None:
        # A graph that is destroyed while it runs, and memory that is reused meanwhile, would be silent garbage.
        torch.cuda.synchronize(self._device)
        self.outputs = None
        CUDA.forget(self)
        self.graph.reset()


@contextlib.contextmanager
def _own_workspaces() -> Iterator[None]:
    """Let a capture take cuBLAS's workspaces from the memory of the graphs, as those of ``torch.compile`` do.

    Launches hold the address of a workspace, and nothing keeps it: one outside would be freed by ``torch.compile`` with
    graphs, and as any graph of its stream is destroyed (torch 2.12 on), under graphs that write to it.
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
        stream: they are captured on it, and nothing else runs there.
        last: recorded behind the last replay, and the stream of it.
        handle: the memory pool; None before the first graph.
        graphs: those that hold it. A pool that no graph holds any more is not taken up again: torch forbids it.
    """

    stream: torch.cuda.Stream
    last: torch.cuda.Event
    last_stream: torch.cuda.Stream | None = None
    handle: Any = None
    graphs: weakref.WeakSet[torch.cuda.CUDAGraph] = field(default_factory=weakref.WeakSet)


class Cuda:
    """CUDA graphs as torch has them; one memory pool and one capturing stream a device."""

    def __init__(self) -> None:
        self._pools: dict[torch.device, _CudaPool] = {}

    def __reduce__(self) -> str:
        # There is one in a process.
        return "CUDA"

    def takes(self, device: torch.device) -> bool:
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
    def _aside(self, device: torch.device) -> Iterator[_CudaPool]:
        """Run on the capturing stream, after what is queued and before what comes."""
        pool, outer = self._pool(device), torch.cuda.current_stream(device)
        pool.stream.wait_stream(outer)
        try:
            with torch.cuda.device(device), torch.cuda.stream(pool.stream):
                yield pool
        finally:
            outer.wait_stream(pool.stream)

    def warm(self, device: torch.device, call: Callable[[], Any]) -> None:
        """Run once: kernels are loaded, what is cached is cached; on the current stream, see `_own_workspaces`."""
        with torch.cuda.device(device):
            call()

    def capture(self, device: torch.device, call: Callable[[], Any]) -> _CudaHandle:
        """Capture; as `torch.cuda.graph` does, but the stream comes back also where ending the capture fails."""
        # As much memory as there can be for the graph.
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
        graph = torch.cuda.CUDAGraph()
        with self._aside(device) as pool, _own_workspaces():
            if not pool.graphs:
                pool.handle = torch.cuda.graph_pool_handle()
            # Other threads may allocate and synchronise meanwhile.
            graph.capture_begin(pool=pool.handle, capture_error_mode="thread_local")
            try:
                outputs = call()
                graph.capture_end()
            except BaseException:
                with contextlib.suppress(Exception):
                    graph.capture_end()
                # Where ending failed, the allocator may think that the capture goes on.
                with contextlib.suppress(Exception):
                    torch._C._cuda_endAllocateToPool(pool.stream.device_index, pool.handle)
                pool.graphs.clear()
                raise
            pool.graphs.add(graph)
        return _CudaHandle(graph, outputs, device)

    def forget(self, handle: _CudaHandle) -> None:
        """Note that a graph lets go of its pool."""
        for pool in self._pools.values():
            pool.graphs.discard(handle.graph)

    @contextlib.contextmanager
    def turn(self, device: torch.device) -> Iterator[None]:
        """Wait, on the device, for the last replay on another stream."""
        pool = self._pool(device)
        with torch.cuda.device(device):
            stream = torch.cuda.current_stream(device)
            if pool.last_stream is not None and pool.last_stream != stream:
                stream.wait_event(pool.last)
            try:
                yield
            finally:
                pool.last.record(stream)
                pool.last_stream = stream


CUDA = Cuda()


@dataclass
class Meter:
    """Tells whether a forward waits for the host, without ever waiting for the device.

    The host is timed while it queues a forward, the device by a mark before and after it, which are read at a later
    forward. A device that took hardly longer than the host was waiting for launches. Only a forward that finds the
    device idle is timed: in front of a full queue (1,024 launches) the host waits for the device, and would seem slow.

    Args:
        clock: seconds on the host.
        share: of the device's time that the host has to need.
        in_a_row: forwards that have to say so: one may have been held up by something else.
    """

    clock: Callable[[], float] = time.perf_counter
    share: float = 0.8
    in_a_row: int = 2
    _pending: tuple[Mark, Mark, float] | None = None
    _seen: int = 0

    def run(self, call: Callable[[], Any], idle: Callable[[], bool], mark: Callable[[], Mark]) -> Any:
        """Run a forward, timed if nothing is pending and the device is idle."""
        self._read()
        if self._pending is not None or not idle():
            return call()
        before, began = mark(), self.clock()
        result = call()
        host = self.clock() - began
        self._pending = (before, mark(), host)
        return result

    def launch_bound(self) -> bool:
        """Whether the last timed forwards waited for the host."""
        self._read()
        return self._seen >= self.in_a_row

    def _read(self) -> None:
        if self._pending is not None and self._pending[1].done():
            before, after, host = self._pending
            self._seen = self._seen + 1 if host >= self.share * after.since(before) else 0
            self._pending = None


class Weights:
    """The modules that a forward reads as they are now, and whether they still are.

    Args:
        root: the model; of it only what it holds itself, its own hooks and attributes do not matter here.
        modules: what else the forward reads, with all that is inside.
    """

    def __init__(self, root: nn.Module, modules: Iterable[nn.Module]) -> None:
        # Flat lists that C functions run over: 60 blocks of Qwen-Image are 2,400 modules and 1,900 parameters.
        self._inside = list(dict.fromkeys(each for module in modules for each in module.modules()))
        package = type(root).__module__.partition(".")[0]
        self._known = (f"{package}.", "torch.nn.modules.", "diffusers.models.", "ppcl_rt.")
        every = (root, *self._inside)
        self._homes = [module._modules for module in every if module._modules]
        self._tensor_homes = [held for m in every for held in (m._parameters, m._buffers) if held]
        self._children, self._held = _values(self._homes), _values(self._tensor_homes)
        self.tensors = [each for each in self._held if each is not None]
        self._addresses = [*map(torch.Tensor.data_ptr, self.tensors)]
        # An attribute that appears is a hook, a replaced forward or a compiled one.
        self._attributes = [module.__dict__ for module in self._inside]
        self._counts = [*map(len, self._attributes)]
        self._forwards = [(a, a["forward"]) for a in self._attributes if "forward" in a]
        self._hooks: list[Any] = [hooks for m in self._inside for hooks in (m._forward_hooks, m._forward_pre_hooks)]

    def current(self) -> bool:
        """Whether modules, parameters and buffers are the same objects at the same addresses, without hooks.

        What is trained in place passes: a graph reads the memory.
        """
        # Tensors are compared one by one: `==` of lists would compare the values of two that differ, on the device.
        held = _values(self._tensor_homes)
        return (
            not any(self._hooks)
            and _values(self._homes) == self._children
            and len(held) == len(self._held)
            and all(map(is_, held, self._held))
            and [*map(torch.Tensor.data_ptr, self.tensors)] == self._addresses
            and [*map(len, self._attributes)] == self._counts
            and all(attributes.get("forward") is forward for attributes, forward in self._forwards)
        )

    def fault(self, device: torch.device) -> str:
        """Say why no graph can hold these modules; nothing where one can."""
        for module in self._inside:
            kind = type(module)
            if why := _hooked(module):
                return why
            if not kind.__module__.startswith(self._known):
                return f"a {kind.__name__} of {kind.__module__.partition('.')[0]} among the layers"
            if "_compiled_call_impl" in module.__dict__:
                return "compiled layers"
        for tensor in self.tensors:
            if type(tensor) not in (torch.Tensor, nn.Parameter):
                return f"weights that are a {type(tensor).__name__}"
            if tensor.device != device:
                return "weights on another device than the inputs"
        return ""


def _values(homes: list[dict[str, Any]]) -> list[Any]:
    return [*chain.from_iterable(map(dict.values, homes))]


def _hooked(module: nn.Module) -> str:
    """Say what somebody put around a module's forward; nothing where it is as it was."""
    own = module.__dict__
    if module._forward_hooks or module._forward_pre_hooks:
        return "forward hooks"
    if "_hf_hook" in own:
        return "hooks of accelerate"
    if getattr(own.get("_diffusers_hook"), "hooks", None):
        return "hooks of diffusers"
    # diffusers leaves a module's own forward there when it takes its last hook away.
    forward = own.get("forward")
    if forward is not None and getattr(forward, "__func__", None) is not type(module).forward:
        return "a replaced forward"
    return ""


@dataclass
class _Entry:
    """A captured graph, and what it was captured for."""

    handle: Handle
    inputs: list[torch.Tensor]
    weights: Weights
    # Held, because the key names it by its identity.
    of: object


@dataclass
class _Note:
    """What is known of forwards of one key that have no graph (yet).

    Attributes:
        settled: all implementations that they run are known.
        failed: why capturing failed: it is not tried again.
        rest: forwards until the layers are looked through again.
        of: as in `_Entry`.
    """

    of: object
    meter: Meter
    settled: bool = False
    failed: str = ""
    rest: int = 0


class Captured(NamedTuple):
    """A graph that is held: the program that it runs, and the shapes of its inputs."""

    of: object
    shapes: tuple[tuple[int, ...], ...]


class Graphs:
    """The graphs of one model.

    Args:
        mode: False for none; True for one of every forward that can have one; ``"auto"`` where forwards wait for the
            host. The first forward of a shape always runs eagerly: it loads kernels, and finds out which to run.
        backend: CUDA, or what stands in for it.
        limit: graphs that are kept; the least recently used one goes first.
        meter: makes what tells ``"auto"`` whether a forward waits for the host.

    Attributes:
        generation: rises whenever weights may have changed their place; graphs of an earlier one are gone.
        hits: forwards that were replayed.
        captures: graphs that were captured.
        why: why the last forward that was not replayed was not; empty while none had a reason other than being new.
    """

    def __init__(
        self,
        mode: Mode = "auto",
        *,
        backend: Backend = CUDA,
        limit: int = MOST_GRAPHS,
        meter: Callable[[], Meter] = Meter,
    ) -> None:
        check_mode(mode)
        self.mode, self._backend, self._limit, self._meter = mode, backend, limit, meter
        self.generation = self.hits = self.captures = 0
        self.why = ""
        self._said: set[str] = set()
        self._entries: OrderedDict[Hashable, _Entry] = OrderedDict()
        self._notes: OrderedDict[Hashable, _Note] = OrderedDict()

    def __repr__(self) -> str:
        why = f", not the last time: {self.why}" if self.why else ""
        return f"<graphs {self.mode}: {len(self._entries)} captured, {self.hits} replayed{why}>"

    def __reduce__(self) -> Any:
        # Graphs are of the memory of one model: a copy, or what comes back from a file, starts with none.
        made = functools.partial(Graphs, mode=self.mode, backend=self._backend, limit=self._limit, meter=self._meter)
        return made, ()

    @property
    def captured(self) -> tuple[Captured, ...]:
        """The graphs that are held, the least recently used first."""
        with _TURN:
            return tuple(
                Captured(entry.of, tuple(tuple(x.shape) for x in entry.inputs)) for entry in self._entries.values()
            )

    def changed(self) -> None:
        """Drop all graphs: weights were read, moved, replaced or dropped."""
        with _TURN:
            self.generation += 1
            entries = [*self._entries.values()]
            self._entries.clear()
            self._notes.clear()
            for entry in entries:
                entry.handle.close()

    def run(
        self,
        walk: Callable[..., Any],
        inputs: dict[str, Any],
        *,
        of: object,
        root: nn.Module,
        modules: Callable[[], Iterable[nn.Module]],
        facts: Callable[[], Hashable],
        obstacle: Callable[[], str],
    ) -> Any:
        """Give ``walk(**inputs)``, replayed where that can be done.

        Args:
            walk: runs the forward; everything that it reads is in ``inputs`` and ``modules``.
            inputs: a tree; tensors are copied into those that the graph reads, all else is part of what it is for.
            of: what ``walk`` runs, told from others by identity.
            root: the model.
            modules: gives the modules that ``walk`` reads.
            facts: gives what else it depends on.
            obstacle: says why the model can have no graph now; nothing where it can.

        Returns:
            Tensors that nothing writes to later.
        """
        if self.mode is False:
            return walk(**inputs)
        leaves, spec = tree_flatten(inputs)
        tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        if why := self._obstacle(leaves, tensors, modules) or obstacle() or _hooked(root):
            self._step_aside(why)
            return walk(**inputs)
        device = tensors[0].device
        key = (id(of), spec, tuple(map(_describe, leaves)), _settings(), facts())
        with _TURN:
            entry = self._entries.get(key)
            if entry is not None and not entry.weights.current():
                self.changed()
                entry = None
            note = None if entry is not None else self._note(key, of)
            if note is not None and self._wanted(note):
                entry = self._capture(key, note, walk, (leaves, spec), device, Weights(root, modules()))
            if entry is not None:
                self._entries.move_to_end(key)
                self.hits += 1
                return self._replay(entry, tensors, device)
        assert note is not None
        return self._eager(note, functools.partial(walk, **inputs), device)

    def _obstacle(
        self, leaves: list[Any], tensors: list[torch.Tensor], modules: Callable[[], Iterable[nn.Module]]
    ) -> str:
        """Say why nothing can be captured or replayed here and now; nothing where it can."""
        if not tensors or not all(self._backend.takes(tensor.device) for tensor in tensors):
            return _NO_DEVICE
        if self._backend.capturing():
            return "inside another capture"
        if torch._C._len_torch_dispatch_stack() or torch._C._functorch.peek_interpreter_stack():
            return "a dispatch mode"
        if torch._C._get_tracing_state():
            return "tracing"
        if any(type(mode) is not DeviceContext for mode in _get_current_function_mode_stack()):
            return "a function mode"
        if torch.is_autocast_enabled(tensors[0].device.type):
            return "autocast"
        if _has_any_global_hook():
            return "forward hooks"
        if any(tensor.device != tensors[0].device for tensor in tensors):
            return "inputs on several devices"
        for leaf in leaves:
            if type(leaf) not in (torch.Tensor, nn.Parameter, *_PLAIN):
                return f"an input that is a {type(leaf).__name__}"
        if torch.is_grad_enabled():
            weights = chain.from_iterable(module.parameters() for module in modules())
            if any(tensor.requires_grad for tensor in chain(tensors, weights)):
                return "gradients"
        if forward_ad._current_level >= 0:
            return "gradients"
        return ""

    def _step_aside(self, why: str, level: int | None = None) -> None:
        self.why = why
        if why not in self._said:
            self._said.add(why)
            quiet = logging.DEBUG if why == _NO_DEVICE else logging.INFO
            level = level or (logging.WARNING if self.mode is True else quiet)
            _log.log(level, "CUDA graphs step aside, forwards run eagerly: %s", why)

    def _note(self, key: Hashable, of: object) -> _Note:
        note = self._notes.setdefault(key, _Note(of, self._meter()))
        self._notes.move_to_end(key)
        while len(self._notes) > _MOST_NOTES:
            self._notes.popitem(last=False)
        return note

    def _wanted(self, note: _Note) -> bool:
        if note.rest:
            note.rest -= 1
            return False
        return note.settled and not note.failed and (self.mode is True or note.meter.launch_bound())

    def _eager(self, note: _Note, call: Callable[[], Any], device: torch.device) -> Any:
        known = choices_made()
        if note.settled and self.mode == "auto":
            backend = self._backend
            result = note.meter.run(call, lambda: backend.idle(device), lambda: backend.mark(device))
        else:
            result = call()
        note.settled = choices_made() == known
        if not note.settled:
            self._step_aside("implementations were still being chosen", logging.INFO)
        return result

    def _capture(
        self,
        key: Hashable,
        note: _Note,
        walk: Callable[..., Any],
        tree: tuple[list[Any], Any],
        device: torch.device,
        weights: Weights,
    ) -> _Entry | None:
        """Capture; None, with the reason noted, where that cannot be done."""
        if why := weights.fault(device):
            note.rest = _REST
            self._step_aside(why)
            return None
        while len(self._entries) >= self._limit:
            self._entries.popitem(last=False)[1].handle.close()
        began = time.perf_counter()
        try:
            # A tensor that is made in inference mode cannot be written to outside of it.
            with torch.inference_mode(False), torch.no_grad():
                leaves = [_own_copy(leaf) if isinstance(leaf, torch.Tensor) else leaf for leaf in tree[0]]
                call = functools.partial(walk, **tree_unflatten(leaves, tree[1]))
                self._backend.warm(device, call)
                known = choices_made()
                handle = self._backend.capture(device, call)
            if choices_made() != known or not weights.current():
                handle.close()
                raise RuntimeError("implementations or weights changed while it was captured")
        except Exception as error:
            # A library's or a driver's, of any kind: without a graph the forward still runs.
            note.failed = f"capturing failed: {str(error).splitlines()[0] if str(error) else type(error).__name__}"
            self._step_aside(note.failed, logging.WARNING)
            return None
        self._notes.pop(key, None)
        self.captures += 1
        inputs = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        entry = self._entries[key] = _Entry(handle, inputs, weights, note.of)
        _log.info("captured a CUDA graph in %.2f s, %d are held", time.perf_counter() - began, len(self._entries))
        return entry

    def _replay(self, entry: _Entry, tensors: list[torch.Tensor], device: torch.device) -> Any:
        with self._backend.turn(device):
            with torch.no_grad():
                torch._foreach_copy_(entry.inputs, tensors)
            entry.handle.replay()
            return tree_map_only(torch.Tensor, torch.clone, entry.handle.outputs)


def check_mode(mode: object) -> None:
    """Raise ValueError unless it is one of ``"auto"``, True and False."""
    if mode != "auto" and mode is not True and mode is not False:
        raise ValueError(f'graphs are "auto", True or False, not {mode!r}')


def _own_copy(tensor: torch.Tensor) -> torch.Tensor:
    # Strides are kept where the tensor has no holes; one that is expanded becomes dense.
    return torch.empty_like(tensor, requires_grad=False).copy_(tensor)


def _describe(leaf: Any) -> Hashable:
    if isinstance(leaf, torch.Tensor):
        return (leaf.shape, leaf.stride(), leaf.dtype, leaf.device)
    # 1, 1.0 and True are equal, and not the same input.
    return (type(leaf), leaf)


def _settings() -> Hashable:
    """What of torch's settings decides which kernels run."""
    cuda = torch.backends.cuda
    return (
        torch.get_float32_matmul_precision(),
        cuda.flash_sdp_enabled(),
        cuda.mem_efficient_sdp_enabled(),
        cuda.cudnn_sdp_enabled(),
        cuda.math_sdp_enabled(),
        cuda.matmul.allow_bf16_reduced_precision_reduction,
        cuda.matmul.allow_fp16_reduced_precision_reduction,
        torch.are_deterministic_algorithms_enabled(),
    )
