"""Names of files and keys in a checkpoint folder, and the checksum of a tensor."""

from __future__ import annotations

import hashlib

import torch

CONFIG = "config.json"
WEIGHTS = "diffusion_pytorch_model.safetensors"
INDEX = f"{WEIGHTS}.index.json"
# Where the catalog lies in config.json. A leading underscore makes diffusers pass over it without a word.
CATALOG_KEY = "_ppcl"


def digest(tensor: torch.Tensor) -> str:
    """SHA-256 of a tensor's bytes."""
    held = tensor.detach().cpu().contiguous()
    return hashlib.sha256(held.reshape(-1).view(torch.uint8).numpy().data).hexdigest()
