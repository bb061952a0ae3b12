"""What caches are filled with: captioned images, or pictures that the teacher itself draws from prompts."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import re
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from ppcl_train.data.captioned import Captioned, Reader, buckets, fit
from ppcl_train.data.filling import Recipe, Sample, fill
from ppcl_train.data.shards import NO_LIMITS, Limits, Manifest, Skipped
from ppcl_train.families.base import Encoder, Picture, Unreadable

# Samples of a shard. A kill loses the shard that is being filled: seconds of encoding images, minutes of drawing them.
PER_SHARD, PER_SHARD_DRAWN = 64, 8

# Threads that read and decode images.
_READERS = 4


def cache(
    family: str,
    encoder: Encoder,
    reader: Reader,
    folder: Path,
    *,
    settings: dict[str, Any],
    dtype: torch.dtype,
    area: int | None = None,
    limits: Limits = NO_LIMITS,
    part: tuple[int, int] = (0, 1),
    per_shard: int = PER_SHARD,
    strict: bool = False,
) -> Manifest:
    """Encode captioned images into a cache, or go on encoding.

    Args:
        settings: all else that decides the samples, for the manifest: the pipeline.
        area: pixels of an image, which is resized and cropped to the nearest of `buckets`; None for the encoder's own.
        part: ``(p, n)``: part p of n (`Reader.read`); n processes with a part each share the work.

    Raises:
        ValueError: as `fill`.
    """
    area = area or encoder.area
    sizes = buckets(area, encoder.multiple)

    def read(item: Captioned) -> tuple[Picture, str]:
        picture, caption = item.open()
        return fit(picture, sizes) if isinstance(picture, Image.Image) else picture, caption

    def sample(name: str, given: Future[tuple[Picture, str]]) -> Sample:
        picture, caption = given.result()
        # The caption first: if the family cannot take it, the more expensive encoding of the picture is saved.
        embeddings = encoder.embed(caption)
        latents, shape = encoder.encode(picture)
        return _sample(name, caption, latents, embeddings, shape, dtype)

    def recipes(position: int) -> Iterator[Recipe]:
        for item, given in _ahead(reader.read(position, *part), read):
            yield item.name, partial(sample, item.name, given)

    settings = {**settings, **reader.settings, "area": area, "dtype": str(dtype), "part": part}
    if part[1] > 1 and reader.split == "shards":
        # Parts of tars were every n-th image once: those cannot go on.
        settings["split"] = reader.split
    begun = _begun(family, settings, limits)
    count = None if reader.count is None else len(range(part[0], reader.count, part[1]))
    with _progress("cache", count, limits) as report:
        return fill(
            folder,
            begun,
            _unconditional(encoder, encoder.negative, dtype),
            recipes,
            per_shard=per_shard,
            strict=strict,
            report=report,
        )


def generate(
    family: str,
    encoder: Encoder,
    prompts: list[str],
    folder: Path,
    *,
    settings: dict[str, Any],
    dtype: torch.dtype,
    sizes: list[tuple[int, int]],
    steps: int,
    guidance: float,
    negative: str,
    seed: int = 0,
    limits: Limits = NO_LIMITS,
    part: tuple[int, int] = (0, 1),
    per_shard: int = PER_SHARD_DRAWN,
    strict: bool = False,
) -> Manifest:
    """Draw a picture for every prompt with the teacher and cache the pairs, or go on drawing.

    Prompt ``i`` is drawn at size ``i`` (modulo the number of sizes), from noise that (seed, i) alone decides.

    Raises:
        ValueError: the sides of a size are not multiples of what the family takes; else as `fill`.
    """
    for width, height in sizes:
        if width % encoder.multiple or height % encoder.multiple:
            raise ValueError(f"sides are multiples of {encoder.multiple}, not {width}x{height}")

    def sample(number: int) -> Sample:
        prompt = prompts[number]
        embeddings = encoder.embed(prompt)
        latents, shape = encoder.draw(
            prompt, sizes[number % len(sizes)], seed * 1_000_003 + number, steps, guidance, negative
        )
        return _sample(f"prompt {number + 1}", prompt, latents, embeddings, shape, dtype)

    numbers = range(part[0], len(prompts), part[1])

    def recipes(position: int) -> Iterator[Recipe]:
        for number in numbers[position:]:
            yield f"prompt {number + 1}", partial(sample, number)

    asked = hashlib.sha256("\n".join(prompts).encode()).hexdigest()
    made = {"prompts": asked, "sizes": sizes, "steps": steps, "guidance": guidance, "negative": negative, "seed": seed}
    begun = _begun(family, {**settings, **made, "dtype": str(dtype), "part": part}, limits)
    with _progress("generate", len(numbers), limits) as report:
        return fill(
            folder,
            begun,
            _unconditional(encoder, negative, dtype),
            recipes,
            per_shard=per_shard,
            strict=strict,
            report=report,
        )


def read_prompts(path: Path) -> list[str]:
    """Read prompts: one a line, or in a ``.jsonl`` objects with a ``prompt`` or ``text``; empty lines are passed over.

    Raises:
        ValueError: the file cannot be read, or holds no prompts.
    """
    try:
        lines = [text.strip() for text in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read as text: {error}") from None
    prompts = []
    for number, text in enumerate(lines, 1):
        if not text:
            continue
        if path.suffix == ".jsonl":
            try:
                row = json.loads(text)
                text = row["prompt"] if "prompt" in row else row["text"]
            except (ValueError, KeyError, TypeError):
                raise ValueError(f'{path}, line {number}: no object with a "prompt"') from None
        prompts.append(text)
    if not prompts:
        raise ValueError(f"{path} holds no prompts")
    return prompts


def bytes_of(text: str) -> int:
    """Return the number of bytes that ``800MB``, ``1.5 TB`` (powers of 1,000) or a plain number says.

    Raises:
        ValueError: the text is none of these.
    """
    found = re.fullmatch(r"([0-9.]+)\s*([KMGT]?)B?", text.strip(), re.IGNORECASE)
    try:
        assert found is not None
        return int(float(found[1]) * 1000 ** ["", "K", "M", "G", "T"].index(found[2].upper()))
    except (AssertionError, ValueError):
        raise ValueError(f"a number of bytes is like 800MB or 1.5TB, not {text}") from None


def size_of(text: str) -> tuple[int, int]:
    """Return the width and height that ``1024x768`` says.

    Raises:
        ValueError: the text is no size.
    """
    found = re.fullmatch(r"([1-9][0-9]*)x([1-9][0-9]*)", text)
    if found is None:
        raise ValueError(f"a size is like 1024x768, not {text}")
    return int(found[1]), int(found[2])


def _sample(
    name: str, caption: str, latents: torch.Tensor, embeddings: torch.Tensor, shape: Any, dtype: torch.dtype
) -> Sample:
    if not len(embeddings):
        raise Unreadable("its caption has no tokens")
    return Sample(name, caption, latents.to("cpu", dtype), embeddings.to("cpu", dtype), shape)


def _unconditional(encoder: Encoder, negative: str, dtype: torch.dtype) -> dict[str, Callable[[], torch.Tensor]]:
    """Embeddings that belong to no sample, made when they are called for: of the empty and of the negative prompt."""

    def embed(prompt: str) -> torch.Tensor:
        return encoder.embed(prompt).to("cpu", dtype)

    return {prompt: partial(embed, prompt) for prompt in ("", negative)}


def _ahead(
    items: Iterator[Captioned], read: Callable[[Captioned], tuple[Picture, str]]
) -> Iterator[tuple[Captioned, Future[tuple[Picture, str]]]]:
    """Yield items in order with the result of ``read``, which runs a few items ahead in threads: decoding then overlaps
    with encoding."""
    with ThreadPoolExecutor(_READERS) as pool:
        waiting: deque[tuple[Captioned, Future[tuple[Picture, str]]]] = deque()
        for item in items:
            waiting.append((item, pool.submit(read, item)))
            if len(waiting) > 2 * _READERS:
                yield waiting.popleft()
        yield from waiting


def _begun(family: str, settings: dict[str, Any], limits: Limits) -> Manifest:
    versions = {name: version(name) for name in ("torch", "diffusers", "transformers", "pillow")}
    versions["python"] = platform.python_version()
    return Manifest(family=family, settings=settings, limits=limits._asdict(), versions=versions)


@contextlib.contextmanager
def _progress(stage: str, count: int | None, limits: Limits) -> Iterator[Callable[[int, int, Skipped], None]]:
    """Show a progress bar; yields what `fill` reports to."""
    totals = [total for total in (count, limits.samples) if total is not None]
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[megabytes]:.1f} MB, {task.fields[skipped]} left out"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    # Of several processes on one terminal, the first shows how far it is.
    with Progress(*columns, disable=bool(int(os.environ.get("RANK", 0)))) as progress:
        task = progress.add_task(stage, total=min(totals, default=None), megabytes=0.0, skipped=0)

        def report(samples: int, size: int, skipped: Skipped) -> None:
            progress.update(task, completed=samples, megabytes=size / 1e6, skipped=skipped.count)

        yield report
