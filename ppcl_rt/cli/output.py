"""What commands write: files that appear only when they are complete, and tables."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console
from rich.table import Table

# Columns that tables need. Narrower terminals wrap lines, which is better than numbers that are cut off.
_TABLE_WIDTH = 150


@contextlib.contextmanager
def writing(path: Path) -> Iterator[Path]:
    """Yield a file next to ``path`` to write to; it is renamed to ``path`` at the end, or removed after an error.

    Raises:
        ValueError: at once, where ``path`` cannot be written.
    """
    path = path.resolve()
    writable = path.parent.is_dir() and os.access(path.parent, os.W_OK)
    if not writable or (path.exists() and not path.is_file()):
        raise ValueError(f"cannot write {path}: name a file in a folder that exists and can be written to")
    partial = path.with_name(f".{path.name}.partial")
    try:
        yield partial
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def print_table(table: Table) -> None:
    """Print a table, as wide as it needs to be."""
    Console(width=max(_TABLE_WIDTH, Console().width)).print(table)
