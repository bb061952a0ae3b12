"""What recovery trains of a model: what a checkpoint stores next to the teacher, in the form in which it is stored.

A weight that is stored as ``base + up @ down`` is trained as its two factors. They alone are held in float32, with
gradients and moments; the base is a frozen weight of the model, and the product is made in the forward and again in the
backward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.utils import parametrize

from ppcl_rt.checkpoint.converted import ConvertedCheckpoint, Stored
from ppcl_rt.model.tensors import held_index
from ppcl_rt.planning.block_spec import Part
from ppcl_train.config.settings import RunConfig
from ppcl_train.engine.sharding import Sharding
from ppcl_train.stages.assembly import opened


class _Place(NamedTuple):
    """Where the numbers of a tensor that is trained lie in the tensor that is stored.

    Attributes:
        axis: along which a block holds units in rank order, the checkpoint in that of the dense block.
        units: place in the checkpoint of each entry along it.
    """

    axis: int
    units: torch.Tensor

    def held(self, stored: torch.Tensor) -> torch.Tensor:
        """What a block holds, out of what is stored."""
        return stored.index_select(self.axis, self.units.to(stored.device))

    def stored(self, held: torch.Tensor) -> torch.Tensor:
        """The inverse of `held`, for a block that holds all units."""
        return torch.empty_like(held).index_copy_(self.axis, self.units.to(held.device), held)


class _Difference(nn.Module):
    """``base + up @ down``, as a parametrization of a weight whose own parameters are the factors.

    Args:
        dtype: of the weight.
        factors: ``up [rows, r]`` and ``down [r, columns]``, in float32, in stock order.
        place: of the units in the weight; None where it has none.
        frozen: the base; it is held here, next to the factors, so that processes can share it as them.
        computed: gives the base, where it is part of another weight. Neither: zero.
    """

    def __init__(
        self,
        dtype: torch.dtype,
        factors: tuple[torch.Tensor, torch.Tensor],
        place: _Place | None = None,
        frozen: torch.Tensor | None = None,
        computed: Callable[[], torch.Tensor] | None = None,
    ) -> None:
        super().__init__()
        self._dtype, self._factors, self._place, self._computed = dtype, factors, place, computed
        self.base = None if frozen is None else nn.Parameter(frozen, requires_grad=False)

    def forward(self, up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
        """Make the weight."""
        if self._place is not None and self._place.axis == 0:
            up = self._place.held(up)
        elif self._place is not None:
            down = self._place.held(down)
        product = up.float() @ down.float()
        base = self.base if self._computed is None else self._computed()
        weight = product if base is None else base + product
        return weight.to(self._dtype)

    def right_inverse(self, _: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The factors: `register_parametrization` makes them its parameters."""
        return self._factors


class Trained:
    """The parameters that are trained, by the names that tensors have in the checkpoint.

    Args:
        source: what the model is read from.
        everything: train the teacher's own blocks, and what lies outside of them, too.
        trains: whether it will be trained; else nothing is in more bits than the model computes in.

    Attributes:
        parameters: in float32 whatever the model computes in: steps are too small for a coarser dtype.
    """

    def __init__(self, source: ConvertedCheckpoint, everything: bool = False, trains: bool = True) -> None:
        self.parameters: dict[str, nn.Parameter] = {}
        self._source, self._everything, self._trains = source, everything, trains
        self._places: dict[str, _Place] = {}
        self._taken: set[str] = set()

    def add_block(self, prefix: str, block: Any) -> None:
        """Take what a block has that is trained; call it when the block is whole, before it is divided.

        Args:
            prefix: what the names of its tensors begin with.
        """
        of_student = prefix.startswith("students.")
        places = {part.path: _place(part, block) for part in block.spec.parts if part.axis is not None}
        for path, layer in list(block.named_modules()):
            if path.startswith("replacements."):
                self._add(f"{prefix}{path}", layer, computed=self._part_of(prefix, path, block))
            elif of_student or self._everything:
                self._add(f"{prefix}{path}".rstrip("."), layer, places.get(path))

    def add_outside(self, model: Any) -> None:
        """Take the maps of text runs; with ``everything``, what lies outside the blocks as well."""
        for key, maps in model.text_runs.items():
            for name, layer in maps.named_children():
                self._add(f"text_runs.{key}.{name}", layer)
        if self._everything:
            inside = (*model.block_lists, "students", "text_runs")
            for path, layer in model.named_modules():
                if not path.startswith(inside):
                    self._add(path, layer)

    def outcome(self, start: Mapping[str, Stored], values: Mapping[str, Any]) -> dict[str, Stored]:
        """Put values of the parameters, by name, into the place of what training began with, as they are stored.

        Args:
            start: all that the run has made. Rank orders stay as they are; factors of weights that are now whole go.
        """
        whole = {name.removesuffix(".weight") for name in values if name.endswith(".weight")}
        kept = {
            name: each
            for name, each in start.items()
            if not (name.endswith((".up", ".down")) and name.rpartition(".")[0] in whole)
        }
        for name, value in values.items():
            place, tensor = self._places.get(name), value.detach()
            kept[name] = Stored.held(tensor if place is None else place.stored(tensor))
        return kept

    def _part_of(self, prefix: str, path: str, block: Any) -> Callable[[], torch.Tensor] | None:
        """Gives the columns of a part that a compensated output is a difference to."""
        if (replaced := self._source.replaced_by(f"{prefix}{path}")) is None:
            return None
        output, layer = replaced.output, block.get_submodule(replaced.output.part.path)
        first = block.first_column(output)
        columns = slice(first, first + replaced.units * output.segment.unit)
        return lambda: layer.weight[:, columns]

    def _add(
        self,
        path: str,
        layer: nn.Module,
        place: _Place | None = None,
        computed: Callable[[], torch.Tensor] | None = None,
    ) -> None:
        parameters, stored = list(layer.named_parameters(recurse=False)), self._source.stored_path(path)
        if not parameters or stored in self._taken:
            # Text runs that begin at one block share maps.
            return
        self._taken.add(stored)
        for name, parameter in parameters:
            # With the teacher's blocks, what students are a difference to would move: students are trained whole.
            whole = self._everything and computed is None and path.startswith("students.")
            if name == "weight" and f"{stored}.up" in self._source.stored_names and not whole:
                self._add_factors(path, stored, layer, place, computed)
                continue
            if self._trains:
                parameter.data = parameter.data.float()
                parameter.requires_grad_(True)
            self.parameters[f"{stored}.{name}"] = parameter
            if place is not None and (place.axis == 0 or name == "weight"):
                self._places[f"{stored}.{name}"] = place

    def _add_factors(
        self,
        path: str,
        stored: str,
        layer: Any,
        place: _Place | None,
        computed: Callable[[], torch.Tensor] | None,
    ) -> None:
        weight = layer.weight
        dtype = torch.float32 if self._trains else weight.dtype
        up, down = (self._source.read_stored(f"{stored}.{f}").to(weight.device, dtype) for f in ("up", "down"))
        frozen = self._source.base_of(path) if computed is None else None
        if frozen is not None:
            frozen = (frozen if place is None else place.held(frozen)).to(weight)
        made = _Difference(weight.dtype, (up, down), place, frozen, computed)
        parametrize.register_parametrization(layer, "weight", made, unsafe=True)
        held = layer.parametrizations.weight
        for which, factor in (("up", held.original0), ("down", held.original1)):
            factor.requires_grad_(self._trains)
            self.parameters[f"{stored}.{which}"] = factor


def opened_as_factors(
    run: RunConfig,
    source: ConvertedCheckpoint,
    everything: bool = False,
    trains: bool = True,
    sharding: Sharding | None = None,
) -> tuple[Any, Trained]:
    """Load a model whose layers are held as they are stored; one block at a time is whole.

    Args:
        everything, trains: as of `Trained`.
        sharding: divides each block among processes as soon as it is whole, and what lies outside of them at the end.

    Returns:
        The model, and what can be trained of it.
    """
    trained = Trained(source, everything, trains)

    def held(prefix: str, block: Any) -> None:
        trained.add_block(prefix, block)
        if sharding is not None:
            sharding.add_block(block, trained.parameters)

    model = opened(run, source, held)
    trained.add_outside(model)
    if sharding is not None:
        sharding.add_rest(model, trained.parameters)
    return model, trained


def _place(part: Part, block: Any) -> _Place:
    assert part.axis is not None, "units lie along an axis"
    return _Place(part.axis, held_index(part, block.held[part.path], block.orders))
