"""Learnt gates: which blocks are kept is learnt together with adapters (TinyFusion, arXiv 2412.01199).

The adapters stand in for the training that follows, so that a block counts by what a trained model would miss of it.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize

from ppcl_train.config.settings import RunConfig
from ppcl_train.data import seeds
from ppcl_train.data.seeds import Purpose, Seed, Stage
from ppcl_train.engine.optimisers import adamw
from ppcl_train.selectors.uniform import uniform_intervals

# Blocks of a group, about: a group keeps N of its M blocks, as in TinyFusion's 2:4.
_GROUP = 4
# The temperature falls from the first to the second over training (TinyFusion).
_TEMPERATURES = (4.0, 0.1)

# Trains named parameters: (parameters by name, number of a batch -> loss, optimisers).
Train = Callable[[Mapping[str, nn.Parameter], Callable[[int], float], Sequence[torch.optim.Optimizer]], None]


class Gates(nn.Module):
    """Learnt probabilities of which blocks are kept: N of the M blocks of each group (TinyFusion's N:M).

    Every group has a logit for each choice of N blocks out of its M. A draw is hard; its gradient is that of the Gumbel
    softmax (straight through).

    Args:
        depth: number of blocks.
        kept: number of blocks that are kept, over all groups.
        groups: number of groups.
    """

    def __init__(self, depth: int, kept: int, groups: int) -> None:
        super().__init__()
        self.groups = uniform_intervals(depth, groups)
        bounds = [round(n * kept / groups) for n in range(groups + 1)]
        # Of each group, a mask over its blocks for every choice: [choices, M], 1 for kept.
        self.choices = [
            torch.tensor([[float(n in chosen) for n in group] for chosen in itertools.combinations(group, count)])
            for group, count in zip(self.groups, (b - a for a, b in itertools.pairwise(bounds)), strict=True)
        ]
        self.logits = nn.ParameterList(torch.zeros(len(choices)) for choices in self.choices)

    def draw(self, temperature: float, rng: np.random.Generator) -> torch.Tensor:
        """Draw a mask over all blocks, ``[depth]``, 1 for kept."""
        masks = []
        for logits, choices in zip(self.logits, self.choices, strict=True):
            uniform = torch.from_numpy(rng.random(len(choices), dtype=np.float32)).clamp(1e-9, 1 - 1e-9)
            soft = F.softmax((logits - (-uniform.log()).log()) / temperature, dim=0)
            hard = F.one_hot(soft.argmax(), len(choices)).to(soft)
            masks.append((hard - soft.detach() + soft) @ choices)
        return torch.cat(masks)

    def likeliest(self) -> list[int]:
        """List the blocks that the likeliest choice of every group keeps."""
        mask = torch.cat([choices[logits.argmax()] for logits, choices in zip(self.logits, self.choices, strict=True)])
        return [int(n) for n in mask.nonzero()]


@contextlib.contextmanager
def gated(blocks: Sequence[nn.Module], mask: torch.Tensor) -> Iterator[None]:
    """Within the context, block ``n`` changes its streams by ``mask[n]`` times what it would change them by."""
    mask = mask.to(next(blocks[0].parameters()).device)

    def gate(n: int) -> Any:
        def hook(_: nn.Module, __: Any, kwargs: dict[str, Any], out: tuple[torch.Tensor, torch.Tensor]) -> Any:
            text, image = kwargs["encoder_hidden_states"], kwargs["hidden_states"]
            return text + mask[n] * (out[0] - text), image + mask[n] * (out[1] - image)

        return hook

    hooks = [block.register_forward_hook(gate(n), with_kwargs=True) for n, block in enumerate(blocks)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


class LowRankAdapter(nn.Module):
    """Adds ``B A`` of a low rank to a weight ``[out, in]``, zero at first (LoRA)."""

    def __init__(self, weight: torch.Tensor, rank: int, rng: np.random.Generator) -> None:
        super().__init__()
        self.a = nn.Parameter(
            torch.from_numpy(rng.standard_normal((rank, weight.shape[1]), dtype=np.float32)) / rank**0.5
        )
        self.b = nn.Parameter(torch.zeros(weight.shape[0], rank))

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        """Return the adapted weight."""
        return weight + self.b @ self.a


def _adapt(blocks: Sequence[nn.Module], rank: int, rng: np.random.Generator) -> tuple[list[nn.Module], dict[str, Any]]:
    """Put an adapter on every linear layer; returns the layers, and the adapters' parameters by name."""
    layers = {
        f"{n}.{path}": layer
        for n, block in enumerate(blocks)
        for path, layer in block.named_modules()
        if isinstance(layer, nn.Linear)
    }
    parameters: dict[str, nn.Parameter] = {}
    for name, layer in layers.items():
        adapter = LowRankAdapter(layer.weight, rank, rng).to(layer.weight.device)
        parametrize.register_parametrization(layer, "weight", adapter)
        parameters |= {f"{name}.a": adapter.a, f"{name}.b": adapter.b}
    return list(layers.values()), parameters


def learn_gates(run: RunConfig, model: Any, kept: int, loss: Callable[[int], torch.Tensor], train: Train) -> list[int]:
    """Learn which blocks to keep, over `CompareConfig.distil_steps` steps.

    The adapters are merged into the model at the end, so that what they learnt is kept.

    Args:
        model: changed in place.
        kept: number of blocks to keep.
        loss: number of a batch -> loss of the model as it is now.
        train: see `Train`.

    Returns:
        The blocks to keep.
    """
    config, blocks = run.compare, model.blocks()
    gates = Gates(len(blocks), kept, max(1, min(len(blocks) // _GROUP, kept)))
    layers, adapters = _adapt(blocks, config.rank, seeds.generator(run.seed, Seed(Stage.GATES), Purpose.START))
    first, last = _TEMPERATURES

    def step_loss(number: int) -> float:
        temperature = first + (last - first) * number / config.distil_steps
        mask = gates.draw(temperature, seeds.generator(run.seed, Seed(Stage.GATES, number), Purpose.PLAN))
        with gated(blocks, mask):
            value = loss(number)
            value.backward()
        return value.item()

    optimisers = [
        adamw(parameters, lr=lr)
        for parameters, lr in ((gates.parameters(), config.gate_lr), (adapters.values(), run.students.lr))
    ]
    train({**dict(gates.named_parameters()), **adapters}, step_loss, optimisers)
    for layer in layers:
        parametrize.remove_parametrizations(layer, "weight", leave_parametrized=True)
    return gates.likeliest()
