"""Time stamps around the operations of a block."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from clock import Clock

from ppcl_rt import ops
from ppcl_rt.families.qwen_image import PPCLQwenImageTransformerBlock


@contextlib.contextmanager
def stamped_operations(clock: Clock) -> Iterator[list[tuple[str, Any, Any]]]:
    """Record (part of the block, stamp before, stamp after) of every operation inside the ``with``."""
    seen: list[tuple[str, Any, Any]] = []
    homes: list[tuple[Any, str]] = [
        (ops, name) for name in ("ada_layer_norm", "qkv_projection", "joint_attention", "linears")
    ]
    homes.append((PPCLQwenImageTransformerBlock, "modulation"))

    def stamped(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            start = clock.stamp()
            result = call(*args, **kwargs)
            seen.append((part(name, args, kwargs, seen), start, clock.stamp()))
            return result

        return run

    with contextlib.ExitStack() as stack:
        for home, name in homes:
            call = getattr(home, name)
            setattr(home, name, stamped(name, call))
            stack.callback(setattr, home, name, call)
        yield seen


def part(name: str, args: Sequence[Any], kwargs: dict[str, Any], seen: Sequence[tuple[str, Any, Any]]) -> str:
    """Name the part of a block that a call belongs to; of linear layers ``out``, ``up``, ``down`` or ``map``."""
    if name == "modulation":
        return "modulation"
    if name != "linears":
        return name
    if kwargs.get("activation", "none") != "none":
        return "up"
    if args[0][0].gate is None:
        return "map"
    return "down" if seen and seen[-1][0] == "up" else "out"
