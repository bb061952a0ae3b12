"""Everything that decides a training run, in one frozen, validated noun; JSON both ways."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import torch
from pydantic import Field, PositiveFloat, PositiveInt, field_validator

from ppcl_rt.catalog import Start
from ppcl_rt.checkpoint import line
from ppcl_rt.plan import Frozen
from ppcl_rt.qwen_image import PPCLQwenImageTransformer2DModel
from ppcl_train import scenes
from ppcl_train.sampling import Sampler

_SCENES_ARCHITECTURE: dict[str, Any] = {
    "patch_size": scenes.CELL,
    "in_channels": scenes.CELL**2 * 3,
    "out_channels": 3,
    "num_layers": 12,
    "attention_head_dim": 16,
    "num_attention_heads": 6,
    "joint_attention_dim": scenes.EMBEDDING_DIM,
    "axes_dims_rope": [4, 6, 6],
}


class Phase(Frozen):
    """A stretch of the teacher's training.

    Attributes:
        until: the step that it ends before.
        horizon: the step at which the cosine would reach zero.
        shares: how often each kind of caption is drawn, in the order of `scenes.KINDS`; None for equally often.
        apart: whether the things of a relation are drawn in opposite halves (`scenes.render`).
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


class DataConfig(Frozen):
    """Where batches come from.

    Attributes:
        cache: a folder that ``ppcl train cache`` or ``generate`` filled; None makes scenes anew for every batch, which
            only the task scenes can.
    """

    cache: str | None = None


class TeacherConfig(Frozen):
    """The dense model: a pretrained one, or how it is trained from nothing.

    Attributes:
        pretrained: a transformer, or the pipeline that it is part of: a folder or a hub id. It is read where it lies,
            and nothing below is used but ``dtype`` and ``drop_caption``.
        dtype: what the teacher computes in.
        architecture: what diffusers' class takes.
        drop_caption: share of the captions that is left empty, in this training and in all later stages.
    """

    pretrained: str | None = None
    dtype: Literal["float32", "bfloat16"] = "float32"
    architecture: dict[str, Any] = Field(default_factory=lambda: dict(_SCENES_ARCHITECTURE))
    phases: tuple[Phase, ...] = (Phase(until=17_000, horizon=17_000),)
    batch: PositiveInt = 64
    muon_lr: PositiveFloat = 0.02
    adamw_lr: PositiveFloat = 2e-3
    warmup: int = 200
    ema: float = Field(0.998, ge=0, lt=1)
    # The loss on x_0 is divided by max(t, time_floor)^2, which makes it the velocity's above the floor.
    time_floor: PositiveFloat = 0.4
    drop_caption: float = Field(0.1, ge=0, lt=1)
    compile: bool = True
    judge_every: PositiveInt = 2000
    judge_per_kind: PositiveInt = 50

    @field_validator("architecture")
    @classmethod
    def _builds(cls, architecture: dict[str, Any]) -> dict[str, Any]:
        try:
            with torch.device("meta"):
                model = PPCLQwenImageTransformer2DModel(**architecture)
        except (TypeError, ValueError, RuntimeError, ZeroDivisionError) as error:
            raise ValueError(f"this architecture cannot be built: {line(error)}") from None
        if model.config.num_layers < 2:
            raise ValueError("compressing takes a num_layers of 2 or more")
        return architecture

    @field_validator("phases")
    @classmethod
    def _rising(cls, phases: tuple[Phase, ...]) -> tuple[Phase, ...]:
        ends = [phase.until for phase in phases]
        if not ends or ends != sorted(set(ends)) or any(phase.horizon < phase.until for phase in phases):
            raise ValueError(f"phases end one after the other and no later than their horizons, not at {ends}")
        return phases

    @property
    def steps(self) -> int:
        """Steps in all."""
        return self.phases[-1].until

    def phase(self, step: int) -> Phase:
        """The phase that a step is in."""
        return next(phase for phase in self.phases if step < phase.until)


class ProbesConfig(Frozen):
    """Linear probes and the intervals found with them (PPCL eq. 1-5)."""

    samples: PositiveInt = 4096
    # Samples whose states are held in memory for CKA.
    cka_samples: PositiveInt = 512
    # Share of the Gram matrix's mean diagonal that is added to it.
    ridge: PositiveFloat = 1e-4


class StudentsConfig(Frozen):
    """Non-sequential depth distillation (PPCL eq. 6).

    Attributes:
        lengths: every interval of these lengths gets a student too, beside those that eq. 5 finds.
        start: the teacher block that a student is copied from; the paper's is the first.
        magnitude: weight of the relative squared error that is added to eq. 6, which sees direction alone.
    """

    lengths: tuple[PositiveInt, ...] = ()
    start: Start = "first"
    steps: PositiveInt = 400
    batch: PositiveInt = 64
    lr: PositiveFloat = 1e-3
    weight_decay: float = Field(0.02, ge=0)
    warmup: int = 20
    magnitude: float = Field(0.0, ge=0)


Share = Annotated[float, Field(gt=0, lt=1)]


class WidthConfig(Frozen):
    """Narrower blocks in closed form.

    Attributes:
        heads: legal shares of the heads.
        channels: legal shares of the channels of each MLP.
        maps: whether a linear map may stand in for an MLP (PPCL eq. 9).
        ranks: legal ranks of modulations, beside the full one.
        samples: calibration inputs.
        ridge: share of the mean variance that is added to each input's.
        blocks_at_once: blocks whose Gram matrices are in memory together; more take another pass of the teacher.
    """

    heads: tuple[Share, ...] = (0.84, 0.67, 0.5)
    channels: tuple[Share, ...] = (0.75, 0.5, 0.375, 0.25, 0.125)
    maps: bool = True
    ranks: tuple[PositiveInt, ...] = (16, 8, 4)
    samples: PositiveInt = 4096
    ridge: PositiveFloat = 1e-4
    blocks_at_once: PositiveInt = 64


class RecoverConfig(Frozen):
    """End to end on the teacher's prediction, under plans drawn anew at every step.

    Attributes:
        steps: for students and all that only narrower plans run (compensated layers, maps, factors).
        kept_steps: after them, for the teacher's own blocks as well, the dense plan among the plans. More than 0 gives
            up that ratio 1 is the teacher.
        planned: share of the steps whose plan is one that the planner would take; the others draw theirs at random.
    """

    steps: int = Field(0, ge=0)
    kept_steps: int = Field(0, ge=0)
    batch: PositiveInt = 64
    lr: PositiveFloat = 5e-4
    weight_decay: float = Field(0.0, ge=0)
    warmup: int = 20
    planned: float = Field(0.7, ge=0, le=1)


class MeasureConfig(Frozen):
    """Sensitivities: the loss of the teacher's velocity with one thing changed."""

    samples: PositiveInt = 256


class RunConfig(Frozen):
    """One training run.

    Attributes:
        task: the model family, and how results are judged; only scenes have a judge.
        storage: dtype of the checkpoint; the teacher is rounded to it before anything else is made from it.
        sampler: how the checkpoint is sampled and judged.
        batch: samples that pass through the teacher at once where nothing is trained.
    """

    task: Literal["scenes", "qwen-image"] = "scenes"
    seed: int = Field(0, ge=0)
    # t = sigmoid(mean + std * normal), t = 1 is noise.
    time_mean: float = 0.4
    time_std: PositiveFloat = 1.2
    storage: Literal["float32", "float16", "bfloat16"] = "float16"
    batch: PositiveInt = 128
    save_every: PositiveInt = 500
    data: DataConfig = DataConfig()
    teacher: TeacherConfig = TeacherConfig()
    probes: ProbesConfig = ProbesConfig()
    students: StudentsConfig = StudentsConfig()
    width: WidthConfig = WidthConfig()
    recover: RecoverConfig = RecoverConfig()
    measure: MeasureConfig = MeasureConfig()
    sampler: Sampler = Sampler()


PRESETS = {
    "scenes": RunConfig(
        teacher=TeacherConfig(
            phases=(
                Phase(until=10_500, horizon=17_000, apart=False),
                # At step 10,000 relations were right half as often as single objects, which were perfect.
                Phase(until=17_000, horizon=20_500, shares=(0.06, 0.16, 0.22, 0.38, 0.18), apart=False),
                # At 17,000 one relation in five had the right things on the wrong sides, of seen captions as of unseen.
                Phase(until=24_000, horizon=24_000, shares=(0.06, 0.22, 0.28, 0.22, 0.22)),
            ),
        ),
        students=StudentsConfig(lengths=(2, 3), start="last", magnitude=1.0),
        recover=RecoverConfig(steps=1500),
        sampler=Sampler(steps=20, shift=2.0, guidance=1.3),
    ),
    # The paper's settings where it states them: 6k steps of depth, 2k of width, 1k of fine-tuning, on 100k captioned
    # images that are cached first. One step sees 8 samples of 1024 x 1024, 4,096 image tokens each.
    "qwen-image": RunConfig(
        task="qwen-image",
        # The published scheduler shifts 1024 x 1024 by exp(0.69), which moves a logit-normal's mean by 0.69: training
        # sees the noise that sampling does.
        time_mean=0.69,
        time_std=1.0,
        storage="bfloat16",
        batch=8,
        # 41 GB of teacher in bfloat16; guidance calls it without a caption too.
        teacher=TeacherConfig(pretrained="Qwen/Qwen-Image", dtype="bfloat16", drop_caption=0.1),
        # Gram matrices take 75 MB a block and stream whatever the number of samples; states for CKA take 3 GB a sample
        # (61 x 4,096 tokens x 3,072, float32).
        probes=ProbesConfig(samples=1024, cka_samples=8),
        # The paper copies a student from the interval's first block and sees direction alone (magnitude 0); measured on
        # scenes, both are worse than this.
        students=StudentsConfig(lengths=(2, 3), start="last", magnitude=1.0, steps=6000, batch=8, lr=1e-4, warmup=100),
        recover=RecoverConfig(steps=2000, kept_steps=1000, batch=8, lr=1e-5, weight_decay=0.02, warmup=50),
        # A Gram matrix of 12,288 channels in float64 takes 1.2 GB, a block has two: few blocks at once, several passes.
        width=WidthConfig(heads=(20 / 24, 16 / 24, 12 / 24), ranks=(256, 64, 16), samples=512, blocks_at_once=8),
        measure=MeasureConfig(samples=64),
    ),
}


def with_changes(config: RunConfig, changes: dict[str, Any]) -> RunConfig:
    """Replace values by dotted name: ``{"students.steps": 100}``.

    Raises:
        ValueError: no such name, or a value that it cannot take.
    """
    content = config.model_dump()
    for name, value in changes.items():
        *path, last = name.split(".")
        place = content
        for part in path:
            place = place.get(part, {}) if isinstance(place, dict) else {}
        if not isinstance(place, dict) or last not in place:
            raise ValueError(f'there is no setting "{name}"; see `ppcl train config`')
        place[last] = value
    return RunConfig.model_validate(content)
