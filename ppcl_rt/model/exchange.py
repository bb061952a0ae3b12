"""What other programs call the parts of a model: renumbered blocks, original names, formats of their own."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import torch

from ppcl_rt.planning.architecture import Architecture

# Of tensors by name.
Shapes = Mapping[str, tuple[int, ...]]


class Original(NamedTuple):
    """A tensor of the checkpoint that a model was first published as.

    Attributes:
        stock: names by diffusers of what lies in it, rows after rows.
        swapped: whether it has shift before scale, where diffusers has scale before shift.
    """

    stock: tuple[str, ...]
    swapped: bool = False

    def joined(self, parts: Sequence[torch.Tensor]) -> torch.Tensor:
        """The tensor that these lie in."""
        whole = torch.cat(list(parts)) if len(parts) > 1 else parts[0]
        return torch.cat(whole.chunk(2)[::-1]) if self.swapped else whole

    def taken_apart(self, whole: torch.Tensor, rows: Sequence[int]) -> list[torch.Tensor]:
        """What lies in a tensor, so many rows each.

        Raises:
            ValueError: it has another number of rows.
        """
        if len(rows) == 1 and not self.swapped:
            return [whole]
        if whole.ndim == 0 or whole.shape[0] != sum(rows):
            raise ValueError(f"a tensor {list(whole.shape)} holds {', '.join(self.stock)}, {sum(rows)} rows together")
        return list((torch.cat(whole.chunk(2)[::-1]) if self.swapped else whole).split(list(rows)))


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
    def originals(cls, shapes: Shapes) -> dict[str, Original]:
        """Where tensors lay in the checkpoint that the model was first published as.

        Args:
            shapes: of tensors of a stock model, by diffusers' names; what lay in one tensor there has to be given
                together.

        Returns:
            Original name -> what lies in it.

        Raises:
            ValueError: the family does not say.
        """
        raise ValueError(f"the family {cls.family} does not say what its tensors were called first: no single file")

    @classmethod
    def to_original(cls, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Tensors under original names and in the original layout.

        Args:
            tensors: of a stock model, as for `originals`.

        Raises:
            ValueError: the family does not say.
        """
        homes = cls.originals({name: tuple(tensor.shape) for name, tensor in tensors.items()})
        return {name: original.joined([tensors[part] for part in original.stock]) for name, original in homes.items()}

    @classmethod
    def from_original(cls, tensors: Mapping[str, torch.Tensor], shapes: Shapes) -> dict[str, torch.Tensor]:
        """Tensors under diffusers' names: the way back from `to_original`. They share memory with what they lay in.

        Args:
            tensors: under original names.
            shapes: of all tensors of the stock model.

        Raises:
            KeyError: one is not there.
            ValueError: one has other rows than what lies in it, or the family does not say.
        """
        found: dict[str, torch.Tensor] = {}
        for name, original in cls.originals(shapes).items():
            rows = [shapes[part][0] if shapes[part] else 0 for part in original.stock]
            found |= zip(original.stock, original.taken_apart(tensors[name], rows), strict=True)
        return found
