"""Keys as text, and the backend that ``PPCL_BACKEND`` forces."""

import subprocess
import sys

import pytest
import torch

import ppcl_kernels as kernels
from ppcl_rt.ops import operation
from ppcl_rt.ops.implementation import TORCH, TRITON, Key
from ppcl_rt.ops.linear import LINEARS, Linears

KEY = Key("linear bfloat16 gelu", (1, 4096, 3072, 12288))


def test_keys_come_back():
    assert Key.parse(str(KEY)) == KEY
    for text in ("linear", "linear 3xq", ""):
        with pytest.raises(ValueError):
            Key.parse(text)


@pytest.mark.parametrize(("asked", "taken"), [(None, TORCH), ("auto", TORCH), ("torch", TORCH), ("triton", TRITON)])
def test_backend_forces(monkeypatch, asked, taken):
    """Which implementation is chosen on a CPU, where nothing is measured."""
    if asked is None:
        monkeypatch.delenv("PPCL_BACKEND", raising=False)
    else:
        monkeypatch.setenv("PPCL_BACKEND", asked)
    monkeypatch.setattr(operation, "table_of", lambda index: pytest.fail("measured"))
    call = Linears((kernels.Linear(torch.zeros(1, 2, 4), torch.zeros(3, 4)),))
    assert LINEARS.choose(call) == taken
    # float64, which no kernel takes, stays plain torch.
    assert LINEARS.choose(Linears((kernels.Linear(*(t.double() for t in call.groups[0][:2])),))) == TORCH


def test_backend_is_checked(monkeypatch):
    monkeypatch.setenv("PPCL_BACKEND", "cuda")
    with pytest.raises(ValueError, match='PPCL_BACKEND is "cuda", wanted one of auto, torch, triton'):
        LINEARS(Linears((kernels.Linear(torch.zeros(1, 2, 4), torch.zeros(3, 4)),)))


def test_forced_kernels_need_a_device(monkeypatch):
    """A user who forces kernels gets an error where none can run, not plain torch in silence."""
    monkeypatch.setenv("PPCL_BACKEND", "triton")
    monkeypatch.setattr("ppcl_kernels.launch.INTERPRETED", False)
    with pytest.raises(ValueError, match="PPCL_BACKEND is triton, but the model is on cpu: move it to a GPU"):
        LINEARS(Linears((kernels.Linear(torch.zeros(1, 2, 4), torch.zeros(3, 4)),)))


def test_no_driver_without_a_gpu():
    """Running an operation on a CPU does not make triton look for a driver."""
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    script = """
import torch, ppcl_rt
from ppcl_rt import ops
from torch import nn
ops.linears([ops.Layer(nn.Linear(4, 4), torch.zeros(1, 2, 4))])
from triton.runtime import driver
assert driver._active is None, "a driver was made"
"""
    subprocess.run([sys.executable, "-c", script], check=True)
