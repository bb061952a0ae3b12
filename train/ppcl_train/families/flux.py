"""FLUX.1 in training: how its transformer is built and called, and its pipeline's embeddings and latents.

Prompts are embedded and latents packed by diffusers' `FluxPipeline` itself. Its text has one length, and no mask.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import nn

from ppcl_rt.families.flux import PPCLFluxTransformer2DModel, positions
from ppcl_train.families import pooled
from ppcl_train.families.base import ImageShape
from ppcl_train.families.cached import CachedFamily, PipelineEncoder


class FluxEncoder(PipelineEncoder):
    """An opened `FluxPipeline`."""

    packed = True

    @torch.no_grad()
    def embed(self, prompt: str) -> torch.Tensor:
        """See `Encoder.embed`: all tokens of the pipeline, padding too, and rows of pooled text after them."""
        tokens, pooled_text, _ = self.pipe.encode_prompt(
            [prompt], device=self.pipe.vae.device, max_sequence_length=self.family.text_tokens
        )
        return pooled.with_pooled(tokens[0], pooled_text[0], self.family.pooled_channels, "FLUX.1")

    def guiding(self, guidance: float, negative: str) -> dict[str, Any]:
        """See `PipelineEncoder.guiding`."""
        return {
            "negative_prompt": negative if guidance > 1 else None,
            "true_cfg_scale": guidance,
            # A model without an embedding of it does not look at it.
            "guidance_scale": self.family.strength or 0.0,
            "max_sequence_length": self.family.text_tokens,
        }


class Flux(CachedFamily):
    """The family ``flux``: FLUX.1-dev, which was distilled for guidance and takes its strength as an input.

    Attributes:
        strength: of the guidance that the model is called with, here and by its pipeline; None for one that takes none.
            The guidance by a negative prompt (`guided`) is another, the pipeline's ``true_cfg_scale``.
        text_tokens: to which the pipeline pads prompts, and at which it cuts longer ones.
        pooled_channels: of the pooled text: those of CLIP ViT-L/14.
    """

    name, pipeline_name, title = "flux", "FluxPipeline", "a FLUX"
    encoder = FluxEncoder
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


class FluxSchnell(Flux):
    """The family ``flux-schnell``: FLUX.1-schnell, which takes no guidance and a shorter text."""

    name = "flux-schnell"
    strength = None
    text_tokens = 256
