"""A checkpoint becomes a model without blocks: ``config.json`` and the headers of files, compared with the class."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any, ClassVar, TypeVar, get_type_hints

import torch
from pydantic import TypeAdapter, ValidationError
from torch import nn

from ppcl_rt.checkpoint.card import read_origin
from ppcl_rt.checkpoint.composed import ComposedCheckpoint
from ppcl_rt.checkpoint.reader import Checkpoint
from ppcl_rt.files import one_line
from ppcl_rt.model.block import PluggableBlock
from ppcl_rt.model.fused import Fusing
from ppcl_rt.model.validation import Shapes, check_tensors
from ppcl_rt.planning.catalog import Catalog
from ppcl_rt.planning.frozen import first_error

Self = TypeVar("Self", bound="Opening")


class Opening(Fusing):
    """Reading of all but the blocks.

    Attributes:
        stock_name: of the family's diffusers class: stock tools read the teacher out of a checkpoint under this name.
        depth_settings: entries of the config that count the blocks of each of ``block_lists``.
    """

    # Of diffusers' ConfigMixin, which the family's class inherits.
    extract_init_dict: ClassVar[Any]
    register_to_config: Any
    stock_name: ClassVar[str]
    depth_settings: ClassVar[tuple[str, ...]] = ("num_layers",)

    @classmethod
    def opened(cls, folder: Path, variant: str | None = None) -> ComposedCheckpoint:
        """Open a checkpoint folder; a family does so in its own way for layouts that it alone knows."""
        return ComposedCheckpoint(folder, variant)

    @classmethod
    def dense_catalog(cls, source: Checkpoint) -> Catalog:
        """The catalog of the dense model that ``config.json`` describes, whatever the checkpoint's own says.

        Raises:
            ValueError: it describes none, or one whose tensors outside the blocks are not those of the checkpoint.
        """
        # Without memory: sizes that the file's headers contradict would take any amount of it.
        with torch.device("meta"):
            described = cls.described(source)
        outer = described.state_dict()
        for name, tensor in outer.items():
            if source.shape(name) != tuple(tensor.shape):
                raise ValueError(
                    f"{source.folder}: {name} is {list(source.shape(name))}, config.json asks for {list(tensor.shape)}"
                )
        try:
            architecture = cls.architecture_of(described.config, sum(tensor.numel() for tensor in outer.values()))
        except ValidationError as error:
            raise ValueError(
                first_error(error, f"{source.folder}: config.json describes no model that can be")
            ) from None
        origin = read_origin(source.folder)._asdict()
        return Catalog.of_dense(cls.family, architecture, cls.reference, **origin)

    @classmethod
    def without_blocks(
        cls: type[Self], source: ComposedCheckpoint, dtype: torch.dtype | None = None, device: Any = None
    ) -> Self:
        """Build the model with everything outside the blocks, and no block; all headers are checked.

        Raises:
            ValueError: config, catalog and tensors contradict each other.
        """
        dense = cls.dense_catalog(source)
        catalog, architecture = source.catalog or dense, dense.architecture
        if catalog.family != cls.family:
            raise ValueError(f"{source.folder} is of family {catalog.family}, not {cls.family}")
        if catalog.architecture != architecture:
            raise ValueError(f"{source.folder}: the catalog describes another architecture than config.json")
        model = cls.described(source)
        model._catalog, model._source = catalog, source
        check_tensors(source, catalog, {kind: _shapes(model.meta_block(kind)) for kind in architecture.kinds})
        with source.kept_open():
            held = {name: source.read(name) for name in model.state_dict()}
        dtype = dtype or next(iter(held.values())).dtype
        model.load_state_dict(
            {name: tensor.to(device=device, dtype=dtype) for name, tensor in held.items()}, assign=True
        )
        return model

    @classmethod
    def described(cls: type[Self], source: Checkpoint) -> Self:
        """The class as ``config.json`` describes it, its lists of blocks empty.

        Raises:
            ValueError: it describes none.
        """
        # diffusers' notes are no settings, and no checksum covers them: one that names settings would drop these.
        settings = {key: value for key, value in source.config.items() if not key.startswith("_")}
        init, _, _ = cls.extract_init_dict(settings)
        for setting, kind in _types_of(cls).items():
            if setting in init:
                try:
                    kind.validate_json(json.dumps(init[setting]), strict=True)
                except ValidationError as error:
                    raise ValueError(first_error(error, f"{source.folder}: config.json: {setting}")) from None
        depths = {}
        for setting in cls.depth_settings:
            depths[setting] = init.get(setting)
            if not isinstance(depths[setting], int) or depths[setting] < 1:
                raise ValueError(f'{source.folder}: config.json has no "{setting}" of 1 or more')
        try:
            model = cls(**{**init, **dict.fromkeys(cls.depth_settings, 0)})
        except Exception as error:
            # Whatever a constructor that checks nothing trips over, it is the config that makes no sense.
            raise ValueError(f"{source.folder}: config.json describes no {cls.stock_name}: {one_line(error)}") from None
        model.register_to_config(**depths, _name_or_path=str(source.folder))
        return model

    def meta_block(self, kind: str) -> PluggableBlock:
        """A block of this kind at full width, without memory for its weights."""
        with torch.device("meta"):
            return self.make_block(self.config, kind)


def _shapes(module: nn.Module) -> Shapes:
    return {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}


def _types_of(cls: type) -> dict[str, TypeAdapter[Any]]:
    """Types of a class's settings, as its constructor has them; diffusers checks none, and fails in a forward."""
    hints = get_type_hints(inspect.unwrap(cls.__init__))  # type: ignore[misc] # of a class, not of an instance
    return {name: TypeAdapter(hint) for name, hint in hints.items() if name != "return"}
