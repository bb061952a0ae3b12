"""Weights that lie elsewhere than where they are computed with: offload by diffusers and accelerate, layerwise casting.

Their hooks sit on the modules that were there when they were put on. Here blocks come, grow and go: what grows has its
hooks taken off first, and what was read gets them. A block is moved by itself, so that one that a plan skips is not.
"""

from __future__ import annotations

import ctypes
import importlib
import re
import shutil
import sys
import tempfile
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
import torch
from torch import nn

# What diffusers calls its hooks.
_OFFLOAD, _TRACKER, _PREFETCH = "group_offloading", "layer_execution_tracker", "lazy_prefetch_group_offloading"
_CASTING = "layerwise_casting"


class Casting(NamedTuple):
    """How ``enable_layerwise_casting`` was asked to hold weights: as diffusers takes it.

    Attributes:
        storage, compute: dtypes between forwards of a layer, and in them.
        skipped: patterns of paths whose layers stay as they are.
        classes: of layers that stay as they are.
    """

    storage: torch.dtype
    compute: torch.dtype
    skipped: tuple[str, ...]
    classes: tuple[type[nn.Module], ...]
    non_blocking: bool

    def cast(self, module: nn.Module, path: str) -> None:
        """Hold the layers of a module that was read just now in the dtype of storage; ``path`` is its own."""
        from diffusers.hooks._common import _GO_LC_SUPPORTED_PYTORCH_LAYERS as LAYERS
        from diffusers.hooks.layerwise_casting import apply_layerwise_casting_hook

        for name, layer in module.named_modules():
            if not isinstance(layer, LAYERS) or isinstance(layer, self.classes):
                continue
            if any(re.search(pattern, path + name) for pattern in self.skipped):
                continue
            if hook_of(layer, _CASTING) is None:
                apply_layerwise_casting_hook(layer, self.storage, self.compute, self.non_blocking)
            else:
                # A layer that has grown.
                layer.to(self.storage)


def hook_of(module: nn.Module, name: str) -> Any:
    """The hook of diffusers of this name on a module, None where there is none."""
    registry = module.__dict__.get("_diffusers_hook")
    return None if registry is None else registry.get_hook(name)


def is_cast(layer: nn.Module) -> bool:
    """Whether layerwise casting holds a layer's weights in another dtype than the model's."""
    return hook_of(layer, _CASTING) is not None


def settings_of(model: nn.Module) -> Any:
    """The settings (`GroupOffloadingConfig`) of the group offload of a model, None where there is none."""
    hooks = (hook_of(module, _OFFLOAD) for module in model.modules())
    return next((hook.config for hook in hooks if hook is not None), None)


def lies_on_disk(model: nn.Module) -> bool:
    """Whether group offload keeps the weights of a model in files."""
    settings = settings_of(model)
    return settings is not None and settings.offload_to_disk_path is not None


def refuse_on_disk(model: nn.Module, what: str) -> None:
    """Refuse what needs all weights at once.

    Args:
        what: they cannot do: "be saved".

    Raises:
        ValueError: group offload keeps them in files.
    """
    if lies_on_disk(model):
        raise ValueError(
            f"weights that group offload keeps on disk cannot {what}: do that first, or offload without "
            "offload_to_disk_path"
        )


def put_on(module: nn.Module, settings: Any, whole: bool) -> None:
    """Offload a block, or a dict of layers, as the rest of its model.

    Args:
        whole: whether it is moved as one at ``block_level``: it is, where it is called itself.
    """
    from diffusers.hooks import group_offloading as theirs

    if settings.offload_to_disk_path is not None:
        # diffusers names files after places in lists and takes a file that is there for the one that it would write.
        folder = tempfile.mkdtemp(dir=settings.offload_to_disk_path)
        settings = replace(settings, offload_to_disk_path=folder)
    if whole and settings.offload_type == theirs.GroupOffloadingType.BLOCK_LEVEL:
        holder = nn.Module()
        holder.blocks = nn.ModuleList([module])
        theirs._apply_group_offloading_block_level(holder, replace(settings, num_blocks_per_group=1))
        if settings.stream is not None:
            # Until somebody prefetches it (`trace_anew`), nobody waits for the stream.
            hook_of(module, _OFFLOAD).group.non_blocking = False
        return
    theirs._apply_group_offloading_leaf_level(module, settings)


def take_off(block: nn.Module) -> None:
    """Have the weights of a block lie in host memory, with no hooks of group offload on it."""
    groups = {id(hook.group): hook.group for m in block.modules() if (hook := hook_of(m, _OFFLOAD)) is not None}
    for group in groups.values():
        if group.offload_to_disk_path is not None:
            held = safetensors.torch.load_file(group.safetensors_file_path)
            for key, tensor in group.key_to_tensor.items():
                # The file is mapped, and goes.
                tensor.data = held[key].clone()
        else:
            group.offload_()
    for folder in {group.offload_to_disk_path for group in groups.values()} - {None}:
        shutil.rmtree(folder, ignore_errors=True)
    for module in block.modules() if groups else ():
        registry = module.__dict__.get("_diffusers_hook")
        if registry is None:
            continue
        for name in (_PREFETCH, _TRACKER, _OFFLOAD):
            registry.remove_hook(name, recurse=False)
        if not registry.hooks:
            # It names the module that it is on, and a copy of that would have it too.
            del module._diffusers_hook
            module.__dict__.pop("forward", None)


def arrive(block: nn.Module) -> None:
    """Have the weights of a block that is offloaded as a whole be where they are computed with; its next forward, which
    is to follow, lets them go."""
    hook = hook_of(block, _OFFLOAD)
    if hook is not None:
        hook.group.onload_()
        if hook.group.stream is not None:
            hook.group.stream.synchronize()


def trace_anew(model: Any) -> Any:
    """Have diffusers find out again, in what runs next, which group is moved while which one runs.

    Returns:
        The hook that finds out, whose ``post_forward`` is to be called after it: the model is in a forward already.
    """
    from diffusers.hooks.group_offloading import LazyPrefetchGroupOffloadingHook

    for module in model.modules():
        hook = hook_of(module, _OFFLOAD)
        if hook is not None:
            hook.next_group, hook.group.onload_self = None, True
            if hook.group.stream is not None:
                hook.group.stream.synchronize()
                # What was moved ahead and will not run goes back.
                hook.group.offload_()
            for name in (_PREFETCH, _TRACKER):
                registry: Any = module._diffusers_hook
                registry.remove_hook(name, recurse=False)
    tracing = LazyPrefetchGroupOffloadingHook()
    model._diffusers_hook.register_hook(tracing, _PREFETCH)
    return tracing


def folder_for(model: nn.Module, given: str | Path) -> str:
    """A folder inside the one given, for the files of this model alone; it goes with the model."""
    Path(given).mkdir(parents=True, exist_ok=True)
    folder = tempfile.mkdtemp(prefix="weights-", dir=given)
    weakref.finalize(model, shutil.rmtree, folder, ignore_errors=True)
    return folder


def _sequential(model: nn.Module) -> Any:
    """A hook of accelerate that keeps weights on the host until a layer runs, None where there is none."""
    hooks = (module.__dict__.get("_hf_hook") for module in model.modules())
    return next((hook for hook in hooks if getattr(hook, "weights_map", None) is not None), None)


@contextmanager
def weights_at_hand(model: nn.Module) -> Iterator[None]:
    """Take sequential offload (accelerate) off a model, and put it on again afterwards: it knows each layer by name."""
    hook = _sequential(model)
    if hook is None:
        yield
        return
    accelerate: Any = importlib.import_module("accelerate")
    accelerate.hooks.remove_hook_from_module(model, recurse=True)
    try:
        yield
    finally:
        # As pipelines do.
        accelerate.cpu_offload(model, hook.execution_device, offload_buffers=bool(model._parameters))


class Like(NamedTuple):
    """Where weights that are read are put, and in which dtype."""

    device: torch.device
    dtype: torch.dtype
    requires_grad: bool


def like(model: Any) -> Like:
    """As the weights of a model lie when no forward is running, in the dtype that it computes in."""
    first = next(model.parameters())
    dtype = model._casting.compute if model._casting is not None else first.dtype
    settings = settings_of(model) if "_diffusers_hook" in model.__dict__ else None
    device = first.device if settings is None else settings.offload_device
    return Like(device, dtype, first.requires_grad)


def treat_as_others(model: Any, module: nn.Module, path: str, whole: bool) -> None:
    """Cast for storage and offload what was read just now, as the rest of its model; arguments as `put_on` has them.

    Raises:
        ValueError: the model is offloaded in a way that takes nothing new; one line says which takes it.
    """
    if model._casting is not None:
        model._casting.cast(module, path)
    settings = settings_of(model)
    if settings is not None:
        put_on(module, settings, whole)


def give_back() -> None:
    """Give memory that was let go of back to the system, where the C library can (glibc).

    Weights that are kept lie among those that were read, cast and let go of: without this, loading in bfloat16 what
    lies on disk in float32 takes a fifth more than it keeps (`bench/studies/host_memory.py`).
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


def one_device(given: Mapping[str, Any]) -> Any:
    """The device that ``device_map`` and what goes with it ask for, None where they ask for none.

    Raises:
        ValueError: they spread a model over several devices, or over the host or a disk.
    """
    asked = given.get("device_map")
    if isinstance(asked, Mapping) and set(asked) == {""}:
        asked = asked[""]
    strategies = isinstance(asked, Mapping) or asked in ("auto", "balanced", "balanced_low_0", "sequential", "disk")
    more = [name for name in ("max_memory", "offload_folder") if given.get(name) is not None]
    if strategies or more:
        said = f"device_map={asked!r}" if strategies else f"{more[0]}={given[more[0]]!r}"
        raise ValueError(
            f"{said} would spread a transformer over devices: one device is taken here; where it is too small, choose "
            "a ratio, quantize, or load and then enable_group_offload"
        )
    if asked is not None and given.get("device") is not None:
        raise ValueError("device and device_map say the same: give one of them")
    return asked
