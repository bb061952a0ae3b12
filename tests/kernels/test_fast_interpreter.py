"""The interpreter that the tests of kernels run in computes what triton's own does, bit by bit."""

import fast_interpreter
import pytest
import torch

import ppcl_kernels as kernels
from ppcl_kernels._triton import INTERPRETED, triton

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="kernels run on the GPU")


def results() -> list[torch.Tensor]:
    """Of kernels with device functions, descriptors, reductions, conversions and a mask."""
    generator = torch.Generator().manual_seed(0)
    x, weight, vector = (torch.randn(*shape, generator=generator) for shape in ((2, 19, 32), (40, 32), (2, 32)))
    q = torch.randn(2, 33, 1, 16, generator=generator).half()
    mask = torch.rand(2, 33, generator=generator) < 0.7
    return [
        kernels.linear(x, weight, activation="gelu"),
        kernels.linear(x.half(), weight.half(), None, 35),
        kernels.ada_layer_norm(x, vector, -vector),
        kernels.joint_attention(q, q, q, mask),
    ]


def test_the_language_is_restored_after_a_launch():
    """Else what compiles in the same process meets interpreted functions. First: triton's own does leave some."""
    language = triton.language
    results()
    for of, least in ((language, 50), (language.core, 50), (language.tensor, 20), (language.math, 10)):
        assert sum(language.core.is_builtin(member) for member in vars(of).values()) > least, of


def test_results_are_those_of_tritons_own():
    assert fast_interpreter.replaced, "this version of triton is not known"
    mine = results()
    with fast_interpreter.as_it_comes():
        wanted = results()
    again = results()
    for one, other, third in zip(mine, wanted, again, strict=True):
        assert torch.isfinite(one).all() and torch.equal(one, other) and torch.equal(one, third)
