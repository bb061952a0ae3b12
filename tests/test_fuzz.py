"""A hundred altered copies, and that the fuzzer finds what is wrong: other outputs, crashes, hangs, memory."""

from __future__ import annotations

import os
import random
import shutil
import signal
import time

import alterations
import fuzz
import pytest

from ppcl_rt.checkpoint.names import CATALOG_KEY, CHECKSUM_KEY, CONFIG, WEIGHTS


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    return fuzz.make_bases(tmp_path_factory.mktemp("bases"))


@pytest.fixture
def copy(bases, tmp_path):
    """The first base, and a copy of it to be altered."""
    return bases[0], shutil.copytree(bases[0].folder, tmp_path / "copy")


def test_a_hundred_altered_copies_are_refused_or_give_equal_outputs(bases, tmp_path):
    """`make fuzz` has ten thousand, of another seed."""
    told = list(fuzz.fuzz(bases, 100, range(100), tmp_path))
    assert sorted(number for number, _, _ in told) == list(range(100))
    found = [
        f"--seed 100 --only {number}: {what}: {verdict}" for number, what, verdict in told if verdict.kind == "found"
    ]
    assert not found, "\n".join(found)
    kinds = [verdict.kind for _, _, verdict in told]
    # Copies that are all refused say nothing of outputs.
    assert kinds.count("refused") > 50 and kinds.count("equal") >= 5 and kinds.count("untold") <= 5


def test_a_number_names_a_copy(bases, tmp_path):
    """Whatever was judged before it."""
    made = [fuzz.made_copy(bases, 3, number, tmp_path / f"{n}") for n, number in enumerate((5, 6, 5))]
    assert made[0] == made[2] != made[1]
    assert [p.read_bytes() for p in sorted((tmp_path / "0").iterdir()) if p.is_file()] == [
        p.read_bytes() for p in sorted((tmp_path / "2").iterdir()) if p.is_file()
    ]


class Same(str):
    """A checksum that nothing differs from."""

    def __ne__(self, _):
        return False


def test_swapped_tensors_are_found_where_no_checksum_tells(copy, monkeypatch):
    base, folder = copy
    assert fuzz.judge(base, folder, WEIGHTS).kind == "equal"
    names = [f"transformer_blocks.{n}.attn.to_q.weight" for n in (0, 1)]
    monkeypatch.setattr(alterations, "pair", lambda *_: names)
    assert names[0] in alterations.swap(folder / WEIGHTS, random.Random(0))
    assert fuzz.judge(base, folder, WEIGHTS).kind == "refused"
    monkeypatch.setattr("ppcl_rt.checkpoint.reader.digest", lambda *_: Same())
    assert fuzz.judge(base, folder, WEIGHTS) == ("found", "it loads, with other outputs")


def test_settings_are_found_where_no_checksum_tells(copy):
    base, folder = copy
    fuzz.change_config(folder, lambda config: (config.pop(CHECKSUM_KEY), config.update(axes_dims_rope=[2, 4, 2])))
    assert fuzz.judge(base, folder, CONFIG) == ("found", "it loads, with other outputs")


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (KeyError("x"), "KeyError"),
        (MemoryError(), "MemoryError"),
        (UnicodeDecodeError("utf-8", b"", 0, 1, "x"), "UnicodeDecodeError"),
        (ValueError("two\nlines"), "a message of 9 characters"),
        (ValueError("x" * 301), "a message of 301 characters"),
        (ValueError(), "a message of 0 characters"),
    ],
)
def test_other_errors_and_messages_are_found(copy, monkeypatch, error, said):
    def fail(_):
        raise error

    monkeypatch.setattr(fuzz, "outputs", fail)
    kind, message = fuzz.judge(*copy, CONFIG)
    assert kind == "found" and said in message


def test_what_ends_a_process_is_found_and_the_rest_is_judged(bases, monkeypatch, tmp_path):
    """A copy that hangs, one that crashes, one that takes memory, and sound ones between."""

    def judge(_base, copy, _changed):
        number = int(copy.name.removeprefix("copy-"))
        if number == 1:
            time.sleep(60)
        if number == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        if number == 4:
            # Touched, so that it is really taken.
            len(b"x" * (3 * 10**8))
        return fuzz.Verdict("equal")

    monkeypatch.setattr(fuzz, "judge", judge)
    monkeypatch.setattr(fuzz, "SECONDS", 1)
    monkeypatch.setattr(fuzz, "MOST_BYTES", 2 * 10**8)
    told = {number: verdict for number, _, verdict in fuzz.fuzz(bases, 0, range(6), tmp_path)}
    assert [told[number].kind for number in range(6)] == ["equal", "found", "equal", "found", "found", "equal"]
    assert "more than 1 seconds" in told[1].said and "SIGKILL" in told[3].said and "GB more" in told[4].said


def test_every_alteration_is_made(bases, tmp_path):
    """None is left out for good, and each says what it did."""
    done, rng = set(), random.Random(0)
    every = {*alterations.ANY_FILE, *alterations.JSON, *alterations.HEADER, alterations.index_entry}
    sharded = bases[2].folder
    for n, alteration in enumerate(sorted(every, key=lambda each: each.__qualname__)):
        folder = shutil.copytree(sharded, tmp_path / f"{n}")
        name = (
            alterations.INDEX if alteration is alterations.index_entry else sorted(folder.glob("*.safetensors"))[0].name
        )
        assert alteration(folder / name, rng)
        done.add(alteration)
    assert done == every and CATALOG_KEY in (sharded / CONFIG).read_text()
