"""The stages of a run in order, each done once: a stage whose output is there is not run again."""

from __future__ import annotations

import contextlib
import filecmp
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

from safetensors import SafetensorError

from ppcl_rt.files import one_line as line
from ppcl_rt.planning.frozen import read_json
from ppcl_train.config.settings import RunConfig
from ppcl_train.engine.distributed import join
from ppcl_train.engine.files import (
    Log,
    in_use,
    locked,
    making,
    read_log,
    read_note,
    replacing,
    state_files,
    write_json,
)
from ppcl_train.selectors import cost_table as table
from ppcl_train.selectors import eq5 as probes
from ppcl_train.selectors import selection
from ppcl_train.stages import measure, recover, students, teacher, width


class Stage(NamedTuple):
    """A stage: what it is called, what it writes last, and what runs it."""

    name: str
    output: str
    run: Callable[[RunConfig, Path], None]
    # Whether all processes run it; rank 0 alone runs the others.
    parallel: bool = False


def select(run: RunConfig, folder: Path) -> None:
    """Choose the intervals that get students; writes ``selected.json``."""
    if run.select == "eq5":
        probes.fit(run, folder)
    else:
        table.measure(run, folder)


STAGES = (
    Stage("teacher", "teacher.safetensors", teacher.train),
    Stage("select", selection.OUTPUT, select),
    Stage("students", "students.safetensors", students.distil, parallel=True),
    Stage("width", "width.safetensors", width.prune),
    Stage("recover", recover.OUTPUT, recover.recover, parallel=True),
    Stage("measure", "sensitivities.json", measure.measure),
    Stage("pack", "checkpoint/run.json", measure.pack),
)

CONFIG = "config.json"


def begin(config: RunConfig, folder: Path, teacher_file: Path | None = None) -> None:
    """Make a run folder, or check that it belongs to this config.

    Args:
        teacher_file: a trained teacher to start from, in place of the first stage; or a checkpoint folder, whose
            teacher is taken out.

    Raises:
        ValueError: the folder was begun with another config, the teacher is of another architecture, or another
            process writes the folder.
    """
    if teacher_file is not None and teacher_file.is_dir():
        with tempfile.TemporaryDirectory() as temporary:
            extracted = Path(temporary) / "teacher.safetensors"
            teacher.extract(config, teacher_file, extracted)
            return begin(config, folder, extracted)
    trained = folder / STAGES[0].output
    _check(config, folder)
    if teacher_file is not None:
        teacher.check(config, teacher_file)
        if trained.exists() and not filecmp.cmp(trained, teacher_file, shallow=False):
            raise ValueError(f"{folder} has another teacher already: choose another --out")
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder):
        # Again, now that nobody else can begin it.
        _check(config, folder)
        if not (folder / CONFIG).exists():
            write_json(folder / CONFIG, config.model_dump(mode="json"))
        if teacher_file is not None and not trained.exists():
            with replacing(trained) as beside:
                shutil.copyfile(teacher_file, beside)


def config_of(folder: Path) -> RunConfig:
    """The config that a run folder was begun with.

    Raises:
        ValueError: it is no run folder, or the config is cut or altered.
    """
    stored = folder / CONFIG
    if not stored.exists():
        raise ValueError(f"{folder} is no run folder: begin one with `ppcl train run --out {folder}`")
    return read_json(RunConfig, stored.read_bytes(), f"{stored} is no run config")


def is_done(stage: Stage, folder: Path) -> bool:
    """Whether a stage's output is there."""
    return (folder / stage.output).exists()


def run_stages(config: RunConfig, folder: Path, last: str | None = None) -> None:
    """Run what is not done yet, up to and including the stage ``last``; every process of a world calls this.

    Raises:
        ValueError: another process writes the folder, or a stage cannot go on; what had been written is kept.
    """
    world = join()
    with locked(folder):
        for stage in STAGES:
            if not world.agree(is_done(stage, folder)) and (stage.parallel or world.is_main):
                with making(config, stage.name) as made_by:
                    Log(folder, stage.name)(begun=True, commit=made_by["commit"])
                    try:
                        stage.run(config, folder)
                    except (OSError, SafetensorError) as error:
                        raise ValueError(
                            f"{stage.name} stopped: {line(error)}; what was done before is kept"
                        ) from error
            world.wait()
            # Only now: a kill in between would otherwise lose the stage.
            for state in state_files(folder, stage.name) if world.is_main else []:
                state.unlink()
            if stage.name == last:
                return


class Progress(NamedTuple):
    """Where a stage is.

    Attributes:
        stage: its name.
        state: ``running`` while a process works on it, ``begun`` where one was stopped.
        step: steps that are saved, ``of`` so many; both 0 for a stage that has none.
        output: the file that it writes last.
    """

    stage: str
    state: Literal["done", "running", "begun", "waiting"]
    step: int
    of: int
    output: str


def progress(folder: Path) -> list[Progress]:
    """Say where every stage of a run folder is, at any time, whether a process is at work in it or not."""
    begun = {event.get("stage") for event in read_log(folder) if event.get("begun")}
    busy, found = in_use(folder), []
    for stage in STAGES:
        step = of = 0
        if is_done(stage, folder):
            found.append(Progress(stage.name, "done", step, of, stage.output))
            continue
        for state in state_files(folder, stage.name):
            # A stage that ends now takes its state with it.
            with contextlib.suppress(ValueError):
                note = read_note(state)
                step, of = step + note["step"], of + note["of"]
        current = all(earlier.state == "done" for earlier in found) and stage.name in begun
        now: Literal["running", "begun", "waiting"] = "waiting"
        if current or of:
            now = "running" if busy and current else "begun"
        found.append(Progress(stage.name, now, step, of, stage.output))
    return found


def _check(config: RunConfig, folder: Path) -> None:
    if not (folder / CONFIG).exists():
        return
    if difference := _difference(config_of(folder).model_dump(), config.model_dump()):
        raise ValueError(f"{folder} was begun with {difference}: go on with that, or choose another --out")


def _difference(before: Any, now: Any, path: str = "") -> str:
    """The first setting that differs, as ``name = value``; ``""`` where none does."""
    if isinstance(before, dict) and isinstance(now, dict):
        for key in {**before, **now}:
            if found := _difference(before.get(key), now.get(key), f"{path}.{key}" if path else key):
                return found
        return ""
    return "" if before == now else f"{path} = {before}"
