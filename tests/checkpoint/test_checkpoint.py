"""Files that are broken, altered or meant badly: each is refused with one line, and writing is all or nothing."""

from __future__ import annotations

import json
import shutil
import struct

import pytest
import torch
from formats import change_config
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import ppcl_rt
from ppcl_rt import Plan
from ppcl_rt.checkpoint import reader
from ppcl_rt.checkpoint.names import CATALOG_KEY, CONFIG, INDEX, WEIGHTS
from ppcl_rt.families.qwen_image import block_spec
from ppcl_rt.files import NoWeightsError
from ppcl_rt.planning.catalog import FORMAT

DEPTH = 4
FULL = block_spec(dim=32, heads=4, head_dim=8).full


def refused(call, *arguments, **more):
    """The message of the ValueError that a call raises: no other type but that of missing weights, and one line."""
    with pytest.raises(Exception) as caught:
        call(*arguments, **more)
    assert type(caught.value) in (ValueError, NoWeightsError), repr(caught.value)
    message = str(caught.value)
    assert message and "\n" not in message
    return message


def state_of(folder):
    """Every file's bytes, by name."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def sharded(tmp_path_factory, make_checkpoint):
    return make_checkpoint(tmp_path_factory.mktemp("sharded") / "checkpoint", max_shard_size=200_000)


@pytest.fixture
def plain_copy(tmp_path, made):
    return shutil.copytree(made.folder, tmp_path / "copy")


@pytest.fixture
def sharded_copy(tmp_path, sharded):
    return shutil.copytree(sharded.folder, tmp_path / "sharded")


def edit_json(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


# Weights.


def test_whole_checkpoints_load(plain_copy, sharded_copy):
    """The copies that these tests spoil are sound before."""
    assert len(list(sharded_copy.glob("*.safetensors"))) > 2 and (sharded_copy / INDEX).is_file()
    for folder in (plain_copy, sharded_copy):
        ppcl_rt.load(folder, resident="all")


@pytest.mark.parametrize("keep", [0, 4, 8, 100, -1, -1000])
def test_truncated(plain_copy, keep):
    """A file cut short, anywhere."""
    path = plain_copy / WEIGHTS
    content = path.read_bytes()
    path.write_bytes(content[:keep])
    assert WEIGHTS in refused(ppcl_rt.load, plain_copy)


@pytest.mark.parametrize("junk", [b"x" * 4096, struct.pack("<Q", 1 << 60) + b"{}", struct.pack("<Q", 2) + b"[]"])
def test_no_safetensors(plain_copy, junk):
    """A file of something else, and headers that lie about their size or kind."""
    (plain_copy / WEIGHTS).write_bytes(junk)
    assert WEIGHTS in refused(ppcl_rt.load, plain_copy)


@pytest.mark.parametrize(
    "name", ["transformer_blocks.2.attn.to_q.weight", "proj_out.bias", "transformer_blocks.0.order.heads"]
)
def test_altered(plain_copy, name):
    """One bit of one tensor flipped, block, outside or rank order, is noticed and named."""
    path = plain_copy / WEIGHTS
    content = bytearray(path.read_bytes())
    length = struct.unpack("<Q", content[:8])[0]
    begin, end = json.loads(content[8 : 8 + length])[name]["data_offsets"]
    content[8 + length + (begin + end) // 2] ^= 1
    path.write_bytes(content)
    message = refused(ppcl_rt.load, plain_copy)
    assert name in message and "altered" in message


def test_altered_where_it_is_not_read(plain_copy, made):
    """What a plan does not read is not judged; growing into it is refused, and the model stays as it was."""
    tensors = load_file(plain_copy / WEIGHTS)
    tensors["transformer_blocks.0.attn.to_k.weight"][5, 5] += 1
    save_file(tensors, plain_copy / WEIGHTS)
    model = ppcl_rt.load(plain_copy, plan=made.plan(made.catalog.dense.blocks[3]))
    before = model.plan
    assert "transformer_blocks.0.attn.to_k.weight" in refused(model.set_ratio, 1.0)
    assert model.plan == before
    # Asked again, it is refused again.
    refused(model.set_ratio, 1.0)


def test_missing_files(plain_copy, sharded_copy):
    """No weights, or one shard less."""
    shard = sorted(sharded_copy.glob("*.safetensors"))[1]
    shard.unlink()
    assert shard.name in refused(ppcl_rt.load, sharded_copy)
    (plain_copy / WEIGHTS).unlink()
    assert WEIGHTS in refused(ppcl_rt.load, plain_copy)


@pytest.mark.parametrize(
    "name", ["../evil.safetensors", "/etc/passwd", "a/b.safetensors", "..", ".", "", "gone.safetensors"]
)
def test_index_points_elsewhere(sharded_copy, tmp_path, name):
    """An index may name files of its own folder only, and those have to be there."""
    shard = next(sharded_copy.glob("*.safetensors"))
    shutil.copy(shard, tmp_path / "evil.safetensors")
    (sharded_copy / "a").mkdir()
    shutil.copy(shard, sharded_copy / "a" / "b.safetensors")
    edit_json(sharded_copy / INDEX, lambda index: index["weight_map"].update({"proj_out.bias": name}))
    refused(ppcl_rt.load, sharded_copy)


def test_index_lists_too_much(sharded_copy):
    """A tensor that no file holds."""
    shard = next(sharded_copy.glob("*.safetensors")).name
    edit_json(sharded_copy / INDEX, lambda index: index["weight_map"].update({"ghost.weight": shard}))
    assert "ghost.weight" in refused(ppcl_rt.load, sharded_copy)


@pytest.mark.parametrize(
    "content", ["{}", '{"weight_map": []}', '{"weight_map": {"a": 1}}', '{"weight_map": ', "[1]", ""]
)
def test_broken_index(sharded_copy, content):
    (sharded_copy / INDEX).write_text(content)
    assert INDEX in refused(ppcl_rt.load, sharded_copy)


def test_tensors_that_nobody_listed(plain_copy):
    """More or fewer tensors than the catalog has checksums."""
    tensors = load_file(plain_copy / WEIGHTS)
    save_file({**tensors, "transformer_blocks.0.extra.weight": torch.ones(2)}, plain_copy / WEIGHTS)
    assert "transformer_blocks.0.extra.weight" in refused(ppcl_rt.load, plain_copy)
    tensors.pop("students.0-1.attn.to_q.weight")
    save_file(tensors, plain_copy / WEIGHTS)
    assert "students.0-1.attn.to_q.weight" in refused(ppcl_rt.load, plain_copy)


# Checkpoints with right checksums that contradict themselves.


def drop(prefix):
    def edit(_config, tensors):
        for name in [name for name in tensors if name.startswith(prefix)]:
            del tensors[name]

    return edit


def put(name, make):
    def edit(_config, tensors):
        assert name in tensors
        tensors[name] = make(tensors[name])

    return edit


CONTRADICTIONS = {
    "students.1-2": drop("students.1-2."),
    "transformer_blocks.3": drop("transformer_blocks.3."),
    "img_in.weight": drop("img_in.weight"),
    "transformer_blocks.1.order.image": drop("transformer_blocks.1.order.image"),
    "order.heads is no permutation": put("transformer_blocks.1.order.heads", lambda t: torch.tensor([0, 1, 1, 3])),
    "order.image is no permutation": put("students.0-1.order.image", lambda t: t + 1),
    "order.text is no permutation": put("transformer_blocks.0.order.text", lambda t: t - 1),
    "transformer_blocks.2.order.heads": put("transformer_blocks.2.order.heads", lambda t: t[:3]),
    "transformer_blocks.0.attn.to_q.weight": put("transformer_blocks.0.attn.to_q.weight", lambda t: t[:-8]),
    "proj_out.weight": put("proj_out.weight", lambda t: t.T.contiguous()),
    "transformer_blocks.0.replacements.mlp_image_50.weight": put(
        "transformer_blocks.0.replacements.mlp_image_50.weight", lambda t: t[:, :49].contiguous()
    ),
    "students.3-3.replacements.attn_text_2.bias": put("students.3-3.replacements.attn_text_2.bias", lambda t: t[:-1]),
    "transformer_blocks.1.replacements.attn_image_1": drop("transformer_blocks.1.replacements.attn_image_1."),
}


@pytest.mark.parametrize("named", CONTRADICTIONS)
def test_contradictions(tmp_path, make_checkpoint, named):
    """What a catalog promises and the weights do not hold, and the other way round, is refused by name."""
    made = make_checkpoint(tmp_path / "checkpoint", compensated=True, edit=CONTRADICTIONS[named])
    assert named in refused(ppcl_rt.load, made.folder, resident="all")


def test_order_of_fractions(tmp_path, make_checkpoint):
    """A rank order is of whole numbers: one that only rounds to a permutation is none."""
    edit = put("transformer_blocks.1.order.heads", lambda t: torch.tensor([0.9, 1.9, 2.9, 3.9]))
    refused(ppcl_rt.load, make_checkpoint(tmp_path / "checkpoint", edit=edit).folder, resident="all")


def change_catalog(change):
    return lambda config: change(config[CATALOG_KEY])


def set_at(*path):
    """Set ``content[a][b]... = value``; the value comes last."""
    *keys, last, value = path

    def change(content):
        for key in keys:
            content = content[key]
        content[last] = value

    return change


CATALOGS = {
    "one block fewer": change_catalog(lambda c: c["blocks"].pop()),
    "depth": change_catalog(set_at("architecture", "lists", 0, "depth", DEPTH + 1)),
    "depth and blocks": change_catalog(
        lambda c: (c["blocks"].append(c["blocks"][0]), c["architecture"]["lists"][0].update(depth=DEPTH + 1))
    ),
    "dim": change_catalog(set_at("architecture", "dim", 64)),
    "head_dim": change_catalog(set_at("architecture", "kinds", "two-stream", "head_dim", 16)),
    "zero head_dim": change_catalog(set_at("architecture", "kinds", "two-stream", "head_dim", 0)),
    "outer_params": change_catalog(set_at("architecture", "outer_params", 7)),
    "count of heads": change_catalog(set_at("architecture", "kinds", "two-stream", "groups", "heads", "count", 8)),
    "family": change_catalog(set_at("family", "flux")),
    "format": change_catalog(set_at("format", FORMAT + 1)),
    "format 0": change_catalog(set_at("format", 0)),
    "format text": change_catalog(set_at("format", "2")),
    "unknown key": change_catalog(set_at("surprise", 1)),
    "unknown key of two lines": change_catalog(set_at("sur\nprise", 1)),
    "no family": change_catalog(lambda c: c.pop("family")),
    "loss infinite": change_catalog(set_at("blocks", 0, "heads", 1, 1, float("inf"))),
    "loss nan": change_catalog(set_at("students", 0, "loss", float("nan"))),
    "loss negative": change_catalog(set_at("students", 0, "loss", -1.0)),
    "counts rise": change_catalog(lambda c: c["blocks"][0]["heads"].reverse()),
    "count 0": change_catalog(set_at("blocks", 0, "heads", -1, 0, 0)),
    "narrower is free": change_catalog(set_at("blocks", 0, "heads", 1, 1, 0.0)),
    "no counts": change_catalog(set_at("blocks", 0, "heads", [])),
    "student backwards": change_catalog(set_at("students", 0, "interval", {"first": 1, "last": 0})),
    "student negative": change_catalog(set_at("students", 0, "interval", {"first": -1, "last": 0})),
    "student beyond": change_catalog(set_at("students", 0, "interval", {"first": 2, "last": DEPTH})),
    "student twice": change_catalog(lambda c: c["students"].append(c["students"][0])),
    "student without weights": change_catalog(set_at("students", 0, "interval", {"first": 0, "last": 2})),
    "student from beyond": change_catalog(set_at("students", 0, "start", DEPTH)),
    "student from before": change_catalog(set_at("students", 0, "start", -1)),
    "not an object": set_at(CATALOG_KEY, [1]),
    "a string": set_at(CATALOG_KEY, "catalog"),
    "checksum missing": change_catalog(lambda c: c["checksums"].pop("proj_out.bias")),
    "checksum wrong": change_catalog(set_at("checksums", "proj_out.bias", "0" * 64)),
    "compensated": change_catalog(set_at("compensated", True)),
    "student at the end of numbers": change_catalog(set_at("students", 0, "interval", {"first": 0, "last": 10**30})),
    "outer_params without end": change_catalog(set_at("architecture", "outer_params", 10**400)),
    "depth without end": change_catalog(set_at("architecture", "lists", 0, "depth", 10**9)),
    "a group that nothing reads": change_catalog(
        set_at("architecture", "kinds", "two-stream", "groups", "more", {"count": 3})
    ),
    "a rank that factors nothing": change_catalog(
        set_at("architecture", "kinds", "two-stream", "groups", "more", {"count": 3, "is_rank": True})
    ),
}


@pytest.mark.parametrize("kind", CATALOGS)
def test_broken_catalog(plain_copy, kind):
    change_config(plain_copy, CATALOGS[kind])
    refused(ppcl_rt.load, plain_copy)


CONFIGS = {
    "unknown class": set_at("_class_name", "FluxTransformer2DModel"),
    "class is a list": set_at("_class_name", ["QwenImageTransformer2DModel"]),
    "no class": lambda c: c.pop("_class_name"),
    "no num_layers": lambda c: c.pop("num_layers"),
    "num_layers 0": set_at("num_layers", 0),
    "num_layers text": set_at("num_layers", "4"),
    "num_layers fraction": set_at("num_layers", 4.0),
    "num_layers without end": set_at("num_layers", 10**9),
    "num_layers larger": set_at("num_layers", DEPTH + 1),
    "num_layers smaller": set_at("num_layers", DEPTH - 1),
    "heads": set_at("num_attention_heads", 8),
    "heads 0": set_at("num_attention_heads", 0),
    "heads negative": set_at("num_attention_heads", -4),
    "heads null": set_at("num_attention_heads", None),
    "head_dim": set_at("attention_head_dim", 16),
    "in_channels": set_at("in_channels", 12),
    "in_channels text": set_at("in_channels", "many"),
    "joint_attention_dim": set_at("joint_attention_dim", 24),
    "patch_size": set_at("patch_size", 3),
    "patch_size list": set_at("patch_size", [2]),
    "rope odd": set_at("axes_dims_rope", [1, 3, 4]),
    "rope number": set_at("axes_dims_rope", 8),
    "rope short": set_at("axes_dims_rope", [4, 4]),
    "rope of another head": set_at("axes_dims_rope", [2, 2, 2]),
}


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize("kind", CONFIGS)
def test_broken_config(plain_copy, kind):
    change_config(plain_copy, CONFIGS[kind])
    refused(ppcl_rt.load, plain_copy)


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"null", b"\xff\xfe\x00", b'{"_class_name": }', b"[" * 100_000],
    ids=lambda c: str(c[:9]),
)
def test_config_is_no_json(plain_copy, content):
    (plain_copy / CONFIG).write_bytes(content)
    assert CONFIG in refused(ppcl_rt.load, plain_copy)


def test_no_such_path(plain_copy, tmp_path):
    """A path that is not there, a folder without config, a file, and a hub id that cannot be reached."""
    (plain_copy / CONFIG).unlink()
    paths = [tmp_path / "nowhere", str(tmp_path / "nowhere"), plain_copy, plain_copy / WEIGHTS, "no such folder", ""]
    for path in paths:
        refused(ppcl_rt.load, path, local_files_only=True)
    refused(ppcl_rt.load, "ppcl-test/not-there", local_files_only=True)
    refused(ppcl_rt.load, tmp_path, subfolder="nowhere")


# Plans.


def test_plans_for_something_else(made):
    """A plan of another checkpoint, for a student that is not there, or too wide."""
    dense = made.catalog.dense
    other = dense.model_copy(update={"checkpoint": "0123456789abcdef"})
    message = refused(ppcl_rt.load, made.folder, plan=other)
    assert "0123456789abcdef" in message and made.catalog.fingerprint in message
    document = json.loads(dense.to_json())
    absent = {**document, "blocks": [entry(0, 2, FULL, student=True)]}
    message = refused(ppcl_rt.load, made.folder, plan=Plan.from_json(json.dumps(absent)))
    assert "0..2" in message and "0..1" in message
    wide = {**document, "blocks": [entry(0, 0, FULL.replace(image=129))]}
    assert "129" in refused(ppcl_rt.load, made.folder, plan=Plan.from_json(json.dumps(wide)))
    deep = {**document, "depth": DEPTH + 1}
    refused(ppcl_rt.load, made.folder, plan=Plan.from_json(json.dumps(deep)))


NARROW = FULL.replace(heads=1, image=1, text=1, modulation=1)


def entry(first, last, width=NARROW, **more):
    return {"interval": {"first": first, "last": last}, "width": dict(width), **more}


PLANS = {
    "overlapping": {"blocks": [entry(0, 1, student=True), entry(1, 1)]},
    "twice": {"blocks": [entry(1, 1), entry(1, 1)]},
    "out of order": {"blocks": [entry(1, 1), entry(0, 0)]},
    "beyond depth": {"blocks": [entry(4, 4)]},
    "student beyond depth": {"blocks": [entry(3, 4, student=True)]},
    "backwards": {"blocks": [entry(2, 1, student=True)]},
    "negative": {"blocks": [entry(-1, 0, student=True)]},
    "long teacher": {"blocks": [entry(0, 1)]},
    "width negative": {"blocks": [entry(0, 0, {**NARROW, "image": -1})]},
    "width of two lines": {"blocks": [entry(0, 0, {**NARROW, "a\nb": 1})]},
    "beyond all numbers": {"blocks": [entry(0, 10**30, student=True)]},
    "width a list": {"blocks": [{**entry(0, 0), "width": [1, 1, 1, 1]}]},
    "width fraction": {"blocks": [entry(0, 0, {**NARROW, "heads": 1.5})]},
    "unknown key": {"surprise": 1},
    "unknown key of two lines": {"sur\nprise": 1},
    "unknown key in planned block": {"blocks": [entry(0, 0, surprise=1)]},
    "unknown key in interval": {"blocks": [{**entry(0, 0), "interval": {"first": 0, "last": 0, "surprise": 1}}]},
    "no blocks": {"blocks": None},
    "blocks text": {"blocks": "all"},
    "depth text": {"depth": "deep"},
    "depth negative": {"depth": -3},
    "no checkpoint": {"checkpoint": None},
}


@pytest.mark.parametrize("kind", PLANS)
def test_broken_plan(kind):
    """A sound plan with one thing changed."""
    sound = {"checkpoint": "x", "depth": DEPTH, "blocks": []}
    Plan.from_json(json.dumps(sound))
    refused(Plan.from_json, json.dumps({**sound, **PLANS[kind]}))


WIDTHS = {
    "width 0": {**NARROW, "heads": 0},
    "rank 0": {**NARROW, "modulation": 0},
    "width short": {"heads": 1, "image": 1, "text": 1},
    "width long": {**NARROW, "more": 1},
    "width empty": {},
}


@pytest.mark.parametrize("kind", WIDTHS)
def test_widths_of_another_kind_of_block(made, kind):
    """A plan knows no block; what its widths name and hold is checked against the catalog."""
    dense = json.loads(made.catalog.dense.to_json())
    plan = Plan.from_json(json.dumps({**dense, "blocks": [entry(0, 0, WIDTHS[kind])]}))
    refused(ppcl_rt.load, made.folder, plan=plan)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "1", '"plan"', b"\xff", "[" * 100_000, '{"depth": 1e999}'])
def test_plan_is_no_json(text):
    assert "not a plan" in refused(Plan.from_json, text)


def test_plan_files(tmp_path, made):
    """A plan's file is read back; a broken one is named."""
    path = tmp_path / "plan.json"
    path.write_text(made.catalog.dense.to_json())
    assert Plan.read(path) == made.catalog.dense
    path.write_text("{}")
    assert str(path) in refused(Plan.read, path)


# Writing.


@pytest.mark.parametrize("fail_at", [1, 2])
@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_interrupted_write(tmp_path, monkeypatch, make_checkpoint, fail_at, error):
    """A write that stops midway leaves the old checkpoint as it was and nothing beside it."""
    folder = tmp_path / "checkpoint"
    make_checkpoint(folder)
    (folder / "README.md").write_text("mine")
    before, calls = state_of(folder), []

    def failing(*arguments, **more):
        calls.append(arguments)
        if len(calls) == fail_at:
            raise error("stopped")
        save_file(*arguments, **more)

    monkeypatch.setattr("ppcl_rt.checkpoint.writer.save_file", failing)
    with pytest.raises(error):
        make_checkpoint(folder, seed=9, max_shard_size=200_000)
    assert len(calls) == fail_at
    assert state_of(folder) == before and [path.name for path in tmp_path.iterdir()] == ["checkpoint"]
    with pytest.raises(error):
        calls.clear()
        make_checkpoint(tmp_path / "new", max_shard_size=200_000)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]
    ppcl_rt.load(folder)


@pytest.mark.parametrize("sizes", [("10GB", 200_000), (200_000, "10GB"), (200_000, 100_000)])
def test_overwrite(tmp_path, make_checkpoint, build_inputs, run, same, sizes):
    """A new checkpoint in place of an old one leaves none of its files, and those of others alone."""
    folder = tmp_path / "checkpoint"
    make_checkpoint(folder, max_shard_size=sizes[0])
    (folder / "README.md").write_text("mine")
    made = make_checkpoint(folder, seed=9, max_shard_size=sizes[1])
    fresh = make_checkpoint(tmp_path / "fresh", seed=9, max_shard_size=sizes[1])
    assert state_of(folder) == {**state_of(fresh.folder), "README.md": b"mine"}
    same(run(ppcl_rt.load(folder), build_inputs()), run(made.stock, build_inputs()))


def test_a_load_opens_a_file_once_a_block(made, monkeypatch):
    """Not once a tensor: each time a file is opened, its whole header is parsed."""
    opened = []

    def opening(path, **more):
        opened.append(path)
        return safe_open(path, **more)

    monkeypatch.setattr(reader, "safe_open", opening)
    model = ppcl_rt.load(made.folder)
    # What lies outside the blocks has one opening, and one more where the dtype of the weights is asked for.
    assert DEPTH < len(opened) <= DEPTH + 2
    del opened[:]
    model.full_state()
    assert len(opened) == 1
    checkpoint = ppcl_rt.Checkpoint(made.folder)
    del opened[:]
    with checkpoint.kept_open(), checkpoint.kept_open():
        tensors = [checkpoint.read(name) for name in checkpoint.names[:3]]
    assert len(opened) == 1 and all(torch.equal(t, made.tensors[n]) for n, t in zip(checkpoint.names, tensors))
    checkpoint.read(checkpoint.names[0])
    assert len(opened) == 2
