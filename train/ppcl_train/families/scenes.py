"""Scenes as a family: latents are pixels, embeddings are hashed words, and nothing has to be downloaded."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import torch
from PIL import Image

import ppcl_rt
from ppcl_train.families.base import ImageShape, Picture, Unreadable
from ppcl_train.scenes import scenes
from ppcl_train.scenes.sampling import IMAGE_SHAPE, Sampler, arguments, noise_for


class Scenes:
    """The family ``scenes``."""

    predicts: Literal["clean", "velocity"] = "clean"
    judged = True

    def arguments(
        self, x: torch.Tensor, t: torch.Tensor, embeddings: torch.Tensor, mask: torch.Tensor, shape: ImageShape
    ) -> dict[str, Any]:
        """See `Family.arguments`."""
        if shape != IMAGE_SHAPE:
            raise ValueError(f"scenes are {IMAGE_SHAPE} tokens, this cache holds {shape}: cache with --family scenes")
        return arguments(x, t, embeddings, mask)

    def open(self, pipeline: str, *, device: str, dtype: torch.dtype, draws: bool) -> ScenesEncoder:
        """See `Family.open`; the pipeline is a checkpoint folder, and none is read unless it draws."""
        return ScenesEncoder(ppcl_rt.load(pipeline, dtype=dtype, device=device) if draws else None)


class ScenesEncoder:
    """Words and pixels, and a checkpoint to draw with."""

    multiple = scenes.SIDE
    area = scenes.SIDE**2

    def __init__(self, model: Any) -> None:
        self.model = model

    def embed(self, prompt: str) -> torch.Tensor:
        """See `Encoder.embed`."""
        try:
            embeddings, mask = scenes.encode([prompt])
        except ValueError as error:
            raise Unreadable(str(error)) from None
        return embeddings[0, mask[0]]

    def encode(self, picture: Picture) -> tuple[torch.Tensor, ImageShape]:
        """See `Encoder.encode`."""
        pixels = picture
        if isinstance(picture, Image.Image):
            pixels = np.asarray(picture, dtype=np.float32) / 127.5 - 1
        return scenes.to_tokens(np.asarray(pixels)[None])[0], IMAGE_SHAPE

    def draw(
        self, prompt: str, size: tuple[int, int], seed: int, steps: int, guidance: float, negative: str
    ) -> tuple[torch.Tensor, ImageShape]:
        """See `Encoder.draw`; the sampler's shift is the checkpoint's own, and scenes know no negative prompt."""
        if size != (scenes.SIDE, scenes.SIDE):
            raise ValueError(f"scenes are {scenes.SIDE}x{scenes.SIDE} pixels, not {size[0]}x{size[1]}")
        # Before anything is drawn.
        self.embed(prompt)
        own = (self.model.catalog.task or {}).get("sampler", {})
        sampler = Sampler.model_validate({**own, "steps": steps, "guidance": guidance})
        noise = noise_for(1, seed).to(self.model.device, self.model.dtype)
        return sampler.sample(self.model, [prompt], noise)[0], IMAGE_SHAPE
