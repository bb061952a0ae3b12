"""Sizes of a run, and the settings that a block is raced at."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch


@dataclass(frozen=True)
class Preset:
    """Sizes of the block and of a race.

    Attributes:
        hidden: channels of each MLP.
        images: pixels a side -> image tokens; the first entry is the main one.
        texts: counts of text tokens; the first is the main one.
        widths: heads and channels that are kept, in per cent.
        compiled: widths at which torch.compile takes part (5 to 10 s for each compile), at the main shape and batch 1.
        rounds: timed rounds of the best implementation of each kind and of the rivals.
        screening: timed rounds of all contestants.
        flush: bytes that are read before each call, more than any L2 holds.
        ahead: cycles that the device waits before each call, so that python is ahead of it.
        matrix: side of the square product that is the ceiling of matrix products.
        copied: bytes of the copy that is the ceiling of memory.
    """

    heads: int
    head_dim: int
    hidden: int
    images: dict[int, int]
    texts: tuple[int, ...]
    widths: tuple[int, ...]
    batches: tuple[int, ...]
    compiled: tuple[int, ...]
    device: str
    dtype: torch.dtype
    rounds: int
    screening: int
    flush: int
    ahead: int
    matrix: int
    copied: int


PRESETS = {
    # Qwen-Image; FLUX has the same sizes.
    "full": Preset(
        heads=24,
        head_dim=128,
        hidden=12288,
        images={1024: 4096, 512: 1024, 1328: 6889},
        texts=(512, 64),
        widths=(100, 50, 75, 25),
        batches=(1, 2),
        compiled=(100, 50),
        device="cuda",
        dtype=torch.bfloat16,
        rounds=20,
        screening=5,
        flush=2**28,
        ahead=500_000,
        matrix=8192,
        copied=2**30,
    ),
    "tiny": Preset(
        heads=2,
        head_dim=8,
        hidden=64,
        images={96: 9},
        texts=(3,),
        widths=(100, 50),
        batches=(1,),
        compiled=(),
        device="cpu",
        dtype=torch.float32,
        rounds=2,
        screening=1,
        flush=2**10,
        ahead=0,
        matrix=64,
        copied=2**10,
    ),
}


class Setting(NamedTuple):
    """Arguments of a block.

    Attributes:
        pixels: a side.
        image, text: tokens.
        width: heads and channels kept, in per cent; 0 for linear maps in place of the MLPs (PPCL eq. 9).
        masked: whether some text tokens are masked.
    """

    pixels: int
    image: int
    text: int
    batch: int
    width: int
    masked: bool = False


def settings(preset: Preset) -> list[Setting]:
    """List the settings to race, the most useful first, since the time may run out; not the product of all axes."""
    (main, tokens), *_ = preset.images.items()
    text, *texts = preset.texts
    full, half = preset.widths[0], 50
    made = []
    for batch in preset.batches:
        for pixels, image in preset.images.items():
            made += [Setting(pixels, image, text, batch, width) for width in preset.widths]
            if pixels == main:
                made += [Setting(pixels, image, text, batch, width, True) for width in (full, half)]
                made += [Setting(pixels, image, text, batch, 0)]
    return made + [Setting(main, tokens, short, 1, width) for short in texts for width in (full, half)]
