"""Settings of the teacher."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, PositiveFloat, PositiveInt, field_validator

from ppcl_rt.planning.frozen import Frozen


class Phase(Frozen):
    """A stretch of the teacher's training.

    Attributes:
        until: the first step after the phase.
        horizon: the step at which the cosine would reach zero.
        shares: how often each kind of caption is drawn, in the order of `language.KINDS`; None for equally often.
        apart: whether the two things of a relation are drawn in opposite halves of the image (`rendering.render`).
    """

    until: PositiveInt
    horizon: PositiveInt
    shares: tuple[float, float, float, float, float] | None = None
    apart: bool = True

    @field_validator("shares")
    @classmethod
    def _sum_to_one(cls, shares: tuple[float, ...] | None) -> tuple[float, ...] | None:
        if shares is not None and (min(shares) < 0 or abs(sum(shares) - 1) > 1e-6):
            raise ValueError(f"shares are 0 or more and sum to 1, not {shares}")
        return shares


class TeacherConfig(Frozen):
    """The dense model: a pretrained one, or how it is trained from nothing.

    Attributes:
        pretrained: a transformer, or the pipeline that holds it: a folder or a hub id. It is read from there and not
            copied; of the settings below, ``dtype``, ``drop_caption``, ``quantize`` and ``offload`` are then used.
        dtype: what the teacher computes in.
        architecture: the arguments of the family's model class, for a teacher that is trained from nothing.
        drop_caption: share of the captions that is replaced by the empty prompt, in this stage and in all later ones.
        quantize: how the weights of its blocks are held where it is only read, by the selector eq. 5 and while students
            learn: ``int8`` halves what 16 bits take. Students begin as copies of the exact blocks all the same. All
            else takes the exact weights.
        offload: whether its blocks lie in the memory of the host there, each on the device only while it runs.
    """

    pretrained: str | None = None
    dtype: Literal["float32", "bfloat16"] = "float32"
    architecture: dict[str, Any] = Field(default_factory=dict)
    phases: tuple[Phase, ...] = (Phase(until=17_000, horizon=17_000),)
    batch: PositiveInt = 64
    muon_lr: PositiveFloat = 0.02
    adamw_lr: PositiveFloat = 2e-3
    warmup: int = 200
    ema: float = Field(0.998, ge=0, lt=1)
    # The loss on x_0 is divided by max(t, time_floor)^2: above the floor, that is the loss on the velocity.
    time_floor: PositiveFloat = 0.4
    drop_caption: float = Field(0.1, ge=0, lt=1)
    quantize: Literal["none", "int8"] = "none"
    offload: bool = False
    compile: bool = True
    judge_every: PositiveInt = 2000
    judge_prompts: PositiveInt = 250

    @field_validator("phases")
    @classmethod
    def _rising(cls, phases: tuple[Phase, ...]) -> tuple[Phase, ...]:
        ends = [phase.until for phase in phases]
        if not ends or ends != sorted(set(ends)) or any(phase.horizon < phase.until for phase in phases):
            raise ValueError(f"phases end one after the other and no later than their horizons, not at {ends}")
        return phases

    @property
    def held_otherwise(self) -> bool:
        """Whether stages that only read the teacher hold it otherwise than those that need its exact weights."""
        return self.quantize != "none" or self.offload

    @property
    def steps(self) -> int:
        """Steps of all phases."""
        return self.phases[-1].until

    def phase(self, step: int) -> Phase:
        """Return the phase that a step belongs to; after the last step, the last phase."""
        return next((phase for phase in self.phases if step < phase.until), self.phases[-1])
