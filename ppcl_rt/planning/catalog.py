"""Catalogs: what a checkpoint can do, and what each choice costs and loses. Plain data, no torch."""

from __future__ import annotations

import bisect
import hashlib
import math
from collections.abc import Iterable, Iterator
from functools import cached_property
from typing import Any, Literal, TypeVar

from pydantic import Field, field_validator, model_validator

from ppcl_rt.planning.architecture import Architecture, Tokens
from ppcl_rt.planning.block_spec import TEXT_NOT_UPDATED, BlockSpec
from ppcl_rt.planning.frozen import Frozen
from ppcl_rt.planning.interval import Interval
from ppcl_rt.planning.legal import LegalWidths, Sketch, Student, TextRun
from ppcl_rt.planning.plan import OnePlan, Plan, PlannedBlock
from ppcl_rt.planning.width import LINEAR_MAP, Width

# The version of the JSON form. It rises when an older reader would misread a catalog; `ppcl_rt.checkpoint.migration`
# brings older catalogs up to it.
FORMAT = 3

# Tokens of a stream at a reference shape; more is a broken catalog, and FLOPs would not fit a float.
MOST_TOKENS = 2**24
# Characters of a model as hubs name it, and of a licence.
LONGEST_MODEL, LONGEST_LICENSE = 200, 100

# Blocks, students, text runs or measured plans; all intervals of 60 blocks are 1,830.
MOST_LISTED = 10_000

Chosen = TypeVar("Chosen", Student, TextRun)


class MeasuredPlan(Frozen):
    """A plan that was measured as a whole, after it was planned.

    Attributes:
        choices: what it takes, other than full counts: numbers in the order of `sketch.choices`, ascending.
        loss: its velocity error.
        bands: as in `LegalCount`.
    """

    choices: tuple[int, ...]
    loss: float = Field(ge=0, allow_inf_nan=False)
    bands: tuple[float, ...] = ()


class Catalog(Frozen):
    """What a checkpoint can do. Travels inside the checkpoint, in ``config.json``.

    A *loss* is the velocity error of the dense model with one choice changed: squared error of the clean image that the
    guided prediction points at, over the teacher's own signal. That of a student's narrower count is the squared
    difference to the student at full width.

    Attributes:
        family: name of the model family (`ppcl_rt.families.registry`).
        architecture: of the dense model.
        reference: tokens of the sample at which a ratio counts FLOPs.
        blocks: legal widths of each teacher block.
        students: what can stand in for which interval; intervals may overlap, a plan takes disjoint ones.
        text_runs: where the text stream need not be updated; likewise.
        frontier: measured plans, from which the planner takes the best that fits a budget.
        only: the one plan that the checkpoint holds; nothing else can then be chosen. None where there is a choice.
        compensated: whether output layers at every narrower count lie in the checkpoint, fitted by least squares.
            Linear maps for MLPs and modulations of a lower rank always do where they are legal.
        edges: timesteps that bound the bands that losses are divided into, from 0 to 1; none where they are not.
        sketch: of what each choice changes (`ppcl_rt.planning.sketch`); None where there is none.
        checksums: SHA-256 of every tensor, by its name in the file.
        checksums_of: what they are made of: a tensor's bytes alone (formats 1 and 2), or its dtype and shape too.
        base_model: the model that this one was made from, as its hub names it; None where it was made from nothing.
        license: of the weights, as hubs write it (``apache-2.0``, ``other/NAME``); None: not known.
        task: how to sample and judge, for checkpoints of a task that the project can judge: ``{"name": ..., ...}``.
    """

    format: int = Field(FORMAT, ge=FORMAT, le=FORMAT)
    family: str
    architecture: Architecture
    reference: Tokens
    blocks: tuple[LegalWidths, ...]
    students: tuple[Student, ...] = ()
    text_runs: tuple[TextRun, ...] = ()
    frontier: tuple[MeasuredPlan, ...] = ()
    only: OnePlan | None = None
    compensated: bool = False
    edges: tuple[float, ...] = ()
    sketch: Sketch | None = None
    checksums: dict[str, str] = Field(default_factory=dict)
    checksums_of: Literal["bytes", "tensors"] = "tensors"
    base_model: str | None = Field(None, min_length=1, max_length=LONGEST_MODEL)
    license: str | None = Field(None, min_length=1, max_length=LONGEST_LICENSE)
    task: dict[str, Any] | None = None

    @field_validator("reference")
    @classmethod
    def _some_tokens(cls, reference: Tokens) -> Tokens:
        if not all(1 <= tokens <= MOST_TOKENS for tokens in reference):
            raise ValueError(f"the reference shape has 1 to {MOST_TOKENS} tokens of each stream, not {reference}")
        return reference

    @model_validator(mode="after")
    def _fits_the_architecture(self) -> Catalog:
        depth = self.architecture.depth
        if len(self.blocks) != depth:
            raise ValueError(f"the catalog lists {len(self.blocks)} blocks, the model has {depth}")
        for name, choices in (("student", self.students), ("text run", self.text_runs)):
            self._check_intervals(name, [choice.interval for choice in choices])
            if len({choice.interval for choice in choices}) != len(choices):
                raise ValueError(f"an interval has two {name}s: drop one")
        return self

    def _check_intervals(self, name: str, intervals: Iterable[Interval]) -> None:
        depth = self.architecture.depth
        for interval in intervals:
            if interval.last >= depth:
                raise ValueError(f"{name} {interval} reaches beyond block {depth - 1}")
            if not self.architecture.one_kind(interval):
                raise ValueError(f"{name} {interval} reaches over blocks of more than one list or kind")
            if name == "text run" and "text" not in self.architecture.spec(interval.first).may_leave:
                raise ValueError(f"text run {interval}: these blocks cannot leave the text stream as it was")

    @model_validator(mode="after")
    def _legal(self) -> Catalog:
        legal = [(f"block {n}", n, widths) for n, widths in enumerate(self.blocks)]
        legal += [(f"student {each.interval}", each.interval.first, each.widths) for each in self.students]
        for name, block, widths in legal:
            spec = self.architecture.spec(block)
            if widths.full != spec.full:
                raise ValueError(f"{name} starts at {widths.full}, the dense block has {spec.full}")
            for group in widths.groups:
                if widths.has(group, LINEAR_MAP) and not spec.groups[group].mappable:
                    raise ValueError(f"{name}: no linear map can stand in for {group}: a count stays at 1 or more")
        return self

    @model_validator(mode="after")
    def _one_plan(self) -> Catalog:
        if self.only is None:
            return self
        narrower = any(len(widths.of(group)) > 1 for widths in self.blocks for group in widths.groups)
        if self.students or self.text_runs or self.frontier or narrower:
            raise ValueError("the checkpoint holds one plan, but its catalog lists choices")
        plan = self.largest
        for name, intervals in ("block", [b.interval for b in plan.blocks]), ("text run", plan.text_runs):
            self._check_intervals(name, intervals)
        for planned in plan.blocks:
            self._check_counts(plan, planned)
        return self

    @model_validator(mode="after")
    def _in_bands(self) -> Catalog:
        if not self.edges:
            return self
        if len(self.edges) < 2 or list(self.edges) != sorted({0.0, 1.0, *self.edges}):
            raise ValueError(f"edges of timestep bands rise from 0 to 1, not {self.edges}")
        for parts in self._all_bands():
            if len(parts) != len(self.edges) - 1 or not all(0 <= p < math.inf for p in parts):
                raise ValueError(f"a loss has the parts {parts} in {len(self.edges) - 1} bands of the timestep")
        if self.sketch is not None and self.sketch.bands != len(self.edges) - 1:
            raise ValueError(f"the sketch has {self.sketch.bands} bands, losses have {len(self.edges) - 1}")
        return self

    @classmethod
    def of_dense(cls, family: str, architecture: Architecture, reference: Tokens, **origin: str | None) -> Catalog:
        """The catalog of a stock checkpoint: everything, or nothing; ``origin`` is its base model and licence."""
        blocks = (LegalWidths.only(architecture.spec(n).full) for n in range(architecture.depth))
        return cls(family=family, architecture=architecture, reference=reference, blocks=tuple(blocks), **origin)

    @cached_property
    def fingerprint(self) -> str:
        """Names the weights: equal for equal tensors, different otherwise."""
        joined = "\n".join(f"{name} {digest}" for name, digest in sorted(self.checksums.items()))
        return hashlib.sha256(joined.encode()).hexdigest()[:16]

    # Plans.

    @cached_property
    def dense(self) -> Plan:
        """The plan that leaves everything in: the teacher."""
        return self.compose((n, self.architecture.spec(n).full) for n in range(self.architecture.depth))

    @cached_property
    def largest(self) -> Plan:
        """The plan that runs where none is asked for: the dense one, or the only one that there is."""
        if self.only is None:
            return self.dense
        blocks, runs = self.only.blocks, self.only.text_runs
        return Plan(checkpoint=self.fingerprint, depth=self.architecture.depth, blocks=blocks, text_runs=runs)

    def compose(
        self,
        kept: Iterable[tuple[int, Width]],
        students: Iterable[PlannedBlock] = (),
        text_runs: Iterable[Interval] = (),
    ) -> Plan:
        """Build a plan for this checkpoint; blocks of text runs lose the groups that only the text stream needs."""
        runs = tuple(text_runs)
        not_updating = {block for run in runs for block in run if block != run.first}
        narrowed = (
            (
                n,
                Width({g: width[g] for g in self.spec(n).groups_without(TEXT_NOT_UPDATED)})
                if n in not_updating
                else width,
            )
            for n, width in kept
        )
        return Plan.of(self.fingerprint, self.architecture.depth, narrowed, students, runs)

    def spec(self, block: int) -> BlockSpec:
        """What a block is made of."""
        return self.architecture.spec(block)

    def widths(self, planned: PlannedBlock) -> LegalWidths:
        """Legal widths of what a planned block runs."""
        return self.student(planned.interval).widths if planned.student else self.blocks[planned.interval.first]

    @property
    def prefixed(self) -> list[tuple[str, int, LegalWidths]]:
        """What has widths, blocks and then students.

        Of each: what the names of its tensors begin with (``transformer_blocks.3.``), the number of a block of its
        kind, and its legal widths.
        """
        blocks = [("{}.{}.".format(*self.architecture.place(n)), n, widths) for n, widths in enumerate(self.blocks)]
        students = [(f"students.{s.interval.key}.", s.interval.first, s.widths) for s in self.students]
        return blocks + students

    def student(self, interval: Interval) -> Student:
        """The student of an interval.

        Raises:
            ValueError: there is none.
        """
        return _of_interval(self.students, interval, f"no student stands in for {interval}; there are")

    def text_run(self, interval: Interval) -> TextRun:
        """The text run over an interval.

        Raises:
            ValueError: there is none.
        """
        return _of_interval(self.text_runs, interval, f"there is no text run over {interval}; there are")

    def check(self, plan: Plan) -> Plan:
        """Return the plan if this checkpoint can run it.

        Raises:
            ValueError: the plan is for another checkpoint, or asks for what is not there.
        """
        if plan.checkpoint != self.fingerprint:
            raise ValueError(
                f"the plan was made for checkpoint {plan.checkpoint}, this is {self.fingerprint}: plan again"
            )
        if plan.depth != self.architecture.depth:
            raise ValueError(f"the plan is for {plan.depth} blocks, the checkpoint has {self.architecture.depth}")
        if self.only is not None:
            if plan != self.largest:
                raise ValueError("this checkpoint holds one plan, and this is another: see `ppcl plan`")
            return plan
        for planned in plan.blocks:
            if planned.student:
                self.student(planned.interval)
            self._check_width(plan, planned)
        for run in plan.text_runs:
            self.text_run(run)
        return plan

    def _check_counts(self, plan: Plan, planned: PlannedBlock) -> None:
        """Check a width against the kind of block alone."""
        spec, width = self.spec(planned.interval.first), planned.width
        where = f"blocks {planned.interval}"
        groups = spec.groups_without(plan.not_updated(planned))
        if set(width) != set(groups):
            raise ValueError(f"{where} name counts of {', '.join(width) or 'nothing'}, wanted: {', '.join(groups)}")
        if not width.within(spec.full):
            raise ValueError(f"{where} run {width}, the checkpoint holds {spec.full}")
        for group, count in width.items():
            if count == LINEAR_MAP and not spec.groups[group].mappable:
                raise ValueError(f"{where}: {group} is 1 or more, not 0")

    def _check_width(self, plan: Plan, planned: PlannedBlock) -> None:
        self._check_counts(plan, planned)
        spec, width, widths = self.spec(planned.interval.first), planned.width, self.widths(planned)
        where = f"blocks {planned.interval}"
        for group, count in width.items():
            if count == LINEAR_MAP and not widths.has(group, LINEAR_MAP):
                raise ValueError(f"{where}: the checkpoint holds no linear map for the {group} MLP")
        for group in spec.rank_groups:
            highest, full = widths.highest_rank(group), spec.groups[group].count
            if highest < width.get(group, full) < full:
                raise ValueError(f"{where}: {group} comes at full rank and up to {highest}, not at {width[group]}")

    def ratio(self, plan: Plan) -> float:
        """The larger of a plan's share of the dense parameters and of the dense FLOPs at the reference shape."""
        image, text, batch = self.reference
        flops = self.architecture.flops(plan, image, text, batch) / self.architecture.dense_flops(self.reference)
        return max(self.architecture.params(plan) / self.architecture.dense_params, flops)

    def loss(self, plan: Plan) -> float:
        """Predicted loss: the sum of what each choice alone loses (NaN where the plan takes what was not measured)."""
        if self.only is not None:
            return math.nan if self.only.loss is None else self.only.loss
        if plan.skipped:
            return math.nan
        total = 0.0
        total += sum(self.text_run(run).loss for run in plan.text_runs)
        for planned in plan.blocks:
            total += self.student(planned.interval).loss if planned.student else 0.0
            widths = self.widths(planned)
            for group in self.spec(planned.interval.first).groups_without(plan.not_updated(planned)):
                losses = {count.units: count.loss for count in widths.of(group)}
                total += losses.get(planned.width[group], math.nan)
        return total

    # Bands of the timestep.

    def _all_bands(self) -> Iterator[tuple[float, ...]]:
        for widths in (*self.blocks, *(student.widths for student in self.students)):
            for group in widths.groups:
                yield from (count.bands for count in widths.of(group)[1:])
        yield from (student.bands for student in self.students)
        yield from (run.bands for run in self.text_runs)
        yield from (plan.bands for plan in self.frontier)

    def band(self, timestep: float) -> int:
        """The band, from 0, that a timestep lies in.

        Raises:
            ValueError: losses were not measured by bands, or the timestep is not in [0, 1].
        """
        if not self.edges:
            raise ValueError("this checkpoint's losses were not measured by timestep: plan without one")
        if not 0 <= timestep <= 1:
            raise ValueError(f"a timestep lies in [0, 1], 1 is noise, not {timestep}")
        return min(bisect.bisect_right(self.edges, timestep), len(self.edges) - 1) - 1


def _of_interval(choices: Iterable[Chosen], interval: Interval, missing: str) -> Chosen:
    choices = tuple(choices)
    for choice in choices:
        if choice.interval == interval:
            return choice
    raise ValueError(f"{missing}: {', '.join(str(choice.interval) for choice in choices) or 'none'}")
