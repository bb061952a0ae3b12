"""Operations that are registered with torch by name, at the lowest cost for each call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

_LIBRARY = torch.library.Library("ppcl", "FRAGMENT")


class Op:
    """An operation ``ppcl::name`` without a gradient; call it, or call ``torch.ops.ppcl.name``.

    It is registered by hand: `torch.library.custom_op` also puts a python function at the Autograd key, and a call then
    takes 20 us instead of 8.
    """

    def __init__(self, name: str, schema: str, run: Callable) -> None:
        self._name = name
        _LIBRARY.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
        _LIBRARY.impl(name, self._without_gradient(run), "CompositeExplicitAutograd")
        self._overload = getattr(torch.ops.ppcl, name).default

    def register_fake(self, fake: Callable) -> None:
        """Decorate the function that returns empty results of the right shapes, for tracing."""
        torch.library.register_fake(f"ppcl::{self._name}", self._without_gradient(fake), lib=_LIBRARY)

    def _without_gradient(self, run: Callable) -> Callable:
        name = self._name

        def refuse_gradient(*args: Any) -> Any:
            # Without a kernel at the Autograd key torch would only warn, and use a gradient of zero.
            if torch.is_grad_enabled() and torch._C._any_requires_grad(*args):
                raise RuntimeError(f"ppcl::{name} has no autograd formula: call ppcl_kernels.{name}, or use no_grad")
            return run(*args)

        return refuse_gradient

    def __call__(self, *args: Any) -> Any:
        return self._overload(*args)


def define_op(name: str, schema: str) -> Callable[[Callable], Op]:
    """Decorate the function that runs an operation; the result is an `Op`, which takes a ``register_fake``."""
    return lambda run: Op(name, schema, run)
