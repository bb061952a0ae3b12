"""Which tiles a check on the machine found sound: ``PPCL_ALLOWED`` names the JSON file that says so.

    {"kernels": {"linear": {"128x256x64x8x4x4x1x1": {"ok": false, "why": "hangs"}}}}

A tile that the file does not name is allowed. Without ``PPCL_ALLOWED`` all are.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Iterable

VARIABLE = "PPCL_ALLOWED"


def tile_name(tile: Iterable[int]) -> str:
    """Spell a tile as files and tables do: its numbers, ``128x64x8x2x1``."""
    return "x".join(map(str, tile))


def is_allowed(kernel: str, tile: Iterable[int]) -> bool:
    """Whether a tile of a kernel (``linear``, ``joint_attention``) may run: false only where the file refuses it.

    Raises:
        ValueError: the file is missing, or is not of the form above.
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
    """Read the tiles that are not ok, a set for each kernel; ``changed`` makes a file that was rewritten a new one."""
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
