"""Training of a comparison, the same for all methods: end to end, on the teacher's prediction.

A model is trained whole, kept blocks included, on the clean image that the teacher's prediction points at (as in the
stage *recover*).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ppcl_train.compare.entry import Entry
from ppcl_train.data import calibration
from ppcl_train.data.seeds import Seed
from ppcl_train.engine.log import Log
from ppcl_train.engine.loop import train_loop
from ppcl_train.engine.optimisers import adamw_class, muon
from ppcl_train.engine.provenance import making
from ppcl_train.losses.velocity_error import Target


def train(
    entry: Entry,
    stage: str,
    parameters: Mapping[str, nn.Parameter],
    step_loss: Callable[[int], float],
    steps: int,
    optimisers: Sequence[torch.optim.Optimizer] = (),
    **changes: Any,
) -> None:
    """Train parameters in place, in the loop of all stages.

    Args:
        stage: names the state and the lines of the log.
        changes: to the settings of `CompareConfig`.
    """
    config = entry.run.compare.model_copy(update={"steps": steps, **changes})
    with making(entry.run, stage):
        trained = train_loop(entry.run, config, Log(entry.folder, stage), parameters, step_loss, optimisers=optimisers)
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(trained[name])


def prediction_loss(entry: Entry, model: Any, teacher: Any, seed: Seed) -> torch.Tensor:
    """Compute the squared error of a model's clean images on a batch, over the mean square of the teacher's."""
    batch = entry.inputs(seed, teacher)
    if seed not in entry.clean:
        with torch.no_grad():
            entry.clean[seed] = batch.clean(teacher(**batch.call)[0])
    target = Target(batch, entry.clean[seed])
    return target.squared_error(model(**batch.call)[0]).mean() / target.clean.square().mean()


def calibration_loss(entry: Entry, model: Any, teacher: Any) -> float:
    """Average `prediction_loss` over calibration batches."""
    count = math.ceil(entry.run.measure.samples / entry.run.compare.batch)
    with torch.no_grad():
        return sum(prediction_loss(entry, model, teacher, calibration.MEASURE + n).item() for n in range(count)) / count


def train_end_to_end(entry: Entry, model: Any, steps: int) -> Any:
    """Train all of a model; returns the model, frozen."""
    teacher, config = entry.teacher(), entry.run.compare
    parameters = dict(model.requires_grad_(True).named_parameters())

    def step_loss(number: int) -> float:
        loss = prediction_loss(entry, model, teacher, calibration.RECOVER + number)
        loss.backward()
        return loss.item()

    optimisers: list[torch.optim.Optimizer] = []
    if config.muon_lr:
        matrices, kind = set(entry.run.family.hidden_matrices(model)), adamw_class(config, Log(entry.folder, "end"))
        rates = {"muon_lr": config.muon_lr, "adamw_lr": config.lr}
        optimisers = muon(parameters, matrices, **rates, weight_decay=config.weight_decay, kind=kind)
    train(entry, "end", parameters, step_loss, steps, optimisers)
    return model.requires_grad_(False)
