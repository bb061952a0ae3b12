"""Scenes as a family: Qwen-Image's transformer, latents that are pixels, embeddings that are hashed words.

Nothing has to be downloaded.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image

import ppcl_rt
from ppcl_train.families.base import ImageShape, Picture, Samples, Unreadable
from ppcl_train.families.qwen_image import QwenImageTransformer
from ppcl_train.scenes.encoding import encode, to_pictures, to_tokens, training_pairs
from ppcl_train.scenes.language import KINDS, SIDE, Caption, held_out_captions
from ppcl_train.scenes.sampling import IMAGE_SHAPE, Sampler, arguments, guided_prediction, judged, noise_for


class Scenes(QwenImageTransformer):
    """The family ``scenes``."""

    predicts: Literal["clean", "velocity"] = "clean"
    task_settings: Mapping[str, Any] = {}

    def arguments(
        self, x: torch.Tensor, t: torch.Tensor, embeddings: torch.Tensor, mask: torch.Tensor, shape: ImageShape
    ) -> dict[str, Any]:
        """See `Family.arguments`."""
        if shape != IMAGE_SHAPE:
            raise ValueError(f"scenes are {IMAGE_SHAPE} tokens, this cache holds {shape}: cache with --family scenes")
        return arguments(x, t, embeddings, mask)

    def guided(self, wanted: torch.Tensor, free: torch.Tensor, guidance: float) -> torch.Tensor:
        """See `Family.guided`."""
        return guided_prediction(wanted, free, guidance)

    def embed(self, prompt: str) -> torch.Tensor:
        """See `Family.embed`."""
        embeddings, mask = encode([prompt])
        return embeddings[0, mask[0]]

    def make(self, draws: Sequence[np.random.Generator], dropped: Sequence[bool]) -> Samples:
        """See `Family.make`."""
        batch = training_pairs(draws, dropped)
        return Samples(batch.latents, batch.embeddings, batch.mask, IMAGE_SHAPE)

    def captions(self, count: int, seed: int) -> list[Caption]:
        """See `Judged.captions`: held-out ones, equally many of each kind."""
        kinds = len(KINDS)
        if count % kinds:
            raise ValueError(f"prompts are spread over {kinds} kinds: ask for a multiple, not {count}")
        return held_out_captions(count // kinds, seed)

    def scores(
        self, model: Any, sampler: Sampler, captions: Sequence[Caption], seed: int, pipeline: str | None
    ) -> np.ndarray:
        """See `Judged.scores`; a pipeline is not needed."""
        return judged(model, sampler, captions, seed)

    def open(self, pipeline: str, *, device: str, dtype: torch.dtype, draws: bool) -> ScenesEncoder:
        """See `Family.open`; the pipeline is a checkpoint folder, which is read only if the encoder draws."""
        return ScenesEncoder(ppcl_rt.load(pipeline, dtype=dtype, device=device) if draws else None)


class ScenesEncoder:
    """Words and pixels, and a checkpoint to draw with."""

    multiple = SIDE
    area = SIDE**2
    negative = ""

    def __init__(self, model: Any) -> None:
        self.model = model

    def embed(self, prompt: str) -> torch.Tensor:
        """See `Encoder.embed`."""
        try:
            embeddings, mask = encode([prompt])
        except ValueError as error:
            raise Unreadable(str(error)) from None
        return embeddings[0, mask[0]]

    def encode(self, picture: Picture) -> tuple[torch.Tensor, ImageShape]:
        """See `Encoder.encode`."""
        pixels = picture
        if isinstance(picture, Image.Image):
            pixels = np.asarray(picture, dtype=np.float32) / 127.5 - 1
        return to_tokens(np.asarray(pixels)[None])[0], IMAGE_SHAPE

    def draw(
        self, prompt: str, size: tuple[int, int], seed: int, steps: int, guidance: float, negative: str
    ) -> tuple[torch.Tensor, ImageShape]:
        """See `Encoder.draw`; the sampler's shift is the checkpoint's own, and negative prompts are not used."""
        if size != (SIDE, SIDE):
            raise ValueError(f"scenes are {SIDE}x{SIDE} pixels, not {size[0]}x{size[1]}")
        # Checks the prompt before anything is drawn.
        self.embed(prompt)
        own = (self.model.catalog.task or {}).get("sampler", {})
        sampler = Sampler.model_validate({**own, "steps": steps, "guidance": guidance})
        noise = noise_for(1, seed).to(self.model.device, self.model.dtype)
        return sampler.sample(self.model, [prompt], noise)[0], IMAGE_SHAPE

    def pictures(
        self, model: Any, prompts: Sequence[str], size: tuple[int, int], seed: int, sampler: Sampler
    ) -> list[Image.Image]:
        """See `Encoder.pictures`; all prompts at once."""
        noise = noise_for(len(prompts), seed).to(model.device, model.dtype)
        return to_pictures(sampler.sample(model, prompts, noise))
