"""Qwen-Image in training: how its transformer is built and called, and its pipeline's embeddings and latents.

Prompts are embedded and latents packed by diffusers' `QwenImagePipeline` itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ppcl_rt.families.qwen_image import PPCLQwenImageTransformer2DModel
from ppcl_train.families.base import ImageShape
from ppcl_train.families.cached import CachedFamily, PipelineEncoder


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


class QwenImageEncoder(PipelineEncoder):
    """An opened `QwenImagePipeline`."""

    # The pipeline takes none for no guidance, so its users pass a space.
    negative = " "
    packed = True

    @torch.no_grad()
    def embed(self, prompt: str) -> torch.Tensor:
        """See `Encoder.embed`; longer prompts are cut at 1,024 tokens, as the pipeline does."""
        # One prompt at a time: the side and length of padding would change the last bits.
        embeddings, _ = self.pipe.encode_prompt([prompt], device=self.pipe.vae.device)
        return embeddings[0]

    def normalised(self, pixels: torch.Tensor) -> torch.Tensor:
        """See `PipelineEncoder.normalised`; the VAE takes videos: ``[B, C, frames, H, W]``."""
        config, latents = self.pipe.vae.config, self.mode(pixels[:, :, None])[:, :, 0]
        mean, std = (
            torch.tensor(values, device=latents.device).view(1, -1, 1, 1)
            for values in (config.latents_mean, config.latents_std)
        )
        return (latents - mean) / std

    def guiding(self, guidance: float, negative: str) -> dict[str, Any]:
        """See `PipelineEncoder.guiding`."""
        return {"negative_prompt": negative if guidance > 1 else None, "true_cfg_scale": guidance}


class QwenImage(QwenImageTransformer, CachedFamily):
    """The family ``qwen-image``."""

    name, pipeline_name, title = "qwen-image", "QwenImagePipeline", "a Qwen-Image"
    encoder = QwenImageEncoder

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
