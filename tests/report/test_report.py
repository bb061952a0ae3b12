"""The page of a folder of results: it holds their figures, needs nothing else, and names what it could not read."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from ppcl_rt.report.page import write_report

ROOT = Path(__file__).parents[2]
SCENES = ROOT / "examples" / "scenes"
LOG = [
    {"stage": "teacher", "begun": True, "commit": "c", "seconds": 0.0},
    {"stage": "teacher", "step": 100, "of": 400, "loss": 2.0, "seconds": 30.0},
    {"stage": "teacher", "step": 200, "of": 400, "loss": 1.5, "seconds": 60.0},
    # Stopped here, and resumed from step 100.
    {"stage": "teacher", "resumed": 100, "seconds": 0.0},
    {"stage": "teacher", "step": 200, "of": 400, "loss": 1.25, "seconds": 30.0},
    {"stage": "teacher", "step": 400, "of": 400, "loss": 0.875, "seconds": 90.0},
]


class Page(HTMLParser):
    """The text of a page: cells by row, paragraphs by class, and every attribute that loads something."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.headings: list[str] = []
        self.labels: list[str] = []
        self.sources: list[str] = []
        self.tags: set[str] = set()
        self.text = ""
        self._into: list[str] | None = None
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        given = dict(attributes)
        self.sources += [given[name] for name in ("src", "href", "xlink:href", "data", "srcset") if given.get(name)]
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th", "h2"):
            self._into = self.headings if tag == "h2" else self.rows[-1]
            self._into.append("")
        if tag == "svg":
            self.labels.append(given["aria-label"])

    def handle_endtag(self, tag):
        if tag in ("td", "th", "h2"):
            self._into = None

    def handle_data(self, data):
        self.text += data
        if self._into is not None:
            self._into[-1] += data


@pytest.fixture
def made(tmp_path):
    """Write the page of a folder; returns it as text and taken apart."""

    def make(folder):
        text = write_report(folder, tmp_path / "made.html").read_text()
        return text, Page(text)

    return make


@pytest.fixture
def results(tmp_path):
    """A folder with a log and nothing else."""
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "log.jsonl").write_text("".join(json.dumps(event) + "\n" for event in LOG))
    return folder


def test_the_page_of_the_scenes_holds_its_figures(made, tmp_path):
    # Without the weights: plans come from the catalog alone, and without a program for each.
    folder = tmp_path / "scenes"
    folder.mkdir()
    for path in SCENES.iterdir():
        if path.suffix != ".safetensors":
            (folder / path.name).symlink_to(path)
    text, page = made(folder)
    for row in json.loads((SCENES / "compare.json").read_text())["rows"]:
        strict = row["quality"]["strict"]
        said = f"{strict['mean']:.3f} ({strict['low']:.3f}-{strict['high']:.3f})"
        assert any(cells[:2] == [f"{row['ratio']:g}", row["method"]] and cells[4] == said for cells in page.rows)
    for row in json.loads((SCENES / "eval.json").read_text()):
        said = f"{row['soft']:.3f} ({row['soft_ci'][0]:.3f}-{row['soft_ci'][1]:.3f})"
        assert any(cells[2:3] == [f"{row['params']:,}"] and cells[-1] == said for cells in page.rows)
    assert ["9", "1", "0.0727 to 0.0727", "0.053 to 0.053"] in page.rows
    assert ["recover.steps", "3000"] in page.rows
    assert {"strict score against ratio", "soft score against ratio", "teacher: loss", "velocity error"} <= {
        *page.labels
    }
    assert "ppcl eval CHECKPOINT --ratios 1,0.7,0.5,0.35,0.3,0.25,0.2,0.15 --json eval.json" in page.text
    assert "--steps 400 --prompts 1000 --seeds 1" in page.text
    assert text.count("what runs at ratio") >= 3 and "Damaged" not in page.text and "Not shown" not in page.text


def test_the_page_needs_nothing_else(made, results):
    Image.new("RGB", (8, 8)).save(results / "sheet.png")
    text, page = made(results)
    assert all(source.startswith(("data:", "#")) for source in page.sources), page.sources
    assert any(source.startswith("data:image/png;base64,") for source in page.sources)
    assert not re.search(r"https?:|//[a-z]|@import|url\((?!#)", text)
    assert not page.tags & {"script", "link", "iframe", "object"}
    assert 'name="viewport"' in text and "prefers-color-scheme: dark" in text


def test_a_log_becomes_a_curve(made, results):
    with (results / "log.jsonl").open("a") as file:
        file.write('{"stage": "teacher", "step": 50')
    _, page = made(results)
    assert page.labels == ["teacher: loss"]
    # The last losses, and the seconds of both processes.
    assert ["teacher", "400", "2", "0.875", "2.5"] in page.rows
    assert "1 lines of it are no events" in page.text


def test_damaged_and_unknown_files_are_named(made, results):
    whole = json.loads((SCENES / "eval.json").read_text())
    (results / "below").mkdir()
    (results / "below" / "eval.json").write_text(json.dumps(whole)[:-100])
    del whole[0]["strict"], whole[1]["params"]
    (results / "eval.json").write_text(json.dumps(whole))
    (results / "picture.png").write_bytes((SCENES / "compare.png").read_bytes()[:5000])
    (results / "odd.json").write_text('{"a": 1}')
    (results / "<b>.txt").write_text("")
    text, page = made(results)
    for name, why in (
        ("below/eval.json", "it is no JSON"),
        ("eval.json", "rows.0"),
        ("picture.png", "it is no whole PNG file"),
    ):
        assert f"Damaged, left out: {name}: " in page.text and why in page.text
    assert "Not shown: <b>.txt, odd.json" in page.text and "<b>" not in text
    assert page.labels == ["teacher: loss"]


def test_names_are_no_markup(made, results):
    quality = {name: {"mean": 0.5, "low": 0.4, "high": 0.6} for name in ("strict", "soft")}
    rows = [
        {"method": "$a<b>$x_$", "ratio": 0.5, "share": share, "flops": 0.2, "quality": quality} for share in (0.4, 0.5)
    ]
    (results / "compare.json").write_text(json.dumps({"rows": rows}))
    text, page = made(results)
    assert "$a<b>$x_$" in page.text and "<b>" not in text and "strict score against ratio" in page.labels


def test_evaluations_without_a_judge(made, results):
    rows = [
        {"asked": {"memory": 6e6}, "ratio": 0.4, "params": 10, "flops": 1e6, "bytes": 40, "ms": 1.5, "batch": 2}
        | {"psnr": psnr, "ssim": ssim, "pictures": []}
        for psnr, ssim in ((None, 1.0), (21.25, 0.75))
    ]
    (results / "likeness.json").write_text(json.dumps(rows))
    _, page = made(results)
    assert any(cells[-2:] == ["the same", "1.000"] for cells in page.rows)
    assert any(cells[-2:] == ["21.2 dB", "0.750"] for cells in page.rows)
    assert "SSIM to the dense model against ratio" in page.labels and "--memory 6000000,6000000" in page.text


def test_parts_of_a_gpu_run(made, results):
    about = {"device": "NVIDIA H200", "torch": "2.13", "commit": "c" * 40, "dirty": False, "status": 0}
    row = {"group": "dense-1024", "contestant": "ours", "plan": "dense", "size": 1024, "ms": 12.5, "device_ms": 12.0}
    ratio = {**row, "what": "speed to eager", "value": 1.625, "ratio": 1}
    content = {"part": "model", **about, "command": "bash bench/gpu.sh model", "results": [row], "ratios": [ratio]}
    (results / "model.json").write_text(json.dumps(content))
    _, page = made(results)
    assert any(cells[:1] == ["dense-1024"] and "12.50" in cells for cells in page.rows)
    target = "whole forward, 1024 x 1024: speed to diffusers"
    assert any(cells[:4] == [target, ">= 1.5", "1.625", "met"] for cells in page.rows)
    assert "bash bench/gpu.sh model" in page.text


def test_pictures_of_a_run_and_a_notice(made, results):
    figures = {"prompts": ["a red ring"], "ratios": [{"ratio": 0.5, "psnr_and_ssim": [[20.5, 0.9]]}]}
    (results / "pictures.json").write_text(json.dumps(figures))
    (results / "NOTICE").write_text("All by <somebody>.")
    _, page = made(results)
    assert ["a red ring", "0.5", "20.5 dB", "0.900"] in page.rows and "All by <somebody>." in page.text


def test_through_the_program(ppcl, results, tmp_path):
    out = tmp_path / "page.html"
    status, said, _ = ppcl("report", results, "--out", out)
    assert status == 0 and said == f"wrote {out}\n" and "teacher: loss" in out.read_text()
    empty = tmp_path / "empty"
    empty.mkdir()
    for folder, why in ((empty, "holds no results"), (tmp_path / "missing", "is no folder")):
        status, said, error = ppcl("report", folder, "--out", out)
        assert status == 2 and not said and why in error and error.count("\n") == 1
    # What was there is kept.
    assert "teacher: loss" in out.read_text()


def test_a_run_that_cannot_have_a_page_goes_on(tmp_path):
    pipeline = pytest.importorskip("ppcl_train.pipeline")
    assert pipeline.reported(tmp_path).startswith("wrote no report: ")
    (tmp_path / "log.jsonl").write_text(json.dumps(LOG[1]) + "\n")
    assert pipeline.reported(tmp_path) == f"wrote {tmp_path / 'report.html'}"
