"""The table of implementations: looked up, measured once, remembered on disk."""

import json

import pytest
import torch

import ppcl_kernels
from ppcl_rt.ops.agreement import agree
from ppcl_rt.ops.implementation import CUBLAS, TORCH, Implementation, Key
from ppcl_rt.ops.table import SHIPPED, ImplementationTable, cache_folder, choices_made, shipped_table, source_digest

SMALL, LARGE = Implementation("triton", (64, 64)), Implementation("triton", (128, 128))
MILLISECONDS = {TORCH: 3.0, CUBLAS: 2.0, SMALL: 1.0, LARGE: 5.0}


KEY = Key("linear bfloat16 gelu", (1, 4096, 3072, 12288))


@pytest.fixture
def make_table(tmp_path):
    """Make tables whose clock looks up the time of the implementation that the call returns; list what is timed."""
    timed = []

    def clock(call):
        implementation = call()
        timed.append(implementation)
        return MILLISECONDS[implementation]

    path, about = tmp_path / "cache" / "implementations.json", {"device": "none"}
    return lambda **more: ImplementationTable(path, about, clock, **more), timed


def itself(implementation):
    return implementation


def test_measures_once_and_remembers(make_table, tmp_path):
    make, timed = make_table
    table = make()
    for _ in range(2):
        assert table.fastest(KEY, lambda: MILLISECONDS, itself) == SMALL
    assert timed == list(MILLISECONDS)
    assert make().fastest(KEY, lambda: MILLISECONDS, itself) == SMALL
    assert len(timed) == len(MILLISECONDS)
    written = json.loads((tmp_path / "cache" / "implementations.json").read_text())
    assert written["about"] == {"device": "none"}
    assert written["implementations"][str(KEY)]["milliseconds"] == {str(k): v for k, v in MILLISECONDS.items()}


def test_measures_again_without_the_winner(make_table):
    """A remembered winner that is not offered any more is not taken."""
    make, _ = make_table
    make().fastest(KEY, lambda: MILLISECONDS, itself)
    assert make().fastest(KEY, lambda: [TORCH, CUBLAS], itself) == CUBLAS


def test_leaves_out_what_fails(make_table, caplog):
    make, _ = make_table

    def call(implementation):
        if implementation == SMALL:
            raise RuntimeError("out of shared memory")
        return implementation

    assert make().fastest(KEY, lambda: MILLISECONDS, call) == CUBLAS
    assert f"{KEY}: triton 64x64 failed and is left out: out of shared memory" in caplog.text


@pytest.mark.parametrize("where", ["clock", "run"])
@pytest.mark.parametrize("error", [torch.OutOfMemoryError("full"), RuntimeError("Triton Error [CUDA]: out of memory")])
def test_full_memory_is_no_verdict(make_table, tmp_path, where, error):
    """In the clock, or in a comparison: nothing is remembered or written, and a later call measures everything."""
    make, timed = make_table
    table = make()
    clock, full = table.clock, [True]

    def call(implementation):
        if full and where == "run" and implementation == LARGE:
            raise error
        return implementation

    def full_clock(call):
        if full and len(timed) == 3:
            raise error
        return clock(call)

    table.clock = full_clock if where == "clock" else clock
    with pytest.raises(type(error)):
        table.fastest(KEY, lambda: MILLISECONDS, call)
    assert not (tmp_path / "cache").exists()
    full.clear()
    timed.clear()
    assert table.fastest(KEY, lambda: MILLISECONDS, call) == SMALL and timed == list(MILLISECONDS)


def test_full_memory_is_no_verdict_on_a_neighbour(make_table):
    make, timed = make_table
    make().measure(sized(1, 4096, 64, 64), [CUBLAS], itself)

    def call(implementation):
        if implementation == CUBLAS:
            raise torch.OutOfMemoryError("full")
        return implementation

    timed.clear()
    with pytest.raises(torch.OutOfMemoryError):
        make().fastest(sized(1, 4608, 64, 64), lambda: MILLISECONDS, call)
    assert not timed


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
    """A result that is wrong only under load is found by the check after the timing."""
    wanted, calls = torch.randn(4, 64, generator=torch.Generator().manual_seed(0)), []

    def call(implementation):
        calls.append(implementation)
        return wanted.roll(1, 0) if implementation == SMALL and calls.count(SMALL) > 2 else wanted

    make, _ = make_table
    table = make()

    def clock(call):
        call()
        return MILLISECONDS[call.args[0]]

    table.clock = clock
    assert table.fastest(KEY, lambda: MILLISECONDS, call) == CUBLAS
    assert "triton 64x64 failed and is left out: its result is not that of plain torch" in caplog.text


def test_torch_is_right_by_definition(make_table):
    """Plain torch is taken even where its result is NaN, and a stream without tokens agrees with itself."""
    results = dict.fromkeys((TORCH, CUBLAS), torch.full((2, 3), float("nan")))
    make, _ = make_table
    table = make()
    table.clock = lambda call: MILLISECONDS[call.args[0]]
    assert table.fastest(KEY, lambda: [CUBLAS, TORCH], results.__getitem__) == TORCH
    assert agree([torch.zeros(0, 3)], [torch.zeros(0, 3)]) and agree(torch.zeros(2), torch.zeros(2))


def test_says_when_nothing_works(make_table):
    make, _ = make_table

    def call(implementation):
        raise RuntimeError("no")

    with pytest.raises(RuntimeError, match=r"no implementation of linear .* works here"):
        make().fastest(KEY, lambda: [CUBLAS], call)


def test_two_processes_merge(make_table, tmp_path):
    make, _ = make_table
    first, second = make(), make()
    first.fastest(Key("a", (1,)), lambda: [TORCH], itself)
    second.fastest(Key("b", (1,)), lambda: [CUBLAS], itself)
    written = json.loads((tmp_path / "cache" / "implementations.json").read_text())
    assert set(written["implementations"]) == {"a 1", "b 1"}


@pytest.mark.parametrize(
    "damage",
    [
        "",
        "{",
        "[]",
        '{"implementations": 3}',
        '{"implementations": {"linear 1": {"fastest": 3}}}',
        '{"implementations": {"x": {"fastest": "torch"}}}',
        "\x00",
    ],
)
def test_damaged_file_is_measured_again(make_table, tmp_path, damage):
    make, timed = make_table
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "implementations.json").write_text(damage)
    assert make().fastest(KEY, lambda: MILLISECONDS, itself) == SMALL
    assert timed
    assert make().look_up(KEY, lambda: MILLISECONDS) == SMALL


def test_cannot_write(make_table, tmp_path, caplog):
    """Without a folder the fastest implementation is still found; it is not remembered."""
    make, _ = make_table
    (tmp_path / "cache").write_text("a file in its place")
    assert make().fastest(KEY, lambda: MILLISECONDS, itself) == SMALL
    assert "cannot keep measurements" in caplog.text


def test_look_up_does_not_measure(make_table):
    make, timed = make_table
    assert make().look_up(KEY, lambda: MILLISECONDS) is None
    assert not timed


def sized(*sizes):
    return KEY._replace(sizes=sizes)


def test_neighbours_come_before_the_clock(make_table, caplog):
    """Another prompt length is not timed: the fastest implementation of the closest known shape is taken."""
    make, timed = make_table
    make().fastest(sized(1, 4096, 64, 64), lambda: [CUBLAS], itself)
    make().fastest(sized(1, 1024, 64, 64), lambda: [LARGE], itself)
    timed.clear()
    table = make()
    assert table.fastest(sized(1, 4608, 64, 64), lambda: MILLISECONDS, lambda implementation: torch.ones(1)) == CUBLAS
    assert table.fastest(sized(1, 1100, 64, 64), lambda: MILLISECONDS, lambda implementation: torch.ones(1)) == LARGE
    assert table.look_up(sized(1, 1111, 64, 64), lambda: MILLISECONDS) == LARGE
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
    assert "cublas, measured elsewhere, failed and is left out: its result is not that of plain torch" in caplog.text


def test_shipped_table_comes_before_the_clock(make_table, tmp_path):
    """Measurements of this machine come first, then the shipped table, at the shape and then near it."""
    make, timed = make_table
    shipped = tmp_path / "nvidia-h100.json"
    entries = {str(KEY): {"fastest": str(LARGE)}, str(sized(2, 4096, 64, 64)): {"fastest": "no longer there"}}
    shipped.write_text(json.dumps({"about": {}, "implementations": entries}))
    table = make(shipped=shipped)
    assert table.fastest(KEY, lambda: MILLISECONDS, lambda implementation: torch.ones(1)) == LARGE
    assert table.look_up(sized(1, 4000, 3000, 12000), lambda: MILLISECONDS) == LARGE
    assert not timed
    assert table.fastest(sized(2, 4096, 64, 64), lambda: MILLISECONDS, itself) == SMALL
    make().measure(KEY, [TORCH], itself)
    assert make(shipped=shipped).look_up(KEY, lambda: MILLISECONDS) == TORCH


def test_the_closest_neighbour_of_both_tables_is_taken(make_table, tmp_path):
    """A far neighbour that was measured here does not hide a near one that is shipped; at equal distance it does."""
    make, timed = make_table
    shipped = tmp_path / "nvidia-h100.json"
    entries = {str(sized(1, 4100, 64, 64)): {"fastest": str(LARGE)}, str(sized(1, 2047, 64, 64)): {"fastest": "torch"}}
    shipped.write_text(json.dumps({"about": {}, "implementations": entries}))
    make().measure(sized(1, 2047, 64, 64), [CUBLAS], itself)
    timed.clear()
    table = make(shipped=shipped)
    assert table.look_up(sized(1, 4000, 64, 64), lambda: MILLISECONDS) == LARGE
    assert table.look_up(sized(1, 2000, 64, 64), lambda: MILLISECONDS) == CUBLAS
    # What the user's table names cannot run here.
    assert table.look_up(sized(1, 2000, 64, 64), lambda: [TORCH, SMALL]) == TORCH
    assert not timed


def test_choices_are_counted(make_table):
    """A forward during which the count does not rise ran only implementations that were chosen before."""
    make, _ = make_table
    table, before = make(), choices_made()
    table.fastest(KEY, lambda: MILLISECONDS, itself)
    assert choices_made() == before + 1
    table.fastest(KEY, lambda: MILLISECONDS, itself)
    table.look_up(sized(1, 2, 3, 4), lambda: MILLISECONDS)
    assert choices_made() == before + 1


def test_shipped_tables_are_named_after_devices():
    assert shipped_table("NVIDIA H100 80GB HBM3").name == "nvidia-h100-80gb-hbm3.json"
    for path in SHIPPED.glob("*.json"):
        content = json.loads(path.read_text())
        assert shipped_table(content["about"]["device"]) == path
        assert len(ImplementationTable._read(path)) == len(content["implementations"]) > 0


def test_digest_follows_the_source(monkeypatch, tmp_path):
    before = source_digest()
    (tmp_path / "__init__.py").write_text("# another kernel")
    monkeypatch.setattr(ppcl_kernels, "__file__", str(tmp_path / "__init__.py"))
    assert source_digest() != before


def test_cache_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("PPCL_CACHE", raising=False)
    assert cache_folder() == tmp_path / "ppcl_rt"
    monkeypatch.setenv("PPCL_CACHE", str(tmp_path / "mine"))
    assert cache_folder() == tmp_path / "mine"
