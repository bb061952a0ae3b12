"""Settings of the stages after the teacher, and of the comparison with other methods."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, PositiveFloat, PositiveInt, field_validator, model_validator

from ppcl_rt.planning.frozen import Frozen
from ppcl_rt.planning.legal import Start

# A share of the units of a group.
Share = Annotated[float, Field(gt=0, lt=1)]


class LoopConfig(Frozen):
    """How a stage trains (`loop.train_loop`).

    Attributes:
        batch: samples of a forward, over all processes; ``batch * accumulate`` samples make a step.
        lr: peak learning rate of AdamW: ``warmup`` steps up, then half a cosine down to zero.
        weight_decay: of matrices; biases and norms do not decay.
        accumulate: batches whose gradients are averaged for a step.
        ema: what moving averages of the weights keep at a step; the averages are then the result. 0 for none.
        clip: largest norm of a gradient, of each student by itself; 0 for no limit.
        precision: ``bf16`` computes under autocast; the weights that are trained stay in float32. The teacher of the
            students is then cast to bfloat16.
        eight_bit: whether AdamW keeps its moments in 8 bits; needs bitsandbytes.
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
    """The selector eq. 5: linear probes and the intervals found with them (PPCL eq. 1-5).

    Attributes:
        samples: samples of the least-squares fit (eq. 1).
        ridge: share of the Gram matrix's mean diagonal that is added to the diagonal.
        steps: steps of Adam on eq. 2, from the least-squares solution.
        at_once: blocks whose probes are fitted and tuned together; others follow, with passes of the teacher of their
            own. Each holds 0.6 GB at width 3,072.
        cka_samples: samples that CKA is computed from (eq. 3).
        cka_tokens: most tokens of a stream that CKA is computed from, spread evenly; they are held in memory.
    """

    samples: PositiveInt = 4096
    ridge: PositiveFloat = 1e-4
    steps: int = Field(100, ge=0)
    lr: PositiveFloat = 1e-4
    warmup: int = Field(10, ge=0)
    at_once: PositiveInt = 64
    cka_samples: PositiveInt = 512
    cka_tokens: PositiveInt = 8192


class TableConfig(Frozen):
    """The selector cost table: a short distillation of every interval of some lengths.

    Attributes:
        lengths: lengths of the intervals that are candidates.
        starts: blocks of an interval that its student may be copied from.
        trial_steps: steps that every start is trained for; the start that then loses least is trained on to ``steps``.
        batches: batches that are traced once, kept, and trained on in turn.
        samples: samples that costs are measured on, as in `MeasureConfig`.
        bands: equal bands of the timestep that each cost is split into.
        ratio_step: the planner is asked at every multiple of this ratio, down to the smallest plan.
        least_ratio: the planner is not asked below this ratio: students that only tiny plans use need no training.
        most_students: at most so many students are trained, those that most of the planner's plans take; None for all
            that some plan takes.
        depth_first: choose students as if all blocks ran whole, as the paper prunes depth before width. Else narrower
            blocks compete with students by losses from before training, which width loses less of.
    """

    lengths: tuple[Annotated[int, Field(ge=2)], ...] = (2, 3, 4, 5, 6)
    starts: tuple[Start, ...] = ("first", "middle", "last", "average")
    trial_steps: PositiveInt = 20
    steps: PositiveInt = 50
    batches: PositiveInt = 25
    batch: PositiveInt = 64
    lr: PositiveFloat = 4e-3
    warmup: int = 5
    samples: PositiveInt = 200
    bands: PositiveInt = 4
    ratio_step: float = Field(0.02, gt=0, lt=1)
    least_ratio: float = Field(0.0, ge=0, lt=1)
    most_students: int | None = Field(None, ge=0)
    depth_first: bool = False

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
        magnitude: weight of the relative squared error that is added to eq. 6, which compares directions alone; the
            selector eq. 5 adds none.
        parallel: what several processes share: the samples of a batch, with averaged gradients ("data"), or the
            students, each trained by one process on whole batches, with nothing to exchange ("intervals").
        at_once: students that are trained together; others follow, with passes of the teacher of their own. Each holds
            its weights and moments in memory: 4.1 GB for 340 million parameters.
        shard_teacher: spread the teacher's weights over all processes (FSDP2).
        checkpointing: compute a student's activations again for the backward pass instead of keeping them.
        cache_bytes: bytes on disk for the teacher's streams, in bfloat16; training then goes over and over the
            batches that fit. 0: every step sees a new batch.
    """

    steps: PositiveInt = 400
    magnitude: float = Field(0.0, ge=0)
    parallel: Literal["data", "intervals"] = "data"
    at_once: PositiveInt = 64
    shard_teacher: bool = False
    checkpointing: bool = False
    cache_bytes: int = Field(0, ge=0)


class WidthConfig(Frozen):
    """Narrower blocks in closed form.

    Attributes:
        heads: legal shares of the heads.
        channels: legal shares of the channels of each MLP.
        maps: whether a linear map may stand in for an MLP (PPCL eq. 9).
        ranks: legal ranks of modulations, besides the full one.
        longest_text_run: blocks of the longest text run (PPCL eq. 8); 1 for none.
        samples: calibration samples.
        ridge: share of the mean variance that is added to the variance of each input.
        blocks_at_once: blocks whose Gram matrices are in memory together, and first blocks of text runs whose
            regressions are; the next ones take another pass of the teacher.
        kept_bytes: the most bytes on disk, a process, for the streams that enter the block which the next pass begins
            with; 0, or too few, and each pass begins at the first block.
    """

    heads: tuple[Share, ...] = (0.84, 0.67, 0.5)
    channels: tuple[Share, ...] = (0.75, 0.5, 0.375, 0.25, 0.125)
    maps: bool = True
    ranks: tuple[PositiveInt, ...] = (16, 8, 4)
    longest_text_run: PositiveInt = 6
    samples: PositiveInt = 4096
    ridge: PositiveFloat = 1e-4
    blocks_at_once: PositiveInt = 64
    kept_bytes: int = Field(40_000_000_000, ge=0)

    @property
    def is_empty(self) -> bool:
        """Whether blocks run at full width alone: there is nothing to solve for."""
        return not (self.heads or self.channels or self.maps or self.ranks) and self.longest_text_run == 1


class EndToEndConfig(LoopConfig):
    """Training end to end on the teacher's prediction, under a plan drawn anew at every step.

    Attributes:
        steps: steps for students and all that only narrower plans run (compensated layers, maps, factors).
        kept_steps: further steps for the teacher's own blocks as well, with the dense plan among the plans. With more
            than 0, ratio 1 is no longer the teacher.
        planned: share of the steps whose plan is one of the planner's; the other steps draw a random plan.
        smallest: share of the steps whose plan is the smallest of the planner's (the sandwich rule).
        spacing: between the ratios that the planner makes plans for.
        other_spacing: likewise, between shares of the dense parameters alone, and of the dense FLOPs alone.
        least_ratio, most_ratio: plans of the planner outside of these ratios are not trained: tiny plans pull at the
            weights that all other plans share, and large ones lose next to nothing.
        towards_small: a plan at ratio r is drawn in proportion to ``r ** -towards_small``.
        flow_matching: weight of the error against the data themselves, next to that against the teacher; the paper
            fine-tunes on both.
        shard: spread weights, gradients and moments over all processes (FSDP2), so that each holds its share; on
            several nodes every node holds the whole (`engine.sharding`).
        checkpointing: keep the streams between blocks alone for the backward pass, which runs each block again.
        neighbours: legal counts that are trained and kept on either side of one that a plan takes; what no plan takes
            is left out before training.
        muon_lr: peak learning rate of Muon for the matrices of students that are stored whole, and of the teacher's
            blocks where they are trained, but for modulations; AdamW trains all else. 0: AdamW trains everything.
    """

    steps: int = Field(0, ge=0)
    kept_steps: int = Field(0, ge=0)
    lr: PositiveFloat = 5e-4
    # Training starts from what is good already: nothing should pull it towards zero.
    weight_decay: float = Field(0.0, ge=0)
    planned: float = Field(0.85, ge=0, le=1)
    smallest: float = Field(0.15, ge=0, le=1)
    spacing: float = Field(0.02, gt=0, lt=1)
    other_spacing: float = Field(0.08, gt=0, lt=1)
    least_ratio: float = Field(0.0, ge=0, lt=1)
    most_ratio: float = Field(1.0, gt=0, le=1)
    towards_small: float = Field(0.0, ge=0)
    shard: bool = False
    checkpointing: bool = False
    flow_matching: float = Field(0.0, ge=0)
    neighbours: int = Field(1, ge=0)
    muon_lr: float = Field(0.0, ge=0)

    @property
    def all_steps(self) -> int:
        """Steps without the teacher's own blocks, and with them."""
        return self.steps + self.kept_steps

    @model_validator(mode="after")
    def _shards_of_whole_moments(self) -> EndToEndConfig:
        if self.shard and self.eight_bit:
            raise ValueError("shard and eight_bit do not go together: moments of 8 bits are not divided; leave one out")
        if self.shard and self.muon_lr:
            raise ValueError("shard and muon_lr do not go together: Muon needs whole matrices; leave one out")
        return self


class RecoverConfig(EndToEndConfig):
    """Recovery: training end to end from closed forms and distilled students."""


class RefineConfig(EndToEndConfig):
    """Refinement: the same once more, under the plans that will answer budgets.

    After recovery other plans are the best. They are found as for the checkpoint: by sketches of what the recovered
    choices change, for ratios, parameters and FLOPs. 0 steps leave the stage out.
    """

    towards_small: float = Field(1.0, ge=0)


class CompressConfig(Frozen):
    """How layers are stored as differences of low rank.

    Attributes:
        share: of the squared output error that a choice makes: the most that truncating its layers adds to each. 0
            stores everything whole.
        student_share: of what training changed in a student's layer: the most that truncation takes back, as squared
            output.
        most_rank: the largest rank, whatever error that leaves to recovery: it bounds what recovery holds. None for
            any.
    """

    share: float = Field(0.05, ge=0, lt=1)
    student_share: float = Field(0.01, gt=0, lt=1)
    most_rank: PositiveInt | None = None


class MeasureConfig(Frozen):
    """Losses of choices: the velocity error of the teacher with one thing changed, in equal bands of the timestep.

    Attributes:
        samples: spread evenly over the timesteps of the sampler. With a guidance, each is two in a forward.
        bands: equal bands of the timestep that losses and sketches are divided into.
        spacing: between the ratios whose plans are measured as a whole.
        other_spacing: likewise, between shares of the dense parameters alone, and of the dense FLOPs alone.
        candidates: the most plans that are measured for one budget; the best of them stays.
    """

    samples: PositiveInt = 200
    bands: PositiveInt = 4
    spacing: float = Field(0.01, gt=0, lt=1)
    other_spacing: float = Field(0.04, gt=0, lt=1)
    candidates: PositiveInt = 3


class PicturesConfig(Frozen):
    """The grid that a run ends with: fixed prompts, drawn by the teacher and at several ratios from the same noise.

    Attributes:
        pipeline: the folder or hub id whose text encoder and VAE are used; None: the pretrained teacher's, if that is a
            whole pipeline. Scenes need none.
        prompts: a row each.
        ratios: a column each; below the smallest plan, the smallest. Empty: the grid is left out.
    """

    pipeline: str | None = None
    prompts: Annotated[tuple[str, ...], Field(min_length=1)] = (
        "a portrait of an old fisherman in soft window light",
        "a red bicycle leaning on a blue wooden door",
        "three green apples and two yellow pears on a white plate",
        'a shop sign that says "OPEN ALL NIGHT", in neon letters',
        "a lighthouse on a cliff above a stormy sea, oil painting",
        "an aerial view of a winding river through an autumn forest",
    )
    ratios: tuple[Share, ...] = (0.8, 0.65, 0.5, 0.35)


class CompareConfig(LoopConfig):
    """How other methods are trained and judged, all in the same way (`ppcl_train.compare.harness`).

    The settings of `LoopConfig` are those of the end-to-end stage; stages before it follow `StudentsConfig`.

    Attributes:
        steps: training steps of every method for a ratio, over all its stages.
        ratios: parameters kept, over those of the teacher.
        slack: how far a model of whole blocks may exceed a ratio, so that it does not miss the ratio by almost a block.
        distil: share of the steps before the end-to-end stage, for methods with two stages.
        rank: rank of the adapters that stand in for later training while layer gates are learnt.
        gate_lr: learning rate of the gates' logits.
        muon_lr: peak learning rate of Muon for the matrices of blocks in the end-to-end stage; 0: AdamW trains all.
        prompts: unseen prompts, equally many of each kind; the same prompts and the same noise for all methods.
        seeds: training seeds of ours and of the selector eq. 5; the other methods get the first seed.
    """

    steps: PositiveInt = 1500
    lr: PositiveFloat = 5e-4
    ratios: tuple[Share, ...] = (0.7, 0.5, 0.35)
    slack: float = Field(0.01, ge=0)
    distil: Share = 0.25
    rank: PositiveInt = 8
    gate_lr: PositiveFloat = 0.05
    muon_lr: float = Field(0.0, ge=0)
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
