"""Where a run's batches come from: samples that the family makes on the spot, or samples that were cached in shards.

A source returns the samples of a seed; (run.seed, seed) alone decides them, so that a run that was killed goes on with
the batches that it would have had.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Protocol

import numpy as np
import torch

from ppcl_train.config.settings import RunConfig
from ppcl_train.data import shards
from ppcl_train.families.base import Samples


class Source(Protocol):
    """Where samples come from."""

    def samples(self, size: int, seed: int) -> Samples:
        """Make or read a batch, on the CPU; (run.seed, seed) alone decides it."""


def source(run: RunConfig) -> Source:
    """Return the source of a run.

    Raises:
        ValueError: the run's cache is missing, not complete or of another family.
    """
    return Made(run) if run.data.cache is None else Cached(run, _opened(run.data.cache))


@lru_cache(maxsize=4)
def _opened(folder: str) -> shards.Shards:
    return shards.Shards(Path(folder))


class Made:
    """Samples that the family makes anew for every batch (`Family.make`)."""

    def __init__(self, run: RunConfig) -> None:
        self.run = run

    def samples(self, size: int, seed: int) -> Samples:
        """See `Source.samples`.

        Raises:
            ValueError: samples of this family come from a cache.
        """
        return self.run.family.make(size, (self.run.seed, seed), self.run.teacher.drop_caption)


class Cached:
    """Samples of a cache, drawn at random. All samples of a batch have one shape, drawn by how many samples have it.

    A batch holds no sample twice unless the batch is larger than its bucket. Batches are drawn independently: over a
    whole training each sample is seen about equally often, but there are no epochs.
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
    """Pad embeddings ``[S_text, E]`` with zeros at the end: ``[N, longest, E]`` float32, and their mask."""
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones(len(text), dtype=torch.bool) for text in texts], True)
    return torch.nn.utils.rnn.pad_sequence([text.float() for text in texts], True), mask
