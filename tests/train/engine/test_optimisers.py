"""Optimisers and schedules: built in one place, and resumed at any step."""

import functools

import pytest
import torch
from torch import nn

from ppcl_train.engine.optimisers import adamw, cosine, schedule, take_step


def rates(optimiser, rate, steps):
    """The learning rates of some steps; the weights and the optimiser's state do not matter."""
    planned = schedule(optimiser, rate, steps.start)
    found = []
    for _ in steps:
        found.append([group["lr"] for group in optimiser.param_groups])
        take_step([optimiser])
        planned.step()
    return found


def test_matrices_decay_and_biases_do_not():
    layer = nn.Linear(3, 3)
    optimiser = adamw(layer.parameters(), lr=0.1, weight_decay=0.5)
    for parameter in layer.parameters():
        parameter.grad = torch.zeros_like(parameter)
    before = {name: p.detach().clone() for name, p in layer.named_parameters()}
    take_step([optimiser])
    assert torch.equal(layer.weight, before["weight"] * (1 - 0.1 * 0.5)) and torch.equal(layer.bias, before["bias"])
    assert all(parameter.grad is None for parameter in layer.parameters())


@pytest.mark.parametrize("done", [0, 1, 7, 12])
def test_a_schedule_that_begins_later_goes_on_as_if_it_had_not_stopped(done):
    rate = functools.partial(cosine, steps=12, warmup=3)
    layers = nn.Linear(2, 2), nn.Linear(2, 2)
    whole, rest = (
        rates(adamw(layer.parameters(), lr=0.3), rate, steps)
        for layer, steps in zip(layers, (range(12), range(done, 12)))
    )
    assert rest == whole[done:]
    # The same bits as peak * rate(step).
    assert [lr for lr, _ in whole] == [0.3 * rate(step) for step in range(12)]


def test_a_loop_of_no_steps_has_a_rate():
    assert cosine(0, 0, 0) == 1.0
