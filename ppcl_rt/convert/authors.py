"""Checkpoints of the method's authors: packaged folders and training files in, packaged folders out.

What a layout means is the family's to know (`ppcl_rt.families.registry.authors`). Here it is streamed: one block is in
memory at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, Literal

import torch

from ppcl_rt.checkpoint.converted import ConvertedCheckpoint
from ppcl_rt.checkpoint.places import locate
from ppcl_rt.checkpoint.reader import Checkpoint
from ppcl_rt.checkpoint.writer import check_apart, write_plain, write_shards
from ppcl_rt.convert.training_files import read_training_file
from ppcl_rt.families import registry
from ppcl_rt.files import refusing_briefly
from ppcl_rt.model.pluggable import Pluggable
from ppcl_rt.planning.interval import Interval


def import_packaged(
    source: str | Path, folder: str | Path, dialect: Literal["newer", "older"] | None = None
) -> ConvertedCheckpoint:
    """Write a packaged folder as a checkpoint of one plan.

    Args:
        source: the folder, or a hub id.
        folder: to write; what was there is replaced once the new checkpoint is complete.
        dialect: of the text maps; None to tell it by ``config.json`` and the weights.

    Returns:
        What was written, as it was read.

    Raises:
        ValueError: the source is not in the authors' layout, contradicts itself, or is of a family without one.
    """
    with refusing_briefly():
        checkpoint = Checkpoint(locate(source))
        model = _class_of(checkpoint)
        layout = registry.authors(model)
        if not layout.is_packaged(checkpoint):
            kind = "a stock checkpoint" if checkpoint.catalog is None else "a pluggable checkpoint already"
            raise ValueError(f"{source} is {kind}, not in the layout of the authors: `ppcl_rt.load` takes it as it is")
        converted: ConvertedCheckpoint = layout.presented(model, checkpoint, dialect)
        return _write(model, converted, source, folder)


def import_training(
    file: str | Path,
    folder: str | Path,
    base: str | Path,
    intervals: Sequence[Interval],
    text_runs: Sequence[Interval] = (),
    exits: Literal["published", "intended"] | None = None,
    dialect: Literal["newer", "older"] | None = None,
) -> ConvertedCheckpoint:
    """Write what a training file holds, on top of the stock model, as a checkpoint of one plan.

    Args:
        file: a ``.bin`` of a depth run (students) or of a width run (students and maps).
        folder: to write, as for `import_packaged`.
        base: stock checkpoint that training began with: a folder or a hub id.
        intervals: what each student stands for, in their order; the file does not say.
        text_runs: ``s..e``: blocks after s, up to e, do not update the text.
        exits: which map follows each text run: the first in all, as the authors' packager writes it, or its own.
        dialect: of the text maps; None to tell it by the weights.

    Returns:
        What was written, as it was read.

    Raises:
        ValueError: the file holds more than tensors, or does not fit the rest.
    """
    with refusing_briefly():
        checkpoint = Checkpoint(locate(base))
        model = _class_of(checkpoint)
        layout = registry.authors(model)
        if checkpoint.catalog is not None or layout.is_packaged(checkpoint):
            raise ValueError(f"{base} is no stock checkpoint: training files go on top of the one they began with")
        lists = read_training_file(Path(file), layout.STUDENTS, layout.LISTS)
        converted: ConvertedCheckpoint = layout.assembled(
            model, checkpoint, lists, intervals, text_runs, exits, dialect
        )
        return _write(model, converted, base, folder)


def write_authors(model: Pluggable, folder: str | Path) -> None:
    """Write the plan that a model runs in the authors' layout: blocks that remain, numbered anew; newer dialect.

    ControlNet residuals are spread over the blocks that remain then.

    Args:
        folder: to write, as for `import_packaged`.

    Raises:
        ValueError: the layout cannot hold the plan (narrower heads, channels or ranks, a linear map for one MLP of
            two), or none is known of the family; nothing was written.
    """
    config, shards = registry.authors(type(model)).layout(model)
    says = f"{len(model.plan.blocks)} blocks, in the layout of the authors of PPCL"
    write_plain(folder, config, shards, model.catalog, says)


def _class_of(checkpoint: Checkpoint) -> Any:
    return registry.of_class(checkpoint.config.get("_class_name"), checkpoint.folder)


def _write(model: Any, converted: ConvertedCheckpoint, source: str | Path, folder: str | Path) -> ConvertedCheckpoint:
    """Write a converted checkpoint, a file for each block."""
    check_apart(Path(folder), converted.folder)
    # Checks everything that headers say, before anything is written.
    config = model.without_blocks(converted).one_plan_config
    catalog = converted.catalog
    assert catalog is not None, "a converted checkpoint has a plan"
    homes = ("students", "text_runs", *model.block_lists)
    write_shards(folder, config, _shards(converted, homes), lambda: catalog)
    return converted


def _shards(converted: ConvertedCheckpoint, homes: Sequence[str]) -> Iterator[dict[str, torch.Tensor]]:
    """What lies outside the blocks together, then each block, student or text run."""

    def home(name: str) -> str:
        path = next((f"{path}." for path in homes if name.startswith(f"{path}.")), "")
        return path + name.removeprefix(path).partition(".")[0] if path else ""

    for _, names in groupby(sorted(converted.names, key=home), key=home):
        yield {name: converted.read(name) for name in names}
