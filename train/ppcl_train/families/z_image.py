"""Z-Image in training: how its transformer is built and called, and its pipeline's embeddings and latents.

Its transformer is given ``1 - t`` and puts out ``x_0 - noise``, a list of samples. Prompts are embedded by diffusers'
`ZImagePipeline` itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ppcl_rt.families.z_image import PPCLZImageTransformer2DModel, padded_length
from ppcl_train.families.base import ImageShape, Predicts
from ppcl_train.families.cached import CachedFamily, PipelineEncoder


class ZImageEncoder(PipelineEncoder):
    """An opened `ZImagePipeline`."""

    @staticmethod
    def default_area(pipe: Any) -> int:
        """See `PipelineEncoder.default_area`."""
        return 1024**2

    @torch.no_grad()
    def embed(self, prompt: str) -> torch.Tensor:
        """See `Encoder.embed`; longer prompts are cut at 512 tokens, as the pipeline does."""
        device = self.pipe.vae.device
        [embeddings], _ = self.pipe.encode_prompt([prompt], device=device, do_classifier_free_guidance=False)
        return embeddings

    def guiding(self, guidance: float, negative: str) -> dict[str, Any]:
        """See `PipelineEncoder.guiding`; the pipeline's ``guidance_scale`` is less by 1."""
        return {"negative_prompt": negative if guidance > 1 else None, "guidance_scale": guidance - 1}


class ZImage(CachedFamily):
    """The family ``z-image``; latents are ``[N, C, rows, columns]``."""

    name, pipeline_name, title = "z-image", "ZImagePipeline", "a Z-Image"
    encoder = ZImageEncoder
    predicts: Predicts = "opposite"

    def build(self, architecture: Mapping[str, Any]) -> Any:
        """See `Family.build`."""
        return PPCLZImageTransformer2DModel(**architecture)

    def initialise(self, model: Any) -> None:
        """See `Family.initialise`; with gates of zero a block with modulations changes nothing."""
        modulated = [block.adaLN_modulation[0] for block in model.blocks() if block.modulation]
        for layer in (*modulated, *(final.linear for final in model.all_final_layer.values())):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def hidden_matrices(self, model: Any) -> list[str]:
        """See `Family.hidden_matrices`."""
        return sorted(
            name
            for name, parameter in model.named_parameters()
            if name.partition(".")[0] in model.block_lists and parameter.ndim == 2 and "adaLN" not in name
        )

    def arguments(
        self, x: torch.Tensor, t: torch.Tensor, embeddings: torch.Tensor, mask: torch.Tensor, shape: ImageShape
    ) -> dict[str, Any]:
        """See `Family.arguments`."""
        return {
            "x": list(x.unsqueeze(2)),
            "t": 1 - t,
            "cap_feats": [text[words] for text, words in zip(embeddings, mask, strict=True)],
            "return_dict": False,
        }

    def counted_tokens(self, mask: torch.Tensor) -> torch.Tensor:
        """See `PadsText.counted_tokens`: words, and after them the padding tokens up to a multiple of 32."""
        lengths = [padded_length(int(count)) for count in mask.sum(1)]
        return torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
