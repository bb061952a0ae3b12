"""What checksums of bytes alone cannot tell, and what must be refused before memory is taken for it."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest

import ppcl_rt
from ppcl_rt.checkpoint.names import CATALOG_KEY, CONFIG, INDEX, WEIGHTS
from ppcl_rt.messages import MOST_CHARACTERS, brief


@pytest.fixture
def copy(tmp_path, make_checkpoint):
    """A checkpoint of one file, to be altered."""
    groups = {"heads": (3, 1), "image": (96, 0), "text": (31, 0), "modulation": (7, 1)}
    return make_checkpoint(tmp_path / "copy", compensated=True, groups=groups).folder


def change_header(folder: Path, change) -> None:
    """Rewrite the header of a safetensors file; the data stays as it was."""
    content = (folder / WEIGHTS).read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    change(header)
    written = json.dumps(header).encode()
    (folder / WEIGHTS).write_bytes(struct.pack("<Q", len(written)) + written + content[8 + length :])


def change_config(folder: Path, change) -> None:
    config = json.loads((folder / CONFIG).read_text())
    change(config)
    (folder / CONFIG).write_text(json.dumps(config))


def as_bytes_alone(folder: Path) -> None:
    """Make the catalog say that its checksums are of bytes, as those of formats 1 and 2 are."""
    change_config(folder, lambda config: config[CATALOG_KEY].update(checksums_of="bytes"))


def refused(folder: Path, said: str) -> None:
    with pytest.raises(ValueError, match=said) as caught:
        ppcl_rt.load(folder, 0.7)
    message = str(caught.value)
    assert "\n" not in message and message.isprintable() and len(message) <= MOST_CHARACTERS


def some(header: dict, part: str) -> str:
    return next(name for name in header if part in name)


@pytest.mark.parametrize("dtype", ["I32", "U32"])
def test_integers_for_weights_and_floats_for_orders_are_refused(copy, dtype):
    as_bytes_alone(copy)
    change_header(copy, lambda header: header[some(header, "to_q.weight")].update(dtype=dtype))
    refused(copy, "wanted floats")


def test_floats_for_orders_are_refused(copy):
    as_bytes_alone(copy)

    def to_floats(header):
        tensor = header[some(header, ".order.")]
        tensor["dtype"] = tensor["dtype"].replace("I", "F")

    change_header(copy, to_floats)
    refused(copy, "wanted integers")


def test_one_tensor_of_another_dtype_is_refused(copy):
    """Two bytes each, read as another kind of float: every checksum of bytes still holds."""
    as_bytes_alone(copy)

    def halve(header):
        tensor = header[some(header, "to_q.weight")]
        tensor["shape"] = [tensor["shape"][0], 2 * tensor["shape"][1]]
        tensor["dtype"] = "BF16"

    change_header(copy, halve)
    refused(copy, "wanted one dtype")


def test_a_shape_that_the_checksum_covers_is_refused(copy):
    """Rows and columns exchanged in the header alone: the bytes are the same."""

    def turn(header):
        tensor = next(t for n, t in header.items() if n.endswith("img_in.weight") and t["shape"][0] != t["shape"][1])
        tensor["shape"].reverse()

    change_header(copy, turn)
    refused(copy, "img_in.weight")


def test_keys_that_are_there_twice_and_constants_are_refused(copy):
    text = (copy / CONFIG).read_text()
    (copy / CONFIG).write_text(text.replace('"num_layers"', '"num_layers": 4, "num_layers"', 1))
    refused(copy, "num_layers is there twice")
    (copy / CONFIG).write_text(text.replace("{", '{"theta": NaN,', 1))
    refused(copy, "NaN is no number")


def test_sizes_that_no_file_holds_take_no_memory(copy):
    """A hundred terabytes, if it were built before the headers are looked at."""
    change_config(copy, lambda config: config.update(joint_attention_dim=10**12))
    refused(copy, "config.json asks for|describes no")


@pytest.mark.parametrize("long", ["x" * 10**5, "a\nb\x1b[2J" * 10**4])
def test_messages_are_short_whatever_the_file_holds(copy, long):
    change_config(copy, lambda config: config[CATALOG_KEY].update({long: 1}))
    refused(copy, "broken catalog")
    change_header(copy, lambda header: header.update({long: header.pop(some(header, "to_q.weight"))}))
    refused(copy, "broken catalog")


def test_a_name_that_no_file_can_have_is_refused(copy):
    """The system refuses to look for it, with the whole name in its message."""
    (copy / INDEX).write_text(json.dumps({"weight_map": {"img_in.weight": "x" * 5000}}))
    refused(copy, "File name too long")


def test_brief():
    assert brief("a\n b\t\x1b[2J c") == "a b [2J c"
    assert len(brief("x" * 1000)) <= MOST_CHARACTERS and brief("x" * 299) == "x" * 299
    assert brief("begin " + "x" * 1000 + " end").startswith("begin ") and brief("x" * 1000 + " end").endswith(" end")
