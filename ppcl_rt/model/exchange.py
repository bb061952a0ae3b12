"""What other programs call the parts of a model: renumbered blocks, original names, formats of their own."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch

from ppcl_rt.planning.architecture import Architecture


class Exchange:
    """What a family says for the formats of other programs; `ppcl_rt.convert` writes and reads them.

    Attributes:
        gguf_architecture: ``general.architecture`` of its GGUF files; empty where there are none.
        lora_loader: the class of ``diffusers.loaders`` that reads adapters of its pipelines; empty where none does.
    """

    family: ClassVar[str]
    block_lists: ClassVar[tuple[str, ...]]
    depth_settings: ClassVar[tuple[str, ...]]
    gguf_architecture: ClassVar[str] = ""
    lora_loader: ClassVar[str] = ""

    @classmethod
    def settings_of(cls, architecture: Architecture, blocks: Sequence[int]) -> dict[str, Any]:
        """The settings of diffusers' class that say which blocks there are, once only some of them are left.

        Args:
            blocks: numbers in the dense model, rising; a block keeps its kind, and its number becomes its place here.

        Raises:
            ValueError: one setting counts several lists, and these are not of one length any more.
        """
        left = Counter(architecture.place(block).path for block in blocks)
        settings: dict[str, Any] = {}
        for name, path in zip(cls.depth_settings, cls.block_lists, strict=True):
            if settings.setdefault(name, left[path]) != left[path]:
                raise ValueError(
                    f"{path} has {left[path]} blocks left, and {name} says {settings[name]} for another list"
                )
        return settings

    @classmethod
    def to_original(cls, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Tensors under the names, and in the layout, of the checkpoint that the model was first published as.

        Args:
            tensors: any of a stock model, by diffusers' names; what lies in one tensor there has to be given together.

        Raises:
            ValueError: the family does not say.
        """
        raise ValueError(f"the family {cls.family} does not say what its tensors were called first: no single file")
