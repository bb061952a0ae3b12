"""Flow matching on scenes: ``x_t = (1 - t) x_0 + t noise``, t = 1 is noise; the network predicts ``x_0``.

The velocity is ``v = noise - x_0 = (x_t - x_0) / t``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from pydantic import Field, PositiveFloat, PositiveInt
from torch import nn

from ppcl_rt.planning.frozen import Frozen
from ppcl_train.scenes.encoding import encode, to_images
from ppcl_train.scenes.judging import judge
from ppcl_train.scenes.language import CELL, CELLS, GRID, Caption

IMAGE_SHAPE = (1, GRID, GRID)


def arguments(x: torch.Tensor, t: torch.Tensor, embeddings: torch.Tensor, mask: torch.Tensor) -> dict[str, Any]:
    """Return what the transformer is called with, for ``x [N, 16, 48]`` at ``t [N]`` in [0, 1]."""
    return {
        "hidden_states": x,
        "encoder_hidden_states": embeddings,
        "encoder_hidden_states_mask": mask,
        "timestep": t,
        "img_shapes": [IMAGE_SHAPE] * len(x),
        "return_dict": False,
    }


def guided_prediction(wanted: torch.Tensor, free: torch.Tensor, guidance: float) -> torch.Tensor:
    """Compute ``u + g (c - u)`` of predictions ``c`` under the prompt and ``u`` under the negative prompt."""
    return free + guidance * (wanted - free)


class Sampler(Frozen):
    """Euler steps on a shifted grid of t, with classifier-free guidance if ``guidance`` is not 1.

    Attributes:
        steps: denoising steps.
        shift: of the grid towards noise.
        terminal: the last timestep before 0, to which the grid is stretched; 0 for no stretching.
        guidance: g of the guided prediction ``u + g (c - u)``.
        negative: the prompt of ``u``.
    """

    steps: PositiveInt = 16
    shift: PositiveFloat = 1.5
    terminal: float = Field(0.0, ge=0, lt=1)
    guidance: float = Field(1.0, ge=0)
    negative: str = ""

    def times(self) -> list[float]:
        """The grid, from 1 to 0, both included."""
        line = np.linspace(1, 0, self.steps + 1)
        times = self.shift * line / (1 + (self.shift - 1) * line)
        if self.terminal and self.steps > 1:
            times[:-1] = 1 - (1 - times[:-1]) * (1 - self.terminal) / (1 - times[-2])
        return [float(t) for t in times]

    @torch.no_grad()
    def sample(
        self,
        model: nn.Module,
        prompts: Sequence[str],
        noise: torch.Tensor,
        on_step: Callable[[int, int], None] = lambda done, of: None,
    ) -> torch.Tensor:
        """Denoise ``noise [N, 16, 48]`` under N prompts; returns ``x_0``, same shape, clipped to [-1, 1]."""
        guided = self.guidance != 1.0
        embeddings, mask = encode([*prompts, *([self.negative] * len(prompts) if guided else [])])
        embeddings, mask = embeddings.to(noise), mask.to(noise.device)
        x, times = noise, self.times()
        for step, (now, then) in enumerate(pairwise(times), 1):
            t = torch.full((len(mask),), now, device=x.device)
            clean = model(**arguments(torch.cat([x, x]) if guided else x, t, embeddings, mask))[0]
            if guided:
                wanted, free = clean.chunk(2)
                clean = guided_prediction(wanted, free, self.guidance)
            x = x + (then - now) * (x - clean) / now
            on_step(step, self.steps)
        return x.clip(-1, 1)


def noise_for(count: int, seed: int) -> torch.Tensor:
    """Noise of samples 0..count-1 for a seed; sample ``i`` gets the same noise for every ``count``."""
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([torch.randn(CELLS, CELL**2 * 3, generator=generator) for _ in range(count)])


def judged(model: nn.Module, sampler: Sampler, captions: Sequence[Caption], seed: int, batch: int = 250) -> np.ndarray:
    """Sample every caption once and return the share of it that came out right, ``[N]``."""
    like = next(model.parameters())
    noise = noise_for(len(captions), seed).to(like)
    shares = []
    for start in range(0, len(captions), batch):
        part = captions[start : start + batch]
        clean = sampler.sample(model, [str(caption) for caption in part], noise[start : start + batch])
        shares.append(judge(part, to_images(clean)))
    return np.concatenate(shares)
