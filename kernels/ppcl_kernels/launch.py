"""A kernel with its arguments, as a value that runs on a device or compiles without one, and the device's limits."""

from __future__ import annotations

import contextlib
import functools
from dataclasses import dataclass, field
from typing import Any

import torch

from ppcl_kernels._check import DTYPES
from ppcl_kernels._triton import INTERPRETED, TensorDescriptor, triton

_KIB = 1024
_TRITON_DTYPES = {
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.uint8: "u8",
}


@dataclass(frozen=True)
class Target:
    """An architecture and the limits that tiles depend on.

    Attributes:
        arch: such as ``sm_90`` (compute capability 9.0), ``gfx942`` (AMD), or ``interpreter`` (no device).
        shared_bytes: shared memory that one thread block may use.
        multiprocessors: their number; the grid of a persistent kernel is a multiple of it.
    """

    arch: str
    shared_bytes: int
    multiprocessors: int

    @classmethod
    def of(cls, device: torch.device) -> Target:
        """Return the target of a device.

        Raises:
            ValueError: kernels cannot run on the device.
        """
        if device.type == "cpu" and INTERPRETED:
            # Few multiprocessors, so that a persistent loop takes more than one turn.
            return cls("interpreter", 227 * _KIB, 2)
        if device.type != "cuda" or triton is None:
            raise ValueError(
                f"kernels need a GPU and triton, the tensors are on {device}: move them, or call the reference "
                "(TRITON_INTERPRET=1, set before the import, runs kernels on a CPU, slowly)"
            )
        return _device_target(device.index if device.index is not None else torch.cuda.current_device())

    @property
    def amd(self) -> bool:
        """Whether it is an AMD architecture."""
        return self.arch.startswith("gfx")

    @property
    def capability(self) -> int:
        """Compute capability as one number (90 for 9.0), 0 where there is none."""
        return int(self.arch.removeprefix("sm_")) if self.arch.startswith("sm_") else 0

    @property
    def wgmma(self) -> bool:
        """Whether its tensor cores are Hopper's, which read operands from shared memory; so does the interpreter."""
        return self.capability == 90 or self.arch == "interpreter"

    @property
    def tcgen05(self) -> bool:
        """Whether its tensor cores are datacentre Blackwell's, which also accumulate in a memory of their own."""
        return self.capability in (100, 103)

    @property
    def tma(self) -> bool:
        """Whether kernels copy tiles by tensor descriptors (TMA): where tensor cores read operands from shared memory.

        sm_120 has TMA too, but its tensor cores read operands from registers, and descriptors need more registers:
        attention spills, and with triton 3.6 matrix products spill too.
        """
        return self.wgmma or self.tcgen05


def can_run(x: torch.Tensor) -> bool:
    """Return whether kernels can run on a tensor's device and take its dtype."""
    able = INTERPRETED if x.device.type == "cpu" else x.device.type == "cuda" and triton is not None
    return able and x.dtype in DTYPES


@functools.cache
def _device_target(index: int) -> Target:
    # Triton asks the driver. Torch does not report everywhere how much shared memory a thread block may opt in to.
    limits = triton.runtime.driver.active.utils.get_device_properties(index)
    if torch.version.hip:
        arch = torch.cuda.get_device_properties(index).gcnArchName.split(":")[0]
    else:
        arch = "sm_{}{}".format(*torch.cuda.get_device_capability(index))
    return Target(arch, limits["max_shared_mem"], limits["multiprocessor_count"])


# Targets of `ppcl_kernels.tools.aot`, with the limits in the vendors' tables: A100, RTX 3090, RTX 4090, H100, B200,
# RTX 5090 and MI300X.
TARGETS = {
    target.arch: target
    for target in (
        Target("sm_80", 163 * _KIB, 108),
        Target("sm_86", 99 * _KIB, 82),
        Target("sm_89", 99 * _KIB, 128),
        Target("sm_90", 227 * _KIB, 132),
        Target("sm_100", 227 * _KIB, 148),
        Target("sm_120", 99 * _KIB, 170),
        Target("gfx942", 64 * _KIB, 304),
    )
}


def register_limit(warps: int, resident: int) -> int | None:
    """Return the registers of a thread at which ``resident`` thread blocks share 65,536; None for no limit."""
    limit = 65536 // (32 * warps * resident) // 8 * 8
    return limit if limit < 255 else None


@dataclass(frozen=True)
class Launch:
    """A kernel with its grid and arguments.

    ``registers`` limits the registers of a thread, None for no limit. For `compile` the tensors may be meta tensors:
    what is compiled without a device is what would run on one.
    """

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any] = field(repr=False)
    warps: int
    stages: int
    registers: int | None = None

    def run(self) -> Any:
        """Launch on the device of the tensors, current or not; returns triton's compiled kernel."""
        device = next(value.device for value in self.arguments.values() if isinstance(value, torch.Tensor))
        with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
            return self.kernel[self.grid](**self.arguments, **self._options(amd=torch.version.hip is not None))

    def _options(self, amd: bool) -> dict[str, int]:
        options = {"num_warps": self.warps, "num_stages": self.stages}
        # AMD's compiler has no such limit.
        return options if self.registers is None or amd else options | {"maxnreg": self.registers}

    def source(self) -> Any:
        """Return what would be compiled; launches with equal sources share a compiled kernel, on disk too."""
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource, make_backend

        values = {parameter.name: self.arguments[parameter.name] for parameter in self.kernel.params}
        kinds = []
        for parameter, value in zip(self.kernel.params, values.values(), strict=True):
            kind = "constexpr" if parameter.is_constexpr else _kind(value, parameter.do_not_specialize)
            about = None
            if kind != "constexpr" and not parameter.do_not_specialize and isinstance(value, torch.Tensor | int):
                about = "D" if _divisible(value) else ""
            kinds.append((kind, about))
        # Versions of triton note a value without known properties differently, and the note is part of the cache key.
        backend = make_backend(GPUTarget("cuda", 90, 32))
        _, signature, constants, attributes = self.kernel._pack_args(backend, {}, values, kinds, None)
        return ASTSource(self.kernel, signature, constants, attributes)

    def compile(self, target: Target) -> Any:
        """Compile for a target, without a device; returns triton's compiled kernel."""
        from triton.backends.compiler import GPUTarget

        gpu = GPUTarget("hip", target.arch, 64) if target.amd else GPUTarget("cuda", target.capability, 32)
        return triton.compile(self.source(), target=gpu, options=self._options(target.amd))


def _kind(value: Any, unspecialized: bool) -> str:
    """Return the type that triton gives an argument: None and 1 become constants, as at run time."""
    if value is None or (isinstance(value, int) and value == 1 and not unspecialized):
        return "constexpr"
    if isinstance(value, torch.Tensor):
        return f"*{_TRITON_DTYPES[value.dtype]}"
    if isinstance(value, TensorDescriptor):
        return f"tensordesc<{_TRITON_DTYPES[value.base.dtype]}{list(value.block_shape)}>"
    if isinstance(value, float):
        return "fp32"
    return "i32" if -(2**31) <= value < 2**31 else "i64"


def _divisible(value: Any) -> bool:
    if isinstance(value, torch.Tensor):
        return value.data_ptr() % 16 == 0
    return isinstance(value, int) and value % 16 == 0
