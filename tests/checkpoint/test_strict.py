"""What checksums of bytes alone cannot tell, and what must be refused before memory is taken for it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from formats import change_config, change_header

import ppcl_rt
from ppcl_rt.checkpoint.names import CATALOG_KEY, CHECKSUM_KEY, CONFIG, INDEX, MOST_JSON, WEIGHTS, needs_catalog
from ppcl_rt.messages import MOST_CHARACTERS, brief


@pytest.fixture
def copy(tmp_path, make_checkpoint):
    """A checkpoint of one file, to be altered."""
    groups = {"heads": (3, 1), "image": (96, 0), "text": (31, 0), "modulation": (7, 1)}
    return make_checkpoint(tmp_path / "copy", compensated=True, groups=groups).folder


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


def test_a_setting_that_nothing_else_tells_is_refused(copy):
    """These load: sizes stay as they were, positions are encoded otherwise."""
    change_config(copy, lambda config: config.update(axes_dims_rope=[2, 4, 2]), sealed=False)
    refused(copy, f'settings and catalog .* or drop "{CHECKSUM_KEY}"')
    change_config(copy, lambda config: config.pop(CHECKSUM_KEY))
    ppcl_rt.load(copy, 0.7)


@pytest.mark.parametrize("changed", [{"zz": 1}, {CHECKSUM_KEY: None}, {CHECKSUM_KEY: "0" * 64}, {CATALOG_KEY: None}])
def test_a_checksum_that_differs_is_refused(copy, changed):
    change_config(copy, lambda config: config.update(changed), sealed=False)
    refused(copy, "was altered: its settings and catalog")


def test_a_loss_in_the_catalog_is_covered(copy):
    """Another loss makes other plans, in silence."""
    change_config(copy, lambda config: config[CATALOG_KEY]["students"][0].update(loss=9.0), sealed=False)
    refused(copy, "was altered: its settings and catalog")


def test_notes_and_the_order_of_keys_do_not_count(copy):
    """What diffusers and hubs write under private names, and what an editor does to the layout."""

    def turn(config):
        turned = dict(reversed(config.items()))
        config.clear()
        config.update(turned, _diffusers_version="0.99", _name_or_path="elsewhere")

    change_config(copy, turn, sealed=False)
    ppcl_rt.load(copy, 0.7)


@pytest.mark.parametrize("note", [["axes_dims_rope"], 2**64, None])
def test_a_note_of_diffusers_drops_no_setting(copy, note):
    """Settings that it lists would come from defaults; no checksum covers private names."""
    change_config(copy, lambda config: config.update(_use_default_values=note))
    assert ppcl_rt.load(copy, 0.7).config.axes_dims_rope == [2, 2, 4]


@pytest.mark.parametrize(
    ("setting", "value", "said"),
    [
        ("axes_dims_rope", [2, 2, 4.0], "axes_dims_rope: 2: .* valid integer"),
        ("axes_dims_rope", [2, 2, 2, 2], "axes_dims_rope"),
        ("zero_cond_t", 0, "zero_cond_t: .* valid boolean"),
        ("guidance_embeds", "a\nb" * 10**4, "guidance_embeds: .* valid boolean"),
        ("patch_size", 2.0, "patch_size: .* valid integer"),
    ],
)
def test_settings_of_another_type_are_refused(copy, setting, value, said):
    """A constructor takes them, and a forward fails."""
    change_config(copy, lambda config: config.update({setting: value}))
    refused(copy, said)


def test_a_saved_model_has_a_checksum_of_its_own_settings(copy, tmp_path):
    model = ppcl_rt.load(copy, 0.7)
    model.register_to_config(axes_dims_rope=(2, 4, 2))
    model.save_pretrained(tmp_path / "saved")
    assert ppcl_rt.load(tmp_path / "saved", 0.7).config.axes_dims_rope == [2, 4, 2]
    checksums = {json.loads((folder / CONFIG).read_text())[CHECKSUM_KEY] for folder in (copy, tmp_path / "saved")}
    assert len(checksums) == 2


@pytest.mark.parametrize("students", [(), ((0, 1),)])
@pytest.mark.parametrize("lose", [lambda config: config.pop(CATALOG_KEY), lambda config: config.update(_ppcl=None)])
def test_a_catalog_that_was_lost_is_missed(tmp_path, make_checkpoint, students, lose):
    """With its checksum: what is left would be a stock checkpoint, were it not for the tensors' names."""
    folder = make_checkpoint(tmp_path / "copy", students=students).folder
    change_config(folder, lambda config: (config.pop(CHECKSUM_KEY), lose(config)))
    with pytest.raises(ValueError, match=r"has no catalog, but .* fetch config.json again") as caught:
        ppcl_rt.load(folder)
    assert len(str(caught.value)) <= MOST_CHARACTERS


@pytest.mark.parametrize(
    ("name", "ours"),
    [
        ("students.0-1.attn.to_q.weight", True),
        ("text_runs.0.z_1.up", True),
        ("sketches.plan", True),
        ("transformer_blocks.0.order.heads", True),
        ("transformer_blocks.0.replacements.attn_image_1.bias", True),
        ("transformer_blocks.0.attn.to_q.down", True),
        ("transformer_blocks.0.attn.to_q.weight", False),
        ("ff.up.weight", False),
        ("proj.narrow.weight", False),
    ],
)
def test_names_that_no_stock_checkpoint_has(name, ours):
    assert needs_catalog(name) is ours


@pytest.mark.parametrize("name", [CONFIG, INDEX])
def test_json_without_end_is_not_read(copy, name):
    """A file of a terabyte that takes no place on the disk."""
    with (copy / name).open("ab") as file:
        file.truncate(2**40)
    refused(copy, f"{name} cannot be read as JSON .it has more than {MOST_JSON} bytes")


def test_a_header_without_end_is_not_read(copy):
    """Each tensor that it lists takes a kilobyte."""
    with (copy / WEIGHTS).open("r+b") as file:
        file.write((MOST_JSON + 1).to_bytes(8, "little"))
        file.truncate(2**27)
    refused(copy, f"a header of {MOST_JSON + 1} bytes")


def test_what_would_not_be_read_is_not_written(tmp_path, make_checkpoint):
    made = make_checkpoint(tmp_path / "copy")
    before = (made.folder / CONFIG).read_bytes()
    catalog = made.catalog.model_copy(update={"task": {"note": "x" * MOST_JSON}})
    with pytest.raises(ValueError, match=f"at most {MOST_JSON} are read"):
        ppcl_rt.write_checkpoint(made.folder, made.config, catalog, made.tensors)
    assert (made.folder / CONFIG).read_bytes() == before


@pytest.mark.parametrize("key", ["blocks", "students", "text_runs", "frontier"])
def test_lists_without_end_are_refused_before_each_entry_is_judged(copy, key):
    """Two millions, which a file has room for, took minutes and gigabytes."""
    change_config(copy, lambda config: config[CATALOG_KEY].update({key: [{}] * 20_000}))
    refused(copy, f"broken catalog: {key} lists 20000")


def test_a_class_name_of_any_length_is_refused_briefly(copy):
    change_config(copy, lambda config: config.update(_class_name="a\n" * 10**4))
    refused(copy, "families here")


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
