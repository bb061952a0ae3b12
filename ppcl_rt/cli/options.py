"""Options and arguments that several commands share, and how their values are read."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer

import ppcl_rt
from ppcl_rt.planning.budget import Budget

Checkpoint = Annotated[str, typer.Argument(help="checkpoint folder or hub id")]
Ratio = Annotated[float | None, typer.Option(help="share of the dense parameters and FLOPs, in (0, 1]")]
Ratios = Annotated[str | None, typer.Option(help="ratios, with commas between")]
Params = Annotated[str | None, typer.Option(help="at most so many parameters: 10B")]
Flops = Annotated[str | None, typer.Option(help="at most so many FLOPs a forward at --shape: 40T")]
Memory = Annotated[str | None, typer.Option(help="at most so many bytes of weights, GB is 1e9: 12GB")]
Latency = Annotated[str | None, typer.Option(help="at most so many ms a forward at --shape on --device: 400")]
Shape = Annotated[str | None, typer.Option(help="image + text tokens, x batch: 4096+512x2; else the reference shape")]
PlanFile = Annotated[Path | None, typer.Option(help="a plan written by `ppcl plan --out`, instead of a ratio")]
AsJson = Annotated[bool, typer.Option("--json", help="print JSON")]
Device = Annotated[str, typer.Option(help="torch device")]
DType = Annotated[str | None, typer.Option(help="of the weights, for --memory: float32; else as they are stored")]

# What several budgets are where none is asked for.
_RATIOS = "1,0.7,0.5,0.35"


def catalog_of(checkpoint: str) -> ppcl_rt.Catalog:
    """Read the catalog of a checkpoint.

    Raises:
        ValueError: there is no such checkpoint, or it has no catalog.
    """
    catalog = ppcl_rt.Checkpoint(ppcl_rt.locate(checkpoint)).catalog
    if catalog is None:
        raise ValueError(f"{checkpoint} is a stock checkpoint with no catalog: `ppcl train` makes one")
    return catalog


def budget_of(default: float, ratio: float | None, shape: str | None, **amounts: str | None) -> Budget:
    """The budget that options ask for; ``default`` is the ratio where they ask for none.

    Raises:
        ValueError: one of them is no amount.
    """
    if ratio is None and not any(amounts.values()):
        ratio = default
    return Budget.of(ratio, shape=shape, **amounts)


def budgets_of(checkpoint: str, ratios: str | None, shape: str | None, **amounts: str | None) -> list[Budget]:
    """One budget for each ratio and each amount; every option takes several with commas between.

    Without any, ratios 1, 0.7, 0.5 and 0.35.

    Raises:
        ValueError: one of them is no number, or the checkpoint has no plan for a ratio.
    """
    planner, asked = ppcl_rt.Planner(catalog_of(checkpoint)), []
    if ratios is None and not any(amounts.values()):
        ratios = _RATIOS
    for part in ratios.split(",") if ratios is not None else []:
        try:
            asked.append(Budget.of(float(part)))
        except ValueError:
            raise ValueError(f'a ratio is a number above 0 and up to 1, not "{part.strip()}"') from None
        planner.plan(float(part))
    for name, given in amounts.items():
        asked += [Budget.of(None, shape=shape, **{name: part}) for part in given.split(",")] if given else []
    return asked


def float_of(name: str | None) -> torch.dtype | None:
    """The dtype of this name.

    Raises:
        ValueError: torch has no floating-point dtype of this name.
    """
    found = getattr(torch, name, None) if name else None
    if name and not (isinstance(found, torch.dtype) and found.is_floating_point):
        raise ValueError(f"a dtype is float32, bfloat16 or float16, not {name}")
    return found


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
