"""Stable Diffusion 3 and 3.5 in training: how their transformer is called, and their pipeline's embeddings and latents.

Prompts are embedded by diffusers' `StableDiffusion3Pipeline` itself. Its text has one length, and no mask. Latents are
images ``[C, rows, columns]``, and timesteps go to the transformer in 0..1000.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import nn

from ppcl_rt.families.sd3 import PPCLSD3Transformer2DModel
from ppcl_train.families import pooled
from ppcl_train.families.base import ImageShape
from ppcl_train.families.cached import CachedFamily, PipelineEncoder


class SD3Encoder(PipelineEncoder):
    """An opened `StableDiffusion3Pipeline`."""

    def __init__(self, pipe: Any, family: Any) -> None:
        self.patch = pipe.patch_size
        super().__init__(pipe, family)

    @torch.no_grad()
    def embed(self, prompt: str) -> torch.Tensor:
        """See `Encoder.embed`: all tokens of the pipeline, padding too, and rows of pooled text after them."""
        tokens, _, pooled_text, _ = self.pipe.encode_prompt(
            [prompt],
            None,
            None,
            device=self.pipe.vae.device,
            do_classifier_free_guidance=False,
            max_sequence_length=self.family.t5_tokens,
        )
        return pooled.with_pooled(tokens[0], pooled_text[0], self.family.pooled_channels, "SD3")

    def guiding(self, guidance: float, negative: str) -> dict[str, Any]:
        """See `PipelineEncoder.guiding`."""
        return {
            "negative_prompt": negative,
            "guidance_scale": guidance,
            "max_sequence_length": self.family.t5_tokens,
        }


class SD3(CachedFamily):
    """The family ``sd3``.

    Attributes:
        t5_tokens: to which the pipeline pads what T5 makes of a prompt, next to the 77 tokens of CLIP.
        pooled_channels: of the pooled text: those of CLIP ViT-L/14 and of OpenCLIP ViT-bigG/14.
    """

    name, pipeline_name, title = "sd3", "StableDiffusion3Pipeline", "an SD3"
    encoder = SD3Encoder
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

    def without_transformer(self, pipeline: str) -> Any:
        """See `CachedFamily.without_transformer`: one without weights.

        The pipeline reads sizes in its config, also for texts where there is no T5.
        """
        from diffusers import SD3Transformer2DModel

        config = SD3Transformer2DModel.load_config(pipeline, subfolder="transformer")
        with torch.device("meta"):
            return SD3Transformer2DModel.from_config({**config, "num_layers": 0})
