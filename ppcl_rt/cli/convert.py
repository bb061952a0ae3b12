"""``ppcl convert``: what others publish, made a folder of diffusers."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated

import typer

from ppcl_rt.cli.values import float_of
from ppcl_rt.convert.convert import convert as write_converted


def convert(
    source: Annotated[
        str, typer.Argument(help="single file or folder of diffusers; ORG/NAME or ORG/NAME/FILE on a hub")
    ],
    out: Annotated[Path, typer.Argument(help="folder to write")],
    config: Annotated[str | None, typer.Option(help="model or pipeline with the same settings: folder, hub id")] = None,
    fuse: Annotated[list[str] | None, typer.Option(help="LORA[:scale], a LoRA file to add; may be repeated")] = None,
    dtype: Annotated[str | None, typer.Option(help="of the weights: bfloat16; else as they are stored")] = None,
) -> None:
    """Write a folder of diffusers, as every command takes one, from a single file or with adapters fused."""
    write_converted(source, out, config, [_adapter(each) for each in fuse or ()], float_of(dtype))
    print(
        f"{out}: a folder of diffusers, as ppcl_rt.load and every command take it, "
        f"`ppcl train` by --set teacher.pretrained={out}"
    )


def _adapter(given: str) -> tuple[str, float]:
    """A file, and how much of it: ``style.safetensors:0.8``.

    Raises:
        ValueError: the scale is no number.
    """
    path, colon, scale = given.rpartition(":")
    if not colon or Path(given).is_file():
        return given, 1.0
    try:
        found = float(scale)
    except ValueError:
        found = math.nan
    if not math.isfinite(found):
        raise ValueError(f"--fuse takes LORA or LORA:scale with a number as the scale, not {given}")
    return path, found
