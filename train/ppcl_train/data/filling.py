"""Writing a cache: samples from a source into shards, in order, so that a cache that was killed goes on.

Each shard records how far its source had been read when the shard was complete. A cache that goes on begins after its
last full shard, and ends with the bytes that it would have had.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import save

from ppcl_rt.files import one_line, replacing
from ppcl_rt.planning.frozen import Frozen, read_json
from ppcl_train.data.shards import EMPTY, MANIFEST, Limits, Listed, Manifest, Skipped, read_manifest
from ppcl_train.engine.files import read_note, write_json, write_tensors
from ppcl_train.families.base import ImageShape, Unreadable


class Sample(NamedTuple):
    """One captioned picture as the transformer takes it: latents (`Samples`), embeddings ``[S_text, E]``."""

    name: str
    caption: str
    latents: torch.Tensor
    embeddings: torch.Tensor
    shape: ImageShape


class _Note(Frozen):
    """What a shard records: how far the source had been read, what had been left out, and its samples."""

    position: int
    skipped: Skipped
    shapes: tuple[ImageShape, ...]
    names: tuple[str, ...]
    captions: tuple[str, ...]


# What a source yields: a name, and a function that makes the sample or raises `Unreadable`.
Recipe = tuple[str, Callable[[], Sample]]
# Called with the samples, bytes and left-out names so far.
Report = Callable[[int, int, Skipped], None]


def fill(
    folder: Path,
    begun: Manifest,
    unconditional: Mapping[str, Callable[[], torch.Tensor]],
    recipes: Callable[[int], Iterator[Recipe]],
    *,
    per_shard: int,
    strict: bool = False,
    report: Report = lambda samples, size, skipped: None,
) -> Manifest:
    """Write a cache, or go on with one.

    Args:
        folder: of the cache.
        begun: the manifest to begin with: family, settings, limits and versions.
        unconditional: prompt -> makes its embeddings: the empty prompt, and the negative prompt, which comes last. A
            cache that was made without a negative prompt gets its embeddings when it is made again.
        recipes: the source from a position on; the same recipes every time.
        per_shard: samples of a shard.
        strict: stop at what cannot be used, instead of leaving it out.
        report: called with the samples, bytes and left-out names so far.

    Returns:
        The manifest as written at the end.

    Raises:
        ValueError: the folder holds a cache of something else; nothing could be used; or, with ``strict``, something
            could not be used.
    """
    begun = begun.model_copy(update={"settings": json.loads(json.dumps({**begun.settings, "per_shard": per_shard}))})
    before = _begin(folder, begun, unconditional)
    if before.complete and before.limits == begun.limits:
        return before
    writer = _Writer(folder, Limits(**begun.limits), per_shard, strict, report)
    writer.run(recipes)
    if not writer.listed:
        because = f"; the first: {writer.skipped.first[0]}" if writer.skipped.count else ""
        if writer.limits.max_bytes is not None and not writer.fits:
            because = f": --max-bytes {writer.limits.max_bytes} is less than one sample takes"
        raise ValueError(f"nothing was cached, {writer.skipped.count} left out{because}")
    made = begun.model_copy(
        update={
            "complete": True,
            "samples": sum(len(shard.shapes) for shard in writer.listed),
            "bytes": writer.used,
            "skipped": writer.skipped,
            "shards": tuple(writer.listed),
            "versions": before.versions,
        }
    )
    write_json(folder / MANIFEST, made.model_dump(mode="json"))
    return made


class _Writer:
    """The shards of a cache while they are written.

    Attributes:
        listed: the shards that are there.
        used: bytes of all files.
        skipped: what was left out.
        fits: whether the last shard took all samples that were waiting for it.
    """

    def __init__(self, folder: Path, limits: Limits, per_shard: int, strict: bool, report: Report) -> None:
        self.folder, self.limits, self.per_shard, self.strict, self._report = folder, limits, per_shard, strict, report
        self.listed, self._position, self.skipped = _resume(folder, per_shard)
        self.used = (folder / EMPTY).stat().st_size + sum(shard.bytes for shard in self.listed)
        self.fits = True
        self._count = sum(len(shard.shapes) for shard in self.listed)
        # Samples for the next shard, each with how far the source had been read and what had been left out by then.
        self._pending: list[tuple[Sample, int, Skipped]] = []
        self._pending_bytes = 0
        if limits.max_bytes is not None and self.used > limits.max_bytes:
            raise ValueError(
                f"{folder} holds {self.used} bytes already, more than {limits.max_bytes}: raise --max-bytes"
            )
        if limits.samples is not None and self._count > limits.samples:
            raise ValueError(
                f"{folder} holds {self._count} samples already, more than {limits.samples}: raise --samples"
            )

    def run(self, recipes: Callable[[int], Iterator[Recipe]]) -> None:
        """Write shards until the source ends or a limit is reached."""
        self._say()
        if self.limits.samples is None or self._count < self.limits.samples:
            for name, make in recipes(self._position):
                if self._take(name, make):
                    break
        if self._pending:
            self._flush()

    def _take(self, name: str, make: Callable[[], Sample]) -> bool:
        """Make a sample and write a shard if one is full; returns whether a limit is reached."""
        limits = self.limits
        self._position += 1
        try:
            sample = make()
        except Unreadable as error:
            if self.strict:
                raise ValueError(f"{name}: {one_line(error)}; without --strict it would be left out") from None
            self.skipped = self.skipped.and_also(f"{name}: {one_line(error)}")
            self._say()
            return False
        if not (sample.latents.isfinite().all() and sample.embeddings.isfinite().all()):
            raise ValueError(f"{name}: its latents or embeddings are not finite: use --dtype bfloat16 or float32")
        self._pending.append((sample, self._position, self.skipped))
        self._pending_bytes += sample.latents.nbytes + sample.embeddings.nbytes
        self._say()
        full = limits.samples is not None and self._count + len(self._pending) == limits.samples
        over = limits.max_bytes is not None and self.used + self._pending_bytes > limits.max_bytes
        if len(self._pending) == self.per_shard or full or over:
            self._flush()
        return full or over or not self.fits

    def _flush(self) -> None:
        """Write the samples that are pending into a shard; those that exceed the limit of bytes are dropped."""
        wanted = len(self._pending)
        while self._pending:
            samples, (_, position, skipped) = [sample for sample, _, _ in self._pending], self._pending[-1]
            content = _serialised(samples, position, skipped)
            if self.limits.max_bytes is None or self.used + len(content) <= self.limits.max_bytes:
                file = f"{len(self.listed):05d}.safetensors"
                with replacing(self.folder / file) as temporary:
                    temporary.write_bytes(content)
                shapes = tuple(sample.shape for sample in samples)
                self.listed.append(Listed(file=file, bytes=len(content), shapes=shapes))
                self.used += len(content)
                break
            self._pending.pop()
        self.fits = len(self._pending) == wanted
        self._count += len(self._pending)
        self._pending.clear()
        self._pending_bytes = 0

    def _say(self) -> None:
        self._report(self._count + len(self._pending), self.used + self._pending_bytes, self.skipped)


def _begin(folder: Path, begun: Manifest, unconditional: Mapping[str, Callable[[], torch.Tensor]]) -> Manifest:
    """Write a manifest, or check the one that is there; returns the one that was there, or the new one."""
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
        # A cache that goes on is not complete until its manifest says so again.
        write_json(path, begun.model_copy(update={"versions": before.versions}).model_dump(mode="json"))
    held, negative = folder / EMPTY, list(unconditional)[-1]
    if not held.exists() or read_note(held).get("negative") != negative:
        tensors = {"embeddings": unconditional[""](), "negative": unconditional[negative]()}
        write_tensors(held, tensors, {"negative": negative})
    return before


def _resume(folder: Path, per_shard: int) -> tuple[list[Listed], int, Skipped]:
    """Return the full shards that are there, how far the source had been read after the last, and what was left out."""
    listed: list[Listed] = []
    position, skipped = 0, Skipped()
    while (path := folder / f"{len(listed):05d}.safetensors").exists():
        note = read_json(_Note, json.dumps(read_note(path)), f"{path} is no shard of a cache")
        if len(note.shapes) < per_shard:
            # An earlier, lower limit ended here. This shard is made again, or the cache would differ from one made at
            # once.
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
