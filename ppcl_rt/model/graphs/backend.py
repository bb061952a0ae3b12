"""What captures and replays graphs: CUDA, or a recorder that takes its place in tests."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any, Protocol

import torch


class Mark(Protocol):
    """A point in the queue of a device."""

    def done(self) -> bool:
        """Whether the device has passed the point; does not wait."""

    def since(self, earlier: Any) -> float:
        """Seconds on the device since an earlier mark; the device has passed both."""


class GraphHandle(Protocol):
    """A graph that was captured.

    Attributes:
        outputs: a tree of tensors, which each replay overwrites.
    """

    outputs: Any

    def replay(self) -> None:
        """Queue the launches of the graph."""

    def close(self) -> None:
        """Wait for what was queued, then free the graph."""


class Backend(Protocol):
    """What captures and replays."""

    def supports(self, device: torch.device) -> bool:
        """Whether graphs can be captured on a device."""

    def capturing(self) -> bool:
        """Whether a capture is under way already, whoever began it."""

    def idle(self, device: torch.device) -> bool:
        """Whether a device has done all that was queued on the current stream; does not wait."""

    def mark(self, device: torch.device) -> Mark:
        """Mark the end of what is queued on the current stream."""

    def warm(self, device: torch.device, call: Callable[[], Any]) -> None:
        """Run a call eagerly, to prepare for `capture`: kernels are loaded, caches are filled."""

    def capture(self, device: torch.device, call: Callable[[], Any]) -> GraphHandle:
        """Capture a call. What it raises is passed on, and the device can be used as before."""

    def exclusive_memory(self, device: torch.device) -> contextlib.AbstractContextManager[None]:
        """Give the current stream sole use of the memory that all graphs of a device share, inside the context."""
