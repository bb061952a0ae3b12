"""``ppcl export``: one plan of a checkpoint in a format of its own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

import ppcl_rt
from ppcl_rt.cli.options import NO_AMOUNTS, Amounts, AsJson, Checkpoint, DType, PlanFile, Ratio, with_amounts
from ppcl_rt.cli.planned import planned
from ppcl_rt.cli.values import budget_of, float_of
from ppcl_rt.convert import export as exporting
from ppcl_rt.convert.formats import Format, Types
from ppcl_rt.planning.plan import Plan


@with_amounts
def export(
    checkpoint: Checkpoint,
    out: Annotated[Path, typer.Argument(help="folder or file to write")],
    format: Annotated[Format, typer.Option(help="what is written; docs/export.md says what each can hold")] = "ppcl",
    ratio: Ratio = None,
    amounts: Amounts = NO_AMOUNTS,
    plan: PlanFile = None,
    whole: Annotated[bool, typer.Option("--whole", help="plan with whole blocks and students at full width")] = False,
    dtype: DType = None,
    types: Annotated[Types, typer.Option(help="of gguf: of the matrices in the blocks")] = "BF16",
    as_json: AsJson = False,
) -> None:
    """Write one plan as a smaller checkpoint that needs nothing else (at ratio 1, unless another is asked for)."""
    if plan is not None and (ratio is not None or amounts.limits or whole):
        raise ValueError("--plan says what runs: leave out --whole and every budget")
    found = ppcl_rt.Checkpoint(ppcl_rt.locate(checkpoint))
    if out.resolve() == found.folder.resolve():
        raise ValueError(f"{out} is the checkpoint itself: write somewhere else, it can do more than one plan")
    model = _model(checkpoint, found, format, ratio, amounts, plan, whole, dtype)
    exporting.export(model, out, format, types)
    catalog, made = model.catalog, model.plan
    said: dict[str, Any] = {
        "format": format,
        "ratio": catalog.ratio(made),
        "params": catalog.architecture.params(made),
        "blocks": len(made.blocks),
        "bytes": sum(path.stat().st_size for path in (out.iterdir() if out.is_dir() else [out]) if path.is_file()),
    }
    if as_json:
        print(json.dumps({"out": str(out), **said}, indent=1))
        return
    print(
        f"{out}: {format}, {said['blocks']} blocks, {said['params']:,} parameters, "
        f"{said['bytes'] / 1e9:.3g} GB, ratio {said['ratio']:.3f}"
    )


def _model(
    checkpoint: str,
    found: ppcl_rt.Checkpoint,
    format: Format,
    ratio: float | None,
    amounts: Amounts,
    plan: Path | None,
    whole: bool,
    dtype: str | None,
) -> ppcl_rt.Pluggable:
    """The model with its plan, which is checked before weights are read."""
    weights = float_of(dtype)
    if found.catalog is None and plan is None:
        # A stock checkpoint: everything or nothing.
        budgets: Any = amounts._asdict()
        return ppcl_rt.load(checkpoint, 1.0 if ratio is None else ratio, dtype=weights, **budgets)
    if plan is not None:
        return ppcl_rt.load(checkpoint, plan=Plan.read(plan), dtype=weights)
    asked = planned(checkpoint, budget_of(1.0, ratio, amounts), weights, whole=whole)
    exporting.check(asked.planner, asked.plan, format, asked.within)
    return ppcl_rt.load(checkpoint, plan=asked.plan, dtype=weights)
