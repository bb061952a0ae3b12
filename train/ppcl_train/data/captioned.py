"""Captioned images from a folder, from tar shards of webdataset, or from a dataset of `datasets`; and their sizes.

A reader yields the same images in the same order every time, from any position on. A damaged image or caption is found
when that image is opened, and no other image is affected.
"""

from __future__ import annotations

import contextlib
import glob
import io
import json
import math
import os
import tarfile
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

from PIL import Image, ImageOps, UnidentifiedImageError
from torch.utils.data import DataLoader

from ppcl_rt.files import one_line
from ppcl_train.data import seeds
from ppcl_train.data.seeds import Purpose, Seed, Stage
from ppcl_train.families.base import Picture, Unreadable
from ppcl_train.scenes.language import training_caption
from ppcl_train.scenes.rendering import render

SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".webp")
# Width over height of the buckets.
ASPECTS = (1 / 2, 9 / 16, 2 / 3, 3 / 4, 1.0, 4 / 3, 3 / 2, 16 / 9, 2.0)


Split = Literal["images", "shards"]


class Captioned(NamedTuple):
    """A captioned image that has not been opened yet.

    Attributes:
        name: what messages call it.
        open: returns the picture and its caption, or raises `Unreadable`.
    """

    name: str
    open: Callable[[], tuple[Picture, str]]


class Reader(Protocol):
    """Where captioned images come from.

    Attributes:
        settings: all that decides the images, as JSON.
        count: how many images there are; None if counting them would mean reading all of them.
        split: what several processes divide: the images, of which every n-th goes to the same process, or the shards
            that images lie in.
    """

    settings: dict[str, Any]
    count: int | None
    split: Split

    def read(self, start: int, part: int = 0, parts: int = 1) -> Iterator[Captioned]:
        """Yield images ``start, start + 1, ..`` of one of ``parts`` parts, numbered from 0; no two share an image.

        Raises:
            ValueError: there are not as many images or shards as parts.
        """


def buckets(area: int, multiple: int) -> list[tuple[int, int]]:
    """List sizes (width, height) near an area in pixels, between 1:2 and 2:1; sides are multiples of ``multiple``."""

    def side(length: float) -> int:
        return max(1, round(length / multiple)) * multiple

    return sorted({(side(math.sqrt(area * aspect)), side(math.sqrt(area / aspect))) for aspect in ASPECTS})


def fit(image: Image.Image, sizes: list[tuple[int, int]]) -> Image.Image:
    """Resize an image to the size of the nearest aspect ratio, and crop the rest, equally on both sides."""
    aspect = image.width / image.height
    return ImageOps.fit(
        image, min(sizes, key=lambda size: abs(math.log(size[0] / size[1] / aspect))), Image.Resampling.LANCZOS
    )


def picture_of(content: bytes) -> Image.Image:
    """Decode an image file: upright, RGB.

    Raises:
        Unreadable: it is no image of a known format, or damaged.
    """
    try:
        with Image.open(io.BytesIO(content)) as image:
            return ImageOps.exif_transpose(image).convert("RGB")
    except UnidentifiedImageError:
        raise Unreadable("no image of a known format") from None
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise Unreadable(f"cannot be decoded ({one_line(error)})") from None


def caption_of(value: Any) -> str:
    """Return a caption without spaces around it; of a list of captions, the first.

    Raises:
        Unreadable: the caption is missing, empty or no text.
    """
    if isinstance(value, list | tuple) and value:
        value = value[0]
    if isinstance(value, bytes):
        try:
            value = value.decode()
        except UnicodeDecodeError:
            raise Unreadable("its caption is not UTF-8") from None
    if not isinstance(value, str) or not value.strip():
        raise Unreadable("has no caption")
    return value.strip()


class Folder:
    """Image files, each with a text file of the same name next to it, or all listed in ``metadata.jsonl``.

    Each line of ``metadata.jsonl`` is an object: ``{"file_name": "a.png", "text": "a red square"}``.

    Raises:
        ValueError: there are no images, or the metadata cannot be read.
    """

    split: Split = "images"

    def __init__(self, folder: Path, caption_column: str = "text") -> None:
        self.folder, self.column = folder, caption_column
        if not folder.is_dir():
            raise ValueError(f"there is no folder {folder}")
        listing = folder / "metadata.jsonl"
        self.captions: dict[str, Any] | None = None
        if listing.exists():
            self.captions = dict(self._listed(listing))
            self.names = list(self.captions)
        else:
            files = (path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
            self.names = sorted(path.relative_to(folder).as_posix() for path in files)
        if not self.names:
            raise ValueError(f"{folder} holds no images ({', '.join(SUFFIXES)}) and no metadata.jsonl")
        self.count: int | None = len(self.names)
        self.settings = {"images": str(folder.resolve()), "caption_column": caption_column, "count": self.count}

    def _listed(self, path: Path) -> Iterator[tuple[str, Any]]:
        for number, text in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            if text.strip():
                try:
                    row = json.loads(text)
                    yield row["file_name"], row.get(self.column)
                except (ValueError, KeyError, TypeError, AttributeError):
                    raise ValueError(f'{path}, line {number}: no object with a "file_name" of an image') from None

    def read(self, start: int, part: int = 0, parts: int = 1) -> Iterator[Captioned]:
        """See `Reader.read`."""
        for name in self.names[part::parts][start:]:
            yield Captioned(name, partial(self._open, name))

    def _open(self, name: str) -> tuple[Picture, str]:
        path = self.folder / name
        try:
            if self.captions is not None:
                caption = caption_of(self.captions[name])
            else:
                caption = caption_of(path.with_suffix(".txt").read_bytes())
        except OSError:
            raise Unreadable(f"has no {path.with_suffix('.txt').name} next to it") from None
        try:
            return picture_of(path.read_bytes()), caption
        except OSError as error:
            raise Unreadable(f"cannot be read ({error.strerror})") from None


class Tars:
    """Tar shards of webdataset: files of the same name make a sample, an image and a ``.txt`` or ``.json``.

    The pattern is what webdataset takes (``data-{000..099}.tar``, a URL, ``pipe:`` and a command) or one with ``*``.
    webdataset divides the shards: first over parts, which are its nodes, then over the workers of each.

    Args:
        workers: processes that read shards side by side, for shards that come slowly; 0: this process reads them.

    Raises:
        ValueError: no file matches; while reading, a shard that is missing or not whole, or fewer shards than parts.
    """

    split: Split = "shards"

    def __init__(self, pattern: str, caption_column: str = "text", workers: int = 0) -> None:
        import webdataset

        self.column, self.workers = caption_column, workers
        is_glob = any(sign in pattern for sign in "*?[") and "://" not in pattern
        self.urls = sorted(glob.glob(pattern)) if is_glob else list(webdataset.shardlists.expand_urls(pattern))
        lost = [url for url in self.urls if ":" not in url and not Path(url).is_file()]
        if not self.urls or lost:
            raise ValueError(f"there is no shard {lost[0] if lost else pattern}")
        self.count: int | None = None
        self.settings: dict[str, Any] = {"webdataset": self.urls, "caption_column": caption_column}
        if workers > 1:
            # Their shards take turns.
            self.settings["workers"] = workers

    def read(self, start: int, part: int = 0, parts: int = 1) -> Iterator[Captioned]:
        """See `Reader.read`."""
        import webdataset

        with _as_node(part, parts):
            urls = list(webdataset.split_by_node(iter(self.urls)))
        if not urls:
            raise ValueError(f"{len(self.urls)} shards cannot be divided into {parts} parts: take no more than that")
        # In order: nothing is shuffled.
        stages = (webdataset.SimpleShardList(urls), webdataset.split_by_worker, webdataset.tarfile_to_samples())
        pipeline = webdataset.DataPipeline(*stages)
        samples = iter(DataLoader(pipeline, batch_size=None, num_workers=self.workers) if self.workers else pipeline)
        seen = 0
        while True:
            try:
                sample = next(samples, None)
            except (OSError, tarfile.TarError, EOFError, ValueError) as error:
                # webdataset adds the name of the shard to the arguments of the error; a worker's error comes with where
                # it happened in lines of their own.
                said = " ".join(said.splitlines()[-1] for said in error.args if isinstance(said, str) and said)
                raise ValueError(f"a shard, after sample {seen}, cannot be read: {said}") from None
            if sample is None:
                return
            seen += 1
            if seen > start:
                yield Captioned(sample["__key__"], partial(self._open, sample))

    def _open(self, sample: Mapping[str, Any]) -> tuple[Picture, str]:
        images = [name for name in sample if f".{name.rpartition('.')[2].lower()}" in SUFFIXES]
        if not images:
            raise Unreadable("has no image")
        caption = sample.get("txt")
        if caption is None and "json" in sample:
            try:
                caption = json.loads(sample["json"])[self.column]
            except (ValueError, KeyError, TypeError):
                raise Unreadable(f'its .json has no "{self.column}"') from None
        return picture_of(sample[images[0]]), caption_of(caption)


class Dataset:
    """A dataset of `datasets`: a hub id, a folder that the library reads, or one that ``save_to_disk`` wrote.

    Raises:
        ValueError: it cannot be loaded, or has no such columns.
    """

    split: Split = "images"

    def __init__(
        self, name: str, split: str = "train", image_column: str = "image", caption_column: str = "text"
    ) -> None:
        import datasets

        try:
            saved = (Path(name) / "state.json").exists() or (Path(name) / "dataset_dict.json").exists()
            data: Any = datasets.load_from_disk(name) if saved else datasets.load_dataset(name, split=split)
            data = data[split] if isinstance(data, dict) else data
        except (OSError, ValueError, KeyError, datasets.exceptions.DatasetsError) as error:
            raise ValueError(f"the dataset {name}, split {split}, cannot be loaded: {one_line(error)}") from None
        if lost := sorted({image_column, caption_column} - set(data.column_names)):
            raise ValueError(f"{name} has no column {lost[0]}; it has: {', '.join(data.column_names)}")
        # Not decoded by `datasets`: there, a damaged image ends the reading.
        self.data = data.cast_column(image_column, datasets.Image(decode=False))
        self.image, self.caption = image_column, caption_column
        self.count: int | None = len(self.data)
        self.settings = {
            "dataset": name,
            "split": split,
            "image_column": image_column,
            "caption_column": caption_column,
            "count": self.count,
        }

    def read(self, start: int, part: int = 0, parts: int = 1) -> Iterator[Captioned]:
        """See `Reader.read`."""
        for number in range(part, len(self.data), parts)[start:]:
            yield Captioned(f"row {number}", partial(self._open, number))

    def _open(self, number: int) -> tuple[Picture, str]:
        row = self.data[number]
        caption, held = caption_of(row[self.caption]), row[self.image] or {}
        content = held.get("bytes")
        try:
            content = Path(held["path"]).read_bytes() if content is None and held.get("path") else content
        except OSError as error:
            raise Unreadable(f"cannot be read ({error.strerror})") from None
        if not content:
            raise Unreadable("has no image")
        return picture_of(content), caption


class MadeScenes:
    """Scenes that are made on the spot: image ``i`` depends on (seed, i) alone."""

    split: Split = "images"

    def __init__(self, count: int, seed: int = 0) -> None:
        self.count: int | None = count
        self.seed = seed
        self.settings = {"scenes": count, "seed": seed}

    def read(self, start: int, part: int = 0, parts: int = 1) -> Iterator[Captioned]:
        """See `Reader.read`."""
        for number in range(part, self.count or 0, parts)[start:]:
            yield Captioned(f"scene {number}", partial(self._open, number))

    def _open(self, number: int) -> tuple[Picture, str]:
        rng = seeds.generator(self.seed, Seed(Stage.CACHE, number), Purpose.PICTURE)
        caption = training_caption(rng)
        return render(caption, rng), str(caption)


@contextlib.contextmanager
def _as_node(number: int, nodes: int) -> Iterator[None]:
    """Within the context, this process is one of several nodes, in the variables that webdataset reads that from."""
    told = {"RANK": str(number), "WORLD_SIZE": str(nodes)}
    before = {name: os.environ.get(name) for name in told}
    os.environ.update(told)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
