"""A training run's folder: files that are written beside and renamed, that say what made them, and a lock and a log.

Whatever kills a process, each file is the old one or the new one, whole.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from ppcl_rt.files import one_line as line
from ppcl_train.config.settings import RunConfig

# Where files say what made them: a key of JSON files, and of the note of safetensors files.
MADE_BY = "made_by"
_made_by: ContextVar[dict[str, Any] | None] = ContextVar("made_by", default=None)


@contextlib.contextmanager
def making(run: RunConfig, stage: str) -> Iterator[dict[str, Any]]:
    """Have every file that is written in here say what made it; yields what they say.

    That is the stage, the seed and all settings, versions and the git commit; no times, so that a run that was killed
    and resumed leaves the bytes that it would have left.
    """
    made_by = {"stage": stage, "seed": run.seed, **_versions(), "config": run.model_dump(mode="json")}
    token = _made_by.set(made_by)
    try:
        yield made_by
    finally:
        _made_by.reset(token)


@functools.cache
def _versions() -> dict[str, Any]:
    """Versions of what computes, and the commit of this code, ``-dirty`` where it has been changed since."""
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    for package in ("diffusers", "ppcl-rt"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    here = Path(__file__).resolve()

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", here.parent, *arguments], check=True, capture_output=True, text=True
        ).stdout.strip()

    try:
        # An installed package may lie inside somebody else's repository.
        git("ls-files", "--error-unmatch", here.name)
        commit = git("describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")
    except (OSError, subprocess.CalledProcessError):
        commit = None
    return {"versions": versions, "commit": commit}


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a path beside ``path`` to write to, and rename it over ``path`` once it is complete and on disk.

    Raises:
        ValueError: it cannot be written (disk full, no right to); ``path`` is as it was and nothing lies beside it.
    """
    # A folder, because safetensors puts a file of its own beside the one it writes: a kill leaves it in here, where the
    # next write of the same path removes it.
    partial = path.with_name(f".{path.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        beside = partial / path.name
        yield beside
        with beside.open("rb") as written:
            os.fsync(written.fileno())
        beside.replace(path)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path} cannot be written: {line(error)}; what was there before is kept") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON object, atomically; inside `making` it says what made it."""
    made_by = _made_by.get()
    with replacing(path) as beside:
        beside.write_text(json.dumps({**content, **({MADE_BY: made_by} if made_by else {})}, indent=1) + "\n")


def read_content(path: Path) -> dict[str, Any]:
    """Read what `write_json` was given.

    Raises:
        ValueError: the file is missing, cut or altered.
    """
    with _whole(path):
        content: dict[str, Any] = json.loads(path.read_bytes())
    content.pop(MADE_BY, None)
    return content


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor], note: Mapping[str, Any]) -> None:
    """Write tensors and a JSON note into one safetensors file, atomically; inside `making` it says what made it."""
    made_by = _made_by.get()
    held = {name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()}
    with replacing(path) as beside:
        save_file(held, beside, metadata={"note": json.dumps({**note, **({MADE_BY: made_by} if made_by else {})})})


def read_note(path: Path) -> dict[str, Any]:
    """Read the note of a file that `write_tensors` wrote."""
    with _whole(path), safe_open(path, framework="pt") as file:
        note: dict[str, Any] = json.loads((file.metadata() or {}).get("note", "{}"))
    return note


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Read all tensors of a file."""
    with _whole(path):
        return load_file(path)


@contextlib.contextmanager
def _whole(path: Path) -> Iterator[None]:
    try:
        yield
    except (SafetensorError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not whole ({line(error)}): delete it, and it is made again") from None
    except (OSError, RuntimeError) as error:
        # A file that is not there is a RuntimeError of torch's.
        raise ValueError(f"{path} cannot be read: {line(error)}") from None


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep other processes from writing a run folder; the system lets go of it when this process dies, however.

    Of processes that were launched together (RANK) the first alone holds it.

    Raises:
        ValueError: another process writes it.
    """
    if _follows():
        yield
        return
    with _lock_file(folder).open("a+") as file:
        if not _lock(file):
            # Asked twice, because `in_use` holds it for a moment.
            time.sleep(0.2)
            if not _lock(file):
                file.seek(0)
                raise ValueError(
                    f"{folder} is being written by process {file.read() or '?'}: wait for it, or choose another --out"
                )
        file.seek(0)
        if file.read() != str(os.getpid()):
            file.truncate(0)
            file.write(str(os.getpid()))
            file.flush()
        yield


def _follows() -> bool:
    """Whether this process was launched with others and is not their first."""
    return int(os.environ.get("RANK", "0")) > 0


def in_use(folder: Path) -> bool:
    """Whether a process holds `locked` on a folder now."""
    try:
        with _lock_file(folder).open("r+") as file:
            return not _lock(file)
    except OSError:
        return False


def _lock_file(folder: Path) -> Path:
    return folder / ".lock"


def _lock(file: Any) -> bool:
    """Take a lock that is let go of when the file is closed; False where another process has it."""
    try:
        import fcntl
    except ImportError:
        # Windows has no such locks.
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


class Log:
    """Appends one JSON line an event to a run's ``log.jsonl``, and prints it; in the first of several processes alone.

    Attributes:
        folder: the run folder.
        stage: what the lines are of.
    """

    def __init__(self, folder: Path, stage: str) -> None:
        self.folder, self.stage, self._start = folder, stage, time.monotonic()
        self._path, self._silent = folder / "log.jsonl", _follows()
        folder.mkdir(parents=True, exist_ok=True)
        # A kill may have cut the last line.
        if not self._silent and self._path.exists() and not self._path.read_bytes().endswith(b"\n"):
            with self._path.open("a") as file:
                file.write("\n")

    def __call__(self, *, shown: bool = True, **values: Any) -> None:
        """Write down some values; print those that are no mappings, unless ``shown`` is false."""
        if self._silent:
            return
        event = {**values, "seconds": round(time.monotonic() - self._start, 1)}
        with self._path.open("a") as file:
            file.write(json.dumps({"stage": self.stage, **event}) + "\n")
        if shown:
            plain = {key: value for key, value in event.items() if not isinstance(value, Mapping)}
            words = (
                f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in plain.items()
            )
            print(f"{self.stage:>9}  {'  '.join(words)}", flush=True)


def read_log(folder: Path) -> Iterator[dict[str, Any]]:
    """The events of a run's log; lines that a kill cut are left out."""
    with contextlib.suppress(FileNotFoundError), (folder / "log.jsonl").open() as file:
        for text in file:
            with contextlib.suppress(json.JSONDecodeError):
                yield json.loads(text)


def state_file(folder: Path, stage: str) -> Path:
    """Where the loop of a stage keeps its state until the stage is done."""
    return folder / f"{stage}.state.safetensors"


def state_files(folder: Path, stage: str) -> list[Path]:
    """The states that a stage has begun: its own, and those of its parts, whose logs are named ``stage.part``."""
    return sorted({*folder.glob(f"{stage}.state.safetensors"), *folder.glob(f"{stage}.*.state.safetensors")})
