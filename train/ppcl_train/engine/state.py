"""The state of a training loop: saved to one file, and put back from it so that training goes on with the same bits."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch.optim.swa_utils import get_ema_multi_avg_fn

from ppcl_train.engine.distributed import World
from ppcl_train.engine.divergence import WatchedLoss
from ppcl_train.engine.files import read_note, read_tensors, write_tensors


class LoopState:
    """Everything that the steps of a loop change.

    Attributes:
        parameters: what is trained, by name.
        averages: moving averages of the parameters, by name; empty without averaging.
        optimisers: over the parameters.
        losses: the losses so far, by name.
    """

    def __init__(
        self, parameters: Mapping[str, torch.Tensor], optimisers: Sequence[torch.optim.Optimizer], ema: float
    ) -> None:
        self.parameters, self.optimisers, self._ema = parameters, optimisers, ema
        self.averages = {name: p.detach().clone() for name, p in parameters.items()} if ema else {}
        self.losses: dict[str, WatchedLoss] = {}

    @property
    def trained(self) -> dict[str, torch.Tensor]:
        """The weights that the loop would return now: the averages if there are any, else the parameters."""
        return self.averages or {name: p.detach() for name, p in self.parameters.items()}

    def average(self, done: int) -> None:
        """Move the averages towards the parameters after ``done`` steps.

        An `AveragedModel` would copy a whole module, and its decay is fixed: here parameters have names but no module,
        and the decay rises with the steps. What is used of torch is the update of all tensors at once.
        """
        if self.averages:
            # A smaller decay at first: with the full decay, the average would hold the start for a thousand steps.
            decay = min(self._ema, done / (done + 9))
            parameters = [p.detach() for p in self.parameters.values()]
            get_ema_multi_avg_fn(decay)(list(self.averages.values()), parameters, done)

    def not_finite(self) -> str:
        """Return the name of a tensor that is not finite, or ``""``."""
        for name, tensor in self._tensors().items():
            if tensor.is_floating_point() and not tensor.isfinite().all():
                return name
        return ""

    def save(self, file: Path, done: int, of: int, world: World) -> None:
        """Write the state after ``done`` of ``of`` steps; every process of ``world`` calls this, and rank 0 writes.

        Raises:
            ValueError: the file cannot be written.
        """
        plain = world.union(self._optimiser_state(tensors=False))
        losses = world.union({name: asdict(loss) for name, loss in self.losses.items()})
        tensors = world.gather(self._tensors())
        if world.is_main:
            write_tensors(file, tensors, {"step": done, "of": of, "plain": plain, "losses": losses})

    def restore(self, file: Path) -> int:
        """Put a saved state in place; returns the number of steps done.

        Raises:
            ValueError: the file is damaged, or holds other parameters.
        """
        held, note = read_tensors(file), read_note(file)
        into = self._weights()
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
        for optimiser in self.optimisers:
            content = optimiser.state_dict()
            content["state"] = {i: states[name] for name, i in self._indices(optimiser).items() if name in states}
            optimiser.load_state_dict(content)
        stored = [name.removeprefix("model.") for name in held if name.startswith("model.")]
        for name, values in note["losses"].items():
            # The loss of parameters that another process trains now is watched in that process.
            if _owns(name, self.parameters) or not _owns(name, stored):
                self.losses[name] = WatchedLoss(**values)
        step: int = note["step"]
        return step

    def _weights(self) -> dict[str, torch.Tensor]:
        return {
            **{f"model.{name}": tensor.detach() for name, tensor in self.parameters.items()},
            **{f"average.{name}": tensor for name, tensor in self.averages.items()},
        }

    def _tensors(self) -> dict[str, torch.Tensor]:
        return {**self._weights(), **self._optimiser_state(tensors=True)}

    def _optimiser_state(self, tensors: bool) -> dict[str, Any]:
        """What optimisers remember, by name: the tensors, or all else (bitsandbytes counts steps in a plain number)."""
        # Once for each optimiser: a state dict goes through all parameters.
        states = [(optimiser.state_dict()["state"], self._indices(optimiser)) for optimiser in self.optimisers]
        return {
            f"optimiser.{name}.{key}": value
            for state, indices in states
            for name, index in indices.items()
            for key, value in state.get(index, {}).items()
            if isinstance(value, torch.Tensor) == tensors
        }

    def _indices(self, optimiser: torch.optim.Optimizer) -> dict[str, int]:
        """The numbers under which an optimiser's state dict knows parameters.

        States are stored by name instead: who reads the file may have split the parameters among optimisers otherwise.
        """
        names = {id(parameter): name for name, parameter in self.parameters.items()}
        return {
            names[id(parameter)]: index
            for group, numbered in zip(optimiser.param_groups, optimiser.state_dict()["param_groups"])
            for parameter, index in zip(group["params"], numbered["params"])
        }


def _owns(loss: str, parameters: Iterable[str]) -> bool:
    """Whether the name of a loss begins the name of a parameter."""
    return any(name.startswith(f"{loss}.") for name in parameters)
