"""What commands write: files that appear only when they are complete, and tables."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console
from rich.table import Table

from ppcl_rt.files import replacing

# Columns that tables need. Narrower terminals wrap lines, which is better than numbers that are cut off.
_TABLE_WIDTH = 150


@contextlib.contextmanager
def writing(path: Path) -> Iterator[Path]:
    """Yield a temporary path to write to, as `ppcl_rt.files.replacing`, but refuse a bad ``path`` before any work.

    Raises:
        ValueError: at once, where ``path`` cannot be written.
    """
    path = path.resolve()
    writable = path.parent.is_dir() and os.access(path.parent, os.W_OK)
    if not writable or (path.exists() and not path.is_file()):
        raise ValueError(f"cannot write {path}: name a file in a folder that exists and can be written to")
    with replacing(path) as temporary:
        yield temporary


def print_table(table: Table) -> None:
    """Print a table, as wide as it needs to be."""
    Console(width=max(_TABLE_WIDTH, Console().width)).print(table)
