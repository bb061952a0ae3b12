"""What passes through a teacher: calibration inputs, the streams between blocks, and running a block by hand."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import nn

from ppcl_rt import Streams
from ppcl_train import family
from ppcl_train.config import RunConfig
from ppcl_train.data import source

# Seeds of calibration batches start here, so that no stage sees a batch of another or of the teacher's training.
PROBES, STUDENTS, RECOVER, WIDTH, MEASURE = (10_000_000 * stage for stage in range(1, 6))


@dataclass(frozen=True)
class Inputs:
    """A batch of a task.

    Attributes:
        x: noisy latents ``[N, S, C]``.
        t: their timesteps ``[N]`` in [0, 1]; 1 is noise.
        call: all that the transformer is called with.
        predicts: what its output is: ``x_0``, or the velocity ``noise - x_0 = (x - x_0) / t``.
    """

    x: torch.Tensor
    t: torch.Tensor
    call: dict[str, Any] = field(repr=False)
    predicts: Literal["clean", "velocity"] = "velocity"

    @property
    def mask(self) -> torch.Tensor:
        """``[N, S_text]``, true on words."""
        mask: torch.Tensor = self.call["encoder_hidden_states_mask"]
        return mask

    @property
    def weight(self) -> torch.Tensor:
        """What a sample's squared error in the output counts, ``[N]``: that of the `clean` it makes."""
        return torch.ones_like(self.t) if self.predicts == "clean" else self.t.square()

    def clean(self, output: torch.Tensor) -> torch.Tensor:
        """The ``x_0`` that an output points at, ``[N, S, C]``.

        A difference of two of these is ``t`` times the difference of velocities: high noise weighs most, as it does
        for the picture.
        """
        return output if self.predicts == "clean" else self.x - self.t[:, None, None] * output


def inputs(run: RunConfig, size: int, seed: int) -> Inputs:
    """Make a calibration batch; (run.seed, seed) alone decides it.

    ``x_t = (1 - t) x_0 + t noise`` at logit-normal timesteps; the transformer is called in the teacher's dtype.
    """
    samples = source(run).samples(size, seed)
    generator = torch.Generator().manual_seed(run.seed * 1_000_003 + seed)
    t = torch.sigmoid(run.time_mean + run.time_std * torch.randn(size, generator=generator))
    x = torch.lerp(samples.latents, torch.randn(samples.latents.shape, generator=generator), t[:, None, None])
    kind, dtype = family.of(run.task), getattr(torch, run.teacher.dtype)
    call = kind.arguments(x.to(dtype), t, samples.embeddings.to(dtype), samples.mask, samples.shape)
    return Inputs(x, t, call, kind.predicts)


def batches(run: RunConfig, samples: int, seed: int) -> Iterator[Inputs]:
    """Calibration batches of at most ``run.batch`` with ``samples`` samples in all."""
    for number, start in enumerate(range(0, samples, run.batch)):
        yield inputs(run, min(run.batch, samples - start), seed + number)


@dataclass(frozen=True)
class Trace:
    """One pass of a teacher.

    Attributes:
        states: ``h_0 .. h_L``; block ``i`` (from 0) maps ``states[i]`` to ``states[i + 1]``.
        context: keyword arguments that every block was called with.
    """

    states: list[Streams]
    context: dict[str, Any] = field(repr=False)


@torch.no_grad()
def trace(model: Any, given: Inputs) -> Trace:
    """Run the dense model and keep the streams between blocks."""
    states: list[Streams] = []
    context: dict[str, Any] = {}

    def before(_: nn.Module, __: Any, kwargs: dict[str, Any]) -> None:
        states.append(Streams(kwargs["hidden_states"], kwargs["encoder_hidden_states"]))
        context.update({k: v for k, v in kwargs.items() if k not in ("hidden_states", "encoder_hidden_states")})

    def after(_: nn.Module, __: Any, ___: Any, out: tuple[torch.Tensor, torch.Tensor]) -> None:
        last[:] = [Streams(image=out[1], text=out[0])]

    last: list[Streams] = []
    hooks = [block.register_forward_pre_hook(before, with_kwargs=True) for block in model.transformer_blocks]
    hooks += [block.register_forward_hook(after, with_kwargs=True) for block in model.transformer_blocks]
    try:
        model(**given.call)
    finally:
        for hook in hooks:
            hook.remove()
    context.pop("width", None)
    return Trace([*states, *last], context)


def run_block(block: nn.Module, state: Streams, context: dict[str, Any]) -> Streams:
    """Apply a block at its full width."""
    text, image = block(hidden_states=state.image, encoder_hidden_states=state.text, **context)
    return Streams(image=image, text=text)
