"""What the fuzzer does to a copy of a checkpoint: each alteration changes one file, and says what it did."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from formats import join, split

from ppcl_rt.checkpoint.names import CATALOG_KEY, CONFIG, INDEX

DTYPES = (
    "BOOL",
    "U8",
    "I8",
    "F8_E4M3",
    "F8_E5M2",
    "I16",
    "U16",
    "F16",
    "BF16",
    "I32",
    "U32",
    "F32",
    "F64",
    "I64",
    "U64",
)
NESTED: Any = []
for _ in range(500):
    NESTED = [NESTED]
# Values that no writer writes; constants that are no JSON among them.
WILD: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 3, 7, 0.5, -0.0, 1e308, -1e308, 1e-320, float("nan"), float("inf"), float("-inf"),
    2**31, 2**63 - 1, 2**63, 2**64, -(2**63), 10**9, 10**18, 10**30, 10**400, "", "0", "x" * 5000, "\ud800",
    "a\nb\x1b[2J\x00" * 99, "../../etc/passwd", "/dev/zero", [], {}, [[]], [0], [None] * 3, {"": {}}, {"a": 1},
    list(range(2000)), NESTED,
)  # fmt: skip


def is_weights(path: Path) -> bool:
    return path.suffix == ".safetensors"


def shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:50]}... ({len(text)})"


# Bytes.


def region(content: bytes, rng: random.Random, weights: bool) -> range:
    """Part of a file: of weights the length of the header, the header, or the data; else all."""
    if not weights:
        return range(len(content))
    header = 8 + int.from_bytes(content[:8], "little")
    return rng.choice([range(8), range(8, header), range(8, header), *[range(header, len(content))] * 2])


def flip(path: Path, rng: random.Random) -> str:
    content = bytearray(path.read_bytes())
    places = region(content, rng, is_weights(path))
    flipped = sorted({rng.choice(places) for _ in range(rng.choice((1, 1, 2, 8)))})
    for place in flipped:
        content[place] ^= rng.choice((1 << rng.randrange(8), 1 << rng.randrange(8), rng.randrange(1, 256)))
    path.write_bytes(content)
    return f"bytes {flipped} flipped"


def cut(path: Path, rng: random.Random) -> str:
    content = path.read_bytes()
    size = rng.choice((rng.randrange(len(content)), rng.randrange(16), len(content) - 1 - rng.randrange(16)))
    path.write_bytes(content[:size])
    return f"cut to {size} of {len(content)} bytes"


def cut_out(path: Path, rng: random.Random) -> str:
    content = path.read_bytes()
    places = region(content, rng, is_weights(path))
    begin, length = rng.choice(places), rng.choice((1, 4, 64, 4096))
    path.write_bytes(content[:begin] + content[begin + length :])
    return f"{length} bytes from {begin} cut out"


def extend(path: Path, rng: random.Random) -> str:
    content = path.read_bytes()
    more = rng.choice((b"\0", b" ", b"\n", b"}", b"x" * 4096, content))
    path.write_bytes(content + more)
    return f"{len(more)} bytes appended: {shown(more[:20])}"


def grow(path: Path, rng: random.Random) -> str:
    """Zeros without end, which take no place on the disk."""
    size = rng.choice((2**27, 2**33, 2**40))
    os.truncate(path, size)
    return f"grown to {size} bytes"


def zero(path: Path, rng: random.Random) -> str:
    content = bytearray(path.read_bytes())
    begin, length = rng.choice(region(content, rng, is_weights(path))), rng.choice((4, 256, 4096))
    content[begin : begin + length] = bytes(len(content[begin : begin + length]))
    path.write_bytes(content)
    return f"{length} bytes from {begin} zeroed"


# JSON: a file, or the header of a safetensors file.


def edit(path: Path, change: Callable[[Any], str], text: Callable[[str], str] = lambda text: text) -> str:
    """Change the JSON of a file, then its text."""
    if is_weights(path):
        header, data = split(path.read_bytes())
        said = change(header)
        path.write_bytes(join(text(json.dumps(header)).encode(), data))
        return said
    content = json.loads(path.read_text())
    said = change(content)
    path.write_text(text(json.dumps(content)))
    return said


def place_in(content: Any, rng: random.Random) -> tuple[Any, Any, str]:
    """Choose a value: its container, its key there, and its path for people."""
    inside, path = content, []
    # Settings are few and checksums many: the catalog is entered as often as all else together.
    if CATALOG_KEY in content and rng.random() < 0.5:
        inside, path = content[CATALOG_KEY], [CATALOG_KEY]
    while True:
        key = rng.choice(list(inside) if isinstance(inside, dict) else range(len(inside)))
        path.append(str(key))
        if not isinstance(inside[key], (dict, list)) or not inside[key] or rng.random() < 0.2:
            return inside, key, ".".join(path)
        inside = inside[key]


def put_wild(path: Path, rng: random.Random) -> str:
    def change(content: Any) -> str:
        inside, key, where = place_in(content, rng)
        value = inside[key] = rng.choice(WILD)
        return f"{where} = {shown(value)}"

    return edit(path, change)


def put_near(path: Path, rng: random.Random) -> str:
    """A value that could be meant."""

    def near(value: Any) -> Any:
        if isinstance(value, bool) or value is None:
            return not value
        if isinstance(value, int):
            return rng.choice((value + 1, value - 1, value * 2, value // 2, -value, float(value), str(value)))
        if isinstance(value, float):
            return rng.choice((value * 1.001, value * 2, value + 1, -value, int(value)))
        if isinstance(value, str):
            return rng.choice((value[1:], value[:-1], value + "0", value.upper(), value[::-1], [value]))
        if isinstance(value, list):
            return rng.choice((value[::-1], value[1:], value[:-1], value[1:] + value[:1], value + value[:1], [value]))
        return dict(list(value.items())[: len(value) // 2])

    def change(content: Any) -> str:
        inside, key, where = place_in(content, rng)
        value = inside[key] = near(inside[key])
        return f"{where} = {shown(value)}"

    return edit(path, change)


def drop(path: Path, rng: random.Random) -> str:
    def change(content: Any) -> str:
        inside, key, where = place_in(content, rng)
        del inside[key]
        return f"{where} dropped"

    def drop_top(content: Any) -> str:
        del content[key := rng.choice(list(content))]
        return f"{key} dropped"

    return edit(path, rng.choice((change, drop_top)))


def add(path: Path, rng: random.Random) -> str:
    key = rng.choice(
        ("zz", "", "_x", "x" * 5000, "a\nb", "__metadata__", "students.0-1.up", CATALOG_KEY, "quantization")
    )

    def change(content: Any) -> str:
        inside, _, where = place_in(content, rng)
        inside = rng.choice((content, inside if isinstance(inside, dict) else content))
        value = inside[key] = rng.choice(WILD)
        return f"next to {where}: {shown(key)} = {shown(value)}"

    return edit(path, change)


def exchange(path: Path, rng: random.Random) -> str:
    """Two values of one object or list."""

    def change(content: Any) -> str:
        inside, key, where = place_in(content, rng)
        other = rng.choice(list(inside) if isinstance(inside, dict) else range(len(inside)))
        inside[key], inside[other] = inside[other], inside[key]
        return f"{where} exchanged with {other}"

    return edit(path, change)


# Texts and what comes in the place of their first occurrence.
TEXTS = (
    ('"', '"a": 1, "a": 2, "'),
    ("{", "{" * 100_000),
    ("{", '{"a": ' * 900),
    (":", ': 1, "b":'),
    ("{", '{"n": ' + "9" * 5000 + ", "),
    ("{", "\ufeff{"),
    ("}", ",}"),
)


def spoil(path: Path, rng: random.Random) -> str:
    """A key that is there twice, or text that is no JSON."""
    old, new = rng.choice(TEXTS)
    return edit(path, lambda _: f"{shown(old)} -> {shown(new)}", lambda text: text.replace(old, new, 1))


# Headers of safetensors files.


def of_header(change: Callable[[dict[str, Any], random.Random], str]) -> Callable[[Path, random.Random], str]:
    def alteration(path: Path, rng: random.Random) -> str:
        def described(header: dict[str, Any]) -> str:
            header.pop("__metadata__", None)
            return change(header, rng)

        return edit(path, described)

    return alteration


@of_header
def dtype(header: dict[str, Any], rng: random.Random) -> str:
    name = rng.choice(list(header))
    header[name]["dtype"] = rng.choice((*DTYPES, "", 7))
    return f"{name} is {header[name]['dtype']}"


@of_header
def all_dtypes(header: dict[str, Any], rng: random.Random) -> str:
    """Every tensor of a dtype becomes one of as many bytes, or of half as many with twice the columns."""
    old, new, halves = rng.choice((("F32", "I32", 1), ("F32", "U32", 1), ("I64", "U64", 1), ("I64", "F64", 1),
                                   ("F32", "BF16", 2), ("F32", "F16", 2), ("I64", "I32", 2)))  # fmt: skip
    for tensor in header.values():
        if tensor["dtype"] == old:
            tensor.update(dtype=new, shape=[*tensor["shape"][:-1], tensor["shape"][-1] * halves])
    return f"{old} is {new} everywhere"


@of_header
def half_dtype(header: dict[str, Any], rng: random.Random) -> str:
    name = rng.choice(list(header))
    tensor = header[name]
    new = {"F32": ("BF16", "F16"), "I64": ("I32", "F32")}[tensor["dtype"]]
    shape = list(tensor["shape"])
    shape[rng.randrange(len(shape))] *= 2
    tensor.update(dtype=rng.choice(new), shape=shape)
    return f"{name} is {tensor['dtype']} {shape}"


@of_header
def shape(header: dict[str, Any], rng: random.Random) -> str:
    name = rng.choice(list(header))
    old = list(header[name]["shape"])
    size = old[0] * (old[1] if len(old) > 1 else 1)
    header[name]["shape"] = rng.choice(
        (old[::-1], [size], [1, size], [*old, 1], [2, size // 2], [size, 1, 1], [], [0], [2**63, 2], [2**32, 2**32, 0],
         [old[0] + 1, *old[1:]], [-1, -size], [float(old[0]), *old[1:]])
    )  # fmt: skip
    return f"{name} has the shape {header[name]['shape']}, not {old}"


def pair(header: dict[str, Any], rng: random.Random) -> tuple[str, str]:
    """Two tensors of one dtype and shape."""
    alike: dict[str, list[str]] = {}
    for name, tensor in header.items():
        alike.setdefault(f"{tensor['dtype']} {tensor['shape']}", []).append(name)
    one, other = rng.sample(rng.choice([names for names in alike.values() if len(names) > 1]), 2)
    return one, other


@of_header
def swap(header: dict[str, Any], rng: random.Random) -> str:
    one, other = pair(header, rng)
    header[one]["data_offsets"], header[other]["data_offsets"] = (
        header[other]["data_offsets"],
        header[one]["data_offsets"],
    )
    return f"{one} swapped with {other}"


@of_header
def alias(header: dict[str, Any], rng: random.Random) -> str:
    one, other = pair(header, rng)
    header[one]["data_offsets"] = rng.choice((header[other]["data_offsets"], [0, 2**63], [-4, 0], [8, 4], [4, 4]))
    return f"{one} lies at {header[one]['data_offsets']}"


@of_header
def rename(header: dict[str, Any], rng: random.Random) -> str:
    one, other = pair(header, rng)
    new = rng.choice((other, one + ".x", one.replace("students.", "teachers."), one.upper(), "", "x" * 5000, "a\nb"))
    header[new] = header.pop(one)
    return f"{one} is called {shown(new)}"


# Files and links.


def index_entry(path: Path, rng: random.Random) -> str:
    shards = sorted(other.name for other in path.parent.glob("*.safetensors"))
    elsewhere = ("..", ".", "", "../x", "/dev/zero", "a\0b", "\ud800", "x" * 5000, CONFIG, INDEX, None, 1, [])

    def change(content: Any) -> str:
        mapping = content["weight_map"]
        name = rng.choice(list(mapping))
        mapping[name] = rng.choice((*shards, *elsewhere))
        return f"{name} lies in {shown(mapping[name])}"

    return edit(path, change)


def remove(path: Path, rng: random.Random) -> str:
    path.unlink()
    return "removed"


def link(path: Path, rng: random.Random) -> str:
    """A link in a file's place, as a hub's cache has them: to where it should, or elsewhere."""
    content = path.read_bytes()
    path.unlink()
    kept = path.with_name("kept")
    others = [other.name for other in path.parent.iterdir()]
    target = rng.choice(
        (path.name, "/dev/zero", "/dev/full", ".", "..", "gone", "kept", f"{path}/x", "x" * 255, *others)
    )
    if target == "kept":
        kept.write_bytes(content)
    path.symlink_to(target)
    return f"a link to {shown(target)}"


def no_file(path: Path, rng: random.Random) -> str:
    path.unlink()
    kind = rng.choice((os.mkdir, os.mkfifo))
    kind(path)
    return f"{kind.__name__} in its place"


def of_another(path: Path, other: Path) -> str:
    path.write_bytes(other.read_bytes())
    return f"that of {other.parent.name}"


ANY_FILE = (flip, flip, flip, cut, cut_out, extend, grow, zero, remove, link, link, no_file)
JSON = (put_wild, put_wild, put_near, put_near, drop, add, exchange, spoil)
HEADER = (dtype, all_dtypes, half_dtype, shape, shape, swap, swap, alias, rename)


def alter(folder: Path, others: Sequence[Path], rng: random.Random) -> tuple[str, str]:
    """Alter one file of a folder.

    Args:
        others: checkpoints whose file of the same name may come in its place.

    Returns:
        The file's name, and what was done to it.
    """
    path = rng.choice(sorted(path for path in folder.iterdir() if path.suffix in (".json", ".safetensors")))
    # Of many shards, as often as of one.
    if is_weights(path) and rng.random() < 0.3:
        path = folder / CONFIG
    here = [other / path.name for other in others if (other / path.name).is_file()]
    kinds = [ANY_FILE, JSON, JSON, *([HEADER] * 3 if is_weights(path) else [])]
    if path.name == INDEX:
        kinds += [(index_entry,)] * 2
    if here and rng.random() < 0.02:
        return path.name, of_another(path, rng.choice(here))
    return path.name, rng.choice(rng.choice(kinds))(path, rng)
