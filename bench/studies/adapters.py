"""How much of an adapter of the teacher is left at lower ratios.

    python bench/studies/adapters.py examples/scenes OUT [--steps 1500] [--rank 16] [--prompts 500]

A task beside the one that the teacher was trained on: every colour is drawn as the next one of the palette, red as
green, green as blue. An adapter (LoRA) is trained on the teacher by flow matching, with peft, until it does that, and
kept in OUT. Then the checkpoint is judged on captions whose colours are moved on, at each ratio without and with the
adapter. *Gain* is the difference of the two, *kept* is the gain over that at ratio 1.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import QwenImageTransformer2DModel
from diffusers.utils import logging as diffusers_logging
from rich.progress import track

import ppcl_rt
from ppcl_train.scenes.encoding import to_images, to_tokens, training_batch
from ppcl_train.scenes.judging import Score, judge
from ppcl_train.scenes.language import COLOURS, KINDS, Caption, held_out_captions
from ppcl_train.scenes.rendering import render
from ppcl_train.scenes.sampling import Sampler, arguments, noise_for

NAME = "pytorch_lora_weights.safetensors"
LAYERS = ["to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"]
LAYERS += [f"{stream}_mlp.net.{layer}" for stream in ("img", "txt") for layer in ("0.proj", "2")]
_NEXT = dict(zip(COLOURS, [*list(COLOURS)[1:], next(iter(COLOURS))], strict=True))


def moved_on(caption: Caption) -> Caption:
    """What a caption asks for on the other task."""
    things = tuple(dataclasses.replace(each, colour=_NEXT[each.colour]) for each in caption.things)
    return dataclasses.replace(caption, things=things)


def train(checkpoint: Path, out: Path, steps: int, rank: int, batch: int = 64) -> None:
    """Train the adapter on the teacher, and write it."""
    from peft import LoraConfig

    torch.manual_seed(0)
    model = QwenImageTransformer2DModel.from_pretrained(checkpoint, torch_dtype=torch.float32)
    model.requires_grad_(False)
    model.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=LAYERS))
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimiser = torch.optim.AdamW(parameters, lr=2e-3, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 2e-3, total_steps=steps, pct_start=0.05)
    losses = []
    for step in track(range(steps), "training"):
        made = training_batch(batch, (1, step), drop=0.1)
        rng, generator = np.random.default_rng((2, step)), torch.Generator().manual_seed(step)
        latents = to_tokens(np.stack([render(moved_on(caption), rng) for caption in made.captions]))
        t = torch.sigmoid(0.4 + 1.2 * torch.randn(batch, generator=generator))
        x = torch.lerp(latents, torch.randn(latents.shape, generator=generator), t[:, None, None])
        error = model(**arguments(x, t, made.embeddings, made.mask))[0] - latents
        loss = (error.square().mean((1, 2)) / t.clip(min=0.4).square()).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
        losses.append(loss.item())
        if (step + 1) % 100 == 0:
            print(f"step {step + 1}: loss {np.mean(losses[-100:]):.4f}", flush=True)
    model.save_lora_adapter(out, weight_name=NAME)


def score(model: Any, prompts: int, sampler: Sampler) -> Score:
    """The judge's score on the other task."""
    captions = held_out_captions(prompts // len(KINDS), seed=1)
    captions = [caption for caption in captions if caption.things]
    noise, shares = noise_for(len(captions), 1), []
    for start in range(0, len(captions), 250):
        part = captions[start : start + 250]
        clean = sampler.sample(model, [str(caption) for caption in part], noise[start : start + 250])
        shares.append(judge([moved_on(caption) for caption in part], to_images(clean)))
    return Score.of(np.concatenate(shares))


def main() -> None:
    """Train where need be, judge, print and write results.json."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--prompts", type=int, default=500)
    parser.add_argument("--ratios", default="1,0.7,0.5,0.35")
    asked = parser.parse_args()
    diffusers_logging.set_verbosity_error()
    asked.out.mkdir(parents=True, exist_ok=True)
    if not (asked.out / NAME).is_file():
        train(asked.checkpoint, asked.out, asked.steps, asked.rank)
    results, whole = [], None
    with torch.no_grad():
        for ratio in map(float, asked.ratios.split(",")):
            model = ppcl_rt.load(asked.checkpoint, ratio, dtype=torch.float32)
            sampler = Sampler.model_validate(model.catalog.task["sampler"])
            without = score(model, asked.prompts, sampler)
            model.load_lora_adapter(asked.out, weight_name=NAME, prefix=None, adapter_name="moved")
            adapted = score(model, asked.prompts, sampler)
            gain = adapted.strict - without.strict
            whole = whole or gain
            row = {"ratio": ratio, "without": without.strict, "with": adapted.strict, "soft": adapted.soft}
            row |= {"gain": gain, "kept": gain / whole}
            results.append(row)
            print(", ".join(f"{name} {value:.3f}" for name, value in row.items()), flush=True)
            print(model.adapter_report("moved"), flush=True)
    about = {name: str(value) for name, value in vars(asked).items()}
    (asked.out / "results.json").write_text(json.dumps({**about, "rows": results}, indent=1))


if __name__ == "__main__":
    main()
