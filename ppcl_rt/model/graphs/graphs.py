"""The graphs of one model: whether a forward is replayed, captured or run eagerly."""

from __future__ import annotations

import functools
import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import nn
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten

from ppcl_rt.model.graphs.backend import Backend, GraphHandle
from ppcl_rt.model.graphs.cuda import CUDA
from ppcl_rt.model.graphs.keys import describe, torch_settings
from ppcl_rt.model.graphs.meter import Meter
from ppcl_rt.model.graphs.obstacles import NOT_ON_CUDA, obstacle_of_forward
from ppcl_rt.model.graphs.weights import Weights, hooks_of
from ppcl_rt.ops.table import choices_made

# Graphs of one model. A schedule of eight plans under guidance, whose two prompts differ in length, takes sixteen.
# Graphs share the memory of their intermediate results, so each further one costs its inputs, its outputs and its list
# of launches: a few MB.
MOST_GRAPHS = 16
# Keys that are remembered while it is not known whether a graph pays.
_MOST_CANDIDATES = 256
# Forwards that pass, after the layers were found to be an obstacle, before they are checked again: a check takes
# milliseconds.
_FORWARDS_BETWEEN_CHECKS = 20
# Held during a capture or a replay, because all graphs of a device share memory. One lock for all models: a replay is
# queued in less than a millisecond, and a model that held a lock could not be copied.
_LOCK = threading.RLock()
_log = logging.getLogger(__name__)

Mode = Literal["auto", True, False]


@dataclass
class _Entry:
    """A captured graph, and what it was captured for.

    Attributes:
        handle: replays it.
        inputs: the tensors that it reads its inputs from.
        weights: the modules that it was captured on.
        program: kept alive, because the key holds its identity.
    """

    handle: GraphHandle
    inputs: list[torch.Tensor]
    weights: Weights
    program: object


@dataclass
class _Candidate:
    """What is known of the forwards of one key that has no graph (yet).

    Attributes:
        program: as in `_Entry`.
        meter: measures whether they wait for the host.
        choices_settled: whether the last one chose no implementation for the first time.
        capture_error: why capturing failed; it is not tried again. Empty if it did not.
        forwards_to_next_check: how many of them run before their layers are checked again.
    """

    program: object
    meter: Meter
    choices_settled: bool = False
    capture_error: str = ""
    forwards_to_next_check: int = 0


class CapturedGraph(NamedTuple):
    """What a graph was captured for: a program, and the shapes of its inputs."""

    program: object
    input_shapes: tuple[tuple[int, ...], ...]


class Graphs:
    """The graphs of one model.

    Args:
        mode: False for no graphs; True for a graph of every forward that can have one; ``"auto"`` for a graph of those
            that wait for the host. The first forward of a key always runs eagerly: it loads kernels, and chooses
            implementations.
        backend: CUDA, or what takes its place in tests.
        limit: how many graphs are kept; the least recently used one is dropped first.
        meter: makes a meter, which tells ``"auto"`` whether a forward waits for the host.

    Attributes:
        generation: rises whenever weights may have moved; all graphs of earlier generations have been dropped.
        replays: forwards that were replayed.
        captures: graphs that were captured.
        eager_reason: why the last forward that ran eagerly did so; empty if only for being new or not launch-bound.
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
        self.generation = self.replays = self.captures = 0
        self.eager_reason = ""
        self._logged_reasons: set[str] = set()
        self._entries: OrderedDict[Hashable, _Entry] = OrderedDict()
        self._candidates: OrderedDict[Hashable, _Candidate] = OrderedDict()

    def __repr__(self) -> str:
        reason = f", last eager forward: {self.eager_reason}" if self.eager_reason else ""
        return f"<graphs {self.mode}: {len(self._entries)} captured, {self.replays} replayed{reason}>"

    def __reduce__(self) -> Any:
        # Graphs hold the memory of one model: copies of them, and what is unpickled, start without any.
        make = functools.partial(Graphs, mode=self.mode, backend=self._backend, limit=self._limit, meter=self._meter)
        return make, ()

    @property
    def captured(self) -> tuple[CapturedGraph, ...]:
        """The graphs that are kept, the least recently used first."""
        with _LOCK:
            return tuple(
                CapturedGraph(entry.program, tuple(tuple(x.shape) for x in entry.inputs))
                for entry in self._entries.values()
            )

    def drop_all(self) -> None:
        """Drop all graphs, because weights were read, moved, replaced or dropped."""
        with _LOCK:
            self.generation += 1
            entries = [*self._entries.values()]
            self._entries.clear()
            self._candidates.clear()
            for entry in entries:
                entry.handle.close()

    def run(
        self,
        forward: Callable[..., Any],
        inputs: dict[str, Any],
        *,
        program: object,
        model: nn.Module,
        modules: Callable[[], Iterable[nn.Module]],
        conditions: Callable[[], Hashable],
        obstacle: Callable[[], str],
    ) -> Any:
        """Return ``forward(**inputs)``, replayed where possible.

        Args:
            forward: all that it reads is in ``inputs`` and ``modules``.
            inputs: a tree. Tensors are copied to where the graph reads them; everything else is part of the key.
            program: what ``forward`` runs; told from other programs by its identity.
            model: the module that ``forward`` belongs to.
            modules: gives the modules that ``forward`` reads.
            conditions: gives everything else that ``forward`` depends on.
            obstacle: says why the model can have no graph now; an empty string if it can.

        Returns:
            Tensors that no later forward overwrites.
        """
        if self.mode is False:
            return forward(**inputs)
        leaves, spec = tree_flatten(inputs)
        tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        reason = obstacle_of_forward(self._backend, leaves, tensors, modules) or obstacle() or hooks_of(model)
        if reason:
            self._note_eager(reason)
            return forward(**inputs)
        device = tensors[0].device
        key = (id(program), spec, tuple(map(describe, leaves)), torch_settings(), conditions())
        with _LOCK:
            entry = self._entries.get(key)
            if entry is not None and not entry.weights.unchanged():
                self.drop_all()
                entry = None
            # Asked again with the lock held: a `drop_all` comes before, and shows here, or after, and drops this.
            reason = "" if entry is not None else obstacle()
            candidate = None if entry is not None or reason else self._candidate(key, program)
            if candidate is not None and self._graph_wanted(candidate):
                entry = self._capture(key, candidate, forward, (leaves, spec), device, Weights(model, modules()))
            if entry is not None:
                self._entries.move_to_end(key)
                self.replays += 1
                return self._replay(entry, tensors, device)
        if candidate is None:
            self._note_eager(reason)
            return forward(**inputs)
        return self._run_eagerly(candidate, functools.partial(forward, **inputs), device)

    def _note_eager(self, reason: str, level: int | None = None) -> None:
        """Keep why a forward runs eagerly, and log each reason once."""
        self.eager_reason = reason
        if reason not in self._logged_reasons:
            self._logged_reasons.add(reason)
            if level is None:
                quiet = logging.DEBUG if reason == NOT_ON_CUDA else logging.INFO
                level = logging.WARNING if self.mode is True else quiet
            _log.log(level, "running without a CUDA graph: %s", reason)

    def _candidate(self, key: Hashable, program: object) -> _Candidate:
        candidate = self._candidates.setdefault(key, _Candidate(program, self._meter()))
        self._candidates.move_to_end(key)
        while len(self._candidates) > _MOST_CANDIDATES:
            self._candidates.popitem(last=False)
        return candidate

    def _graph_wanted(self, candidate: _Candidate) -> bool:
        """Whether to capture now; counts the forwards to the next check of the layers."""
        if candidate.forwards_to_next_check:
            candidate.forwards_to_next_check -= 1
            return False
        possible = candidate.choices_settled and not candidate.capture_error
        return possible and (self.mode is True or candidate.meter.launch_bound())

    def _run_eagerly(self, candidate: _Candidate, call: Callable[[], Any], device: torch.device) -> Any:
        choices_before = choices_made()
        if candidate.choices_settled and self.mode == "auto":
            backend = self._backend
            result = candidate.meter.run(call, lambda: backend.idle(device), lambda: backend.mark(device))
        else:
            result = call()
        candidate.choices_settled = choices_made() == choices_before
        if not candidate.choices_settled:
            self._note_eager("implementations were still being chosen", logging.INFO)
        return result

    def _capture(
        self,
        key: Hashable,
        candidate: _Candidate,
        forward: Callable[..., Any],
        tree: tuple[list[Any], Any],
        device: torch.device,
        weights: Weights,
    ) -> _Entry | None:
        """Capture a forward.

        Args:
            key: of the graph.
            candidate: what is known of the key.
            forward: the callable.
            tree: the inputs as leaves and tree spec.
            device: of the inputs.
            weights: the modules as they are now.

        Returns:
            The graph; None if it cannot be captured. Then the reason is in the candidate and in `eager_reason`.
        """
        if reason := weights.obstacle(device):
            candidate.forwards_to_next_check = _FORWARDS_BETWEEN_CHECKS
            self._note_eager(reason)
            return None
        while len(self._entries) >= self._limit:
            self._entries.popitem(last=False)[1].handle.close()
        began = time.perf_counter()
        try:
            # Out of inference mode, because a tensor that is made in it cannot be written to outside of it.
            with torch.inference_mode(False), torch.no_grad():
                leaves = [_copy(leaf) if isinstance(leaf, torch.Tensor) else leaf for leaf in tree[0]]
                call = functools.partial(forward, **tree_unflatten(leaves, tree[1]))
                self._backend.warm(device, call)
                choices_before = choices_made()
                handle = self._backend.capture(device, call)
            if choices_made() != choices_before or not weights.unchanged():
                handle.close()
                raise RuntimeError("implementations or weights changed while it was captured")
        except Exception as error:
            # Libraries and drivers raise exceptions of many types. Without a graph the forward can still run.
            message = str(error).splitlines()[0] if str(error) else type(error).__name__
            candidate.capture_error = f"capturing failed: {message}"
            self._note_eager(candidate.capture_error, logging.WARNING)
            return None
        self._candidates.pop(key, None)
        self.captures += 1
        inputs = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        entry = self._entries[key] = _Entry(handle, inputs, weights, candidate.program)
        _log.info("captured a CUDA graph in %.2f s, %d are kept", time.perf_counter() - began, len(self._entries))
        return entry

    def _replay(self, entry: _Entry, tensors: list[torch.Tensor], device: torch.device) -> Any:
        with self._backend.exclusive_memory(device):
            with torch.no_grad():
                torch._foreach_copy_(entry.inputs, tensors)
            entry.handle.replay()
            return tree_map_only(torch.Tensor, torch.clone, entry.handle.outputs)


def check_mode(mode: object) -> None:
    """Refuse what is not a mode.

    Raises:
        ValueError: it is none of ``"auto"``, True and False.
    """
    if mode != "auto" and mode is not True and mode is not False:
        raise ValueError(f'graphs are "auto", True or False, not {mode!r}')


def _copy(tensor: torch.Tensor) -> torch.Tensor:
    # Strides are kept where the tensor has no holes; an expanded tensor becomes dense.
    return torch.empty_like(tensor, requires_grad=False).copy_(tensor)
