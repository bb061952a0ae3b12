"""How a command starts soon."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator


@contextlib.contextmanager
def without_collector() -> Iterator[None]:
    """Import, and open a checkpoint, without the collector of cyclic garbage.

    It looks again and again through all that modules define and finds nothing to free: a sixth of the time in which
    torch, diffusers and gradio are imported and examples/emoji is opened.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
