"""Device, driver, versions and commit of a run, and how its results are written."""

from __future__ import annotations

import json
import platform
import re
import subprocess
import time
from pathlib import Path
from typing import Any

import torch

from ppcl_kernels._triton import triton


def slug(device: str) -> str:
    """Return the folder name of a device: NVIDIA H200 -> nvidia-h200."""
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file as a whole: a reader never sees, and a killed process never leaves, half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps(content, indent=1) + "\n")
    partial.replace(path)


def machine() -> dict[str, Any]:
    """Return device, driver, versions, commit and date; it uses CUDA, so the process must not fork afterwards."""
    cuda = torch.cuda.is_available()
    driver = _said("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") if cuda else None
    changes = _said("git", "status", "--porcelain")
    return {
        "device": torch.cuda.get_device_name() if cuda else f"CPU {platform.machine()}",
        "driver": driver and driver.splitlines()[0],
        "torch": torch.__version__,
        "triton": getattr(triton, "__version__", None),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version() if cuda else None,
        "python": platform.python_version(),
        "commit": _said("git", "rev-parse", "HEAD"),
        "dirty": None if changes is None else bool(changes),
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def _said(*command: str) -> str | None:
    """Return what a program prints, None if it is missing or fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
