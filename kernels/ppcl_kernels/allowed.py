"""Which tiles passed the check on this machine: ``PPCL_ALLOWED`` names a JSON file with the results.

    {"kernels": {"linear": {"128x256x64x8x4x4x1x1": {"ok": false, "why": "hangs"}}}}

A tile that the file does not name is allowed. Without ``PPCL_ALLOWED`` all tiles are allowed.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Iterable

VARIABLE = "PPCL_ALLOWED"


def tile_name(tile: Iterable[int]) -> str:
    """Return a tile's name in files and tables: its numbers, ``128x64x8x2x1``."""
    return "x".join(map(str, tile))


def is_allowed(kernel: str, tile: Iterable[int]) -> bool:
    """Return whether a tile of a kernel (``linear``, ``joint_attention``) may run: False only if the file refuses it.

    Raises:
        ValueError: the file is missing, or does not have the form above.
    """
    path = os.environ.get(VARIABLE)
    if not path:
        return True
    try:
        changed = os.stat(path).st_mtime_ns
    except OSError as error:
        raise ValueError(f"{VARIABLE} names {path}, which cannot be read ({error.strerror}): unset it") from None
    return tile_name(tile) not in _refused(path, changed).get(kernel, ())


@functools.lru_cache(maxsize=4)
def _refused(path: str, changed: int) -> dict[str, frozenset[str]]:
    """Read the refused tiles of each kernel; ``changed`` is part of the cache key: a rewritten file is read again."""
    try:
        with open(path, encoding="utf-8") as file:
            kernels = json.load(file)["kernels"]
        return {
            kernel: frozenset(tile for tile, result in tiles.items() if not result["ok"])
            for kernel, tiles in kernels.items()
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path} is no list of allowed tiles ({type(error).__name__}: {error}): make it anew, or unset {VARIABLE}"
        ) from None
