"""Checkpoints in other forms than they are written in, and changes by hand that checksums then cover or do not."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from ppcl_rt.checkpoint.names import CATALOG_KEY, CHECKSUM_KEY, CONFIG, WEIGHTS, config_digest, digest
from ppcl_rt.planning.plan import text_maps


def change_config(folder: Path, change: Callable[[dict[str, Any]], Any], sealed: bool = True) -> None:
    """Edit ``config.json``; ``sealed``: with a checksum made anew, so that only what it then says is judged."""
    config = json.loads((folder / CONFIG).read_text())
    change(config)
    if sealed and CHECKSUM_KEY in config:
        # Through JSON: tests set tuples and infinities.
        config = json.loads(json.dumps(config))
        config[CHECKSUM_KEY] = config_digest(config)
    (folder / CONFIG).write_text(json.dumps(config))


def split(content: bytes) -> tuple[dict[str, Any], bytes]:
    """The header of a safetensors file, and its data."""
    (length,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def join(header: bytes, data: bytes) -> bytes:
    """A safetensors file of a header and data."""
    return struct.pack("<Q", len(header)) + header + data


def change_header(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Rewrite the header of a safetensors file; the data stays as it was."""
    header, data = split((folder / WEIGHTS).read_bytes())
    change(header)
    (folder / WEIGHTS).write_bytes(join(json.dumps(header).encode(), data))


def as_format_1(folder: Path) -> None:
    """Rewrite a checkpoint of one file as it was written before widths were mappings and families had specs."""

    def old(name: str) -> str:
        return name.replace(".replacements.", ".narrow.")

    tensors = load_file(folder / WEIGHTS)
    save_file({old(name): tensor for name, tensor in tensors.items()}, folder / WEIGHTS)
    config = json.loads((folder / CONFIG).read_text())
    catalog = config[CATALOG_KEY]
    architecture = catalog.pop("architecture")
    [blocks], [spec] = architecture["lists"], architecture["kinds"].values()
    catalog["shape"] = {
        "depth": blocks["depth"],
        "dim": architecture["dim"],
        "head_dim": spec["head_dim"],
        "width": [group["count"] for group in spec["groups"].values()],
        "outer_params": architecture["outer_params"],
    }
    catalog["format"] = 1
    del catalog["reference"], catalog["checksums_of"]
    catalog["checksums"] = {old(name): digest(tensor, "bytes") for name, tensor in tensors.items()}
    # What never was in a file of that format.
    del config[CHECKSUM_KEY]
    (folder / CONFIG).write_text(json.dumps(config))


def as_small(made):
    """Tensors of a checkpoint in the small form, and those that its weights then are; bases by hand."""
    catalog, generator = made.catalog, torch.Generator().manual_seed(7)
    small, whole = dict(made.tensors), dict(made.tensors)

    def store(path, base, rank=2, home=None):
        rows, columns = whole[f"{path}.weight"].shape
        up = torch.randn(rows, rank, generator=generator) * 0.2
        down = torch.randn(rank, columns, generator=generator) * 0.2
        small.pop(f"{path}.weight", None)
        small[f"{home or path}.up"], small[f"{home or path}.down"] = up, down
        whole[f"{path}.weight"] = up @ down if base is None else base + up @ down

    for student in catalog.students:
        for part in catalog.spec(0).parts:
            # Students of these checkpoints start from the first block of their interval.
            first = f"transformer_blocks.{student.interval.first}.{part.path}.weight"
            store(f"students.{student.interval.key}.{part.path}", whole[first])
    prefixes = [(f"transformer_blocks.{n}", widths) for n, widths in enumerate(catalog.blocks)]
    prefixes += [(f"students.{student.interval.key}", student.widths) for student in catalog.students]
    for prefix, widths in prefixes:
        for output in catalog.spec(0).outputs:
            group, offset, unit = output.segment
            for legal in widths.of(group)[1:]:
                order = whole[f"{prefix}.order.{group}"][: legal.units].tolist()
                columns = [offset + n * unit + k for n in order for k in range(unit)]
                path = f"{prefix}.replacements.{catalog.spec(0).replacement(output.name, legal.units)}"
                store(path, whole[f"{prefix}.{output.part.path}.weight"][:, columns] if legal.units else None)
    maps = {}
    for run in (run.interval for run in catalog.text_runs):
        for name in text_maps(run, catalog.architecture.depth):
            path = f"text_runs.{run.key}.{name}"
            home = f"text_runs.{run.first}.{name if name != 'text' else f'text_{run.last}'}"
            if home in maps:
                del small[f"{path}.weight"]
                whole |= {f"{path}.{which}": whole[f"{maps[home]}.{which}"].clone() for which in ("weight", "bias")}
            else:
                store(path, None, home=home)
            small[f"{home}.bias"] = whole[f"{path}.bias"]
            del small[f"{path}.bias"]
            maps.setdefault(home, path)
    return small, whole
