"""What training and caching have to know of a model family; one file a family, listed in `of`.

Training asks a `Family` for two things: how its transformer is called and what it predicts. Making a cache asks for its
pipeline, opened as an `Encoder`. FLUX or SD3 would be one more file each.
"""

from __future__ import annotations

from typing import Any, Literal, Protocol

import numpy as np
import torch
from PIL import Image

# (frames, rows, columns) of an image, in tokens.
ImageShape = tuple[int, int, int]
# Arrays are already of the size and in the range that the family's encoder takes.
Picture = Image.Image | np.ndarray


class Unreadable(ValueError):
    """One captioned image that cannot be used; says why, without its name."""


class Encoder(Protocol):
    """An opened pipeline.

    Attributes:
        multiple: pixels; sides of images are multiples of it.
        area: pixels of an image where nobody says otherwise.
    """

    multiple: int
    area: int

    def embed(self, prompt: str) -> torch.Tensor:
        """Embed one prompt, ``[S_text, E]``, no padding.

        Raises:
            Unreadable: it is no prompt of this family.
        """

    def encode(self, picture: Picture) -> tuple[torch.Tensor, ImageShape]:
        """Encode one picture as the transformer sees it: normalised, packed latents ``[S, C]``, and their shape."""

    def draw(
        self, prompt: str, size: tuple[int, int], seed: int, steps: int, guidance: float, negative: str
    ) -> tuple[torch.Tensor, ImageShape]:
        """Sample one picture of ``size`` (width, height) pixels with the teacher; returns what `encode` does.

        Raises:
            Unreadable: as `embed`.
        """


class Family(Protocol):
    """A model family.

    Attributes:
        predicts: what the transformer's output is, as in `states.Inputs`.
        judged: whether the project can sample and judge its checkpoints (`ppcl_rt.cli.task`).
    """

    predicts: Literal["clean", "velocity"]
    judged: bool

    def arguments(
        self, x: torch.Tensor, t: torch.Tensor, embeddings: torch.Tensor, mask: torch.Tensor, shape: ImageShape
    ) -> dict[str, Any]:
        """What the transformer is called with.

        Args:
            x: noisy latents ``[N, S, C]``.
            t: timesteps ``[N]`` in [0, 1].
            embeddings: ``[N, S_text, E]``.
            mask: ``[N, S_text]``, true on words.
            shape: of every image in the batch.
        """

    def open(self, pipeline: str, *, device: str, dtype: torch.dtype, draws: bool) -> Encoder:
        """Open a pipeline folder or hub id; with the transformer only if it ``draws``.

        Raises:
            ValueError: it cannot be opened.
        """


def of(name: str) -> Family:
    """The family of this name.

    Raises:
        ValueError: there is none.
    """
    from ppcl_train.families.qwen_image import QwenImage
    from ppcl_train.families.scenes import Scenes

    families: dict[str, Family] = {"qwen-image": QwenImage(), "scenes": Scenes()}
    if name not in families:
        raise ValueError(f"there is no family {name}; there are: {', '.join(families)}")
    return families[name]
