"""The table of implementations: looked up, measured once, remembered on disk, forced by PPCL_BACKEND."""

import json
import subprocess
import sys

import pytest
import torch

import ppcl_kernels as kernels
from ppcl_rt.ops import table as ways
from ppcl_rt.ops.linear import LINEARS, Linears
from ppcl_rt.ops.table import CUBLAS, TORCH, TRITON, Key, Table, Way

SMALL, LARGE = Way("triton", (64, 64)), Way("triton", (128, 128))
MILLISECONDS = {TORCH: 3.0, CUBLAS: 2.0, SMALL: 1.0, LARGE: 5.0}


KEY = Key("linear bfloat16 gelu", (1, 4096, 3072, 12288))


@pytest.fixture
def make_table(tmp_path):
    """A table whose clock believes what `call` returns, and the list of what it timed."""
    timed = []

    def clock(call):
        way = call()
        timed.append(way)
        return MILLISECONDS[way]

    return lambda **more: Table(tmp_path / "cache" / "ways.json", {"device": "none"}, clock, **more), timed


def itself(way):
    return way


def test_measures_once_and_remembers(make_table, tmp_path):
    make, timed = make_table
    table = make()
    for _ in range(2):
        assert table.fastest(KEY, lambda: MILLISECONDS, itself) == SMALL
    assert timed == list(MILLISECONDS)
    assert make().fastest(KEY, lambda: MILLISECONDS, itself) == SMALL
    assert len(timed) == len(MILLISECONDS)
    written = json.loads((tmp_path / "cache" / "ways.json").read_text())
    assert written["about"] == {"device": "none"}
    assert written["ways"][str(KEY)]["milliseconds"] == {str(k): v for k, v in MILLISECONDS.items()}


def test_measures_again_without_the_winner(make_table):
    """A remembered winner that is not among the implementations is no answer."""
    make, _ = make_table
    make().fastest(KEY, lambda: MILLISECONDS, itself)
    assert make().fastest(KEY, lambda: [TORCH, CUBLAS], itself) == CUBLAS


def test_leaves_out_what_fails(make_table, caplog):
    make, _ = make_table

    def call(way):
        if way == SMALL:
            raise RuntimeError("out of shared memory")
        return way

    assert make().fastest(KEY, lambda: MILLISECONDS, call) == CUBLAS
    assert f"{KEY}: triton 64x64 failed and is left out: out of shared memory" in caplog.text


def test_leaves_out_what_is_wrong(make_table, caplog):
    """A kernel that computes something else is not the fastest, however fast; one that rounds is."""
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
    assert table.fastest(KEY, lambda: MILLISECONDS, results.__getitem__) == CUBLAS
    for tile in ("64x64", "128x128"):
        assert f"{KEY}: triton {tile} failed and is left out: its result is not that of plain torch" in caplog.text


def test_checks_again_after_timing(make_table, caplog):
    """What goes wrong only under load is found by the check that follows the clock."""
    wanted, calls = torch.randn(4, 64, generator=torch.Generator().manual_seed(0)), []

    def call(way):
        calls.append(way)
        return wanted.roll(1, 0) if way == SMALL and calls.count(SMALL) > 2 else wanted

    make, _ = make_table
    table = make()

    def clock(call):
        call()
        return MILLISECONDS[call.args[0]]

    table.clock = clock
    assert table.fastest(KEY, lambda: MILLISECONDS, call) == CUBLAS
    assert "triton 64x64 failed and is left out: its result is not that of plain torch" in caplog.text


@pytest.mark.parametrize("fault", ["garbage", "zero", "nan", "scaled"])
@pytest.mark.parametrize("shape", [(2, 200, 320), (1, 130, 3, 50), (90, 70)])
def test_agree_judges_every_tile(shape, fault):
    """One wrong 32 x 32 corner of many tiles is found; roundings of bf16 are not."""
    torch.manual_seed(0)
    wanted = torch.randn(shape)
    assert ways.agree(wanted.bfloat16(), wanted)
    broken = wanted.clone()
    rows = broken.flatten(2)[-1] if broken.dim() > 2 else broken
    corner = rows[-32:, -32:]
    corner.copy_(
        {"garbage": torch.randn(32, 32), "zero": torch.zeros(32, 32), "nan": corner / 0 * 0, "scaled": corner * 1.5}[
            fault
        ]
    )
    assert not ways.agree(broken, wanted)
    assert not ways.agree([wanted, broken], [wanted, wanted])


def test_agree_minds_quiet_tiles():
    """Where a few channels are a hundred times the others, as in large transformers, the others are judged too."""
    torch.manual_seed(0)
    wanted = torch.randn(1, 256, 512)
    wanted[..., :3] *= 100
    broken = wanted.clone()
    broken[:, 64:128, 128:192] = 0
    assert ways.agree(wanted.bfloat16(), wanted) and not ways.agree(broken, wanted)
    # Rounding errors of a tile whose own values cancel out are those of its neighbours.
    quiet = wanted.clone()
    quiet[:, 64:128, 128:192] *= 1e-3
    assert ways.agree(quiet + 1e-3 * torch.randn(quiet.shape), quiet)


def test_torch_is_right_by_definition(make_table):
    """Activations that overflowed are no reason to stop, and a stream without tokens agrees with itself."""
    results = dict.fromkeys((TORCH, CUBLAS), torch.full((2, 3), float("nan")))
    make, _ = make_table
    table = make()
    table.clock = lambda call: MILLISECONDS[call.args[0]]
    assert table.fastest(KEY, lambda: [CUBLAS, TORCH], results.__getitem__) == TORCH
    assert ways.agree([torch.zeros(0, 3)], [torch.zeros(0, 3)]) and ways.agree(torch.zeros(2), torch.zeros(2))


def test_says_when_nothing_works(make_table):
    make, _ = make_table

    def call(way):
        raise RuntimeError("no")

    with pytest.raises(RuntimeError, match=r"no implementation of linear .* works here"):
        make().fastest(KEY, lambda: [CUBLAS], call)


def test_two_processes_merge(make_table, tmp_path):
    make, _ = make_table
    first, second = make(), make()
    first.fastest(Key("a", (1,)), lambda: [TORCH], itself)
    second.fastest(Key("b", (1,)), lambda: [CUBLAS], itself)
    assert set(json.loads((tmp_path / "cache" / "ways.json").read_text())["ways"]) == {"a 1", "b 1"}


@pytest.mark.parametrize(
    "damage",
    ["", "{", "[]", '{"ways": 3}', '{"ways": {"linear 1": {"way": 3}}}', '{"ways": {"x": {"way": "torch"}}}', "\x00"],
)
def test_damaged_file_is_measured_again(make_table, tmp_path, damage):
    make, timed = make_table
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "ways.json").write_text(damage)
    assert make().fastest(KEY, lambda: MILLISECONDS, itself) == SMALL
    assert timed
    assert make().recall(KEY, lambda: MILLISECONDS) == SMALL


def test_cannot_write(make_table, tmp_path, caplog):
    """A folder that cannot be made costs the memory of it, not the answer."""
    make, _ = make_table
    (tmp_path / "cache").write_text("a file in the way")
    assert make().fastest(KEY, lambda: MILLISECONDS, itself) == SMALL
    assert "cannot keep what was measured" in caplog.text


def test_recall_does_not_measure(make_table):
    make, timed = make_table
    assert make().recall(KEY, lambda: MILLISECONDS) is None
    assert not timed


def sized(*sizes):
    return KEY._replace(sizes=sizes)


def test_neighbours_come_before_the_clock(make_table, caplog):
    """Another prompt length is no reason to time anything: the closest shape that is known stands in for it."""
    make, timed = make_table
    make().fastest(sized(1, 4096, 64, 64), lambda: [CUBLAS], itself)
    make().fastest(sized(1, 1024, 64, 64), lambda: [LARGE], itself)
    timed.clear()
    table = make()
    assert table.fastest(sized(1, 4608, 64, 64), lambda: MILLISECONDS, lambda way: torch.ones(1)) == CUBLAS
    assert table.fastest(sized(1, 1100, 64, 64), lambda: MILLISECONDS, lambda way: torch.ones(1)) == LARGE
    assert table.recall(sized(1, 1111, 64, 64), lambda: MILLISECONDS) == LARGE
    assert not timed
    # Too far off in one size; another form.
    assert table.fastest(sized(1, 9300, 64, 64), lambda: MILLISECONDS, itself) == SMALL
    assert table.fastest(Key("linear bfloat16 no-gelu", (1, 4096, 64, 64)), lambda: MILLISECONDS, itself) == SMALL
    assert len(timed) == 2 * len(MILLISECONDS)


def test_a_neighbour_is_checked_before_it_is_taken(make_table, caplog):
    make, timed = make_table
    make().fastest(sized(1, 4096, 64, 64), lambda: [CUBLAS], itself)
    timed.clear()
    table = make()
    table.clock = lambda call: MILLISECONDS[call.args[0]]
    wanted = {TORCH: torch.ones(4), CUBLAS: torch.zeros(4), SMALL: torch.ones(4), LARGE: torch.ones(4)}
    assert table.fastest(sized(1, 4608, 64, 64), lambda: MILLISECONDS, wanted.__getitem__) == SMALL
    assert "cublas, known from elsewhere, failed and is left out: its result is not that of plain torch" in caplog.text


def test_shipped_table_comes_before_the_clock(make_table, tmp_path):
    """What this machine measured goes first, then what the package ships, at the shape and then near it."""
    make, timed = make_table
    shipped = tmp_path / "nvidia-h100.json"
    entries = {str(KEY): {"way": str(LARGE)}, str(sized(2, 4096, 64, 64)): {"way": "no longer there"}}
    shipped.write_text(json.dumps({"about": {}, "ways": entries}))
    table = make(shipped=shipped)
    assert table.fastest(KEY, lambda: MILLISECONDS, lambda way: torch.ones(1)) == LARGE
    assert table.recall(sized(1, 4000, 3000, 12000), lambda: MILLISECONDS) == LARGE
    assert not timed
    assert table.fastest(sized(2, 4096, 64, 64), lambda: MILLISECONDS, itself) == SMALL
    make().measure(KEY, [TORCH], itself)
    assert make(shipped=shipped).recall(KEY, lambda: MILLISECONDS) == TORCH


def test_choices_are_counted(make_table):
    """A forward over which the count stands still ran nothing that was not known."""
    make, _ = make_table
    table, before = make(), ways.choices()
    table.fastest(KEY, lambda: MILLISECONDS, itself)
    assert ways.choices() == before + 1
    table.fastest(KEY, lambda: MILLISECONDS, itself)
    table.recall(sized(1, 2, 3, 4), lambda: MILLISECONDS)
    assert ways.choices() == before + 1


def test_keys_come_back():
    assert Key.parse(str(KEY)) == KEY
    for text in ("linear", "linear 3xq", ""):
        with pytest.raises(ValueError):
            Key.parse(text)


def test_shipped_tables_are_named_after_devices():
    assert ways.shipped_table("NVIDIA H100 80GB HBM3").name == "nvidia-h100-80gb-hbm3.json"
    for path in ways.SHIPPED.glob("*.json"):
        content = json.loads(path.read_text())
        assert ways.shipped_table(content["about"]["device"]) == path
        assert len(Table._read(path)) == len(content["ways"]) > 0


@pytest.mark.parametrize(("asked", "taken"), [(None, TORCH), ("auto", TORCH), ("torch", TORCH), ("triton", TRITON)])
def test_backend_forces(monkeypatch, asked, taken):
    """On a CPU, where nothing is measured."""
    if asked is None:
        monkeypatch.delenv("PPCL_BACKEND", raising=False)
    else:
        monkeypatch.setenv("PPCL_BACKEND", asked)
    monkeypatch.setattr(ways, "table_of", lambda index: pytest.fail("measured"))
    call = Linears((kernels.Linear(torch.zeros(1, 2, 4), torch.zeros(3, 4)),))
    assert LINEARS.choose(call) == taken
    # What no kernel takes stays plain torch.
    assert LINEARS.choose(Linears((kernels.Linear(*(t.double() for t in call.groups[0][:2])),))) == TORCH


def test_backend_is_checked(monkeypatch):
    monkeypatch.setenv("PPCL_BACKEND", "cuda")
    with pytest.raises(ValueError, match='PPCL_BACKEND is "cuda", wanted one of auto, torch, triton'):
        LINEARS(Linears((kernels.Linear(torch.zeros(1, 2, 4), torch.zeros(3, 4)),)))


def test_forced_kernels_need_a_device(monkeypatch):
    """Nobody who asks for kernels gets plain torch without a word."""
    monkeypatch.setenv("PPCL_BACKEND", "triton")
    monkeypatch.setattr("ppcl_kernels.launch.INTERPRETED", False)
    with pytest.raises(ValueError, match="PPCL_BACKEND is triton, but the model is on cpu: move it to a GPU"):
        LINEARS(Linears((kernels.Linear(torch.zeros(1, 2, 4), torch.zeros(3, 4)),)))


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
