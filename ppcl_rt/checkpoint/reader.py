"""Checkpoint folders: ``config.json`` with the catalog in it, and safetensors under diffusers' names.

Reading is by tensor: what a plan does not need is never read, and what is read is checked against the catalog's SHA-256
first. Writing goes to a folder beside, which is renamed into place once it is complete.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ppcl_rt.planning.catalog import Catalog
from ppcl_rt.planning.plan import read_json

CONFIG = "config.json"
WEIGHTS = "diffusion_pytorch_model.safetensors"
INDEX = f"{WEIGHTS}.index.json"
# Where the catalog lies in config.json. A leading underscore makes diffusers pass over it without a word.
CATALOG_KEY = "_ppcl"


def digest(tensor: torch.Tensor) -> str:
    """SHA-256 of a tensor's bytes."""
    held = tensor.detach().cpu().contiguous()
    return hashlib.sha256(held.reshape(-1).view(torch.uint8).numpy().data).hexdigest()


def locate(path: str | Path, subfolder: str | None = None, **hub: Any) -> Path:
    """Find a checkpoint folder: a local one, or a hub id whose files are fetched.

    Raises:
        ValueError: neither.
    """
    if Path(path).is_dir():
        folder = Path(path)
    else:
        from huggingface_hub import snapshot_download

        prefix = f"{subfolder}/" if subfolder else ""
        wanted = [f"{prefix}{CONFIG}", f"{prefix}diffusion_pytorch_model*"]
        try:
            folder = Path(snapshot_download(str(path), allow_patterns=wanted, **hub))
        except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError):
            raise ValueError(f"{path} is neither a checkpoint folder nor a hub id that can be reached") from None
    folder = folder / subfolder if subfolder else folder
    if not (folder / CONFIG).is_file():
        raise ValueError(f"{folder} is no checkpoint: it has no {CONFIG}")
    return folder


class Checkpoint:
    """A checkpoint folder, opened for reading.

    Attributes:
        folder: where it lies.
        config: what diffusers' class takes, catalog left out.
        catalog: None for a stock checkpoint, which has none.

    Raises:
        ValueError: a file is missing, cut short or contradicts another; one line says which and what to do.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        config = _json_object(folder / CONFIG)
        catalog = config.pop(CATALOG_KEY, None)
        self.config: dict[str, Any] = config
        self.catalog = None
        if catalog is not None:
            self.catalog = read_json(Catalog, json.dumps(catalog), f"{folder / CONFIG} holds a broken catalog")
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._files = self._find_tensors()
        if self.catalog is not None:
            self._compare(self.catalog.checksums)

    def _find_tensors(self) -> dict[str, Path]:
        """Tensor name -> file, from the headers of all files."""
        index = self.folder / INDEX
        mapping: Any = {}
        if index.is_file():
            mapping = _json_object(index).get("weight_map")
            if not isinstance(mapping, dict) or not all(isinstance(name, str) for name in mapping.values()):
                raise ValueError(f'{index} has no "weight_map" from tensor to file: fetch it again')
            names = sorted(set(mapping.values()))
        else:
            names = [WEIGHTS]
        found: dict[str, Path] = {}
        for name in names:
            path = self.folder / name
            # A file of a hub's cache may be a link, so the name is judged, not where it leads.
            if Path(name).name != name:
                raise ValueError(f"{index} points outside its folder, to {name}: do not use this checkpoint")
            if not path.is_file():
                raise ValueError(f"{path} is missing: fetch the checkpoint again")
            try:
                with safe_open(path, framework="pt") as file:
                    for tensor in file.keys():  # noqa: SIM118 - it has keys, but cannot be iterated
                        found[tensor] = path
                        self._shapes[tensor] = tuple(file.get_slice(tensor).get_shape())
            except SafetensorError as error:
                raise ValueError(f"{path} is not whole ({line(error)}): fetch it again") from None
        if lost := sorted(set(mapping) - set(found)):
            raise ValueError(f"{index} lists {lost[0]}, which no file holds: fetch the checkpoint again")
        return found

    def _compare(self, checksums: Mapping[str, str]) -> None:
        if lost := sorted(set(checksums) - set(self._files)):
            raise ValueError(f"the catalog of {self.folder} lists {lost[0]}, which no file holds ({len(lost)} such)")
        if more := sorted(set(self._files) - set(checksums)):
            raise ValueError(f"{self.folder} holds {more[0]}, which its catalog does not list ({len(more)} such)")

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all tensors."""
        return tuple(self._files)

    def __contains__(self, name: str) -> bool:
        return name in self._files

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, from the file's header.

        Raises:
            ValueError: there is no such tensor.
        """
        if name not in self._shapes:
            raise ValueError(f"{self.folder} holds no tensor {name}, which its catalog promises")
        return self._shapes[name]

    def read(self, name: str) -> torch.Tensor:
        """Read one tensor, in the dtype that it is stored in.

        Raises:
            ValueError: missing, or altered since the catalog was made.
        """
        self.shape(name)
        try:
            with safe_open(self._files[name], framework="pt") as file:
                tensor: torch.Tensor = file.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{self._files[name]} is not whole ({line(error)}): fetch it again") from None
        if self.catalog is not None and digest(tensor) != self.catalog.checksums[name]:
            raise ValueError(f"{self._files[name]}: {name} was altered since the catalog was made: fetch it again")
        return tensor


def write_checkpoint(
    folder: str | Path,
    config: Mapping[str, Any],
    catalog: Catalog,
    tensors: Mapping[str, torch.Tensor],
    max_shard_size: int | str = "10GB",
) -> Catalog:
    """Write a checkpoint folder; one that is there already is replaced once the new one is complete.

    Args:
        config: what diffusers' class takes.
        catalog: its checksums are made anew.
        tensors: all tensors, by name.
        max_shard_size: bytes of a file, as diffusers takes it.

    Returns:
        The catalog as written.
    """
    folder = Path(folder)
    held = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    catalog = catalog.model_copy(update={"checksums": {name: digest(tensor) for name, tensor in held.items()}})
    # A copy would keep what it had cached of the old checksums.
    catalog = Catalog.model_validate(catalog.model_dump())
    partial = folder.parent / f".{folder.name}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        split = split_torch_state_dict_into_shards(
            held,
            max_shard_size=max_shard_size,
            filename_pattern=WEIGHTS.replace(".safetensors", "{suffix}.safetensors"),
        )
        for name, members in split.filename_to_tensors.items():
            save_file({member: held[member] for member in members}, partial / name, metadata={"format": "pt"})
        if split.is_sharded:
            index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
            (partial / INDEX).write_text(json.dumps(index, indent=2) + "\n")
        content = {**config, CATALOG_KEY: catalog.model_dump(mode="json")}
        (partial / CONFIG).write_text(json.dumps(content, indent=1) + "\n")
        _move_into_place(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return catalog


def _move_into_place(partial: Path, folder: Path) -> None:
    """Rename ``partial`` to ``folder``; of what was there, all but the old checkpoint's files stay (a log, a card)."""
    if not folder.exists():
        partial.rename(folder)
        return
    # The old folder is whole under this name until the new one is in place.
    old = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    folder.rename(old)
    partial.rename(folder)
    for path in old.iterdir():
        if path.name != CONFIG and not path.name.startswith("diffusion_pytorch_model"):
            os.replace(path, folder / path.name)
    shutil.rmtree(old)


def _json_object(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read as JSON ({line(error)}): fetch it again") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} is no JSON object: fetch it again")
    return content


def line(error: Exception) -> str:
    """What an error says, in one line."""
    return " ".join(str(error).split())
