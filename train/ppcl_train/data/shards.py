"""A cache of samples: safetensors shards of latents and prompt embeddings, and a manifest that lists them.

    manifest.json       what the cache was made from, versions, counts, and the shape of every sample
    empty.safetensors   the embeddings of the empty prompt, for captions that training drops
    00000.safetensors   latents.N [S, C] and embeddings.N [S_text, E] of its samples

Each shard says how far its source had been read when it was complete. A cache that was killed goes on behind its last
full shard and ends with the bytes that it would have had.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from pydantic import Field, NonNegativeInt, PositiveInt
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from ppcl_rt.files import one_line as line
from ppcl_rt.planning.frozen import Frozen, read_json
from ppcl_train.engine.files import read_note, read_tensors, replacing, write_json, write_tensors
from ppcl_train.families.base import ImageShape, Unreadable

MANIFEST, EMPTY = "manifest.json", "empty.safetensors"
# Names of samples left out that a cache remembers; beyond that it only counts.
_MOST_NAMES = 20


class Sample(NamedTuple):
    """One captioned picture as the transformer sees it: latents ``[S, C]``, embeddings ``[S_text, E]``."""

    name: str
    caption: str
    latents: torch.Tensor
    embeddings: torch.Tensor
    shape: ImageShape


class Skipped(Frozen):
    """What could not be used: how many, and the first few with the reason."""

    count: NonNegativeInt = 0
    first: tuple[str, ...] = ()

    def and_also(self, what: str) -> Skipped:
        """One more."""
        return Skipped(count=self.count + 1, first=(*self.first, what)[:_MOST_NAMES])


class Listed(Frozen):
    """A shard in the manifest."""

    file: str
    bytes: PositiveInt
    shapes: tuple[ImageShape, ...]


class Manifest(Frozen):
    """What a cache is.

    Attributes:
        family: whose latents and embeddings these are.
        settings: all else that decides the samples; a cache goes on only under the same settings.
        limits: where it was to stop; may be raised later.
        versions: of what made it.
        complete: whether it got to its end or limits.
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


class _Note(Frozen):
    """What a shard says of itself: how far the source had been read, what had been skipped, and its samples."""

    position: int
    skipped: Skipped
    shapes: tuple[ImageShape, ...]
    names: tuple[str, ...]
    captions: tuple[str, ...]


class Limits(NamedTuple):
    """Where a cache stops: so many samples, so many bytes of shards; None for no limit."""

    samples: int | None = None
    max_bytes: int | None = None


NO_LIMITS = Limits()

# What a source yields: a name, and what makes the sample or raises `Unreadable`.
Recipe = tuple[str, Callable[[], Sample]]


def fill(
    folder: Path,
    begun: Manifest,
    empty: Callable[[], torch.Tensor],
    recipes: Callable[[int], Iterator[Recipe]],
    *,
    per_shard: int,
    strict: bool = False,
    report: Callable[[int, int, Skipped], None] = lambda samples, size, skipped: None,
) -> Manifest:
    """Write a cache, or go on with one.

    Args:
        begun: the manifest to begin with: family, settings, limits and versions.
        empty: makes the embeddings of the empty prompt.
        recipes: the source from a position on; the same every time.
        strict: stop at what cannot be used, instead of leaving it out.
        report: called with samples, bytes and what was skipped so far.

    Returns:
        The manifest as written at the end.

    Raises:
        ValueError: the folder holds a cache of something else; nothing could be used; with ``strict``, anything could
            not.
    """
    begun = begun.model_copy(update={"settings": json.loads(json.dumps({**begun.settings, "per_shard": per_shard}))})
    before = _begin(folder, begun, empty)
    if before.complete and before.limits == begun.limits:
        return before
    limits = Limits(**begun.limits)
    listed, position, skipped = _resume(folder, per_shard)
    used = (folder / EMPTY).stat().st_size + sum(shard.bytes for shard in listed)
    count = sum(len(shard.shapes) for shard in listed)
    if limits.max_bytes is not None and used > limits.max_bytes:
        raise ValueError(f"{folder} holds {used} bytes already, more than {limits.max_bytes}: raise --max-bytes")
    if limits.samples is not None and count > limits.samples:
        raise ValueError(f"{folder} holds {count} samples already, more than {limits.samples}: raise --samples")

    pending: list[tuple[Sample, int, Skipped]] = []

    def flush() -> bool:
        """Write what is pending, as far as it fits; whether all of it did."""
        nonlocal used
        wanted = len(pending)
        while pending:
            samples, (_, at, left_out) = [sample for sample, _, _ in pending], pending[-1]
            content = _serialised(samples, at, left_out)
            if limits.max_bytes is None or used + len(content) <= limits.max_bytes:
                file = f"{len(listed):05d}.safetensors"
                with replacing(folder / file) as beside:
                    beside.write_bytes(content)
                listed.append(Listed(file=file, bytes=len(content), shapes=tuple(s.shape for s in samples)))
                used += len(content)
                break
            pending.pop()
        whole = len(pending) == wanted
        pending.clear()
        return whole

    waiting, fits = 0, True
    report(count, used, skipped)
    if limits.samples is None or count < limits.samples:
        for name, make in recipes(position):
            position += 1
            try:
                sample = make()
            except Unreadable as error:
                if strict:
                    raise ValueError(f"{name}: {line(error)}; without --strict it would be left out") from None
                skipped = skipped.and_also(f"{name}: {line(error)}")
                report(count + len(pending), used + waiting, skipped)
                continue
            if not (sample.latents.isfinite().all() and sample.embeddings.isfinite().all()):
                raise ValueError(f"{name}: its latents or embeddings are not finite: use --dtype bfloat16 or float32")
            pending.append((sample, position, skipped))
            waiting += sample.latents.nbytes + sample.embeddings.nbytes
            report(count + len(pending), used + waiting, skipped)
            full = limits.samples is not None and count + len(pending) == limits.samples
            over = limits.max_bytes is not None and used + waiting > limits.max_bytes
            if len(pending) == per_shard or full or over:
                count, waiting = count + len(pending), 0
                fits = flush()
                if full or over or not fits:
                    break
    if pending:
        flush()
    if not listed:
        because = f"; the first: {skipped.first[0]}" if skipped.count else ""
        if limits.max_bytes is not None and not fits:
            because = f": --max-bytes {limits.max_bytes} is less than one sample takes"
        raise ValueError(f"nothing was cached, {skipped.count} left out{because}")
    samples = sum(len(shard.shapes) for shard in listed)
    made = begun.model_copy(
        update={
            "complete": True,
            "samples": samples,
            "bytes": used,
            "skipped": skipped,
            "shards": tuple(listed),
            "versions": before.versions,
        }
    )
    write_json(folder / MANIFEST, made.model_dump(mode="json"))
    return made


def _begin(folder: Path, begun: Manifest, empty: Callable[[], torch.Tensor]) -> Manifest:
    """Write a manifest, or check the one that is there; returns what is there now."""
    path = folder / MANIFEST
    if not path.exists():
        write_json(path, begun.model_dump(mode="json"))
    before = read_manifest(path)
    old, new = ({"family": m.family, **m.settings} for m in (before, begun))
    for key in {**old, **new}:
        if old.get(key) != new.get(key):
            was = f"{folder} was begun with {key} = {old.get(key)}"
            raise ValueError(f"{was}: go on with that, or choose another --out")
    if before.limits != begun.limits:
        # What goes on is not complete until it says so again.
        write_json(path, begun.model_copy(update={"versions": before.versions}).model_dump(mode="json"))
    if not (folder / EMPTY).exists():
        write_tensors(folder / EMPTY, {"embeddings": empty()}, {})
    return before


def _resume(folder: Path, per_shard: int) -> tuple[list[Listed], int, Skipped]:
    """The full shards that are there, and how far the source had been read behind the last."""
    listed: list[Listed] = []
    position, skipped = 0, Skipped()
    while (path := folder / f"{len(listed):05d}.safetensors").exists():
        note = read_json(_Note, json.dumps(read_note(path)), f"{path} is no shard of a cache")
        if len(note.shapes) < per_shard:
            # The end of an earlier, lower limit: made again, or the cache would differ from one made in one go.
            break
        listed.append(Listed(file=path.name, bytes=path.stat().st_size, shapes=note.shapes))
        position, skipped = note.position, note.skipped
    return listed, position, skipped


def _serialised(samples: list[Sample], position: int, skipped: Skipped) -> bytes:
    note = _Note(
        position=position,
        skipped=skipped,
        shapes=tuple(sample.shape for sample in samples),
        names=tuple(sample.name for sample in samples),
        captions=tuple(sample.caption for sample in samples),
    )
    tensors = {f"latents.{n}": sample.latents.contiguous() for n, sample in enumerate(samples)}
    tensors |= {f"embeddings.{n}": sample.embeddings.contiguous() for n, sample in enumerate(samples)}
    return save(tensors, metadata={"note": note.model_dump_json()})


def read_manifest(path: Path) -> Manifest:
    """Read a ``manifest.json``.

    Raises:
        ValueError: it is no manifest.
    """
    return read_json(Manifest, path.read_bytes(), f"{path} is no manifest of a cache")


class Place(NamedTuple):
    """Where a sample lies."""

    file: Path
    number: int


class Shards:
    """A cache, opened for reading: a folder with a manifest, or one with several such folders (``--part``).

    Attributes:
        folder: where it lies.
        family: whose samples it holds.
        buckets: shape -> samples of that shape.
        empty: embeddings of the empty prompt ``[S_text, E]``.

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
        self.empty = read_tensors(roots[0] / EMPTY)["embeddings"]
        # Files are mapped, not read, and few of them are open at a time.
        self._file = lru_cache(maxsize=64)(lambda path: safe_open(path, framework="pt"))

    def __len__(self) -> int:
        return sum(map(len, self.buckets.values()))

    def read(self, place: Place) -> tuple[torch.Tensor, torch.Tensor]:
        """Latents and embeddings of a sample, in the dtype that they are stored in.

        Raises:
            ValueError: the file cannot be read.
        """
        try:
            file = self._file(place.file)
            return file.get_tensor(f"latents.{place.number}"), file.get_tensor(f"embeddings.{place.number}")
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{place.file} cannot be read ({line(error)}): cache it again") from None
