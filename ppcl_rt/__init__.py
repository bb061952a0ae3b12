"""One checkpoint of a large diffusion transformer, run at any ratio, as a drop-in for diffusers.

Names are imported when they are first asked for: torch and diffusers take seconds, in which ``ppcl web`` serves its
page already.
"""

from __future__ import annotations

import importlib
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ppcl_rt.families import registry

if TYPE_CHECKING:
    import torch

    from ppcl_rt.checkpoint.places import locate as locate
    from ppcl_rt.checkpoint.reader import Checkpoint as Checkpoint
    from ppcl_rt.checkpoint.writer import write_checkpoint as write_checkpoint
    from ppcl_rt.model.fitting import Room as Room
    from ppcl_rt.model.graphs import Mode
    from ppcl_rt.model.pluggable import Pluggable as Pluggable
    from ppcl_rt.model.program import BlockCall as BlockCall
    from ppcl_rt.model.program import Program as Program
    from ppcl_rt.model.program import TextRunRole as TextRunRole
    from ppcl_rt.ops import Streams as Streams
    from ppcl_rt.planning.architecture import Architecture as Architecture
    from ppcl_rt.planning.architecture import BlockList as BlockList
    from ppcl_rt.planning.architecture import Tokens as Tokens
    from ppcl_rt.planning.block_spec import BlockSpec as BlockSpec
    from ppcl_rt.planning.block_spec import Group as Group
    from ppcl_rt.planning.block_spec import Part as Part
    from ppcl_rt.planning.block_spec import Segment as Segment
    from ppcl_rt.planning.budget import Budget as Budget
    from ppcl_rt.planning.catalog import Catalog as Catalog
    from ppcl_rt.planning.interval import Interval as Interval
    from ppcl_rt.planning.legal import LegalCount as LegalCount
    from ppcl_rt.planning.legal import LegalWidths as LegalWidths
    from ppcl_rt.planning.legal import Student as Student
    from ppcl_rt.planning.legal import TextRun as TextRun
    from ppcl_rt.planning.plan import Plan as Plan
    from ppcl_rt.planning.plan import PlannedBlock as PlannedBlock
    from ppcl_rt.planning.planner import Planner as Planner
    from ppcl_rt.planning.quantisation import Quantisation as Quantisation
    from ppcl_rt.planning.schedule import Schedule as Schedule
    from ppcl_rt.planning.width import LINEAR_MAP as LINEAR_MAP
    from ppcl_rt.planning.width import Width as Width

# Where each public name is defined, below this package.
_PLACES = {
    "LINEAR_MAP": "planning.width",
    "Architecture": "planning.architecture",
    "BlockCall": "model.program",
    "BlockList": "planning.architecture",
    "BlockSpec": "planning.block_spec",
    "Budget": "planning.budget",
    "Catalog": "planning.catalog",
    "Checkpoint": "checkpoint.reader",
    "Group": "planning.block_spec",
    "Interval": "planning.interval",
    "LegalCount": "planning.legal",
    "LegalWidths": "planning.legal",
    "Part": "planning.block_spec",
    "Plan": "planning.plan",
    "PlannedBlock": "planning.plan",
    "Planner": "planning.planner",
    "Pluggable": "model.pluggable",
    "Program": "model.program",
    "Quantisation": "planning.quantisation",
    "Room": "model.fitting",
    "Schedule": "planning.schedule",
    "Segment": "planning.block_spec",
    "Streams": "ops",
    "Student": "planning.legal",
    "TextRun": "planning.legal",
    "TextRunRole": "model.program",
    "Tokens": "planning.architecture",
    "Width": "planning.width",
    "locate": "checkpoint.places",
    "write_checkpoint": "checkpoint.writer",
}

try:
    __version__ = version("ppcl-rt")
except PackageNotFoundError:
    # A source tree on the path that was never installed: a GPU machine without a network.
    __version__ = "0+unknown"


def load(
    path: str | Path,
    ratio: float = 1.0,
    *,
    params: float | str | None = None,
    flops: float | str | None = None,
    memory: float | str | None = None,
    latency: float | str | None = None,
    fit: float | str | None = None,
    pipeline: Any = None,
    offload: Literal["model"] | None = None,
    shape: tuple[int, ...] | str | None = None,
    plan: Plan | None = None,
    dtype: torch.dtype | None = None,
    device: str | torch.device | None = None,
    resident: Literal["plan", "all"] = "plan",
    graphs: Mode = "auto",
    quantize: Quantisation | str | None = None,
    subfolder: str | None = None,
    variant: str | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
    force_download: bool = False,
) -> Pluggable:
    """Load a checkpoint at a ratio, as a drop-in for the transformer of a diffusers pipeline.

    Args:
        path: a checkpoint folder or a hub id. A stock checkpoint loads too, at ratio 1.
        ratio: at most this share of the dense transformer's parameters, and of its FLOPs at the reference shape that
            the catalog names; in (0, 1], 1 is the dense model.
        params: at most so many parameters, also as ``"10B"``.
        flops: at most so many floating-point operations a forward at ``shape``, also as ``"40T"``.
        memory: at most so many bytes of weights in ``dtype``, also as ``"12GB"`` (GB is 1e9 bytes).
        latency: at most so many milliseconds a forward at ``shape`` on ``device``; the first time, this measures.
        fit: memory of the device that the whole pipeline runs on, also as ``"24GB"``: the transformer gets what the
            weights of the other parts and the larger of its own activations and the VAE's decoding leave. What a driver
            takes for itself is not counted: some hundred megabytes with CUDA.
        pipeline: the rest, for ``fit``: the folder of a diffusers pipeline, of which only the headers of its files are
            read (its floats count in the dtype of the transformer), or a pipeline, as it is. None: nothing but the
            transformer runs, and only its activations are left free.
        offload: for ``fit``: ``"model"`` where the pipeline runs under ``enable_model_cpu_offload``, one part at a
            time; None where all parts stay on the device, and for a pipeline that has been set up already.
        shape: (image tokens, text tokens) or (..., ..., batch), also as ``"4096+512x2"``; None for the reference shape.
        plan: run this `Plan` instead of planning for ``ratio``.
        dtype: torch dtype of the weights; None for the one that they are stored in.
        device: where to put them; None for the CPU.
        resident: ``"plan"`` reads what the plan needs, and later plans read what they miss when they are first set;
            ``"all"`` reads everything now, so that no later `set_ratio` reads from disk.
        graphs: CUDA graphs: ``"auto"`` where a forward waits for the host, True wherever it can be done, False never.
        quantize: hold weights of blocks in eight bits: ``"int8"``, ``"float8"``, ``"float8-dynamic"``, or a
            `Quantisation`, which names what stays as it is; None for all as it is.
        variant: of the weights, as in diffusers: ``"fp16"`` reads ``diffusion_pytorch_model.fp16.safetensors``.
        subfolder, revision, token, cache_dir, local_files_only, force_download: as in diffusers, for a hub id.

    Returns:
        The family's class, which is a subclass of its diffusers class, in eval mode.

    Raises:
        ValueError: anything wrong with the checkpoint or the arguments; one line says what was wanted, what came and
            what to do.
    """
    given = {
        "revision": revision,
        "token": token,
        "cache_dir": cache_dir,
        "local_files_only": local_files_only,
        "force_download": force_download,
    }
    # A token of False means: send none, not even a stored one.
    hub = {
        name: value for name, value in given.items() if value is not None and (value is not False or name == "token")
    }
    family = _family_of(path, subfolder, variant, hub)
    model: Pluggable = family.load(
        path,
        ratio,
        params=params,
        flops=flops,
        memory=memory,
        latency=latency,
        fit=fit,
        pipeline=pipeline,
        offload=offload,
        shape=shape,
        plan=plan,
        dtype=dtype,
        device=device,
        resident=resident,
        graphs=graphs,
        quantize=quantize,
        subfolder=subfolder,
        variant=variant,
        **hub,
    )
    return model


def _family_of(path: str | Path, subfolder: str | None, variant: str | None, hub: dict[str, Any]) -> Any:
    """The family's class of a checkpoint."""
    from ppcl_rt.checkpoint.places import locate
    from ppcl_rt.checkpoint.reader import Checkpoint

    source = Checkpoint(locate(path, subfolder, variant, **hub), variant)
    return registry.of_class(source.config.get("_class_name"), source.folder)


def __getattr__(name: str) -> Any:
    """Import a public name, or a folder of this package, when it is first asked for.

    A family's class is found by the registry.
    """
    if name in _PLACES:
        found = globals()[name] = getattr(importlib.import_module(f"ppcl_rt.{_PLACES[name]}"), name)
    elif name in {place.partition(".")[0] for place in _PLACES.values()}:
        found = importlib.import_module(f"ppcl_rt.{name}")
    else:
        found = registry.by_class_name(name)
    if found is None:
        raise AttributeError(f"module {__name__} has no attribute {name}")
    return found


def __dir__() -> list[str]:
    return __all__


__all__ = [*_PLACES, "__version__", "load", *registry.class_names()]
