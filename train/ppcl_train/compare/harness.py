"""Quality against ratio for every method, at equal steps and seeds, judged on the same prompts from the same noise.

A comparison is a run folder of entries (method, ratio, seed). Each entry is made once and has a JSON file with its
result; an entry that was begun before a kill is resumed.
"""

from __future__ import annotations

import itertools
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from ppcl_rt.files import replacing
from ppcl_rt.planning.frozen import Frozen, read_json
from ppcl_train import pipeline
from ppcl_train.compare.entry import Entry, UnreachableError
from ppcl_train.compare.methods import METHODS, SEEDED
from ppcl_train.config.settings import RunConfig
from ppcl_train.data.seeds import Seed
from ppcl_train.engine.files import write_json
from ppcl_train.engine.log import Log
from ppcl_train.engine.provenance import making
from ppcl_train.families.base import Judged

RESULTS, PLOT = "results.json", "results.png"
_TEACHER = "teacher"
_RESAMPLES = 2000
_TABLE_WIDTH = 130


class Key(NamedTuple):
    """Names an entry."""

    method: str
    ratio: float
    seed: int

    def __str__(self) -> str:
        return f"{self.method}-{self.ratio:g}-{self.seed}"


class Result(Frozen):
    """The scores of an entry.

    Attributes:
        params: number of parameters that run; ``share`` is this over the teacher's.
        flops: of a forward at the reference shape, over the teacher's.
        scores: of each prompt, in [0, 1]; the strict score is the share of prompts with a score of 1.
        unreachable: why there is no such model; the other fields are empty then.
    """

    key: Key
    params: int = 0
    share: float = 0.0
    flops: float = 0.0
    seconds: float = 0.0
    scores: tuple[float, ...] = ()
    unreachable: str = ""


class Estimate(Frozen):
    """A mean with its 95 % interval."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:.3f} ({self.low:.3f}-{self.high:.3f})"


class Quality(Frozen):
    """Both scores of a method at a ratio."""

    strict: Estimate
    soft: Estimate


class Row(Frozen):
    """A method at a ratio, over its training seeds.

    Attributes:
        share, flops: parameters and FLOPs kept, over the teacher's; mean over the seeds.
        strict, soft: mean score of each seed.
        less: by how much ours scores better on the same prompts; None for ours, and where ours is missing.
    """

    method: str
    ratio: float
    share: float
    flops: float
    quality: Quality
    strict: tuple[float, ...]
    soft: tuple[float, ...]
    seconds: tuple[float, ...]
    less: Quality | None


def compare(
    run: RunConfig,
    folder: Path,
    teacher_path: Path,
    methods: Sequence[str] = tuple(METHODS),
    device: str = "cpu",
) -> list[Row]:
    """Make and judge all entries that have no result yet; writes ``results.json`` and ``results.png``.

    Args:
        teacher_path: a ``teacher.safetensors``, or a checkpoint folder that holds the teacher.

    Raises:
        ValueError: there is no such method, teacher or device, or the folder was begun with another config or teacher.
    """
    if unknown := sorted(set(methods) - set(METHODS)):
        raise ValueError(f"there is no method {unknown[0]}; there are: {', '.join(METHODS)}")
    try:
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, ValueError, NotImplementedError):
        raise ValueError(f"there is no device {device} here") from None
    if not isinstance(run.family, Judged):
        raise ValueError(f"comparing takes a task with a judge, which are scenes and emoji, not {run.task}")
    captions = run.family.captions(run.compare.prompts, run.compare.judge_seed)
    pipeline.begin(run, folder, teacher_path)
    keys = [Key(_TEACHER, 1.0, run.seed)]
    keys += [
        Key(method, ratio, run.seed + n)
        for n in range(run.compare.seeds)
        for ratio in run.compare.ratios
        for method in METHODS
        if method in methods and (n == 0 or method in SEEDED)
    ]
    log = Log(folder, "compare")
    # Shared by the entries of a seed (`Entry.clean`).
    clean: dict[int, dict[Seed, torch.Tensor]] = {key.seed: {} for key in keys}
    for number, key in enumerate(keys):
        if not _file(folder, key).exists():
            log(entry=str(key), number=number + 1, of=len(keys))
            result = _make(_entry(run, folder, key, device, clean[key.seed]), key, captions)
            write_json(_file(folder, key), result.model_dump(mode="json"))
            log(entry=str(key), **({"soft": float(np.mean(result.scores))} if result.scores else {"not": "reachable"}))
        shutil.rmtree(folder / "entries" / str(key), ignore_errors=True)
    files = sorted((folder / "results").glob("*.json"))
    results = [read_json(Result, path.read_bytes(), f"{path} is no result") for path in files]
    rows = summarise(results)
    unreachable = [{**result.key._asdict(), "why": result.unreachable} for result in results if result.unreachable]
    with making(run, "compare"):
        content = {"rows": [row.model_dump(mode="json") for row in rows], "unreachable": unreachable}
        write_json(folder / RESULTS, content)
    draw(rows, folder / PLOT)
    return rows


def _file(folder: Path, key: Key) -> Path:
    return folder / "results" / f"{key}.json"


def _entry(run: RunConfig, folder: Path, key: Key, device: str, clean: dict[Seed, torch.Tensor]) -> Entry:
    return Entry(
        run=run.model_copy(update={"seed": key.seed}),
        folder=folder / "entries" / str(key),
        shared=folder / f"seed-{key.seed}",
        teacher_file=folder / pipeline.STAGES[0].output,
        ratio=key.ratio,
        device=device,
        clean=clean,
    )


def _make(entry: Entry, key: Key, captions: Sequence[Any]) -> Result:
    """Make the model of an entry, or resume making it, and judge the model."""
    started = time.monotonic()
    try:
        model = entry.teacher() if key.method == _TEACHER else METHODS[key.method](entry)
    except UnreachableError as error:
        return Result(key=key, unreachable=str(error))
    run = entry.run
    assert isinstance(run.family, Judged), "`compare` has looked"
    scores = run.family.scores(model.eval(), run.sampler, captions, run.compare.judge_seed, run.pictures.pipeline)
    architecture, reference = model.catalog.architecture, model.catalog.reference
    params = architecture.params(model.plan)
    return Result(
        key=key,
        params=params,
        share=params / architecture.dense_params,
        flops=architecture.flops(model.plan, *reference) / architecture.dense_flops(reference),
        seconds=round(time.monotonic() - started, 1),
        scores=tuple(scores.tolist()),
    )


def summarise(results: Sequence[Result]) -> list[Row]:
    """Average over seeds and prompts, by ratio and method; intervals are percentile bootstrap.

    Prompts are resampled once for all methods, so that differences compare the same prompts; training seeds are
    resampled for each method.
    """
    order = [_TEACHER, *METHODS]
    reached = sorted(
        (result for result in results if not result.unreachable),
        key=lambda r: (-r.key.ratio, order.index(r.key.method), r.key.seed),
    )
    if not reached:
        return []
    prompts = len(reached[0].scores)
    drawn = np.random.default_rng(0).integers(prompts, size=(_RESAMPLES, prompts))

    def resampled(scores: np.ndarray, method: str) -> np.ndarray:
        """Average ``scores [seeds, prompts]``: over all of them, then over each resample; ``[1 + _RESAMPLES]``."""
        means = np.stack([seed[drawn].mean(1) for seed in scores])
        rng = np.random.default_rng((1, order.index(method)))
        seeds = rng.integers(len(scores), size=(len(scores), _RESAMPLES))
        return np.concatenate([[scores.mean()], np.take_along_axis(means, seeds, 0).mean(0)])

    samples: dict[tuple[str, float], dict[str, np.ndarray]] = {}
    groups = {key: list(group) for key, group in itertools.groupby(reached, key=lambda r: (r.key.method, r.key.ratio))}
    for (method, ratio), group in groups.items():
        soft = np.array([result.scores for result in group])
        samples[method, ratio] = {
            "strict": resampled((soft == 1.0).astype(float), method),
            "soft": resampled(soft, method),
        }

    def quality(samples: dict[str, np.ndarray]) -> Quality:
        bounds = {name: np.quantile(values[1:], (0.025, 0.975)) for name, values in samples.items()}
        return Quality(
            **{
                name: Estimate(mean=float(values[0]), low=float(bounds[name][0]), high=float(bounds[name][1]))
                for name, values in samples.items()
            }
        )

    def less(method: str, ratio: float) -> Quality | None:
        best = samples.get(("ours", ratio))
        if best is None or method == "ours":
            return None
        return quality({name: best[name] - values for name, values in samples[method, ratio].items()})

    return [
        Row(
            method=method,
            ratio=ratio,
            share=float(np.mean([result.share for result in group])),
            flops=float(np.mean([result.flops for result in group])),
            quality=quality(samples[method, ratio]),
            strict=tuple(float(np.mean(np.array(result.scores) == 1.0)) for result in group),
            soft=tuple(float(np.mean(result.scores)) for result in group),
            seconds=tuple(result.seconds for result in group),
            less=less(method, ratio),
        )
        for (method, ratio), group in groups.items()
    ]


def show(run: RunConfig, rows: Sequence[Row]) -> None:
    """Print a table with one section for each ratio."""
    config = run.compare
    table = Table(
        "ratio",
        "method",
        "parameters",
        "FLOPs",
        "strict (95 %)",
        "soft (95 %)",
        "ours is better by, strict",
        "by, soft",
        title=f"{config.steps} steps of {config.batch} each, {config.prompts} prompts, seed {config.judge_seed}",
    )
    for ratio, group in itertools.groupby(rows, key=lambda row: row.ratio):
        table.add_section()
        for row in group:
            seeds = f" x{len(row.soft)}" if len(row.soft) > 1 else ""
            less = (row.less.strict, row.less.soft) if row.less else ("", "")
            quality = (row.quality.strict, row.quality.soft)
            kept = (f"{row.share:.3f}", f"{row.flops:.3f}")
            table.add_row(f"{ratio:g}", row.method + seeds, *kept, *map(str, quality), *map(str, less))
    console = Console()
    Console(width=max(_TABLE_WIDTH, console.width)).print(table)


def draw(rows: Sequence[Row], path: Path) -> None:
    """Draw both scores against the share of parameters that is kept.

    Raises:
        ValueError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError("drawing takes matplotlib: pip install ppcl-rt[train]") from None
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    panels = figure.subplots(1, 2)
    shares = [row.share for row in rows if row.method != _TEACHER] or [1.0]
    for panel, name in zip(panels, Quality.model_fields, strict=True):
        for number, method in enumerate(METHODS):
            of_method = sorted((row for row in rows if row.method == method), key=lambda row: row.share)
            estimates = [getattr(row.quality, name) for row in of_method]
            if of_method:
                panel.errorbar(
                    [row.share for row in of_method],
                    [e.mean for e in estimates],
                    # By rounding, a bootstrap quantile may lie on the wrong side of the mean.
                    [[max(0, e.mean - e.low) for e in estimates], [max(0, e.high - e.mean) for e in estimates]],
                    label=method,
                    color=f"C{number}",
                    linewidth=2.5 if method == "ours" else 1.2,
                    marker="o",
                    markersize=4,
                    capsize=2,
                )
        for row in rows:
            if row.method == _TEACHER:
                panel.axhline(getattr(row.quality, name).mean, color="grey", linestyle="--", label=_TEACHER)
        panel.set(xlabel="parameters kept / parameters of the teacher", ylabel=f"{name} score", ylim=(0, 1))
        panel.set_xlim(min(shares) - 0.05, max(shares) + 0.05)
        panel.grid(alpha=0.3)
    panels[-1].legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    with replacing(path) as file:
        figure.savefig(file, format="png", dpi=150)
