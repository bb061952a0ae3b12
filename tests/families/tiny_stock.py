"""A tiny random stock model of each family, and of each published variant that other programs read differently."""

from __future__ import annotations

from typing import Any

import fixtures
import tiny_flux
import tiny_sd3
import tiny_z_image

# Name here -> family.
CASES = {"qwen-image": "qwen-image", "flux": "flux", "z-image": "z-image", **dict.fromkeys(tiny_sd3.VARIANTS, "sd3")}


def build(name: str) -> tuple[Any, dict[str, Any]]:
    """A stock model, and arguments of a forward."""
    if name == "qwen-image":
        return fixtures._build_stock(), fixtures._build_inputs()
    if name == "flux":
        return tiny_flux.build_stock(), tiny_flux.build_inputs()
    if name == "z-image":
        return tiny_z_image.build_stock(), tiny_z_image.build_inputs()
    return tiny_sd3.build_stock(name), tiny_sd3.build_inputs()
