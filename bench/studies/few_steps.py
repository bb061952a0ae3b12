"""A teacher of four denoising steps, compressed with ordinary calibration inputs and on its own trajectory.

    nice python bench/studies/few_steps.py examples/scenes --out runs/few-steps [--json few_steps.json]

First the teacher of a checkpoint of scenes is distilled to four steps without guidance: the states that it goes through
in its own steps, guided, are recorded from noise under prompts of the training, and the few-step teacher learns the
straight step from each recorded state to that of the next of its own four timesteps. Then the few-step teacher is
compressed twice, with the same settings but ``data.trajectory``. Everything is judged on unseen prompts from the same
noise. What is in ``--out`` is not made again.
"""

from __future__ import annotations

import time
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer

import ppcl_rt
from ppcl_kernels.tools.machine import write_json
from ppcl_train import pipeline
from ppcl_train.config.presets import PRESETS
from ppcl_train.config.settings import RunConfig, with_changes
from ppcl_train.data.teacher_file import extract_teacher
from ppcl_train.engine.files import read_tensors, write_tensors
from ppcl_train.engine.optimisers import adamw, cosine, schedule
from ppcl_train.scenes.encoding import to_images, training_batch
from ppcl_train.scenes.judging import judge
from ppcl_train.scenes.language import KINDS, Caption, held_out_captions
from ppcl_train.scenes.sampling import Sampler, arguments, guided_prediction, noise_for

# Batches of the recorded states have seeds of their own: no stage of a run sees them (`calibration.STUDENTS` and on).
_SEED = 900_000_000
_BATCH = 64
# The settings of the preset, scaled down to minutes, the same for both runs.
SMALL = {
    "tracker": "none",
    "table.lengths": [2],
    "table.starts": ["first", "last"],
    "table.trial_steps": 10,
    "table.steps": 25,
    "table.batches": 10,
    "table.batch": 32,
    "table.samples": 64,
    "students.steps": 60,
    "students.batch": 32,
    "width.heads": [0.67, 0.5],
    "width.channels": [0.5, 0.25],
    "width.ranks": [8],
    "width.longest_text_run": 2,
    "width.samples": 1024,
    "recover.batch": 32,
    "recover.spacing": 0.05,
    "refine.steps": 0,
    "measure.samples": 64,
    "measure.spacing": 0.05,
    "measure.other_spacing": 0.5,
    "measure.candidates": 1,
    "compress.share": 0.0,
}


@torch.no_grad()
def recorded(model: Any, sampler: Sampler, steps: int, batch: int) -> dict[str, torch.Tensor]:
    """Sample a batch of training prompts with the teacher; keep its states at the timesteps of fewer steps.

    Returns:
        ``states [steps + 1, N, 16, 48]``, the noise first, and the prompts' ``embeddings`` and ``mask``.
    """
    given, empty = (training_batch(_BATCH, (0, _SEED + batch), drop=drop) for drop in (0.0, 1.0))
    embeddings, mask = torch.cat([given.embeddings, empty.embeddings]), torch.cat([given.mask, empty.mask])
    x = torch.randn(given.latents.shape, generator=torch.Generator().manual_seed(_SEED + batch))
    states = [x]
    for number, (now, then) in enumerate(pairwise(sampler.times()), 1):
        output = model(**arguments(torch.cat([x, x]), torch.full((len(mask),), now), embeddings, mask))[0]
        clean = guided_prediction(*output.chunk(2), sampler.guidance)
        x = x + (then - now) * (x - clean) / now
        if number % (sampler.steps // steps) == 0:
            states.append(x)
    return {"states": torch.stack(states), "embeddings": given.embeddings, "mask": given.mask}


def record(model: Any, sampler: Sampler, steps: int, batches: int, file: Path) -> dict[str, torch.Tensor]:
    """Record batches (`recorded`), or read what was recorded."""
    if not file.exists():
        found = []
        for batch in range(batches):
            found.append(recorded(model, sampler, steps, batch))
            if batch % 8 == 0:
                print(f"recorded {batch + 1} of {batches} batches of {_BATCH}", flush=True)
        axes = {"states": 1, "embeddings": 0, "mask": 0}
        write_tensors(file, {name: torch.cat([each[name] for each in found], axis) for name, axis in axes.items()}, {})
    return read_tensors(file)


def distil(model: Any, few: Sampler, known: dict[str, torch.Tensor], steps: int, lr: float) -> None:
    """Train a model in place to go from every recorded state to the next in one step."""
    states, times = known["states"], torch.tensor(few.times())
    parameters = list(model.requires_grad_(True).parameters())
    optimiser = adamw(parameters, lr=lr)
    rates = schedule(optimiser, lambda step: cosine(step, steps, 20))
    generator = torch.Generator().manual_seed(_SEED)
    count, size = states.shape[1], 2 * _BATCH
    for step in range(steps):
        k, n = (torch.randint(high, (size,), generator=generator) for high in (few.steps, count))
        x, now, then = states[k, n], times[k], times[k + 1]
        # Where a straight line through both states arrives at t = 0.
        target = x - (now / (then - now)).view(-1, 1, 1) * (states[k + 1, n] - x)
        output = model(**arguments(x, now, known["embeddings"][n], known["mask"][n]))[0]
        loss = (output - target).square().mean()
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        rates.step()
        if step % 50 == 0:
            print(f"distilled {step} of {steps} steps, squared error {loss.item():.4f}", flush=True)
    model.requires_grad_(False)


def score(
    model: Any, sampler: Sampler, captions: list[Caption], like: torch.Tensor | None = None
) -> tuple[dict[str, float], torch.Tensor]:
    """Sample every caption; returns scores, and the distance from other pictures of the same noise, and the pictures.

    The distance is the mean squared difference over the mean square of the others.
    """
    prompts, noise = [str(caption) for caption in captions], noise_for(len(captions), 1)
    x = torch.cat(
        [sampler.sample(model, prompts[n : n + 100], noise[n : n + 100]) for n in range(0, len(prompts), 100)]
    )
    shares = judge(captions, to_images(x))
    found = {"strict": float(np.mean(shares == 1)), "soft": float(np.mean(shares))}
    if like is not None:
        found["distance"] = float((x - like).square().mean() / like.square().mean())
    return found, x


def few_step_teacher(
    run: RunConfig, few: Sampler, checkpoint: Path, out: Path, batches: int, steps: int, lr: float
) -> tuple[Any, Any]:
    """Make the few-step teacher, or read it; returns the teacher and the few-step teacher."""
    models = [run.family.build(run.teacher.architecture).eval().requires_grad_(False) for _ in range(2)]
    extract_teacher(run, checkpoint, out / "many.safetensors")
    for model in models:
        model.load_state_dict(read_tensors(out / "many.safetensors"))
    file = out / "few.safetensors"
    if not file.exists():
        known = record(models[0], run.sampler, few.steps, batches, out / "states.safetensors")
        distil(models[1], few, known, steps, lr)
        write_tensors(file, dict(models[1].named_parameters()), {"steps": steps})
    models[1].load_state_dict(read_tensors(file))
    return models[0], models[1]


def main(
    checkpoint: Path,
    out: Annotated[Path, typer.Option(help="run folders and what was recorded")] = Path("runs/few-steps"),
    sampler_steps: Annotated[int, typer.Option(help="denoising steps of the few-step teacher")] = 4,
    batches: Annotated[int, typer.Option(help="batches of 64 prompts whose states are recorded")] = 48,
    distil_steps: Annotated[int, typer.Option(help="training steps of the few-step teacher")] = 300,
    lr: float = 5e-4,
    recover_steps: Annotated[int, typer.Option(help="of each compression")] = 300,
    prompts: int = 300,
    json_file: Annotated[Path | None, typer.Option("--json")] = None,
) -> None:
    """Distil, compress twice, judge; print a line for each."""
    base = PRESETS["scenes"]
    many, few = base.sampler, base.sampler.model_copy(update={"steps": sampler_steps, "guidance": 1.0})
    if many.steps % sampler_steps:
        raise ValueError(f"--sampler-steps is a divisor of the teacher's {many.steps}, not {sampler_steps}")
    out.mkdir(parents=True, exist_ok=True)
    captions = held_out_captions(prompts // len(KINDS), 1)
    teacher, student = few_step_teacher(base, few, checkpoint, out, batches, distil_steps, lr)
    settings = {"batches": batches, "distil_steps": distil_steps, "recover_steps": recover_steps, "prompts": prompts}
    content: dict[str, Any] = {"device": "cpu", "dtype": "float32", **settings, "changes": SMALL, "rows": []}

    def add(name: str, found: dict[str, float], **more: float) -> None:
        content["rows"].append({"model": name, **more, **found})
        print(f"{name}:", *(f"{key} {value:.3f}" for key, value in {**more, **found}.items()), flush=True)
        if json_file is not None:
            write_json(json_file, content)

    add(f"teacher, {many.steps} steps, guided", score(teacher, many, captions)[0])
    add(
        f"teacher, {few.steps} steps, guided", score(teacher, many.model_copy(update={"steps": few.steps}), captions)[0]
    )
    add(f"teacher, {few.steps} steps", score(teacher, few, captions)[0])
    found, pictures = score(student, few, captions)
    add(f"few-step teacher, {few.steps} steps", found)
    for name, trajectory in (("ordinary", False), ("trajectory", True)):
        changes = {**SMALL, "sampler": few.model_dump(), "data.trajectory": trajectory, "recover.steps": recover_steps}
        config, folder, began = with_changes(base, changes), out / name, time.monotonic()
        pipeline.begin(config, folder, out / "few.safetensors")
        pipeline.run_stages(config, folder)
        print(f"{name}: {time.monotonic() - began:.0f} s", flush=True)
        for ratio in (0.7, 0.5, 0.35):
            model = ppcl_rt.load(folder / "checkpoint", ratio, dtype=torch.float32)
            add(name, score(model, few, captions, pictures)[0], ratio=ratio)


if __name__ == "__main__":
    typer.run(main)
