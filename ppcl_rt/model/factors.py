"""The two factors that an adapter (LoRA) has for each layer of the dense model, in stock order."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch

from ppcl_rt.files import one_line

# What the two factors are called by peft.
DOWN, UP = ".lora_A.weight", ".lora_B.weight"
# Adapters that are more than a product of two factors.
_MORE = ("lora_magnitude_vector", "dora_scale", ".lokr_", ".hada_", ".lora_B.bias")


class Factors(NamedTuple):
    """What an adapter adds to one layer of the dense model: ``scale * up @ down``.

    Attributes:
        down: ``[r, columns]``.
        up: ``[rows, r]``.
        scale: of the product.
    """

    down: torch.Tensor
    up: torch.Tensor
    scale: float = 1.0

    def times(self, scale: float) -> Factors:
        """So much of it."""
        return self._replace(scale=scale * self.scale)

    def delta(self) -> torch.Tensor:
        """The product ``[rows, columns]`` in float32."""
        return self.scale * (self.up.float() @ self.down.float())

    def added_to(self, weight: torch.Tensor) -> torch.Tensor:
        """The weight with the product, computed in float32, in the weight's dtype."""
        return (weight.float() + self.delta()).to(weight.dtype)


def mean_of(factors: Sequence[Factors], count: int) -> Factors:
    """The mean over ``count`` layers, of which these get something, as one product; its rank is the sum of theirs."""
    if count == 1:
        return factors[0]
    down = torch.cat([each.down for each in factors])
    up = torch.cat([each.up * (each.scale / count) for each in factors], dim=1)
    return Factors(down, up)


def scale_of(layer: str, settings: Mapping[str, Any], rank: int) -> float:
    """What peft's settings say that a layer's product is multiplied with; 1 where they say nothing.

    Args:
        layer: path in the transformer.
        settings: of peft's ``LoraConfig``: ``lora_alpha``, ``alpha_pattern``, ``use_rslora``.

    Raises:
        ValueError: what they say makes no sense.
    """
    try:
        patterns = settings.get("alpha_pattern") or {}
        # As peft looks a pattern up.
        found = next((a for pattern, a in patterns.items() if re.fullmatch(rf"(.*\.)?({pattern})", layer)), None)
        alpha = float(settings.get("lora_alpha", rank) if found is None else found)
    except (re.error, AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"the settings of alpha make no sense: {one_line(error)}") from None
    return alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank)


def paired(
    state: Mapping[str, torch.Tensor], alphas: Mapping[str, float], settings: Mapping[str, Any]
) -> dict[str, Factors]:
    """Pair the two factors of each layer.

    Args:
        state: by peft's names.
        alphas: of layers, by path.
        settings: of peft's ``LoraConfig``, for layers without an alpha.

    Raises:
        ValueError: the adapter is more than products of two factors, or one of a pair is missing.
    """
    if more := next((name for name in state if any(word in name for word in _MORE)), None):
        raise ValueError(f"the adapter holds {more}: wanted a plain LoRA, products of two factors")
    found = {}
    for path in dict.fromkeys(name.removesuffix(DOWN).removesuffix(UP) for name in state):
        down, up = state.get(path + DOWN), state.get(path + UP)
        if down is None or up is None:
            raise ValueError(f"the adapter holds one of {path}{DOWN} and {path}{UP}: wanted both")
        if down.ndim != 2 or up.ndim != 2 or len(down) != up.shape[1]:
            raise ValueError(f"the factors of {path} are {list(up.shape)} and {list(down.shape)}: no product")
        scale = scale_of(path, settings, len(down)) if path not in alphas else float(alphas[path]) / len(down)
        found[path] = Factors(down.detach().cpu(), up.detach().cpu(), scale)
    return found


def fetched(given: Any, arguments: dict[str, Any]) -> tuple[Mapping[str, torch.Tensor], dict[str, Any]]:
    """The tensors and the settings of an adapter, from a file, a folder or the hub where need be."""
    if isinstance(given, Mapping):
        return given, arguments.pop("metadata", None) or {}
    from diffusers.loaders.lora_base import _fetch_state_dict

    names = ("weight_name", "use_safetensors", "local_files_only", "cache_dir", "force_download", "proxies", "token")
    where = {name: arguments.pop(name, None) for name in (*names, "revision", "subfolder")}
    where["use_safetensors"] = True
    state, settings = _fetch_state_dict(given, user_agent={}, allow_pickle=False, metadata=None, **where)
    return state, settings or {}


def named_by_peft(state: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
    """A state dict of an adapter by peft's names, whatever diffusers called its factors before."""
    from diffusers.utils import convert_unet_state_dict_to_peft

    return state if all(".lora_" in name for name in state) else convert_unet_state_dict_to_peft(dict(state))
