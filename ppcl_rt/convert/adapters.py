"""Low-rank adapters (LoRA) that are added to the weights which they were trained on."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers.loaders
import torch
from safetensors import SafetensorError, safe_open

from ppcl_rt.checkpoint.headers import json_object
from ppcl_rt.files import one_line
from ppcl_rt.model.exchange import Original, Shapes
from ppcl_rt.model.factors import Factors, scale_of

# Where diffusers keeps the settings of an adapter, as JSON in the header of its file.
_SETTINGS = "lora_adapter_metadata"
# peft keeps them next to its file.
_PEFT_FILE, _PEFT_SETTINGS = "adapter_model.safetensors", "adapter_config.json"
# What stands in front of a layer's name: nothing, the transformer as a part of a pipeline, by diffusers, peft, the
# original's code and trainers that write dots as underscores.
_TRANSFORMER = "transformer."
_FRONTS = (
    *("", _TRANSFORMER, "diffusion_model.", "model.diffusion_model.", "base_model.model.", "lora_unet_"),
    *("lora_transformer_", "base_model.model.transformer."),
)
# A layer's name, and what is added to it: by peft, by trainers in the manner of kohya's, by older ones.
_FACTOR = re.compile(
    r"(?P<layer>.+?)(?:(?P<down>\.lora_A|[._]lora[._]down|\.down)|(?P<up>\.lora_B|[._]lora[._]up|\.up))"
    r"(?:\.default)?\.weight"
)
_ALPHA = re.compile(r"(?P<layer>.+)\.alpha")
# Of a text encoder's layers.
_TEXT = ("lora_te", "text_encoder", "te1_", "te2_")


def read_adapters(path: Path, family: Any, shapes: Shapes, scale: float) -> dict[str, Factors]:
    """Read a LoRA file: names by diffusers or the original's, or a layout that diffusers' pipelines of a family read.

    Args:
        shapes: of the model's tensors, by diffusers' names.
        scale: how much of it to add; 1 for all.

    Returns:
        Name of a weight -> what is added to it.

    Raises:
        ValueError: the file is not whole, is for another model, or is more than products of two factors.
    """
    state, settings = _read(path)
    layers = _paired(path, state, settings)
    known = _known(family, shapes)
    # All or nothing: some of diffusers' converters pass over what they do not know.
    if all(_home(layer, known) is None for layer in layers):
        layers = _paired(path, _by_diffusers(path, family, state), settings)
    found: dict[str, Factors] = {}
    for layer, factors in layers.items():
        if (home := _home(layer, known)) is None:
            raise ValueError(f"{path} is for another model than {family.stock_name}: there is no {layer} to add to")
        rows, columns = [shapes[name][0] for name in home.stock], shapes[home.stock[0]][1]
        down, up, share = factors
        if down.shape[1] != columns or up.shape != (sum(rows), down.shape[0]):
            adds, there = [up.shape[0], down.shape[1]], [sum(rows), columns]
            raise ValueError(f"{path} adds {adds} to {layer}, which is {there}: for another model")
        for name, part in zip(home.stock, home.taken_apart(up, rows), strict=True):
            if name in found:
                raise ValueError(f"{path} adds to {name} twice, the second time as {layer}")
            found[name] = Factors(down, part, scale * share)
    return found


def _known(family: Any, shapes: Shapes) -> dict[str, Original]:
    """What matrices a name means: a layer's by diffusers or of the original, with dots or with underscores."""
    homes = {name: Original((name,)) for name in shapes}
    with contextlib.suppress(ValueError):
        # A family without a table has diffusers' names alone.
        homes = {**family.originals(shapes), **homes}
    matrices = {
        name.removesuffix(".weight"): home
        for name, home in homes.items()
        if name.endswith(".weight") and len(shapes[home.stock[0]]) == 2
    }
    return {layer.replace(".", "_"): home for layer, home in matrices.items()} | matrices


def _home(layer: str, known: Mapping[str, Original]) -> Original | None:
    names = (layer.removeprefix(front) for front in _FRONTS if layer.startswith(front))
    return next((known[name] for name in names if name in known), None)


def _by_diffusers(path: Path, family: Any, state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The adapter as diffusers' pipelines of the family translate it.

    Raises:
        ValueError: they do not know it either.
    """
    if not family.lora_loader:
        return dict(state)
    loader = getattr(diffusers.loaders, family.lora_loader)
    try:
        found = loader.lora_state_dict(dict(state))
    except Exception as error:
        # Converters take an adapter of their pipeline for granted.
        raise ValueError(f"{path} is no LoRA for {family.stock_name}: {one_line(error)}") from None
    return dict(found)


def _read(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Tensors and settings of a file; settings from beside it, where peft wrote them."""
    if not path.is_file():
        raise ValueError(f"there is no LoRA file {path}")
    try:
        with safe_open(path, framework="pt") as file:
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no iterator
            settings = json.loads((file.metadata() or {}).get(_SETTINGS, "{}"))
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(f"{path} is no safetensors file of a LoRA ({one_line(error)})") from None
    if not isinstance(settings, dict):
        raise ValueError(f"{path}: {_SETTINGS} is no object of JSON")
    settings = {name.removeprefix(_TRANSFORMER): value for name, value in settings.items()}
    if path.name == _PEFT_FILE and (beside := path.with_name(_PEFT_SETTINGS)).is_file():
        settings = json_object(beside)
    return state, settings


def _paired(path: Path, state: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Factors]:
    """Put the two factors of each layer together; names of layers are the file's.

    Raises:
        ValueError: there is more than such factors, or less.
    """
    held: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in state.items():
        if name.startswith(_TEXT):
            raise ValueError(f"{path} holds {name}: wanted a LoRA of the transformer alone, none of a text encoder")
        if (match := _FACTOR.fullmatch(name) or _ALPHA.fullmatch(name)) is None:
            raise ValueError(f"{path} holds {name}: wanted a plain LoRA of the transformer, products of two factors")
        which = "alpha" if match.re is _ALPHA else "down" if match["down"] else "up"
        if which in held.setdefault(match["layer"], {}):
            raise ValueError(f"{path} holds the {which} factor of {match['layer']} twice")
        held[match["layer"]][which] = tensor
    found = {}
    for layer, each in held.items():
        if (lost := next((which for which in ("down", "up") if which not in each), None)) is not None:
            raise ValueError(f"{path} holds no {lost} factor of {layer}, the other factor of what it adds there")
        down, up = each["down"], each["up"]
        if down.ndim != 2 or up.ndim != 2 or not down.numel():
            raise ValueError(f"{path}: the factors of {layer} are no matrices")
        rank = down.shape[0]
        if "alpha" in each and each["alpha"].numel() != 1:
            raise ValueError(f"{path}: the alpha of {layer} is no number")
        try:
            scale = float(each["alpha"]) / rank if "alpha" in each else scale_of(layer, settings, rank)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
        found[layer] = Factors(down, up, scale)
    if not found:
        raise ValueError(f"{path} is no LoRA: it holds nothing")
    return found
