"""Qwen-Image in training: how its transformer is built and called, and its pipeline's embeddings and latents.

Prompts are embedded and latents packed by diffusers' `QwenImagePipeline` itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from PIL import Image
from torch import nn

from ppcl_rt.families.qwen_image import PPCLQwenImageTransformer2DModel
from ppcl_rt.files import one_line
from ppcl_train.families.base import ImageShape, Picture, Samples


class QwenImageTransformer:
    """The part of a `Family` that follows from the transformer alone."""

    def build(self, architecture: Mapping[str, Any]) -> Any:
        """See `Family.build`."""
        return PPCLQwenImageTransformer2DModel(**architecture)

    def initialise(self, model: Any) -> None:
        """See `Family.initialise`."""
        zeroed = [modulation[1] for block in model.transformer_blocks for modulation in (block.img_mod, block.txt_mod)]
        for layer in (*zeroed, model.norm_out.linear, model.proj_out):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def hidden_matrices(self, model: Any) -> list[str]:
        """See `Family.hidden_matrices`."""
        return sorted(
            name
            for name, parameter in model.named_parameters()
            if name.startswith("transformer_blocks.") and parameter.ndim == 2 and "_mod." not in name
        )


class QwenImage(QwenImageTransformer):
    """The family ``qwen-image``."""

    predicts: Literal["clean", "velocity"] = "velocity"
    judged = False

    def arguments(
        self, x: torch.Tensor, t: torch.Tensor, embeddings: torch.Tensor, mask: torch.Tensor, shape: ImageShape
    ) -> dict[str, Any]:
        """See `Family.arguments`."""
        return {
            "hidden_states": x,
            "encoder_hidden_states": embeddings,
            "encoder_hidden_states_mask": mask,
            "timestep": t,
            "img_shapes": [[shape]] * len(x),
            "return_dict": False,
        }

    def guided(self, wanted: torch.Tensor, free: torch.Tensor, guidance: float) -> torch.Tensor:
        """See `Family.guided`; the pipeline then gives every token the norm that it has under the prompt."""
        guided = free + guidance * (wanted - free)
        # A token that is all zeros has no direction to keep.
        norm = guided.norm(dim=-1, keepdim=True).clamp_min(torch.finfo(guided.dtype).tiny)
        return guided * (wanted.norm(dim=-1, keepdim=True) / norm)

    def embed(self, prompt: str) -> torch.Tensor:
        """See `Family.embed`; only a pipeline can."""
        raise ValueError("qwen-image reads embeddings from a cache: make one with `ppcl train cache`")

    def make(self, size: int, seed: tuple[int, int], drop: float) -> Samples:
        """See `Family.make`; there are none without a cache."""
        raise ValueError("qwen-image reads a cache: make one with `ppcl train cache`, then --set data.cache=FOLDER")

    def open(self, pipeline: str, *, device: str, dtype: torch.dtype, draws: bool) -> QwenImageEncoder:
        """See `Family.open`."""
        from diffusers import QwenImagePipeline

        # Not loaded unless it draws: 40 GB that caching does not use.
        left_out = {} if draws else {"transformer": None}
        try:
            pipe = QwenImagePipeline.from_pretrained(pipeline, torch_dtype=dtype, **left_out)
        except (OSError, ValueError, TypeError, AttributeError) as error:
            raise ValueError(f"{pipeline} cannot be opened as a Qwen-Image pipeline: {one_line(error)}") from None
        pipe.set_progress_bar_config(disable=True)
        return QwenImageEncoder(pipe.to(device))


class QwenImageEncoder:
    """An opened `QwenImagePipeline`."""

    # The pipeline takes none for no guidance, so its users pass a space.
    negative = " "

    def __init__(self, pipe: Any) -> None:
        self.pipe = pipe
        # The VAE's scale times the transformer's 2x2 patches.
        self.multiple = 2 * pipe.vae_scale_factor
        self.area = (pipe.default_sample_size * pipe.vae_scale_factor) ** 2

    @torch.no_grad()
    def embed(self, prompt: str) -> torch.Tensor:
        """See `Encoder.embed`; longer prompts are cut at 1,024 tokens, as the pipeline does."""
        # One prompt at a time: the side and length of padding would change the last bits.
        embeddings, _ = self.pipe.encode_prompt([prompt], device=self.pipe.device)
        return embeddings[0]

    @torch.no_grad()
    def encode(self, picture: Picture) -> tuple[torch.Tensor, ImageShape]:
        """See `Encoder.encode`; takes the mode of the VAE's posterior, so that a picture has one encoding."""
        assert isinstance(picture, Image.Image), "arrays are for families whose latents are pixels"
        vae = self.pipe.vae
        pixels = self.pipe.image_processor.preprocess(picture, height=picture.height, width=picture.width)
        # The VAE takes videos: [B, C, frames, H, W].
        latents = vae.encode(pixels[:, :, None].to(vae.device, vae.dtype)).latent_dist.mode().float()
        mean, std = (
            torch.tensor(values, device=latents.device).view(1, -1, 1, 1, 1)
            for values in (vae.config.latents_mean, vae.config.latents_std)
        )
        latents = (latents - mean) / std
        _, channels, _, rows, columns = latents.shape
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
            width=width,
            height=height,
            num_inference_steps=steps,
            generator=torch.Generator().manual_seed(seed),
            # Latents before the VAE decodes them: normalised and packed, as `encode` returns them.
            output_type="latent",
        ).images
        return drawn[0], (1, height // self.multiple, width // self.multiple)
