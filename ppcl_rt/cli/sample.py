"""``ppcl sample``, ``ppcl eval`` and ``ppcl demo``: draw at one ratio or at several, through a task or a pipeline."""

from __future__ import annotations

import contextlib
import json
import re
import statistics
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from PIL import Image
from rich.console import Console
from rich.progress import Progress
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
    Transformer,
    with_amounts,
)
from ppcl_rt.cli.output import print_table, writing
from ppcl_rt.cli.values import budget_of, budgets_of, check_device
from ppcl_rt.pipelines.drawing import How, OnStep
from ppcl_rt.pipelines.likeness import likeness_of
from ppcl_rt.pipelines.sheet import Made, described, enlarged, grid
from ppcl_rt.pipelines.task import JudgedTask, Places, Task, places, task_of
from ppcl_rt.planning.budget import Budget
from ppcl_rt.planning.plan import Plan
from ppcl_rt.planning.schedule import Schedule

# A time is the median of this many forwards, after one that is not counted.
_TIMED = 7
_LARGEST_SEED = 2**63 - 1

Steps = Annotated[int | None, typer.Option(min=1, help="denoising steps; the checkpoint's own by default")]
Guidance = Annotated[float | None, typer.Option(min=0, help="1 for none; the checkpoint's own by default")]
Size = Annotated[str | None, typer.Option(help="pixels, 1024x768; the checkpoint's own by default")]
Seed = Annotated[int, typer.Option(min=0, max=_LARGEST_SEED)]


@with_amounts
def sample(
    checkpoint: Checkpoint,
    prompt: Annotated[list[str] | None, typer.Option(help="what to draw; give it again for more pictures")] = None,
    prompts: Annotated[Path | None, typer.Option(help="file with a prompt a line")] = None,
    out: Annotated[Path, typer.Option(help="PNG to write; it holds prompt, seed, ratio, plan, checkpoint")] = Path(
        "sample.png"
    ),
    ratio: Ratio = None,
    ratios: Annotated[str | None, typer.Option(help="several, with commas between: a row each of one sheet")] = None,
    amounts: Amounts = NO_AMOUNTS,
    plan: PlanFile = None,
    schedule: Annotated[str | None, typer.Option(help="ratios by denoising step: 1x4,0.5 is dense for 4 steps")] = None,
    dense_steps: Annotated[int, typer.Option(min=0, help="first denoising steps that run dense")] = 0,
    steps: Steps = None,
    guidance: Guidance = None,
    size: Size = None,
    seed: Seed = 0,
    transformer: Transformer = None,
    quantize: Quantize = None,
    device: Device = "cpu",
) -> None:
    """Draw pictures at a ratio (1, unless another is asked for), within other budgets, or at a plan."""
    asked_for, where, how = _prompts(prompt, prompts), places(checkpoint, transformer), _how(steps, guidance, size)
    phases = _schedule(schedule, dense_steps)
    if ratios is not None and (ratio is not None or plan is not None or schedule is not None):
        raise ValueError("--ratios goes without --ratio, --plan and --schedule")
    if ratios is None:
        budgets = [budget_of(1.0, ratio, amounts)]
    else:
        budgets = budgets_of(where.transformer, ratios, amounts, quantize)
    with writing(out) as partial:
        rows, made, task = [], [], None
        for budget in budgets:
            model, task = _load(where, budget, plan, device, quantize, task)
            if phases is not None or dense_steps:
                model.set_schedule(phases or Schedule.warm(dense_steps, model.plan))
            task.check(asked_for)
            with _steps_shown(str(budget)) as on_step:
                rows.append(task.sample(model, asked_for, seed, how, on_step))
            made.append(Made(str(budget), model.catalog.ratio(model.plan), model.plan))
        assert task is not None, "there is a budget"
        for note in task.check(asked_for):
            Console(stderr=True).print(note, markup=False)
        alone = len(rows) == len(rows[0]) == 1
        labels = [each.asked if len(rows) > 1 else "" for each in made]
        columns = list(map(task.label, asked_for)) if len(rows) > 1 else ["" for _ in asked_for]
        sheet = enlarged(rows[0][0]) if alone else grid(rows, columns, labels)
        sheet.save(partial, format="PNG", pnginfo=described(checkpoint, asked_for, seed, made))
    said = ", ".join(f"{each.ratio:.3f}" for each in made)
    print(f"wrote {out}: {len(rows) * len(asked_for)} pictures at ratio {said}, seed {seed}")


@with_amounts
def evaluate(
    checkpoint: Checkpoint,
    ratios: Ratios = None,
    amounts: Amounts = NO_AMOUNTS,
    prompts: Annotated[int, typer.Option(min=1, help="prompts that the judge of the task chooses")] = 2000,
    prompt: Annotated[list[str] | None, typer.Option(help="without a judge: compare the pictures of this one")] = None,
    prompts_file: Annotated[Path | None, typer.Option(help="without a judge: file with a prompt a line")] = None,
    steps: Steps = None,
    guidance: Guidance = None,
    size: Size = None,
    seed: Seed = 1,
    transformer: Transformer = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="write the results here")] = None,
    quantize: Quantize = None,
    device: Device = "cpu",
) -> None:
    """Judge samples within several budgets, one after the other, and say what each costs.

    Without a judge, or with prompts of one's own: PSNR and SSIM to what the dense model draws from the same noise.
    """
    where, how = places(checkpoint, transformer), _how(steps, guidance, size)
    with writing(json_file) if json_file else contextlib.nullcontext() as partial:
        asked = budgets_of(where.transformer, ratios, amounts, quantize)
        own = _prompts(prompt, prompts_file) if prompt or prompts_file else None
        results: list[dict[str, Any]] = []
        dense: list[Image.Image] = []
        task: Task | None = None
        for budget in asked:
            model, task = _load(where, budget, None, device, quantize, task)
            if own is None and isinstance(task, JudgedTask):
                scored = task.judge(model, prompts, seed)
                said = f"strict {scored['strict']:.3f}  soft {scored['soft']:.3f}"
            else:
                given = own or list(task.demo_prompts)
                dense = dense or _dense(model, task, given, seed, how)
                scored = likeness_of(dense, task.sample(model, given, seed, how))
                said = f"PSNR {_decibels(scored['psnr'])}  SSIM {scored['ssim']:.3f}"
            done = {**_asked(budget), **_costs(model, task), **scored}
            results.append(done)
            print(f"{budget}: {said}  {done['ms']:.1f} ms", flush=True)
        if partial is not None:
            partial.write_text(json.dumps(results, indent=1) + "\n")
    drawn = f"{len(own)} prompts" if own else f"{prompts} prompts of the judge"
    print_table(_results_table(results, f"{drawn}, seed {seed}, {_machine(device)}"))


@with_amounts
def demo(
    checkpoint: Checkpoint,
    out: Annotated[Path, typer.Option(help="PNG to write")] = Path("demo.png"),
    ratios: Ratios = None,
    amounts: Amounts = NO_AMOUNTS,
    prompts: Annotated[int, typer.Option(min=1, help="prompts to judge")] = 250,
    seed: Seed = 0,
    quantize: Quantize = None,
    device: Device = "cpu",
) -> None:
    """Draw the same prompts and seeds within several budgets, and print what each costs and scores."""
    where, task = places(checkpoint), None
    with writing(out) as partial:
        asked = budgets_of(where.transformer, ratios, amounts, quantize)
        rows, results, made = [], [], []
        for budget in asked:
            model, task = _load(where, budget, None, device, quantize, task)
            rows.append(task.sample(model, task.demo_prompts, seed))
            scored = (
                task.judge(model, prompts, seed) if isinstance(task, JudgedTask) else likeness_of(rows[0], rows[-1])
            )
            results.append({**_asked(budget), **_costs(model, task), **scored})
            made.append(Made(str(budget), model.catalog.ratio(model.plan), model.plan))
            print(f"{budget}: drawn and judged", flush=True)
        assert task is not None, "there is a budget"
        sheet = grid(rows, list(map(task.label, task.demo_prompts)), [each.asked for each in made])
        sheet.save(partial, format="PNG", pnginfo=described(checkpoint, task.demo_prompts, seed, made))
    print_table(_results_table(results, f"{prompts} prompts, seed {seed}, {_machine(device)}"))
    print(f"wrote {out}")


def _prompts(given: list[str] | None, file: Path | None) -> list[str]:
    """The prompts of options.

    Raises:
        ValueError: there are none, or the file cannot be read.
    """
    found = list(given or [])
    if file is not None:
        try:
            found += [line.strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"{file} cannot be read as text: {error}") from None
    if not found:
        raise ValueError("nothing to draw: give a --prompt, or --prompts FILE with one a line")
    return found


def _how(steps: int | None, guidance: float | None, size: str | None) -> How:
    if size is None:
        return How(steps, guidance)
    found = re.fullmatch(r"([1-9][0-9]{0,4})x([1-9][0-9]{0,4})", size)
    if found is None:
        raise ValueError(f"a size is like 1024x768, not {size}")
    return How(steps, guidance, (int(found[1]), int(found[2])))


def _schedule(text: str | None, dense_steps: int) -> Schedule | None:
    """Read ratios by denoising step, ``1x4,0.7x4,0.5``: the last one lasts to the end."""
    if text is None:
        return None
    if dense_steps:
        raise ValueError("--schedule and --dense-steps say the same: give one of them")
    phases, begin = [], 0
    *first, last = text.split(",")
    try:
        for part in first:
            ratio, _, lasts = part.partition("x")
            phases.append((begin, float(ratio)))
            begin += int(lasts)
        phases.append((begin, float(last)))
    except ValueError:
        raise ValueError(f"a schedule is like 1x4,0.5 (dense for 4 steps, then 0.5), not {text}") from None
    return Schedule(phases=tuple(phases))


@contextlib.contextmanager
def _steps_shown(what: str) -> Iterator[OnStep]:
    """Show a bar of denoising steps, on a terminal."""
    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, of: bar.update(task, completed=done, total=of)


def _load(
    where: Places, asked: Budget, plan: Path | None, device: str, quantize: str | None, task: Task | None
) -> tuple[Any, Task]:
    """A model in float32 (scores are compared across machines), and what draws with it."""
    check_device(device)
    chosen = Plan.read(plan) if plan is not None else None
    budgets = asked.model_dump(exclude={"ratio"}, exclude_none=True)
    how: dict[str, Any] = {"dtype": torch.float32, "device": device, "quantize": quantize}
    model = ppcl_rt.load(where.transformer, asked.ratio or 1.0, plan=chosen, **how, **budgets)
    return model, task or task_of(model.catalog, where.pipeline)


def _dense(model: Any, task: Task, prompts: Sequence[str], seed: int, how: How) -> list[Image.Image]:
    with model.at(plan=model.catalog.dense):
        return task.sample(model, prompts, seed, how)


def _decibels(psnr: float | None) -> str:
    return "the same" if psnr is None else f"{psnr:.1f} dB"


def _asked(budget: Budget) -> dict[str, Any]:
    """The budget of a row of results."""
    return {"asked": budget.model_dump(mode="json", exclude_none=True)}


def _costs(model: Any, task: Task) -> dict[str, Any]:
    """Ratio, parameters and FLOPs of the plan, bytes held, and milliseconds of a forward (median)."""
    catalog = model.catalog
    return {
        "ratio": catalog.ratio(model.plan),
        "params": catalog.architecture.params(model.plan),
        "flops": catalog.architecture.flops(model.plan, *catalog.reference),
        "bytes": model.resident_bytes,
        "ms": _milliseconds(model, task.example(model, task.timed_batch)),
        "batch": task.timed_batch,
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
    """What budgets cost and score; of a judge its scores with intervals, else how near pictures are to the dense."""
    judged = "strict" in results[0]
    scores = ("strict (95 %)", "soft (95 %)") if judged else ("PSNR to dense", "SSIM to dense")
    costs = ("budget", "ratio", "parameters", "MFLOPs a sample", "bytes held", f"ms a forward of {results[0]['batch']}")
    table = Table(*costs, *scores, title=f"{title}, float32")
    for row in results:
        if judged:
            said = [f"{row[k]:.3f} ({row[f'{k}_ci'][0]:.3f}-{row[f'{k}_ci'][1]:.3f})" for k in ("strict", "soft")]
        else:
            said = [_decibels(row["psnr"]), f"{row['ssim']:.3f}"]
        table.add_row(
            str(Budget(**row["asked"])),
            f"{row['ratio']:.3f}",
            f"{row['params']:,}",
            f"{row['flops'] / 1e6:.1f}",
            f"{row['bytes']:,}",
            f"{row['ms']:.1f}",
            *said,
        )
    return table
