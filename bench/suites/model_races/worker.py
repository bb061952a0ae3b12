"""One group of contestants of ``bench_gpu_model.py``, in a process of its own: a fault of the device ends a process.

Imports everything, then waits for one line of JSON on standard input. What is measured is written to the file that the
line names, after every measurement. The name of what is about to run is written to the file next to it.

Exit status: 0 when all was done, 3 after a fault of the device, 2 without a CUDA device.
"""

from __future__ import annotations

import json
import signal
import sys
import time
from pathlib import Path
from typing import Any

import diffusers
import torch
import torch._dynamo
from diffusers.models.transformers import transformer_qwenimage

from model_races.machine import machine
from model_races.models import Models
from model_races.plans import described
from model_races.presets import REAL, TINY
from model_races.race import Race
from model_races.real_rope import rotate
from model_races.report import Report, failure
from model_races.sweep import Sweep


def work(job: dict[str, Any]) -> None:
    """Run one group.

    Args:
        job: ``group``; ``file`` to write; ``tiny``; ``seconds`` after which nothing new is begun; ``leave_out``: what
            failed before, name -> why; ``inject``: faults that tests put in; ``command``.
    """
    deadline = time.monotonic() + job["seconds"]
    preset = TINY if job["tiny"] else REAL
    report = Report(Path(job["file"]))
    if report.path.exists():
        # What an earlier process measured until it died.
        report.content = json.loads(report.path.read_text())
    report.running("")
    with torch.no_grad():
        models = Models(preset)
        report.content |= {
            "machine": machine(),
            "preset": {
                "heads": preset.heads,
                "head_dim": preset.head_dim,
                "blocks": preset.blocks,
                "walks": preset.walks,
                "dtype": str(preset.dtype).removeprefix("torch."),
            },
        }
        report.save()
        if job["group"] == "sweep":
            Sweep(job, models, report).run(deadline)
        else:
            for row in report.content.get("results", []):
                if row["key"] in job["leave_out"]:
                    row |= failure(job["leave_out"][row["key"]])
            race = Race(job, models, report)
            names = dict.fromkeys(each.plan for each in race.all)
            report.content["planned"] = {name: described(models.plan(name), models.catalog) for name in names}
            race.run(deadline)
    report.save()


def main() -> None:
    """Wait for the group to run, and run it."""
    diffusers.utils.logging.set_verbosity_error()
    transformer_qwenimage.apply_rotary_emb_qwen = rotate
    torch._dynamo.config.recompile_limit = 64
    given = sys.stdin.readline()
    if not given:
        return
    job = json.loads(given)
    # Ends this process if it hangs after its parent is gone.
    signal.alarm(int(job["limit"]) + 5)
    if not job["tiny"] and not torch.cuda.is_available():
        sys.exit(2)
    work(job)


if __name__ == "__main__":
    main()
