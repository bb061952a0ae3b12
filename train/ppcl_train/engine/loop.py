"""The loop that every stage trains with.

A step depends on the weights and on (seed, step) alone and the whole state is saved, so on a CPU a run that was killed
at any moment and started again ends with the weights that it would have had, bit for bit.
"""

from __future__ import annotations

import contextlib
import importlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.columns import Columns
from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

from ppcl_train.config.settings import LoopConfig, RunConfig
from ppcl_train.engine.distributed import ALONE, World
from ppcl_train.engine.files import Log, read_note, read_tensors, state_file, write_tensors

# What a step returns: one loss, or losses by the name of what they train.
Losses = float | torch.Tensor | Mapping[str, float | torch.Tensor]

# A loss has diverged when its running mean (of about 50 steps) lay above so many times its lowest for so many steps on
# end. Generous: losses fall by orders of magnitude, and what is drawn at a step moves them by several times. Below the
# floor, losses are rounding.
_FAR, _LONG, _FLOOR = 20.0, 100, 1e-6
_MEAN_OF = 50


def cosine(step: int, steps: int, warmup: int) -> float:
    """Share of the peak learning rate at a step: linear up over ``warmup``, then half a cosine down to zero."""
    return min((step + 1) / max(warmup, 1), 0.5 * (1 + math.cos(math.pi * step / steps)))


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
    """Train, or go on training from the state in the run folder, which is left in place when the loop ends.

    Args:
        log: of the stage; names the run folder and the state.
        parameters: what is trained, by name; changed in place.
        step_loss: ``number of a batch -> loss, or losses by name``; computes and backpropagates. Step ``n`` is made of
            the batches ``n * accumulate .. n * accumulate + accumulate - 1``; the number alone decides what is drawn.
            A name that begins names of parameters (``students.3-5``) owns them: their gradient is clipped by itself.
        optimisers: over these parameters, in place of AdamW; the learning rate that each has now is its peak.
            One that has stepped in ``step_loss`` and let go of its gradients has nothing left to do here.
        world: the processes that call this together. What they train under one name is the same on all of them, and
            what one trains alone lies in the one state with all else; rank 0 writes it.
        rate: ``step -> share of the peak learning rate``, in place of `cosine`.
        before_update: called when the gradients of a step are complete: where processes average them.
        after_step: called with the number of steps done and the weights that the loop would return now.

    Returns:
        The trained weights by name: the moving averages with ``ema``, else ``parameters``.

    Raises:
        ValueError: a loss or a parameter is not finite, or a loss has diverged; names the step and which, and the
            state of the last save is kept. Or the state cannot be read or written.
    """
    file = state_file(log.folder, log.stage)
    optimisers = optimisers or [adamw(adam(config, log), config, parameters.values())]
    rate = rate or (lambda step: cosine(step, config.steps, config.warmup))
    peaks = [[group["lr"] for group in optimiser.param_groups] for optimiser in optimisers]
    averages = {name: p.detach().clone() for name, p in parameters.items()} if config.ema else {}
    trained = averages or {name: p.detach() for name, p in parameters.items()}
    watch: dict[str, _Watched] = {}
    first = 0
    if file.exists():
        first = _restore(file, parameters, averages, optimisers, watch)
        log(resumed=first)
    device = next(iter(parameters.values())).device.type

    def fail(what: str, step: int) -> ValueError:
        kept = f"{file} holds the last good state" if file.exists() else "no state had been saved"
        return ValueError(f"{log.stage}: {what} at step {step}: lower the learning rate; {kept}")

    with _view(log.stage, config.steps, first, watch, world) as view, _tracker(run, log, first, world) as track:
        for step in range(first, config.steps):
            for optimiser, rates in zip(optimisers, peaks):
                for group, peak in zip(optimiser.param_groups, rates):
                    group["lr"] = peak * rate(step)
            sums: dict[str, list[float]] = {}
            for number in range(step * config.accumulate, (step + 1) * config.accumulate):
                with torch.autocast(device, torch.bfloat16, enabled=config.precision == "bf16"):
                    losses = step_loss(number)
                for name, loss in (losses if isinstance(losses, Mapping) else {"": losses}).items():
                    sums.setdefault(name, []).append(float(loss))
            for name, values in sums.items():
                seen = watch.setdefault(name, _Watched())
                if wrong := seen.take(sum(values) / len(values)):
                    raise fail(f"the loss{' of ' if name else ''}{name} {wrong}", step)
            gradients = {name: p.grad for name, p in parameters.items() if p.grad is not None}
            if config.accumulate > 1:
                torch._foreach_div_(list(gradients.values()), float(config.accumulate))
            before_update()
            if config.clip:
                _clip(gradients, list(sums), config.clip)
            for optimiser in optimisers:
                optimiser.step()
                optimiser.zero_grad()
            done = step + 1
            if averages:
                # Shorter at first, or the average would hold the start for a thousand steps.
                keep = min(config.ema, done / (done + 9))
                with torch.no_grad():
                    torch._foreach_lerp_(list(averages.values()), [p.detach() for p in parameters.values()], 1 - keep)
            after_step(done, trained)
            view(done)
            last = done == config.steps
            if done % log_every == 0 or last:
                means = world.union({name: seen.mean for name, seen in watch.items()})
                mean = sum(means.values()) / len(means)
                named = {name: value for name, value in means.items() if name}
                log(
                    step=done,
                    of=config.steps,
                    loss=mean,
                    **({"losses": named} if named else {}),
                    shown=last or not view.live,
                )
                track(
                    {"loss": mean, "lr": peaks[0][0] * rate(step), **{f"loss/{k}": v for k, v in named.items()}}, done
                )
            # Not while a loss is far off, or the last good state would be gone before it counts as diverged.
            saves = last or done % run.save_every == 0
            if saves and (not world.any(any(seen.far_off for seen in watch.values())) or last):
                state = _state(parameters, averages, optimisers)
                for name, tensor in state.items():
                    if tensor.is_floating_point() and not tensor.isfinite().all():
                        raise fail(f"{name} is not finite", step)
                plain = world.union(_optimiser_state(optimisers, parameters, tensors=False))
                watched = world.union({name: asdict(seen) for name, seen in watch.items()})
                state = world.gather(state)
                if world.is_main:
                    write_tensors(file, state, {"step": done, "of": config.steps, "plain": plain, "losses": watched})
    return trained


@dataclass
class _Watched:
    """One loss over the steps: its running mean, the mean's lowest, and for how many steps it has been far above it."""

    count: int = 0
    mean: float = 0.0
    lowest: float = 0.0
    far_off: int = 0

    def take(self, loss: float) -> str:
        """Take in a step's loss; says what is wrong with it, or ``""``."""
        if not math.isfinite(loss):
            return f"is {loss}"
        self.count += 1
        self.mean += (loss - self.mean) / min(self.count, _MEAN_OF)
        self.lowest = min(self.lowest, self.mean) if self.count > _MEAN_OF else self.mean
        limit = _FAR * max(self.lowest, _FLOOR)
        self.far_off = self.far_off + 1 if self.mean > limit else 0
        return f"has been over {limit:.3g} for {_LONG} steps, {_FAR:g} times its lowest" if self.far_off > _LONG else ""


def _clip(gradients: Mapping[str, torch.Tensor], names: Sequence[str], most: float) -> None:
    """Scale gradients down to a norm of ``most``: those that a loss name owns by themselves, all others together.

    Independent students stay independent, in whatever company they are trained.
    """
    owned: dict[str, list[torch.Tensor]] = {}
    for parameter, gradient in gradients.items():
        owner = next((name for name in names if name and parameter.startswith(f"{name}.")), "")
        owned.setdefault(owner, []).append(gradient)
    for tensors in owned.values():
        norm = torch.nn.utils.get_total_norm(tensors)
        torch._foreach_mul_(tensors, (most / (norm + 1e-6)).clamp(max=1.0))


def adam(config: LoopConfig, log: Log) -> Any:
    """The class of AdamW; that with 8-bit moments where asked for and installed."""
    if config.eight_bit:
        try:
            return importlib.import_module("bitsandbytes").optim.AdamW8bit
        except ImportError:
            log(eight_bit="bitsandbytes is not installed: AdamW keeps its moments in full")
    return torch.optim.AdamW


def adamw(kind: Any, config: LoopConfig, parameters: Iterable[torch.Tensor]) -> torch.optim.Optimizer:
    """AdamW as in the paper: biases and norms do not decay."""
    held = list(parameters)
    groups = [
        {"params": [p for p in held if p.ndim > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in held if p.ndim <= 1], "weight_decay": 0.0},
    ]
    optimiser: torch.optim.Optimizer = kind(groups, lr=config.lr, betas=(0.9, 0.95))
    return optimiser


def _state(
    parameters: Mapping[str, torch.Tensor],
    averages: Mapping[str, torch.Tensor],
    optimisers: Sequence[torch.optim.Optimizer],
) -> dict[str, torch.Tensor]:
    return {
        **{f"model.{name}": tensor.detach() for name, tensor in parameters.items()},
        **{f"average.{name}": tensor for name, tensor in averages.items()},
        **_optimiser_state(optimisers, parameters, tensors=True),
    }


def _optimiser_state(
    optimisers: Sequence[torch.optim.Optimizer], parameters: Mapping[str, torch.Tensor], tensors: bool
) -> dict[str, Any]:
    """What optimisers remember, by name: tensors, or what is none (bitsandbytes counts steps in a plain number)."""
    return {
        f"optimiser.{name}.{key}": value
        for optimiser in optimisers
        for name, index in _indices(optimiser, parameters).items()
        for key, value in optimiser.state_dict()["state"].get(index, {}).items()
        if isinstance(value, torch.Tensor) == tensors
    }


def _indices(optimiser: torch.optim.Optimizer, parameters: Mapping[str, torch.Tensor]) -> dict[str, int]:
    """Numbers under which an optimiser's state dict knows parameters.

    States are stored under names: who reads them may have other parameters in other optimisers.
    """
    names = {id(parameter): name for name, parameter in parameters.items()}
    return {
        names[id(parameter)]: index
        for group, numbered in zip(optimiser.param_groups, optimiser.state_dict()["param_groups"])
        for parameter, index in zip(group["params"], numbered["params"])
    }


def _restore(
    file: Path,
    parameters: Mapping[str, torch.Tensor],
    averages: Mapping[str, torch.Tensor],
    optimisers: Sequence[torch.optim.Optimizer],
    watch: dict[str, _Watched],
) -> int:
    """Put a saved state in place; returns the steps done.

    Raises:
        ValueError: the file is not whole, or is of other parameters.
    """
    held, note = read_tensors(file), read_note(file)
    into = _state(parameters, averages, [])
    same = all(name in held and held[name].shape == tensor.shape for name, tensor in into.items())
    if not same or not {"step", "plain", "losses"} <= set(note):
        raise ValueError(f"{file} is the state of another training: delete it, and the stage begins anew")
    with torch.no_grad():
        for name, tensor in into.items():
            tensor.copy_(held[name])
    states: dict[str, dict[str, Any]] = {}
    for name, value in {**held, **note["plain"]}.items():
        if name.startswith("optimiser."):
            parameter, key = name.removeprefix("optimiser.").rsplit(".", 1)
            states.setdefault(parameter, {})[key] = value
    for optimiser in optimisers:
        content = optimiser.state_dict()
        content["state"] = {i: states[name] for name, i in _indices(optimiser, parameters).items() if name in states}
        optimiser.load_state_dict(content)
    stored = [name.removeprefix("model.") for name in held if name.startswith("model.")]
    for name, values in note["losses"].items():
        # A loss of what another process trains now is watched there.
        if _owns(name, parameters) or not _owns(name, stored):
            watch[name] = _Watched(**values)
    step: int = note["step"]
    return step


def _owns(loss: str, parameters: Iterable[str]) -> bool:
    """Whether the name of a loss begins the name of a parameter."""
    return any(name.startswith(f"{loss}.") for name in parameters)


class _View:
    """Where a loop is: a live view on a terminal, with the running mean of every loss by name; else nothing."""

    def __init__(self, stage: str, steps: int, first: int, watch: Mapping[str, _Watched], world: World) -> None:
        console = Console()
        self._watch = watch
        shown = console.is_terminal and world.is_main
        self._progress = Progress(
            TextColumn(f"{stage:>9}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), auto_refresh=False
        )
        self._task = self._progress.add_task(stage, total=steps, completed=first)
        self.live = Live(get_renderable=self._render, console=console, transient=True) if shown else None

    def _render(self) -> Group:
        losses = [
            Text.assemble(f"{name or 'loss'} ", (f"{seen.mean:.4g}", "bold"))
            for name, seen in list(self._watch.items())
        ]
        return Group(self._progress, Columns(losses, padding=(0, 3)))

    def __call__(self, done: int) -> None:
        self._progress.update(self._task, completed=done)


@contextlib.contextmanager
def _view(stage: str, steps: int, first: int, watch: Mapping[str, _Watched], world: World) -> Iterator[_View]:
    view = _View(stage, steps, first, watch, world)
    with view.live or contextlib.nullcontext():
        yield view


@contextlib.contextmanager
def _tracker(run: RunConfig, log: Log, first: int, world: World) -> Iterator[Callable[[dict[str, float], int], None]]:
    """What keeps curves, through accelerate: tensorboard's lie in ``tracking/``, a folder a stage."""
    if run.tracker == "none" or not world.is_main:
        yield lambda values, step: None
        return
    # Only now: this import takes a second.
    accelerate = importlib.import_module("accelerate.tracking")
    if run.tracker not in map(str, accelerate.get_available_trackers()):
        log(tracker=f"{run.tracker} is not installed: the losses are in log.jsonl alone")
        yield lambda values, step: None
        return
    kind: Any = accelerate.LOGGER_TYPE_TO_CLASS[run.tracker]
    if run.tracker == "tensorboard":
        # What a killed run drew beyond its last save is drawn again.
        tracker = kind(log.stage, logging_dir=log.folder / "tracking", purge_step=first)
    elif kind.requires_logging_directory:
        tracker = kind(f"{log.folder.name}-{log.stage}", logging_dir=log.folder / "tracking")
    else:
        tracker = kind(f"{log.folder.name}-{log.stage}")
    tracker.start()
    try:
        yield lambda values, step: tracker.log(values, step=step)
    finally:
        tracker.finish()
