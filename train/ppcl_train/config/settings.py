"""Everything that decides a training run, in one frozen, validated noun; JSON both ways."""

from __future__ import annotations

from typing import Any, Literal

import torch
from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, field_validator, model_validator

from ppcl_rt.files import one_line
from ppcl_rt.planning.catalog import LONGEST_LICENSE, LONGEST_MODEL
from ppcl_rt.planning.frozen import Frozen
from ppcl_train.config.stages import (
    CompareConfig,
    CompressConfig,
    MeasureConfig,
    PicturesConfig,
    ProbesConfig,
    RecoverConfig,
    RefineConfig,
    StudentsConfig,
    TableConfig,
    WidthConfig,
)
from ppcl_train.config.teacher import TeacherConfig
from ppcl_train.families import base as families
from ppcl_train.scenes.sampling import Sampler


class DataConfig(Frozen):
    """Where batches come from.

    Attributes:
        cache: a folder that ``ppcl train cache`` or ``generate`` filled; None makes samples anew for every batch, for
            families that can make them.
        workers: processes that make or read the batches of a training loop ahead, for each process that trains; 0: each
            is made when it is needed; None: 4 with a GPU, 0 on a CPU. Batches do not depend on it.
        trajectory: train and measure on what the teacher's own sampler reaches from noise under the prompts, at exactly
            its timesteps, and not on noise mixed with data: for a teacher that was distilled to few denoising steps.
    """

    cache: str | None = None
    workers: NonNegativeInt | None = None
    trajectory: bool = False


class RunConfig(Frozen):
    """One training run.

    Attributes:
        task: the name of a family (`families.base.of`): which transformer is trained, on which samples, and whether
            results can be judged.
        select: the selector: a table of measured costs and the exact planner; eq. 5 of the paper, in the reading in
            which single blocks may stay; or eq. 5 as it is printed, in which none does.
        storage: dtype of the checkpoint; the teacher is rounded to it before anything else is made from the teacher.
        sampler: how the checkpoint is sampled and judged.
        batch: samples that pass through the teacher at once in stages that train nothing.
        save_every: the most steps between saves of a stage's state.
        save_seconds: the most seconds between them: what a kill repeats.
        keep_all: keep what only earlier stages read: closed forms, students, what recovery left.
        base_model: the model that the checkpoint is made from, as its hub names it; None: the name of a pretrained
            teacher, or what the model card in its folder says.
        license: of the checkpoint's weights, as hubs write it; None: what that card says.
        tracker: the tracker of accelerate that draws the curves; those of tensorboard lie in the run folder, in
            ``tracking/``.
    """

    task: str = "scenes"
    select: Literal["table", "eq5", "eq5-literal"] = "table"
    seed: int = Field(0, ge=0)
    # t = sigmoid(mean + std * normal), t = 1 is noise.
    time_mean: float = 0.4
    time_std: PositiveFloat = 1.2
    storage: Literal["float32", "float16", "bfloat16"] = "float16"
    batch: PositiveInt = 128
    save_every: PositiveInt = 500
    save_seconds: PositiveFloat = 60.0
    keep_all: bool = False
    base_model: str | None = Field(None, min_length=1, max_length=LONGEST_MODEL)
    license: str | None = Field(None, min_length=1, max_length=LONGEST_LICENSE)
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
    refine: RefineConfig = RefineConfig()
    compress: CompressConfig = CompressConfig()
    measure: MeasureConfig = MeasureConfig()
    pictures: PicturesConfig = PicturesConfig()
    compare: CompareConfig = CompareConfig()
    sampler: Sampler = Sampler()

    @field_validator("task")
    @classmethod
    def _is_a_family(cls, task: str) -> str:
        families.of(task)
        return task

    @model_validator(mode="after")
    def _teacher_can_be_built(self) -> RunConfig:
        if not self.teacher.architecture:
            if self.teacher.pretrained is None:
                raise ValueError("a teacher has an architecture or is pretrained: set one of the two, or take a preset")
            # The pretrained transformer brings its own.
            return self
        try:
            with torch.device("meta"):
                depth = self.family.build(self.teacher.architecture).catalog.architecture.depth
        except (TypeError, ValueError, RuntimeError, ZeroDivisionError) as error:
            raise ValueError(f"teacher.architecture cannot be built: {one_line(error)}") from None
        if depth < 2:
            raise ValueError(f"teacher.architecture has {depth} block: compressing takes 2 or more")
        return self

    @model_validator(mode="after")
    def _precisions_agree(self) -> RunConfig:
        if self.teacher.dtype != "float32":
            for name in ("probes", "students", "recover", *(["refine"] if self.refine.all_steps else [])):
                if getattr(self, name).precision != "bf16":
                    raise ValueError(f"a teacher in {self.teacher.dtype} wants {name}.precision=bf16, not no")
        return self

    @model_validator(mode="after")
    def _teacher_is_held(self) -> RunConfig:
        if self.teacher.held_otherwise and self.students.shard_teacher:
            raise ValueError(
                "students.shard_teacher spreads exact weights over processes: leave out teacher.quantize and "
                "teacher.offload, or shard_teacher"
            )
        return self

    @model_validator(mode="after")
    def _data_to_match(self) -> RunConfig:
        if self.data.trajectory:
            for name in ("recover", "refine"):
                if getattr(self, name).flow_matching:
                    raise ValueError(
                        f"{name}.flow_matching compares with data, and a trajectory (data.trajectory) has none: "
                        "leave out one of the two"
                    )
        return self

    @property
    def family(self) -> families.Family:
        """The family that ``task`` names."""
        return families.of(self.task)

    @property
    def magnitude(self) -> float:
        """Weight of the magnitude term added to eq. 6: none with the selector eq. 5, which follows the paper."""
        return self.students.magnitude if self.select == "table" else 0.0


def with_changes(config: RunConfig, changes: dict[str, Any]) -> RunConfig:
    """Replace values by dotted name: ``{"students.steps": 100}``.

    Raises:
        ValueError: no setting has this name, or the setting cannot take the value.
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
