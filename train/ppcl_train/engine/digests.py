"""Digests: short names of tensors and values, by which a result is known to hold still or to have to be made again."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves


def of_values(*values: Any) -> str:
    """Name values that JSON can hold, 32 hexadecimal digits."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:32]


def of_tensors(tensors: Iterable[torch.Tensor]) -> str:
    """Name tensors by dtype, shape and every bit, in their order. On one core, SHA-256 reads 0.4 to 2 GB a second."""
    found = hashlib.sha256()
    for tensor in tensors:
        found.update(f"{tensor.dtype} {list(tensor.shape)} ".encode())
        found.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()[:32]


def of_tree(tree: Any) -> str:
    """Name the tensors in nested dicts, lists and tuples."""
    return of_tensors(leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor))


def of_module(module: nn.Module, without: str = "") -> str:
    """Name the parameters and buffers of a module, but for those under paths that contain ``without``."""

    def tensors() -> Iterator[tuple[str, torch.Tensor]]:
        yield from module.named_parameters()
        yield from module.named_buffers()

    held = sorted((name, tensor) for name, tensor in tensors() if not without or without not in f".{name}")
    return of_values([name for name, _ in held], of_tensors(tensor for _, tensor in held))
