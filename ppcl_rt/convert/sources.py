"""Weights as others publish them: folders of diffusers, single files, floats of eight bits."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open

from ppcl_rt.checkpoint.card import Origin, origin_of, read_origin
from ppcl_rt.checkpoint.headers import json_object, json_object_of
from ppcl_rt.checkpoint.names import CONFIG
from ppcl_rt.checkpoint.reader import Checkpoint
from ppcl_rt.convert.formats import CONFIG_IN_FILE
from ppcl_rt.convert.ggufs import read_gguf
from ppcl_rt.families import registry
from ppcl_rt.files import one_line

# What files call the factors that quantised weights are to be multiplied with.
_FACTORS = ("scale_weight", "weight_scale", "weight_scale_2", "scale_input", "input_scale", "scaled_fp8", "comfy_quant")


class Source(NamedTuple):
    """Weights of a transformer.

    Attributes:
        name: of the folder or file, for messages.
        tensors: by the names in the files. They are mapped from disk: what is not touched takes no memory.
        config: what diffusers' class takes; None where nothing says.
        origin: licence and base model.
    """

    name: str
    tensors: dict[str, torch.Tensor]
    config: dict[str, Any] | None
    origin: Origin


def open_source(path: Path, dtype: torch.dtype = torch.bfloat16) -> Source:
    """Open a folder of diffusers or a single file (``.safetensors`` or ``.gguf``).

    Args:
        dtype: of what a GGUF file holds quantised.

    Raises:
        ValueError: there is none, it is not whole, it is of no family here, it is pluggable or pruned already, or its
            weights are to be multiplied with factors first.
    """
    if path.is_dir():
        source = _folder(path)
    elif path.suffix == ".safetensors":
        source = _single_file(path)
    elif path.suffix == ".gguf" and path.is_file():
        tensors, config, origin = read_gguf(path, dtype)
        source = Source(str(path), tensors, config, _origin(path, origin))
    else:
        raise ValueError(f"{path} is no folder of diffusers and no file whose name ends in .safetensors or .gguf")
    factor = next((name for name in source.tensors if name.rpartition(".")[2] in _FACTORS), None)
    if factor is not None:
        raise ValueError(f"{path} holds {factor}: its weights are quantised with factors, wanted weights as they are")
    return source


def _folder(path: Path) -> Source:
    if not (path / CONFIG).is_file():
        raise ValueError(f"{path} is no folder of a model: it has no {CONFIG}")
    checkpoint = Checkpoint(path)
    if checkpoint.catalog is not None:
        raise ValueError(f"{path} is a checkpoint of ours already: `ppcl export` writes it in other formats")
    model = registry.of_class(checkpoint.config.get("_class_name"), path)
    if model.opened(path).catalog is not None:
        raise ValueError(f"{path} is in a layout that the family alone knows: `ppcl import` reads it")
    with checkpoint.kept_open():
        tensors = {name: checkpoint.read(name) for name in checkpoint.names}
    return Source(str(path), tensors, checkpoint.config, read_origin(path))


def _single_file(path: Path) -> Source:
    if not path.is_file():
        raise ValueError(f"there is no file {path}")
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no iterator
            metadata = file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is not whole ({one_line(error)}): fetch it again") from None
    said = metadata.get(CONFIG_IN_FILE)
    config = None if said is None else json_object_of(said, f"{path}: its {CONFIG_IN_FILE}")
    return Source(str(path), tensors, config, _origin(path, origin_of(metadata)))


def _origin(path: Path, said: Origin) -> Origin:
    """The origin that a file says, or else the card next to it, as it lies in the hub's repositories."""
    return said if said != Origin() else read_origin(path.parent)


def read_config(folder: Path) -> dict[str, Any]:
    """Read the config of a transformer from its folder, or from that of a pipeline above it.

    Raises:
        ValueError: there is none.
    """
    places = (folder / CONFIG, folder / "transformer" / CONFIG)
    found = next((place for place in places if place.is_file()), None)
    if found is None:
        raise ValueError(f"{folder} has no {CONFIG}, and no transformer/{CONFIG}")
    return {name: value for name, value in json_object(found).items() if name == "_class_name" or name[0] != "_"}
