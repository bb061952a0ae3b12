"""What runs here, in the layout of ``model.json`` and ``sweep.json``."""

from __future__ import annotations

from typing import Any

import diffusers

from ppcl_kernels.tools import machine as runner


def machine() -> dict[str, Any]:
    """Return the device, the commit, and the versions of torch, triton, CUDA, cuDNN, driver, python and diffusers."""
    about = runner.machine()
    versions = {name: about.pop(name) for name in ("torch", "triton", "cuda", "cudnn", "driver", "python")}
    return {**about, "versions": {**versions, "diffusers": diffusers.__version__}}
