"""Licence and base model travel with a checkpoint: in its catalog, its files' headers and its model card."""

import json
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from safetensors import safe_open

import ppcl_rt
from ppcl_rt.checkpoint.card import CARD, Origin, read_origin, write_card
from ppcl_rt.checkpoint.figures import RATIOS
from ppcl_rt.checkpoint.names import CATALOG_KEY, CONFIG, WEIGHTS
from ppcl_rt.checkpoint.reader import Checkpoint

SCENES = Path(__file__).parents[2] / "examples" / "scenes"


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


def table(folder):
    """The table of a card: a list of cells for each ratio."""
    lines = [line for line in (folder / CARD).read_text().splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def test_a_card_says_what_ratios_cost_and_lose(tmp_path):
    """The figures of README, and the losses of the plans that the runtime takes, sketches and all."""
    source = Checkpoint(SCENES)
    assert source.catalog is not None
    write_card(tmp_path, source.catalog)
    rows = {float(row[0]): row[1:] for row in table(tmp_path)}
    assert tuple(rows) == RATIOS
    assert rows[1.0] == ["4,084,912 (1.00)", "66.1 MFLOPs (1.00)", "8.17 MB", "0: the dense model"]
    assert rows[0.5][:3] == ["1,765,048 (0.43)", "33.1 MFLOPs (0.50)", "3.53 MB"]
    planner = ppcl_rt.Planner(source.catalog, source.sketches)
    for ratio in RATIOS[1:]:
        plan = planner.plan(ratio)
        measured = planner.measured_loss(plan)
        assert rows[ratio][3] == f"{measured:.2g}, measured"
        # Of the same plan, by sketches: a prediction, which is near.
        assert measured == pytest.approx(planner.loss(plan), rel=0.5)
    text = (tmp_path / CARD).read_text()
    assert "16 image and 7 text tokens" in text and ModelCard.load(tmp_path / CARD).data.tags == ["ppcl", "qwen-image"]


def test_without_measured_plans_losses_are_predicted(made, tmp_path):
    write_card(tmp_path, made.catalog)
    planner = ppcl_rt.Planner(made.catalog)
    rows = table(tmp_path)
    assert [row[0] for row in rows] == [f"{r:g}" for r in RATIOS if r >= planner.smallest]
    for row in rows[1:]:
        plan = planner.plan(float(row[0]))
        assert planner.measured_loss(plan) is None
        assert row[4] == f"{planner.loss(plan):.2g}, predicted"


def test_a_ratio_without_a_plan_has_no_row(build_stock, tmp_path):
    """A stock model runs at ratio 1 alone. With sketches, only measured plans are those that the runtime takes."""
    build_stock().save_pretrained(tmp_path / "stock")
    ppcl_rt.load(tmp_path / "stock").save_pretrained(tmp_path / "saved")
    assert [row[0] for row in table(tmp_path / "saved")] == ["1"]
    source = Checkpoint(SCENES)
    write_card(tmp_path, source.catalog.model_copy(update={"frontier": ()}))
    assert [row[0] for row in table(tmp_path)] == ["1"]


def test_a_checkpoint_of_one_plan_has_its_own_row(made, tmp_path):
    model = ppcl_rt.load(made.folder, ratio=0.5)
    model.save_plan(tmp_path)
    (row,) = table(tmp_path)
    assert float(row[0]) == pytest.approx(model.catalog.ratio(model.plan), rel=5e-3) and row[0] != "1"
    assert row[1].startswith(f"{model.catalog.architecture.params(model.plan):,} ")
