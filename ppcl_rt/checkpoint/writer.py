"""Writing of checkpoint folders: to a temporary folder, which is renamed into place once it is complete."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file

from ppcl_rt.checkpoint import card
from ppcl_rt.checkpoint.names import (
    CATALOG_KEY,
    CHECKSUM_KEY,
    CONFIG,
    INDEX,
    MOST_JSON,
    WEIGHTS,
    config_digest,
    digest,
    of_variant,
    variants_in,
)
from ppcl_rt.files import replacing, replacing_folder
from ppcl_rt.planning.catalog import Catalog


def check_apart(out: Path, source: Path) -> None:
    """Refuse a folder to write where that would harm the source, or somebody's file.

    Raises:
        ValueError: one lies in the other, they are one, or ``out`` is a file.
    """
    there, read = out.resolve(), source.resolve()
    if there == read or read in there.parents or there in read.parents:
        raise ValueError(f"{out} lies in {source} or around it: write to another folder")
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file: name a folder to write")


def write_checkpoint(
    folder: str | Path,
    config: Mapping[str, Any],
    catalog: Catalog,
    tensors: Mapping[str, torch.Tensor],
    max_shard_size: int | str = "10GB",
    variant: str | None = None,
) -> Catalog:
    """Write a checkpoint folder; one that is there already is replaced once the new one is complete.

    A model card that is there stays; else one is written with the catalog's licence and base model.

    Args:
        config: what diffusers' class takes.
        catalog: its checksums are made anew.
        tensors: all tensors, by name.
        max_shard_size: bytes of a file, as diffusers takes it.
        variant: part of the names of the files, as diffusers takes it.

    Returns:
        The catalog as written.

    Raises:
        ValueError: the catalog is larger than a reader takes, or the folder holds weights of another variant; what was
            there before is kept.
    """
    held = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    return write_shards(folder, config, in_shards(held, max_shard_size), lambda: catalog, variant)


def write_shards(
    folder: str | Path,
    config: Mapping[str, Any],
    shards: Iterable[Mapping[str, torch.Tensor]],
    catalog: Callable[[], Catalog],
    variant: str | None = None,
) -> Catalog:
    """Write a checkpoint folder file by file, so that the tensors of one file are in memory at once.

    Args:
        config, variant, and what is returned and raised: as of `write_checkpoint`.
        shards: the tensors of each file, by name; nobody but the file has to hold on to them.
        catalog: called before the first file, for its licence and base model, and again once all are written; its
            checksums are made anew.
    """
    folder = Path(folder)
    if others := sorted(map(str, variants_in(folder) - {variant})):
        # config.json holds checksums, and those of one variant are not those of the other.
        asked = "without a variant" if variant is None else f"of variant {variant}"
        raise ValueError(f"{folder} holds weights of variant {others[0]}, weights {asked} need a folder of their own")
    with replacing_folder(folder, _is_of_a_checkpoint) as partial:
        checksums = _write_files(partial, shards, card.metadata(catalog()), variant)
        made = catalog().model_copy(update={"checksums": checksums, "checksums_of": "tensors"})
        # A copy would keep what it had cached of the old checksums.
        made = Catalog.model_validate(made.model_dump())
        _write_config(partial / CONFIG, config, made)
        if not (folder / card.CARD).is_file():
            card.write_card(partial, made)
    return made


def write_plain(
    folder: str | Path,
    config: Mapping[str, Any],
    shards: Iterable[Mapping[str, torch.Tensor]],
    origin: card.Origin | Catalog,
    says: str,
) -> None:
    """Write a folder in a layout of others, without a catalog, as `write_shards` writes one of ours.

    Args:
        origin: whose licence and base model the files and the model card name.
        says: what this is, for the card.
    """
    folder = Path(folder)
    with replacing_folder(folder, _is_of_a_checkpoint) as partial:
        _write_files(partial, shards, card.metadata(origin))
        (partial / CONFIG).write_text(json.dumps(dict(config), indent=1) + "\n")
        if not (folder / card.CARD).is_file():
            card.write_plain_card(partial, origin, str(config["_class_name"]), says)


def in_shards(
    tensors: Mapping[str, torch.Tensor], max_shard_size: int | str = "10GB"
) -> Iterator[dict[str, torch.Tensor]]:
    """Divide tensors among files of at most so many bytes, as diffusers takes it."""
    # Without memory: tensors that are mapped from one file would pass for one and the same.
    empty = {name: torch.empty_like(tensor, device="meta") for name, tensor in tensors.items()}
    split = split_torch_state_dict_into_shards(empty, max_shard_size=max_shard_size)
    return ({name: tensors[name] for name in members} for members in split.filename_to_tensors.values())


def write_file(path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> None:
    """Write one safetensors file, the same bytes each time; a file that is there is replaced once this one is whole.

    Raises:
        ValueError: it cannot be written.
    """
    with replacing(path) as temporary:
        save_file({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, temporary, dict(metadata))
        _sort_metadata(temporary)


def _write_files(
    partial: Path,
    shards: Iterable[Mapping[str, torch.Tensor]],
    metadata: Mapping[str, str],
    variant: str | None = None,
) -> dict[str, str]:
    """Write files one at a time, and an index where there are several; returns the checksum of each tensor."""
    checksums: dict[str, str] = {}
    files: list[tuple[str, ...]] = []
    total = 0
    for shard in shards:
        held = {name: tensor.detach().cpu().contiguous() for name, tensor in shard.items()}
        if twice := set(held) & set(checksums):
            raise ValueError(f"two files would hold {min(twice)}")
        checksums |= {name: digest(tensor) for name, tensor in held.items()}
        total += sum(tensor.nbytes for tensor in held.values())
        # How many there will be, which is part of their names, is known at the end.
        save_file(held, partial / str(len(files)), metadata=dict(metadata))
        _sort_metadata(partial / str(len(files)))
        files.append(tuple(held))
        del held, shard
    if len(files) == 1:
        (partial / "0").rename(partial / of_variant(WEIGHTS, variant))
    else:
        _write_index(partial, files, total, variant)
    return checksums


def _write_index(partial: Path, files: Sequence[Collection[str]], total: int, variant: str | None) -> None:
    """Name numbered files as hubs do, and write which of them holds what."""
    places: dict[str, str] = {}
    for number, members in enumerate(files):
        name = of_variant(WEIGHTS, variant).replace(
            ".safetensors", f"-{number + 1:05d}-of-{len(files):05d}.safetensors"
        )
        (partial / str(number)).rename(partial / name)
        places |= dict.fromkeys(members, name)
    index = {"metadata": {"total_size": total}, "weight_map": places}
    (partial / of_variant(INDEX, variant)).write_text(json.dumps(index, indent=2) + "\n")


def _write_config(path: Path, config: Mapping[str, Any], catalog: Catalog) -> None:
    # Through JSON: the checksum is of what a reader finds, lists where a config holds tuples.
    content = json.loads(json.dumps({**config, CATALOG_KEY: catalog.model_dump(mode="json")}))
    content[CHECKSUM_KEY] = config_digest(content)
    text = json.dumps(content, indent=1) + "\n"
    if len(text) > MOST_JSON:
        raise ValueError(f"{CONFIG} would have {len(text)} bytes, at most {MOST_JSON} are read: leave out choices")
    path.write_text(text)


def _sort_metadata(path: Path) -> None:
    """Put the metadata of a safetensors file in order: its library writes them in another one each time."""
    with path.open("r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        assert len(text) <= length, "the same JSON in another order"
        file.seek(8)
        file.write(text.ljust(length))


def _is_of_a_checkpoint(name: str) -> bool:
    """Whether a file belongs to the old checkpoint: anything else in the folder is somebody's own."""
    return name == CONFIG or name.startswith("diffusion_pytorch_model")
