"""Low-rank adapters (LoRA) that are added to the weights which they were trained on."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import diffusers.loaders
import torch
from safetensors import SafetensorError, safe_open

from ppcl_rt.files import one_line

# Where diffusers keeps the settings of an adapter, as JSON in the header of its file.
_SETTINGS = "lora_adapter_metadata"
# What names begin with, where an adapter may be of several parts of a pipeline.
_TRANSFORMER = "transformer."
# Adapters that are more than a product of two factors.
_MORE = ("dora_scale", "lora_magnitude_vector")


class Adapter(NamedTuple):
    """What is added to the weight of one layer: ``scale * up @ down``.

    Attributes:
        down: ``[r, columns]``.
        up: ``[rows, r]``.
        scale: of the adapter, times what the user asks for.
    """

    down: torch.Tensor
    up: torch.Tensor
    scale: float

    def added_to(self, weight: torch.Tensor) -> torch.Tensor:
        """The weight with the adapter, computed in float32, in the weight's dtype."""
        return (weight.float() + self.scale * (self.up.float() @ self.down.float())).to(weight.dtype)


def read_adapters(path: Path, family: Any, shapes: Mapping[str, tuple[int, ...]], scale: float) -> dict[str, Adapter]:
    """Read a LoRA file, in any of the layouts that diffusers' pipelines of a family read.

    Args:
        shapes: of the model's tensors, by diffusers' names.
        scale: how much of it to add; 1 for all.

    Returns:
        Name of a weight -> what is added to it.

    Raises:
        ValueError: the file is not whole, is for another model, or is more than products of two factors.
    """
    state, settings = _read(path)
    if more := next((name for name in state if any(word in name for word in _MORE)), None):
        raise ValueError(f"{path} holds {more}: wanted a plain LoRA, products of two factors")
    if not family.lora_loader:
        raise ValueError(f"the family {family.family} does not say how its adapters are read")
    loader = getattr(diffusers.loaders, family.lora_loader)
    try:
        state = loader.lora_state_dict(state)
    except Exception as error:
        # Converters take an adapter of their pipeline for granted.
        raise ValueError(f"{path} is no LoRA for {family.stock_name}: {one_line(error)}") from None
    found = _paired(path, state, settings, scale)
    for name, adapter in found.items():
        shape = (adapter.up.shape[0], adapter.down.shape[1])
        if name not in shapes:
            raise ValueError(f"{path} is for another model than {family.stock_name}: there is no {name} to add to")
        if shape != shapes[name] or adapter.up.shape[1] != adapter.down.shape[0]:
            raise ValueError(f"{path} adds {list(shape)} to {name}, which is {list(shapes[name])}: for another model")
    return found


def _read(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    if not path.is_file():
        raise ValueError(f"there is no LoRA file {path}")
    try:
        with safe_open(path, framework="pt") as file:
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no iterator
            settings = json.loads((file.metadata() or {}).get(_SETTINGS, "{}"))
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(f"{path} is no safetensors file of a LoRA ({one_line(error)})") from None
    return state, settings if isinstance(settings, dict) else {}


def _paired(path: Path, state: Mapping[str, Any], settings: Mapping[str, Any], scale: float) -> dict[str, Adapter]:
    """Put the two factors of each layer together."""
    suffixes = (".lora_A.weight", ".lora_B.weight", ".alpha")
    layers: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in state.items():
        suffix = next((each for each in suffixes if name.endswith(each)), None)
        if suffix is None:
            raise ValueError(f"{path} holds {name}: wanted a plain LoRA of the transformer, products of two factors")
        layers.setdefault(name.removesuffix(suffix).removeprefix(_TRANSFORMER), {})[suffix] = tensor
    found = {}
    for layer, held in layers.items():
        if (lost := next((suffix for suffix in suffixes[:2] if suffix not in held), None)) is not None:
            raise ValueError(f"{path} holds no {layer}{lost}, the other factor of what it adds there")
        down, up = held[suffixes[0]], held[suffixes[1]]
        if down.ndim != 2 or up.ndim != 2:
            raise ValueError(f"{path}: the factors of {layer} are no matrices")
        rank = down.shape[0]
        alpha = float(held[".alpha"]) if ".alpha" in held else _alpha(layer, settings, rank)
        share = math.sqrt(rank) if settings.get(f"{_TRANSFORMER}use_rslora") else rank
        found[f"{layer}.weight"] = Adapter(down, up, scale * alpha / share)
    if not found:
        raise ValueError(f"{path} is no LoRA: it holds nothing")
    return found


def _alpha(layer: str, settings: Mapping[str, Any], rank: int) -> float:
    """What the product is multiplied with, times the rank: as peft wrote it down, else the rank."""
    patterns = settings.get(f"{_TRANSFORMER}alpha_pattern") or {}
    for pattern, alpha in patterns.items():
        if re.fullmatch(rf"(.*\.)?{pattern}", layer):
            return float(alpha)
    return float(settings.get(f"{_TRANSFORMER}lora_alpha", rank))
