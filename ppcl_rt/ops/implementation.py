"""The names of what can compute an operation, of the calls that are timed, and the backend that a user asks for."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from typing import NamedTuple, TypeVar

T = TypeVar("T")

BACKENDS = ("auto", "torch", "triton")
# The fastest implementation at one shape is a candidate for another shape if no size differs by more than this factor:
# a launch that takes one wave of the multiprocessors there takes between half a wave and two waves here.
_NEIGHBOUR_FACTOR = 2.0


class Implementation(NamedTuple):
    """One way to compute an operation.

    Attributes:
        kind: ``torch`` (plain torch), ``triton`` (a Triton kernel of `ppcl_kernels`), ``cublas`` (torch's matrix
            product, then a small Triton kernel), ``cublaslt`` (a matrix product with the GELU in its epilogue),
            ``packed`` (one batched matrix product of q, k and v, then a small Triton kernel), ``cudnn`` and ``flash``
            (torch's attention with its cuDNN or FlashAttention backend).
        tile: the tile of a Triton kernel as plain numbers; None for other kinds, or to let the kernel choose its tile.
    """

    kind: str
    tile: tuple[int, ...] | None = None

    def tile_as(self, tile_type: Callable[..., T]) -> T | None:
        """Make the tile of a kernel out of the numbers; None where there are none."""
        return None if self.tile is None else tile_type(*self.tile)

    def __str__(self) -> str:
        return self.kind if self.tile is None else f"{self.kind} {'x'.join(map(str, self.tile))}"


TORCH, TRITON = Implementation("torch"), Implementation("triton")
CUBLAS, CUBLASLT, PACKED = Implementation("cublas"), Implementation("cublaslt"), Implementation("packed")
CUDNN, FLASH = Implementation("cudnn"), Implementation("flash")


class Key(NamedTuple):
    """What the time of an operation depends on, apart from the device.

    Attributes:
        form: words that have to be equal for two calls to be compared: the operation, the dtype, what follows a matrix
            product, whether there is a bias or a mask.
        sizes: batch, tokens and widths, in which the calls of one form differ.
    """

    form: str
    sizes: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.form} {'x'.join(map(str, self.sizes))}"

    @classmethod
    def parse(cls, text: str) -> Key:
        """Read what `str` has written.

        Raises:
            ValueError: `str` of no key gives this text.
        """
        form, _, sizes = text.rpartition(" ")
        return cls(form, tuple(map(int, sizes.split("x"))))

    def distance(self, other: Key) -> float:
        """Sum ``|log(a / b)|`` over the sizes; infinite for another form, or where a size differs by too much."""
        if self.form != other.form or len(self.sizes) != len(other.sizes):
            return math.inf
        # One is added, because a size may be 0.
        ratios = [abs(math.log((a + 1) / (b + 1))) for a, b in zip(self.sizes, other.sizes)]
        return math.inf if max(ratios, default=0.0) > math.log(_NEIGHBOUR_FACTOR) else sum(ratios)


def backend() -> str:
    """Read ``PPCL_BACKEND``: ``auto`` (the default) takes the fastest implementation, the others force a kind.

    Raises:
        ValueError: the value is not one of `BACKENDS`.
    """
    asked = os.environ.get("PPCL_BACKEND", "auto")
    if asked not in BACKENDS:
        raise ValueError(f'PPCL_BACKEND is "{asked}", wanted one of {", ".join(BACKENDS)}')
    return asked
