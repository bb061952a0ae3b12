"""Catalogs: what a checkpoint can do, and what each choice costs and loses. Plain data, no torch."""

from __future__ import annotations

import bisect
import hashlib
import math
from collections.abc import Iterator
from functools import cached_property
from typing import Any, Literal, NamedTuple

from pydantic import Field, ValidationInfo, field_validator, model_validator

from ppcl_rt.planning.plan import Frozen, Interval, Plan, Step, Width

# The groups of `Width` that are MLPs: those that a linear map can stand in for, which is their count 0.
MLPS = ("image", "text")


class Option(NamedTuple):
    """A legal count of a group of `Width`, and the loss of the teacher's velocity when this alone is narrowed to it.

    Attributes:
        bands: the loss's parts in each band of the timestep (`Catalog.edges`); none where it was not measured so.
    """

    count: int  # type: ignore[assignment]  # hides tuple.count, which nobody wants of an option
    loss: float
    bands: tuple[float, ...] = ()


class Widths(Frozen):
    """The legal counts of a block, per group of `Width`, widest first; the widest is the full one and loses nothing."""

    heads: tuple[Option, ...]
    image: tuple[Option, ...]
    text: tuple[Option, ...]
    modulation: tuple[Option, ...]

    @field_validator("heads", "image", "text", "modulation")
    @classmethod
    def _sound(cls, options: tuple[Option, ...], info: ValidationInfo) -> tuple[Option, ...]:
        counts = [option.count for option in options]
        least = 0 if info.field_name in MLPS else 1
        if not counts or counts[0] < 1 or min(counts) < least or counts != sorted(set(counts), reverse=True):
            raise ValueError(f"counts fall strictly from the full one and stay at {least} or more, not {counts}")
        if options[0].loss != 0 or not all(option.loss > 0 and math.isfinite(option.loss) for option in options[1:]):
            raise ValueError("the full count loses 0, every narrower one more than 0")
        return options

    @classmethod
    def only(cls, width: Width) -> Widths:
        """A block that runs at one width."""
        return cls(**{group: (Option(count, 0.0),) for group, count in width._asdict().items()})

    def of(self, group: str) -> tuple[Option, ...]:
        """Options of one group: a field of `Width`."""
        options: tuple[Option, ...] = getattr(self, group)
        return options

    def has(self, group: str, count: int) -> bool:
        """Whether a count is legal."""
        return any(option.count == count for option in self.of(group))

    @property
    def rank(self) -> int:
        """The highest rank below the full one that modulations come in, 0 for none: lower ones are prefixes of it."""
        return self.modulation[1].count if len(self.modulation) > 1 else 0

    @property
    def full(self) -> Width:
        """The dense width."""
        return Width(*(self.of(group)[0].count for group in Width._fields))


# The teacher block of an interval that a student was copied from; ``average`` is the mean of all.
Start = Literal["first", "middle", "last", "average"]


class Student(Frozen):
    """A block distilled to stand in for an interval.

    Attributes:
        interval: the blocks that it replaces.
        start: the teacher block of the interval that it was copied from.
        loss: of the teacher's velocity with this student alone plugged in, at full width.
        widths: its own legal widths.
        bands: as in `Option`.
    """

    interval: Interval
    start: Start
    loss: float = Field(gt=0, allow_inf_nan=False)
    widths: Widths
    bands: tuple[float, ...] = ()


class TextRun(Frozen):
    """Blocks along which the text stream may stand still (PPCL eq. 8; `Plan.text_runs`).

    Attributes:
        interval: two or more blocks; the first computes the text stream as ever.
        loss: of the teacher's velocity with this run alone.
        bands: as in `Option`.
    """

    interval: Interval
    loss: float = Field(gt=0, allow_inf_nan=False)
    bands: tuple[float, ...] = ()

    @field_validator("interval")
    @classmethod
    def _long(cls, interval: Interval) -> Interval:
        if len(interval) < 2:
            raise ValueError(f"a text run is two or more blocks, not {interval}")
        return interval


def text_maps(run: Interval, depth: int) -> tuple[str, ...]:
    """Names of a text run's maps ``[D, D]``: what each block behind its first reads, and how the stream moves on.

    Behind the last block of the model nobody reads the text.
    """
    read = [f"z_{block}" for block in run if block != run.first]
    return (*read, *(["text"] if run.last < depth - 1 else []))


class Shape(Frozen):
    """The dimensions of a two-stream transformer, from which every cost follows.

    Attributes:
        depth: blocks.
        dim: width D of the residual streams.
        head_dim: channels of a head, E.
        width: heads, MLP channels and modulation rank of the dense block.
        outer_params: parameters outside the blocks.
    """

    depth: int = Field(ge=1)
    dim: int = Field(ge=1)
    head_dim: int = Field(ge=1)
    width: Width
    outer_params: int = Field(ge=0)

    @model_validator(mode="after")
    def _full_rank(self) -> Shape:
        if self.width.modulation != self.dim:
            raise ValueError(f"the full rank of modulations is the width {self.dim}, not {self.width.modulation}")
        return self

    @property
    def fixed_params(self) -> int:
        """Parameters of a block at no width at all: q/k norms, output biases."""
        return 4 * self.head_dim + 4 * self.dim

    def group_params(self, group: str, count: int, still: bool = False) -> int:
        """Parameters of a group of a block (a field of `Width`) at a count; ``still`` as in `Plan.still`."""
        if group == "heads":
            # Of two streams: q, k, v with biases, and the output, which a text stream that stands still has not.
            return count * self.head_dim * (2 * (4 * self.dim + 3) - (self.dim if still else 0))
        if group == "modulation":
            # Six vectors a stream; below the full rank through ``count`` channels that both streams share.
            shared = count * (self.dim + 1) if count < self.dim else 0
            return (6 if still else 12) * self.dim * (count + 1) + shared
        if group == "text" and still:
            # Less the biases of two outputs, which are counted as fixed.
            return -2 * self.dim
        return count * (2 * self.dim + 1) or self.dim**2

    def block_params(self, width: Width, still: bool = False) -> int:
        """Parameters of a block at a width; ``still`` as in `Plan.still`."""
        return self.fixed_params + sum(self.group_params(group, n, still) for group, n in width._asdict().items())

    def run_params(self, run: Interval) -> int:
        """Parameters of a text run's maps."""
        return len(text_maps(run, self.depth)) * self.dim * (self.dim + 1)

    @property
    def dense_params(self) -> int:
        """Parameters of the dense model."""
        return self.outer_params + self.depth * self.block_params(self.width)

    def params(self, plan: Plan) -> int:
        """Parameters that a plan runs."""
        runs = sum(map(self.run_params, plan.text_runs))
        blocks = sum(self.block_params(step.width, step.blocks.first in plan.still) for step in plan.steps)
        return self.outer_params + blocks + runs

    def flops(self, plan: Plan, image_tokens: int, text_tokens: int, batch: int = 1) -> int:
        """Floating-point operations (2 a multiply-add) of the blocks' matrix products and attention, one forward."""
        tokens = image_tokens + text_tokens
        total = 0
        for step in plan.steps:
            inner, still = step.width.heads * self.head_dim, step.blocks.first in plan.still
            total += 8 * tokens * self.dim * inner + 4 * tokens**2 * inner
            total += image_tokens * (4 * self.dim * step.width.image or 2 * self.dim**2)
            total += text_tokens * (
                -2 * self.dim * inner if still else 4 * self.dim * step.width.text or 2 * self.dim**2
            )
            # Modulations, once a sample.
            rank = step.width.modulation
            total += (12 if still else 24) * self.dim * rank + (2 * self.dim * rank if rank < self.dim else 0)
        total += sum(2 * text_tokens * self.dim**2 * len(text_maps(run, self.depth)) for run in plan.text_runs)
        return batch * total


class Catalog(Frozen):
    """What a checkpoint can do. Travels inside the checkpoint, in ``config.json``.

    Attributes:
        family: name of the model family, ``qwen-image``.
        shape: dimensions of the dense model.
        blocks: legal widths of each teacher block.
        students: what can stand in for which interval; intervals may overlap, a plan takes disjoint ones.
        text_runs: where the text stream may stand still; likewise.
        compensated: whether output layers at every narrower count lie in the checkpoint, fitted by least squares.
            Linear maps for MLPs and modulations of a lower rank always do where they are legal.
        edges: timesteps that bound the bands that losses are divided into, from 0 to 1; none where they are not.
        checksums: SHA-256 of every tensor's bytes, by name.
        task: how to sample and judge, for checkpoints of a task that the project can judge: ``{"name": ..., ...}``.
    """

    format: int = Field(1, ge=1, le=1)
    family: str
    shape: Shape
    blocks: tuple[Widths, ...]
    students: tuple[Student, ...] = ()
    text_runs: tuple[TextRun, ...] = ()
    compensated: bool = False
    edges: tuple[float, ...] = ()
    checksums: dict[str, str] = Field(default_factory=dict)
    task: dict[str, Any] | None = None

    @model_validator(mode="after")
    def _consistent(self) -> Catalog:
        if len(self.blocks) != self.shape.depth:
            raise ValueError(f"the catalog lists {len(self.blocks)} blocks, the model has {self.shape.depth}")
        runnable = {f"block {index}": widths for index, widths in enumerate(self.blocks)}
        runnable |= {f"student {student.interval}": student.widths for student in self.students}
        for name, widths in runnable.items():
            if widths.full != self.shape.width:
                raise ValueError(f"{name} starts at {widths.full}, the dense block has {self.shape.width}")
        for student in self.students:
            if student.interval.last >= self.shape.depth:
                raise ValueError(f"student {student.interval} reaches beyond block {self.shape.depth - 1}")
        if len({student.interval for student in self.students}) != len(self.students):
            raise ValueError("an interval has two students: drop one")
        if self.edges:
            if len(self.edges) < 2 or list(self.edges) != sorted({0.0, 1.0, *self.edges}):
                raise ValueError(f"edges of timestep bands rise from 0 to 1, not {self.edges}")
            for parts in self._all_bands():
                if len(parts) != len(self.edges) - 1 or not all(0 <= p < math.inf for p in parts):
                    raise ValueError(f"a loss has the parts {parts} in {len(self.edges) - 1} bands of the timestep")
        if len({run.interval for run in self.text_runs}) != len(self.text_runs):
            raise ValueError("a text run is listed twice: drop one")
        for run in self.text_runs:
            if run.interval.last >= self.shape.depth:
                raise ValueError(f"text run {run.interval} reaches beyond block {self.shape.depth - 1}")
        return self

    @classmethod
    def of_dense(cls, family: str, shape: Shape) -> Catalog:
        """The catalog of a stock checkpoint: everything, or nothing."""
        return cls(family=family, shape=shape, blocks=(Widths.only(shape.width),) * shape.depth)

    @cached_property
    def fingerprint(self) -> str:
        """Names the weights: equal for equal tensors, different otherwise."""
        joined = "\n".join(f"{name} {digest}" for name, digest in sorted(self.checksums.items()))
        return hashlib.sha256(joined.encode()).hexdigest()[:16]

    @cached_property
    def dense(self) -> Plan:
        """The plan that leaves everything in: the teacher."""
        return Plan.dense(self.fingerprint, self.shape.depth, self.shape.width)

    def _all_bands(self) -> Iterator[tuple[float, ...]]:
        for widths in (*self.blocks, *(student.widths for student in self.students)):
            for group in Width._fields:
                yield from (option.bands for option in widths.of(group)[1:])
        yield from (student.bands for student in self.students)
        yield from (run.bands for run in self.text_runs)

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

    def near(self, band: int) -> Catalog:
        """The same catalog with losses as they are in a band of the timestep: what a denoising step there goes by."""
        least = 1e-12

        def narrowed(widths: Widths) -> Widths:
            return Widths(
                **{
                    group: (
                        widths.of(group)[0],
                        *(option._replace(loss=max(option.bands[band], least)) for option in widths.of(group)[1:]),
                    )
                    for group in Width._fields
                }
            )

        def moved(each: Any) -> Any:
            widths = {"widths": narrowed(each.widths)} if isinstance(each, Student) else {}
            return each.model_copy(update={"loss": max(each.bands[band], least), **widths})

        return self.model_copy(
            update={
                "blocks": tuple(map(narrowed, self.blocks)),
                "students": tuple(map(moved, self.students)),
                "text_runs": tuple(map(moved, self.text_runs)),
            }
        )

    def student(self, interval: Interval) -> Student:
        """The student of an interval.

        Raises:
            ValueError: there is none.
        """
        for student in self.students:
            if student.interval == interval:
                return student
        have = ", ".join(str(student.interval) for student in self.students) or "none"
        raise ValueError(f"no student stands in for {interval}; there are: {have}")

    def text_run(self, interval: Interval) -> TextRun:
        """The text run over an interval.

        Raises:
            ValueError: there is none.
        """
        for run in self.text_runs:
            if run.interval == interval:
                return run
        have = ", ".join(str(run.interval) for run in self.text_runs) or "none"
        raise ValueError(f"the text stream cannot stand still over {interval}; it can over: {have}")

    def check(self, plan: Plan) -> Plan:
        """Return the plan if this checkpoint can run it.

        Raises:
            ValueError: the plan is for another checkpoint, or asks for what is not there.
        """
        if plan.checkpoint != self.fingerprint:
            raise ValueError(
                f"the plan was made for checkpoint {plan.checkpoint}, this is {self.fingerprint}: plan again"
            )
        if plan.depth != self.shape.depth:
            raise ValueError(f"the plan is for {plan.depth} blocks, the checkpoint has {self.shape.depth}")
        for step in plan.steps:
            if step.student:
                self.student(step.blocks)
            if not step.width.within(self.shape.width):
                raise ValueError(f"blocks {step.blocks} run {step.width}, the checkpoint holds {self.shape.width}")
            widths = self.widths(step)
            for group in MLPS:
                still = group == "text" and step.blocks.first in plan.still
                if getattr(step.width, group) == 0 and not widths.has(group, 0) and not still:
                    raise ValueError(f"blocks {step.blocks}: the checkpoint holds no linear map for the {group} MLP")
            if widths.rank < step.width.modulation < self.shape.width.modulation:
                raise ValueError(
                    f"blocks {step.blocks}: modulations come at full rank and up to {widths.rank}, "
                    f"not at {step.width.modulation}"
                )
        for run in plan.text_runs:
            self.text_run(run)
        return plan

    def ratio(self, plan: Plan) -> float:
        """Parameters of a plan over parameters of the dense model."""
        return self.shape.params(plan) / self.shape.dense_params

    def loss(self, plan: Plan) -> float:
        """Predicted loss: the sum of what each choice alone loses (NaN where the plan takes what was not measured)."""
        if plan.skipped:
            return math.nan
        total = 0.0
        total += sum(self.text_run(run).loss for run in plan.text_runs)
        for step in plan.steps:
            total += self.student(step.blocks).loss if step.student else 0.0
            widths = self.widths(step)
            for group, count in step.width._asdict().items():
                if group == "text" and step.blocks.first in plan.still:
                    continue
                total += {option.count: option.loss for option in widths.of(group)}.get(count, math.nan)
        return total

    def widths(self, step: Step) -> Widths:
        """Legal widths of what a step runs."""
        return self.student(step.blocks).widths if step.student else self.blocks[step.blocks.first]
