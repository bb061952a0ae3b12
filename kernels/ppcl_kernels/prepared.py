"""Prepared launches: what a model calls a thousand times is checked, described and looked up once.

Triton's JIT binds names, specialises on every argument, looks the kernel up, and makes a new descriptor (CUtensorMap)
of every operand: 20-80 us of python for each launch. The first call of a `Bound` launch goes through the JIT. Later
calls pass addresses to the C function that triton's launcher calls, and make new descriptors only of tensors that
move.

The arguments of that C function differ between versions of triton, so they are not written down here. Instead, the
launcher's own python runs once with a recorder in place of the C function. What the recorder received is compared with
what was passed, and later calls repeat it. If anything is not as expected, every launch goes through triton's JIT.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable, Sequence
from types import CellType, FunctionType, SimpleNamespace
from typing import Any, NamedTuple

import torch

from ppcl_kernels._triton import INTERPRETED, TensorDescriptor, triton
from ppcl_kernels.launch import Launch


class Bound:
    """A launch that is called again with other tensors, from any number of threads.

    The caller guarantees that tensors keep their shapes, strides, dtypes and devices, and that tensors which are not
    *moving* keep their addresses. A launch goes through triton's JIT, slower but with the same result, when a tensor no
    longer starts at a multiple of 16 bytes, when a tensor is given where there was none, when hooks around launches are
    installed, and whenever else the JIT is needed. No tensor is kept alive.

    Args:
        moving: for each tensor that may move, the names of the kernel's arguments that are in its memory: the tensor, a
            view of it, or a descriptor of either. Arguments that are None are skipped. All other arguments never
            change.

    Attributes:
        detour: why launches go through triton's JIT; empty if they do not.
    """

    def __init__(self, moving: Sequence[tuple[str, ...]]) -> None:
        self._moving = tuple(moving)
        self._repeat: Callable[[tuple[torch.Tensor | None, ...]], bool] | None = None
        self.detour = "it has not been launched yet"

    def __call__(self, tensors: tuple[torch.Tensor | None, ...], describe: Callable[[], Launch]) -> None:
        """Launch with these tensors; ``describe`` returns the launch, and is called only when the JIT is used."""
        if self._repeat is None or not self._repeat(tensors):
            self._through_triton(tensors, describe())

    def _through_triton(self, tensors: tuple[torch.Tensor | None, ...], launch: Launch) -> None:
        compiled = launch.run()
        if self._repeat is None and not INTERPRETED:
            try:
                self._repeat = _repetition(compiled, launch, tensors, self._moving)
                self.detour = ""
            except (_UnlikeTriton, AttributeError, LookupError, TypeError, ValueError) as difference:
                self.detour = f"{type(difference).__name__}: {difference}"


class _UnlikeTriton(Exception):
    """Triton's launcher differs from what this file expects."""


def _repetition(
    compiled: Any, launch: Launch, tensors: tuple[torch.Tensor | None, ...], moving: tuple[tuple[str, ...], ...]
) -> Callable[[tuple[torch.Tensor | None, ...]], bool]:
    """Return a function that launches the compiled kernel with the addresses of other tensors.

    The function returns True, or False if it did not launch and the JIT has to.

    Raises:
        _UnlikeTriton: the launcher cannot be called directly.
    """
    values = [launch.arguments[name] for name in launch.kernel.arg_names]
    raw, before, after, nested, given, makers = _record(compiled, launch.grid, values)
    # Position of each argument among the arguments of the C function.
    slots = _slots(launch.kernel.arg_names, values, given)
    template = [value.data_ptr() if isinstance(value, torch.Tensor) else value for value in given]
    pointers, descriptors = [], []
    absent = [number for number, names in enumerate(moving) if names and tensors[number] is None]
    for number, names in enumerate(moving):
        for name in names:
            value, slot = launch.arguments[name], slots[name]
            if value is None:
                continue
            tensor = tensors[number]
            assert tensor is not None, f"{name} was given, but not the tensor whose memory it is in"
            address = (value.base if isinstance(value, TensorDescriptor) else value).data_ptr()
            offset = address - tensor.data_ptr()
            if isinstance(value, TensorDescriptor):
                make, arguments = makers[id(given[slot])]
                _expect(arguments[0] == address, "a descriptor is not made of its address first")
                descriptors.append((number, offset, slot, make, arguments[1:]))
            else:
                # A kernel compiled for an address at a multiple of 16 bytes takes no other address; a kernel compiled
                # for any address takes any.
                pointers.append((number, offset, slot, 15 if address % 16 == 0 else 0))
            # Every launch writes this slot. An old address left here would be a silent error.
            template[slot] = None
    device = next(tensor.device for tensor in tensors if tensor is not None)
    driver, runtime = triton.runtime.driver.active, triton.knobs.runtime
    current_device, current_stream = driver.get_current_device, driver.get_current_stream
    index = device.index if device.type == "cuda" else current_device()
    kernel_hooks = launch.kernel.pre_run_hooks

    # The default argument holds the compiled kernel: triton unloads a kernel that nothing refers to.
    def repeat(tensors: tuple[Any, ...], _held: Any = compiled) -> bool:
        if kernel_hooks or _is_hooked(runtime.launch_enter_hook) or _is_hooked(runtime.launch_exit_hook):
            return False
        for number in absent:
            if tensors[number] is not None:
                return False
        if current_device() != index:
            with torch.cuda.device(index):
                return repeat(tensors)
        arguments, stray = template.copy(), 0
        for number, offset, slot, mask in pointers:
            arguments[slot] = address = tensors[number].data_ptr() + offset
            stray |= address & mask
        if stray:
            return False
        for number, offset, slot, make, rest in descriptors:
            address = tensors[number].data_ptr() + offset
            if address & 15:
                return False
            arguments[slot] = make(address, *rest)
        if nested:
            raw(*before, current_stream(index), *after, arguments)
        else:
            raw(*before, current_stream(index), *after, *arguments)
        return True

    return repeat


class _Recorded(NamedTuple):
    """A recorded call of a launcher's C function.

    Attributes:
        raw: the C function.
        before, after: its arguments before the CUDA stream, and between the stream and the kernel's arguments.
        nested: whether it takes the kernel's arguments as one sequence.
        given: the kernel's arguments, with descriptors expanded.
        makers: function and arguments that made each descriptor, by the id of the descriptor.
    """

    raw: Callable
    before: tuple
    after: tuple
    nested: bool
    given: Sequence[Any]
    makers: dict[int, tuple[Callable, tuple]]


def _record(compiled: Any, grid: tuple[int, ...], values: list[Any]) -> _Recorded:
    """Run the launcher of a compiled kernel with a recorder in place of its C function, which launches nothing."""
    launcher = compiled.run
    _expect(compiled.metadata.target.backend == "cuda", "the backend is not CUDA")
    _expect(not launcher.global_scratch_size and not launcher.profile_scratch_size, "the kernel wants scratch memory")
    instrumented = getattr(launcher, "gsan_enabled", False) or triton.knobs.compilation.instrumentation_mode
    _expect(not instrumented, "kernels are instrumented")
    calls: list[tuple] = []
    makers: dict[int, tuple[Callable, tuple]] = {}
    raw = launcher.launch
    record: Callable = lambda *taken: calls.append(taken)  # noqa: E731
    if isinstance(raw, FunctionType) and "launcher" in raw.__code__.co_freevars:
        # For a kernel with descriptors, python code that expands them wraps the C function.
        expand, raw = raw, _variable(raw, "launcher")
        utils = triton.runtime.driver.active.utils
        fills = {name: _recording(getattr(utils, name), makers) for name in dir(utils) if name.startswith("fill_tma_")}
        driver = SimpleNamespace(active=SimpleNamespace(utils=SimpleNamespace(**fills)))
        namesake = SimpleNamespace(runtime=SimpleNamespace(driver=driver))
        make = _with_variables(_variable(expand, "make_tensordesc_arg"), triton=namesake)
        record = _with_variables(expand, launcher=record, make_tensordesc_arg=make)
    stand_in = object.__new__(type(launcher))
    stand_in.__dict__.update(launcher.__dict__, launch=record)
    stream = _Stream()
    stand_in(*(*grid, 1, 1)[:3], stream, compiled.function, compiled.packed_metadata, None, None, None, *values)
    _expect(len(calls) == 1, "the launcher does not launch once")
    taken = calls[0]
    places = [n for n, value in enumerate(taken) if value is stream]
    _expect(len(places) == 1, "the launcher does not pass the stream on")
    at = places[0]
    count = sum(map(_width, values))
    nested = isinstance(taken[-1], list | tuple)
    given, end = (taken[-1], -1) if nested else (taken[-count:], -count)
    return _Recorded(raw, taken[:at], taken[at + 1 : end], nested, given, makers)


def _slots(names: Sequence[str], values: list[Any], given: Sequence[Any]) -> dict[str, int]:
    """Return the position of each argument among the arguments of the C function."""
    slots, at = {}, 0
    for name, value in zip(names, values, strict=True):
        slots[name] = at
        # A descriptor is followed by its shape and strides.
        follow = [*value.shape, *value.strides] if isinstance(value, TensorDescriptor) else []
        passed = given[at + 1 : at + 1 + len(follow)] if follow else given[at : at + 1]
        _expect(all(map(operator.is_, passed, follow or [value])), f"the launcher passes another value for {name}")
        at += _width(value)
    _expect(at == len(given), "the launcher passes more arguments than it was given")
    return slots


def _width(value: Any) -> int:
    return 1 + len(value.shape) + len(value.strides) if isinstance(value, TensorDescriptor) else 1


class _Stream(int):
    """The CUDA stream of a recorded call, which is looked for among the arguments of the C function."""


def _recording(make: Callable, makers: dict[int, tuple[Callable, tuple]]) -> Callable:
    def call(*args: Any) -> Any:
        made = make(*args)
        makers[id(made)] = (make, args)
        return made

    return call


def _variable(function: FunctionType, name: str) -> Any:
    """Return the value of a free or global variable of a function."""
    free = dict(zip(function.__code__.co_freevars, function.__closure__ or ()))
    return free[name].cell_contents if name in free else function.__globals__[name]


def _with_variables(function: FunctionType, **names: Any) -> FunctionType:
    """Copy a function, with other values for some of its free or global variables."""
    free = zip(function.__code__.co_freevars, function.__closure__ or ())
    cells = tuple(CellType(names[name]) if name in names else cell for name, cell in free)
    return FunctionType(function.__code__, {**function.__globals__, **names}, function.__name__, None, cells)


def _is_hooked(hook: Any) -> bool:
    # Triton starts with an empty chain of hooks.
    return hook is not None and bool(getattr(hook, "calls", True))


def _expect(truth: bool, otherwise: str) -> None:
    if not truth:
        raise _UnlikeTriton(otherwise)


def suffixes(tensors: Sequence[torch.Tensor]) -> list[str]:
    """Return the suffix that each stream's arguments have in a launch; empty for a stream that has no elements."""
    numbers = itertools.count()
    return [str(next(numbers)) if tensor.numel() else "" for tensor in tensors]


def described(launch: Launch | None) -> Launch:
    """Return a launch that has to exist."""
    assert launch is not None, "a launch without tokens is never bound"
    return launch
