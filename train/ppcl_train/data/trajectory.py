"""The states that a sampler goes through: what a teacher of few denoising steps is called with.

A teacher that was distilled to 4 or 8 denoising steps never meets noise mixed with data. It meets the noise, and then
what its own steps made of it. Euler steps of its sampler lead there:

    x_then = x_now + (t_then - t_now) v,    v = (x_now - x_0) / t_now

with ``x_0`` the clean image that the teacher's guided prediction points at. Samplers that add noise between their steps
have other states, and are not covered.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch

# Called with states [n, ...], their timesteps [n] and the numbers [n] of their samples: the clean images, of the shape
# of the states.
Clean = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def reached(clean: Clean, times: Sequence[float], noise: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """Walk from the noise down to each sample's timestep.

    A sample at the timestep ``times[k]`` takes k steps. One whose timestep lies between two of the grid takes the first
    part of the step that crosses it.

    Args:
        clean: the teacher; it is asked once a step, about the samples that are not there yet.
        times: the sampler's grid, from 1 down to 0, both included.
        noise: ``[N, ...]``, the states at the timestep 1.
        t: timesteps to walk to, ``[N]`` in [0, 1].

    Returns:
        The states at ``t``, of the shape of ``noise``.
    """
    x = noise.clone()
    for now, then in pairwise(torch.tensor(times, dtype=t.dtype)):
        walking = (t < now).nonzero().flatten()
        if not len(walking):
            break
        length = (torch.maximum(t[walking], then) - now) / now
        before = x[walking]
        step = before - clean(before, now.expand(len(walking)), walking)
        x[walking] = before + length.view(-1, *[1] * (x.ndim - 1)) * step
    return x
