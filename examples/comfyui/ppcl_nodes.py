"""Nodes of ComfyUI that draw with a pluggable checkpoint, the ratio as an input.

Put this file into ComfyUI's folder ``custom_nodes``, and install ``ppcl-rt`` into ComfyUI's python.
"""

from __future__ import annotations

import contextlib
import copy
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import comfy.model_management as management
import comfy.utils
import folder_paths
import numpy as np
import torch

import ppcl_rt
from ppcl_rt.pipelines.drawing import How
from ppcl_rt.pipelines.task import PipelineTask, Places, Task, places, task_of

CATEGORY = "ppcl"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
FORMATS = ("int8", "float8", "float8-dynamic")
# ComfyUI's folders of pipelines: models/diffusers, and what its settings add.
HOMES = "diffusers"
LARGEST_SEED = 2**64 - 1
MOST_PIXELS = 16384

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Loaded:
    """A checkpoint that is loaded once, and what draws with it. No node changes it."""

    model: Any
    task: Task


class LoadPluggablePipeline:
    """Load a checkpoint and the pipeline that it draws through."""

    RETURN_TYPES = ("PPCL_PIPELINE",)
    RETURN_NAMES = ("pipeline",)
    FUNCTION = "load"
    CATEGORY = CATEGORY
    DESCRIPTION = "Loads a pluggable checkpoint once; the ratio is chosen where it samples."

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """Inputs, as ComfyUI asks for them."""
        devices = ("auto", "cpu", *(f"cuda:{n}" for n in range(torch.cuda.device_count())))
        return {
            "required": {
                "folder": _text("pipeline or checkpoint: a path, or the name of a folder in models/diffusers"),
                "dtype": _one_of("of the weights; auto: float32 on a CPU, else bfloat16", "auto", *DTYPES),
                "device": _one_of("auto: the one that ComfyUI computes on", *devices),
                "quantize": _one_of("weights of blocks in eight bits", "none", *FORMATS),
            },
            "optional": {
                "transformer": _text("a pluggable checkpoint in the place of the pipeline's own; empty for its own"),
            },
        }

    @classmethod
    def VALIDATE_INPUTS(cls, folder: str | None = None) -> bool | str:
        """True, or why ComfyUI should not begin; None is a text that another node makes later."""
        try:
            return folder is None or bool(located(folder))
        except ValueError as error:
            return str(error)

    @classmethod
    def IS_CHANGED(cls, folder: str | None = None, transformer: str | None = "", **others: Any) -> str:
        """Differ when the checkpoint was written anew, so that ComfyUI loads it again."""
        if folder is None or transformer is None:
            return ""
        config = Path(where(folder, transformer).transformer) / "config.json"
        return f"{config} {config.stat().st_mtime_ns}" if config.is_file() else str(config)

    def load(
        self, folder: str, dtype: str = "auto", device: str = "auto", quantize: str = "none", transformer: str = ""
    ) -> tuple[Loaded]:
        """Load at the smallest plan; other ratios read what they miss when they first run.

        Raises:
            ValueError: there is no such folder, or it is no checkpoint that can be drawn with; in one line.
        """
        found = where(folder, transformer)
        target = management.get_torch_device() if device == "auto" else torch.device(device)
        kind = DTYPES.get(dtype, torch.float32 if target.type == "cpu" else torch.bfloat16)
        if target.type != "cpu":
            management.unload_all_models()
        # ComfyUI runs nodes in inference mode; tensors that are made in it cannot be changed in place out of it.
        with torch.inference_mode(False), torch.no_grad():
            catalog = ppcl_rt.Checkpoint(ppcl_rt.locate(found.transformer)).catalog
            how: dict[str, Any] = {"dtype": kind, "device": target}
            if quantize != "none":
                how["quantize"] = quantize
            if catalog is not None:
                planner = ppcl_rt.Planner(catalog)
                how["plan"] = planner.plan(planner.smallest_in_digits)
            model = ppcl_rt.load(found.transformer, **how)
            task = task_of(model.catalog, found.pipeline)
            if isinstance(task, PipelineTask):
                # Now, so that a broken pipeline is this node's error.
                task.drawing(model)
        return (Loaded(model, task),)


class SampleAtRatio:
    """Draw pictures at a ratio."""

    RETURN_TYPES = ("IMAGE",)
    RETURN_NAMES = ("image",)
    FUNCTION = "sample"
    CATEGORY = CATEGORY
    DESCRIPTION = "Draws at most at this ratio of the dense model's parameters and FLOPs. 0 leaves a setting as it is."

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """Inputs, as ComfyUI asks for them."""
        ratio = {"default": 0.5, "min": 0.05, "max": 1.0, "step": 0.01, "round": 0.001, "display": "slider"}
        side = {"default": 0, "min": 0, "max": MOST_PIXELS, "step": 16, "tooltip": "pixels; 0: the checkpoint's own"}
        steps = {"default": 0, "min": 0, "max": 1000, "tooltip": "denoising steps; 0: the checkpoint's own"}
        guidance = {"default": 0.0, "min": 0.0, "max": 100.0, "step": 0.1, "round": 0.01}
        return {
            "required": {
                "pipeline": ("PPCL_PIPELINE",),
                "prompt": _text("what to draw", multiline=True),
                "negative": _text("what not to draw; empty: the checkpoint's own", multiline=True),
                "ratio": ("FLOAT", ratio | {"tooltip": "share of the dense model's parameters and FLOPs; 1 is all"}),
                "steps": ("INT", steps),
                "guidance": ("FLOAT", guidance | {"tooltip": "1: none; 0: the checkpoint's own"}),
                "seed": ("INT", {"default": 0, "min": 0, "max": LARGEST_SEED, "control_after_generate": True}),
                "width": ("INT", side),
                "height": ("INT", side),
            },
            "optional": {
                "count": ("INT", {"default": 1, "min": 1, "max": 64, "tooltip": "pictures of one prompt, a seed each"}),
            },
        }

    def sample(
        self,
        pipeline: Loaded,
        prompt: str,
        negative: str = "",
        ratio: float = 0.5,
        steps: int = 0,
        guidance: float = 0.0,
        seed: int = 0,
        width: int = 0,
        height: int = 0,
        count: int = 1,
    ) -> tuple[torch.Tensor]:
        """Draw ``count`` pictures: ``[B, H, W, 3]`` float32 in [0, 1], on the CPU.

        Raises:
            ValueError: the ratio is below the smallest plan, or it cannot be drawn in this way; in one line.
        """
        model, task = pipeline.model, _with_negative(pipeline.task, negative)
        if bool(width) != bool(height):
            raise ValueError(f"give width and height, or 0 for both: not {width} and {height}")
        how = How(steps or None, guidance or None, (width, height) if width else None)
        for note in task.check([prompt]):
            log.warning(note)
        bar = comfy.utils.ProgressBar(1)

        def on_step(done: int, of: int) -> None:
            bar.update_absolute(done, of)
            management.throw_exception_if_processing_interrupted()

        if model.device.type != "cpu":
            # Weights that are held already are counted too, which leaves room for activations.
            management.free_memory(model.costs(model.planner.plan(ratio))["memory"], model.device)
        with torch.inference_mode(False), torch.no_grad(), model.at(ratio=ratio):
            pictures = task.sample(model, [prompt] * count, seed, how, on_step)
            log.info("drew %d at ratio %.3f, asked for %.3f", count, model.catalog.ratio(model.plan), ratio)
        pixels = [np.asarray(picture.convert("RGB"), dtype=np.float32) / 255 for picture in pictures]
        return (torch.from_numpy(np.stack(pixels)),)


def _text(tooltip: str, multiline: bool = False) -> tuple[str, dict[str, Any]]:
    """An input of text."""
    return "STRING", {"default": "", "multiline": multiline, "tooltip": tooltip}


def _one_of(tooltip: str, *choices: str) -> tuple[list[str], dict[str, Any]]:
    """An input of one of several; the first is the default."""
    return list(choices), {"default": choices[0], "tooltip": tooltip}


def located(folder: str) -> Path:
    """Find a folder: by its name in ComfyUI's folders of pipelines, or by its path.

    Raises:
        ValueError: there is none.
    """
    asked = folder.strip().strip("\"'")
    homes = [Path(home) for home in folder_paths.get_folder_paths(HOMES)]
    for home in (*homes, Path()):
        if asked and (home / Path(asked).expanduser()).is_dir():
            return home / Path(asked).expanduser()
    there = sorted({each.name for home in homes if home.is_dir() for each in home.iterdir() if each.is_dir()})
    names = ", ".join(there) or "none"
    raise ValueError(f'there is no folder "{asked}": give a path, or one of the folders in models/{HOMES} ({names})')


def where(folder: str, transformer: str) -> Places:
    """Say where checkpoint and pipeline lie.

    Raises:
        ValueError: there is no such folder, or a transformer for no pipeline.
    """
    path, own = str(located(folder)), transformer.strip()
    if not own:
        return places(path)
    # If it is no folder, it may be a hub id: then it is found, or refused, when it is loaded.
    with contextlib.suppress(ValueError):
        own = str(located(own))
    return places(path, own)


def _with_negative(task: Task, negative: str) -> Task:
    """The same task with another negative prompt; all else is shared.

    Raises:
        ValueError: it takes none.
    """
    if not negative.strip():
        return task
    if not isinstance(task, PipelineTask):
        raise ValueError("this checkpoint draws without a pipeline, and takes no negative prompt: leave it empty")
    own = copy.copy(task)
    own.negative = negative
    return own


NODE_CLASS_MAPPINGS = {"PPCLLoadPipeline": LoadPluggablePipeline, "PPCLSampleAtRatio": SampleAtRatio}
NODE_DISPLAY_NAME_MAPPINGS = {
    "PPCLLoadPipeline": "Load pluggable pipeline",
    "PPCLSampleAtRatio": "Sample at ratio",
}
