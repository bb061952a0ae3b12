"""Calibration inputs: noisy samples, and what the transformer is called with.

Training draws timesteps at random and takes the transformer's own prediction (`inputs`). Losses are measured where a
sampler calls the transformer, and on what the sampler makes of it (`measured`): every timestep of its grid equally
often, and, with a guidance ``g`` other than 1, the guided prediction ``u + g (c - u)``, from the predictions ``c``
under the prompt and ``u`` under the negative prompt.

Inputs are noise mixed with data. With ``data.trajectory`` they are what the teacher's own sampler reaches from the
noise (`trajectory.reached`), at the timesteps of its grid, in training as in measuring; of the data, only prompts and
shapes are then used.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch.utils._pytree import tree_map_only

from ppcl_train.config.settings import RunConfig
from ppcl_train.data import seeds
from ppcl_train.data.seeds import Purpose, Seed, Stage
from ppcl_train.data.source import WHOLE, Part, source
from ppcl_train.data.trajectory import reached
from ppcl_train.engine.distributed import join
from ppcl_train.families.base import PadsText, Predicts, Samples

# The first batch of each stage: no stage sees a batch of another stage or of the teacher's training. `CHECK` is for
# samples that no stage sees.
PROBES, STUDENTS, RECOVER, WIDTH, MEASURE, CHECK, REFINE = (
    Seed(stage)
    for stage in (
        Stage.PROBES,
        Stage.STUDENTS,
        Stage.RECOVER,
        Stage.WIDTH,
        Stage.MEASURE,
        Stage.CHECK,
        Stage.REFINE,
    )
)


@dataclass(frozen=True)
class Drawn:
    """What chance decides of a batch, on the CPU.

    Attributes:
        samples: without noise.
        t: their timesteps ``[N]``.
        noise: of the shape of the latents.
    """

    samples: Samples
    t: torch.Tensor
    noise: torch.Tensor

    def pin_memory(self) -> Drawn:
        """Return the same in memory that a GPU reads by itself; torch's loader calls this."""
        samples = self.samples
        latents, embeddings, mask = (each.pin_memory() for each in (samples.latents, samples.embeddings, samples.mask))
        return Drawn(Samples(latents, embeddings, mask, samples.shape), self.t.pin_memory(), self.noise.pin_memory())

    def mixed(self) -> torch.Tensor:
        """Mix latents with noise, each at its own timestep: ``x_t``."""
        return torch.lerp(self.samples.latents, self.noise, per_sample(self.t, self.noise))


@dataclass(frozen=True)
class Inputs:
    """A batch of a task.

    Attributes:
        x: noisy latents, as the transformer takes them: packed ``[N, S, C]``, or ``[N, C, rows, columns]``.
        t: their timesteps ``[N]`` in [0, 1]; 1 is noise.
        call: all arguments that the transformer is called with. With a guidance, these are 2 N samples: N under their
            prompts, and the same N under the negative prompt.
        predicts: what its output is: ``x_0``, the velocity ``noise - x_0 = (x - x_0) / t``, or the opposite of it.
        guide: makes the guided prediction of those under the prompt and under the negative prompt; None without
            guidance.
        shares: the share of a sampler's denoising steps that each sample stands for, ``[N]``; None where timesteps are
            random, which counts every sample as 1.
        text_tokens: ``[N, S_text]``, true on the tokens of the text stream that count; None where the call says it.
        data: the clean latents that ``x`` is mixed from, of its shape; None where a sampler reached ``x``.
    """

    x: torch.Tensor
    t: torch.Tensor
    call: dict[str, Any] = field(repr=False)
    predicts: Predicts = "velocity"
    guide: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = field(default=None, repr=False)
    shares: torch.Tensor | None = None
    text_tokens: torch.Tensor | None = None
    data: torch.Tensor | None = field(default=None, repr=False)

    @property
    def mask(self) -> torch.Tensor:
        """``[N, S_text]``, true on the text tokens that count: on all of them if the transformer takes no mask."""
        if self.text_tokens is not None:
            return self.text_tokens
        mask: torch.Tensor | None = self.call.get("encoder_hidden_states_mask")
        if mask is None:
            text = self.call["encoder_hidden_states"]
            mask = torch.ones(text.shape[:2], dtype=torch.bool, device=text.device)
        return mask

    @property
    def weight(self) -> torch.Tensor:
        """The weight of each sample's squared error in the output, ``[N]``: that of the error in `clean`."""
        return torch.ones_like(self.t) if self.predicts == "clean" else self.t.square()

    def clean(self, output: torch.Tensor | Sequence[torch.Tensor]) -> torch.Tensor:
        """Return the ``x_0`` that an output points at, guided where there is a guidance, of the shape of ``x``.

        The difference of two of these is ``t`` times the difference of the velocities: high noise weighs most, as it
        does for the picture. Some transformers put out a list of samples, here all of one shape.
        """
        if not isinstance(output, torch.Tensor):
            # Samples may have an axis of length 1 more than the latents, that of frames.
            output = torch.stack(tuple(output)).reshape(-1, *self.x.shape[1:])
        if self.guide is not None:
            output = self.guide(*output.float().chunk(2))
        if self.predicts == "clean":
            return output
        step = per_sample(self.t, self.x) * output
        return self.x + step if self.predicts == "opposite" else self.x - step

    def weighted(self, difference: torch.Tensor) -> torch.Tensor:
        """Weigh ``difference [N, ...]`` in float64, so that its squares sum as samples are counted (``shares``)."""
        weighted = difference.double()
        return weighted if self.shares is None else weighted * per_sample(self.shares.double().sqrt(), weighted)

    def bands(self, edges: Sequence[float]) -> torch.Tensor:
        """The band of the timestep, between ``edges``, that each sample lies in, ``[N]`` on the CPU."""
        # An edge belongs to the band above it, as in `Catalog.band`.
        return torch.bucketize(self.t.double().cpu(), torch.tensor(edges[1:-1], dtype=torch.float64), right=True)

    def banded(self, difference: torch.Tensor, edges: Sequence[float]) -> torch.Tensor:
        """Sum of squares of ``difference [N, ...]`` in each band of the timestep between ``edges``, ``[bands]``."""
        squares = self.weighted(difference).square().flatten(1).sum(1).cpu()
        return torch.zeros(len(edges) - 1, dtype=torch.float64).index_add(0, self.bands(edges), squares)

    def part(self, samples: slice) -> Inputs:
        """Return some of the samples, of a batch without guidance."""
        assert self.guide is None, "a call of a guided batch has two samples for each"
        size = len(self.x)
        call = {
            name: value[samples] if isinstance(value, (torch.Tensor, list)) and len(value) == size else value
            for name, value in self.call.items()
        }
        tokens, data = (None if each is None else each[samples] for each in (self.text_tokens, self.data))
        return replace(self, x=self.x[samples], t=self.t[samples], call=call, text_tokens=tokens, data=data)

    def to(self, device: torch.device) -> Inputs:
        """Return the same batch on a device."""
        call = tree_map_only(torch.Tensor, lambda tensor: tensor.to(device), self.call)
        shares, tokens, data = (
            None if each is None else each.to(device) for each in (self.shares, self.text_tokens, self.data)
        )
        x, t = self.x.to(device), self.t.to(device)
        return replace(self, x=x, t=t, call=call, shares=shares, text_tokens=tokens, data=data)


def per_sample(values: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Give ``values [N]`` axes of length 1, as many as ``like [N, ...]`` has: then they broadcast over its samples."""
    return values.view(-1, *[1] * (like.ndim - 1))


def inputs(
    run: RunConfig,
    size: int,
    seed: Seed,
    t: torch.Tensor | None = None,
    *,
    share: slice = WHOLE,
    teacher: Any = None,
) -> Inputs:
    """Make a calibration batch, or a share of it, on this process's device; (run.seed, seed) alone decides it.

    ``x_t = (1 - t) x_0 + t noise`` at the timesteps ``t``, logit-normal ones unless they are given; or, with
    ``data.trajectory``, what the teacher's sampler reaches, at each of its timesteps equally often. The transformer is
    called in the teacher's dtype.

    Args:
        size: samples of the whole batch.
        seed: of the batch; each of its samples has a seed of its own (`seeds`).
        t: timesteps of the whole batch, ``[size]``.
        share: the samples that are made; bit for bit those of the whole batch (`Inputs.part`).
        teacher: a model whose dense plan is the teacher; with ``data.trajectory`` it is needed.
    """
    return made(run, draw(run, size, seed, t, share=share), teacher).to(join().device)


def draw(
    run: RunConfig,
    size: int,
    seed: Seed,
    t: torch.Tensor | None = None,
    *,
    share: slice = WHOLE,
    of: Part = "trained",
) -> Drawn:
    """Draw samples, timesteps and noise of a batch, or of a share of it (`inputs`); needs neither model nor device."""
    samples = source(run).samples(size, seed, of, share)
    timesteps, noise, chosen = [], [], []
    for number in range(size)[share]:
        rng = seeds.generator(run.seed, seed, Purpose.NOISE, number)
        timesteps.append(rng.standard_normal(dtype=np.float32))
        noise.append(rng.standard_normal(samples.latents.shape[1:], dtype=np.float32))
        chosen.append(int(rng.integers(len(run.sampler.times()) - 1)))
    drawn = torch.sigmoid(run.time_mean + run.time_std * torch.tensor(timesteps))
    if run.data.trajectory:
        times = torch.tensor(run.sampler.times()[:-1])
        drawn = times[torch.tensor(chosen)]
    return Drawn(samples, drawn if t is None else t[share], torch.from_numpy(np.stack(noise)))


def made(run: RunConfig, drawn: Drawn, teacher: Any = None) -> Inputs:
    """Make a batch of what was drawn for it, where the draws lie; ``teacher`` as for `inputs`."""
    samples, t, x = drawn.samples, drawn.t, _states(run, drawn, teacher)
    call, tokens = _call(run, x, t, samples), _text_tokens(run, samples)
    data = None if run.data.trajectory else samples.latents
    return Inputs(x, t, call, run.family.predicts, text_tokens=tokens, data=data)


def _states(run: RunConfig, drawn: Drawn, teacher: Any) -> torch.Tensor:
    """Make the states of samples at their timesteps, on the CPU."""
    if not run.data.trajectory:
        return drawn.mixed()
    assert teacher is not None, "only the teacher knows its trajectory"
    samples = drawn.samples

    def clean(x: torch.Tensor, now: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
        embeddings, mask = samples.embeddings[numbers], samples.mask[numbers]
        given = _as_sampled(run, x, now, Samples(x, embeddings, mask, samples.shape)).to(teacher.device)
        with torch.no_grad(), teacher.at(plan=teacher.catalog.dense):
            return given.clean(teacher(**given.call)[0]).float().cpu()

    return reached(clean, run.sampler.times(), drawn.noise, drawn.t)


def _call(run: RunConfig, x: torch.Tensor, t: torch.Tensor, samples: Samples) -> dict[str, Any]:
    dtype = getattr(torch, run.teacher.dtype)
    return run.family.arguments(x.to(dtype), t, samples.embeddings.to(dtype), samples.mask, samples.shape)


def _text_tokens(run: RunConfig, samples: Samples) -> torch.Tensor | None:
    return run.family.counted_tokens(samples.mask) if isinstance(run.family, PadsText) else None


def _as_sampled(run: RunConfig, x: torch.Tensor, t: torch.Tensor, samples: Samples) -> Inputs:
    """Make a batch as the sampler calls the transformer: with a guidance, under the negative prompt too."""
    guided = run.sampler.guidance != 1
    guide = partial(run.family.guided, guidance=run.sampler.guidance) if guided else None
    called = source(run).with_negative(samples) if guided else samples
    call = _call(run, torch.cat([x, x]), torch.cat([t, t]), called) if guided else _call(run, x, t, called)
    return Inputs(x, t, call, run.family.predicts, guide, text_tokens=_text_tokens(run, called))


def batches(run: RunConfig, samples: int, seed: Seed, *, teacher: Any = None) -> Iterator[Inputs]:
    """Yield calibration batches (`inputs`) of at most ``run.batch``, with ``samples`` samples in all."""
    for number, start in enumerate(range(0, samples, run.batch)):
        yield inputs(run, min(run.batch, samples - start), seed + number, teacher=teacher)


def stratified(times: Sequence[float], samples: int, rng: np.random.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Spread samples evenly over the timesteps of a sampler's grid.

    Samples go through the grid in rounds, each in a random order of its own. A last round that is shorter than the grid
    takes the middles of as many equal strata.

    Args:
        times: timesteps at which the sampler calls the transformer.
        samples: how many.
        rng: draws the orders.

    Returns:
        Timesteps and shares, ``[samples]`` each. Shares sum to 1, and with them a weighted sum is the mean over the
        timesteps that are there: over all of the grid, unless it is longer than ``samples``.
    """
    steps = len(times)
    chosen = np.empty(0, dtype=np.int64)
    while (left := samples - len(chosen)) > 0:
        size = min(left, steps)
        strata = (2 * np.arange(size) + 1) * steps // (2 * size)
        chosen = np.concatenate([chosen, rng.permutation(strata)])
    counts = np.bincount(chosen, minlength=steps)
    shares = 1 / (np.count_nonzero(counts) * counts[chosen])
    return torch.tensor(times)[torch.from_numpy(chosen)], torch.from_numpy(shares)


def measured(run: RunConfig, samples: int, seed: Seed, *, teacher: Any = None) -> Iterator[Inputs]:
    """Yield the batches that losses are measured on, with ``samples`` samples in all; (run.seed, seed) decides them.

    Timesteps are `stratified` over the sampler's, captions are never dropped, and samples are held out from training
    (`Source.samples`). A call has at most ``run.batch`` samples; with a guidance, half of them are under the negative
    prompt.

    Args:
        teacher: as for `inputs`.
    """
    size = max(1, run.batch // 2) if run.sampler.guidance != 1 else run.batch
    order = seeds.generator(run.seed, seed, Purpose.ORDER)
    times, shares = stratified(run.sampler.times()[:-1], samples, order)
    for number, (t, share) in enumerate(zip(times.split(size), shares.split(size), strict=True)):
        drawn = draw(run, len(t), seed + number, t, of="held out")
        x = _states(run, drawn, teacher)
        yield replace(_as_sampled(run, x, t, drawn.samples), shares=share).to(join().device)
