"""Scenes as a task of the command line: sample, judge, demonstrate."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from PIL import Image

from ppcl_rt.pipelines.drawing import USUAL, How, OnStep, no_report
from ppcl_train.scenes.encoding import to_pictures, training_batch
from ppcl_train.scenes.judging import Score
from ppcl_train.scenes.language import KINDS, SIDE, Caption, held_out_captions
from ppcl_train.scenes.sampling import Sampler, arguments, judged, noise_for


class ScenesTask:
    """Sampling and judging on scenes."""

    timed_batch = 64
    demo_prompts = (
        "a red square at b2",
        "three blue rings in row 2",
        "two green circles and a magenta cross on white",
        "a yellow triangle above a cyan stripe",
        'the text "FAIL" on grey',
    )

    def __init__(self, sampler: Mapping[str, Any]) -> None:
        self.sampler = Sampler.model_validate(sampler)
        self.usual = How(self.sampler.steps, self.sampler.guidance, (SIDE, SIDE))

    def check(self, prompts: Sequence[str]) -> list[str]:
        """See `Task.check`; a prompt that is not a scene cannot be drawn."""
        for prompt in prompts:
            Caption.parse(prompt)
        return []

    def label(self, prompt: str) -> str:
        """See `Task.label`."""
        return prompt

    def sample(
        self, model: Any, prompts: Sequence[str], seed: int, how: How = USUAL, on_step: OnStep = no_report
    ) -> list[Image.Image]:
        """Draw a 16x16 picture for every prompt; prompt ``i`` has the same noise whatever the ratio."""
        self.check(prompts)
        if how.size not in (None, self.usual.size):
            raise ValueError(f"scenes are {SIDE}x{SIDE} pixels, not {how.size[0]}x{how.size[1]}")
        asked = {name: value for name, value in how._asdict().items() if name != "size" and value is not None}
        sampler = Sampler.model_validate({**self.sampler.model_dump(), **asked})
        noise = noise_for(len(prompts), seed).to(device=model.device, dtype=model.dtype)
        return to_pictures(sampler.sample(model, prompts, noise, on_step))

    def example(self, model: Any, batch: int) -> dict[str, Any]:
        """See `Task.example`."""
        made = training_batch(batch, (0, 0))
        return arguments(torch.randn_like(made.latents), torch.full((batch,), 0.5), made.embeddings, made.mask)

    def judge(self, model: Any, prompts: int, seed: int) -> dict[str, Any]:
        """Scores over ``prompts`` held-out captions, equally many of each kind."""
        if prompts < len(KINDS) or prompts % len(KINDS):
            raise ValueError(f"prompts are spread over {len(KINDS)} kinds: ask for a multiple, not {prompts}")
        captions = held_out_captions(prompts // len(KINDS), seed)
        shares = judged(model, self.sampler, captions, seed)
        kinds = np.array([caption.kind for caption in captions])
        scores = asdict(Score.of(shares))
        return scores | {"kinds": {kind: asdict(Score.of(shares[kinds == kind])) for kind in KINDS}}
