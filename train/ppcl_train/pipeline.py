"""The stages of a run, in order.

A stage whose output is there, or is of no use any more, is done, and is not run again.
"""

from __future__ import annotations

import filecmp
import functools
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

from safetensors import SafetensorError

from ppcl_rt.files import one_line, replacing
from ppcl_rt.planning.frozen import read_json
from ppcl_rt.report.page import write_report
from ppcl_train.config.settings import RunConfig
from ppcl_train.data.teacher_file import check_teacher, extract_teacher
from ppcl_train.engine.distributed import join
from ppcl_train.engine.files import write_json
from ppcl_train.engine.lock import in_use, locked
from ppcl_train.engine.log import Log, read_log, say
from ppcl_train.engine.provenance import making
from ppcl_train.engine.queue import work_under_way
from ppcl_train.engine.saving import delete_states, saved_steps
from ppcl_train.stages import compress, measure, pack, pictures, recover, select, students, teacher, width
from ppcl_train.stages.letting_go import LETS_GO, let_go


class Stage(NamedTuple):
    """A stage.

    Attributes:
        name: of the stage, in commands and in the log.
        output: the file that it writes last, in the run folder.
        run: runs it, or goes on with it.
        parallel: whether all processes run it; the other stages run in the process of rank 0 alone.
        take_part: takes jobs of the queue that it works at now, in a process that does not run it; None where it has
            no queue. Called with a function that takes what a `Log` does.
    """

    name: str
    output: str
    run: Callable[[RunConfig, Path], None]
    parallel: bool = False
    take_part: Callable[[RunConfig, Path, Callable[..., None]], Any] | None = None


STAGES = (
    Stage("teacher", teacher.OUTPUT, teacher.train),
    Stage("width", width.OUTPUT, width.prune, parallel=True),
    Stage("select", select.OUTPUT, select.select, parallel=True, take_part=select.take_part),
    Stage("students", students.OUTPUT, students.distil, parallel=True),
    Stage("compress", compress.OUTPUT, compress.compress, parallel=True),
    Stage("recover", recover.OUTPUT, recover.recover, parallel=True, take_part=recover.take_part),
    Stage("refine", recover.REFINED, recover.refine, parallel=True, take_part=recover.take_part),
    Stage("measure", measure.OUTPUT, measure.measure, parallel=True, take_part=measure.take_part),
    Stage("pack", pack.OUTPUT, pack.pack, parallel=True, take_part=pack.take_part),
    Stage("pictures", pictures.OUTPUT, pictures.draw),
)

CONFIG = "config.json"
# Seconds between two looks of `work` for a queue.
_LOOK = 0.5


def begin(config: RunConfig, folder: Path, teacher_file: Path | None = None) -> None:
    """Make a run folder, or check that it belongs to this config.

    Args:
        config: of the run.
        folder: of the run.
        teacher_file: a trained teacher to start from, instead of the first stage; or a checkpoint folder that holds the
            teacher.

    Raises:
        ValueError: the folder was begun with another config, the teacher is of another architecture, or another
            process writes the folder.
    """
    if teacher_file is not None and teacher_file.is_dir():
        with tempfile.TemporaryDirectory() as temporary:
            extracted = Path(temporary) / "teacher.safetensors"
            extract_teacher(config, teacher_file, extracted)
            return begin(config, folder, extracted)
    trained = folder / STAGES[0].output
    _check(config, folder)
    if teacher_file is not None:
        check_teacher(config, teacher_file)
        if trained.exists() and not filecmp.cmp(trained, teacher_file, shallow=False):
            raise ValueError(f"{folder} has another teacher already: choose another --out")
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder):
        # Checked again, now that no other process can begin it.
        _check(config, folder)
        if not (folder / CONFIG).exists():
            write_json(folder / CONFIG, config.model_dump(mode="json"))
        if teacher_file is not None and not trained.exists():
            with replacing(trained) as temporary:
                shutil.copyfile(teacher_file, temporary)


def config_of(folder: Path) -> RunConfig:
    """Read the config that a run folder was begun with.

    Raises:
        ValueError: the folder is no run folder, or its config is cut or altered.
    """
    stored = folder / CONFIG
    if not stored.exists():
        raise ValueError(f"{folder} is no run folder: begin one with `ppcl train run --out {folder}`")
    return read_json(RunConfig, stored.read_bytes(), f"{stored} is no run config")


def is_done(stage: Stage, folder: Path) -> bool:
    """Whether the output of a stage is there, or a stage is done after which nobody reads it (`LETS_GO`)."""
    return (folder / stage.output).exists() or any(
        stage.name in LETS_GO.get(later.name, ()) and is_done(later, folder) for later in STAGES
    )


def run_stages(config: RunConfig, folder: Path, last: str | None = None) -> None:
    """Run the stages that are not done, up to and including the stage ``last``; every process of a world calls this.

    Raises:
        ValueError: another process writes the folder, or a stage cannot go on; all files that are complete are kept.
    """
    world = join()
    with locked(folder):
        for stage in STAGES:
            if not world.agree(is_done(stage, folder)) and (stage.parallel or world.is_main):
                with making(config, stage.name) as made_by, world.naming(stage.name):
                    Log(folder, stage.name)(begun=True, commit=made_by["commit"])
                    try:
                        stage.run(config, folder)
                    except (OSError, SafetensorError) as error:
                        raise ValueError(
                            f"{stage.name} stopped: {one_line(error)}; what was done before is kept"
                        ) from error
            with world.naming(stage.name):
                world.wait()
            # Deleted only after the output is there: a kill in between would otherwise lose the stage.
            if world.is_main:
                delete_states(folder, stage.name)
                for name in () if config.keep_all else LETS_GO.get(stage.name, ()):
                    let_go(folder / next(each.output for each in STAGES if each.name == name))
            if stage.name == last:
                return


def reported(folder: Path) -> str:
    """Write the page of a run (`ppcl_rt.report`) into its folder; returns what there is to say of that.

    A run that trained for a night does not fail by a page that cannot be written.
    """
    try:
        return f"wrote {write_report(folder)}"
    except (OSError, ValueError) as error:
        return f"wrote no report: {one_line(error)}; try again with `ppcl report {folder}`"


def work(folder: Path) -> None:
    """Take jobs of the stages that another process runs, as long as one runs stages of this folder.

    Raises:
        ValueError: nobody runs stages of this folder, or results would be others than those of the processes that do.
    """
    config, before = config_of(folder), None
    if not in_use(folder):
        raise ValueError(f"nobody works at {folder}: start `ppcl train run --out {folder}` first")
    while in_use(folder):
        now, stage = work_under_way(folder), next((stage for stage in STAGES if not is_done(stage, folder)), None)
        if now in (None, before) or stage is None or stage.take_part is None:
            time.sleep(_LOOK)
            continue
        try:
            with making(config, stage.name):
                stage.take_part(config, folder, functools.partial(say, stage.name))
        except (OSError, SafetensorError, ValueError):
            # The stage may have ended, and what it worked on be gone.
            if work_under_way(folder) == now:
                raise
        before = now


class Progress(NamedTuple):
    """How far a stage is.

    Attributes:
        stage: its name.
        state: ``running`` while a process works on it, ``begun`` if a process was stopped in it.
        step: the steps that are saved; 0 for a stage without steps.
        of: the steps in all; 0 for a stage without steps.
        output: the file that it writes last.
    """

    stage: str
    state: Literal["done", "running", "begun", "waiting"]
    step: int
    of: int
    output: str


def progress(folder: Path) -> list[Progress]:
    """Return how far every stage of a run folder is, at any time: also while a process writes the folder."""
    begun = {event.get("stage") for event in read_log(folder) if event.get("begun")}
    busy, found = in_use(folder), []
    for stage in STAGES:
        step = of = 0
        if is_done(stage, folder):
            found.append(Progress(stage.name, "done", step, of, stage.output))
            continue
        step, of = saved_steps(folder, stage.name)
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
    """Return the first setting that differs, as ``name = value``, or ``""``."""
    if isinstance(before, dict) and isinstance(now, dict):
        for key in {**before, **now}:
            if found := _difference(before.get(key), now.get(key), f"{path}.{key}" if path else key):
                return found
        return ""
    return "" if before == now else f"{path} = {before}"
