"""Files that are never half written: write to a temporary path, then rename it over the real one."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from ppcl_rt.messages import brief


def one_line(error: BaseException) -> str:
    """Return an error's message as one line (`brief`)."""
    return brief(str(error))


class NoWeightsError(ValueError, OSError):
    """A folder without the weights that were asked for; an OSError too, since that is what diffusers' users catch."""


@contextlib.contextmanager
def refusing_briefly() -> Iterator[None]:
    """Make an error of reading a ValueError of one line (`brief`): what a file holds may be in the message."""
    try:
        yield
    except NoWeightsError as error:
        raise NoWeightsError(one_line(error)) from None
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(one_line(error)) from None


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
        _let_others_read(partial)
        with temporary.open("rb") as written:
            os.fsync(written.fileno())
        temporary.replace(path)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path} cannot be written: {one_line(error)}; what was there before is kept") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _let_others_read(folder: Path) -> None:
    """Give files the mode of any new file: safetensors (0.8) writes files that their owner alone may read."""
    new = folder / ".mode"
    new.touch()
    mode = new.stat().st_mode
    new.unlink()
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(mode)


def write_json(path: Path, content: Mapping[str, Any], *, indent: int = 1) -> None:
    """Write a JSON object and a line end, through `replacing`.

    Raises:
        ValueError: as `replacing`.
    """
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(dict(content), indent=indent) + "\n")


@contextlib.contextmanager
def replacing_folder(folder: Path, is_replaced: Callable[[str], bool]) -> Iterator[Path]:
    """Yield a temporary folder to fill; when the block ends, rename it to ``folder``.

    A folder that is there already is whole, under this name or as ``.<name>.old``, until the new one is in place.

    Args:
        is_replaced: whether a file of the old folder goes, by its name; all others stay (a log, a model card).
    """
    partial = folder.parent / f".{folder.name}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        _let_others_read(partial)
        if not folder.exists():
            partial.rename(folder)
            return
        old = folder.with_name(f".{folder.name}.old")
        shutil.rmtree(old, ignore_errors=True)
        folder.rename(old)
        partial.rename(folder)
        for path in old.iterdir():
            if not is_replaced(path.name):
                os.replace(path, folder / path.name)
        shutil.rmtree(old)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
