"""Train the scenes teacher: a Qwen-Image transformer of 12 blocks x 96, from nothing, by flow matching."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ppcl_rt.qwen_image import PPCLQwenImageTransformer2DModel
from ppcl_train import scenes
from ppcl_train.runs import Log, read_note, read_tensors, write_tensors
from ppcl_train.sampling import Sampler, judged, predict


@dataclass(frozen=True, kw_only=True)
class TeacherConfig:
    """How to train the teacher. ``architecture`` is what diffusers' class takes."""

    architecture: dict[str, Any] = field(
        default_factory=lambda: {
            "patch_size": scenes.CELL,
            "in_channels": scenes.CELL**2 * 3,
            "out_channels": 3,
            "num_layers": 12,
            "attention_head_dim": 16,
            "num_attention_heads": 6,
            "joint_attention_dim": scenes.EMBEDDING_DIM,
            "axes_dims_rope": [4, 6, 6],
        }
    )
    steps: int = 17_000
    batch: int = 64
    seed: int = 0
    muon_lr: float = 0.02
    adamw_lr: float = 2e-3
    warmup: int = 200
    ema: float = 0.998
    drop_caption: float = 0.1
    time_mean: float = 0.4
    time_std: float = 1.2
    # The loss on x_0 is divided by max(t, time_floor)^2, which makes it the velocity's above the floor.
    time_floor: float = 0.4
    compile: bool = True
    save_every: int = 500
    judge_every: int = 2000
    judge_per_kind: int = 50


def start(config: TeacherConfig) -> PPCLQwenImageTransformer2DModel:
    """Build the network as it is before the first step: modulations and output zero (adaLN-zero)."""
    torch.manual_seed(config.seed)
    model = PPCLQwenImageTransformer2DModel(**config.architecture)
    for block in model.transformer_blocks:
        for modulation in (block.img_mod, block.txt_mod):
            nn.init.zeros_(modulation[1].weight)
            nn.init.zeros_(modulation[1].bias)
    for layer in (model.norm_out.linear, model.proj_out):
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
    return model


def optimisers(model: nn.Module, config: TeacherConfig) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside blocks other than modulations, AdamW for all else."""
    named = dict(model.named_parameters())
    matrices = {
        name for name, p in named.items() if name.startswith("transformer_blocks.") and p.ndim == 2 and "_mod." not in name
    }
    return [
        torch.optim.Muon([named[name] for name in sorted(matrices)], lr=config.muon_lr, weight_decay=0.0),
        torch.optim.AdamW(
            [p for name, p in named.items() if name not in matrices],
            lr=config.adamw_lr,
            betas=(0.9, 0.95),
            weight_decay=0.0,
        ),
    ]


def cosine(step: int, steps: int, warmup: int) -> float:
    """Share of the peak learning rate at a step: linear up over ``warmup``, then half a cosine down to zero."""
    return min((step + 1) / warmup, 0.5 * (1 + math.cos(math.pi * step / steps)))


def optimiser_tensors(all_: Iterable[torch.optim.Optimizer]) -> dict[str, torch.Tensor]:
    """All state of optimisers as named tensors."""
    return {
        f"optimiser.{n}.{index}.{key}": torch.as_tensor(value)
        for n, optimiser in enumerate(all_)
        for index, state in optimiser.state_dict()["state"].items()
        for key, value in state.items()
    }


def restore_optimisers(all_: Iterable[torch.optim.Optimizer], tensors: dict[str, torch.Tensor]) -> None:
    """Undo `optimiser_tensors`."""
    for n, optimiser in enumerate(all_):
        content = optimiser.state_dict()
        for name, tensor in tensors.items():
            if name.startswith(f"optimiser.{n}."):
                index, key = name.removeprefix(f"optimiser.{n}.").split(".", 1)
                content["state"].setdefault(int(index), {})[key] = tensor
        optimiser.load_state_dict(content)


def training_loss(model: nn.Module, config: TeacherConfig, step: int) -> torch.Tensor:
    """Loss of one step; (seed, step) alone decides the batch, the times and the noise."""
    batch = scenes.training_batch(config.batch, (config.seed, step), drop=config.drop_caption)
    generator = torch.Generator().manual_seed(config.seed * 1_000_003 + step)
    t = torch.sigmoid(config.time_mean + config.time_std * torch.randn(config.batch, generator=generator))
    noise = torch.randn(batch.latents.shape, generator=generator)
    x = torch.lerp(batch.latents, noise, t[:, None, None])
    error = predict(model, x, t, batch.embeddings, batch.mask) - batch.latents
    return (error.square().mean((1, 2)) / t.clip(min=config.time_floor).square()).mean()


def train(config: TeacherConfig, folder: Path) -> Path:
    """Train, or go on training, and return the file with the averaged weights.

    A step depends on the weights and on (seed, step) alone, so a killed run that is started again ends with the weights
    that it would have had.
    """
    out, state = folder / "teacher.safetensors", folder / "teacher.state.safetensors"
    if out.exists():
        return out
    log = Log(folder / "log.jsonl", "teacher")
    model = start(config)
    ema = {name: p.detach().clone() for name, p in model.named_parameters()}
    steppers, first = optimisers(model, config), 0
    if state.exists():
        held, first = read_tensors(state), read_note(state)["step"]
        model.load_state_dict({name: held[f"model.{name}"] for name in ema})
        ema = {name: held[f"ema.{name}"] for name in ema}
        restore_optimisers(steppers, held)
        log(resumed=first)
    if config.compile:
        for block in model.transformer_blocks:
            block.compile()
    peaks = [stepper.param_groups[0]["lr"] for stepper in steppers]
    mean = 0.0
    for step in range(first, config.steps):
        for stepper, peak in zip(steppers, peaks, strict=True):
            stepper.param_groups[0]["lr"] = peak * cosine(step, config.steps, config.warmup)
        loss = training_loss(model, config, step)
        loss.backward()
        for stepper in steppers:
            stepper.step()
            stepper.zero_grad()
        with torch.no_grad():
            keep = min(config.ema, (step + 1) / (step + 10))
            torch._foreach_lerp_(list(ema.values()), [p.detach() for p in model.parameters()], 1 - keep)
        mean = loss.item() if step == first else 0.99 * mean + 0.01 * loss.item()
        if not math.isfinite(mean):
            raise ValueError(f"teacher: the loss is {mean} at step {step}; lower muon_lr or adamw_lr and start again")
        done = step + 1
        if done % 100 == 0:
            log(step=done, of=config.steps, loss=mean)
        if done % config.judge_every == 0 or done == config.steps:
            judge_now(config, ema, log, done)
        if done % config.save_every == 0 or done == config.steps:
            held = {f"model.{name}": p for name, p in model.named_parameters()}
            held |= {f"ema.{name}": p for name, p in ema.items()} | optimiser_tensors(steppers)
            write_tensors(state, held, {"step": done})
    write_tensors(out, ema, {"architecture": config.architecture, "step": config.steps})
    state.unlink()
    return out


def judge_now(config: TeacherConfig, weights: dict[str, torch.Tensor], log: Log, step: int) -> None:
    """Log the judge's score of the averaged weights on a few held-out prompts."""
    model = PPCLQwenImageTransformer2DModel(**config.architecture)
    model.load_state_dict(weights)
    captions = scenes.held_out_captions(config.judge_per_kind, seed=7)
    score = scenes.Score.of(judged(model.eval(), Sampler(), captions, seed=7))
    log(judged=step, strict=score.strict, soft=score.soft)
