"""Small, real kernels with the faults that a fit run has to find; they run in triton's interpreter."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
import triton
import triton.language as tl

from ppcl_kernels.tools.cases import Case, Prepared, Setting, Work

SIDE, BLOCK = 128, 64
FAULTS = ("fine", "hangs", "dies", "garbage", "flaky", "spills over", "writes nothing when prepared", "fine too")


@triton.jit
def _double_kernel(x, y, runs, FAULT: tl.constexpr, SIDE: tl.constexpr, BLOCK: tl.constexpr):
    """Write ``2 x`` of ``[SIDE, SIDE]``, one tile for each thread block."""
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    at = rows[:, None] * SIDE + cols[None, :]
    value = 2 * tl.load(x + at)
    last = tl.program_id(0) + tl.program_id(1) == 2
    if FAULT == "hangs":
        # Wait for a flag that is never set.
        while tl.load(runs) < 1:
            value += 0
    if FAULT == "dies":
        value += tl.load(x + (1 << 44))
    if FAULT == "garbage" and last:
        value = value * 0 + 0.5
    if FAULT == "flaky" and last:
        # From the second run on the last bit of some values changes, which is far below any limit.
        value += 2e-7 * (tl.atomic_add(runs, 1) > 0)
    tl.store(y + at, value)
    if FAULT == "spills over" and last:
        tl.store(y + SIDE * SIDE + tl.arange(0, BLOCK), tl.zeros((BLOCK,), tl.float32))


def _work(setting: Setting, fault: str) -> Work:
    x, runs = torch.randn(1, SIDE, SIDE), torch.zeros(1, dtype=torch.int32)

    def call() -> Sequence[torch.Tensor]:
        y = x.new_empty(x.shape)
        _double_kernel[(SIDE // BLOCK, SIDE // BLOCK)](x, y, runs, fault, SIDE, BLOCK)
        return [y]

    def prepare() -> Prepared:
        return Prepared(None, call, call if "prepared" not in fault else lambda: [x.new_empty(x.shape)])

    return Work(call, lambda: [2 * x.double()], 1, 1, prepare)


def cases(setting: Setting) -> list[Case]:
    """Cases of one kernel, whose tiles are the faults, numbered as in `FAULTS`."""
    # diffusers and pydantic cannot be imported here, and these modules do not need them.
    import ppcl_kernels.tools.gpu_run
    import ppcl_kernels.tools.pytest_log
    import ppcl_kernels.tools.report  # noqa: F401

    return [Case("double", (number,), fault, partial(_work, setting, fault)) for number, fault in enumerate(FAULTS)]


def one_that_hangs(setting: Setting) -> list[Case]:
    """Cases of a fine kernel, and after it of one that hangs."""
    return cases(setting)[:2]


def fine(setting: Setting) -> list[Case]:
    """The case without a fault."""
    return cases(setting)[:1]
