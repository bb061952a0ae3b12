"""An operation of a block, and how a call of it comes to an implementation.

An operation computes on tensors. There is one object of each, made when its file is imported. A call is a named tuple
of arguments. The first call at a shape chooses an implementation (`Operation.choose`) and prepares it
(`Operation.prepare`): arguments are checked, and the launch is bound to the shapes and to the addresses of the weights.
Later calls with an equal signature (`Operation.signature`) find the prepared implementation in a dictionary and run it
without further checks.
"""

from __future__ import annotations

import functools
import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Sequence
from typing import Any, ClassVar, Generic, TypeVar

import torch

import ppcl_kernels as kernels
from ppcl_rt.ops.implementation import TORCH, TRITON, Implementation, Key, backend
from ppcl_rt.ops.table import ran_out_of_memory, table_of

C = TypeVar("C")
R = TypeVar("R")

# Prepared calls that an operation keeps, some kilobytes each: 60 blocks x 3 calls at 40 shapes. At the limit all are
# dropped.
_MOST_PREPARED = 8192
_log = logging.getLogger(__name__)
# Every operation by name; the benches go through them.
OPERATIONS: dict[str, Operation[Any, Any]] = {}


class Operation(ABC, Generic[C, R]):
    """One operation with its implementations; the objects are in `OPERATIONS`.

    Type parameters: ``C`` the named tuple of arguments, ``R`` the result.

    Attributes:
        name: the first word of its keys in tables.
    """

    name: ClassVar[str]

    def __init__(self) -> None:
        self._prepared: dict[Hashable, Callable[[C], R]] = {}
        OPERATIONS[self.name] = self

    # What each operation defines.

    @abstractmethod
    def main_input(self, call: C) -> torch.Tensor:
        """Return the tensor whose device and dtype are those of the call."""

    @abstractmethod
    def tensors(self, call: C) -> Sequence[torch.Tensor | None]:
        """Return all tensors of the call that have to have the dtype of the main input for a kernel to read them."""

    @abstractmethod
    def signature(self, call: C) -> Hashable:
        """Return what a prepared implementation depends on.

        It is made of `weight_signature` or `vector_signature` of the tensors that stay where they are,
        `layout_signature` of those that are new in each call, and the counts.
        """

    @abstractmethod
    def fits(self, call: C) -> bool:
        """Whether kernels take the shapes and strides of the call; the caller checks device and dtypes."""

    @abstractmethod
    def key(self, call: C) -> Key:
        """Return what the time of the call depends on."""

    @abstractmethod
    def implementations(self, call: C) -> list[Implementation]:
        """List what can run the call, presumably fastest first; `TORCH` is among them."""

    @abstractmethod
    def run(self, call: C, implementation: Implementation) -> R:
        """Run the call with one implementation, with all checks."""

    def checked(self, call: C) -> C:
        """Return the call whose result is compared with that of plain torch, with the same launches as ``call``."""
        return call

    def prepare(self, call: C, implementation: Implementation) -> Callable[[C], R]:
        """Bind one implementation to the shapes and the weights of a call.

        Returns:
            A function that runs any call whose signature equals that of this one.
        """
        return lambda call: self.run(call, implementation)

    @abstractmethod
    def run_custom_op(self, call: C) -> R:
        """Run the call as one custom op, which ``torch.compile`` does not look into: the choice is made inside."""

    # How calls are dispatched.

    def __call__(self, call: C) -> R:
        """Run a call with its fastest implementation, or with the kind that ``PPCL_BACKEND`` forces.

        Raises:
            ValueError: ``PPCL_BACKEND`` is not one of `BACKENDS`, or it is ``triton`` where no kernel can run.
        """
        asked, x = backend(), self.main_input(call)
        if asked == "torch" or (asked == "auto" and not x.is_cuda):
            return self.run(call, TORCH)
        if torch.compiler.is_compiling():
            return self.run_custom_op(call)
        if type(x) is not torch.Tensor or torch._C._len_torch_dispatch_stack():
            # Tensors without memory (fake tensors, subclasses), or a dispatch mode that has to see every op.
            return self.run(call, self._choose_or_none(call) or TORCH)
        signature = (asked, self.signature(call))
        prepared = self._prepared.get(signature)
        if prepared is None:
            implementation = self._choose_or_none(call)
            if implementation is None:
                return self.run(call, TORCH)
            if x.is_cuda and torch.cuda.is_current_stream_capturing():
                return self.run(call, implementation)
            prepared = self.prepare(call, implementation)
            if len(self._prepared) >= _MOST_PREPARED:
                self._prepared.clear()
            self._prepared[signature] = prepared
        return prepared(call)

    def _choose_or_none(self, call: C) -> Implementation | None:
        """Choose, or return None if memory ran out: plain torch runs this call, and the next call chooses again."""
        try:
            return self.choose(call)
        except RuntimeError as error:
            if not ran_out_of_memory(error):
                raise
            _log.warning(
                "%s: memory ran out while implementations were compared: plain torch runs once", self.key(call)
            )
            return None

    def choose(self, call: C) -> Implementation:
        """Choose the implementation that runs a call here.

        Raises:
            ValueError: as `__call__`.
            RuntimeError: as `ImplementationTable.fastest`.
        """
        asked, x = backend(), self.main_input(call)
        if asked == "triton" and not (x.is_cuda or kernels.can_run(torch.empty(0, device=x.device))):
            raise ValueError(
                f"PPCL_BACKEND is triton, but the model is on {x.device}: move it to a GPU, or set "
                "PPCL_BACKEND=auto (TRITON_INTERPRET=1 runs kernels on a CPU, slowly)"
            )
        kernels_can_run = (
            kernels.can_run(x)
            and all(t is None or (t.dtype == x.dtype and t.device == x.device) for t in self.tensors(call))
            and self.fits(call)
        )
        if asked == "torch" or not kernels_can_run or (asked == "auto" and not x.is_cuda):
            return TORCH
        if asked == "triton":
            # A kernel that has failed its checks on this device offers no tile.
            return TRITON if any(each.kind == "triton" for each in self.implementations(call)) else TORCH
        table, key = table_of(x.device.index or 0), self.key(call)
        implementations = functools.partial(self.implementations, call)
        if torch.cuda.is_current_stream_capturing():
            # Nothing can be timed during a capture.
            return table.look_up(key, implementations) or implementations()[0]

        def run_checked(implementation: Implementation) -> R:
            return self.run(self.checked(call), implementation)

        return table.fastest(key, implementations, functools.partial(self.run, call), run_checked)


def drop_prepared_calls() -> None:
    """Drop all prepared calls, so that the next calls choose anew: after a change of tables or of allowed kernels."""
    for operation in OPERATIONS.values():
        operation._prepared.clear()


def layout_signature(tensor: torch.Tensor | None) -> Hashable:
    """Return what a prepared call requires of a tensor that is another one in each call: its shape and strides."""
    return None if tensor is None else (tensor.shape, tensor.stride(), tensor.dtype, tensor.get_device())


def weight_signature(*tensors: torch.Tensor | None) -> Hashable:
    """Return what a prepared call requires of weights: the addresses that the launch was bound to, and their layout."""
    return tuple([None if t is None else (t.data_ptr(), t.shape, t.stride(), t.dtype) for t in tensors])


def vector_signature(*tensors: torch.Tensor | None) -> Hashable:
    """Return the same for weights of one dimension, such as biases; it takes less time."""
    return tuple([None if t is None else (t.data_ptr(), t.numel(), t.is_contiguous(), t.dtype) for t in tensors])


def dtype_name(dtype: torch.dtype) -> str:
    """Return ``bfloat16`` for `torch.bfloat16`."""
    return str(dtype).removeprefix("torch.")


def flag(on: bool, name: str) -> str:
    """Return a word for the form of a key: ``bias``, or ``no-bias`` if it is off."""
    return name if on else f"no-{name}"


_LIBRARY = torch.library.Library("ppcl_rt", "DEF")


def define_op(name: str, schema: str, run: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    """Define the custom op ``torch.ops.ppcl_rt.<name>``: an operation as ``torch.compile`` sees it.

    Args:
        name: of the op.
        schema: of its arguments and results, as `torch.library` writes it.
        run: computes the results.
        fake: makes empty tensors like the results.
    """
    _LIBRARY.define(name + schema)
    _LIBRARY.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"ppcl_rt::{name}", fake, lib=_LIBRARY)
    return getattr(torch.ops.ppcl_rt, name).default
