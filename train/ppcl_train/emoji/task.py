"""Emoji as a task of the command line: sample, judge, demonstrate, through the pipeline that a checkpoint lies in."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ppcl_rt.pipelines.drawing import How
from ppcl_rt.pipelines.task import PipelineTask
from ppcl_train.emoji.artwork import SIDE, artwork
from ppcl_train.emoji.captions import Caption
from ppcl_train.emoji.judging import Judge, Share, Verdicts
from ppcl_train.scenes.sampling import Sampler

# The score of a picture of the right thing that is not exactly the caption's: other gender, other tone.
_ROLE = 0.5


@functools.cache
def judge() -> Judge:
    """The judge of all artwork."""
    return Judge(artwork())


def chosen(count: int, held_out: bool, seed: int) -> list[Caption]:
    """Choose captions of the training, or held-out ones: ``count`` different ones, or all if there are no more."""
    captions = [caption for caption in artwork().captions if caption.held_out == held_out]
    picks = np.random.default_rng((seed, held_out)).permutation(len(captions))[:count]
    return [captions[pick] for pick in picks]


class EmojiTask(PipelineTask):
    """Sampling and judging on emoji.

    Args:
        sampler: its settings.
        size: pixels of a side.
        folder: of the pipeline: autoencoder, scheduler and words.
    """

    timed_batch = 64
    # The last four are held out.
    demo_prompts = (
        "rocket",
        "red apple",
        "hot beverage",
        "owl",
        "woman astronaut: light skin tone",
        "man cook: dark skin tone",
        "mermaid: dark skin tone",
        "woman detective: light skin tone",
    )

    def __init__(self, sampler: Mapping[str, Any], folder: str | Path, size: int = SIDE) -> None:
        super().__init__(folder)
        given = Sampler.model_validate(sampler)
        self.usual, self.negative = How(given.steps, given.guidance, (size, size)), given.negative

    def label(self, prompt: str) -> str:
        """See `Task.label`: says of a caption that training never saw it."""
        return f"{prompt} (held out)" if Caption(prompt).held_out else prompt

    def verdicts(self, model: Any, captions: Sequence[Caption], seed: int) -> Verdicts:
        """Draw captions and judge the pictures."""
        pictures = self.sample(model, [caption.text for caption in captions], seed)
        return judge().judge(captions, np.stack([np.asarray(picture) for picture in pictures]))

    def scores(self, model: Any, captions: Sequence[Caption], seed: int) -> np.ndarray:
        """Score captions, ``[N]``: 1 for the caption's own picture, a half for its role alone."""
        return _scores(self.verdicts(model, captions, seed))

    def judge(self, model: Any, prompts: int, seed: int) -> dict[str, Any]:
        """Scores over ``prompts`` captions of the training, and over held-out ones, at most as many."""
        found: dict[str, Any] = {}
        for name, held_out in (("trained", False), ("held out", True)):
            verdicts = self.verdicts(model, chosen(prompts, held_out, seed), seed)
            shares = {kind: Share.of(right) for kind, right in verdicts._asdict().items()}
            found[name] = {"prompts": len(verdicts.exact)}
            found[name] |= {kind: share.mean for kind, share in shares.items()}
            found[name] |= {f"{kind}_ci": (share.low, share.high) for kind, share in shares.items()}
            if not held_out:
                soft = Share.of(_scores(verdicts))
        trained = found["trained"]
        return {
            "strict": trained["exact"],
            "strict_ci": trained["exact_ci"],
            "soft": soft.mean,
            "soft_ci": (soft.low, soft.high),
            "kinds": found,
        }


def _scores(verdicts: Verdicts) -> np.ndarray:
    return np.where(verdicts.exact, 1.0, _ROLE * verdicts.role)
