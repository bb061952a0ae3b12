"""What others publish, made a folder of diffusers, which everything here takes as its source."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch

from ppcl_rt.checkpoint.card import Origin, read_origin
from ppcl_rt.checkpoint.places import locate_config, locate_file, locate_source
from ppcl_rt.checkpoint.writer import check_apart, in_shards, write_plain
from ppcl_rt.convert.adapters import read_adapters
from ppcl_rt.convert.naming import family_of, guessed_config, under_stock_names
from ppcl_rt.convert.sources import open_source, read_config
from ppcl_rt.model.factors import Factors

# Of a file: as much is in memory at once, besides what is converted as a whole.
_SHARD = "5GB"


def convert(
    source: str | Path,
    out: Path,
    config: str | Path | None = None,
    fuse: Sequence[tuple[str | Path, float]] = (),
    dtype: torch.dtype | None = None,
) -> None:
    """Write a folder that diffusers' class of a family loads, a file at a time.

    Args:
        source: a folder of diffusers in any float, of a transformer or a pipeline, or a single file under diffusers'
            or the original names, GGUF too; here or on the hub: ``ORG/NAME``, of a file ``ORG/NAME/FILE``.
        out: folder to write; one that is there already is replaced once the new one is complete.
        config: folder or hub id of a model with the same settings, or of its pipeline; None for what the source says,
            or else for the defaults of the family that has such tensors.
        fuse: LoRA files, here or ``ORG/NAME/FILE`` on the hub, and how much of each to add.
        dtype: of the weights; None as they are stored, floats of eight bits as bfloat16.

    Raises:
        ValueError: the source is of another model or not whole, or an adapter is; nothing is written.
    """
    path = locate_source(source)
    check_apart(out, path)
    opened = open_source(path, dtype or torch.bfloat16)
    beside = None if config is None else locate_config(config)
    settings = (
        read_config(beside) if beside is not None else opened.config or guessed_config(opened.tensors, opened.name)
    )
    family = family_of(settings, opened.name if beside is None else str(config))
    tensors = under_stock_names(opened.tensors, family, settings, opened.name)
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    adapters = [(locate_file(file), scale) for file, scale in fuse]
    added = [read_adapters(file, family, shapes, scale) for file, scale in adapters]
    origin = opened.origin
    if beside is not None and origin == Origin():
        origin = read_origin(beside)
    says = f"{path.name}" + "".join(f" with {file.name} at {scale:g}" for file, scale in adapters)
    public = {name: value for name, value in settings.items() if not name.startswith("_")}
    stock = {"_class_name": family.stock_name, **public}
    write_plain(out, stock, _finished(tensors, added, dtype), origin, says)


def _finished(
    tensors: Mapping[str, torch.Tensor], added: Sequence[Mapping[str, Factors]], dtype: torch.dtype | None
) -> Iterator[dict[str, torch.Tensor]]:
    """The files' tensors in their last dtype, adapters added."""
    for shard in in_shards(tensors, _SHARD):
        finished = {}
        for name, tensor in shard.items():
            floats = tensor.is_floating_point()
            whole = tensor.bfloat16() if floats and tensor.itemsize == 1 else tensor
            # Added before it is rounded.
            wide = whole.float() if any(name in each for each in added) else whole
            for each in added:
                wide = each[name].added_to(wide) if name in each else wide
            finished[name] = wide.to((dtype or whole.dtype) if floats else whole.dtype).clone()
        yield finished
