"""What runs here (device, driver, versions, commit), and where its results go."""

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
    """Turn a device's name into that of its folder: NVIDIA H200 -> nvidia-h200."""
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")


def write_json(path: Path, content: Any) -> None:
    """Write next to ``path``, then rename: neither a reader nor a process that is killed meets half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps(content, indent=1) + "\n")
    partial.replace(path)


def machine() -> dict[str, Any]:
    """Say what runs here; asks the CUDA driver, so not in a process that is to fork."""
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
    """What a program prints, None where it is missing or fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
