"""``ppcl train``: one command a stage, one for all."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from ppcl_train.config import PRESETS, RunConfig, with_changes
from ppcl_train.distributed import join
from ppcl_train.pipeline import CONFIG, STAGES, begin, progress, run_stages
from ppcl_train.pipeline import config_of as stored_config

app = typer.Typer(help="Make a pluggable checkpoint: stages that resume where they were stopped.")

Preset = Annotated[str, typer.Option(help=f"one of: {', '.join(PRESETS)}")]
Out = Annotated[Path, typer.Option(help="run folder; what is done in it is not done again")]
Teacher = Annotated[Path | None, typer.Option(help="start from this teacher.safetensors instead of training one")]
Set = Annotated[list[str] | None, typer.Option(help="change a setting: --set students.steps=100")]


def config_of(preset: str, changes: list[str] | None) -> RunConfig:
    """A preset with settings changed on the command line.

    Raises:
        ValueError: no such preset or setting, or a value that it cannot take.
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


def _begin(preset: str, out: Path, teacher: Path | None, changes: list[str] | None) -> RunConfig:
    """The config of a run: what the folder was begun with, unless the command line says otherwise."""
    world = join()
    if world.is_main:
        begin(
            stored_config(out) if (out / CONFIG).exists() and not changes else config_of(preset, changes), out, teacher
        )
    world.wait()
    return stored_config(out)


@app.command()
def run(preset: Preset = "scenes", out: Out = Path("runs/scenes"), teacher: Teacher = None, set: Set = None) -> None:
    """Run all stages that are not done yet."""
    run_stages(_begin(preset, out, teacher, set), out)
    if join().is_main:
        print(f"wrote {out / 'checkpoint'}")


@app.command()
def config(preset: Preset = "scenes", set: Set = None) -> None:
    """Print all settings of a preset as JSON."""
    print(config_of(preset, set).model_dump_json(indent=1))


@app.command()
def status(
    out: Out = Path("runs/scenes"), as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False
) -> None:
    """Say what a run folder has done, where it is and what is next; it may be running."""
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


def _stage_command(name: str) -> None:
    def command(
        preset: Preset = "scenes", out: Out = Path("runs/scenes"), teacher: Teacher = None, set: Set = None
    ) -> None:
        run_stages(_begin(preset, out, teacher, set), out, last=name)

    app.command(name, help=f"Run the stages up to and including {name}.")(command)


for _stage in STAGES:
    _stage_command(_stage.name)
