"""Families whose samples come from a cache, and their pipelines, which make it: what all of them have in common.

Prompts are embedded, and latents packed, by diffusers' pipeline itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import diffusers
import numpy as np
import torch
from PIL import Image
from torch import nn

from ppcl_rt.files import one_line
from ppcl_rt.pipelines.drawing import DTYPE
from ppcl_train.families.base import ImageShape, Picture, Predicts, Samples
from ppcl_train.scenes.sampling import Sampler


class PipelineEncoder:
    """An opened pipeline; a family says how it embeds, how strong its guidance is called, and what is special.

    Attributes:
        packed: whether the transformer takes packed tokens; else it takes an image ``[C, rows, columns]``.
        patch: latents along the side of what becomes one token.
    """

    negative = ""
    packed: ClassVar[bool] = False
    patch = 2

    def __init__(self, pipe: Any, family: Any) -> None:
        self.pipe, self.family = pipe, family
        self.multiple = self.patch * pipe.vae_scale_factor
        self.area = self.default_area(pipe)

    @staticmethod
    def default_area(pipe: Any) -> int:
        """Pixels of an image that the pipeline draws unless it is told otherwise."""
        area: int = (pipe.default_sample_size * pipe.vae_scale_factor) ** 2
        return area

    def embed(self, prompt: str) -> torch.Tensor:
        """See `Encoder.embed`."""
        raise NotImplementedError

    def guiding(self, guidance: float, negative: str) -> dict[str, Any]:
        """The arguments of the pipeline that stand for a guidance under a negative prompt."""
        raise NotImplementedError

    def normalised(self, pixels: torch.Tensor) -> torch.Tensor:
        """Normalised latents ``[1, C, rows, columns]`` of pixels ``[1, 3, height, width]`` in [-1, 1], in float32."""
        config = self.pipe.vae.config
        return (self.mode(pixels) - config.shift_factor) * config.scaling_factor

    def mode(self, pixels: torch.Tensor) -> torch.Tensor:
        """The mode of the VAE's posterior, so that a picture has one encoding."""
        vae = self.pipe.vae
        return vae.encode(pixels.to(vae.device, vae.dtype)).latent_dist.mode().float()

    @torch.no_grad()
    def encode(self, picture: Picture) -> tuple[torch.Tensor, ImageShape]:
        """See `Encoder.encode`."""
        assert isinstance(picture, Image.Image), "arrays are for families whose latents are pixels"
        pixels = self.pipe.image_processor.preprocess(picture, height=picture.height, width=picture.width)
        latents = self.normalised(pixels)
        _, channels, rows, columns = latents.shape
        if self.packed:
            latents = self.pipe._pack_latents(latents, 1, channels, rows, columns)
        return latents[0], (1, rows // self.patch, columns // self.patch)

    def draw(
        self, prompt: str, size: tuple[int, int], seed: int, steps: int, guidance: float, negative: str
    ) -> tuple[torch.Tensor, ImageShape]:
        """See `Encoder.draw`; noise is drawn on the CPU, so that it does not depend on the device."""
        width, height = size
        drawn = self.pipe(
            prompt,
            **self.guiding(guidance, negative),
            width=width,
            height=height,
            num_inference_steps=steps,
            generator=torch.Generator().manual_seed(seed),
            # Latents before the VAE decodes them, as `encode` returns them.
            output_type="latent",
        ).images
        return drawn[0], (1, height // self.multiple, width // self.multiple)

    def pictures(
        self, model: Any, prompts: Sequence[str], size: tuple[int, int], seed: int, sampler: Sampler
    ) -> list[Image.Image]:
        """See `Encoder.pictures`; the scheduler is the pipeline's own."""
        self.pipe.register_modules(transformer=model)
        width, height = size
        drawn = []
        for number, prompt in enumerate(prompts):
            # The pipeline takes no other generator. Its 32 bits tell a few prompts apart, and that is all they must.
            noise = torch.Generator().manual_seed(seed * len(prompts) + number)
            drawn += self.pipe(
                prompt,
                **self.guiding(sampler.guidance, sampler.negative),
                width=width,
                height=height,
                num_inference_steps=sampler.steps,
                generator=noise,
            ).images
        return drawn


class CachedFamily:
    """A `Family` that reads embeddings and latents from a cache.

    Attributes:
        name: of the family, as messages say it.
        pipeline_name: of the diffusers class of its pipeline.
        title: of the pipeline, as messages say it.
        encoder: what an opened pipeline becomes.
    """

    name: ClassVar[str]
    pipeline_name: ClassVar[str]
    title: ClassVar[str]
    encoder: ClassVar[type[PipelineEncoder]]
    predicts: Predicts = "velocity"

    def guided(self, wanted: torch.Tensor, free: torch.Tensor, guidance: float) -> torch.Tensor:
        """See `Family.guided`."""
        return free + guidance * (wanted - free)

    def embed(self, prompt: str) -> torch.Tensor:
        """See `Family.embed`; only a pipeline can."""
        raise ValueError(f"{self.name} reads embeddings from a cache: make one with `ppcl train cache`")

    def make(self, draws: Sequence[np.random.Generator], dropped: Sequence[bool]) -> Samples:
        """See `Family.make`; there are none without a cache."""
        raise ValueError(f"{self.name} reads a cache: make one with `ppcl train cache`, then --set data.cache=FOLDER")

    def without_transformer(self, pipeline: str) -> Any:
        """What a pipeline that does not draw has in place of its transformer, which has 12 to 40 GB."""
        return None

    def open(self, pipeline: str, *, device: str, dtype: torch.dtype, draws: bool) -> PipelineEncoder:
        """See `Family.open`."""
        try:
            left_out = {} if draws else {"transformer": self.without_transformer(pipeline)}
            kind = getattr(diffusers, self.pipeline_name)
            pipe = kind.from_pretrained(pipeline, **{DTYPE: dtype}, **left_out)
        except (OSError, ValueError, TypeError, AttributeError) as error:
            raise ValueError(f"{pipeline} cannot be opened as {self.title} pipeline: {one_line(error)}") from None
        pipe.set_progress_bar_config(disable=True)
        for name, part in pipe.components.items():
            if isinstance(part, nn.Module) and name not in left_out:
                part.to(device)
        return self.encoder(pipe, self)
