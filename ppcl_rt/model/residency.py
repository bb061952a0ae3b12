"""Which weights a model holds: read as plans need them, dropped by `Residency.drop_all_but`.

Other threads may be in the middle of a forward. So nothing that a forward reads is changed: a block that grows is a new
block, which shares with the old one what both hold, and a list of blocks that changes gets a new dict of them. What a
forward began with lives until it ends.
"""

from __future__ import annotations

import threading
from collections.abc import Collection, Iterable, Mapping
from typing import Any, ClassVar, NamedTuple

import torch
from torch import nn

from ppcl_rt.checkpoint.composed import ComposedCheckpoint
from ppcl_rt.checkpoint.reader import Checkpoint
from ppcl_rt.model.block import NotLoaded, PluggableBlock, is_bound, lay_side_by_side, shared_copy, without_adapters
from ppcl_rt.model.graphs import Graphs
from ppcl_rt.model.offloading import Casting, give_back, like, take_off, treat_as_others, weights_at_hand
from ppcl_rt.model.tensors import assign, missing_tensors, rank_order
from ppcl_rt.ops.quantised import QuantisedLinear
from ppcl_rt.planning.architecture import Architecture, Tokens
from ppcl_rt.planning.block_spec import Stream
from ppcl_rt.planning.catalog import Catalog
from ppcl_rt.planning.interval import Interval
from ppcl_rt.planning.plan import Plan, PlannedBlock, text_maps
from ppcl_rt.planning.quantisation import Quantisation

# Held while weights are read into a model or dropped. One for all models: reading is rare, and a lock in a model could
# not be copied. Nothing is planned or timed while it is held.
READING = threading.RLock()


class Home(NamedTuple):
    """Where a planned block lives.

    Attributes:
        modules: the list or dict that holds it.
        key: its key there.
        prefix: what its tensors' names begin with.
    """

    modules: nn.ModuleList | nn.ModuleDict
    key: str
    prefix: str

    @property
    def block(self) -> Any:
        """The block, None where it is not resident."""
        return self.modules._modules.get(self.key)

    def put(self, block: Any) -> None:
        """Put a block here, in the order in which blocks run."""
        blocks = {**self.modules._modules, self.key: block}
        _hold(self.modules, dict(sorted(blocks.items(), key=lambda item: int(item[0].split("-")[0]))))


def _stored(module: nn.Module) -> int:
    """How many numbers a checkpoint of a module holds: parameters, and buffers that are saved."""
    # Not by `state_dict`, on which FSDP shards again what a forward is about to read.
    parameters = sum(p.numel() for p in without_adapters(dict(module.named_parameters())).values())
    saved = (
        buffer.numel()
        for child in module.modules()
        for name, buffer in child.named_buffers(recurse=False)
        if name not in child._non_persistent_buffers_set
    )
    return parameters + sum(saved)


def _hold(modules: nn.Module, held: Mapping[str, Any]) -> None:
    """Have a list or dict of modules hold these: a new dict, because other threads may be going through the old one."""
    modules.__dict__["_modules"] = dict(held)


def _drop(modules: nn.Module, keys: Collection[str]) -> None:
    _hold(modules, {key: block for key, block in modules._modules.items() if key not in keys})


class Residency(nn.Module):
    """The weights of a pluggable model.

    Blocks live in the lists that diffusers' class has, under their original numbers, with holes where a block is not
    resident. Students live in ``students`` and the maps of text runs in ``text_runs``, both keyed ``"3-5"``.

    Attributes:
        family: name in the registry.
        reference: tokens of the sample at which ratios count FLOPs, where a checkpoint names none.
        block_lists: paths of the lists of blocks, in the order in which they run.
    """

    family: ClassVar[str]
    reference: ClassVar[Tokens]
    block_lists: ClassVar[tuple[str, ...]] = ("transformer_blocks",)
    # These lists by path: others (caches) may put lists of theirs in their place for a while.
    _lists: dict[str, nn.ModuleList]
    students: nn.ModuleDict
    text_runs: nn.ModuleDict
    config: Any
    _catalog: Catalog | None
    _quantisation: Quantisation | None
    _source: ComposedCheckpoint | None
    _graphs: Graphs
    _casting: Casting | None

    # What a family provides.

    @classmethod
    def make_block(cls, config: Mapping[str, Any], kind: str) -> PluggableBlock:
        """Build one block of a kind at full width."""
        raise NotImplementedError

    @classmethod
    def architecture_of(cls, config: Mapping[str, Any], outer_params: int) -> Architecture:
        """What the dense model is made of."""
        raise NotImplementedError

    def example(self, tokens: Tokens) -> dict[str, Any]:
        """Arguments of a forward over random inputs of a shape, on the model's device and in its dtype."""
        raise NotImplementedError

    @classmethod
    def activation_bytes(cls, config: Mapping[str, Any], tokens: Tokens, itemsize: int) -> int:
        """The most bytes that a dense forward holds at once beside the weights; at least what any plan takes.

        Args:
            config: of the transformer.
            tokens: of the forward.
            itemsize: bytes of a number in the model's dtype.

        Raises:
            ValueError: the family does not say.
        """
        raise ValueError(f"the family {cls.family} does not say what its forwards hold: fit cannot be had, memory can")

    @classmethod
    def latents_of(cls, vae: Mapping[str, Any], tokens: Tokens) -> tuple[int, ...]:
        """Shape of what a pipeline has its VAE, of this config, decode after forwards over some tokens.

        Raises:
            ValueError: the family does not say.
        """
        raise ValueError(f"the family {cls.family} does not say what its VAE decodes: fit cannot be had, memory can")

    def adopt(self, block: Any) -> None:
        """Give a block that joins the model what callers have set on the others."""

    # What there is.

    @property
    def catalog(self) -> Catalog:
        """What this model can do."""
        if self._catalog is None:
            outer = _stored(self) - sum(map(_stored, self.resident_blocks()))
            self._catalog = Catalog.of_dense(self.family, self.architecture_of(self.config, outer), self.reference)
        return self._catalog

    def blocks(self) -> tuple[Any, ...]:
        """The blocks of the teacher that are resident, over all lists, in the order in which they run."""
        return tuple(block for modules in self._lists.values() for block in modules._modules.values())

    def resident_blocks(self) -> tuple[Any, ...]:
        """The blocks of the teacher and the students that are resident."""
        return (*self.blocks(), *self.students.values())

    @property
    def resident_bytes(self) -> int:
        """Bytes of all weights that the model holds now."""
        tensors = [*self.parameters(), *self.buffers()]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def home(self, planned: PlannedBlock) -> Home:
        """Where a planned block lives."""
        if planned.student:
            return Home(self.students, planned.interval.key, f"students.{planned.interval.key}.")
        path, number = self.catalog.architecture.place(planned.interval.first)
        return Home(self._lists[path], str(number), f"{path}.{number}.")

    # Reading.

    def move_to(self, grown: Mapping[PluggableBlock, PluggableBlock]) -> None:
        """Go on with blocks that have taken the place of others."""

    def make_resident(self, plan: Plan) -> None:
        """Read what a plan needs and the model does not hold yet; call it with `READING` held.

        Raises:
            ValueError: what is missing was dropped, and there is no checkpoint to read it from.
        """
        for run in plan.text_runs:
            if run.key not in self.text_runs:
                self._graphs.drop_all()
                _hold(self.text_runs, {**self.text_runs._modules, run.key: self._read_text_run(run)})
        grown = {}
        try:
            for planned in plan.blocks:
                before = self.home(planned).block
                if self._source is not None:
                    with self._source.kept_open():
                        after = self._read_block(self._source, planned, plan.not_updated(planned))
                    give_back()
                    if before is not None and after is not before:
                        grown[before] = after
                elif before is None:
                    raise ValueError(f"block {planned.interval} was dropped and there is no checkpoint to read it from")
        finally:
            # Also where a file cannot be read: those before it have grown.
            if grown:
                self.move_to(grown)

    def _read_block(self, source: Checkpoint, planned: PlannedBlock, not_updated: Collection[Stream]) -> PluggableBlock:
        """The block of a plan, with what it needs and the model did not hold yet."""
        home, to = self.home(planned), like(self)
        block = home.block if home.block is not None else self._empty_block(source, planned, home.prefix)
        missing = missing_tensors(source, block, home.prefix, planned.width, not_updated, fresh=home.block is None)
        new = [each._replace(tensor=each.tensor.to(device=to.device, dtype=to.dtype)) for each in missing]
        if not new:
            return block
        take_off(block)
        if home.block is not None and not is_bound(block):
            block = shared_copy(block)
        for each in new:
            assign(block, each, each.tensor.requires_grad_(to.requires_grad))
        self.complete(block, home)
        lay_side_by_side(block)
        block.train(self.training)
        home.put(block)
        treat_as_others(self, block, home.prefix, whole=True)
        self._graphs.drop_all()
        return block

    def complete(self, block: PluggableBlock, home: Home) -> None:
        """Add to a block what no checkpoint holds, before it takes its place.

        Args:
            block: with weights that were read just now.
            home: where it will live; the block that lives there now, if one does, holds less.
        """

    def _empty_block(self, source: Checkpoint, planned: PlannedBlock, prefix: str) -> PluggableBlock:
        """A block with none of its parts loaded, and its rank orders."""
        with torch.device("meta"):
            block = self.make_block(self.config, self.catalog.architecture.kind(planned.interval.first))
        for part in block.spec.parts:
            block.set_submodule(part.path, NotLoaded())
        block.held, block.quantisation = {}, self._quantisation
        block.orders = {
            group: rank_order(source, f"{prefix}order.{group}", block.spec.groups[group].count)
            for group in block.spec.unit_groups
        }
        self.adopt(block)
        return block

    def _read_text_run(self, run: Interval) -> nn.ModuleDict:
        if self._source is None:
            raise ValueError(f"text run {run} was dropped and there is no checkpoint to read it from")
        to, maps = like(self), nn.ModuleDict()
        shared = self._resident_maps()
        for name in text_maps(run, self.catalog.architecture.depth):
            path = self._source.stored_path(f"text_runs.{run.key}.{name}")
            if path in shared:
                # Runs that begin at one block read by one map: it is held, and trained, once.
                maps[name] = shared[path]
                continue
            with self._source.kept_open():
                weight, bias = (
                    self._source.read(f"text_runs.{run.key}.{name}.{which}").to(device=to.device, dtype=to.dtype)
                    for which in ("weight", "bias")
                )
            layer = nn.Linear(weight.shape[1], weight.shape[0], device="meta")
            layer.weight = nn.Parameter(weight, requires_grad=to.requires_grad)
            layer.bias = nn.Parameter(bias, requires_grad=to.requires_grad)
            maps[name] = layer
        treat_as_others(self, maps.train(self.training), f"text_runs.{run.key}.", whole=False)
        return maps

    def _resident_maps(self) -> dict[str, nn.Module]:
        """The maps of text runs that are resident, by where they lie in the checkpoint."""
        assert self._source is not None, "maps are shared as a checkpoint stores them"
        return {
            self._source.stored_path(f"text_runs.{key}.{name}"): layer
            for key, maps in self.text_runs.items()
            for name, layer in maps.named_children()
        }

    # Dropping and moving.

    def drop_all_but(self, plans: Iterable[Plan]) -> None:
        """Drop blocks, students and maps that none of these plans runs; call it with `READING` held."""
        plans = list(plans)
        wanted = {(id(home.modules), home.key) for plan in plans for home in map(self.home, plan.blocks)}
        runs = {run.key for plan in plans for run in plan.text_runs}
        with weights_at_hand(self):
            for held in (*self._lists.values(), self.students):
                _drop(held, [key for key in held._modules if (id(held), key) not in wanted])
            _drop(self.text_runs, [key for key in self.text_runs if key not in runs])
        self._graphs.drop_all()

    def drop_wide(self, plan: Plan) -> None:
        """Drop blocks that hold more than a plan runs of them, which are then read anew; with `READING` held.

        Blocks in training mode stay as they are: what they hold lies nowhere else.
        """
        if self._source is None:
            return
        for planned in plan.blocks:
            home = self.home(planned)
            if home.block is None or home.block.training:
                continue
            needed = self.catalog.spec(planned.interval.first).params(planned.width, plan.not_updated(planned))
            state = [*without_adapters(dict(home.block.named_parameters())).values()]
            state += [each.weight for each in home.block.modules() if isinstance(each, QuantisedLinear)]
            if sum(tensor.numel() for tensor in state) > needed:
                _drop(home.modules, [home.key])
        self._graphs.drop_all()

    def drop_factored(self) -> None:
        """Drop the weights of factored parts (`PluggableBlock.drop_factored`); call it with `READING` held."""
        left: dict[PluggableBlock, PluggableBlock] = {}
        homes: list[Any] = [*self._lists.values(), self.students]
        for modules in homes:
            for key, block in modules._modules.items():
                without: Any = block if is_bound(block) else shared_copy(block)
                without.drop_factored()
                if len(list(without.parameters())) < len(list(block.parameters())):
                    Home(modules, key, "").put(without)
                    left[block] = without
        self.move_to(left)
        self._graphs.drop_all()

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """Move or cast as any module does, then lay side by side again what that took apart; captured graphs go."""
        self._graphs.drop_all()
        super()._apply(fn, recurse)
        for block in self.resident_blocks():
            lay_side_by_side(block)
        return self

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Load, as any module; captured graphs go."""
        self._graphs.drop_all()
        return super().load_state_dict(*args, **kwargs)
