"""A cache of samples: safetensors shards of latents and prompt embeddings, and a manifest that lists them.

manifest.json       what the cache was made from, versions, counts, and the shape of every sample
empty.safetensors   the embeddings of the empty prompt, for captions that training drops, and of the negative prompt
00000.safetensors   latents.N ([S, C], or [C, rows, columns]) and embeddings.N [S_text, E] of its samples
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from pydantic import Field, NonNegativeInt, PositiveInt
from safetensors import SafetensorError, safe_open

from ppcl_rt.files import one_line
from ppcl_rt.planning.frozen import Frozen, read_json
from ppcl_train.engine.files import read_note, read_tensors
from ppcl_train.families.base import ImageShape

MANIFEST, EMPTY = "manifest.json", "empty.safetensors"
# Names of left-out samples that a cache records; further ones are only counted.
_MOST_NAMES = 20


class Skipped(Frozen):
    """What was left out because it could not be used: how many, and the first 20 names with the reason."""

    count: NonNegativeInt = 0
    first: tuple[str, ...] = ()

    def and_also(self, what: str) -> Skipped:
        """Return this with one more."""
        return Skipped(count=self.count + 1, first=(*self.first, what)[:_MOST_NAMES])


class Listed(Frozen):
    """A shard in the manifest."""

    file: str
    bytes: PositiveInt
    shapes: tuple[ImageShape, ...]


class Manifest(Frozen):
    """What a cache is.

    Attributes:
        family: the family that the latents and embeddings are for.
        settings: all else that decides the samples; a cache goes on only with the same settings.
        limits: where it was to stop; they may be raised later.
        versions: of the packages that made it.
        complete: whether it reached the end of its source or its limits.
    """

    format: int = Field(1, ge=1, le=1)
    family: str
    settings: dict[str, Any]
    limits: dict[str, int | None]
    versions: dict[str, str]
    complete: bool = False
    samples: NonNegativeInt = 0
    bytes: NonNegativeInt = 0
    skipped: Skipped = Skipped()
    shards: tuple[Listed, ...] = ()


class Limits(NamedTuple):
    """Where a cache stops: at a number of samples, or of bytes of all files; None for no limit."""

    samples: int | None = None
    max_bytes: int | None = None


NO_LIMITS = Limits()


def read_manifest(path: Path) -> Manifest:
    """Read a ``manifest.json``.

    Raises:
        ValueError: it is no manifest.
    """
    return read_json(Manifest, path.read_bytes(), f"{path} is no manifest of a cache")


class Place(NamedTuple):
    """Where a sample lies: a file, and its number in the file."""

    file: Path
    number: int


class Shards:
    """A cache, opened for reading: a folder with a manifest, or one with several such folders (``--part``).

    Attributes:
        folder: of the cache.
        family: the family of its samples.
        buckets: shape -> places of the samples of that shape.
        empty: embeddings of the empty prompt ``[S_text, E]``.
        unconditional: prompt -> embeddings, of the empty prompt and of the negative prompt that the cache was made
            with; older caches have no negative prompt.

    Raises:
        ValueError: there is no cache, or it is not complete.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        roots = (
            [folder] if (folder / MANIFEST).exists() else sorted(path.parent for path in folder.glob(f"*/{MANIFEST}"))
        )
        if not roots:
            raise ValueError(f"{folder} is no cache, it has no {MANIFEST}: make one with `ppcl train cache`")
        manifests = [read_manifest(root / MANIFEST) for root in roots]
        self.family = manifests[0].family
        self.buckets: dict[ImageShape, list[Place]] = {}
        for root, manifest in zip(roots, manifests, strict=True):
            if not manifest.complete:
                raise ValueError(f"{root} is not complete: run the command that began it again")
            if manifest.family != self.family:
                raise ValueError(
                    f"{root} is a cache of {manifest.family}, {roots[0]} of {self.family}: use one of them"
                )
            for shard in manifest.shards:
                path = root / shard.file
                if not path.is_file() or path.stat().st_size != shard.bytes:
                    raise ValueError(f"{path} is missing or not whole: delete it, and {MANIFEST}, and cache again")
                for number, shape in enumerate(shard.shapes):
                    self.buckets.setdefault(shape, []).append(Place(path, number))
        held, note = read_tensors(roots[0] / EMPTY), read_note(roots[0] / EMPTY)
        self.empty = held["embeddings"]
        self.unconditional = {"": self.empty}
        if "negative" in note:
            self.unconditional[note["negative"]] = held["negative"]
        # Files are memory-mapped, not read, and at most 64 of them are open.
        self._file = lru_cache(maxsize=64)(lambda path: safe_open(path, framework="pt"))

    def __len__(self) -> int:
        return sum(map(len, self.buckets.values()))

    def words(self, place: Place) -> int:
        """Return how many tokens the caption of a sample has, ``S_text``; of the file, only its header is read.

        Raises:
            ValueError: as `read`.
        """
        try:
            return int(self._file(place.file).get_slice(f"embeddings.{place.number}").get_shape()[0])
        except (SafetensorError, OSError) as error:
            raise _unreadable(place, error) from None

    def read(self, place: Place) -> tuple[torch.Tensor, torch.Tensor]:
        """Read the latents and embeddings of a sample, in the dtype that they are stored in.

        Raises:
            ValueError: the file cannot be read.
        """
        try:
            file = self._file(place.file)
            return file.get_tensor(f"latents.{place.number}"), file.get_tensor(f"embeddings.{place.number}")
        except (SafetensorError, OSError) as error:
            raise _unreadable(place, error) from None


def _unreadable(place: Place, error: Exception) -> ValueError:
    return ValueError(f"{place.file} cannot be read ({one_line(error)}): cache it again")
