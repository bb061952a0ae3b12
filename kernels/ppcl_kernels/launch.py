"""What a kernel is launched on and with: the same description runs it on a device and compiles it without one."""

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
    """An architecture and those of its limits that tiles depend on.

    Attributes:
        arch: ``sm_90`` for compute capability 9.0, ``gfx942`` for an AMD one, ``interpreter`` for no device at all.
        shared_bytes: shared memory that one block may take.
        multiprocessors: how many of them; a persistent grid is a multiple of it.
    """

    arch: str
    shared_bytes: int
    multiprocessors: int

    @classmethod
    def of(cls, device: torch.device) -> Target:
        """Read the target off a device.

        Raises:
            ValueError: kernels cannot run there.
        """
        if device.type == "cpu" and INTERPRETED:
            # Few multiprocessors, so that a persistent loop goes round more than once.
            return cls("interpreter", 227 * _KIB, 2)
        if device.type != "cuda" or triton is None:
            raise ValueError(
                f"kernels need a GPU and triton, the tensors are on {device}: move them, or call the reference "
                "(TRITON_INTERPRET=1, set before the import, runs kernels on a CPU, slowly)"
            )
        return _device_target(device.index if device.index is not None else torch.cuda.current_device())

    @property
    def amd(self) -> bool:
        """Whether it is one of AMD's."""
        return self.arch.startswith("gfx")

    @property
    def capability(self) -> int:
        """Compute capability as one number (90 for 9.0); 0 where there is none."""
        return int(self.arch.removeprefix("sm_")) if self.arch.startswith("sm_") else 0

    @property
    def wgmma(self) -> bool:
        """Whether Hopper's tensor cores read both operands from shared memory (the interpreter follows Hopper)."""
        return self.capability == 90 or self.arch == "interpreter"

    @property
    def tcgen05(self) -> bool:
        """Whether datacentre Blackwell's do, and accumulate in a memory of their own."""
        return self.capability in (100, 103)

    @property
    def tma(self) -> bool:
        """Whether tiles are copied by tensor descriptors: where tensor cores read operands from shared memory.

        sm_120 could, but its tensor cores read registers, and descriptors would need more of them: attention spills,
        and with triton 3.6 products do too.
        """
        return self.wgmma or self.tcgen05


def can_run(x: torch.Tensor) -> bool:
    """Whether kernels can run on a tensor's device and take its dtype."""
    able = INTERPRETED if x.device.type == "cpu" else x.device.type == "cuda" and triton is not None
    return able and x.dtype in DTYPES


@functools.cache
def _device_target(index: int) -> Target:
    # Triton asks the driver: torch does not say everywhere how much shared memory a block may opt in to.
    limits = triton.runtime.driver.active.utils.get_device_properties(index)
    if torch.version.hip:
        arch = torch.cuda.get_device_properties(index).gcnArchName.split(":")[0]
    else:
        arch = "sm_{}{}".format(*torch.cuda.get_device_capability(index))
    return Target(arch, limits["max_shared_mem"], limits["multiprocessor_count"])


# What `aot` compiles for, with the limits of the vendors' tables: A100, RTX 3090, RTX 4090, H100, B200, RTX 5090 and
# MI300X.
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
    """Registers a thread that let so many blocks share a multiprocessor's 65,536, None for no limit."""
    limit = 65536 // (32 * warps * resident) // 8 * 8
    return limit if limit < 255 else None


@dataclass(frozen=True)
class Launch:
    """A kernel with its grid and arguments.

    ``registers`` limits what a thread may take, None for no limit. Tensors may be meta tensors, for `compile`: what is
    compiled without a device is what would run on one.
    """

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any] = field(repr=False)
    warps: int
    stages: int
    registers: int | None = None

    def run(self) -> Any:
        """Launch on the device of the tensors, which need not be the current one; returns triton's compiled kernel."""
        device = next(value.device for value in self.arguments.values() if isinstance(value, torch.Tensor))
        with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
            return self.kernel[self.grid](**self.arguments, **self._options(amd=torch.version.hip is not None))

    def _options(self, amd: bool) -> dict[str, int]:
        options = {"num_warps": self.warps, "num_stages": self.stages}
        # AMD's compiler takes no limit of registers.
        return options if self.registers is None or amd else options | {"maxnreg": self.registers}

    def source(self) -> Any:
        """Say what would be compiled: launches of equal sources share a compiled kernel, also in the cache on disk."""
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
        # Where nothing can be said of a value, versions of triton note that differently; the cache on disk goes by it.
        backend = make_backend(GPUTarget("cuda", 90, 32))
        _, signature, constants, attributes = self.kernel._pack_args(backend, {}, values, kinds, None)
        return ASTSource(self.kernel, signature, constants, attributes)

    def compile(self, target: Target) -> Any:
        """Compile for a target, with no device; returns triton's compiled kernel."""
        from triton.backends.compiler import GPUTarget

        gpu = GPUTarget("hip", target.arch, 64) if target.amd else GPUTarget("cuda", target.capability, 32)
        return triton.compile(self.source(), target=gpu, options=self._options(target.amd))


def _kind(value: Any, unspecialized: bool) -> str:
    """The type that triton gives an argument: None and 1 become constants, as at run time."""
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
