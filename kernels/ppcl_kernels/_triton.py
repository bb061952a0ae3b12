"""Triton, or None where it is not available (macOS, Windows): the references still import there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

try:
    import triton
    import triton.language as tl
    from triton.tools.tensor_descriptor import TensorDescriptor
except ImportError:
    triton = tl = TensorDescriptor = None

# TRITON_INTERPRET=1 makes kernels run on CPU tensors. Triton reads it when a kernel is defined, and so does this line.
INTERPRETED = triton is not None and bool(triton.knobs.runtime.interpret)


def jit(**options: Any) -> Callable[[Callable], Any]:
    """Decorate with ``triton.jit(**options)``; without triton, return the function as it is (nothing launches it)."""
    return (lambda kernel: kernel) if triton is None else triton.jit(**options)
