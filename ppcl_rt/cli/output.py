"""What commands write: files that appear only when they are complete, and tables."""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console
from rich.table import Table

from ppcl_rt.files import replacing

# Columns that tables need. Narrower terminals wrap lines, which is better than numbers that are cut off.
_TABLE_WIDTH = 150


@contextlib.contextmanager
def our_standard_output() -> Iterator[None]:
    """Keep standard output for what commands print; what libraries write to its descriptor goes to standard error.

    The solver's C++ prints lines of its own there for some programs, which would end up in ``--json``.
    """
    if sys.stdout is not sys.__stdout__ or sys.stdout is None:
        # Somebody has put another one there already: a test, an embedding program.
        yield
        return
    theirs, was = sys.stdout, os.dup(1)
    theirs.flush()
    with open(was, "w", encoding=theirs.encoding, errors=theirs.errors, buffering=1 if theirs.isatty() else -1) as ours:
        os.dup2(2, 1)
        sys.stdout = ours
        try:
            yield
        finally:
            ours.flush()
            sys.stdout = theirs
            os.dup2(was, 1)


@contextlib.contextmanager
def writing(path: Path) -> Iterator[Path]:
    """Yield a temporary file to write to, which takes the place of ``path`` at the end; after an error it is removed.

    Raises:
        ValueError: at once, where ``path`` cannot be written; at the end, where the disk is full.
    """
    path = path.resolve()
    writable = path.parent.is_dir() and os.access(path.parent, os.W_OK)
    if not writable or (path.exists() and not path.is_file()):
        raise ValueError(f"cannot write {path}: name a file in a folder that exists and can be written to")
    # Not inside `replacing` itself, which would lay an error that reads another file to this one.
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder) / path.name
        yield made
        with replacing(path) as temporary:
            shutil.copyfile(made, temporary)


def print_table(table: Table) -> None:
    """Print a table, as wide as it needs to be."""
    Console(width=max(_TABLE_WIDTH, Console().width)).print(table)
