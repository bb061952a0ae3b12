"""Names of files and keys in a checkpoint folder, and the checksums of a tensor and of ``config.json``."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch

CONFIG = "config.json"
WEIGHTS = "diffusion_pytorch_model.safetensors"
INDEX = f"{WEIGHTS}.index.json"
# A file of weights in diffusers' folders, and the variant that its name says.
_WEIGHTS_OF = re.compile(r"diffusion_pytorch_model(?:\.([^.]+?))?(?:-\d+-of-\d+)?\.(?:safetensors|bin)")
# Where the catalog lies in config.json. A leading underscore makes diffusers pass over it without a word.
CATALOG_KEY = "_ppcl"
# Where the checksum of the settings and of the catalog lies in config.json; files of before 2026-12 have none.
CHECKSUM_KEY = "_ppcl_checksum"

# Bytes of a JSON file, or of the JSON in a safetensors file, that is read. The config.json of examples/scenes has 0.3
# millions, for 12 blocks. What was read takes up to sixty times as much memory.
MOST_JSON = 2**23

# Tensors that only a checkpoint with a catalog holds: a stock model has none of these names.
_WITH_CATALOG = re.compile(r"^(students|text_runs|sketches)\.|\.(order|replacements)\.|\.(up|down)$")


def of_variant(name: str, variant: str | None) -> str:
    """The name that diffusers gives a file in a variant: ``x.safetensors`` becomes ``x.fp16.safetensors``."""
    stem, _, ending = name.rpartition(".")
    return name if variant is None else f"{stem}.{variant}.{ending}"


def variants_in(folder: Path) -> set[str | None]:
    """The variants of which a folder holds weights; None stands for weights of no variant."""
    matches = (_WEIGHTS_OF.fullmatch(path.name) for path in folder.glob("diffusion_pytorch_model*"))
    return {match[1] for match in matches if match is not None}


def digest(tensor: torch.Tensor, of: Literal["bytes", "tensors"] = "tensors") -> str:
    """SHA-256 of a tensor: of its dtype, its shape and its bytes, or of its bytes alone (`Catalog.checksums_of`)."""
    held = tensor.detach().cpu().contiguous()
    sha = hashlib.sha256()
    if of == "tensors":
        sha.update(f"{held.dtype} {list(held.shape)}\n".encode())
    sha.update(held.reshape(-1).view(torch.uint8).numpy().data)
    return sha.hexdigest()


def config_digest(content: Mapping[str, Any]) -> str:
    """SHA-256 of what ``config.json`` says of the model: its settings and the catalog.

    Keys that begin with an underscore are notes, which whoever copies or saves a folder may write, and do not count.

    Args:
        content: as it is read from JSON.
    """
    counted = {key: value for key, value in content.items() if key == CATALOG_KEY or not key.startswith("_")}
    return hashlib.sha256(json.dumps(counted, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def needs_catalog(name: str) -> bool:
    """Whether a tensor of this name in a file is one that no stock checkpoint holds."""
    return _WITH_CATALOG.search(name) is not None
