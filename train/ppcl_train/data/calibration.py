"""Calibration inputs: noisy samples, and what the transformer is called with."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch.utils._pytree import tree_map_only

from ppcl_train.config.settings import RunConfig
from ppcl_train.data.source import source
from ppcl_train.engine.distributed import join

# The seeds of each stage's batches start here, so that no stage sees a batch of another stage or of the teacher's
# training.
PROBES, STUDENTS, RECOVER, WIDTH, MEASURE = (10_000_000 * stage for stage in range(1, 6))


@dataclass(frozen=True)
class Inputs:
    """A batch of a task.

    Attributes:
        x: noisy latents ``[N, S, C]``.
        t: their timesteps ``[N]`` in [0, 1]; 1 is noise.
        call: all arguments that the transformer is called with.
        predicts: what its output is: ``x_0``, or the velocity ``noise - x_0 = (x - x_0) / t``.
    """

    x: torch.Tensor
    t: torch.Tensor
    call: dict[str, Any] = field(repr=False)
    predicts: Literal["clean", "velocity"] = "velocity"

    @property
    def mask(self) -> torch.Tensor:
        """``[N, S_text]``, true on the text tokens that count: on all of them if the transformer takes no mask."""
        mask: torch.Tensor | None = self.call.get("encoder_hidden_states_mask")
        if mask is None:
            text = self.call["encoder_hidden_states"]
            mask = torch.ones(text.shape[:2], dtype=torch.bool, device=text.device)
        return mask

    @property
    def weight(self) -> torch.Tensor:
        """The weight of each sample's squared error in the output, ``[N]``: that of the error in `clean`."""
        return torch.ones_like(self.t) if self.predicts == "clean" else self.t.square()

    def clean(self, output: torch.Tensor) -> torch.Tensor:
        """Return the ``x_0`` that an output points at, ``[N, S, C]``.

        The difference of two of these is ``t`` times the difference of the velocities: high noise weighs most, as it
        does for the picture.
        """
        return output if self.predicts == "clean" else self.x - self.t[:, None, None] * output

    def banded(self, difference: torch.Tensor, edges: Sequence[float]) -> torch.Tensor:
        """Sum of squares of ``difference [N, S, C]`` in each band of the timestep between ``edges``, ``[bands]``."""
        squares = difference.double().square().flatten(1).sum(1).cpu()
        bands = torch.bucketize(self.t.double().cpu(), torch.tensor(edges[1:-1], dtype=torch.float64))
        return torch.zeros(len(edges) - 1, dtype=torch.float64).index_add(0, bands, squares)

    def part(self, samples: slice) -> Inputs:
        """Return some of the samples."""
        size = len(self.x)
        call = {
            name: value[samples] if isinstance(value, (torch.Tensor, list)) and len(value) == size else value
            for name, value in self.call.items()
        }
        return replace(self, x=self.x[samples], t=self.t[samples], call=call)

    def to(self, device: torch.device) -> Inputs:
        """Return the same batch on a device."""
        call = tree_map_only(torch.Tensor, lambda tensor: tensor.to(device), self.call)
        return replace(self, x=self.x.to(device), t=self.t.to(device), call=call)


def inputs(run: RunConfig, size: int, seed: int) -> Inputs:
    """Make a calibration batch on this process's device; (run.seed, seed) alone decides it.

    ``x_t = (1 - t) x_0 + t noise`` at logit-normal timesteps; the transformer is called in the teacher's dtype.
    """
    samples = source(run).samples(size, seed)
    generator = torch.Generator().manual_seed(run.seed * 1_000_003 + seed)
    t = torch.sigmoid(run.time_mean + run.time_std * torch.randn(size, generator=generator))
    x = torch.lerp(samples.latents, torch.randn(samples.latents.shape, generator=generator), t[:, None, None])
    family, dtype = run.family, getattr(torch, run.teacher.dtype)
    call = family.arguments(x.to(dtype), t, samples.embeddings.to(dtype), samples.mask, samples.shape)
    return Inputs(x, t, call, family.predicts).to(join().device)


def batches(run: RunConfig, samples: int, seed: int) -> Iterator[Inputs]:
    """Yield calibration batches of at most ``run.batch``, with ``samples`` samples in all."""
    for number, start in enumerate(range(0, samples, run.batch)):
        yield inputs(run, min(run.batch, samples - start), seed + number)
