"""Brain surgery in chunks is brain surgery one unit at a time."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from ppcl_train.closed_form import surgery

RIDGE = 1e-4


def problem(inputs, outputs, seed):
    """A layer and the Gram matrix of what it reads, through a GELU, from half as many free dimensions."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(inputs // 2, inputs, generator=generator)
    x = F.gelu(torch.randn(4 * inputs, inputs // 2, generator=generator) @ mix - 0.3).double()
    x = torch.cat([x, torch.ones(len(x), 1, dtype=torch.float64)], 1)
    weight, bias = torch.randn(outputs, inputs, generator=generator), torch.randn(outputs, generator=generator)
    return SimpleNamespace(weight=weight, bias=bias), x.T @ x


def greedy(problems, units, least):
    """Units in the order in which they go, from the definition: each time all that is left is solved for anew."""
    prepared = []
    for layer, gram in problems:
        mean = gram[:-1, -1] / gram[-1, -1]
        covariance = gram[:-1, :-1] / gram[-1, -1] - torch.outer(mean, mean)
        covariance += RIDGE * covariance.diagonal().mean() * torch.eye(len(covariance), dtype=torch.float64)
        prepared.append((layer.weight.double(), covariance))
    e, left, gone = prepared[0][0].shape[1] // units, list(range(units)), []
    while len(left) > least:
        cost = torch.zeros(len(left), dtype=torch.float64)
        columns = torch.tensor([unit * e + k for unit in left for k in range(e)])
        for full, covariance in prepared:
            inverse = torch.linalg.inv(covariance[columns][:, columns])
            weight = full @ covariance[:, columns] @ inverse
            scale = (full @ covariance * full).sum()
            for n in range(len(left)):
                own = slice(n * e, (n + 1) * e)
                part = weight[:, own]
                cost[n] += (part @ torch.linalg.inv(inverse[own, own]) * part).sum() / scale
        gone.append(left.pop(int(cost.argmin())))
    return gone


@pytest.mark.parametrize(
    ("inputs", "units", "layers"), [(40, 40, 1), (36, 12, 2), (64, 2, 1)], ids=["channels", "heads", "wide units"]
)
def test_chunks_take_the_same_units_as_one_at_a_time(inputs, units, layers, monkeypatch):
    """Several chunks, the last one cut short; a unit of more inputs than a chunk has."""
    monkeypatch.setattr(surgery, "_CHUNK", 7)
    problems = [problem(inputs, 5 + n, seed=n) for n in range(layers)]
    counts = sorted({max(1, units // 2), max(1, units // 6)}, reverse=True)
    order, found = surgery.eliminate(problems, units, counts, RIDGE)
    gone = greedy(problems, units, counts[-1])
    assert sorted(order.tolist()) == list(range(units)) and order[counts[-1] :].tolist() == gone[::-1]
    for (layer, gram), by_count in zip(problems, found, strict=True):
        for count, (weight, bias) in by_count.items():
            e = inputs // units
            kept = (order[:count, None] * e + torch.arange(e)).flatten()
            mean = gram[:-1, -1] / gram[-1, -1]
            covariance = gram[:-1, :-1] / gram[-1, -1] - torch.outer(mean, mean)
            covariance += RIDGE * covariance.diagonal().mean() * torch.eye(inputs, dtype=torch.float64)
            full = layer.weight.double()
            wanted = full @ torch.linalg.solve(covariance[kept][:, kept], covariance[kept]).T
            # Double precision, and a condition of 1e5 or so that the ridge leaves.
            torch.testing.assert_close(weight, wanted, atol=1e-9, rtol=1e-9)
            torch.testing.assert_close(bias + weight @ mean[kept], layer.bias.double() + full @ mean)


def test_chunks_of_any_size_give_one_result(monkeypatch):
    """Rounding alone differs."""
    results = []
    for chunk in (1, 16, 200):
        monkeypatch.setattr(surgery, "_CHUNK", chunk)
        results.append(surgery.eliminate([problem(160, 40, seed=3)], 160, [80, 20], RIDGE))
    for order, (found,) in results[1:]:
        assert torch.equal(order, results[0][0])
        assert (found[20][0] - results[0][1][0][20][0]).abs().max() < 1e-10


def test_nothing_to_remove_is_a_rank_order_alone():
    order, (found,) = surgery.eliminate([problem(6, 3, seed=0)], 6, [], RIDGE)
    assert sorted(order.tolist()) == list(range(6)) and not found


def test_a_ridge_that_is_too_small_is_refused_in_one_line():
    layer, gram = problem(8, 3, seed=0)
    gram[0] = gram[:, 0] = 0
    gram[0, 0] = -1.0
    with pytest.raises(ValueError, match=r"raise width\.ridge"):
        surgery.eliminate([(layer, gram)], 8, [4], 1e-6)
