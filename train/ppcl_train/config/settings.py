"""Everything that decides a training run, in one frozen, validated noun; JSON both ways."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import torch
from pydantic import Field, PositiveFloat, PositiveInt, field_validator, model_validator

from ppcl_rt.files import one_line as line
from ppcl_rt.families.qwen_image import PPCLQwenImageTransformer2DModel
from ppcl_rt.planning.legal import Start
from ppcl_rt.planning.frozen import Frozen
from ppcl_train.scenes import scenes
from ppcl_train.scenes.sampling import Sampler

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


class LoopConfig(Frozen):
    """How a stage trains (`loop.train_loop`).

    Attributes:
        batch: samples of a forward, over all processes; ``batch * accumulate`` make a step.
        lr: peak learning rate of AdamW; half a cosine down to zero follows ``warmup`` steps up.
        weight_decay: of matrices; biases and norms do not decay.
        accumulate: batches whose gradients are averaged for a step.
        ema: share that moving averages of the weights keep at a step, and what is trained is these; 0 for none.
        clip: largest norm of a gradient, of each student by itself; 0 for no limit.
        precision: ``bf16`` computes under autocast; what is trained stays float32. The students' teacher is bfloat16.
        eight_bit: whether AdamW keeps its moments in 8 bits; takes bitsandbytes.
    """

    steps: int = Field(400, ge=0)
    batch: PositiveInt = 64
    lr: PositiveFloat = 1e-3
    weight_decay: float = Field(0.02, ge=0)
    warmup: int = Field(20, ge=0)
    accumulate: PositiveInt = 1
    ema: float = Field(0.0, ge=0, lt=1)
    clip: float = Field(0.0, ge=0)
    precision: Literal["no", "bf16"] = "no"
    eight_bit: bool = False


class ProbesConfig(LoopConfig):
    """Reference mode: linear probes and the intervals found with them (PPCL eq. 1-5).

    Attributes:
        samples: that least squares sees (eq. 1).
        ridge: share of the Gram matrix's mean diagonal that is added to it.
        steps: of Adam on eq. 2, from the least-squares solution.
        cka_samples: that CKA is taken over (eq. 3).
        cka_tokens: most tokens of a stream that it is taken over, thinned evenly; their states are held in memory.
    """

    samples: PositiveInt = 4096
    ridge: PositiveFloat = 1e-4
    steps: int = Field(100, ge=0)
    lr: PositiveFloat = 1e-4
    warmup: int = Field(10, ge=0)
    cka_samples: PositiveInt = 512
    cka_tokens: PositiveInt = 8192


class TableConfig(Frozen):
    """The cost table: a short distillation of every interval of some lengths.

    Attributes:
        lengths: of the intervals that are candidates.
        starts: blocks of an interval that its student may be copied from.
        trial_steps: steps that every start is given; the one that then loses least is trained on to ``steps``.
        batches: that are traced once, held, and seen in turn.
        samples: that costs are measured on.
        bands: equal bands of the timestep that each cost is divided into.
        ratio_step: the planner is asked at every multiple of it, down to the smallest plan.
        least_ratio: it is not asked below this: students that only tiny plans take need not be trained.
    """

    lengths: tuple[Annotated[int, Field(ge=2)], ...] = (2, 3, 4, 5, 6)
    starts: tuple[Start, ...] = ("first", "middle", "last", "average")
    trial_steps: PositiveInt = 20
    steps: PositiveInt = 50
    batches: PositiveInt = 25
    batch: PositiveInt = 64
    lr: PositiveFloat = 4e-3
    warmup: int = 5
    samples: PositiveInt = 256
    bands: PositiveInt = 4
    ratio_step: float = Field(0.02, gt=0, lt=1)
    least_ratio: float = Field(0.0, ge=0, lt=1)

    @field_validator("lengths", "starts")
    @classmethod
    def _some(cls, values: tuple[Any, ...]) -> tuple[Any, ...]:
        if not values or len(set(values)) != len(values):
            raise ValueError(f"name at least one, each once, not {list(values)}")
        return values

    @model_validator(mode="after")
    def _trial_is_a_part(self) -> TableConfig:
        if self.trial_steps > self.steps:
            raise ValueError(f"a trial of {self.trial_steps} steps is longer than all {self.steps}: lower trial_steps")
        return self


class StudentsConfig(LoopConfig):
    """Non-sequential depth distillation (PPCL eq. 6).

    Attributes:
        magnitude: weight of the relative squared error that is added to eq. 6, which sees direction alone; reference
            mode adds none.
        parallel: what several processes share: the samples of a batch, with gradients averaged ("data"), or the
            students, each trained by one process on whole batches, with nothing to exchange ("intervals").
        shard_teacher: spread the teacher's weights over all processes (FSDP2).
        checkpointing: compute a student's activations again for the backward pass instead of keeping them.
        cache_bytes: bytes on disk for the teacher's streams, in bfloat16; training then goes round and round the
            batches that fit. 0: every step sees a new batch.
    """

    steps: PositiveInt = 400
    magnitude: float = Field(0.0, ge=0)
    parallel: Literal["data", "intervals"] = "data"
    shard_teacher: bool = False
    checkpointing: bool = False
    cache_bytes: int = Field(0, ge=0)


Share = Annotated[float, Field(gt=0, lt=1)]


class WidthConfig(Frozen):
    """Narrower blocks in closed form.

    Attributes:
        heads: legal shares of the heads.
        channels: legal shares of the channels of each MLP.
        maps: whether a linear map may stand in for an MLP (PPCL eq. 9).
        ranks: legal ranks of modulations, beside the full one.
        longest_text_run: blocks of the longest run over which the text stream may stand still (PPCL eq. 8); 1 for none.
        samples: calibration inputs.
        ridge: share of the mean variance that is added to each input's.
        blocks_at_once: blocks whose Gram matrices are in memory together; more take another pass of the teacher.
    """

    heads: tuple[Share, ...] = (0.84, 0.67, 0.5)
    channels: tuple[Share, ...] = (0.75, 0.5, 0.375, 0.25, 0.125)
    maps: bool = True
    ranks: tuple[PositiveInt, ...] = (16, 8, 4)
    longest_text_run: PositiveInt = 6
    samples: PositiveInt = 4096
    ridge: PositiveFloat = 1e-4
    blocks_at_once: PositiveInt = 64


class RecoverConfig(LoopConfig):
    """End to end on the teacher's prediction, under plans drawn anew at every step.

    Attributes:
        steps: for students and all that only narrower plans run (compensated layers, maps, factors).
        kept_steps: after them, for the teacher's own blocks as well, the dense plan among the plans. More than 0 gives
            up that ratio 1 is the teacher.
        least_ratio: no plan of the planner's below this ratio is trained: tiny plans pull at what all others share.
        planned: share of the steps whose plan is one that the planner would take; the others draw theirs at random.
    """

    steps: int = Field(0, ge=0)
    kept_steps: int = Field(0, ge=0)
    lr: PositiveFloat = 5e-4
    # Closed forms are where training starts: nothing pulls them towards zero.
    weight_decay: float = Field(0.0, ge=0)
    planned: float = Field(0.85, ge=0, le=1)
    least_ratio: float = Field(0.0, ge=0, lt=1)


class MeasureConfig(Frozen):
    """Sensitivities: the loss of the teacher's velocity with one thing changed, in equal bands of the timestep."""

    samples: PositiveInt = 256
    bands: PositiveInt = 4


class CompareConfig(LoopConfig):
    """How the baselines are made and judged, all in the same way (`ppcl_train.compare.harness`).

    The loop's settings are those of the end-to-end stage; stages before it follow `StudentsConfig`.

    Attributes:
        steps: training steps of every method for a ratio, of all its stages together.
        ratios: parameters kept, over those of the teacher.
        slack: what a model of whole blocks may have beyond a ratio, so that it is not almost a block short of it.
        distil: share of the steps before the end-to-end stage, for methods with two stages.
        rank: of the adapters that stand in for later training while layer gates are learnt.
        gate_lr: learning rate of the gates' logits.
        prompts: unseen prompts, equally many of each kind; the same for all, from the same noise.
        seeds: training seeds of ours and of the eq. 5 reference; the other methods get the first one.
    """

    steps: PositiveInt = 1500
    lr: PositiveFloat = 5e-4
    ratios: tuple[Share, ...] = (0.7, 0.5, 0.35)
    slack: float = Field(0.01, ge=0)
    distil: Share = 0.25
    rank: PositiveInt = 8
    gate_lr: PositiveFloat = 0.05
    prompts: PositiveInt = 1000
    judge_seed: int = Field(1, ge=0)
    seeds: PositiveInt = 3

    @field_validator("ratios")
    @classmethod
    def _distinct(cls, ratios: tuple[float, ...]) -> tuple[float, ...]:
        if not ratios or len(set(ratios)) != len(ratios):
            raise ValueError(f"one ratio or more, each once, not {ratios}")
        return ratios

    @property
    def distil_steps(self) -> int:
        """Steps before the end-to-end stage."""
        return round(self.distil * self.steps)


class RunConfig(Frozen):
    """One training run.

    Attributes:
        task: the model family, and how results are judged; only scenes have a judge.
        select: how intervals are chosen: a table of measured costs and the exact planner, or eq. 5 as in the paper.
        storage: dtype of the checkpoint; the teacher is rounded to it before anything else is made from it.
        sampler: how the checkpoint is sampled and judged.
        batch: samples that pass through the teacher at once where nothing is trained.
        save_every: steps between saves of a stage's state.
        tracker: what of accelerate's draws the curves; tensorboard's lie in the run folder, in ``tracking/``.
    """

    task: Literal["scenes", "qwen-image"] = "scenes"
    select: Literal["table", "eq5"] = "table"
    seed: int = Field(0, ge=0)
    # t = sigmoid(mean + std * normal), t = 1 is noise.
    time_mean: float = 0.4
    time_std: PositiveFloat = 1.2
    storage: Literal["float32", "float16", "bfloat16"] = "float16"
    batch: PositiveInt = 128
    save_every: PositiveInt = 500
    tracker: Literal[
        "none", "tensorboard", "wandb", "mlflow", "trackio", "aim", "comet_ml", "clearml", "dvclive", "swanlab"
    ] = "tensorboard"
    data: DataConfig = DataConfig()
    teacher: TeacherConfig = TeacherConfig()
    probes: ProbesConfig = ProbesConfig()
    table: TableConfig = TableConfig()
    students: StudentsConfig = StudentsConfig()
    width: WidthConfig = WidthConfig()
    recover: RecoverConfig = RecoverConfig()
    measure: MeasureConfig = MeasureConfig()
    compare: CompareConfig = CompareConfig()
    sampler: Sampler = Sampler()

    @model_validator(mode="after")
    def _computes(self) -> RunConfig:
        if self.teacher.dtype != "float32":
            for name in ("probes", "students", "recover"):
                if getattr(self, name).precision != "bf16":
                    raise ValueError(f"a teacher in {self.teacher.dtype} wants {name}.precision=bf16, not no")
        return self

    @property
    def magnitude(self) -> float:
        """Weight of the magnitude term beside eq. 6: the reference is eq. 6 as it stands in the paper."""
        return 0.0 if self.select == "eq5" else self.students.magnitude


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
        table=TableConfig(least_ratio=0.3),
        students=StudentsConfig(magnitude=1.0),
        # On 200 prompts, 800 steps at twice the rate with plans down to 0.06 cost large plans up to 0.6 points soft.
        recover=RecoverConfig(steps=1500, lr=2.5e-4, ema=0.99, least_ratio=0.15),
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
        # Gram matrices take 75 MB a block and stream, whatever the number of samples.
        probes=ProbesConfig(samples=1024, batch=8, precision="bf16"),
        # A sample's states take 1.6 GB in bfloat16 (61 x 4,200 tokens x 3,072); 16 are held.
        table=TableConfig(batches=4, batch=4, samples=16, lr=4e-4, least_ratio=0.35),
        # AdamW (0.9, 0.95) as everywhere. The paper sees direction alone (magnitude 0), as select = "eq5" does.
        students=StudentsConfig(steps=6000, batch=8, lr=1e-4, warmup=100, precision="bf16", magnitude=1.0),
        # The paper's 2,000 steps of width and 1,000 of fine-tuning, both end to end here; what it tunes in the kept
        # blocks (`kept_steps`) is left as it is, so that ratio 1 stays the stock model.
        recover=RecoverConfig(steps=3000, batch=8, lr=1e-5, weight_decay=0.02, warmup=50, precision="bf16"),
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
