"""The state of a training loop: saved by all processes, and put back so that training goes on with the same bits."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from torch.optim.swa_utils import get_ema_multi_avg_fn

from ppcl_train.engine.distributed import World
from ppcl_train.engine.divergence import WatchedLoss
from ppcl_train.engine.saving import Saves


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

    def not_finite(self, world: World) -> str:
        """Return the name of a tensor that is not finite, in any process, or ``""``; all processes call this."""
        found = (name for name, tensor in self._tensors().items() if not _is_finite(tensor))
        return min(world.union(dict.fromkeys(itertools.islice(found, 1), True)), default="")

    def save(self, saves: Saves, done: int, of: int, world: World) -> None:
        """Write the state after ``done`` of ``of`` steps; every process of ``world`` calls this.

        After the last step it is `trained` alone: a third of a state, or a quarter with averages.

        Raises:
            ValueError: it cannot be written.
        """
        ended = done == of
        plain = {} if ended else self._optimiser_state(tensors=False)
        note = {
            "step": done,
            "of": of,
            "plain": dict(sorted(world.union(plain).items())),
            "losses": world.union({name: asdict(loss) for name, loss in self.losses.items()}),
        }
        tensors = self._weights(ended) if ended else self._tensors()
        # In one order, whether or not an optimiser was put back: a resumed run leaves the same bytes.
        saves.write(done, dict(sorted(tensors.items())), note)

    def restore(self, saves: Saves, state: Path, steps: int) -> int:
        """Put a saved state in place; returns the number of steps done.

        Other processes may have written it, and more or fewer of them.

        Args:
            saves: where it lies.
            state: its folder.
            steps: of the training that goes on. A state after the last step has no more than `trained`.

        Raises:
            ValueError: the state is damaged, is that of a shorter training, or holds other parameters.
        """
        note, forms = saves.read_note(state), saves.forms(state)
        known = {"step", "of", "plain", "losses"} <= set(note)
        ended = known and note["step"] == note["of"]
        into = self._weights(ended)
        same = all(name in forms and forms[name][0] == tensor.shape for name, tensor in into.items())
        if not same or not known or (ended and note["of"] != steps):
            raise ValueError(f"{state} is the state of another training: delete it, and the stage begins anew")
        moments = {
            name: _like(self.parameters[parameter], *form)
            for name, form in forms.items()
            if (parameter := _parameter_of(name)) in self.parameters
        }
        saves.read(state, {**into, **moments})
        states: dict[str, dict[str, Any]] = {}
        for name, value in {**moments, **note["plain"]}.items():
            parameter, key = _parameter_of(name), name.rpartition(".")[2]
            states.setdefault(parameter, {})[key] = _scalar(value)
        for optimiser in self.optimisers:
            content = optimiser.state_dict()
            content["state"] = {i: states[name] for name, i in self._indices(optimiser).items() if name in states}
            optimiser.load_state_dict(content)
        stored = [name.partition(".")[2] for name in forms if name.startswith(("model.", "average."))]
        for name, values in note["losses"].items():
            # The loss of parameters that another process trains now is watched in that process.
            if _owns(name, self.parameters) or not _owns(name, stored):
                self.losses[name] = WatchedLoss(**values)
        step: int = note["step"]
        return step

    def _weights(self, ended: bool = False) -> dict[str, torch.Tensor]:
        """Parameters and averages by the names under which they are saved; after the last step, `trained` of them."""
        averages = {f"average.{name}": tensor for name, tensor in self.averages.items()}
        if ended and averages:
            return averages
        return {**{f"model.{name}": tensor.detach() for name, tensor in self.parameters.items()}, **averages}

    def _tensors(self) -> dict[str, torch.Tensor]:
        return {**self._weights(), **self._optimiser_state(tensors=True)}

    def _optimiser_state(self, tensors: bool) -> dict[str, Any]:
        """What optimisers remember, by name: the tensors, or all numbers (bitsandbytes counts steps in a plain one)."""
        # Once for each optimiser: a state dict goes through all parameters.
        states = [(optimiser.state_dict()["state"], self._indices(optimiser)) for optimiser in self.optimisers]
        return {
            f"optimiser.{name}.{key}": value if tensors else _plain(value)
            for state, indices in states
            for name, index in indices.items()
            for key, value in state.get(index, {}).items()
            if (isinstance(value, torch.Tensor) and value.ndim > 0) == tensors
        }

    def _indices(self, optimiser: torch.optim.Optimizer) -> dict[str, int]:
        """The numbers under which an optimiser's state dict knows parameters.

        States are stored by name instead: who reads them may have split the parameters among optimisers otherwise.
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


def _parameter_of(name: str) -> str:
    """The parameter that a part of an optimiser's state belongs to, by the name under which it is saved."""
    return name.removeprefix("optimiser.").rpartition(".")[0] if name.startswith("optimiser.") else ""


def _plain(value: Any) -> Any:
    """A number as JSON holds it: a tensor of one number with its dtype."""
    return {str(value.dtype).removeprefix("torch."): value.item()} if isinstance(value, torch.Tensor) else value


def _scalar(value: Any) -> Any:
    """The inverse of `_plain`; tensors pass."""
    if not isinstance(value, dict):
        return value
    [(dtype, number)] = value.items()
    return torch.tensor(number, dtype=getattr(torch, dtype))


def _is_finite(tensor: torch.Tensor) -> bool:
    local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return not local.is_floating_point() or bool(local.isfinite().all())


def _like(parameter: torch.Tensor, shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
    """Room for what an optimiser remembers of a parameter: divided as it is, if it has its shape."""
    if shape == parameter.shape:
        return torch.empty_like(parameter, dtype=dtype, requires_grad=False)
    return torch.empty(shape, dtype=dtype, device=parameter.device)
