"""Triton's interpreter without its avoidable work: the same results, in a third of the time.

Measured on the kernel tests (triton 3.9.0): the interpreter patches all of ``triton.language`` again at each call of a
device function (a third of the time), builds a table of 20 dtypes at each conversion, computes checks for integer
overflow that it then ignores (a sixth), and describes the same few shapes again for each value. Nothing that a kernel
computes depends on these.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

# What is replaced. A version of triton that names one of these otherwise keeps its own interpreter.
NEEDED = ("_LangPatchScope", "_patch_attr", "_patch_builtin", "_patch_lang", "_get_np_dtype", "interpreter_semantic")
# Object, name and what was there before.
replaced: list[tuple[Any, str, Any]] = []


def speed_up() -> bool:
    """Replace what the interpreter does more often than needed; returns whether this version of triton is known."""
    from triton.runtime import interpreter

    semantic = getattr(interpreter, "interpreter_semantic", None)
    if not all(hasattr(interpreter, name) for name in NEEDED):
        return False
    if not hasattr(semantic, "binary_op_sanitize_overflow_impl"):
        return False
    for of, name, made in (
        (interpreter, "_patch_builtin", _patch_builtin_once_listed(interpreter)),
        (interpreter, "_patch_lang", _patch_once_a_launch(interpreter)),
        (interpreter, "_get_np_dtype", _looked_up(interpreter._get_np_dtype)),
        (semantic, "binary_op_sanitize_overflow_impl", _unless_ignored(semantic)),
        (interpreter.tl.core.tensor, "__init__", _shape_described_once(interpreter.tl.core.tensor)),
        (interpreter.tl.core.block_type, "__init__", _block_described_once(interpreter.tl.core.block_type)),
    ):
        replaced.append((of, name, getattr(of, name)))
        setattr(of, name, made)
    return True


@contextlib.contextmanager
def as_it_comes() -> Iterator[None]:
    """Run triton's own interpreter, to compare with."""
    ours = [(of, name, getattr(of, name)) for of, name, _ in replaced]
    for of, name, original in replaced:
        setattr(of, name, original)
    yield
    for of, name, made in ours:
        setattr(of, name, made)


def _patch_builtin_once_listed(interpreter: ModuleType) -> Callable[..., None]:
    """`_patch_builtin`, which lists the members of a module or class once: the list takes longer than the patch."""
    listed: dict[Any, list[tuple[str, Any]]] = {}

    def patch(package: Any, builder: Any, scope: Any) -> None:
        if package not in listed:
            members = inspect.getmembers(package)
            listed[package] = [(name, member) for name, member in members if interpreter.tl.core.is_builtin(member)]
        for name, member in listed[package]:
            interpreter._patch_attr(package, name, member, builder, scope)

    return patch


def _patch_once_a_launch(interpreter: ModuleType) -> Callable[..., Any]:
    """`_patch_lang`, which a launch and all device functions that it calls share; the end of the launch restores."""
    original, tl = interpreter._patch_lang, interpreter.tl
    seen: dict[Callable[..., Any], frozenset[ModuleType]] = {}

    class Shared(interpreter._LangPatchScope):
        """One scope for a launch: it knows which of the two modules of the language are patched."""

        def __init__(self) -> None:
            super().__init__()
            self.patched: frozenset[ModuleType] = frozenset()

        def restore(self) -> None:
            super().restore()
            self.patched = frozenset()

    shared = Shared()

    def patch(fn: Callable[..., Any]) -> Any:
        if fn not in seen:
            seen[fn] = frozenset(each for each in fn.__globals__.values() if each is tl or each is tl.core)
        # A kernel may know `triton.language` alone where a device function of triton's own knows `core`.
        if not seen[fn] or not seen[fn] <= shared.patched:
            shared._changes += original(fn)._changes
            shared.patched |= seen[fn]
        return shared

    return patch


def _looked_up(original: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """`_get_np_dtype` with its table made once; the name says all of a dtype but the shape of a block."""
    table: dict[str, Any] = {}

    def get(dtype: Any) -> Any:
        dtype = dtype.scalar
        if dtype.name not in table:
            table[dtype.name] = original(dtype)
        return table[dtype.name]

    return get


def _unless_ignored(semantic: Any) -> Callable[..., None]:
    """Checks for overflow, where debugging is on: else `device_assert` ignores what they find."""
    original = semantic.binary_op_sanitize_overflow_impl

    def check(*arguments: Any) -> None:
        if semantic.builder.options.debug:
            original(*arguments)

    return check


def _shape_described_once(tensor: Any) -> Callable[..., None]:
    """The constructor of a value, which wraps each length of a shape once for all values of this shape."""
    original = tensor.__init__
    described: dict[tuple[int, ...], tuple[Any, Any]] = {}

    def init(self: Any, handle: Any, type: Any) -> None:
        key = tuple(type.shape) if type.is_block() else ()
        if key in described:
            self.handle, self.type, self.dtype = handle, type, type.scalar
            self.shape, self.numel = described[key]
        else:
            original(self, handle, type)
            described[key] = self.shape, self.numel

    return init


def _block_described_once(block_type: Any) -> Callable[..., None]:
    """The constructor of a type of blocks, which checks a shape and names the type once."""
    original = block_type.__init__
    described: dict[tuple[int, tuple[int, ...]], dict[str, Any]] = {}

    def init(self: Any, element_ty: Any, shape: Any) -> None:
        key = id(element_ty), tuple(shape)
        if not all(type(length) is int for length in key[1]):
            original(self, element_ty, shape)
        elif key in described:
            self.__dict__.update(described[key])
        else:
            original(self, element_ty, shape)
            # What is kept holds the type of the elements, so its id stays its own.
            described[key] = dict(self.__dict__)

    return init
