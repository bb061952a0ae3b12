"""``ppcl``: look into checkpoints, plan, sample, judge; training and more come from installed packages.

Bad input ends in one line on standard error and exit status 2.
"""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import sys
import time
from collections.abc import Iterator
from importlib.metadata import entry_points
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

import ppcl_rt
from ppcl_rt.cli.picture import draw_plan, grid
from ppcl_rt.cli.task import Task, task_of
from ppcl_rt.planning.plan import Plan
from ppcl_rt.planning.schedule import Schedule

app = typer.Typer(
    help="One checkpoint of a diffusion transformer, at any ratio.",
    add_completion=False,
    pretty_exceptions_enable=False,
)

Checkpoint = Annotated[str, typer.Argument(help="checkpoint folder or hub id")]
Ratio = Annotated[float, typer.Option(help="parameters kept / parameters, in (0, 1]")]
PlanFile = Annotated[Path | None, typer.Option(help="a plan written by `ppcl plan --out`, instead of a ratio")]
AsJson = Annotated[bool, typer.Option("--json", help="print JSON")]
Device = Annotated[str, typer.Option(help="torch device")]

# Newer typers carry a click of their own, so click's base class of what a user did wrong is found through typer.
_ClickException: Any = typer.BadParameter.__mro__[2]

# Columns that tables need; narrower terminals wrap lines, which is better than cut numbers.
_TABLE_WIDTH = 150
# Forwards that a time is the median of, after one that is not counted.
_TIMED = 7
_TIMED_BATCH = 64


def main() -> None:
    """Run the program; the entry point of ``ppcl``."""
    for entry in entry_points(group="ppcl.commands"):
        app.add_typer(entry.load(), name=entry.name)
    try:
        status = app(standalone_mode=False)
    except _ClickException as error:
        status = _complain(error.format_message())
    except typer.Abort:
        status = 130
    except (ValueError, OSError) as error:
        status = _complain(str(error))
    sys.exit(status if isinstance(status, int) else 0)


def _complain(message: str) -> int:
    print(f"ppcl: {' '.join(message.split())}", file=sys.stderr)
    return 2


@app.command()
def info(checkpoint: Checkpoint, as_json: AsJson = False) -> None:
    """Say what a checkpoint can do."""
    catalog = _catalog(checkpoint)
    smallest = ppcl_rt.Planner(catalog).smallest
    if as_json:
        content = catalog.model_dump(mode="json", exclude={"checksums"})
        print(json.dumps({**content, "fingerprint": catalog.fingerprint, "smallest_ratio": smallest}, indent=1))
        return
    shape = catalog.shape
    print(f"family {catalog.family}, checkpoint {catalog.fingerprint}")
    print(
        f"{shape.depth} blocks of width {shape.dim}: "
        f"{shape.width.heads} heads x {shape.head_dim}, MLP {shape.width.image}"
    )
    print(f"{shape.dense_params:,} parameters at ratio 1; the smallest plan has ratio {smallest:.3f}")
    table = Table("stands for", "copied from", "loss", title="students")
    for student in catalog.students:
        table.add_row(str(student.interval), student.start, f"{student.loss:.5f}")
    _print(table)
    table = Table("over", "loss", title="text runs")
    for run in catalog.text_runs:
        table.add_row(str(run.interval), f"{run.loss:.5f}")
    _print(table)
    table = Table("block", *ppcl_rt.Width._fields, title="widths (loss)")
    for block, widths in enumerate(catalog.blocks):
        table.add_row(
            str(block),
            *(
                "  ".join(f"{option.count} ({option.loss:.4f})" for option in widths.of(group))
                for group in ppcl_rt.Width._fields
            ),
        )
    _print(table)


@app.command()
def plan(
    checkpoint: Checkpoint,
    ratio: Ratio = 0.5,
    out: Annotated[Path | None, typer.Option(help="write the plan here, as JSON")] = None,
    picture: Annotated[Path | None, typer.Option(help="draw what the plan removes into this PNG")] = None,
    as_json: AsJson = False,
) -> None:
    """Show the plan with the least predicted loss at a ratio."""
    with contextlib.ExitStack() as files:
        beside_out, beside_picture = (files.enter_context(_writing(path)) if path else None for path in (out, picture))
        catalog = _catalog(checkpoint)
        made = ppcl_rt.Planner(catalog).plan(ratio)
        if beside_out is not None:
            beside_out.write_text(made.to_json() + "\n")
        if beside_picture is not None:
            draw_plan(catalog, made).save(beside_picture, format="PNG")
    if as_json:
        print(made.to_json())
        return
    print(f"ratio {catalog.ratio(made):.4f} of parameters, predicted loss {catalog.loss(made):.5f}")
    for step in made.steps:
        what = f"student of {step.blocks}" if step.student else f"block {step.blocks.first}"
        width = ", ".join(
            f"{group} {count}/{full}"
            for group, count, full in zip(step.width._fields, step.width, catalog.shape.width, strict=True)
        )
        print(f"{what:>20}  {width}")
    for run in made.text_runs:
        print(f"{'text stands still':>20}  over blocks {run}")


@app.command()
def sample(
    checkpoint: Checkpoint,
    prompt: Annotated[list[str], typer.Option(help="what to draw; give it again for more pictures")],
    out: Annotated[Path, typer.Option(help="PNG to write")] = Path("sample.png"),
    ratio: Ratio = 1.0,
    plan: PlanFile = None,
    dense_steps: Annotated[int, typer.Option(min=0, help="first denoising steps that run dense")] = 0,
    seed: int = 0,
    device: Device = "cpu",
) -> None:
    """Draw pictures at a ratio."""
    with _writing(out) as beside:
        model, task = _load(checkpoint, ratio, plan, device)
        task.check(prompt)
        if dense_steps:
            model.set_schedule(Schedule.warm(dense_steps, model.plan))
        pictures = task.sample(model, prompt, seed)
        grid([pictures], ["" for _ in prompt], [""]).save(beside, format="PNG")
    print(f"wrote {out}: {len(pictures)} pictures at ratio {model.catalog.ratio(model.plan):.3f}, seed {seed}")


@app.command("eval")
def evaluate(
    checkpoint: Checkpoint,
    ratios: Annotated[str, typer.Option(help="ratios, with commas between")] = "1,0.7,0.5,0.35",
    prompts: Annotated[int, typer.Option(min=1, help="unseen prompts, spread evenly over their kinds")] = 2000,
    seed: int = 1,
    json_file: Annotated[Path | None, typer.Option("--json", help="write the results here")] = None,
    device: Device = "cpu",
) -> None:
    """Judge samples at several ratios, and say what each costs."""
    with _writing(json_file) if json_file else contextlib.nullcontext() as beside:
        asked = _ratios(ratios, checkpoint)
        results = []
        for ratio in asked:
            model, task = _load(checkpoint, ratio, None, device)
            results.append({"ratio": ratio, **_costs(model, task), **task.judge(model, prompts, seed)})
            done = results[-1]
            print(
                f"ratio {ratio:g}: strict {done['strict']:.3f}  soft {done['soft']:.3f}  {done['ms']:.1f} ms",
                flush=True,
            )
        if beside is not None:
            beside.write_text(json.dumps(results, indent=1) + "\n")
    _print(_results_table(results, f"{prompts} prompts, seed {seed}, {_machine(device)}"))


@app.command()
def demo(
    checkpoint: Checkpoint,
    out: Annotated[Path, typer.Option(help="PNG to write")] = Path("demo.png"),
    ratios: str = "1,0.7,0.5,0.35",
    prompts: Annotated[int, typer.Option(min=1, help="unseen prompts to judge")] = 250,
    seed: int = 0,
    device: Device = "cpu",
) -> None:
    """Draw the same prompts and seeds at several ratios, and print what each costs and scores."""
    with _writing(out) as beside:
        asked = _ratios(ratios, checkpoint)
        rows, results = [], []
        for ratio in asked:
            model, task = _load(checkpoint, ratio, None, device)
            rows.append(task.sample(model, task.demo_prompts, seed))
            results.append({"ratio": ratio, **_costs(model, task), **task.judge(model, prompts, seed)})
            print(f"ratio {ratio:g}: drawn and judged", flush=True)
        grid(rows, list(task.demo_prompts), [f"ratio {ratio:g}" for ratio in asked]).save(beside, format="PNG")
    _print(_results_table(results, f"{prompts} prompts, seed {seed}, {_machine(device)}"))
    print(f"wrote {out}")


def _print(table: Table) -> None:
    console = Console()
    Console(width=max(_TABLE_WIDTH, console.width)).print(table)


def _catalog(checkpoint: str) -> ppcl_rt.Catalog:
    catalog = ppcl_rt.Checkpoint(ppcl_rt.locate(checkpoint)).catalog
    if catalog is None:
        raise ValueError(f"{checkpoint} is a stock checkpoint with no catalog: `ppcl train` makes one")
    return catalog


def _load(checkpoint: str, ratio: float, plan: Path | None, device: str) -> tuple[Any, Task]:
    """A model in float32 (scores are compared across machines), and its task."""
    try:
        # Reads a value back, which a device without memory (meta) cannot.
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, ValueError, NotImplementedError):
        raise ValueError(f"there is no device {device} here") from None
    chosen = Plan.read(plan) if plan is not None else None
    model = ppcl_rt.load(checkpoint, ratio, plan=chosen, dtype=torch.float32, device=device)
    return model, task_of(model.catalog)


def _ratios(text: str, checkpoint: str) -> list[float]:
    """Ratios with commas between, each of which the checkpoint has a plan for."""
    planner = ppcl_rt.Planner(_catalog(checkpoint))
    ratios = []
    for part in text.split(","):
        try:
            ratios.append(float(part))
        except ValueError:
            raise ValueError(f'a ratio is a number above 0 and up to 1, not "{part.strip()}"') from None
        planner.plan(ratios[-1])
    return ratios


def _costs(model: Any, task: Task) -> dict[str, Any]:
    """Parameters and FLOPs of the plan, bytes held, and milliseconds of a forward over 64 samples (median)."""
    catalog = model.catalog
    return {
        "params": catalog.shape.params(model.plan),
        "flops": catalog.shape.flops(model.plan, task.image_tokens, task.text_tokens),
        "bytes": model.resident_bytes,
        "ms": _milliseconds(model, task.example(_TIMED_BATCH)),
    }


@torch.no_grad()
def _milliseconds(model: Any, call: dict[str, Any]) -> float:
    call = {k: v.to(model.device) if isinstance(v, torch.Tensor) else v for k, v in call.items()}
    times = []
    for _ in range(1 + _TIMED):
        start = time.perf_counter()
        model(**call)
        if model.device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return 1e3 * statistics.median(times[1:])


def _machine(device: str) -> str:
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    return f"{torch.get_num_threads()} CPU threads"


def _results_table(results: list[dict[str, Any]], title: str) -> Table:
    table = Table(
        "ratio",
        "parameters",
        "MFLOPs a sample",
        "bytes held",
        f"ms a forward of {_TIMED_BATCH}",
        "strict (95 %)",
        "soft (95 %)",
        title=f"{title}, float32",
    )
    for row in results:
        table.add_row(
            f"{row['ratio']:g}",
            f"{row['params']:,}",
            f"{row['flops'] / 1e6:.1f}",
            f"{row['bytes']:,}",
            f"{row['ms']:.1f}",
            *(f"{row[k]:.3f} ({row[f'{k}_ci'][0]:.3f}-{row[f'{k}_ci'][1]:.3f})" for k in ("strict", "soft")),
        )
    return table


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[Path]:
    """A file beside ``path`` to write to, renamed over it at the end; nothing is left where something goes wrong.

    Raises:
        ValueError: at once, where ``path`` cannot be written.
    """
    path = path.resolve()
    writable = path.parent.is_dir() and os.access(path.parent, os.W_OK)
    if not writable or (path.exists() and not path.is_file()):
        raise ValueError(f"cannot write {path}: name a file in a folder that exists and can be written to")
    beside = path.with_name(f".{path.name}.partial")
    try:
        yield beside
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


if __name__ == "__main__":
    main()
