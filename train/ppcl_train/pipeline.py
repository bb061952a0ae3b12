"""The stages of a run in order, each done once: a stage whose output is there is not run again."""

from __future__ import annotations

import filecmp
import platform
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import diffusers
import torch

from ppcl_rt.plan import read_json
from ppcl_train import measure, probes, recover, students, teacher, width
from ppcl_train.config import RunConfig
from ppcl_train.distributed import join
from ppcl_train.runs import replacing, write_json


class Stage(NamedTuple):
    """A stage: what it is called, what it writes last, and what runs it."""

    name: str
    output: str
    run: Callable[[RunConfig, Path], None]
    # Whether all processes run it; rank 0 alone runs the others.
    parallel: bool = False


STAGES = (
    Stage("teacher", "teacher.safetensors", teacher.train),
    Stage("probes", "intervals.json", probes.fit),
    Stage("students", "students.safetensors", students.distil, parallel=True),
    Stage("width", "width.safetensors", width.prune),
    Stage("recover", recover.OUTPUT, recover.recover),
    Stage("measure", "sensitivities.json", measure.measure),
    Stage("pack", "checkpoint/config.json", measure.pack),
)


def begin(config: RunConfig, folder: Path, teacher_file: Path | None = None) -> None:
    """Make a run folder, or check that it belongs to this config.

    Args:
        teacher_file: a trained teacher to start from, in place of the first stage.

    Raises:
        ValueError: the folder was begun with another config or the teacher is of another architecture.
    """
    stored = folder / "config.json"
    if stored.exists():
        before = read_json(RunConfig, stored.read_bytes(), f"{stored} is no run config")
        if difference := _difference(before.model_dump(), config.model_dump()):
            raise ValueError(f"{folder} was begun with {difference}: go on with that, or choose another --out")
    trained = folder / STAGES[0].output
    if teacher_file is not None:
        teacher.check(config, teacher_file)
        if trained.exists() and not filecmp.cmp(trained, teacher_file, shallow=False):
            raise ValueError(f"{folder} has another teacher already: choose another --out")
    if not stored.exists():
        folder.mkdir(parents=True, exist_ok=True)
        versions = {"python": platform.python_version(), "torch": torch.__version__, "diffusers": diffusers.__version__}
        write_json(folder / "versions.json", versions)
        write_json(stored, config.model_dump(mode="json"))
    if teacher_file is not None and not trained.exists():
        with replacing(trained) as beside:
            shutil.copyfile(teacher_file, beside)


def is_done(stage: Stage, folder: Path) -> bool:
    """Whether a stage's output is there."""
    return (folder / stage.output).exists()


def run_stages(config: RunConfig, folder: Path, last: str = STAGES[-1].name) -> None:
    """Run what is not done yet, up to and including the stage ``last``; every process of a world calls this."""
    world = join()
    for stage in STAGES:
        if not world.agree(is_done(stage, folder)):
            if stage.parallel or world.is_main:
                stage.run(config, folder)
            world.wait()
            # Only now: a kill in between would otherwise lose the stage.
            for state in folder.glob("*.state.safetensors"):
                state.unlink()
        if stage.name == last:
            return


def _difference(before: Any, now: Any, path: str = "") -> str:
    """The first setting that differs, as ``name = value``; ``""`` where none does."""
    if isinstance(before, dict) and isinstance(now, dict):
        for key in {**before, **now}:
            if found := _difference(before.get(key), now.get(key), f"{path}.{key}" if path else key):
                return found
        return ""
    return "" if before == now else f"{path} = {before}"
