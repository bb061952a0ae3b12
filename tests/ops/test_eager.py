"""Plain torch on a CPU gives what the references of the kernels give."""

import pytest
import torch

import ppcl_kernels as kernels
from ppcl_rt.ops import eager

HEADS, E, DIM = 4, 8, 24


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


def close(got, wanted):
    # Float32 sums of a few dozen terms in another order.
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)


def stream(tokens, batch, norms, rope, seed):
    torch.manual_seed(seed)
    table = torch.view_as_real(torch.polar(torch.ones(tokens, E // 2), torch.rand(tokens, E // 2)))
    return kernels.Stream(
        torch.randn(batch, tokens, DIM),
        tuple(torch.randn(HEADS * E, DIM) for _ in range(3)),
        tuple(torch.randn(HEADS * E) for _ in range(3)),
        (torch.randn(E), torch.randn(E)) if norms else (None, None),
        table if rope else None,
    )


@pytest.mark.parametrize("batch, heads", [(1, HEADS), (3, HEADS), (3, 1)])
@pytest.mark.parametrize("norms, rope", [(True, True), (False, True), (True, False)])
def test_qkv_projection(batch, heads, norms, rope):
    streams = (stream(3, batch, norms, rope, 0), stream(5, batch, norms, rope, 1))
    weights = [w.clone() for s in streams for w in (*s.weights, s.x)]
    assert eager.takes_qkv(streams, heads, E)
    for got, wanted in zip(
        eager.qkv_projection(streams, heads, E), kernels.qkv_projection_reference(streams, heads, E), strict=True
    ):
        close(got, wanted)
    # What is done in place is done to results alone.
    assert all(torch.equal(a, b) for a, b in zip(weights, (w for s in streams for w in (*s.weights, s.x)), strict=True))


def test_qkv_projection_leaves_what_it_cannot_do():
    whole, bare = stream(3, 2, True, True, 0), stream(5, 2, False, False, 1)
    assert not eager.takes_qkv((whole, bare), HEADS, E)
    assert not eager.takes_qkv((whole, whole._replace(queries=False)), HEADS, E)
    assert not eager.takes_qkv((whole,), HEADS + 1, E)


@pytest.mark.parametrize(
    "batch, expanded, index", [(1, False, False), (3, False, False), (3, True, False), (2, False, True)]
)
def test_ada_layer_norm(batch, expanded, index):
    x = torch.randn(batch, 5, DIM)
    scale, shift = torch.randn(2, (1 if expanded else batch) * (2 if index else 1), DIM)
    if expanded:
        scale, shift = scale.expand(batch, -1), shift.expand(batch, -1)
    which = torch.randint(2, (batch, 5)) if index else None
    close(eager.ada_layer_norm(x, scale, shift, which), kernels.ada_layer_norm_reference(x, scale, shift, which))


@pytest.mark.parametrize(
    "activation, gate, residual",
    [
        ("gelu", False, False),
        ("swiglu", False, False),
        ("swiglu", True, True),
        ("none", True, True),
        ("none", True, False),
        ("none", False, True),
    ],
)
@pytest.mark.parametrize("rows, columns", [(None, DIM), (7, DIM), (None, 9)])
def test_linear(activation, gate, residual, rows, columns):
    batch, n = 2, rows or 16
    added = torch.randn(batch, 5, n) if residual else None
    before = None if added is None else added.clone()
    g = kernels.Linear(
        torch.randn(batch, 5, columns),
        torch.randn(16, DIM),
        torch.randn(16),
        rows,
        torch.randn(batch, n) if gate else None,
        None,
        added,
        *((torch.randn(16, DIM), torch.randn(16)) if activation == "swiglu" else ()),
    )
    close(eager.linear(g, activation), g.reference(activation))
    assert added is None or torch.equal(added, before)


def test_linear_asks_for_no_more_than_there_is():
    with pytest.raises(ValueError, match="the weight holds"):
        eager.linear(kernels.Linear(torch.randn(1, 2, DIM), torch.randn(16, DIM), None, 17), "none")


def test_joined_is_a_view_where_it_can_be():
    whole = torch.randn(7, 3)
    view = eager.joined([whole[:2], whole[2:]])
    assert view.data_ptr() == whole.data_ptr() and torch.equal(view, whole)
    for apart in ([whole[2:], whole[:2]], [whole[:2], whole[3:]], [whole[:2], whole[2:].clone()]):
        assert torch.equal(eager.joined(apart), torch.cat(apart))


def test_half_precision_and_compiled_code_go_by_the_references():
    assert eager.suits(torch.zeros(1))
    assert not eager.suits(torch.zeros(1, dtype=torch.bfloat16))
    assert not eager.suits(torch.zeros(1, device="meta"))
