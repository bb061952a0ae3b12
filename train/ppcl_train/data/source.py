"""Where a run's batches come from: scenes made on the spot, or samples that were cached in shards.

A source has the samples of a seed; (run.seed, seed) alone decides them, so that a run that was killed goes on with the
batches that it would have had.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import torch

from ppcl_train.config.settings import RunConfig
from ppcl_train.data import shards
from ppcl_train.families.base import ImageShape
from ppcl_train.scenes import scenes
from ppcl_train.scenes.sampling import IMAGE_SHAPE


class Samples(NamedTuple):
    """Samples of one shape, without noise.

    Attributes:
        latents: ``[N, S, C]`` float32, normalised and packed.
        embeddings: ``[N, S_text, E]`` float32.
        mask: ``[N, S_text]``, true on words.
        shape: of every image.
    """

    latents: torch.Tensor
    embeddings: torch.Tensor
    mask: torch.Tensor
    shape: ImageShape


class Source(Protocol):
    """Where samples come from."""

    def samples(self, size: int, seed: int) -> Samples:
        """Make or read a batch, on the CPU; (run.seed, seed) alone decides it."""


def source(run: RunConfig) -> Source:
    """The source of a run.

    Raises:
        ValueError: the run's cache is missing, not complete or of another family.
    """
    if run.data.cache is not None:
        return Cached(run, _opened(run.data.cache))
    if run.task != "scenes":
        raise ValueError(f"{run.task} reads a cache: make one with `ppcl train cache`, then --set data.cache=FOLDER")
    return Made(run)


@lru_cache(maxsize=4)
def _opened(folder: str) -> shards.Shards:
    return shards.Shards(Path(folder))


class Made:
    """Scenes, made anew for every batch."""

    def __init__(self, run: RunConfig) -> None:
        self.run = run

    def samples(self, size: int, seed: int) -> Samples:
        """See `Source.samples`."""
        batch = scenes.training_batch(size, (self.run.seed, seed), drop=self.run.teacher.drop_caption)
        return Samples(batch.latents, batch.embeddings, batch.mask, IMAGE_SHAPE)


class Cached:
    """Samples of a cache, drawn at random; all of a batch have one shape, drawn by how many samples have it.

    A batch holds no sample twice unless it is larger than its bucket. Batches are drawn independently: over a whole
    training each sample is seen about equally often, but there are no epochs.
    """

    def __init__(self, run: RunConfig, cache: shards.Shards) -> None:
        if cache.family != run.task:
            raise ValueError(f"{cache.folder} is a cache of {cache.family}, the run's task is {run.task}")
        self.run, self.cache = run, cache

    def samples(self, size: int, seed: int) -> Samples:
        """See `Source.samples`."""
        rng = np.random.default_rng((self.run.seed, seed))
        shapes = list(self.cache.buckets)
        counts = np.array([len(self.cache.buckets[shape]) for shape in shapes])
        shape = shapes[rng.choice(len(shapes), p=counts / counts.sum())]
        bucket = self.cache.buckets[shape]
        picks = rng.choice(len(bucket), size, replace=size > len(bucket))
        dropped = rng.random(size) < self.run.teacher.drop_caption
        latents, texts = zip(*(self.cache.read(bucket[pick]) for pick in picks), strict=True)
        embeddings, mask = padded(
            [self.cache.empty if gone else text for text, gone in zip(texts, dropped, strict=True)]
        )
        return Samples(torch.stack(latents).float(), embeddings, mask, shape)


def padded(texts: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Embeddings ``[S_text, E]`` of several lengths as ``[N, longest, E]`` float32, zeros behind, and their mask."""
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones(len(text), dtype=torch.bool) for text in texts], True)
    return torch.nn.utils.rnn.pad_sequence([text.float() for text in texts], True), mask
