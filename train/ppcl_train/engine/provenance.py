"""What made a file: the stage, the seed, all settings, versions and the git commit, written into the file itself."""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import platform
import subprocess
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import torch

from ppcl_train.config.settings import RunConfig

# The key under which JSON files, and the notes of safetensors files, hold what made them.
MADE_BY = "made_by"
_made_by: ContextVar[dict[str, Any] | None] = ContextVar("made_by", default=None)


@contextlib.contextmanager
def making(run: RunConfig, stage: str) -> Iterator[dict[str, Any]]:
    """Add what made it to every file that is written inside the ``with`` block; yields what is added.

    Nothing that is added holds a time, so a run that was killed and resumed leaves the same bytes as one that was not.
    """
    made_by = {"stage": stage, "seed": run.seed, **_versions(), "config": run.model_dump(mode="json")}
    token = _made_by.set(made_by)
    try:
        yield made_by
    finally:
        _made_by.reset(token)


def signed(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``content`` with what made it, inside `making`; outside, a plain copy."""
    made_by = _made_by.get()
    return {**content, **({MADE_BY: made_by} if made_by else {})}


@functools.cache
def _versions() -> dict[str, Any]:
    """Versions of the packages that compute, and the git commit of this code: ``-dirty`` if it was changed since."""
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
        # Fails for an installed package, which may lie inside the repository of another project.
        git("ls-files", "--error-unmatch", here.name)
        commit = git("describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")
    except (OSError, subprocess.CalledProcessError):
        commit = None
    return {"versions": versions, "commit": commit}
