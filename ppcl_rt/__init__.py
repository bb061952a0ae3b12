"""One checkpoint of a large diffusion transformer, run at any ratio, as a drop-in for diffusers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ppcl_rt.checkpoint.reader import Checkpoint, locate, write_checkpoint
from ppcl_rt.families.qwen_image import PPCLQwenImageTransformer2DModel
from ppcl_rt.model.pluggable import HUB_ARGUMENTS
from ppcl_rt.model.program import Program, ProgramStep
from ppcl_rt.ops import Streams
from ppcl_rt.planning.catalog import Catalog, Option, Shape, Student, TextRun, Widths
from ppcl_rt.planning.plan import Interval, Plan, Step, Width
from ppcl_rt.planning.planner import Planner
from ppcl_rt.planning.schedule import Schedule

FAMILIES = {cls.stock_name: cls for cls in (PPCLQwenImageTransformer2DModel,)}


def load(path: str | Path, ratio: float = 1.0, **kwargs: Any) -> Any:
    """Load a checkpoint at a ratio, as a drop-in for the transformer of a diffusers pipeline.

    Args:
        path: a checkpoint folder or a hub id. A stock checkpoint loads too, at ratio 1.
        ratio: parameters kept / parameters of the dense transformer, in (0, 1]; 1 is the teacher exactly.

    Keyword Args:
        plan: run this `Plan` instead of planning for ``ratio``.
        dtype: torch dtype of the weights; None for the one that they are stored in.
        device: where to put them; None for the CPU.
        resident: ``"plan"`` reads what the plan needs, and later plans read what they miss when they are first set;
            ``"all"`` reads everything now, so that no later `set_ratio` reads from disk.
        graphs: CUDA graphs: ``"auto"`` where a forward waits for the host, True wherever it can be done, False never.
        subfolder, revision, token, cache_dir, local_files_only: as in diffusers.

    Returns:
        A subclass of the family's diffusers class, in eval mode.

    Raises:
        ValueError: anything wrong with the checkpoint or the arguments; one line says what was wanted, what came and
            what to do.
    """
    hub = {name: kwargs[name] for name in HUB_ARGUMENTS if name in kwargs}
    source = Checkpoint(locate(path, kwargs.get("subfolder"), **hub))
    name = source.config.get("_class_name")
    if not isinstance(name, str) or name not in FAMILIES:
        raise ValueError(f"{source.folder} is a {name}; the families here are: {', '.join(FAMILIES)}")
    return FAMILIES[name].load(path, ratio, **kwargs)


__all__ = [
    "Catalog",
    "Checkpoint",
    "Interval",
    "Option",
    "PPCLQwenImageTransformer2DModel",
    "Plan",
    "Planner",
    "Program",
    "ProgramStep",
    "Schedule",
    "Shape",
    "Step",
    "Streams",
    "Student",
    "TextRun",
    "Width",
    "Widths",
    "load",
    "locate",
    "write_checkpoint",
]
