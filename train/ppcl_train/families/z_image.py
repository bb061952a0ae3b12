"""Z-Image in training: how its transformer is built and called, and its pipeline's embeddings and latents.

Its transformer is given ``1 - t`` and puts out ``x_0 - noise``, a list of samples. Prompts are embedded by diffusers'
`ZImagePipeline` itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from PIL import Image
from torch import nn

from ppcl_rt.families.z_image import PPCLZImageTransformer2DModel, padded_length
from ppcl_rt.files import one_line
from ppcl_train.families.base import ImageShape, Picture, Predicts, Samples


class ZImage:
    """The family ``z-image``; latents are ``[N, C, rows, columns]``."""

    predicts: Predicts = "opposite"
    judged = False

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

    def guided(self, wanted: torch.Tensor, free: torch.Tensor, guidance: float) -> torch.Tensor:
        """See `Family.guided`; the pipeline's ``guidance_scale`` is ``guidance - 1``."""
        return free + guidance * (wanted - free)

    def embed(self, prompt: str) -> torch.Tensor:
        """See `Family.embed`; only a pipeline can."""
        raise ValueError("z-image reads embeddings from a cache: make one with `ppcl train cache`")

    def make(self, size: int, seed: tuple[int, int], drop: float) -> Samples:
        """See `Family.make`; there are none without a cache."""
        raise ValueError("z-image reads a cache: make one with `ppcl train cache`, then --set data.cache=FOLDER")

    def open(self, pipeline: str, *, device: str, dtype: torch.dtype, draws: bool) -> ZImageEncoder:
        """See `Family.open`."""
        from diffusers import ZImagePipeline

        # Not loaded unless it draws: 12 GB that caching does not use.
        left_out = {} if draws else {"transformer": None}
        try:
            pipe = ZImagePipeline.from_pretrained(pipeline, torch_dtype=dtype, **left_out)
        except (OSError, ValueError, TypeError, AttributeError) as error:
            raise ValueError(f"{pipeline} cannot be opened as a Z-Image pipeline: {one_line(error)}") from None
        pipe.set_progress_bar_config(disable=True)
        return ZImageEncoder(pipe.to(device))


class ZImageEncoder:
    """An opened `ZImagePipeline`."""

    negative = ""
    # 1024 x 1024, the pipeline's default.
    area = 1024**2

    def __init__(self, pipe: Any) -> None:
        self.pipe = pipe
        # The VAE's scale times the transformer's 2x2 patches.
        self.multiple = 2 * pipe.vae_scale_factor

    @torch.no_grad()
    def embed(self, prompt: str) -> torch.Tensor:
        """See `Encoder.embed`; longer prompts are cut at 512 tokens, as the pipeline does."""
        [embeddings], _ = self.pipe.encode_prompt([prompt], device=self.pipe.device, do_classifier_free_guidance=False)
        return embeddings

    @torch.no_grad()
    def encode(self, picture: Picture) -> tuple[torch.Tensor, ImageShape]:
        """See `Encoder.encode`; takes the mode of the VAE's posterior, so that a picture has one encoding."""
        assert isinstance(picture, Image.Image), "arrays are for families whose latents are pixels"
        vae = self.pipe.vae
        pixels = self.pipe.image_processor.preprocess(picture, height=picture.height, width=picture.width)
        latents = vae.encode(pixels.to(vae.device, vae.dtype)).latent_dist.mode()[0].float()
        latents = (latents - vae.config.shift_factor) * vae.config.scaling_factor
        _, rows, columns = latents.shape
        return latents, (1, rows // 2, columns // 2)

    def draw(
        self, prompt: str, size: tuple[int, int], seed: int, steps: int, guidance: float, negative: str
    ) -> tuple[torch.Tensor, ImageShape]:
        """See `Encoder.draw`; noise is drawn on the CPU, so that it does not depend on the device."""
        width, height = size
        drawn = self.pipe(
            prompt,
            negative_prompt=negative if guidance > 1 else None,
            guidance_scale=guidance - 1,
            width=width,
            height=height,
            num_inference_steps=steps,
            generator=torch.Generator().manual_seed(seed),
            # Latents before the VAE decodes them, as `encode` returns them.
            output_type="latent",
        ).images
        return drawn[0], (1, height // self.multiple, width // self.multiple)
