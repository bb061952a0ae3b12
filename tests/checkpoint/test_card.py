"""Licence and base model travel with a checkpoint: in its catalog, its files' headers and its model card."""

import json

import pytest
from huggingface_hub import ModelCard
from safetensors import safe_open

import ppcl_rt
from ppcl_rt.checkpoint.card import CARD, Origin, read_origin
from ppcl_rt.checkpoint.names import CATALOG_KEY, CONFIG, WEIGHTS


def stock(build_stock, folder, card):
    """A checkpoint as diffusers saves one, with a card."""
    build_stock().save_pretrained(folder)
    (folder / CARD).write_text(card)
    return folder


@pytest.mark.parametrize(
    ("front", "origin"),
    [
        ("license: apache-2.0\nbase_model: Qwen/Qwen-Image", Origin("Qwen/Qwen-Image", "apache-2.0")),
        ("license: other\nlicense_name: flux-1-dev\nbase_model:\n- a/b\n- c/d", Origin("a/b", "other/flux-1-dev")),
        ("license: other", Origin(None, "other")),
        ("license: [1]\nbase_model: {a: b}", Origin()),
        ("license: [", Origin()),
        (f"license: {'x' * 101}", Origin()),
    ],
)
def test_a_card_is_read(tmp_path, front, origin):
    (tmp_path / CARD).write_text(f"---\n{front}\n---\n# Somebody's model\n")
    assert read_origin(tmp_path) == origin


def test_a_pipelines_card_is_its_transformers(tmp_path):
    (tmp_path / CARD).write_text("---\nlicense: mit\n---\n")
    (tmp_path / "transformer").mkdir()
    assert read_origin(tmp_path / "transformer") == Origin()
    (tmp_path / "model_index.json").write_text("{}")
    assert read_origin(tmp_path / "transformer") == Origin(None, "mit")


@pytest.mark.parametrize("license_", ["apache-2.0", "other/flux-1-dev"])
def test_what_is_known_of_a_stock_model_travels(build_stock, tmp_path, license_):
    """Card of the stock folder -> catalog -> card, headers and catalog of what is saved -> the next one."""
    name = license_.removeprefix("other/")
    front = f"license: {name}" if name == license_ else f"license: other\nlicense_name: {name}"
    first = stock(build_stock, tmp_path / "stock", f"---\n{front}\nbase_model: a/b\n---\n")
    for folder in (tmp_path / "once", tmp_path / "twice"):
        ppcl_rt.load(first).save_pretrained(folder)
        assert read_origin(folder) == Origin("a/b", license_)
        catalog = json.loads((folder / CONFIG).read_text())[CATALOG_KEY]
        assert (catalog["base_model"], catalog["license"]) == ("a/b", license_)
        with safe_open(folder / WEIGHTS, "pt") as file:
            assert file.metadata() == {"format": "pt", "base_model": "a/b", "license": license_}
        card = ModelCard.load(folder / CARD)
        assert card.data.base_model == "a/b" and "ratio" in card.text
        first = folder


def test_files_are_the_same_bytes_each_time(build_stock, tmp_path):
    """Two entries of metadata: the library puts them in either order."""
    first = stock(build_stock, tmp_path / "stock", "---\nlicense: mit\nbase_model: a/b\n---\n")
    written = set()
    for n in range(8):
        ppcl_rt.load(first).save_pretrained(tmp_path / str(n))
        written.add((tmp_path / str(n) / WEIGHTS).read_bytes())
    assert len(written) == 1


def test_somebodys_own_card_stays(made, tmp_path):
    (tmp_path / CARD).write_text("mine\n")
    ppcl_rt.load(made.folder).save_pretrained(tmp_path)
    assert (tmp_path / CARD).read_text() == "mine\n"
    ppcl_rt.load(made.folder).save_pretrained(tmp_path / "new")
    assert "not known" in (tmp_path / "new" / CARD).read_text()
