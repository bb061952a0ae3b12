"""What a plan costs, in each currency: parameters, FLOPs, bytes, milliseconds. Plain data, no torch.

Every cost is a sum: of what is outside of blocks, of each block at no width at all, of each group of it at its count,
and of the maps of text runs. So a linear program can count with it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from ppcl_rt.planning.architecture import Architecture, Tokens
from ppcl_rt.planning.block_spec import BlockSpec, Stream, Weights
from ppcl_rt.planning.interval import Interval
from ppcl_rt.planning.milliseconds import BlockTimes, Times
from ppcl_rt.planning.plan import Plan, PlannedBlock
from ppcl_rt.planning.quantisation import SCALE_BYTES, Quantisation
from ppcl_rt.planning.width import LINEAR_MAP, Width

Currency = Literal["params", "flops", "memory", "latency"]


class Cost:
    """A cost that is a sum; hashable, so that what was computed with it can be remembered."""

    currency: ClassVar[Currency]
    unit: ClassVar[str]

    def outer(self, architecture: Architecture) -> float:
        """Of what is outside of blocks."""
        raise NotImplementedError

    def fixed(self, architecture: Architecture, block: int, not_updated: Collection[Stream]) -> float:
        """Of a block at no width at all."""
        raise NotImplementedError

    def group(
        self, architecture: Architecture, block: int, group: str, count: int, not_updated: Collection[Stream]
    ) -> float:
        """Of a group of a block at a count."""
        raise NotImplementedError

    def run(self, architecture: Architecture, run: Interval) -> float:
        """Of the maps of a text run."""
        raise NotImplementedError

    def of(self, architecture: Architecture, plan: Plan) -> float:
        """Of a plan."""
        return self.of_all(architecture, [plan])[0]

    def of_all(self, architecture: Architecture, plans: Iterable[Plan]) -> list[float]:
        """Of several plans; what a kind of block costs at a width is computed once."""
        known: dict[Any, tuple[float, float]] = {}

        def of_block(planned: PlannedBlock, not_updated: frozenset[Stream]) -> tuple[float, float]:
            block, width = planned.interval.first, planned.width
            key = architecture.kind(block), width, not_updated
            if key not in known:
                groups = sum(self.group(architecture, block, g, n, not_updated) for g, n in width.items())
                known[key] = self.fixed(architecture, block, not_updated), groups
            return known[key]

        found = []
        for plan in plans:
            total = self.outer(architecture)
            for planned in plan.blocks:
                fixed, groups = of_block(planned, plan.not_updated(planned))
                total = total + fixed + groups
            found.append(total + sum(self.run(architecture, run) for run in plan.text_runs))
        return found


@dataclass(frozen=True)
class Params(Cost):
    """Parameters."""

    currency = "params"
    unit = "parameters"

    def outer(self, architecture: Architecture) -> float:
        """See `Cost`."""
        return architecture.outer_params

    def fixed(self, architecture: Architecture, block: int, not_updated: Collection[Stream]) -> float:
        """See `Cost`."""
        return architecture.spec(block).fixed_params(not_updated)

    def group(
        self, architecture: Architecture, block: int, group: str, count: int, not_updated: Collection[Stream]
    ) -> float:
        """See `Cost`."""
        return architecture.spec(block).group_params(group, count, not_updated)

    def run(self, architecture: Architecture, run: Interval) -> float:
        """See `Cost`."""
        return architecture.run_params(run)


@dataclass(frozen=True)
class Bytes(Cost):
    """Bytes of the weights.

    Attributes:
        each: of one parameter that is not quantised.
        quantisation: which weights are held in one byte a number and a scale a row; None where none is.
        compensated: whether layers stand in for outputs at narrower counts (`Catalog.compensated`).
    """

    each: int
    quantisation: Quantisation | None = None
    compensated: bool = False
    currency = "memory"
    unit = "bytes"

    def outer(self, architecture: Architecture) -> float:
        """See `Cost`."""
        return self.each * Params().outer(architecture)

    def fixed(self, architecture: Architecture, block: int, not_updated: Collection[Stream]) -> float:
        """See `Cost`."""
        whole = self.each * Params().fixed(architecture, block, not_updated)
        if self.quantisation is None:
            return whole
        return whole - self._saved(architecture.spec(block).fixed_weights(self.quantisation.takes, not_updated))

    def group(
        self, architecture: Architecture, block: int, group: str, count: int, not_updated: Collection[Stream]
    ) -> float:
        """See `Cost`."""
        spec = architecture.spec(block)
        whole = self.each * Params().group(architecture, block, group, count, not_updated)
        whole += self._held_beside(spec, group, count, not_updated)
        if self.quantisation is None:
            return whole
        return whole - self._saved(spec.group_weights(self.quantisation.takes, group, count, not_updated))

    def _held_beside(self, spec: BlockSpec, group: str, count: int, not_updated: Collection[Stream]) -> float:
        """What is held and does not run: the columns of a shared output that a replacement stands in for, and scales.

        Adapters of the output read these columns.
        """
        replaced = count < spec.groups[group].count and (self.compensated or count == LINEAR_MAP)
        total = 0
        for output in spec.outputs_of(group) if replaced else ():
            if output.shared and spec.runs(output.part, not_updated):
                eight_bits = self.quantisation is not None and self.quantisation.takes(output.part)
                columns = count * output.segment.unit * (1 if eight_bits else self.each)
                total += output.part.rows * (columns + (SCALE_BYTES if eight_bits else 0))
        return total

    def run(self, architecture: Architecture, run: Interval) -> float:
        """See `Cost`."""
        return self.each * Params().run(architecture, run)

    def _saved(self, weights: Weights) -> int:
        """By holding weights in eight bits; less than nothing where scales take more."""
        return (self.each - 1) * weights.numbers - SCALE_BYTES * weights.rows


@dataclass(frozen=True)
class Flops(Cost):
    """Floating-point operations of the blocks' products and attention, one forward (`Architecture.flops`)."""

    tokens: Tokens
    currency = "flops"
    unit = "FLOPs"

    def outer(self, architecture: Architecture) -> float:
        """See `Cost`; what is outside of blocks is not counted."""
        return 0

    def fixed(self, architecture: Architecture, block: int, not_updated: Collection[Stream]) -> float:
        """See `Cost`."""
        image, text, batch = self.tokens
        return batch * architecture.spec(block).flops(Width(), image, text, not_updated)

    def group(
        self, architecture: Architecture, block: int, group: str, count: int, not_updated: Collection[Stream]
    ) -> float:
        """See `Cost`."""
        image, text, batch = self.tokens
        whole = architecture.spec(block).flops(Width({group: count}), image, text, not_updated)
        return batch * whole - self.fixed(architecture, block, not_updated)

    def run(self, architecture: Architecture, run: Interval) -> float:
        """See `Cost`."""
        return self.tokens.batch * architecture.run_flops(run, self.tokens.text)


@dataclass(frozen=True, eq=False)
class Milliseconds(Cost):
    """Milliseconds of a forward as they were measured on a device (`Times`)."""

    times: Times
    currency = "latency"
    unit = "milliseconds"

    def outer(self, architecture: Architecture) -> float:
        """See `Cost`."""
        return self.times.outer_ms

    def fixed(self, architecture: Architecture, block: int, not_updated: Collection[Stream]) -> float:
        """See `Cost`; of a full block."""
        times = self._of(architecture, block)
        return times.ms(times.whole(not_updated), not_updated)

    def group(
        self, architecture: Architecture, block: int, group: str, count: int, not_updated: Collection[Stream]
    ) -> float:
        """See `Cost`; what the count takes more than the full one, less than nothing as a rule.

        Raises:
            ValueError: the count lies outside of what was measured.
        """
        return self._of(architecture, block).change(group, count, not_updated)

    def run(self, architecture: Architecture, run: Interval) -> float:
        """See `Cost`."""
        return len(architecture.run_maps(run)) * self.times.map_ms

    def _of(self, architecture: Architecture, block: int) -> BlockTimes:
        return self.times.of(architecture.kind(block))
