"""A dense model with its modulations as two thin layers: no data, no training, one block in memory at a time.

What modulates a block is a function of the timestep alone (for some families also of the pooled text and a guidance),
so its inputs lie near a curve, and the products of large layers with it have a low rank. The two layers are found in
closed form over a fine grid of timesteps, and checked between the grid's.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from ppcl_rt.checkpoint.composed import ComposedCheckpoint
from ppcl_rt.checkpoint.places import locate
from ppcl_rt.checkpoint.reader import Checkpoint
from ppcl_rt.checkpoint.writer import check_apart, write_shards
from ppcl_rt.convert.low_rank import Affine, Inputs, LowRank
from ppcl_rt.families import registry
from ppcl_rt.model.block import PluggableBlock
from ppcl_rt.planning.catalog import Catalog
from ppcl_rt.planning.interval import Interval
from ppcl_rt.planning.plan import OnePlan, PlannedBlock

# Timesteps that factors are fitted on, half a unit of 0..1000 apart: the fastest wave of a timestep's embedding has a
# period of 6.3 units. They are checked at those half way between.
_GRID = 2001
# Directions of the inputs that hold less than this share of the variance are left out: a hundredth of the finest error.
_LEFT_OUT = 1e-9
_LEAST_ERROR, _MOST_ERROR = 1e-7, 1e-2
# Fitted ranks grow by this much until what is stored keeps the error between the timesteps of the grid.
_GROWTH = 1.1
# bfloat16 rounds to 2^-9 of a number: a relative squared error of 7e-7 for each factor.
DEFAULT_ERRORS = {torch.float32: 1e-6, torch.bfloat16: 1e-5}


class Factored(NamedTuple):
    """What became of a block.

    Attributes:
        block: its number.
        rank: of its modulations; the full count where two layers would not be smaller.
        error: the largest relative squared error of one of its layers' outputs, at timesteps between the grid's.
        worst: the same at the worst single one of them.
    """

    block: int
    rank: int
    error: float
    worst: float


class Slimmed(NamedTuple):
    """What `slim` made.

    Attributes:
        catalog: as it was written.
        blocks: what became of each.
        bytes_before, bytes_after: of the tensors of the dense model as the source stores them, and of what was written.
    """

    catalog: Catalog
    blocks: tuple[Factored, ...]
    bytes_before: int
    bytes_after: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Slimming:
    """How a model is made slim.

    Attributes:
        error: the most relative squared error of what a modulation layer gives, in float32 arithmetic.
        factors: dtype in which factors are stored.
        pooled: ``[N, E]``, pooled text embeddings, for families whose modulations see them. Every second is held out:
            the error is that at these.
        guidance: likewise.
    """

    error: float
    factors: torch.dtype = torch.float32
    pooled: torch.Tensor | None = None
    guidance: tuple[float, ...] = ()

    @property
    def prompts(self) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """The pooled texts that factors are fitted on, and those that are held out; of one, it is both."""
        if self.pooled is None or len(self.pooled) < 2:
            return self.pooled, self.pooled
        return self.pooled[::2], self.pooled[1::2]

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            ValueError: one of them is out of range.
        """
        if self.factors not in DEFAULT_ERRORS:
            raise ValueError(f"factors are stored in float32 or bfloat16, not {self.factors}")
        if not _LEAST_ERROR <= self.error <= _MOST_ERROR:
            raise ValueError(f"an error is {_LEAST_ERROR:g} to {_MOST_ERROR:g}, not {self.error:g}")


@torch.no_grad()
def slim(
    source: str | Path,
    out: Path,
    how: Slimming,
    progress: Callable[[Sequence[int]], Iterable[int]] = iter,
    subfolder: str | None = None,
) -> Slimmed:
    """Write a checkpoint of one plan: the dense model, its modulations at a low rank; the rest as it is stored.

    Args:
        source: a stock checkpoint or a pluggable one, whose teacher is taken; folder or hub id.
        out: folder; one that is there already is replaced once the new one is complete.
        how: how exact.
        progress: goes through the numbers of the blocks, and shows it.
        subfolder: of the source, where the transformer lies in a pipeline.

    Raises:
        ValueError: ``source`` cannot be read, holds one plan already, is of a family whose modulations have no
            factors, or needs prompts; or ``out`` is a file, or lies in it or around it. Nothing was written then.
    """
    folder = locate(source, subfolder)
    check_apart(out, folder)
    family = registry.of_class(Checkpoint(folder).config.get("_class_name"), folder)
    opened = family.opened(folder)
    if opened.catalog is not None and opened.catalog.only is not None:
        raise ValueError(f"{source} holds one plan already: make the model slim that it came from")
    model = family.without_blocks(opened, torch.float32)
    architecture = model.catalog.architecture
    if not any(spec.rank_groups for spec in architecture.kinds.values()):
        raise ValueError(f"the family {model.family} has no modulations of each block that would be worth factors")
    grid = torch.linspace(0, 1, _GRID)
    fitted, held_out = how.prompts
    on_grid = model.every_condition(grid, fitted, how.guidance)
    between = model.every_condition((grid[1:] + grid[:-1]) / 2, held_out, how.guidance)
    work = _Work(model, opened, how, on_grid, between)
    catalog = write_shards(out, model.one_plan_config, work.shards(progress), work.catalog)
    return Slimmed(catalog, tuple(work.done), work.bytes_before, work.bytes_after)


class _Work:
    """One run of `slim`."""

    def __init__(
        self, model: Any, source: ComposedCheckpoint, how: Slimming, on_grid: torch.Tensor, between: torch.Tensor
    ) -> None:
        self._model, self._source, self._how = model, source, how
        self._on_grid, self._between = on_grid, between
        self._inputs: dict[Callable[..., torch.Tensor], Inputs] = {}
        self.done: list[Factored] = []
        self.bytes_before = self.bytes_after = 0

    def catalog(self) -> Catalog:
        """The catalog, with what is done so far."""
        whole = self._model.catalog
        architecture = whole.architecture
        blocks = []
        for block, rank, _, _ in self.done:
            full = architecture.spec(block).full
            width = full.replace(**dict.fromkeys(architecture.spec(block).rank_groups, rank))
            blocks.append(PlannedBlock(interval=Interval(block, block), width=width))
        origin = {"base_model": whole.base_model, "license": whole.license}
        made = Catalog.of_dense(whole.family, architecture, whole.reference, **origin)
        return made.model_copy(update={"only": OnePlan(blocks=tuple(blocks)), "task": whole.task})

    def shards(self, progress: Callable[[Sequence[int]], Iterable[int]]) -> Iterator[dict[str, torch.Tensor]]:
        """What lies outside the blocks, then each block."""
        yield self._unchanged(self._model.state_dict())
        for block in progress(range(self._model.catalog.architecture.depth)):
            with self._source.kept_open():
                made = self._block(block)
            yield made
            # Before the next block is read.
            del made

    def _unchanged(self, names: Iterable[str]) -> dict[str, torch.Tensor]:
        tensors = {name: self._source.read(name) for name in names}
        size = _size(tensors.values())
        self.bytes_before += size
        self.bytes_after += size
        return tensors

    def _block(self, block: int) -> dict[str, torch.Tensor]:
        architecture = self._model.catalog.architecture
        spec, prefix = architecture.spec(block), "{}.{}.".format(*architecture.place(block))
        made: dict[str, torch.Tensor] = {}
        meta = self._model.meta_block(architecture.kind(block))
        kept = set(meta.state_dict())
        rank, error, worst = 0, 0.0, 0.0
        for group in spec.rank_groups:
            found, rank, error, worst = self._factors(meta, group, prefix)
            made |= found
            if found:
                kept -= {f"{p.path}.{which}" for p in spec.factored_by(group) for which in ("weight", "bias")}
        self.done.append(Factored(block, rank, error, worst))
        return self._unchanged(prefix + name for name in sorted(kept)) | made

    def _inputs_of(self, block: PluggableBlock) -> Inputs:
        """Where what a block's modulations read lies on the grid; made once for all that read alike."""
        read = type(block).modulation_input
        if read not in self._inputs:
            self._inputs[read] = Inputs.of(block.modulation_input(self._on_grid), _LEFT_OUT)
        return self._inputs[read]

    def _factors(
        self, block: PluggableBlock, group: str, prefix: str
    ) -> tuple[dict[str, torch.Tensor], int, float, float]:
        """The factors of a block's modulations, their rank and errors (`Factored`); none where they are no smaller."""
        spec = block.spec
        parts, full = spec.factored_by(group), spec.groups[group].count
        layers: list[Affine] = [
            (self._source.read(f"{prefix}{part.path}.weight"), self._source.read(f"{prefix}{part.path}.bias"))
            for part in parts
        ]
        low = LowRank(layers, self._inputs_of(block), relative=True)
        rank, most = low.rank_for(self._how.error), len(low.errors) - 1
        while rank <= most and spec.group_params(group, rank) < spec.group_params(group, full):
            down, ups = low.factors(rank)
            down, *ups = (_stored(each, self._how.factors) for each in (down, *ups))
            error, worst = self._errors(block.modulation_input(self._between), layers, down, ups)
            if error <= self._how.error:
                names = [f"{prefix}replacements.{spec.shared_factor(group)}"]
                names += [f"{prefix}replacements.{part.name}" for part in parts]
                found: dict[str, torch.Tensor] = {}
                for name, (weight, bias) in zip(names, (down, *ups), strict=True):
                    found |= {f"{name}.weight": weight, f"{name}.bias": bias}
                self.bytes_before += _size(each for layer in layers for each in layer)
                self.bytes_after += _size(found.values())
                return found, rank, error, worst
            rank = max(rank + 1, round(rank * _GROWTH))
        return {}, full, 0.0, 0.0

    @staticmethod
    def _errors(x: torch.Tensor, layers: Sequence[Affine], down: Affine, ups: Sequence[Affine]) -> tuple[float, float]:
        """The largest relative squared error of a layer on inputs ``x [n, D]``, over all of them and at the worst one.

        In float32 arithmetic.
        """
        shared = F.linear(x, *(each.float() for each in down))
        error = worst = 0.0
        for layer, up in zip(layers, ups, strict=True):
            wanted = F.linear(x, *(each.float() for each in layer))
            got = F.linear(shared, *(each.float() for each in up))
            lost, size = ((x.square().sum(1).double()) for x in (got - wanted, wanted))
            error = max(error, float(lost.sum() / size.sum().clamp_min(1e-30)))
            worst = max(worst, float((lost / size.clamp_min(1e-30)).max()))
        return error, worst


def _size(tensors: Iterable[torch.Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def _stored(layer: Affine, dtype: torch.dtype) -> Affine:
    weight, bias = layer
    return weight.to(dtype), bias.to(dtype)
