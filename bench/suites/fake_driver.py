"""A driver without a device, on which triton runs all its python; C functions only record what they receive.

Triton binds, specialises, expands descriptors and calls its own `CudaLauncher`; nothing is compiled. Tensors are in
CPU memory. Works with the launchers of triton 3.6 (one C function for each signature) and 3.9 (one for all).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import driver as nvidia
from triton.compiler import CompiledKernel
from triton.runtime.jit import JITFunction


class Utils:
    """Takes the place of a driver's C functions: ``launch`` receives each launch, ``fill`` makes descriptors."""

    def __init__(self, launch: Callable[..., None], fill: Callable[..., Any]) -> None:
        self.launch = launch
        self.fill_tma_descriptor = self.fill_tma_descriptor_tiled = fill

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 227 * 1024, "multiprocessor_count": 132}

    def build_signature_metadata(self, signature: list[str]) -> bytes:
        return repr(signature).encode()

    def unload_module(self, module: Any) -> None:
        pass


class FakeDriver:
    """Takes the place of triton's CUDA driver; ``device`` and ``stream`` are the current ones."""

    def __init__(self, launch: Callable[..., None], fill: Callable[..., Any]) -> None:
        self.utils, self.launcher_cls = Utils(launch, fill), nvidia.CudaLauncher
        self.device, self.stream, self.backend = 0, 7, "cuda"

    def get_current_device(self) -> int:
        return self.device

    def get_current_stream(self, device: int) -> int:
        return self.stream

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_device_interface(self) -> Any:
        return torch.cuda


class FakeKernel(CompiledKernel):
    """A kernel that triton takes for a compiled one: the signature is real, the code is missing."""

    def __init__(self, source: Any, options: Any, driver: FakeDriver) -> None:
        kinds = [kind for kind in source.signature.values() if str(kind).startswith("tensordesc")]
        self.src, self.name, self.function = source, source.fn.__name__, id(self)
        self.packed_metadata = (options.num_warps, 1, 1024)
        self.module, self._module_pid = object(), None
        self.metadata = SimpleNamespace(
            target=GPUTarget(driver.backend, 90, 32),
            num_ctas=1,
            tensordesc_meta=[_about(kind) for kind in kinds] or None,
            launch_cooperative_grid=False,
            launch_pdl=False,
            instrumentation_mode="",
            **{
                f"{kind}_scratch_{what}": int(what == "align")
                for kind in ("global", "profile")
                for what in ("size", "align")
            },
        )
        self._run = driver.launcher_cls(source, self.metadata)


def _about(kind: str) -> dict[str, Any]:
    """Return the compiler's metadata of a descriptor such as ``tensordesc<bf16[128, 64]>``."""
    found = re.search(r"\[([\d, ]+)\]", kind)
    assert found, f"{kind} has no block"
    block = [int(n) for n in found[1].split(",")]
    return {"swizzle": 3, "elem_size": 2, "elem_type": 10, "block_size": block, "fp4_padded": False}


def install(launch: Callable[..., None], fill: Callable[..., Any]) -> FakeDriver:
    """Make triton run without a device from now on: ``launch`` receives launches, ``fill`` makes descriptors."""
    driver = FakeDriver(launch, fill)
    triton.runtime.driver.set_active(driver)
    # Triton 3.9 marks arguments with objects of its C module; triton 3.6 compiles a C module for each signature.
    nvidia.PyKernelArg = lambda nested_tuple, type: (nested_tuple, type)
    nvidia.library_dirs = list
    nvidia.compile_module_from_src = lambda **_: SimpleNamespace(launch=launch)

    def compile(
        kernel: JITFunction, key: Any, signature: Any, device: int, constants: Any, options: Any, attrs: Any, *_: Any
    ) -> Any:
        made = FakeKernel(kernel.ASTSource(kernel, signature, constants, attrs), options, driver)
        kernel.device_caches[device][0][key] = made
        return made

    JITFunction._do_compile = compile
    return driver
