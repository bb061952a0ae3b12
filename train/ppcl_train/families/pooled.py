"""Pooled text next to the tokens: a cache holds one matrix for a prompt, so the pooled text lies in its last rows.

Only for families that read every token of a text, padding too: all their texts are equally long.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F


def with_pooled(tokens: torch.Tensor, pooled: torch.Tensor, channels: int, model: str) -> torch.Tensor:
    """Append pooled text ``[P]`` to tokens ``[S, E]``, in as many rows as it takes, the last one filled with zeros.

    Raises:
        ValueError: P is not ``channels``, those of the ``model``.
    """
    if len(pooled) != channels:
        raise ValueError(f"the pooled text of this pipeline has {len(pooled)} channels, {model} has {channels}")
    rows = F.pad(pooled, (0, -len(pooled) % tokens.shape[1])).unflatten(0, (-1, tokens.shape[1]))
    return torch.cat([tokens, rows.to(tokens)])


def apart(embeddings: torch.Tensor, pooled: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Undo `with_pooled` for a batch.

    Args:
        embeddings: ``[N, S + rows, E]``.
        pooled: P.

    Returns:
        Tokens ``[N, S, E]`` and pooled text ``[N, P]``.

    Raises:
        ValueError: there is nothing but the rows of pooled text.
    """
    rows = -(-pooled // embeddings.shape[2])
    if embeddings.shape[1] <= rows:
        raise ValueError(
            f"embeddings have {embeddings.shape[1]} rows of {embeddings.shape[2]}, wanted tokens and then {rows} rows "
            f"with {pooled} numbers of pooled text: cache them for this family"
        )
    tokens, last = embeddings[:, :-rows], embeddings[:, -rows:]
    return tokens, last.flatten(1)[:, :pooled]
