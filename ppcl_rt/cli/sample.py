"""``ppcl sample``, ``ppcl eval`` and ``ppcl demo``: run a checkpoint on its task, at one ratio or at several."""

from __future__ import annotations

import contextlib
import json
import statistics
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.table import Table

import ppcl_rt
from ppcl_rt.cli.options import (
    NO_AMOUNTS,
    Amounts,
    Checkpoint,
    Device,
    PlanFile,
    Quantize,
    Ratio,
    Ratios,
    budget_of,
    budgets_of,
    check_device,
    with_amounts,
)
from ppcl_rt.cli.output import print_table, writing
from ppcl_rt.cli.picture import grid
from ppcl_rt.cli.task import Task, task_of
from ppcl_rt.planning.budget import Budget
from ppcl_rt.planning.plan import Plan
from ppcl_rt.planning.schedule import Schedule

# A time is the median of this many forwards, after one that is not counted.
_TIMED = 7
_TIMED_BATCH = 64


@with_amounts
def sample(
    checkpoint: Checkpoint,
    prompt: Annotated[list[str], typer.Option(help="what to draw; give it again for more pictures")],
    out: Annotated[Path, typer.Option(help="PNG to write")] = Path("sample.png"),
    ratio: Ratio = None,
    amounts: Amounts = NO_AMOUNTS,
    plan: PlanFile = None,
    dense_steps: Annotated[int, typer.Option(min=0, help="first denoising steps that run dense")] = 0,
    seed: int = 0,
    quantize: Quantize = None,
    device: Device = "cpu",
) -> None:
    """Draw pictures at a ratio (1, unless another is asked for), within other budgets, or at a plan."""
    asked = budget_of(1.0, ratio, amounts)
    with writing(out) as partial:
        model, task = _load(checkpoint, asked, plan, device, quantize)
        task.check(prompt)
        if dense_steps:
            model.set_schedule(Schedule.warm(dense_steps, model.plan))
        pictures = task.sample(model, prompt, seed)
        grid([pictures], ["" for _ in prompt], [""]).save(partial, format="PNG")
    print(f"wrote {out}: {len(pictures)} pictures at ratio {model.catalog.ratio(model.plan):.3f}, seed {seed}")


@with_amounts
def evaluate(
    checkpoint: Checkpoint,
    ratios: Ratios = None,
    amounts: Amounts = NO_AMOUNTS,
    prompts: Annotated[int, typer.Option(min=1, help="unseen prompts, spread evenly over their kinds")] = 2000,
    seed: int = 1,
    json_file: Annotated[Path | None, typer.Option("--json", help="write the results here")] = None,
    quantize: Quantize = None,
    device: Device = "cpu",
) -> None:
    """Judge samples within several budgets, one after the other, and say what each costs."""
    with writing(json_file) if json_file else contextlib.nullcontext() as partial:
        asked = budgets_of(checkpoint, ratios, amounts, quantize)
        results = []
        for budget in asked:
            model, task = _load(checkpoint, budget, None, device, quantize)
            done = {**_asked(budget), **_costs(model, task), **task.judge(model, prompts, seed)}
            results.append(done)
            print(f"{budget}: strict {done['strict']:.3f}  soft {done['soft']:.3f}  {done['ms']:.1f} ms", flush=True)
        if partial is not None:
            partial.write_text(json.dumps(results, indent=1) + "\n")
    print_table(_results_table(results, f"{prompts} prompts, seed {seed}, {_machine(device)}"))


@with_amounts
def demo(
    checkpoint: Checkpoint,
    out: Annotated[Path, typer.Option(help="PNG to write")] = Path("demo.png"),
    ratios: Ratios = None,
    amounts: Amounts = NO_AMOUNTS,
    prompts: Annotated[int, typer.Option(min=1, help="unseen prompts to judge")] = 250,
    seed: int = 0,
    quantize: Quantize = None,
    device: Device = "cpu",
) -> None:
    """Draw the same prompts and seeds within several budgets, and print what each costs and scores."""
    with writing(out) as partial:
        asked = budgets_of(checkpoint, ratios, amounts, quantize)
        rows, results = [], []
        for budget in asked:
            model, task = _load(checkpoint, budget, None, device, quantize)
            rows.append(task.sample(model, task.demo_prompts, seed))
            results.append({**_asked(budget), **_costs(model, task), **task.judge(model, prompts, seed)})
            print(f"{budget}: drawn and judged", flush=True)
        grid(rows, list(task.demo_prompts), list(map(str, asked))).save(partial, format="PNG")
    print_table(_results_table(results, f"{prompts} prompts, seed {seed}, {_machine(device)}"))
    print(f"wrote {out}")


def _load(checkpoint: str, asked: Budget, plan: Path | None, device: str, quantize: str | None) -> tuple[Any, Task]:
    """A model in float32 (scores are compared across machines), and its task."""
    check_device(device)
    chosen = Plan.read(plan) if plan is not None else None
    budgets = asked.model_dump(exclude={"ratio"}, exclude_none=True)
    how: dict[str, Any] = {"dtype": torch.float32, "device": device, "quantize": quantize}
    model = ppcl_rt.load(checkpoint, asked.ratio or 1.0, plan=chosen, **how, **budgets)
    return model, task_of(model.catalog)


def _asked(budget: Budget) -> dict[str, Any]:
    """The budget of a row of results."""
    return {"asked": budget.model_dump(mode="json", exclude_none=True)}


def _costs(model: Any, task: Task) -> dict[str, Any]:
    """Ratio, parameters and FLOPs of the plan, bytes held, and milliseconds of a forward over 64 samples (median)."""
    catalog = model.catalog
    return {
        "ratio": catalog.ratio(model.plan),
        "params": catalog.architecture.params(model.plan),
        "flops": catalog.architecture.flops(model.plan, task.image_tokens, task.text_tokens),
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
        "budget",
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
            str(Budget(**row["asked"])),
            f"{row['ratio']:.3f}",
            f"{row['params']:,}",
            f"{row['flops'] / 1e6:.1f}",
            f"{row['bytes']:,}",
            f"{row['ms']:.1f}",
            *(f"{row[k]:.3f} ({row[f'{k}_ci'][0]:.3f}-{row[f'{k}_ci'][1]:.3f})" for k in ("strict", "soft")),
        )
    return table
