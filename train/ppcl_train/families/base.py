"""What training and caching ask of a model family, and the one door to all families: `of`.

Training asks a `Family` how its transformer is built and called, and what the transformer predicts. Making a cache asks
for the family's pipeline, opened as an `Encoder`. A new family is one more file here, one in the runtime, and an entry
in `ppcl_rt.families.registry`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from PIL import Image

from ppcl_rt.families import registry
from ppcl_train.scenes.sampling import Sampler

# What a transformer puts out: the clean image x_0, the velocity noise - x_0, or the opposite of it, x_0 - noise.
Predicts = Literal["clean", "velocity", "opposite"]
# (frames, rows, columns) of an image, in tokens.
ImageShape = tuple[int, int, int]
# Arrays already have the size and the range of values that the family's encoder takes.
Picture = Image.Image | np.ndarray


class Unreadable(ValueError):
    """A captioned image that cannot be used; the message says why, without the name of the image."""


class Samples(NamedTuple):
    """Samples of one shape, without noise.

    Attributes:
        latents: float32, normalised, as the transformer takes them: packed ``[N, S, C]``, or
            ``[N, C, rows, columns]``.
        embeddings: ``[N, S_text, E]`` float32.
        mask: ``[N, S_text]``, true on words.
        shape: of every image.
    """

    latents: torch.Tensor
    embeddings: torch.Tensor
    mask: torch.Tensor
    shape: ImageShape


class Encoder(Protocol):
    """An opened pipeline.

    Attributes:
        multiple: pixels; the sides of images are multiples of it.
        area: pixels of an image, unless the caller says otherwise.
        negative: the negative prompt that the family's pipeline is used with.
    """

    multiple: int
    area: int
    negative: str

    def embed(self, prompt: str) -> torch.Tensor:
        """Embed one prompt, ``[S_text, E]``, without padding.

        Raises:
            Unreadable: the family cannot take this prompt.
        """

    def encode(self, picture: Picture) -> tuple[torch.Tensor, ImageShape]:
        """Encode one picture as the transformer takes it: normalised latents of one of `Samples`, and their shape."""

    def draw(
        self, prompt: str, size: tuple[int, int], seed: int, steps: int, guidance: float, negative: str
    ) -> tuple[torch.Tensor, ImageShape]:
        """Sample one picture of ``size`` (width, height) pixels with the teacher; returns what `encode` does.

        Raises:
            Unreadable: as `embed`.
        """

    def pictures(
        self, model: Any, prompts: Sequence[str], size: tuple[int, int], seed: int, sampler: Sampler
    ) -> list[Image.Image]:
        """Draw pictures of ``size`` (width, height) with a model, which need not be the pipeline's own.

        The noise of a picture depends on the seed and on the number of its prompt, not on the model.
        """


class Family(Protocol):
    """A model family.

    Attributes:
        predicts: what the transformer's output is, as in `calibration.Inputs`.
    """

    predicts: Predicts

    def build(self, architecture: Mapping[str, Any]) -> Any:
        """Build the dense model, a pluggable one. Under ``torch.device("meta")``, this checks an architecture.

        Raises:
            TypeError, ValueError, RuntimeError, ZeroDivisionError: no model has this architecture.
        """

    def initialise(self, model: Any) -> None:
        """Prepare a built model for training from nothing: modulations and output become zero (adaLN-zero)."""

    def hidden_matrices(self, model: Any) -> list[str]:
        """Names of the matrices that Muon trains, sorted: those inside blocks, without modulations."""

    def arguments(
        self, x: torch.Tensor, t: torch.Tensor, embeddings: torch.Tensor, mask: torch.Tensor, shape: ImageShape
    ) -> dict[str, Any]:
        """Return what the transformer is called with.

        Args:
            x: noisy latents, of the shape of those of `Samples`.
            t: timesteps ``[N]`` in [0, 1].
            embeddings: ``[N, S_text, E]``.
            mask: ``[N, S_text]``, true on words.
            shape: of every image in the batch.
        """

    def guided(self, wanted: torch.Tensor, free: torch.Tensor, guidance: float) -> torch.Tensor:
        """Guide a prediction as the family's pipeline does: ``u + g (c - u)``, and what the pipeline adds to it.

        Args:
            wanted: outputs ``c`` under the prompt, ``[N, ...]``.
            free: outputs ``u`` under the negative prompt, likewise.
            guidance: ``g``.
        """

    def embed(self, prompt: str) -> torch.Tensor:
        """Embed a prompt without a pipeline, ``[S_text, E]``.

        Raises:
            ValueError: embeddings of this family come from a cache.
        """

    def make(self, draws: Sequence[np.random.Generator], dropped: Sequence[bool]) -> Samples:
        """Make samples, on the CPU.

        Args:
            draws: one generator a sample, which alone decides it.
            dropped: of each sample, whether its caption is replaced by the empty prompt.

        Raises:
            ValueError: samples of this family come from a cache.
        """

    def open(self, pipeline: str, *, device: str, dtype: torch.dtype, draws: bool) -> Encoder:
        """Open a pipeline folder or hub id; the transformer is loaded only if the encoder ``draws``.

        Raises:
            ValueError: the pipeline cannot be opened.
        """


@runtime_checkable
class Judged(Protocol):
    """A family whose checkpoints the project can sample and judge without people (`ppcl_rt.pipelines.task`).

    Attributes:
        task_settings: what a checkpoint says of how it is sampled, besides the sampler.
    """

    task_settings: Mapping[str, Any]

    def captions(self, count: int, seed: int) -> Sequence[Any]:
        """Choose captions to judge on.

        Raises:
            ValueError: they cannot be so many.
        """

    def scores(
        self, model: Any, sampler: Sampler, captions: Sequence[Any], seed: int, pipeline: str | None
    ) -> np.ndarray:
        """Draw every caption once and judge the pictures: ``[N]`` in [0, 1], 1 where all is right.

        Args:
            pipeline: folder of what else it takes to draw, where it takes more.

        Raises:
            ValueError: it takes more, and there is no such folder.
        """


@runtime_checkable
class PadsText(Protocol):
    """A family whose text stream holds more than the words of a prompt."""

    def counted_tokens(self, mask: torch.Tensor) -> torch.Tensor:
        """Say which tokens of the text stream count: ``[N, S']``, S' tokens of the stream, for ``mask [N, S_text]``."""


def of(name: str) -> Family:
    """Return the family of this name.

    Raises:
        ValueError: there is none, or it cannot be trained.
    """
    family: Family = registry.training(name)
    return family
