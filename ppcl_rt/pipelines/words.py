"""Frozen embeddings of words, which a small pipeline has in the place of a text encoder: ``words.safetensors``.

Words are letters, digits and what joins them; case, accents and all other signs do not matter.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ppcl_rt.files import one_line, replacing

FILE = "words.safetensors"
_TENSOR, _LIST = "embeddings", "words"
_WORD = re.compile(r"[a-z0-9#*]+(?:-[a-z0-9]+)*")
# Of a prompt; what comes after is not read.
MOST_WORDS = 64


def words_of(prompt: str) -> list[str]:
    """Split a prompt into words: ``"Man's shoe: café"`` -> ``mans, shoe, cafe``."""
    plain = unicodedata.normalize("NFKD", prompt.casefold())
    plain = "".join(sign for sign in plain if not unicodedata.combining(sign) and sign not in "'\u2019")
    return _WORD.findall(plain)


class Embedded(NamedTuple):
    """A prompt, embedded.

    Attributes:
        embeddings: ``[S_text, E]`` float32, a row a known word; of a prompt without any, that of no words.
        unknown: words that are not in the table, in order.
        cut: whether words after the first `MOST_WORDS` were left out.
    """

    embeddings: torch.Tensor
    unknown: tuple[str, ...]
    cut: bool


class WordTable:
    """Words and their embeddings.

    Args:
        words: V different words, as `words_of` makes them.
        embeddings: ``[V + 1, E]``; the first row stands for a prompt without words.
    """

    def __init__(self, words: Sequence[str], embeddings: torch.Tensor) -> None:
        if len(embeddings) != len(words) + 1 or len(set(words)) != len(words):
            raise ValueError(f"{len(words)} words, all different, have {len(words) + 1} rows, not {len(embeddings)}")
        self.words, self.embeddings = tuple(words), embeddings.float()
        self._rows = {word: row for row, word in enumerate(words, 1)}

    @classmethod
    def random(cls, words: Sequence[str], dim: int, seed: int = 0) -> WordTable:
        """Draw embeddings of some words from a normal distribution."""
        drawn = torch.randn(len(words) + 1, dim, generator=torch.Generator().manual_seed(seed))
        # As they are stored.
        return cls(words, drawn.half())

    @classmethod
    def read(cls, folder: Path) -> WordTable:
        """Read the table of a pipeline folder.

        Raises:
            ValueError: there is none, or it is damaged.
        """
        try:
            with safe_open(folder / FILE, framework="pt") as file:
                return cls(json.loads(file.metadata()[_LIST]), file.get_tensor(_TENSOR))
        except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{folder / FILE} is no table of words: {one_line(error)}") from None

    def write(self, folder: Path) -> None:
        """Write the table into a pipeline folder, in float16."""
        with replacing(folder / FILE) as temporary:
            save_file({_TENSOR: self.embeddings.half()}, temporary, {_LIST: json.dumps(self.words)})

    def embed(self, prompt: str) -> Embedded:
        """Embed a prompt; words that are not in the table are left out."""
        found = words_of(prompt)
        asked, cut = found[:MOST_WORDS], len(found) > MOST_WORDS
        rows = [self._rows[word] for word in asked if word in self._rows] or [0]
        return Embedded(self.embeddings[rows], tuple(word for word in asked if word not in self._rows), cut)

    def batch(self, prompts: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """Embed prompts: ``[N, S_text, E]``, padded with zeros, and a mask ``[N, S_text]``, true on words."""
        rows = [self.embed(prompt).embeddings for prompt in prompts]
        embeddings = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        lengths = torch.tensor([len(each) for each in rows])
        return embeddings, torch.arange(embeddings.shape[1]) < lengths[:, None]
