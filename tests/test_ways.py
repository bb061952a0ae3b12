"""The table of measured ways: measured once, remembered on disk, forced by PPCL_BACKEND."""

import json
import subprocess
import sys

import pytest
import torch

from ppcl_rt import ways
from ppcl_rt.ways import CUBLAS, TORCH, TRITON, Table, Way

SMALL, LARGE = Way("triton", (64, 64)), Way("triton", (128, 128))
MILLISECONDS = {TORCH: 3.0, CUBLAS: 2.0, SMALL: 1.0, LARGE: 5.0}


@pytest.fixture
def make_table(tmp_path):
    """A table whose clock believes what `call` returns, and the list of what it timed."""
    timed = []

    def clock(call):
        way = call()
        timed.append(way)
        return MILLISECONDS[way]

    return lambda: Table(tmp_path / "cache" / "ways.json", {"device": "none"}, clock), timed


def test_measures_once_and_remembers(make_table, tmp_path):
    make, timed = make_table
    table = make()
    for _ in range(2):
        assert table.fastest("linear 1", lambda: MILLISECONDS, lambda way: way) == SMALL
    assert timed == list(MILLISECONDS)
    assert make().fastest("linear 1", lambda: MILLISECONDS, lambda way: way) == SMALL
    assert len(timed) == len(MILLISECONDS)
    written = json.loads((tmp_path / "cache" / "ways.json").read_text())
    assert written["about"] == {"device": "none"}
    assert written["ways"]["linear 1"]["milliseconds"] == {str(k): v for k, v in MILLISECONDS.items()}


def test_measures_again_without_the_winner(make_table):
    """A remembered winner that is not among the ways is no answer."""
    make, _ = make_table
    make().fastest("linear 1", lambda: MILLISECONDS, lambda way: way)
    assert make().fastest("linear 1", lambda: [TORCH, CUBLAS], lambda way: way) == CUBLAS


def test_leaves_out_what_fails(make_table, caplog):
    make, _ = make_table

    def call(way):
        if way == SMALL:
            raise RuntimeError("out of shared memory")
        return way

    assert make().fastest("linear 1", lambda: MILLISECONDS, call) == CUBLAS
    assert "linear 1: triton 64x64 failed and is left out: out of shared memory" in caplog.text


def test_leaves_out_what_is_wrong(make_table, caplog):
    """A kernel that computes something else is not the fastest way, however fast; one that rounds is."""
    torch.manual_seed(0)
    wanted = torch.randn(4, 64)
    results = {
        TORCH: [wanted, wanted],
        CUBLAS: [wanted.bfloat16(), wanted.bfloat16()],
        SMALL: [wanted, wanted.roll(1, 0)],
        LARGE: [wanted, torch.full_like(wanted, float("nan"))],
    }
    make, _ = make_table
    table = make()
    table.clock = lambda call: MILLISECONDS[call.args[0]]
    assert table.fastest("linear 1", lambda: MILLISECONDS, results.__getitem__) == CUBLAS
    for tile in ("64x64", "128x128"):
        assert f"linear 1: triton {tile} failed and is left out: its result is not that of plain torch" in caplog.text


def test_torch_is_right_by_definition(make_table):
    """Activations that overflowed are no reason to stop, and a stream without tokens agrees with itself."""
    results = dict.fromkeys((TORCH, CUBLAS), torch.full((2, 3), float("nan")))
    make, _ = make_table
    table = make()
    table.clock = lambda call: MILLISECONDS[call.args[0]]
    assert table.fastest("nan", lambda: [CUBLAS, TORCH], results.__getitem__) == TORCH
    assert ways.agree([torch.zeros(0, 3)], [torch.zeros(0, 3)]) and ways.agree(torch.zeros(2), torch.zeros(2))


def test_says_when_nothing_works(make_table):
    make, _ = make_table

    def call(way):
        raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no way to run linear 1 works here"):
        make().fastest("linear 1", lambda: [CUBLAS], call)


def test_two_processes_merge(make_table, tmp_path):
    make, _ = make_table
    first, second = make(), make()
    first.fastest("a", lambda: [TORCH], lambda way: way)
    second.fastest("b", lambda: [CUBLAS], lambda way: way)
    assert set(json.loads((tmp_path / "cache" / "ways.json").read_text())["ways"]) == {"a", "b"}


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"ways": 3}', '{"ways": {"linear 1": {"way": 3}}}', "\x00"])
def test_damaged_file_is_measured_again(make_table, tmp_path, damage):
    make, timed = make_table
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "ways.json").write_text(damage)
    assert make().fastest("linear 1", lambda: MILLISECONDS, lambda way: way) == SMALL
    assert timed
    assert make().recall("linear 1", lambda: MILLISECONDS) == SMALL


def test_cannot_write(make_table, tmp_path, caplog):
    """A folder that cannot be made costs the memory of it, not the answer."""
    make, _ = make_table
    (tmp_path / "cache").write_text("a file in the way")
    assert make().fastest("linear 1", lambda: MILLISECONDS, lambda way: way) == SMALL
    assert "cannot keep what was measured" in caplog.text


def test_recall_does_not_measure(make_table):
    make, timed = make_table
    assert make().recall("linear 1", lambda: MILLISECONDS) is None
    assert not timed


def choose(able: bool = True) -> Way:
    """Which way an operation on a CPU tensor is run."""
    return ways.run(
        "linear",
        torch.zeros(1),
        able=lambda: able,
        shape=lambda: pytest.fail("measured"),
        others=(CUBLAS, TORCH),
        tiles=lambda: pytest.fail("measured"),
        call=lambda way: way,
    )


@pytest.mark.parametrize(
    ("asked", "able", "taken"),
    [
        (None, True, TORCH),
        ("auto", True, TORCH),
        ("torch", True, TORCH),
        ("triton", True, TRITON),
        ("triton", False, TORCH),
    ],
)
def test_backend_forces(monkeypatch, asked, able, taken):
    """On a CPU, where nothing is measured; what no kernel can read stays plain torch."""
    if asked is None:
        monkeypatch.delenv("PPCL_BACKEND", raising=False)
    else:
        monkeypatch.setenv("PPCL_BACKEND", asked)
    assert choose(able) == taken


def test_backend_is_checked(monkeypatch):
    monkeypatch.setenv("PPCL_BACKEND", "cuda")
    with pytest.raises(ValueError, match='PPCL_BACKEND is "cuda", wanted one of auto, torch, triton'):
        choose()


def test_forced_kernels_need_a_device(monkeypatch):
    """Nobody who asks for kernels gets plain torch without a word."""
    monkeypatch.setenv("PPCL_BACKEND", "triton")
    monkeypatch.setattr("ppcl_kernels.launch.INTERPRETED", False)
    with pytest.raises(ValueError, match="PPCL_BACKEND is triton, but the model is on cpu: move it to a GPU"):
        choose()


def test_bucket():
    assert [ways.bucket(n) for n in (0, 1, 64, 65, 100, 512, 513, 4096, 4097, 4608)] == [
        64, 64, 64, 80, 112, 512, 640, 4096, 5120, 5120,
    ]  # fmt: skip
    for tokens in range(1, 9000, 7):
        assert tokens <= ways.bucket(tokens) < max(1.25 * tokens, 65)


def test_digest_follows_the_source(monkeypatch, tmp_path):
    before = ways.source_digest()
    (tmp_path / "__init__.py").write_text("# another kernel")
    monkeypatch.setattr(ways.ppcl_kernels, "__file__", str(tmp_path / "__init__.py"))
    assert ways.source_digest() != before


def test_cache_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("PPCL_CACHE", raising=False)
    assert ways.cache_folder() == tmp_path / "ppcl_rt"
    monkeypatch.setenv("PPCL_CACHE", str(tmp_path / "mine"))
    assert ways.cache_folder() == tmp_path / "mine"


def test_no_driver_without_a_gpu():
    """Loading and running a model on a CPU asks triton for no driver."""
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
