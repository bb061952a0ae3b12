"""Where random numbers come from: every draw of a run has a stream of its own, named by what it is for.

A name is (seed of the run, stage, batch, sample, purpose). numpy's `SeedSequence` mixes the whole name into 128 bits,
and fields cannot run over into each other, so no two names share a stream: not those of two runs, stages, batches or
samples. A sample's draws need no other sample's, so each process makes its share of a batch, and what it makes does not
depend on how many processes there are.

Streams are numpy's. torch's generator on a CPU starts from the lowest 32 bits of its seed alone: of 100,000 samples,
two would share their noise more often than not.

The teacher that a run trains itself, and pictures that ``ppcl train generate`` draws, keep seeds of their own: the
shipped teacher and caches that were begun come out as they did.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

import numpy as np

# A field of a name is one word of the sequence: two words would read as two fields.
_WORD = 2**32


class Stage(IntEnum):
    """What draws batches. Numbers are part of the streams: new ones go to the end."""

    PROBES = 1
    STUDENTS = 2
    RECOVER = 3
    WIDTH = 4
    MEASURE = 5
    CHECK = 6
    REFINE = 7
    # Of the selector eq. 5: batches that tune its probes, and that judge them.
    TUNE_PROBES = 8
    JUDGE_PROBES = 9
    # Of the cost table: batches that candidates are measured on.
    TABLE = 10
    # Of other methods, in the comparison.
    GATES = 11
    RANDOM_WIDTH = 12
    # Scenes that are cached.
    CACHE = 13
    # The grid that a run ends with.
    PICTURES = 14
    # A teacher that is trained from a cache.
    TEACHER = 15


class Purpose(IntEnum):
    """What a draw decides. Numbers are part of the streams: new ones go to the end.

    BATCH: the shape of a batch's samples, and which of a cache they are. PICTURE: a sample's picture and caption.
    NOISE: a sample's timestep and noise. ORDER: in which order samples are spread over timesteps. PLAN: which plan a
    step trains, which gates are open, which units stay. START: weights before training.
    """

    BATCH = 1
    PICTURE = 2
    NOISE = 3
    ORDER = 4
    PLAN = 5
    START = 6


@dataclass(frozen=True)
class Seed:
    """The name of a batch in a run: a stage and a number; ``Seed(stage) + n`` is the batch n of a stage.

    Raises:
        ValueError: the number is not in 0 .. 2^32 - 1.
    """

    stage: Stage
    number: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.number < _WORD:
            raise ValueError(f"batches of a stage are numbered from 0 to {_WORD - 1}, not {self.number}")

    def __add__(self, batches: int) -> Seed:
        return Seed(self.stage, self.number + batches)


def generator(run: int, seed: Seed, purpose: Purpose, sample: int = 0) -> np.random.Generator:
    """Return the generator of one purpose of a sample, at its beginning.

    Args:
        run: seed of the run.
        seed: of the batch.
        sample: number in the whole batch, whichever process makes it; 0 for what decides the batch.
    """
    assert 0 <= sample < _WORD, "a batch has fewer samples"
    return np.random.default_rng(np.random.SeedSequence(run, spawn_key=(seed.stage, seed.number, sample, purpose)))
