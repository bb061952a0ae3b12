"""The loop that every stage trains with.

A step depends on the weights and on (seed, step) alone, and the whole state is saved. On a CPU, a run that was killed
at any moment and started again therefore ends with the same weights, bit for bit, as one that was not.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from ppcl_train.config.settings import RunConfig
from ppcl_train.config.stages import LoopConfig
from ppcl_train.engine.distributed import ALONE, World
from ppcl_train.engine.divergence import WatchedLoss
from ppcl_train.engine.log import Log
from ppcl_train.engine.optimisers import adamw, adamw_class, autocast, cosine, schedule, take_step
from ppcl_train.engine.saving import Saves, newest
from ppcl_train.engine.sharding import clip
from ppcl_train.engine.state import LoopState
from ppcl_train.engine.view import tracker, view

# What ``step_loss`` returns: one loss, or losses by the name of what they train.
Losses = float | torch.Tensor | Mapping[str, float | torch.Tensor]


def train_loop(
    run: RunConfig,
    config: LoopConfig,
    log: Log,
    parameters: Mapping[str, torch.Tensor],
    step_loss: Callable[[int], Losses],
    *,
    optimisers: Sequence[torch.optim.Optimizer] = (),
    world: World = ALONE,
    rate: Callable[[int], float] | None = None,
    before_update: Callable[[], None] = lambda: None,
    after_step: Callable[[int, Mapping[str, torch.Tensor]], None] = lambda done, trained: None,
    log_every: int = 100,
) -> dict[str, torch.Tensor]:
    """Train, or go on training from the state in the run folder; the state is left in place when the loop ends.

    Args:
        run: its ``save_every`` and ``tracker`` are used.
        config: steps, learning rate and all else of this loop.
        log: of the stage; names the run folder and the state.
        parameters: what is trained, by name; changed in place.
        step_loss: ``number of a batch -> loss, or losses by name``; computes and backpropagates. Step ``n`` is made of
            the batches ``n * accumulate .. n * accumulate + accumulate - 1``; the number alone decides what is drawn.
            A name that begins names of parameters (``students.3-5``) owns them: their gradient is clipped by itself.
        optimisers: over these parameters, instead of AdamW; the learning rate that each has now is its peak.
            An optimiser that ``step_loss`` steps itself, dropping its gradients, does nothing more here.
        world: the processes that call this together. What they train under the same name is the same in all of them;
            what one process trains alone lies in the same state, of which every process writes a part (`Saves`).
            Another number of processes may go on with it.
        rate: ``step -> share of the peak learning rate``, instead of `cosine`.
        before_update: called when the gradients of a step are complete: processes average them here.
        after_step: called with the number of steps done and the weights that the loop would return now.
        log_every: steps between lines of the log.

    Returns:
        The trained weights by name: the moving averages with ``ema``, else ``parameters``.

    Raises:
        ValueError: a loss or a parameter is not finite, or a loss has diverged; the message names the step and the
            loss, and the state of the last save is kept. Or the state cannot be read or written.
    """
    saves = Saves(log.folder, log.stage, world)
    optimisers = optimisers or [
        adamw(parameters.values(), lr=config.lr, weight_decay=config.weight_decay, kind=adamw_class(config, log))
    ]
    state = LoopState(parameters, optimisers, config.ema)
    trained = state.trained
    first = 0
    if (saved := saves.newest()) is not None:
        first = state.restore(saves, saved, config.steps)
        log(resumed=first)
    rate = rate or (lambda step: cosine(step, config.steps, config.warmup))
    schedules = [schedule(optimiser, rate, first) for optimiser in optimisers]

    def fail(what: str, step: int) -> ValueError:
        saves.finish()
        found = newest(log.folder, log.stage)
        kept = f"{found} holds the last good state" if found else "no state had been saved"
        return ValueError(f"{log.stage}: {what} at step {step}: lower the learning rate; {kept}")

    with view(log.stage, config.steps, first, state.losses, world) as show, tracker(run, log, first, world) as track:
        for step in range(first, config.steps):
            losses = _backpropagate(config, step, step_loss, parameters)
            for name, loss in losses.items():
                if wrong := state.losses.setdefault(name, WatchedLoss()).take(loss):
                    raise fail(f"the loss{' of ' if name else ''}{name} {wrong}", step)
            _prepare_gradients(config, parameters, list(losses), before_update)
            take_step(optimisers)
            lr = optimisers[0].param_groups[0]["lr"]
            for each in schedules:
                each.step()
            done = step + 1
            state.average(done)
            after_step(done, trained)
            show(done)
            last = done == config.steps
            if done % log_every == 0 or last:
                means = world.union({name: loss.mean for name, loss in state.losses.items()})
                report = _report(means)
                log(step=done, of=config.steps, **report, shown=last or not show.live)
                curves = {f"loss/{name}": mean for name, mean in report.get("losses", {}).items()}
                track({"loss": report["loss"], "lr": lr, **curves}, done)
            # Not while a loss is far off: the last good state would be overwritten before the loss counts as diverged.
            due = last or done % run.save_every == 0 or world.any(saves.age >= run.save_seconds)
            if due and (not world.any(any(loss.far_off for loss in state.losses.values())) or last):
                if wrong := state.not_finite(world):
                    raise fail(f"{wrong} is not finite", step)
                state.save(saves, done, config.steps, world)
        saves.finish()
    return trained


def _report(means: Mapping[str, float]) -> dict[str, Any]:
    """What the log says of the running means of all losses: their mean, and each by its name if it has one."""
    named = {name: mean for name, mean in means.items() if name}
    return {"loss": sum(means.values()) / len(means), **({"losses": named} if named else {})}


def _backpropagate(
    config: LoopConfig, step: int, step_loss: Callable[[int], Losses], parameters: Mapping[str, torch.Tensor]
) -> dict[str, float]:
    """Run the batches of a step; returns the mean of every loss by name."""
    first = next(iter(parameters.values()))
    # Casts of shards would be casts of whole blocks, kept to the end of the step.
    casting = partial(autocast, config.precision, first.device.type, keeps_casts=not isinstance(first, DTensor))
    losses: dict[str, list[float]] = {}
    for number in range(step * config.accumulate, (step + 1) * config.accumulate):
        with casting():
            found = step_loss(number)
        for name, loss in (found if isinstance(found, Mapping) else {"": found}).items():
            losses.setdefault(name, []).append(float(loss))
    return {name: sum(values) / len(values) for name, values in losses.items()}


def _prepare_gradients(
    config: LoopConfig, parameters: Mapping[str, torch.Tensor], names: Sequence[str], before_update: Callable[[], None]
) -> None:
    """Average the gradients over the batches of a step and over processes, then clip them.

    The parameters that a loss name owns are clipped by themselves, all others together: students that do not depend on
    each other stay independent, whichever of them are trained together.
    """
    if config.accumulate > 1:
        gradients = [p.grad for p in parameters.values() if p.grad is not None]
        torch._foreach_div_(gradients, float(config.accumulate))
    before_update()
    if config.clip:
        owned: dict[str, list[torch.Tensor]] = {}
        for parameter, tensor in parameters.items():
            owner = next((name for name in names if name and parameter.startswith(f"{name}.")), "")
            owned.setdefault(owner, []).append(tensor)
        for tensors in owned.values():
            clip(tensors, config.clip)
