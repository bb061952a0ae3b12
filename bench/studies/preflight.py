"""What preflight predicts of every stage against what it really takes: resident memory, for models of some sizes.

    OMP_NUM_THREADS=2 python bench/studies/preflight.py OUT --sizes 384x8 --sizes 768x8 --sizes 1536x6

Each size is a whole run of the task scenes with a random teacher, few steps, of which every one is saved, and few
samples, a process a stage. Ranks are those of the preset ``qwen-image-1gpu``, as shares of the width; ``--ranks 6``
takes those of ``qwen-image``.
Measured is the resident memory that is not a file's (``RssAnon``), above what it is after the same stage of a tiny
model, which loads all libraries, every 10 milliseconds; what is freed goes back to the system at once, as on a GPU it
goes back to the allocator (``MALLOC_MMAP_THRESHOLD_``). And the most that the run folder holds on disk, without the
teacher. Writes ``preflight.json`` next to the run folders.
"""

from __future__ import annotations

import contextlib
import gc
import itertools
import json
import math
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

from ppcl_rt.files import write_json
from ppcl_train import pipeline
from ppcl_train.config.presets import PRESETS
from ppcl_train.config.settings import RunConfig, with_changes
from ppcl_train.engine.files import stored_in, write_tensors
from ppcl_train.preflight.needs import STAGES
from ppcl_train.preflight.sizes import Sizes

HEAD = 64
# Of `qwen-image-1gpu`: 3,072 over 256.
RANKS = 12
# Its run folder.
TINY = "tiny"
# What is freed goes back to the system, if it is larger than this.
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


def settings_of(dim: int, depth: int, ranks: int = RANKS) -> RunConfig:
    """A run of scenes of a width and a depth; factors have at most the rank ``dim // ranks``."""
    scenes = PRESETS["scenes"]
    shape: dict[str, Any] = {"num_layers": depth, "num_attention_heads": dim // HEAD, "attention_head_dim": HEAD}
    shape["axes_dims_rope"] = [16, 24, 24]
    return with_changes(
        scenes,
        {
            "teacher.architecture": {**scenes.teacher.architecture, **shape},
            "teacher.compile": False,
            "tracker": "none",
            "save_every": 1,
            "batch": 8,
            "table.lengths": [2],
            "table.steps": 2,
            "table.trial_steps": 1,
            "table.starts": ["first"],
            "table.batches": 1,
            "table.batch": 4,
            "table.samples": 4,
            "table.most_students": 2,
            "table.ratio_step": 0.1,
            "students.steps": 3,
            "students.batch": 8,
            "students.at_once": 1,
            "width.heads": [0.5],
            "width.channels": [0.5],
            "width.ranks": [dim // 48],
            "width.samples": 16,
            "width.blocks_at_once": 2,
            "width.longest_text_run": 2,
            "compress.most_rank": dim // ranks,
            "recover.steps": 3,
            "recover.batch": 8,
            "recover.spacing": 0.1,
            "refine.steps": 3,
            "refine.batch": 8,
            "refine.spacing": 0.1,
            "refine.other_spacing": 0.5,
            "measure.samples": 4,
            "measure.spacing": 0.2,
            "measure.other_spacing": 0.5,
            "measure.candidates": 1,
        },
    )


def resident() -> int:
    """Bytes of this process in memory that are no file's."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(next(line for line in status.splitlines() if line.startswith("RssAnon")).split()[1])


def on_disk(folder: Path) -> int:
    """Bytes of a run folder without the teacher, which is where it came from."""
    total = 0
    # Files come and go meanwhile; `os.walk` passes over folders that are gone.
    for place, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                total += 0 if name == "teacher.safetensors" else os.stat(os.path.join(place, name)).st_size
    return total


def run_stage(folder: Path, stage: str) -> None:
    """Run one stage in this process, after the same stage of the tiny model; prints the bytes above the baseline."""
    config, peak, disk, done = pipeline.config_of(folder), 0, 0, threading.Event()
    tiny = folder.with_name(TINY)
    pipeline.run_stages(pipeline.config_of(tiny), tiny, last=stage)
    gc.collect()
    baseline = resident()

    def watch() -> None:
        nonlocal peak, disk
        for number in itertools.count():
            if done.wait(0.01):
                return
            peak = max(peak, resident())
            if number % 20 == 0:
                disk = max(disk, on_disk(folder))

    watcher = threading.Thread(target=watch)
    watcher.start()
    started = time.monotonic()
    pipeline.run_stages(config, folder, last=stage)
    seconds = time.monotonic() - started
    done.set()
    watcher.join()
    print(json.dumps({"peak": max(0, peak - baseline), "seconds": seconds, "disk": max(disk, on_disk(folder))}))


def begin(folder: Path, config: RunConfig) -> None:
    """Begin a run with a random teacher."""
    pipeline.begin(config, folder)
    torch.manual_seed(0)
    model = config.family.build(config.teacher.architecture)
    write_tensors(folder / pipeline.STAGES[0].output, dict(model.named_parameters()), {})


def measured(folder: Path, config: RunConfig) -> dict[str, dict[str, float]]:
    """Run all stages, each in a process of its own; returns bytes and seconds by stage."""
    tiny = folder.with_name(TINY)
    shutil.rmtree(tiny, ignore_errors=True)
    begin(tiny, settings_of(HEAD, 3))
    begin(folder, config)
    found = {}
    for stage in STAGES:
        command = [sys.executable, __file__, str(folder), "--stage", stage]
        said = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=os.environ | ALLOCATOR).stdout
        found[stage] = json.loads(said.splitlines()[-1])
    return found


def states(config: RunConfig, folder: Path) -> int:
    """Bytes of two states of recovery: what refinement trains, its two moments and its average."""
    numbers = sum(math.prod(each.shape) for each in stored_in(folder / "refined.safetensors").values())
    return 2 * 4 * numbers * (3 + bool(config.refine.ema))


def main(
    out: Path,
    sizes: Annotated[list[str] | None, typer.Option(help="width x blocks")] = None,
    ranks: Annotated[int, typer.Option(help="the width over the largest rank")] = RANKS,
    stage: Annotated[str | None, typer.Option(help="run this stage of the run folder OUT alone")] = None,
) -> None:
    """Compare; prints a table."""
    if stage is not None:
        return run_stage(out, stage)
    results: list[dict[str, Any]] = []
    bounds: list[dict[str, Any]] = []
    table = Table("model", "stage", "predicted MB", "measured MB", "ratio", "seconds", "disk MB")
    for size in sizes or ["384x8"]:
        dim, depth = map(int, size.split("x"))
        config = settings_of(dim, depth, ranks)
        shapes, found = Sizes(config), measured(out / size, config)
        for name, needs_of in STAGES.items():
            needs = needs_of(shapes, 1)
            predicted, real = needs.of_one_memory, found[name]["peak"]
            if name == "teacher":
                # It is given, and not trained.
                continue
            results.append(
                {"size": size, "params": shapes.params, "stage": name, "predicted": predicted, **found[name]}
            )
            row = (f"{predicted / 1e6:.0f}", f"{real / 1e6:.0f}", f"{real / max(predicted, 1):.2f}")
            seconds, disk = found[name]["seconds"], found[name]["disk"]
            table.add_row(f"{size}, {shapes.params / 1e6:.0f}M", name, *row, f"{seconds:.0f}", f"{disk / 1e6:.0f}")
        most, checkpoint = max(each["disk"] for each in found.values()), on_disk(out / size / "checkpoint")
        bounds.append({"size": size, "disk": most, "checkpoint": checkpoint, "two_states": states(config, out / size)})
        write_json(out / "preflight.json", {"rows": results, "disk": bounds})
        table.add_section()
    console = Console(width=120)
    console.print(table)
    for size, disk, checkpoint, two in (each.values() for each in bounds):
        share = disk / (checkpoint + two)
        parts = f"checkpoint {checkpoint / 1e6:.0f} MB + two states of recovery {two / 1e6:.0f} MB"
        console.print(f"{size}: {disk / 1e6:.0f} MB on disk at most, {share:.2f} of {parts}")


if __name__ == "__main__":
    typer.run(main)
