"""Where a run's batches come from: samples that the family makes on the spot, or samples that were cached in shards.

A source returns the samples of a seed; (run.seed, seed) alone decides them, so that a run that was killed goes on with
the batches that it would have had. Each sample has draws of its own (`seeds`), so a process makes or reads its share of
a batch and nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
import torch

from ppcl_train.config.settings import RunConfig
from ppcl_train.data import seeds, shards
from ppcl_train.data.seeds import Purpose, Seed
from ppcl_train.families.base import Samples

# One sample in so many of a cache is held out from training, to measure with.
_HELD_OUT = 32
# All samples of a batch.
WHOLE = slice(None)
# Which samples of a cache: those that compressing trains on, those that it measures with, or both.
Part = Literal["trained", "held out", "all"]


class Source(Protocol):
    """Where samples come from."""

    def samples(self, size: int, seed: Seed, of: Part = "trained", share: slice = WHOLE) -> Samples:
        """Make or read a batch, or a share of it, on the CPU; (run.seed, seed) alone decides it.

        Args:
            size: samples of the whole batch.
            of: samples that are held out are there to measure with: no caption is dropped. Samples that are made are
                of one kind, those held out at seeds that training never uses; the captions that judges ask for are in
                neither.
            share: the samples that are made or read; the same bits as in the whole batch.
        """

    def with_negative(self, samples: Samples) -> Samples:
        """Append every sample once more under the sampler's negative prompt."""


def source(run: RunConfig) -> Source:
    """Return the source of a run.

    Raises:
        ValueError: the run's cache is missing, not complete or of another family, or lacks the embeddings of the
            negative prompt that losses are measured with.
    """
    return Made(run) if run.data.cache is None else Cached(run, _opened(run.data.cache))


@lru_cache(maxsize=4)
def _opened(folder: str) -> shards.Shards:
    return shards.Shards(Path(folder))


class Made:
    """Samples that the family makes anew for every batch (`Family.make`)."""

    def __init__(self, run: RunConfig) -> None:
        self.run = run

    def samples(self, size: int, seed: Seed, of: Part = "trained", share: slice = WHOLE) -> Samples:
        """See `Source.samples`.

        Raises:
            ValueError: samples of this family come from a cache.
        """
        draws, dropped = _draws(self.run, range(size)[share], seed, of)
        return self.run.family.make(draws, dropped)

    def with_negative(self, samples: Samples) -> Samples:
        """See `Source.with_negative`."""
        return _doubled(samples, self.run.family.embed(self.run.sampler.negative))


class Cached:
    """Samples of a cache, drawn at random. All samples of a batch have one shape, drawn by how many samples have it.

    A batch holds no sample twice unless the batch is larger than its bucket. Batches are drawn independently: over a
    whole training each sample is seen about equally often, but there are no epochs.

    Every 32nd sample of a shape is held out. A cache that has no 32 samples of any shape holds out none, and losses are
    then measured on samples of the training, under other noise.
    """

    def __init__(self, run: RunConfig, cache: shards.Shards) -> None:
        if cache.family != run.task:
            raise ValueError(f"{cache.folder} is a cache of {cache.family}, the run's task is {run.task}")
        sampler = run.sampler
        if sampler.guidance != 1 and sampler.negative not in cache.unconditional:
            # Found now, and not when losses are measured, which may be days later.
            raise ValueError(
                f"{cache.folder} lacks embeddings of the negative prompt {sampler.negative!r}: run the command that "
                "made it again, which adds them, or measure without guidance: --set sampler.guidance=1"
            )
        self.run, self.cache = run, cache
        self._kept_out = {shape: bucket[_HELD_OUT - 1 :: _HELD_OUT] for shape, bucket in cache.buckets.items()}
        self._kept_out = {shape: bucket for shape, bucket in self._kept_out.items() if bucket}
        self._trained = {
            shape: [place for n, place in enumerate(bucket, 1) if n % _HELD_OUT]
            for shape, bucket in cache.buckets.items()
        }

    @cached_property
    def longest(self) -> int:
        """Tokens of the longest caption."""
        return max(self.cache.words(place) for bucket in self.cache.buckets.values() for place in bucket)

    def samples(self, size: int, seed: Seed, of: Part = "trained", share: slice = WHOLE) -> Samples:
        """See `Source.samples`."""
        # All samples of a batch have one shape, and none comes twice: both are decided for the whole batch.
        rng = seeds.generator(self.run.seed, seed, Purpose.BATCH)
        buckets = self.cache.buckets if of == "all" else self._trained
        if of == "held out" and self._kept_out:
            buckets = self._kept_out
        shapes = list(buckets)
        counts = np.array([len(buckets[shape]) for shape in shapes])
        shape = shapes[rng.choice(len(shapes), p=counts / counts.sum())]
        bucket = buckets[shape]
        places = [bucket[pick] for pick in rng.choice(len(bucket), size, replace=size > len(bucket))]
        dropped = _draws(self.run, range(size), seed, of)[1]
        latents, captions = zip(*(self.cache.read(place) for place in places[share]), strict=True)
        # As long as in the whole batch, of which other processes read the rest.
        lengths = (len(self.cache.empty) if gone else self.cache.words(place) for place, gone in zip(places, dropped))
        texts = [self.cache.empty if gone else text for text, gone in zip(captions, dropped[share], strict=True)]
        embeddings, mask = padded(texts, max(lengths))
        return Samples(torch.stack(latents).float(), embeddings, mask, shape)

    def with_negative(self, samples: Samples) -> Samples:
        """See `Source.with_negative`."""
        return _doubled(samples, self.cache.unconditional[self.run.sampler.negative])


def _draws(
    run: RunConfig, numbers: Sequence[int], seed: Seed, of: Part
) -> tuple[list[np.random.Generator], list[bool]]:
    """Return the generators of some samples of a batch, and whether their captions are dropped."""
    drop = 0.0 if of == "held out" else run.teacher.drop_caption
    draws = [seeds.generator(run.seed, seed, Purpose.PICTURE, number) for number in numbers]
    return draws, [bool(rng.random() < drop) for rng in draws]


def _doubled(samples: Samples, negative: torch.Tensor) -> Samples:
    """Append every sample once more under a negative prompt, whose embeddings are ``[S_text, E]``."""
    texts = [text[words] for text, words in zip(samples.embeddings, samples.mask, strict=True)]
    embeddings, mask = padded([*texts, *([negative] * len(texts))], samples.mask.shape[1])
    return Samples(torch.cat([samples.latents, samples.latents]), embeddings, mask, samples.shape)


def padded(texts: list[torch.Tensor], least: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Pad embeddings ``[S_text, E]`` with zeros at the end: ``[N, longest or least, E]`` float32, and their mask."""
    length = max(least, *map(len, texts))
    embeddings = torch.zeros(len(texts), length, texts[0].shape[1])
    mask = torch.zeros(len(texts), length, dtype=torch.bool)
    for n, text in enumerate(texts):
        embeddings[n, : len(text)], mask[n, : len(text)] = text.float(), True
    return embeddings, mask
