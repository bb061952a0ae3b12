"""The autoencoder of emoji: an `AutoencoderKLQwenImage` in a small size, trained in two dimensions.

With one frame, only the last temporal tap of a causal convolution sees data; the others see the padding. So training
runs 2-D convolutions in the place of 3-D ones, a third of the work, and their weights become last taps afterwards.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLQwenImage, QwenImagePipeline, UniPCMultistepScheduler
from diffusers.models.autoencoders.autoencoder_kl_qwenimage import QwenImageCausalConv3d
from torch import nn

# 8x down, 16 channels, as Qwen-Image's own; 64 x 64 pixels become 16 tokens of 64 numbers.
ARCHITECTURE: dict[str, Any] = {
    "base_dim": 16,
    "z_dim": 16,
    "dim_mult": [1, 2, 4, 4],
    "num_res_blocks": 1,
    "temperal_downsample": [False, False, False],
}


class LastTap(nn.Module):
    """A causal 3-D convolution on one frame: the 2-D convolution of its last temporal tap.

    Args:
        whole: the 3-D convolution; its kernel is ``[out, in, frames, rows, columns]``.
    """

    def __init__(self, whole: nn.Conv3d, padding: tuple[int, int]) -> None:
        super().__init__()
        self.weight = nn.Parameter(whole.weight.detach()[:, :, -1].clone())
        self.bias = whole.bias
        self.padding, self.frames = padding, whole.kernel_size[0]

    def forward(self, x: torch.Tensor, cache_x: torch.Tensor | None = None) -> torch.Tensor:
        """Convolve ``x [N, C, 1, rows, columns]``; there are no frames before it, so nothing is in the cache."""
        return F.conv2d(x[:, :, 0], self.weight, self.bias, padding=self.padding)[:, :, None]


def new() -> AutoencoderKLQwenImage:
    """An autoencoder with random weights, `flattened`."""
    return flattened(AutoencoderKLQwenImage(**ARCHITECTURE))


def flattened(vae: AutoencoderKLQwenImage) -> AutoencoderKLQwenImage:
    """Put a `LastTap` in the place of every causal convolution; changes and returns ``vae``."""
    for name, module in list(vae.named_modules()):
        if isinstance(module, QwenImageCausalConv3d):
            # The padding that its forward adds: left, right, top, bottom, and frames.
            side, _, top, *_ = module._padding
            vae.set_submodule(name, LastTap(module, (top, side)))
    return vae


def whole(flat: AutoencoderKLQwenImage) -> AutoencoderKLQwenImage:
    """Return the autoencoder whose `flattened` form this is: weights are last taps, all other taps zero."""
    vae = AutoencoderKLQwenImage.from_config(flat.config)
    # `from_config` passes over what was registered after the defaults.
    vae.register_to_config(latents_mean=flat.config.latents_mean, latents_std=flat.config.latents_std)
    taps = {name: module.frames for name, module in flat.named_modules() if isinstance(module, LastTap)}
    state = flat.state_dict()
    for name, frames in taps.items():
        weight = state[f"{name}.weight"]
        state[f"{name}.weight"] = torch.stack([torch.zeros_like(weight)] * (frames - 1) + [weight], 2)
    vae.load_state_dict(state)
    return vae


def encoded(vae: AutoencoderKLQwenImage, pixels: torch.Tensor) -> torch.Tensor:
    """Means and log variances ``[N, 32, 8, 8]`` of ``pixels [N, 3, 64, 64]`` in [-1, 1]; flat or whole."""
    return vae.quant_conv(vae.encoder(pixels[:, :, None]))[:, :, 0]


def decoded(vae: AutoencoderKLQwenImage, latents: torch.Tensor) -> torch.Tensor:
    """Pixels ``[N, 3, 64, 64]`` of ``latents [N, 16, 8, 8]``, not clipped; flat or whole."""
    return vae.decoder(vae.post_quant_conv(latents[:, :, None]))[:, :, 0]


def save_pipeline(vae: AutoencoderKLQwenImage, shift: float, folder: Path) -> None:
    """Write a pipeline folder of a whole autoencoder, in float16, and a scheduler; text comes as embeddings.

    The scheduler takes Euler steps with a transformer that predicts ``x_0``. The transformer is named in the index and
    has yet to be put into ``transformer/``.

    Args:
        shift: of the grid of timesteps towards noise.
    """
    scheduler = UniPCMultistepScheduler(
        prediction_type="sample",
        use_flow_sigmas=True,
        flow_shift=shift,
        # Euler's method is its first order, uncorrected.
        solver_order=1,
        disable_corrector=list(range(1000)),
    )
    QwenImagePipeline(scheduler, vae.half(), None, None, None).save_pretrained(folder)
    path = folder / "model_index.json"
    index = {**json.loads(path.read_text()), "transformer": ["diffusers", "QwenImageTransformer2DModel"]}
    path.write_text(json.dumps(index, indent=2) + "\n")
