"""The stage *teacher*: a small transformer, trained from nothing by flow matching; or a pretrained one."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from ppcl_train.config.settings import RunConfig
from ppcl_train.config.stages import LoopConfig
from ppcl_train.data import calibration
from ppcl_train.data.calibration import Inputs
from ppcl_train.data.seeds import Seed, Stage
from ppcl_train.data.source import Cached, source
from ppcl_train.data.teacher_file import TEACHER_FILE, note_pretrained
from ppcl_train.engine.files import write_tensors
from ppcl_train.engine.log import Log
from ppcl_train.engine.loop import train_loop
from ppcl_train.engine.optimisers import cosine, muon
from ppcl_train.families.base import Judged
from ppcl_train.scenes import encoding
from ppcl_train.scenes.sampling import Sampler, arguments

OUTPUT = TEACHER_FILE


def initial(run: RunConfig) -> Any:
    """Build the network as it is before the first step: modulations and output zero (adaLN-zero)."""
    torch.manual_seed(run.seed)
    model = run.family.build(run.teacher.architecture)
    run.family.initialise(model)
    return model


def train(run: RunConfig, folder: Path) -> None:
    """Train, or resume, and write the averaged weights to ``teacher.safetensors``; or note a pretrained teacher."""
    if run.teacher.pretrained is not None:
        return note_pretrained(run, folder)
    config, log = run.teacher, Log(folder, "teacher")
    model = initial(run)
    if config.compile and shutil.which(os.environ.get("CXX", "g++")) is None:
        log(compile="no C++ compiler here: training goes on uncompiled, slower")
    elif config.compile:
        for block in model.blocks():
            block.compile()

    batch = _of_a_cache(run) if run.data.cache is not None else partial(_of_scenes, run)

    def step_loss(number: int) -> float:
        given = batch(number)
        assert given.data is not None, "a teacher is trained on data"
        error = (given.clean(model(**given.call)[0]) - given.data).square().flatten(1).mean(1)
        loss = (error / given.t.clip(min=config.time_floor).square()).mean()
        loss.backward()
        return loss.item()

    def after_step(done: int, weights: Mapping[str, torch.Tensor]) -> None:
        if done % config.judge_every == 0:
            judge(run, weights, log, done)

    parameters = dict(model.named_parameters())
    trained = train_loop(
        run,
        LoopConfig(steps=config.steps, ema=config.ema),
        log,
        parameters,
        step_loss,
        optimisers=muon(
            parameters,
            run.family.hidden_matrices(model),
            muon_lr=config.muon_lr,
            adamw_lr=config.adamw_lr,
        ),
        rate=lambda step: cosine(step, config.phase(step).horizon, config.warmup),
        after_step=after_step,
    )
    write_tensors(folder / OUTPUT, trained, {"architecture": config.architecture, "step": config.steps})


def _of_scenes(run: RunConfig, number: int) -> Inputs:
    """A batch of scenes: what is drawn how often depends on the phase."""
    config, phase = run.teacher, run.teacher.phase(number)
    batch = encoding.training_batch(config.batch, (run.seed, number), config.drop_caption, phase.shares, phase.apart)
    generator = torch.Generator().manual_seed(run.seed * 1_000_003 + number)
    t = torch.sigmoid(run.time_mean + run.time_std * torch.randn(config.batch, generator=generator))
    noise = torch.randn(batch.latents.shape, generator=generator)
    x = torch.lerp(batch.latents, noise, t[:, None, None])
    return Inputs(x, t, arguments(x, t, batch.embeddings, batch.mask), run.family.predicts, data=batch.latents)


def _of_a_cache(run: RunConfig) -> Callable[[int], Inputs]:
    """Batches of all samples of a cache: what later stages hold out is held out from compressing, not from drawing.

    Text is padded to one length: blocks are compiled for it once.
    """
    cache = source(run)
    assert isinstance(cache, Cached), "the run has a cache"
    length = max(cache.longest, len(cache.cache.empty))

    def batch(number: int) -> Inputs:
        drawn = calibration.draw(run, run.teacher.batch, Seed(Stage.TEACHER, number), of="all")
        samples = drawn.samples
        more = length - samples.mask.shape[1]
        embeddings, mask = F.pad(samples.embeddings, (0, 0, 0, more)), F.pad(samples.mask, (0, more))
        return calibration.made(run, replace(drawn, samples=samples._replace(embeddings=embeddings, mask=mask)))

    return batch


def judge(run: RunConfig, weights: Mapping[str, torch.Tensor], log: Log, step: int) -> None:
    """Log the judge's score of some weights on a few prompts, without guidance."""
    if not isinstance(run.family, Judged):
        return
    model = run.family.build(run.teacher.architecture)
    model.load_state_dict(weights)
    captions = run.family.captions(run.teacher.judge_prompts, 7)
    scores = run.family.scores(model.eval(), Sampler(), captions, 7, run.pictures.pipeline)
    log(judged=step, strict=float(np.mean(scores == 1)), soft=float(np.mean(scores)))
