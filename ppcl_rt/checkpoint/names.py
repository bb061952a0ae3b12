"""Names of files and keys in a checkpoint folder, and the checksum of a tensor."""

from __future__ import annotations

import hashlib
from typing import Literal

import torch

CONFIG = "config.json"
WEIGHTS = "diffusion_pytorch_model.safetensors"
INDEX = f"{WEIGHTS}.index.json"
# Where the catalog lies in config.json. A leading underscore makes diffusers pass over it without a word.
CATALOG_KEY = "_ppcl"


def digest(tensor: torch.Tensor, of: Literal["bytes", "tensors"] = "tensors") -> str:
    """SHA-256 of a tensor: of its dtype, its shape and its bytes, or of its bytes alone (`Catalog.checksums_of`)."""
    held = tensor.detach().cpu().contiguous()
    sha = hashlib.sha256()
    if of == "tensors":
        sha.update(f"{held.dtype} {list(held.shape)}\n".encode())
    sha.update(held.reshape(-1).view(torch.uint8).numpy().data)
    return sha.hexdigest()
