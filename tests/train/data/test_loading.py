"""Batches: shares of them, workers that make them ahead, and streams of random numbers that cannot collide."""

import io
import itertools
import tarfile
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as some
from torch.utils._pytree import tree_leaves

from ppcl_train.config.presets import PRESETS
from ppcl_train.config.settings import with_changes
from ppcl_train.data import calibration, captioned, seeds
from ppcl_train.data.loading import Batches
from ppcl_train.data.seeds import Purpose, Seed, Stage

SCENES = with_changes(PRESETS["scenes"], {"data.workers": 0})
WORDS = some.integers(0, 2**32 - 1)
NAMES = some.tuples(some.integers(0, 2**64), some.sampled_from(Stage), WORDS, some.sampled_from(Purpose), WORDS)


@pytest.fixture
def cached(qwen_cache, qwen_folder):
    settings = {"data.cache": str(qwen_cache), "teacher.pretrained": str(qwen_folder), "teacher.drop_caption": 0.5}
    return with_changes(PRESETS["qwen-image"], settings)


def leaves(batch):
    """All tensors of a batch, and the rest of its call."""
    return tree_leaves([batch.x, batch.t, batch.call, batch.mask])


def same(one, other):
    pairs = list(zip(leaves(one), leaves(other), strict=True))
    assert pairs
    return all(torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in pairs)


def first_words(name):
    run, stage, number, purpose, sample = name
    return tuple(seeds.generator(run, Seed(stage, number), purpose, sample).integers(2**64, size=2, dtype=np.uint64))


@given(some.lists(NAMES, min_size=2, max_size=20, unique=True))
def test_no_two_names_share_a_stream(names):
    assert len({first_words(name) for name in names}) == len(names)


def test_neighbours_share_no_stream():
    """Where sums of seeds meet: runs, stages and batches next to each other, and far apart by what once was added."""
    numbers = (0, 1, 2, 1_000_003, 10_000_000)
    names = list(itertools.product((0, 1, 2), (Stage.PROBES, Stage.STUDENTS), numbers, Purpose, (0, 1, 2)))
    assert len({first_words(name) for name in names}) == len(names)
    # Nor does the noise: 32 bits of a seed would be too few.
    drawn = [seeds.generator(0, Seed(Stage.CHECK, n), Purpose.NOISE).standard_normal() for n in range(20_000)]
    assert len(set(drawn)) == len(drawn)


def test_a_batch_is_named_by_its_number():
    assert Seed(Stage.STUDENTS, 7) == calibration.STUDENTS + 3 + 4
    with pytest.raises(ValueError, match="numbered from 0 to 4294967295, not 4294967296"):
        Seed(Stage.STUDENTS, 2**32 - 1) + 1


@pytest.mark.parametrize("source", ["made", "cached"])
def test_shares_are_parts_of_the_batch(source, cached):
    run = {"made": SCENES, "cached": cached}[source]
    for number in range(4):
        seed = calibration.CHECK + number
        whole = calibration.inputs(run, 5, seed)
        for share in (slice(0, 2), slice(2, 5), slice(3, 4)):
            assert same(calibration.inputs(run, 5, seed, share=share), whole.part(share))
    # A sample is no other: neither of this batch nor of another run's.
    other = calibration.inputs(run.model_copy(update={"seed": 1}), 5, seed)
    assert len({x.double().sum().item() for x in (*whole.x, *other.x)}) == 10


def test_a_share_reads_nothing_else(cached, monkeypatch):
    held, read = calibration.source(cached).cache, []
    monkeypatch.setattr(held, "read", lambda place: read.append(place) or type(held).read(held, place))
    calibration.inputs(cached, 5, calibration.CHECK, share=slice(1, 3))
    assert len(read) == 2


@pytest.mark.parametrize("source", ["made", "cached"])
def test_workers_change_nothing(source, cached):
    run = {"made": SCENES, "cached": cached}[source]
    share = slice(1, 3)
    batches = Batches(with_changes(run, {"data.workers": 2}), 4, calibration.STUDENTS, 9, share)
    # In order, then from another number on, as after a kill, to the end.
    for number in (0, 1, 2, 6, 7, 8):
        assert same(batches(number), calibration.inputs(run, 4, calibration.STUDENTS + number, share=share))


@pytest.fixture
def tars(tmp_path):
    """Seven tars of three pictures each."""
    if find_spec("webdataset") is None:
        pytest.skip("needs the train extra")
    for shard in range(7):
        with tarfile.open(tmp_path / f"part-{shard}.tar", "w") as tar:
            for n in range(3):
                member = tarfile.TarInfo(f"{shard}{n}.txt")
                member.size = 1
                tar.addfile(member, io.BytesIO(b"a"))
    return str(tmp_path / "part-{0..6}.tar")


def test_parts_of_tars_are_shards(tars, monkeypatch):
    # Of the world that this process may be in nothing is read.
    monkeypatch.setenv("WORLD_SIZE", "5")
    reader = captioned.Tars(tars)
    everything = [item.name for item in reader.read(0)]
    assert everything == [f"{shard}{n}" for shard in range(7) for n in range(3)]
    parts = [[item.name for item in reader.read(0, part, 3)] for part in range(3)]
    assert parts[1] == [f"{shard}{n}" for shard in (1, 4) for n in range(3)]
    assert sorted(itertools.chain(*parts)) == everything
    assert [item.name for item in reader.read(2, 1, 3)] == parts[1][2:]
    with pytest.raises(ValueError, match="7 shards cannot be divided into 8 parts: take no more"):
        next(reader.read(0, 7, 8))


def test_tars_read_by_workers(tars, tmp_path):
    reader = captioned.Tars(tars, workers=2)
    names = [item.name for item in reader.read(0, 0, 2)]
    assert sorted(names) == [f"{shard}{n}" for shard in (0, 2, 4, 6) for n in range(3)] != names
    # The order is always the same, so that a cache goes on.
    assert [item.name for item in reader.read(5, 0, 2)] == names[5:] and reader.settings["workers"] == 2
    (tmp_path / "part-6.tar").write_bytes(b"no tar at all" * 100)
    with pytest.raises(ValueError, match=r"cannot be read: .*part-6\.tar") as stopped:
        list(reader.read(0))
    assert "\n" not in str(stopped.value)
