"""Writing of checkpoint folders: to a temporary folder, which is renamed into place once it is complete."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file

from ppcl_rt.checkpoint import card
from ppcl_rt.checkpoint.names import CATALOG_KEY, CHECKSUM_KEY, CONFIG, INDEX, MOST_JSON, WEIGHTS, config_digest, digest
from ppcl_rt.files import replacing_folder
from ppcl_rt.planning.catalog import Catalog


def write_checkpoint(
    folder: str | Path,
    config: Mapping[str, Any],
    catalog: Catalog,
    tensors: Mapping[str, torch.Tensor],
    max_shard_size: int | str = "10GB",
) -> Catalog:
    """Write a checkpoint folder; one that is there already is replaced once the new one is complete.

    A model card that is there stays; else one is written with the catalog's licence and base model.

    Args:
        config: what diffusers' class takes.
        catalog: its checksums are made anew.
        tensors: all tensors, by name.
        max_shard_size: bytes of a file, as diffusers takes it.

    Returns:
        The catalog as written.

    Raises:
        ValueError: the catalog is larger than a reader takes; what was there before is kept.
    """
    folder = Path(folder)
    held = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    checksums = {name: digest(tensor) for name, tensor in held.items()}
    catalog = catalog.model_copy(update={"checksums": checksums, "checksums_of": "tensors"})
    # A copy would keep what it had cached of the old checksums.
    catalog = Catalog.model_validate(catalog.model_dump())
    with replacing_folder(folder, _is_of_a_checkpoint) as partial:
        split = split_torch_state_dict_into_shards(
            held,
            max_shard_size=max_shard_size,
            filename_pattern=WEIGHTS.replace(".safetensors", "{suffix}.safetensors"),
        )
        for name, members in split.filename_to_tensors.items():
            save_file({member: held[member] for member in members}, partial / name, metadata=card.metadata(catalog))
            _sort_metadata(partial / name)
        if split.is_sharded:
            index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
            (partial / INDEX).write_text(json.dumps(index, indent=2) + "\n")
        # Through JSON: the checksum is of what a reader finds, lists where a config holds tuples.
        content = json.loads(json.dumps({**config, CATALOG_KEY: catalog.model_dump(mode="json")}))
        content[CHECKSUM_KEY] = config_digest(content)
        text = json.dumps(content, indent=1) + "\n"
        if len(text) > MOST_JSON:
            raise ValueError(f"{CONFIG} would have {len(text)} bytes, at most {MOST_JSON} are read: leave out choices")
        (partial / CONFIG).write_text(text)
        if not (folder / card.CARD).is_file():
            card.write_card(partial, catalog)
    return catalog


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
