"""The autoencoder of emoji, trained from nothing, and the pipeline folder around it.

The folder lacks a transformer, which a training run makes: its latents and embeddings come from this folder.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from ppcl_rt.files import replacing_folder
from ppcl_rt.pipelines.words import WordTable, words_of
from ppcl_train.config.settings import RunConfig
from ppcl_train.config.stages import LoopConfig
from ppcl_train.emoji import notice
from ppcl_train.emoji.artwork import Artwork, artwork
from ppcl_train.engine.log import Log
from ppcl_train.engine.loop import train_loop
from ppcl_train.families.emoji_autoencoder import decoded, encoded, new, save_pipeline, whole

# Weights of the parts of the loss, next to L1. Without the squares, and above all those of the means over 4 x 4 pixels,
# lines come out and colours do not: 6,000 steps on L1 and edges alone left one picture in eight nearest to another.
_EDGES, _SQUARES, _MEANS = 0.5, 2.0, 10.0
# Of the divergence of a latent number from a standard normal one: enough that none grows without bound.
_KL = 1e-3
_BATCH = 16
_STEPS_PER_LINE = 100


class Quality(NamedTuple):
    """How near decoded pictures are to the encoded ones: PSNR in dB over all pixels, of pictures in [0, 1]."""

    trained: float
    held_out: float


def train(run: RunConfig, folder: Path, steps: int) -> Any:
    """Train on the pictures that are not held out, or go on; returns the autoencoder with its latents' statistics.

    The loss is L1 of pixels, and of their differences to the right and below; squares of pixels and of their means over
    4 x 4; and a little KL.
    """
    art, log = artwork(), Log(folder, "autoencoder")
    pixels = _pixels(art.pictures[~art.held_out])
    torch.manual_seed(run.seed)
    vae = new()

    @torch.compile
    def forward(x: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        mean, log_variance = encoded(vae, x).chunk(2, 1)
        log_variance = log_variance.clamp(-20, 10)
        off = decoded(vae, mean + noise * (log_variance / 2).exp()) - x
        edges = (off[..., 1:] - off[..., :-1]).abs().mean() + (off[..., 1:, :] - off[..., :-1, :]).abs().mean()
        squares, means = off.square().mean(), F.avg_pool2d(off, 4).square().mean()
        kl = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()
        return off.abs().mean() + _EDGES * edges + _SQUARES * squares + _MEANS * means + _KL * kl

    def step_loss(number: int) -> float:
        rng = np.random.default_rng((run.seed, number))
        x = pixels[torch.from_numpy(rng.choice(len(pixels), _BATCH, replace=False))]
        noise = torch.from_numpy(rng.standard_normal((_BATCH, vae.config.z_dim, 8, 8), dtype=np.float32))
        loss = forward(x, noise)
        loss.backward()
        return loss.item()

    config = LoopConfig(steps=steps, lr=2e-3, warmup=100, ema=0.995, clip=1.0)
    parameters = dict(vae.named_parameters())
    trained = train_loop(run, config, log, parameters, step_loss, log_every=_STEPS_PER_LINE)
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(trained[name])
    means = _means(vae, pixels)
    vae.register_to_config(latents_mean=means.mean((0, 2, 3)).tolist(), latents_std=means.std((0, 2, 3)).tolist())
    log(**quality(vae, art)._asdict())
    return whole(vae).requires_grad_(False).eval()


@torch.no_grad()
def quality(vae: Any, art: Artwork) -> Quality:
    """Measure an autoencoder on the artwork; flat or whole."""
    made = reconstructed(vae, art.pictures)
    parts = (~art.held_out, art.held_out)
    return Quality(*(_psnr(art.pictures[part], made[part]) for part in parts))


def reconstructed(vae: Any, pictures: np.ndarray) -> np.ndarray:
    """Encode and decode ``pictures [N, 64, 64, 3]`` uint8."""
    with torch.no_grad():
        latents = _means(vae, _pixels(pictures)).split(64)
        pixels = torch.cat([decoded(vae, part).clamp(-1, 1) for part in latents])
    return ((pixels.permute(0, 2, 3, 1) + 1) * 127.5).round().to(torch.uint8).numpy()


def _pixels(pictures: np.ndarray) -> torch.Tensor:
    """``[N, 64, 64, 3]`` uint8 -> ``[N, 3, 64, 64]`` float32 in [-1, 1]."""
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1


@torch.no_grad()
def _means(vae: Any, pixels: torch.Tensor) -> torch.Tensor:
    """Means of the latents ``[N, 16, 8, 8]`` of pixels."""
    return torch.cat([encoded(vae, part).chunk(2, 1)[0] for part in pixels.split(64)])


def _psnr(one: np.ndarray, other: np.ndarray) -> float:
    error = np.square((one.astype(np.float32) - other) / 255).mean(dtype=np.float64)
    return -10 * math.log10(error)


def write(run: RunConfig, vae: Any, folder: Path) -> None:
    """Write a pipeline folder: autoencoder, scheduler, words, licence; its transformer goes into ``transformer/``."""
    words = sorted({word for caption in artwork().captions for word in words_of(caption.text)})
    table = WordTable.random(words, run.teacher.architecture["joint_attention_dim"], run.seed)
    with replacing_folder(folder, lambda name: name != "transformer") as partial:
        save_pipeline(vae, run.sampler.shift, partial)
        table.write(partial)
        (partial / notice.FILE).write_text(notice.TEXT)
