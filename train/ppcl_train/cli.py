"""``ppcl train``: one command a stage, one for all stages, and commands for caches and the comparison."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from ppcl_rt.families import registry
from ppcl_train.compare.harness import PLOT, RESULTS, compare, show
from ppcl_train.compare.methods import METHODS, SEEDED
from ppcl_train.config.presets import CACHE_FAMILY, PRESETS
from ppcl_train.config.settings import RunConfig, with_changes
from ppcl_train.data import caching, captioned
from ppcl_train.data.shards import Limits, Manifest
from ppcl_train.engine.distributed import join
from ppcl_train.families import base as families
from ppcl_train.families.base import Encoder
from ppcl_train.pipeline import CONFIG, STAGES, begin, progress, reported, run_stages
from ppcl_train.pipeline import config_of as stored_config
from ppcl_train.pipeline import work as take_jobs
from ppcl_train.preflight import report

app = typer.Typer(help="Make a pluggable checkpoint, in stages that resume where they were stopped.")

Preset = Annotated[str, typer.Option(help=f"one of: {', '.join(PRESETS)}")]
Out = Annotated[Path, typer.Option(help="run folder; stages that are done in it are not run again")]
Teacher = Annotated[Path | None, typer.Option(help="start from this teacher.safetensors instead of training one")]
Set = Annotated[list[str] | None, typer.Option(help="change a setting: --set students.steps=100")]
Select = Annotated[str | None, typer.Option(help="how intervals are chosen: table, eq5 or eq5-literal")]

SamplerSteps = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="the teacher was distilled to so many denoising steps: train and measure on its own sampler's trajectory; "
        "short for --set sampler.steps=... --set data.trajectory=true",
    ),
]


def config_of(preset: str, changes: list[str] | None) -> RunConfig:
    """Return a preset with the settings that the command line changes.

    Parsed here and not by pydantic-settings or tyro: those parse whole command lines, and this one is typer's.

    Raises:
        ValueError: there is no such preset or setting, or the setting cannot take the value.
    """
    if preset not in PRESETS:
        raise ValueError(f"there is no preset {preset}; there are: {', '.join(PRESETS)}")
    parsed: dict[str, Any] = {}
    for change in changes or []:
        name, equals, value = change.partition("=")
        if not equals:
            raise ValueError(f"--set takes name=value, not {change}")
        try:
            parsed[name] = json.loads(value)
        except ValueError:
            parsed[name] = value
    return with_changes(PRESETS[preset], parsed)


def _begin(
    preset: str,
    out: Path,
    teacher: Path | None,
    changes: list[str] | None,
    select: str | None = None,
    sampler_steps: int | None = None,
) -> RunConfig:
    """Begin a run; returns its config: that of the folder, unless the command line changes settings."""
    if select is not None:
        changes = [*(changes or []), f"select={select}"]
    if sampler_steps is not None:
        changes = [*(changes or []), f"sampler.steps={sampler_steps}", "data.trajectory=true"]
    world = join()
    if world.is_main:
        stored = (out / CONFIG).exists() and not changes
        begin(stored_config(out) if stored else config_of(preset, changes), out, teacher)
    world.wait()
    return stored_config(out)


@app.command()
def run(
    preset: Preset = "scenes",
    out: Out = Path("runs/scenes"),
    teacher: Teacher = None,
    select: Select = None,
    sampler_steps: SamplerSteps = None,
    set: Set = None,
    unchecked: Annotated[bool, typer.Option(help="begin even if preflight says that it does not fit")] = False,
) -> None:
    """Run all stages that are not done yet, after a look at whether they fit this machine."""
    settings = _begin(preset, out, teacher, set, select, sampler_steps)
    if not unchecked and join().is_main:
        print(report.fitting(report.check(settings, report.Machine.here(out))))
    run_stages(settings, out)
    if join().is_main:
        print(f"wrote {out / 'checkpoint'}; {reported(out)}")


@app.command()
def preflight(
    preset: Preset = "scenes",
    set: Set = None,
    gpus: Annotated[int, typer.Option(min=1, help="of a node")] = 1,
    nodes: Annotated[int, typer.Option(min=1)] = 1,
    memory: Annotated[str, typer.Option(help="of a GPU")] = "80GB",
    host_memory: Annotated[str | None, typer.Option(help="of a node; not asked about by default")] = None,
    disk: Annotated[str | None, typer.Option(help="free for the run; not asked about by default")] = None,
    tflops: Annotated[float, typer.Option(help="sustained, of a GPU, in the teacher's dtype")] = 400.0,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
) -> None:
    """Say what every stage takes, in bytes and hours, and whether it fits; nothing is read but a config."""
    settings = config_of(preset, set)
    host, free = (None if text is None else float(caching.bytes_of(text)) for text in (host_memory, disk))
    machine = report.Machine(gpus, nodes, float(caching.bytes_of(memory)), host, free, tflops)
    if as_json:
        print(json.dumps(report.as_rows(report.rows(settings, machine)), indent=1))
    else:
        report.show(report.rows(settings, machine), machine)
    print(report.fitting(report.check(settings, machine)), file=sys.stderr if as_json else None)


@app.command()
def work(out: Out = Path("runs/scenes")) -> None:
    """Help a run that another process has begun: measure and select together with it, until it ends."""
    take_jobs(out)


@app.command()
def config(preset: Preset = "scenes", set: Set = None) -> None:
    """Print all settings of a preset as JSON."""
    print(config_of(preset, set).model_dump_json(indent=1))


@app.command()
def status(
    out: Out = Path("runs/scenes"), as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False
) -> None:
    """Say which stages of a run folder are done, how far the current one is and what is next."""
    settings = stored_config(out)
    stages = progress(out)
    waiting = [stage.stage for stage in stages if stage.state != "done"]
    following = waiting[0] if waiting else None
    if as_json:
        content = {"seed": settings.seed, "next": following, "stages": [stage._asdict() for stage in stages]}
        print(json.dumps(content, indent=1))
        return
    for stage in stages:
        steps = f", {stage.step} of {stage.of} steps saved" if stage.of else ""
        print(f"{stage.stage:>9}  {stage.state}{f', {stage.output}' if stage.state == 'done' else steps}")
    print(f"next: {following}" if following else f"complete: {out / 'checkpoint'}")


Family = Annotated[str, typer.Option(help=f"whose latents and embeddings: {' or '.join(registry.names())}")]
Pipeline = Annotated[str, typer.Option(help="folder or hub id of the pipeline; for scenes a checkpoint")]
CacheOut = Annotated[Path, typer.Option(help="folder of the cache; filling goes on where it was stopped")]
Samples = Annotated[int | None, typer.Option(min=1, help="stop at this many samples; may be raised later")]
MaxBytes = Annotated[
    str | None, typer.Option(help="stop at this many bytes of files, 800MB or 1.5TB; may be raised later")
]
Part = Annotated[
    str | None,
    typer.Option(help="1/8: the first of eight processes that share the work, each with an --out; torchrun says it"),
]
Strict = Annotated[bool, typer.Option(help="stop at an image or prompt that cannot be used, instead of leaving it out")]
Dtype = Annotated[str, typer.Option(help="of the cache and of the pipeline: bfloat16, float16 or float32")]
Device = Annotated[str | None, typer.Option(help="cuda if there is one")]


def _opened(family: str, pipeline: str, dtype: str, device: str | None, draws: bool) -> tuple[Encoder, torch.dtype]:
    """Open an encoder; returns it and the dtype to store in."""
    if dtype not in ("bfloat16", "float16", "float32"):
        raise ValueError(f"--dtype is bfloat16, float16 or float32, not {dtype}")
    local = os.environ.get("LOCAL_RANK", "0")
    device = device or (f"cuda:{local}" if torch.cuda.is_available() else "cpu")
    kind = getattr(torch, dtype)
    return families.of(family).open(pipeline, device=device, dtype=kind, draws=draws), kind


def _part(text: str | None, out: Path) -> tuple[tuple[int, int], Path]:
    """Say which part of the work this process does, and where its samples go.

    Processes that torchrun started do a part each, in a folder of ``out`` each.
    """
    if text is None:
        rank, size = (int(os.environ.get(name, default)) for name, default in (("RANK", 0), ("WORLD_SIZE", 1)))
        return (rank, size), out / str(rank + 1) if size > 1 else out
    part, _, parts = text.partition("/")
    if not (part.isdecimal() and parts.isdecimal() and 1 <= int(part) <= int(parts)):
        raise ValueError(f"--part is like 1/8, not {text}")
    return (int(part) - 1, int(parts)), out


def _say(manifest: Manifest, out: Path) -> None:
    size, left_out = manifest.bytes / 1e6, manifest.skipped.count
    print(f"{out} holds {manifest.samples} samples in {size:.1f} MB; left out: {left_out}")
    for what in manifest.skipped.first:
        print(f"  {what}")


@app.command()
def cache(
    out: CacheOut,
    pipeline: Pipeline = "",
    family: Family = CACHE_FAMILY,
    images: Annotated[Path | None, typer.Option(help="folder of images with .txt files or metadata.jsonl")] = None,
    webdataset: Annotated[str | None, typer.Option(help='tar shards: "data-{000..099}.tar" or "data-*.tar"')] = None,
    dataset: Annotated[str | None, typer.Option(help="hub id or folder that `datasets` loads")] = None,
    scenes: Annotated[int | None, typer.Option(min=1, help="make this many scenes (--family scenes)")] = None,
    split: Annotated[str, typer.Option(help="of the dataset")] = "train",
    image_column: Annotated[str, typer.Option(help="of the dataset")] = "image",
    caption_column: Annotated[str, typer.Option(help="of the dataset, metadata.jsonl or .json in a tar")] = "text",
    area: Annotated[int | None, typer.Option(min=1, help="pixels of an image; the family's own by default")] = None,
    samples: Samples = None,
    max_bytes: MaxBytes = None,
    part: Part = None,
    strict: Strict = False,
    workers: Annotated[int, typer.Option(min=0, help="processes that read shards of --webdataset side by side")] = 0,
    dtype: Dtype = "bfloat16",
    device: Device = None,
) -> None:
    """Encode captioned images into VAE latents and prompt embeddings, in shards that training reads."""
    given = [value for value in (images, webdataset, dataset, scenes) if value is not None]
    if len(given) != 1:
        raise ValueError("give one of --images, --webdataset, --dataset and --scenes")
    if not pipeline and family != "scenes":
        raise ValueError(f"give the --pipeline of {family}, a folder or a hub id: its VAE and text encoder are needed")
    if scenes is not None and family != "scenes":
        raise ValueError("scenes are pixels without a VAE: add --family scenes")
    limits = Limits(samples, None if max_bytes is None else caching.bytes_of(max_bytes))
    reader: captioned.Reader
    if images is not None:
        reader = captioned.Folder(images, caption_column)
    elif webdataset is not None:
        reader = captioned.Tars(webdataset, caption_column, workers)
    elif dataset is not None:
        reader = captioned.Dataset(dataset, split, image_column, caption_column)
    else:
        reader = captioned.MadeScenes(scenes or 0)
    (where, out), (encoder, kind) = _part(part, out), _opened(family, pipeline, dtype, device, draws=False)
    made = caching.cache(
        family,
        encoder,
        reader,
        out,
        settings={"pipeline": pipeline},
        dtype=kind,
        area=area,
        limits=limits,
        part=where,
        strict=strict,
    )
    _say(made, out)


@app.command()
def generate(
    out: CacheOut,
    pipeline: Pipeline,
    prompts: Annotated[Path, typer.Option(help='a prompt a line, or .jsonl with a "prompt" a line')],
    family: Family = CACHE_FAMILY,
    size: Annotated[list[str] | None, typer.Option(help="pixels, 1024x768; several sizes take turns")] = None,
    steps: Annotated[int, typer.Option(min=1)] = 50,
    guidance: Annotated[float, typer.Option(min=0, help="true classifier-free guidance; 1 for none")] = 4.0,
    negative: Annotated[str, typer.Option(help="negative prompt")] = " ",
    seed: Annotated[int, typer.Option(min=0)] = 0,
    samples: Samples = None,
    max_bytes: MaxBytes = None,
    part: Part = None,
    strict: Strict = False,
    dtype: Dtype = "bfloat16",
    device: Device = None,
) -> None:
    """Draw a picture for every prompt with the teacher itself, and write the pairs to shards that training reads."""
    limits = Limits(samples, None if max_bytes is None else caching.bytes_of(max_bytes))
    texts = caching.read_prompts(prompts)
    (where, out), (encoder, kind) = _part(part, out), _opened(family, pipeline, dtype, device, draws=True)
    side = round(encoder.area**0.5)
    made = caching.generate(
        family,
        encoder,
        texts,
        out,
        settings={"pipeline": pipeline},
        dtype=kind,
        sizes=[caching.size_of(text) for text in size or [f"{side}x{side}"]],
        steps=steps,
        guidance=guidance,
        negative=negative,
        seed=seed,
        limits=limits,
        part=where,
        strict=strict,
    )
    _say(made, out)


@app.command("compare")
def compare_methods(
    teacher: Annotated[Path, typer.Option(help="a teacher.safetensors, or a checkpoint folder that holds the teacher")],
    preset: Preset = "scenes",
    out: Annotated[Path, typer.Option(help="folder of the comparison; what is done in it is not run again")] = Path(
        "runs/compare"
    ),
    ratios: Annotated[
        str | None, typer.Option(help="parameters kept / those of the teacher, with commas between")
    ] = None,
    steps: Annotated[int | None, typer.Option(help="training steps of every method for a ratio")] = None,
    prompts: Annotated[int | None, typer.Option(help="unseen prompts to judge on")] = None,
    seeds: Annotated[int | None, typer.Option(help=f"training seeds of {' and '.join(SEEDED)}")] = None,
    methods: Annotated[str, typer.Option(help="methods, with commas between")] = ",".join(METHODS),
    device: Annotated[str, typer.Option(help="where to train and judge, for instance cuda")] = "cpu",
    set: Set = None,
) -> None:
    """Compare methods that make a model smaller, at equal steps: a table, a plot and results.json."""
    given = {"steps": steps, "prompts": prompts, "seeds": seeds}
    changes = [f"compare.{name}={value}" for name, value in given.items() if value is not None]
    if ratios is not None:
        changes.append(f"compare.ratios=[{ratios}]")
    changes += set or []
    run = stored_config(out) if (out / CONFIG).exists() and not changes else config_of(preset, changes)
    show(run, compare(run, out, teacher, methods.split(","), device))
    print(f"wrote {out / RESULTS} and {out / PLOT}")


def _stage_command(name: str) -> None:
    def command(
        preset: Preset = "scenes",
        out: Out = Path("runs/scenes"),
        teacher: Teacher = None,
        select: Select = None,
        set: Set = None,
    ) -> None:
        run_stages(_begin(preset, out, teacher, set, select), out, last=name)

    app.command(name, help=f"Run the stages up to and including {name}.")(command)


for _stage in STAGES:
    _stage_command(_stage.name)
