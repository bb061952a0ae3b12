"""Pictures of the docs are what the code draws, and addresses of others are well formed."""

import importlib.util
import re
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import pytest
from PIL import Image

from ppcl_rt.checkpoint.reader import Checkpoint
from ppcl_rt.pipelines.plan_picture import draw_plan
from ppcl_rt.planning.planner import Planner

ROOT = Path(__file__).parents[2]
DOCUMENTS = sorted(
    path for pattern in ("*.md", "docs/**/*.md", "examples/*/*.md") for path in ROOT.glob(pattern) if path.is_file()
)
# Of the pixels of a picture with text: versions of pillow draw letters differently.
MEAN_DIFFERENCE = 2


@pytest.fixture(scope="module")
def pictures():
    spec = importlib.util.spec_from_file_location("pictures_of_docs", ROOT / "docs/making/pictures.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_pictures_are_those_that_the_script_draws(pictures):
    drawn = pictures.drawn()
    assert {path.name for path in pictures.FOLDER.iterdir()} == set(drawn)
    stale = [name for name, text in drawn.items() if (pictures.FOLDER / name).read_text() != text]
    assert not stale, f"run python docs/making/pictures.py: {stale}"


def test_the_text_run_shows_what_a_plan_does_not_update(pictures):
    text = pictures.text_run(8, pictures.Interval(2, 5))
    assert [f">z_{n}<" in text for n in range(8)] == [False, False, False, True, True, True, False, False]
    # A run up to the last block needs no map after it: nobody reads the text.
    assert ">text<" in text and ">text<" not in pictures.text_run(4, pictures.Interval(1, 3))


def test_the_plan_is_that_of_the_shipped_checkpoint():
    source = Checkpoint(ROOT / "examples" / "scenes")
    drawn = draw_plan(source.catalog, Planner(source.catalog, source.sketches).plan(0.5))
    stored = Image.open(ROOT / "docs/plan.png").convert("RGB")
    assert stored.size == drawn.size
    difference = np.abs(np.asarray(stored, dtype=int) - np.asarray(drawn, dtype=int)).mean()
    assert difference < MEAN_DIFFERENCE, "run ppcl plan examples/scenes --ratio 0.5 --picture docs/plan.png"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_addresses_of_others_are_well_formed(document):
    """By form alone: tests ask no network."""
    for address in re.findall(r"\]\(([^)\s]*://[^)\s]*)\)", document.read_text()):
        parts = urlsplit(address)
        host = re.fullmatch(r"([a-z0-9-]+\.)+[a-z]{2,}", parts.netloc)
        assert parts.scheme == "https" and host, f"{document.name}: {address}"
        assert not re.search(r"[.,;:'\"]$", address), f"{document.name}: {address} ends in punctuation"
