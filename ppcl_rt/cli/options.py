"""Options and arguments that several commands share, and how their values are read."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer

import ppcl_rt

Checkpoint = Annotated[str, typer.Argument(help="checkpoint folder or hub id")]
Ratio = Annotated[float, typer.Option(help="parameters kept / parameters, in (0, 1]")]
PlanFile = Annotated[Path | None, typer.Option(help="a plan written by `ppcl plan --out`, instead of a ratio")]
AsJson = Annotated[bool, typer.Option("--json", help="print JSON")]
Device = Annotated[str, typer.Option(help="torch device")]


def catalog_of(checkpoint: str) -> ppcl_rt.Catalog:
    """Read the catalog of a checkpoint.

    Raises:
        ValueError: there is no such checkpoint, or it has no catalog.
    """
    catalog = ppcl_rt.Checkpoint(ppcl_rt.locate(checkpoint)).catalog
    if catalog is None:
        raise ValueError(f"{checkpoint} is a stock checkpoint with no catalog: `ppcl train` makes one")
    return catalog


def parse_ratios(text: str, checkpoint: str) -> list[float]:
    """Read ratios with commas between, each of which the checkpoint has a plan for.

    Raises:
        ValueError: one of them is no number, or the checkpoint has no plan for it.
    """
    planner = ppcl_rt.Planner(catalog_of(checkpoint))
    ratios = []
    for part in text.split(","):
        try:
            ratios.append(float(part))
        except ValueError:
            raise ValueError(f'a ratio is a number above 0 and up to 1, not "{part.strip()}"') from None
        planner.plan(ratios[-1])
    return ratios


def check_device(device: str) -> None:
    """Try a device.

    Raises:
        ValueError: it is not on this machine, or cannot hold values.
    """
    try:
        # Reads a value back, which a device without memory (meta) cannot.
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, ValueError, NotImplementedError):
        raise ValueError(f"there is no device {device} here") from None
