"""The stage *compress*: students as differences of low rank to what they were copied from, and their narrower widths.

Blocks of the teacher get both in the stage *width*. It comes before recovery, which trains the factors: these are then
what is held in float32, with gradients and moments.
"""

from __future__ import annotations

from pathlib import Path

import torch

from ppcl_rt import Interval
from ppcl_train.closed_form.compression import bytes_of, store_as_factors, student_as_factors
from ppcl_train.config.settings import RunConfig
from ppcl_train.engine.files import stored_in, write_tensors
from ppcl_train.engine.log import Log
from ppcl_train.stages import students
from ppcl_train.stages.assembly import assembled, opened
from ppcl_train.stages.width import compress_block, modulation_inputs, observe, portions

OUTPUT = "compressed.safetensors"


@torch.no_grad()
def compress(run: RunConfig, folder: Path) -> None:
    """Find what students run at narrower widths, and store them as factors; writes ``compressed.safetensors``."""
    log, config = Log(folder, "compress"), run.width
    given = stored_in(folder / students.OUTPUT)
    tensors: dict[str, torch.Tensor] = {}
    if given:
        model = opened(run, assembled(run, folder, given))
        architecture, catalog = model.catalog.architecture, model.catalog
        read_by_modulations = modulation_inputs(run, model)
        runnable = [(f"students.{key}", block, Interval.of_key(key).first) for key, block in model.students.items()]
        for portion in portions(runnable, config.blocks_at_once):
            statistics = observe(run, model, portion, config.samples)
            for prefix, _, first in portion:
                kind, copied = architecture.kind(first), catalog.student(Interval.of_key(prefix[9:])).copied_from
                bases = [model.blocks()[n] for n in copied]
                made = {
                    name.removeprefix(f"{prefix}."): each.read()
                    for name, each in given.items()
                    if name.startswith(f"{prefix}.")
                }
                student_as_factors(run, statistics[prefix], made, bases, read_by_modulations.get(kind))
                narrower = compress_block(run, statistics[prefix], read_by_modulations.get(kind))
                store_as_factors(run, statistics[prefix], narrower)
                made |= narrower
                tensors |= {f"{prefix}.{name}": tensor for name, tensor in made.items()}
            log(narrowed=len({name.split(".")[1] for name in tensors}), of=len(runnable))
        log(megabytes=bytes_of(tensors) / 1e6)
    write_tensors(folder / OUTPUT, tensors, {"share": run.compress.share})
