"""Which tiles are offered and which are taken: pure rules, checked by hand."""

from __future__ import annotations

import importlib
import itertools
import json
import os

import pytest
import torch

import ppcl_kernels as pk
from ppcl_kernels.allowed import is_allowed, tile_name
from ppcl_kernels.heads import head_cols
from ppcl_kernels.launch import TARGETS, Target
from ppcl_kernels.matmul import Tile, takes_tma
from ppcl_kernels.qkv_projection import choose_tile, tile_candidates
from ppcl_kernels.tiles import cheapest, waves

# The package exports functions with the names of its modules.
AdaTile, ResidualTile, NormRopeTile, AttentionTile = (
    importlib.import_module(f"ppcl_kernels.{name}").Tile
    for name in ("ada_layer_norm", "gated_residual", "norm_rope", "joint_attention")
)
HOPPER, BF16 = TARGETS["sm_90"], torch.bfloat16
INTERPRETER = Target("interpreter", 227 * 1024, 2)


def test_takes_tma():
    """TMA takes starts and strides that are multiples of 16 bytes, on architectures that have TMA."""
    x = torch.empty(2, 8, 16)
    assert takes_tma(HOPPER, x) and takes_tma(HOPPER, x[:, 1:]) and takes_tma(INTERPRETER, x)
    assert takes_tma(HOPPER, torch.empty(4, 12)) and not takes_tma(HOPPER, torch.empty(4, 12).half())
    assert not takes_tma(HOPPER, x, torch.empty(4, 33)) and not takes_tma(HOPPER, x[..., 1:])
    assert not takes_tma(HOPPER, x[:1].expand(2, 8, 16)) and not takes_tma(HOPPER, x[..., ::4][..., :1])
    assert not any(takes_tma(TARGETS[arch], x) for arch in ("sm_80", "sm_86", "sm_89", "sm_120", "gfx942"))


@pytest.mark.parametrize("target", [*TARGETS.values(), INTERPRETER], ids=lambda t: t.arch)
def test_tiles_for_adapters(target):
    """There are some for ranks that kernels take, and none beyond; those that triton miscompiles are not offered."""
    for rank in (16, 32):
        for two_weights in (False, True):
            tiles = Tile.candidates(target, BF16, two_weights, rank)
            assert Tile.choose(target, BF16, [4096, 512], 1, 3072, two_weights, rank) in tiles
            assert set(tiles) <= set(Tile.candidates(target, BF16, two_weights))
            assert not target.tcgen05 or not any(tile.cols == 256 and tile.flat for tile in tiles)
        assert choose_tile(target, BF16, [512, 4096], 1, 24, 128, rank) in tile_candidates(target, BF16, 128, rank)
    assert not Tile.candidates(target, BF16, rank=64) and not tile_candidates(target, BF16, 128, 64)


@pytest.mark.parametrize("target", [*TARGETS.values(), INTERPRETER], ids=lambda t: t.arch)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, BF16], ids=str)
def test_tiles_fit(target, dtype):
    """A chosen tile is a candidate, and candidates fit: the operands in flight of all resident thread blocks."""
    for batch, tokens, width in itertools.product((1, 2), (1, 65, 4096), (1, 96, 3072, 16384)):
        tiles = Tile.candidates(target, dtype)
        assert Tile.choose(target, dtype, [tokens, 7], batch, width) in tiles
        assert all(t.resident * t.shared_bytes(dtype.itemsize) <= target.shared_bytes for t in tiles)
        assert AdaTile.choose(target, dtype, batch, tokens, width) in AdaTile.candidates(target, dtype, width)
        assert ResidualTile.choose(target, dtype, batch, tokens, width) in ResidualTile.candidates(target, dtype)
        for head_dim, heads in itertools.product((8, 16, 24, 64, 128), (1, 24)):
            assert NormRopeTile.choose(target, dtype, batch, tokens, heads) in NormRopeTile.candidates(target, dtype)
            tiles = tile_candidates(target, dtype, head_dim)
            assert choose_tile(target, dtype, [tokens, 7], batch, heads, head_dim) in tiles
            assert all(t.resident * t.shared_bytes(dtype.itemsize) <= target.shared_bytes for t in tiles)
            assert all(t.cols == head_cols(head_dim) >= head_dim for t in tiles)
            tiles = AttentionTile.candidates(target, dtype, head_dim)
            assert AttentionTile.choose(target, dtype, batch, tokens, heads, head_dim) in tiles
            row = head_cols(head_dim) * dtype.itemsize
            # The queries stay in shared memory, keys and values are in flight.
            assert all(t.resident * (t.queries + 2 * t.stages * t.keys) * row <= target.shared_bytes for t in tiles)


def test_waves():
    """One thread block more than run at the same time is one more wave."""
    assert [waves(n, HOPPER) for n in (1, 132, 133, 264)] == [1, 1, 2, 2]
    assert [waves(n, HOPPER, 2) for n in (1, 264, 265)] == [1, 1, 2]


def test_cheapest():
    """The cost is waves times the cost of a wave; among equals the first tile is taken."""
    large, small = Tile(128, 128, 64, 8, 3), Tile(64, 64, 64, 4, 4, resident=2)
    # A wave costs 128 x 128 / 0.93 = 17,617 against 2 x 64 x 64 / 0.65 = 12,603.
    assert cheapest("linear", (large, small), HOPPER, lambda tile: 1) is small
    blocks = {large: 132, small: 4 * 132}
    assert cheapest("linear", (large, small), HOPPER, blocks.__getitem__) is large
    twin = large._replace(stages=2)
    assert cheapest("linear", (twin, large), HOPPER, lambda tile: 132) is twin
    with pytest.raises(ValueError, match="no tile of linear may run on sm_90"):
        cheapest("linear", (), HOPPER, lambda tile: 1)


@pytest.mark.parametrize("target", TARGETS.values(), ids=lambda t: t.arch)
def test_tiles_fill_the_device(target):
    """Much work takes the fastest tile; a nearly empty second wave takes smaller tiles than a full one."""
    for dtype in (torch.float32, BF16):
        tiles = Tile.candidates(target, dtype)
        fastest = min(tiles, key=lambda t: t.cost / (t.rows * t.cols))
        assert Tile.choose(target, dtype, [1_000_000], 1, 12288) == fastest
        wide, side = tiles[0], target.multiprocessors
        # As many tiles as run at the same time, then one more.
        even = Tile.choose(target, dtype, [wide.rows * side * wide.resident], 1, wide.cols)
        odd = Tile.choose(target, dtype, [wide.rows * side * wide.resident + 1], 1, wide.cols)
        assert even == wide and odd.rows * odd.cols <= wide.rows * wide.cols


def test_tiles_for_qwen_image():
    """By hand, for 132 multiprocessors, model dimension 3072, tokens of the text and of 1024 x 1024 or 512 x 512."""
    # 432 tiles of 128 x 256 are 4 waves: 131,072. 864 of 128 x 128 are 4 of 2 x 128 x 128 / 0.93: 140,938.
    assert Tile.choose(HOPPER, BF16, [4096, 512], 1, 3072)[:2] == (128, 256)
    # 144 tiles are 2 waves: 65,536. 288 are 2 waves of 2: 70,469. 1152 of 64 x 64 are 5 x 2 x 4096 / 0.65 = 63,015.
    assert Tile.choose(HOPPER, BF16, [1024, 512], 1, 3072)[:2] == (64, 64)
    # 36 x 72 = 2592 tiles of 128 rows are 20 waves: 352,344. 5184 of 64 rows are 20 of 2 x 64 x 128 / 0.8: 409,600.
    assert choose_tile(HOPPER, BF16, [512, 4096], 1, 24, 128)[:2] == (128, 128)
    # 12 heads of 512 + 1024 tokens: 144 tiles of 128 queries are 2 waves: 256. 288 of 64 are 3 of 64 / 0.7: 274.
    assert AttentionTile.choose(HOPPER, BF16, 1, 1536, 12, 128)[:2] == (128, 128)
    # 4 heads: 48 tiles of 128 queries leave most of the device empty, 96 of 64 cost 91.
    assert AttentionTile.choose(HOPPER, BF16, 1, 1536, 4, 128)[:2] == (64, 64)


def test_norm_reads_its_modulation_seldom():
    """A thread block takes several rows at batch 1 too: for one row of 6 KiB it would read 12 KiB of modulation."""
    for batch, tokens in ((1, 4096), (2, 4096), (1, 16384)):
        assert AdaTile.choose(HOPPER, BF16, batch, tokens, 3072).rows > 1
    # 512 thread blocks of one row are one wave, since 528 run at the same time.
    assert AdaTile.choose(HOPPER, BF16, 1, 512, 3072).rows == 1


# Refused tiles.


@pytest.fixture
def refuse(tmp_path, monkeypatch):
    """Write the results of a check to the file that `PPCL_ALLOWED` names."""
    path = tmp_path / "allowed.json"
    changed = itertools.count(1)

    def write(kernels: dict | str) -> None:
        monkeypatch.setenv("PPCL_ALLOWED", str(path))
        path.write_text(kernels if isinstance(kernels, str) else json.dumps({"device": "any", "kernels": kernels}))
        # Two writes within one tick of the clock have to differ too.
        os.utime(path, ns=(0, next(changed)))

    return write


def refused(*tiles) -> dict:
    return {tile_name(tile): {"ok": False, "why": "hangs"} for tile in tiles}


def test_refused_tiles_are_left_out(refuse):
    """Refused tiles of every kernel are not offered, all others are; a rewritten file is read again."""
    lists = {
        "linear": lambda: Tile.candidates(HOPPER, BF16),
        "qkv_projection": lambda: tile_candidates(HOPPER, BF16, 128),
        "joint_attention": lambda: AttentionTile.candidates(HOPPER, BF16, 128),
        "ada_layer_norm": lambda: AdaTile.candidates(HOPPER, BF16, 3072),
        "gated_residual": lambda: ResidualTile.candidates(HOPPER, BF16),
        "norm_rope": lambda: NormRopeTile.candidates(HOPPER, BF16),
    }
    before = {kernel: tiles() for kernel, tiles in lists.items()}
    refuse({kernel: refused(tiles[0]) for kernel, tiles in before.items()})
    for kernel, tiles in lists.items():
        assert tiles() == before[kernel][1:], kernel
    refuse({"linear": {tile_name(before["linear"][0]): {"ok": True}, **refused(before["linear"][1])}})
    assert lists["linear"]() == (before["linear"][0], *before["linear"][2:])
    assert lists["joint_attention"]() == before["joint_attention"]


def test_attention_without_its_key_ranges_is_left_out(refuse):
    """A tile of attention needs the launch that reads the mask for as many keys."""
    before = AttentionTile.candidates(HOPPER, BF16, 128)
    assert {tile.keys for tile in before} == {64, 128}
    for keys in (64, 128):
        refuse({"key_ranges": refused((keys,))})
        assert AttentionTile.candidates(HOPPER, BF16, 128) == tuple(tile for tile in before if tile.keys != keys)
    refuse({"key_ranges": {"64": {"ok": True}}})
    assert AttentionTile.candidates(HOPPER, BF16, 128) == before


def test_kernel_without_tiles(refuse):
    """Every public function raises without an allowed tile; a refused tile that is passed by name still runs."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    target, dtype = Target.of(device), torch.float32
    x, m, w = (torch.randn(shape, device=device) for shape in ((1, 3, 16), (1, 16), (16, 16)))
    head = x.unflatten(-1, (2, 8))
    stream = pk.Stream(x, (w, w, w))
    named = Tile.candidates(target, dtype)
    lists = {
        "linear": (named, lambda: pk.linear(x, w)),
        "qkv_projection": (tile_candidates(target, dtype, 8), lambda: pk.qkv_projection([stream], 2, 8)),
        "joint_attention": (AttentionTile.candidates(target, dtype, 8), lambda: pk.joint_attention(head, head, head)),
        "ada_layer_norm": (AdaTile.candidates(target, dtype, 16), lambda: pk.ada_layer_norm(x, m, m)),
        "gated_residual": (ResidualTile.candidates(target, dtype), lambda: pk.gated_residual(x, m, x)),
        "norm_rope": (
            NormRopeTile.candidates(target, dtype),
            lambda: pk.norm_rope([(head, head, head)], [(None, None)], [None]),
        ),
    }
    refuse({kernel: refused(*tiles) for kernel, (tiles, _) in lists.items()})
    for kernel, (_, call) in lists.items():
        with pytest.raises(ValueError, match=f"no tile of {kernel} may run .*PPCL_ALLOWED"):
            call()
    assert pk.linear(x, w, tile=named[0]).shape == (1, 3, 16)


@pytest.mark.parametrize(
    "text", ["", "[]", '{"kernels": []}', '{"kernels": {"linear": {"1x2": true}}}', '{"tiles": {}}']
)
def test_unreadable_list(refuse, text):
    """A list that cannot be read is an error, so that it allows nothing by accident."""
    refuse(text)
    with pytest.raises(ValueError, match="no list of allowed tiles"):
        is_allowed("linear", (1, 2))


def test_missing_list(tmp_path, monkeypatch):
    """A list that is named but missing is an error; an empty name means no list."""
    monkeypatch.setenv("PPCL_ALLOWED", str(tmp_path / "none.json"))
    with pytest.raises(ValueError, match=r"none.json, which cannot be read \(No such file"):
        is_allowed("linear", (1, 2))
    monkeypatch.setenv("PPCL_ALLOWED", "")
    assert is_allowed("linear", (1, 2))
