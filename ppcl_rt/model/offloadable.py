"""Offload and casting of a pluggable model through diffusers' own calls."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ppcl_rt.messages import say_once
from ppcl_rt.model.folder import CheckpointFolder
from ppcl_rt.model.offloading import Casting, folder_for, hook_of, put_on, settings_of, trace_anew
from ppcl_rt.model.program import Program
from ppcl_rt.model.residency import READING
from ppcl_rt.ops.quantised import QuantisedLinear

_log = logging.getLogger(__name__)


class Offloadable(CheckpointFolder):
    """``enable_group_offload`` and ``enable_layerwise_casting``, for blocks that come, grow and go."""

    _casting: Casting | None
    # What ran when diffusers found out in which order groups are moved ahead; None where none are.
    _followed: Program | None
    # Of diffusers' classes.
    dtype: Any
    _keep_in_fp32_modules: Any
    _skip_layerwise_casting_patterns: Any

    def enable_group_offload(
        self,
        onload_device: Any,
        offload_device: Any = "cpu",
        offload_type: str = "block_level",
        num_blocks_per_group: int | None = None,
        offload_to_disk_path: str | Path | None = None,
        **more: Any,
    ) -> None:
        """Keep weights on ``offload_device``, or in files, but for those of the layers or the block that runs.

        As diffusers' classes do. Blocks are moved one by one, whatever ``num_blocks_per_group`` says: of several that
        are moved together a plan may skip some. Files lie in a folder of their own inside ``offload_to_disk_path``,
        which goes with the model.

        Raises:
            ValueError: as diffusers' classes do, and where the model is offloaded already.
        """
        if settings_of(self) is not None:
            raise ValueError("group offload is on already: load the model again to have it otherwise")
        if (num_blocks_per_group or 1) > 1:
            say_once(_log, "group offload moves blocks one by one here, because a plan may skip some of a group")
        folder = None if offload_to_disk_path is None else folder_for(self, offload_to_disk_path)
        theirs: Any = super()
        with READING:
            with self._without_blocks():
                theirs.enable_group_offload(
                    onload_device=onload_device,
                    offload_device=torch.device(offload_device),
                    offload_type=offload_type,
                    num_blocks_per_group=1,
                    offload_to_disk_path=folder,
                    **more,
                )
            settings = settings_of(self)
            for block in self.resident_blocks():
                put_on(block, settings, whole=True)
            for maps in self.text_runs.values():
                put_on(maps, settings, whole=False)
            self._graphs.drop_all()

    @contextmanager
    def _without_blocks(self) -> Iterator[None]:
        """Have the model be without blocks, students and maps."""
        homes: list[nn.Module] = [*self._lists.values(), self.students, self.text_runs]
        held = [home._modules for home in homes]
        for home in homes:
            home.__dict__["_modules"] = {}
        try:
            yield
            top = hook_of(self, "group_offloading")
            if top is not None:
                # At block level all that is no list is moved together.
                top.group.modules = [module for module in top.group.modules if module not in homes]
        finally:
            for home, modules in zip(homes, held, strict=True):
                home.__dict__["_modules"] = modules

    def follow(self, program: Program) -> Any:
        """Have groups be moved ahead in the order in which a program that is about to run needs them.

        Returns:
            The hook of diffusers that finds out the order, None where it is known or nothing is moved ahead.
        """
        if program is self._followed or "_diffusers_hook" not in self.__dict__:
            return None
        top = hook_of(self, "group_offloading")
        if top is None or top.config.stream is None:
            return None
        self._followed = program
        return trace_anew(self)

    def enable_layerwise_casting(
        self,
        storage_dtype: torch.dtype = torch.float8_e4m3fn,
        compute_dtype: torch.dtype | None = None,
        skip_modules_pattern: tuple[str, ...] | None = None,
        skip_modules_classes: tuple[type[nn.Module], ...] | None = None,
        non_blocking: bool = False,
    ) -> None:
        """Hold the weights of layers in another dtype between their forwards, as diffusers' classes do.

        Layers that are read later as well. Weights in eight bits (``quantize``) stay as they are.
        """
        from diffusers.hooks.layerwise_casting import DEFAULT_SKIP_MODULES_PATTERN

        # Without patterns of their own, diffusers' classes leave adapters as they are, too.
        patterns = (*DEFAULT_SKIP_MODULES_PATTERN, "lora_") if skip_modules_pattern is None else skip_modules_pattern
        classes = (*(skip_modules_classes or ()), QuantisedLinear)
        compute = compute_dtype or self.dtype
        more = (*(self._keep_in_fp32_modules or ()), *(self._skip_layerwise_casting_patterns or ()))
        theirs: Any = super()
        with READING:
            theirs.enable_layerwise_casting(storage_dtype, compute, tuple(patterns), classes, non_blocking)
            self._casting = Casting(storage_dtype, compute, (*patterns, *more), classes, non_blocking)
            self._graphs.drop_all()
