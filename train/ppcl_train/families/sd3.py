"""Stable Diffusion 3 and 3.5 in training: how their transformer is called, and their pipeline's embeddings and latents.

Prompts are embedded by diffusers' `StableDiffusion3Pipeline` itself. Its text has one length, and no mask. Latents are
images ``[C, rows, columns]``, and timesteps go to the transformer in 0..1000.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from PIL import Image
from torch import nn

from ppcl_rt.families.sd3 import PPCLSD3Transformer2DModel
from ppcl_rt.files import one_line
from ppcl_train.families import pooled
from ppcl_train.families.base import ImageShape, Picture, Samples


class SD3:
    """The family ``sd3``.

    Attributes:
        t5_tokens: to which the pipeline pads what T5 makes of a prompt, next to the 77 tokens of CLIP.
        pooled_channels: of the pooled text: those of CLIP ViT-L/14 and of OpenCLIP ViT-bigG/14.
    """

    predicts: Literal["clean", "velocity"] = "velocity"
    judged = False
    t5_tokens: ClassVar[int] = 256
    pooled_channels: ClassVar[int] = 768 + 1280

    def build(self, architecture: Mapping[str, Any]) -> Any:
        """See `Family.build`."""
        return PPCLSD3Transformer2DModel(**architecture)

    def initialise(self, model: Any) -> None:
        """See `Family.initialise`."""
        norms = [norm for block in model.transformer_blocks for norm in (block.norm1, block.norm1_context)]
        for layer in (*(norm.linear for norm in norms), model.norm_out.linear, model.proj_out):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def hidden_matrices(self, model: Any) -> list[str]:
        """See `Family.hidden_matrices`."""
        return sorted(
            name
            for name, parameter in model.named_parameters()
            if name.startswith("transformer_blocks.") and parameter.ndim == 2 and ".norm1" not in name
        )

    def arguments(
        self, x: torch.Tensor, t: torch.Tensor, embeddings: torch.Tensor, mask: torch.Tensor, shape: ImageShape
    ) -> dict[str, Any]:
        """See `Family.arguments`; the mask is of no use: all texts are equally long, and padding counts."""
        tokens, pooled_text = pooled.apart(embeddings, self.pooled_channels)
        return {
            "hidden_states": x,
            "encoder_hidden_states": tokens,
            "pooled_projections": pooled_text,
            "timestep": 1000 * t,
            "return_dict": False,
        }

    def guided(self, wanted: torch.Tensor, free: torch.Tensor, guidance: float) -> torch.Tensor:
        """See `Family.guided`."""
        return free + guidance * (wanted - free)

    def embed(self, prompt: str) -> torch.Tensor:
        """See `Family.embed`; only a pipeline can."""
        raise ValueError("sd3 reads embeddings from a cache: make one with `ppcl train cache`")

    def make(self, size: int, seed: tuple[int, int], drop: float) -> Samples:
        """See `Family.make`; there are none without a cache."""
        raise ValueError("sd3 reads a cache: make one with `ppcl train cache`, then --set data.cache=FOLDER")

    def open(self, pipeline: str, *, device: str, dtype: torch.dtype, draws: bool) -> SD3Encoder:
        """See `Family.open`."""
        from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline

        try:
            left_out: dict[str, Any] = {}
            if not draws:
                # 5 to 16 GB that caching does not use. The pipeline reads sizes in the config, also for texts of a
                # pipeline without T5, so it gets a transformer without weights.
                config = SD3Transformer2DModel.load_config(pipeline, subfolder="transformer")
                with torch.device("meta"):
                    left_out["transformer"] = SD3Transformer2DModel.from_config({**config, "num_layers": 0})
            pipe = StableDiffusion3Pipeline.from_pretrained(pipeline, torch_dtype=dtype, **left_out)
        except (OSError, ValueError, TypeError, AttributeError) as error:
            raise ValueError(f"{pipeline} cannot be opened as an SD3 pipeline: {one_line(error)}") from None
        pipe.set_progress_bar_config(disable=True)
        for part in (pipe.vae, pipe.text_encoder, pipe.text_encoder_2, pipe.text_encoder_3):
            if part is not None:
                part.to(device)
        if draws:
            pipe.to(device)
        return SD3Encoder(pipe, self)


class SD3Encoder:
    """An opened `StableDiffusion3Pipeline`."""

    negative = ""

    def __init__(self, pipe: Any, family: SD3) -> None:
        self.pipe, self.family = pipe, family
        # The VAE's scale times the transformer's patches.
        self.multiple = pipe.patch_size * pipe.vae_scale_factor
        self.area = (pipe.default_sample_size * pipe.vae_scale_factor) ** 2

    @torch.no_grad()
    def embed(self, prompt: str) -> torch.Tensor:
        """See `Encoder.embed`: all tokens of the pipeline, padding too, and rows of pooled text after them."""
        # On the VAE's device: a transformer without weights has none.
        tokens, _, pooled_text, _ = self.pipe.encode_prompt(
            [prompt],
            None,
            None,
            device=self.pipe.vae.device,
            do_classifier_free_guidance=False,
            max_sequence_length=self.family.t5_tokens,
        )
        channels, wanted = pooled_text.shape[1], self.family.pooled_channels
        if channels != wanted:
            raise ValueError(f"the pooled text of this pipeline has {channels} channels, SD3 has {wanted}")
        return pooled.with_pooled(tokens[0], pooled_text[0])

    @torch.no_grad()
    def encode(self, picture: Picture) -> tuple[torch.Tensor, ImageShape]:
        """See `Encoder.encode`; takes the mode of the VAE's posterior, so that a picture has one encoding."""
        assert isinstance(picture, Image.Image), "arrays are for families whose latents are pixels"
        vae, patch = self.pipe.vae, self.pipe.patch_size
        pixels = self.pipe.image_processor.preprocess(picture, height=picture.height, width=picture.width)
        latents = vae.encode(pixels.to(vae.device, vae.dtype)).latent_dist.mode().float()[0]
        latents = (latents - vae.config.shift_factor) * vae.config.scaling_factor
        return latents, (1, latents.shape[1] // patch, latents.shape[2] // patch)

    def draw(
        self, prompt: str, size: tuple[int, int], seed: int, steps: int, guidance: float, negative: str
    ) -> tuple[torch.Tensor, ImageShape]:
        """See `Encoder.draw`; noise is drawn on the CPU, so that it does not depend on the device."""
        width, height = size
        drawn = self.pipe(
            prompt,
            negative_prompt=negative,
            guidance_scale=guidance,
            max_sequence_length=self.family.t5_tokens,
            width=width,
            height=height,
            num_inference_steps=steps,
            generator=torch.Generator().manual_seed(seed),
            # Latents before the VAE decodes them: normalised, as `encode` returns them.
            output_type="latent",
        ).images
        return drawn[0], (1, height // self.multiple, width // self.multiple)
