"""The teacher: a pretrained transformer, or a small one for scenes, trained from nothing by flow matching.

A pretrained teacher is read where it lies; ``teacher.safetensors`` is then a note without tensors, that names its files
with their sizes and SHA-256, so that a run goes on with the teacher that it began with or not at all.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

import ppcl_rt
from ppcl_rt import Checkpoint, locate
from ppcl_rt.families.qwen_image import PPCLQwenImageTransformer2DModel
from ppcl_train.config.settings import RunConfig
from ppcl_train.config.stages import LoopConfig
from ppcl_train.config.teacher import TeacherConfig
from ppcl_train.engine.files import read_note, read_tensors, write_tensors
from ppcl_train.engine.log import Log
from ppcl_train.engine.loop import train_loop
from ppcl_train.engine.optimisers import cosine
from ppcl_train.scenes import encoding, judging, language
from ppcl_train.scenes.sampling import Sampler, arguments, judged


def initial(config: TeacherConfig, seed: int) -> PPCLQwenImageTransformer2DModel:
    """Build the network as it is before the first step: modulations and output zero (adaLN-zero)."""
    torch.manual_seed(seed)
    model = PPCLQwenImageTransformer2DModel(**config.architecture)
    zeroed = [modulation[1] for block in model.transformer_blocks for modulation in (block.img_mod, block.txt_mod)]
    for layer in (*zeroed, model.norm_out.linear, model.proj_out):
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
    return model


def optimisers(model: nn.Module, config: TeacherConfig) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside blocks other than modulations, AdamW for all else."""
    named = dict(model.named_parameters())
    matrices = [n for n, p in named.items() if n.startswith("transformer_blocks.") and p.ndim == 2 and "_mod." not in n]
    others = [p for name, p in named.items() if name not in matrices]
    return [
        torch.optim.Muon([named[name] for name in sorted(matrices)], lr=config.muon_lr, weight_decay=0.0),
        torch.optim.AdamW(others, lr=config.adamw_lr, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def train(run: RunConfig, folder: Path) -> None:
    """Train, or go on training, and write the averaged weights to ``teacher.safetensors``; or note the pretrained."""
    if run.teacher.pretrained is not None:
        return note_pretrained(run.teacher.pretrained, folder)
    config, log = run.teacher, Log(folder, "teacher")
    model = initial(config, run.seed)
    if config.compile and shutil.which(os.environ.get("CXX", "g++")) is None:
        log(compile="no C++ compiler here: training goes on uncompiled, slower")
    elif config.compile:
        for block in model.transformer_blocks:
            block.compile()

    def step_loss(step: int) -> float:
        phase = config.phase(step)
        batch = encoding.training_batch(config.batch, (run.seed, step), config.drop_caption, phase.shares, phase.apart)
        generator = torch.Generator().manual_seed(run.seed * 1_000_003 + step)
        t = torch.sigmoid(run.time_mean + run.time_std * torch.randn(config.batch, generator=generator))
        noise = torch.randn(batch.latents.shape, generator=generator)
        x = torch.lerp(batch.latents, noise, t[:, None, None])
        error = model(**arguments(x, t, batch.embeddings, batch.mask))[0] - batch.latents
        loss = (error.square().mean((1, 2)) / t.clip(min=config.time_floor).square()).mean()
        loss.backward()
        return loss.item()

    def after_step(done: int, trained: Mapping[str, torch.Tensor]) -> None:
        if done % config.judge_every == 0:
            judge(run, trained, log, done)

    trained = train_loop(
        run,
        LoopConfig(steps=config.steps, ema=config.ema),
        log,
        dict(model.named_parameters()),
        step_loss,
        optimisers=optimisers(model, config),
        rate=lambda step: cosine(step, config.phase(step).horizon, config.warmup),
        after_step=after_step,
    )
    write_tensors(folder / "teacher.safetensors", trained, {"architecture": config.architecture, "step": config.steps})


def check(run: RunConfig, file: Path) -> None:
    """Compare a file with the network that a config asks for.

    Raises:
        ValueError: no such file, other tensors than the network's, or the config has a pretrained teacher.
    """
    if run.teacher.pretrained is not None:
        raise ValueError(f"the config's teacher is {run.teacher.pretrained}: leave out --teacher, or set that to null")
    if not file.is_file():
        raise ValueError(f"there is no teacher at {file}")
    if _shapes(run) != {name: tensor.shape for name, tensor in read_tensors(file).items()}:
        raise ValueError(f"{file} holds other tensors than the teacher of this config has")


def _shapes(run: RunConfig) -> dict[str, torch.Size]:
    with torch.device("meta"):
        model = PPCLQwenImageTransformer2DModel(**run.teacher.architecture)
    return {name: parameter.shape for name, parameter in model.named_parameters()}


def extract(run: RunConfig, checkpoint: Path, file: Path) -> None:
    """Write the teacher that lies in a checkpoint folder, its stock tensors in float32, as a teacher file.

    The catalog is not read: a teacher can be taken out of a checkpoint of an older format too. Where kept blocks were
    trained, this is what ratio 1 runs, not the teacher that it was made from.

    Raises:
        ValueError: the folder does not hold all tensors of the network that the config asks for.
    """
    held: dict[str, torch.Tensor] = {}
    for shard in sorted(checkpoint.glob("*.safetensors")):
        held |= read_tensors(shard)
    missing = _shapes(run).keys() - held
    if missing:
        raise ValueError(f"{checkpoint} is no checkpoint of this config's teacher: it lacks {min(missing)}")
    write_tensors(file, {name: held[name].float() for name in _shapes(run)}, {"checkpoint": checkpoint.name})


def load(run: RunConfig, folder: Path) -> Any:
    """Load the teacher, rounded to what the checkpoint will store, in the dtype that it computes in.

    Raises:
        ValueError: a pretrained teacher is gone, or another than the run began with.
    """
    storage, compute = (getattr(torch, name) for name in (run.storage, run.teacher.dtype))
    if run.teacher.pretrained is not None:
        source = find_pretrained(run.teacher.pretrained)
        _compare(source, folder)
        model = ppcl_rt.load(source, dtype=storage)
        return (model if storage == compute else model.to(compute)).requires_grad_(False)
    model = PPCLQwenImageTransformer2DModel(**run.teacher.architecture)
    tensors = read_tensors(folder / "teacher.safetensors")
    model.load_state_dict({name: tensor.to(storage).to(compute) for name, tensor in tensors.items()}, assign=True)
    return model.eval().requires_grad_(False)


def find_pretrained(source: str) -> Path:
    """The folder of a transformer: ``source`` itself, or the transformer of the pipeline that it is.

    Raises:
        ValueError: there is none, or it is a checkpoint that is pluggable already.
    """
    try:
        folder = locate(source, "transformer")
    except ValueError:
        folder = locate(source)
    if Checkpoint(folder).catalog is not None:
        raise ValueError(f"{folder} is a pluggable checkpoint: a teacher is a stock transformer")
    return folder


def note_pretrained(source: str, folder: Path) -> None:
    """Write ``teacher.safetensors``: no tensors, and a note of the pretrained teacher's files."""
    found, log = find_pretrained(source), Log(folder, "teacher")
    files = {}
    for path in _files(found):
        files[path.name] = [*_stamp(path), _hash(path)]
        log(read=path.name, gigabytes=path.stat().st_size / 1e9)
    write_tensors(folder / "teacher.safetensors", {}, {"pretrained": source, "files": files})


def _compare(source: Path, folder: Path) -> None:
    """Compare a pretrained teacher with the note of the run; only files of another size or date are read for it."""
    noted, found = read_note(folder / "teacher.safetensors")["files"], _files(source)
    same = noted.keys() == {path.name for path in found} and all(
        noted[path.name][:2] == _stamp(path) or noted[path.name][2] == _hash(path) for path in found
    )
    if not same:
        raise ValueError(f"{source} is not the teacher that {folder} began with: bring it back, or begin a new run")


def _stamp(path: Path) -> list[int]:
    return [path.stat().st_size, path.stat().st_mtime_ns]


def _hash(path: Path) -> str:
    total = hashlib.sha256()
    with path.open("rb") as file:
        while part := file.read(1 << 24):
            total.update(part)
    return total.hexdigest()


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.name == "config.json" or path.suffix == ".safetensors")


def judge(run: RunConfig, weights: Mapping[str, torch.Tensor], log: Log, step: int) -> None:
    """Log the judge's score of some weights on a few held-out prompts, without guidance."""
    model = PPCLQwenImageTransformer2DModel(**run.teacher.architecture)
    model.load_state_dict(weights)
    captions = language.held_out_captions(run.teacher.judge_per_kind, seed=7)
    score = judging.Score.of(judged(model.eval(), Sampler(), captions, seed=7))
    log(judged=step, strict=score.strict, soft=score.soft)
