"""Files that are never half written: write to a temporary path, then rename it over the real one."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError


def one_line(error: BaseException) -> str:
    """Return an error's message as one line: line ends and runs of spaces become one space."""
    return " ".join(str(error).split())


@contextlib.contextmanager
def replacing(path: Path, *, many_writers: bool = False) -> Iterator[Path]:
    """Yield a temporary path to write to; when the block ends, flush it to disk and rename it over ``path``.

    Whatever kills the process, ``path`` is the old file or the new file, whole.

    Args:
        path: the file to replace or create; missing folders are created.
        many_writers: several processes may write ``path`` at the same time. The temporary name then holds the process
            id, and the last rename wins; a killed process leaves its temporary folder for good. With false, the next
            write of ``path`` removes what a killed process left.

    Raises:
        ValueError: ``path`` cannot be written (disk full, no permission). ``path`` is unchanged, and no temporary file
            is left.
    """
    # A folder, not a file: safetensors writes to a temporary file of its own in the same folder. A kill then leaves
    # both in here.
    number = f".{os.getpid()}" if many_writers else ""
    partial = path.with_name(f".{path.name}{number}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        temporary = partial / path.name
        yield temporary
        with temporary.open("rb") as written:
            os.fsync(written.fileno())
        temporary.replace(path)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path} cannot be written: {one_line(error)}; what was there before is kept") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def write_json(path: Path, content: Mapping[str, Any], *, indent: int = 1) -> None:
    """Write a JSON object and a line end, through `replacing`.

    Raises:
        ValueError: as `replacing`.
    """
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(dict(content), indent=indent) + "\n")
