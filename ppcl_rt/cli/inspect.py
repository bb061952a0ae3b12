"""``ppcl info`` and ``ppcl plan``: what a checkpoint can do, without loading its weights."""

from __future__ import annotations

import contextlib
import json
import math
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

import ppcl_rt
from ppcl_rt.checkpoint.places import locate_file
from ppcl_rt.cli.options import NO_AMOUNTS, Amounts, AsJson, Checkpoint, Device, DType, Quantize, Ratio, with_amounts
from ppcl_rt.cli.output import print_table, writing
from ppcl_rt.cli.planned import planned
from ppcl_rt.cli.values import budget_of, float_of, opened
from ppcl_rt.convert.adapters import read_adapters
from ppcl_rt.convert.naming import stock_shapes
from ppcl_rt.families import registry
from ppcl_rt.pipelines.plan_picture import draw_plan, groups_of
from ppcl_rt.planning.adapted import taken


def info(
    checkpoint: Checkpoint,
    lora: Annotated[str | None, typer.Option(help="what becomes of this LoRA file, and nothing else")] = None,
    ratio: Annotated[float, typer.Option(help="with --lora: at this ratio")] = 1.0,
    as_json: AsJson = False,
) -> None:
    """Say what a checkpoint can do, or what it takes of an adapter."""
    source, catalog, planner = opened(checkpoint)
    if lora is not None:
        family = registry.of_class(source.config.get("_class_name"), source.folder)
        layers = read_adapters(locate_file(lora), family, stock_shapes(family, source.config), 1.0)
        found = taken(catalog, planner.plan(ratio), (name.removesuffix(".weight") for name in layers))
        print(json.dumps(found._asdict(), indent=1) if as_json else found)
        return
    smallest = planner.smallest
    if as_json:
        content = catalog.model_dump(mode="json", exclude={"checksums"})
        print(json.dumps({**content, "fingerprint": catalog.fingerprint, "smallest_ratio": smallest}, indent=1))
        return
    architecture = catalog.architecture
    print(f"family {catalog.family}, checkpoint {catalog.fingerprint}")
    for blocks in architecture.lists:
        print(f"{blocks.depth} blocks of width {_made_of(architecture.kinds[blocks.kind])}")
    print(f"{architecture.dense_params:,} parameters at ratio 1; the smallest plan has ratio {smallest:.3f}")
    for table in _tables(catalog):
        print_table(table)


def _made_of(spec: ppcl_rt.BlockSpec) -> str:
    """The sizes of a kind of block: ``96: 6 heads x 16, MLP 384``."""
    sizes = [f"{spec.groups[group].count} heads x {spec.head_dim}" for group in spec.head_groups]
    # The MLPs of both streams are mostly of one size, which is then said once.
    channels = dict.fromkeys(spec.groups[group].count for group in spec.unit_groups if group not in spec.head_groups)
    return f"{spec.dim}: {', '.join([*sizes, *(f'MLP {count}' for count in channels)])}"


def _tables(catalog: ppcl_rt.Catalog) -> tuple[Table, Table, Table]:
    """Students, text runs and legal widths, with the loss of each."""
    students = Table("stands for", "copied from", "loss", title="students")
    for student in catalog.students:
        students.add_row(str(student.interval), student.start, f"{student.loss:.5f}")
    text_runs = Table("over", "loss", title="text runs")
    for run in catalog.text_runs:
        text_runs.add_row(str(run.interval), f"{run.loss:.5f}")
    groups = groups_of(catalog)
    widths = Table("block", *groups, title="widths (loss)")
    for block, legal in enumerate(catalog.blocks):
        counts = (legal.of(group) if group in legal.groups else () for group in groups)
        widths.add_row(
            str(block), *("  ".join(f"{each.units} ({each.loss:.4f})" for each in group) for group in counts)
        )
    return students, text_runs, widths


@with_amounts
def plan(
    checkpoint: Checkpoint,
    ratio: Ratio = None,
    amounts: Amounts = NO_AMOUNTS,
    dtype: DType = None,
    quantize: Quantize = None,
    device: Device = "cpu",
    out: Annotated[Path | None, typer.Option(help="write the plan here, as JSON")] = None,
    picture: Annotated[Path | None, typer.Option(help="draw what the plan removes into this PNG")] = None,
    as_json: AsJson = False,
) -> None:
    """Show the plan with the least predicted loss within a budget (at ratio 0.5, unless another is asked for)."""
    asked = budget_of(0.5, ratio, amounts)
    with contextlib.ExitStack() as files:
        # Both are opened before anything is written: a bad path leaves no other file.
        plan_file, picture_file = (files.enter_context(writing(path)) if path else None for path in (out, picture))
        found = planned(checkpoint, asked, float_of(dtype), device, quantize=quantize)
        catalog, made, room = found.planner.catalog, found.plan, found.room
        loss = found.planner.loss(made)
        if plan_file is not None:
            plan_file.write_text(made.to_json() + "\n")
        if picture_file is not None:
            draw_plan(catalog, made).save(picture_file, format="PNG")
    if as_json:
        content = {
            "asked": asked.model_dump(mode="json", exclude_none=True),
            "granted": found.granted,
            **({} if room is None else {"room": {**room._asdict(), "left": room.left}}),
            "predicted_loss": None if math.isnan(loss) else loss,
            "plan": made.model_dump(mode="json"),
        }
        print(json.dumps(content, indent=1))
        return
    print(f"asked: {asked}")
    if room is not None:
        print(f"room: {room}")
    print(f"granted: {', '.join(f'{name} {amount:,.6g}' for name, amount in found.granted.items())}")
    print(f"predicted loss {loss:.5f}")
    for each in made.blocks:
        what = f"student of {each.interval}" if each.student else f"block {each.interval.first}"
        full = catalog.spec(each.interval.first).full
        # A group that does not run at all, as the text MLP of a block that does not update the text, counts 0.
        width = ", ".join(f"{group} {each.width.get(group, 0)}/{count}" for group, count in full.items())
        print(f"{what:>20}  {width}")
    for run in made.text_runs:
        print(f"{'text not updated':>20}  over blocks {run}")
