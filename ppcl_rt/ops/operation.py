"""An operation of a block: what can run it, what its time depends on, its implementations, and how it is dispatched.

An operation acts on tensors. It is built once, when its file is imported; a call is a named tuple of its arguments. The
first call at a shape chooses an implementation and prepares it; later calls at that shape, with weights at the same
addresses, look it up and run it: nothing is checked twice.
"""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Sequence
from typing import Any, ClassVar, Generic, TypeVar

import torch

import ppcl_kernels as kernels
from ppcl_rt.ops import table as ways
from ppcl_rt.ops.table import TORCH, TRITON, Key, Way

C = TypeVar("C")
R = TypeVar("R")

# Prepared calls an operation keeps, some kilobytes each: 60 blocks of 3 at 40 shapes. Then it starts anew.
_MOST_PREPARED = 8192
# Every operation by name; `bench` walks them.
OPERATIONS: dict[str, Operation[Any, Any]] = {}


class Operation(ABC, Generic[C, R]):
    """One operation with its implementations; instances are in `OPERATIONS`.

    Attributes:
        name: what tables call it.
    """

    name: ClassVar[str]

    def __init__(self) -> None:
        self._prepared: dict[Hashable, Callable[[C], R]] = {}
        OPERATIONS[self.name] = self

    # What an operation says of itself.

    @abstractmethod
    def like(self, call: C) -> torch.Tensor:
        """Give a tensor that says which device and dtype a call is of."""

    @abstractmethod
    def tensors(self, call: C) -> Sequence[torch.Tensor | None]:
        """Give all that a call reads in the model's dtype."""

    @abstractmethod
    def signature(self, call: C) -> Hashable:
        """Give what a prepared call depends on: `address` of what stays, `form` of what moves, counts."""

    @abstractmethod
    def fits(self, call: C) -> bool:
        """Whether the kernels take the shapes of a call; device and dtypes were checked."""

    @abstractmethod
    def key(self, call: C) -> Key:
        """Say what the time of a call depends on."""

    @abstractmethod
    def implementations(self, call: C) -> list[Way]:
        """List what can run a call, best guess first; `TORCH` is among them."""

    @abstractmethod
    def run(self, call: C, way: Way) -> R:
        """Run a call one way."""

    def prepare(self, call: C, way: Way) -> Callable[[C], R]:
        """Bind one way to the shapes and the weights of a call: what is returned takes calls of equal `signature`."""
        return lambda call: self.run(call, way)

    @abstractmethod
    def opaque(self, call: C) -> R:
        """Run a call as one custom op, for ``torch.compile``: the choice is made inside."""

    # Dispatch.

    def __call__(self, call: C) -> R:
        """Run a call in its fastest way, or in the one that ``PPCL_BACKEND`` asks for.

        Raises:
            ValueError: ``PPCL_BACKEND`` is none of `BACKENDS`, or ``triton`` where no kernel can run.
        """
        asked, like = ways.backend(), self.like(call)
        if asked == "torch" or (asked == "auto" and not like.is_cuda):
            return self.run(call, TORCH)
        if torch.compiler.is_compiling():
            return self.opaque(call)
        if type(like) is not torch.Tensor or torch._C._len_torch_dispatch_stack():
            # Somebody watches the ops, or these are no tensors in memory.
            return self.run(call, self.choose(call))
        signature = (asked, self.signature(call))
        prepared = self._prepared.get(signature)
        if prepared is None:
            way = self.choose(call)
            if like.is_cuda and torch.cuda.is_current_stream_capturing():
                return self.run(call, way)
            prepared = self.prepare(call, way)
            if len(self._prepared) >= _MOST_PREPARED:
                self._prepared.clear()
            self._prepared[signature] = prepared
        return prepared(call)

    def choose(self, call: C) -> Way:
        """Pick the implementation that runs a call here.

        Raises:
            ValueError: as when called.
        """
        asked, like = ways.backend(), self.like(call)
        if asked == "triton" and not (like.is_cuda or kernels.can_run(torch.empty(0, device=like.device))):
            raise ValueError(
                f"PPCL_BACKEND is triton, but the model is on {like.device}: move it to a GPU, or set "
                "PPCL_BACKEND=auto (TRITON_INTERPRET=1 runs kernels on a CPU, slowly)"
            )
        able = (
            kernels.can_run(like)
            and all(t is None or (t.dtype == like.dtype and t.device == like.device) for t in self.tensors(call))
            and self.fits(call)
        )
        if asked == "torch" or not able or (asked == "auto" and not like.is_cuda):
            return TORCH
        if asked == "triton":
            # A kernel that failed its checks on this device offers no tile.
            return TRITON if any(way.kind == "triton" for way in self.implementations(call)) else TORCH
        table, key = ways.table_of(like.device.index or 0), self.key(call)
        listed = functools.partial(self.implementations, call)
        if torch.cuda.is_current_stream_capturing():
            # Nothing can be timed now.
            return table.recall(key, listed) or listed()[0]
        return table.fastest(key, listed, functools.partial(self.run, call))


def forget() -> None:
    """Prepare and choose anew from the next call on: after tables or what may run have changed."""
    for operation in OPERATIONS.values():
        operation._prepared.clear()


def form(tensor: torch.Tensor | None) -> Hashable:
    """What a prepared call asks of a tensor that moves from call to call."""
    return None if tensor is None else (tensor.shape, tensor.stride(), tensor.dtype, tensor.get_device())


def address(*tensors: torch.Tensor | None) -> Hashable:
    """What a prepared call asks of tensors that stay: where they are, and how they lie there."""
    return tuple([None if t is None else (t.data_ptr(), t.shape, t.stride(), t.dtype) for t in tensors])


def vectors(*tensors: torch.Tensor | None) -> Hashable:
    """Ask the same of vectors, in less time."""
    return tuple([None if t is None else (t.data_ptr(), t.numel(), t.is_contiguous(), t.dtype) for t in tensors])


def name_of(dtype: torch.dtype) -> str:
    """``bfloat16`` for `torch.bfloat16`."""
    return str(dtype).removeprefix("torch.")


def flag(on: bool, name: str) -> str:
    """A word of a key's form, or its absence."""
    return name if on else f"no-{name}"


_LIBRARY = torch.library.Library("ppcl_rt", "DEF")


def define_op(name: str, schema: str, run: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    """Define ``torch.ops.ppcl_rt.<name>``: an operation as ``torch.compile`` sees it."""
    _LIBRARY.define(name + schema)
    _LIBRARY.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"ppcl_rt::{name}", fake, lib=_LIBRARY)
    return getattr(torch.ops.ppcl_rt, name).default
