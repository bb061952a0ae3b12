"""FLUX.1 in training: how its transformer is built and called, and its pipeline's embeddings and latents.

Prompts are embedded and latents packed by diffusers' `FluxPipeline` itself. Its text has one length, and no mask.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from PIL import Image
from torch import nn

from ppcl_rt.families.flux import PPCLFluxTransformer2DModel, positions
from ppcl_rt.files import one_line
from ppcl_train.families import pooled
from ppcl_train.families.base import ImageShape, Picture, Samples


class Flux:
    """The family ``flux``: FLUX.1-dev, which was distilled for guidance and takes its strength as an input.

    Attributes:
        strength: of the guidance that the model is called with, here and by its pipeline; None for one that takes none.
        text_tokens: to which the pipeline pads prompts, and at which it cuts longer ones.
        pooled_channels: of the pooled text: those of CLIP ViT-L/14.
    """

    predicts: Literal["clean", "velocity"] = "velocity"
    judged = False
    strength: ClassVar[float | None] = 3.5
    text_tokens: ClassVar[int] = 512
    pooled_channels: ClassVar[int] = 768

    def build(self, architecture: Mapping[str, Any]) -> Any:
        """See `Family.build`."""
        return PPCLFluxTransformer2DModel(**architecture)

    def initialise(self, model: Any) -> None:
        """See `Family.initialise`."""
        zeroed = [layer for block in model.transformer_blocks for layer in (block.norm1, block.norm1_context)]
        zeroed += [block.norm for block in model.single_transformer_blocks]
        for layer in (*(norm.linear for norm in zeroed), model.norm_out.linear, model.proj_out):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def hidden_matrices(self, model: Any) -> list[str]:
        """See `Family.hidden_matrices`."""
        return sorted(
            name
            for name, parameter in model.named_parameters()
            if "transformer_blocks." in name and parameter.ndim == 2 and ".norm" not in name
        )

    def arguments(
        self, x: torch.Tensor, t: torch.Tensor, embeddings: torch.Tensor, mask: torch.Tensor, shape: ImageShape
    ) -> dict[str, Any]:
        """See `Family.arguments`; the mask is of no use: all texts are equally long, and padding counts."""
        tokens, pooled_text = pooled.apart(embeddings, self.pooled_channels)
        _, rows, columns = shape
        # One table for each sample, so that a batch can be cut into parts.
        tables = (positions(rows, columns), torch.zeros(tokens.shape[1], 3))
        image_ids, text_ids = (table.to(x.device).expand(len(x), -1, -1) for table in tables)
        return {
            "hidden_states": x,
            "encoder_hidden_states": tokens,
            "pooled_projections": pooled_text,
            "timestep": t,
            "img_ids": image_ids,
            "txt_ids": text_ids,
            "guidance": None if self.strength is None else torch.full_like(t, self.strength),
            "return_dict": False,
        }

    def guided(self, wanted: torch.Tensor, free: torch.Tensor, guidance: float) -> torch.Tensor:
        """See `Family.guided`; this is the guidance by a negative prompt, ``true_cfg_scale``, not `strength`."""
        return free + guidance * (wanted - free)

    def embed(self, prompt: str) -> torch.Tensor:
        """See `Family.embed`; only a pipeline can."""
        raise ValueError("this family reads embeddings from a cache: make one with `ppcl train cache`")

    def make(self, size: int, seed: tuple[int, int], drop: float) -> Samples:
        """See `Family.make`; there are none without a cache."""
        raise ValueError("this family reads a cache: make one with `ppcl train cache`, then --set data.cache=FOLDER")

    def open(self, pipeline: str, *, device: str, dtype: torch.dtype, draws: bool) -> FluxEncoder:
        """See `Family.open`."""
        from diffusers import FluxPipeline

        # Not loaded unless it draws: 24 GB that caching does not use.
        left_out = {} if draws else {"transformer": None}
        try:
            pipe = FluxPipeline.from_pretrained(pipeline, torch_dtype=dtype, **left_out)
        except (OSError, ValueError, TypeError, AttributeError) as error:
            raise ValueError(f"{pipeline} cannot be opened as a FLUX pipeline: {one_line(error)}") from None
        pipe.set_progress_bar_config(disable=True)
        return FluxEncoder(pipe.to(device), self)


class FluxSchnell(Flux):
    """The family ``flux-schnell``: FLUX.1-schnell, which takes no guidance and a shorter text."""

    strength = None
    text_tokens = 256


class FluxEncoder:
    """An opened `FluxPipeline`."""

    negative = ""

    def __init__(self, pipe: Any, family: Flux) -> None:
        self.pipe, self.family = pipe, family
        # The VAE's scale times the pipeline's 2x2 patches.
        self.multiple = 2 * pipe.vae_scale_factor
        self.area = (pipe.default_sample_size * pipe.vae_scale_factor) ** 2

    @torch.no_grad()
    def embed(self, prompt: str) -> torch.Tensor:
        """See `Encoder.embed`: all tokens of the pipeline, padding too, and rows of pooled text after them."""
        tokens, pooled_text, _ = self.pipe.encode_prompt(
            [prompt], device=self.pipe.device, max_sequence_length=self.family.text_tokens
        )
        channels, wanted = pooled_text.shape[1], self.family.pooled_channels
        if channels != wanted:
            raise ValueError(f"the pooled text of this pipeline has {channels} channels, FLUX.1 has {wanted}")
        return pooled.with_pooled(tokens[0], pooled_text[0])

    @torch.no_grad()
    def encode(self, picture: Picture) -> tuple[torch.Tensor, ImageShape]:
        """See `Encoder.encode`; takes the mode of the VAE's posterior, so that a picture has one encoding."""
        assert isinstance(picture, Image.Image), "arrays are for families whose latents are pixels"
        vae = self.pipe.vae
        pixels = self.pipe.image_processor.preprocess(picture, height=picture.height, width=picture.width)
        latents = vae.encode(pixels.to(vae.device, vae.dtype)).latent_dist.mode().float()
        latents = (latents - vae.config.shift_factor) * vae.config.scaling_factor
        _, channels, rows, columns = latents.shape
        return self.pipe._pack_latents(latents, 1, channels, rows, columns)[0], (1, rows // 2, columns // 2)

    def draw(
        self, prompt: str, size: tuple[int, int], seed: int, steps: int, guidance: float, negative: str
    ) -> tuple[torch.Tensor, ImageShape]:
        """See `Encoder.draw`; noise is drawn on the CPU, so that it does not depend on the device."""
        width, height = size
        drawn = self.pipe(
            prompt,
            negative_prompt=negative if guidance > 1 else None,
            true_cfg_scale=guidance,
            # A model without an embedding of it does not look at it.
            guidance_scale=self.family.strength or 0.0,
            max_sequence_length=self.family.text_tokens,
            width=width,
            height=height,
            num_inference_steps=steps,
            generator=torch.Generator().manual_seed(seed),
            # Latents before the VAE decodes them: normalised and packed, as `encode` returns them.
            output_type="latent",
        ).images
        return drawn[0], (1, height // self.multiple, width // self.multiple)
