"""Headers of safetensors files: which tensors a folder holds, and what they are, without reading them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open

from ppcl_rt.checkpoint.names import MOST_JSON, of_variant, variants_in
from ppcl_rt.files import NoWeightsError, one_line


class Header(NamedTuple):
    """What a file says of a tensor.

    Attributes:
        path: the file.
        shape: of the tensor.
        dtype: as safetensors writes it: ``BF16``.
    """

    path: Path
    shape: tuple[int, ...]
    dtype: str


def tensor_headers(folder: Path, weights: str, variant: str | None = None) -> dict[str, Header]:
    """Tensor name -> header, of all files of a model.

    Args:
        folder: where the files lie.
        weights: name of the one file; several are listed in ``weights`` + ``.index.json``.
        variant: as diffusers' ``variant=``, part of the names of files (`of_variant`).

    Raises:
        NoWeightsError: there are no weights of this variant.
        ValueError: a file is missing, cut short, or contradicts the index.
    """
    index = folder / of_variant(f"{weights}.index.json", variant)
    mapping: Any = {}
    if index.is_file():
        mapping = json_object(index).get("weight_map")
        if not isinstance(mapping, dict) or not all(isinstance(name, str) for name in mapping.values()):
            raise ValueError(f'{index} has no "weight_map" from tensor to file: fetch it again')
        names = sorted(set(mapping.values()))
    else:
        names = [of_variant(weights, variant)]
        if not (folder / names[0]).is_file():
            raise NoWeightsError(_missing(folder / names[0], variant))
    found: dict[str, Header] = {}
    for name in names:
        path = folder / name
        # A file of a hub's cache may be a link, so the name is judged, not where it leads.
        if Path(name).name != name:
            raise ValueError(f"{index} points outside its folder, to {name}: do not use this checkpoint")
        if not path.is_file():
            raise ValueError(f"{path} is missing: fetch the checkpoint again")
        with path.open("rb") as start:
            if (length := int.from_bytes(start.read(8), "little")) > MOST_JSON:
                raise ValueError(f"{path} is not whole (a header of {length} bytes): fetch it again")
        try:
            with safe_open(path, framework="pt") as file:
                for tensor in file.keys():  # noqa: SIM118 - it has keys, but cannot be iterated
                    header = file.get_slice(tensor)
                    found[tensor] = Header(path, tuple(header.get_shape()), header.get_dtype())
        except SafetensorError as error:
            raise ValueError(f"{path} is not whole ({one_line(error)}): fetch it again") from None
    if lost := sorted(set(mapping) - set(found)):
        raise ValueError(f"{index} lists {lost[0]}, which no file holds: fetch the checkpoint again")
    return found


def _missing(path: Path, variant: str | None) -> str:
    """Say that weights are missing, in diffusers' words too: programs look for these."""
    there = sorted(variants_in(path.parent) - {variant}, key=str)
    ways = [f'say variant="{each}"' if each else "leave out variant" for each in there]
    theirs = f"Error no file named {path.name.split('.')[0]}.bin found in directory {path.parent}"
    return f"{theirs}: {path.name} is missing, {' or '.join(ways or ['fetch the checkpoint again'])}"


def json_object(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        ValueError: there is none, a key is there twice, or a number is none of JSON.
    """
    try:
        # As much as fits, not as much as the file says that it holds.
        with path.open("rb") as file:
            text = file.read(MOST_JSON + 1)
    except OSError as error:
        raise ValueError(f"{path} cannot be read as JSON ({one_line(error)}): fetch it again") from None
    return json_object_of(text, path)


def json_object_of(text: str | bytes, where: object) -> dict[str, Any]:
    """The same of a text that lies somewhere else; ``where`` is for messages.

    Raises:
        ValueError: as `json_object`.
    """
    try:
        if len(text) > MOST_JSON:
            raise ValueError(f"it has more than {MOST_JSON} bytes")
        content = json.loads(text, object_pairs_hook=_unique, parse_constant=_no_number)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} cannot be read as JSON ({one_line(error)}): fetch it again") from None
    if not isinstance(content, dict):
        raise ValueError(f"{where} is no JSON object: fetch it again")
    return content


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {next(key for key in keys if keys.count(key) > 1)} is there twice")
    return content


def _no_number(constant: str) -> None:
    raise ValueError(f"{constant} is no number of JSON")
