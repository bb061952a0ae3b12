"""Emoji as a family: Qwen-Image's transformer and autoencoder in a small size, and embeddings of words.

The transformer predicts ``x_0``; the scheduler of its pipeline knows that. Samples come from a cache, as those of any
pipeline do.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

import ppcl_rt
from ppcl_rt.pipelines.drawing import Drawing, How
from ppcl_train.emoji.artwork import SIDE
from ppcl_train.emoji.captions import Caption
from ppcl_train.emoji.task import EmojiTask, chosen
from ppcl_train.families.base import ImageShape, Predicts
from ppcl_train.families.qwen_image import QwenImage, QwenImageEncoder
from ppcl_train.scenes.sampling import Sampler


class EmojiEncoder(QwenImageEncoder):
    """An opened pipeline folder of emoji."""

    negative = ""

    def __init__(self, drawing: Drawing, family: Any) -> None:
        super().__init__(drawing.pipe, family)
        self.drawing = drawing

    @staticmethod
    def default_area(pipe: Any) -> int:
        """See `PipelineEncoder.default_area`."""
        return SIDE**2

    def embed(self, prompt: str) -> torch.Tensor:
        """See `Encoder.embed`."""
        assert self.drawing.table is not None, "a folder of emoji has a table of words"
        return self.drawing.table.embed(prompt).embeddings

    def draw(
        self, prompt: str, size: tuple[int, int], seed: int, steps: int, guidance: float, negative: str
    ) -> tuple[torch.Tensor, ImageShape]:
        """See `Encoder.draw`."""
        how = How(steps, guidance, size)
        [latents] = self.drawing.draw([prompt], seed, how, negative=negative, as_latents=True)
        return latents, (1, size[1] // self.multiple, size[0] // self.multiple)

    def pictures(
        self, model: Any, prompts: Sequence[str], size: tuple[int, int], seed: int, sampler: Sampler
    ) -> list[Image.Image]:
        """See `Encoder.pictures`; all prompts at once."""
        how = How(sampler.steps, sampler.guidance, size)
        return self.drawing.around(model).draw(prompts, seed, how, negative=sampler.negative)


class Emoji(QwenImage):
    """The family ``emoji``."""

    name, title = "emoji", "an emoji"
    predicts: Predicts = "clean"
    task_settings: Mapping[str, Any] = {"size": SIDE}

    def open(self, pipeline: str, *, device: str, dtype: torch.dtype, draws: bool) -> EmojiEncoder:
        """See `Family.open`."""
        model = ppcl_rt.load(f"{pipeline}/transformer", dtype=dtype, device=device) if draws else None
        return EmojiEncoder(Drawing.open(Path(pipeline), model, dtype, device), self)

    def captions(self, count: int, seed: int) -> list[Caption]:
        """See `Judged.captions`: those of the training."""
        return chosen(count, False, seed)

    def scores(
        self, model: Any, sampler: Sampler, captions: Sequence[Caption], seed: int, pipeline: str | None
    ) -> np.ndarray:
        """See `Judged.scores`."""
        if pipeline is None:
            raise ValueError("emoji are decoded and judged with their pipeline: --set pictures.pipeline=FOLDER")
        return EmojiTask(sampler.model_dump(), pipeline).scores(model, captions, seed)
