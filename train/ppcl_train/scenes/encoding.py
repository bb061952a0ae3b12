"""Scenes as tensors: prompts as embeddings, images as tokens, and training pairs of both."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from PIL import Image

from ppcl_train.scenes.language import CELL, CELLS, GRID, MAX_TOKENS, SIDE, Caption, training_caption, words_of
from ppcl_train.scenes.rendering import render

EMBEDDING_DIM = 64
# The one word of the empty prompt, so that no prompt is a row of masked keys.
_NOTHING = "<nothing>"


@functools.cache
def _word_vector(word: str) -> torch.Tensor:
    seed = int.from_bytes(hashlib.sha256(word.encode()).digest()[:8], "little")
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(EMBEDDING_DIM, dtype=np.float32))


def encode(prompts: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """Embed prompts with fixed vectors made from a hash of each word; the empty prompt is one word of its own.

    Args:
        prompts: N prompts.

    Returns:
        Embeddings ``[N, MAX_TOKENS, EMBEDDING_DIM]`` float32 and a boolean mask ``[N, MAX_TOKENS]``, true on words.

    Raises:
        ValueError: as `words_of`.
    """
    embeddings = torch.zeros(len(prompts), MAX_TOKENS, EMBEDDING_DIM)
    mask = torch.zeros(len(prompts), MAX_TOKENS, dtype=torch.bool)
    for n, prompt in enumerate(prompts):
        words = words_of(prompt) or (_NOTHING,)
        for position, word in enumerate(words):
            embeddings[n, position] = _word_vector(word)
        mask[n, : len(words)] = True
    return embeddings, mask


@dataclass(frozen=True)
class Batch:
    """Training pairs: latents ``[N, 16, 48]`` (a cell is a token), embeddings ``[N, 7, 64]``, mask ``[N, 7]``."""

    latents: torch.Tensor
    embeddings: torch.Tensor
    mask: torch.Tensor
    captions: tuple[Caption, ...] = field(repr=False)


def to_tokens(images: np.ndarray | torch.Tensor) -> torch.Tensor:
    """Cut images ``[N, 16, 16, 3]`` into one token a cell, ``[N, 16, 48]``."""
    cells = torch.as_tensor(images).reshape(-1, GRID, CELL, GRID, CELL, 3).transpose(2, 3)
    return cells.reshape(-1, CELLS, CELL * CELL * 3)


def to_images(tokens: torch.Tensor) -> np.ndarray:
    """Join tokens ``[N, 16, 48]`` to images ``[N, 16, 16, 3]``; the inverse of `to_tokens`."""
    cells = tokens.detach().float().cpu().reshape(-1, GRID, GRID, CELL, CELL, 3).transpose(2, 3)
    return cells.reshape(-1, SIDE, SIDE, 3).numpy()


def to_pictures(tokens: torch.Tensor) -> list[Image.Image]:
    """Make pictures of tokens ``[N, 16, 48]`` in [-1, 1]."""
    return [Image.fromarray(pixels) for pixels in ((to_images(tokens) + 1) / 2 * 255 + 0.5).astype(np.uint8)]


def training_batch(
    size: int, seed: Sequence[int], drop: float = 0.0, shares: Sequence[float] | None = None, apart: bool = True
) -> Batch:
    """Make ``size`` training pairs; ``seed`` alone decides them.

    Args:
        drop: share of the captions that is replaced by the empty prompt.
        shares: of the five kinds, as in `language.training_caption`.
        apart: as in `rendering.render`.
    """
    rng = np.random.default_rng(seed)
    captions = tuple(training_caption(rng, shares) for _ in range(size))
    images = np.stack([render(caption, rng, apart) for caption in captions])
    return _batch(captions, images, (rng.random(size) < drop).tolist())


def training_pairs(draws: Sequence[np.random.Generator], dropped: Sequence[bool]) -> Batch:
    """Make training pairs, each from its own generator; where ``dropped``, the caption becomes the empty prompt."""
    captions = tuple(training_caption(rng) for rng in draws)
    images = np.stack([render(caption, rng) for caption, rng in zip(captions, draws, strict=True)])
    return _batch(captions, images, dropped)


def _batch(captions: tuple[Caption, ...], images: np.ndarray, dropped: Sequence[bool]) -> Batch:
    embeddings, mask = encode(["" if gone else str(caption) for gone, caption in zip(dropped, captions, strict=True)])
    return Batch(to_tokens(images), embeddings, mask, captions)
