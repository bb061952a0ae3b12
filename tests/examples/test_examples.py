"""The programs of `examples/` run from any folder, and say what they promise."""

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

import ppcl_rt

ROOT = Path(__file__).parents[2]
# Program -> what its output has to hold. Imports take five seconds and more, and the rest two to five: one program is
# started as a reader starts it, and the others run in this process.
SHORT = {
    "load_and_switch": (r"asked 1.0: ratio 1.000, .* the same pictures", r"asked 0.35: ratio 0.3.* dB", r"after it:"),
    "budgets": (r"params 1M: .*, 0.9\d M parameters", r"flops 20M: .*, 19\.\d MFLOPs", r"memory 100KB: no plan of .*"),
    "schedule": (r"0 of 20 steps dense, then 0.2: \d+\.\d dB", r"8 of 20 steps dense", r"0.35 for 4 steps"),
    "lora": (r"ratio 1.0: 72 layers exactly", r"at scale 1.0: SSIM 0\.\d+"),
    "quantised": (r"ratio 0.5, int8: .* SSIM (0.9|1.0)", r"ratio 0.5, float8: .* SSIM (0.9|1.0)", r"ratio 0.7, "),
    "serve_two_ratios": (r"4 of 4 pictures are the same", r"two at once: .*"),
}
STARTED, LONG = "load_and_switch", "compress_a_toy_model"


def started(name, folder, *arguments):
    """What a program prints in a process of its own."""
    paths = [*(str(ROOT / each) for each in (".", "train", "kernels")), os.environ.get("PYTHONPATH", "")]
    # Two threads of torch among two workers of pytest would take turns.
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(
        [sys.executable, ROOT / f"examples/{name}.py", *arguments], cwd=folder, env=env, capture_output=True, text=True
    )
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


@pytest.mark.parametrize("name", SHORT)
def test_a_short_program(name, tmp_path, monkeypatch, capsys):
    if name == "lora":
        pytest.importorskip("peft")
    if name == STARTED:
        said = started(name, tmp_path)
    else:
        monkeypatch.chdir(tmp_path)
        runpy.run_path(str(ROOT / f"examples/{name}.py"), run_name="__main__")
        said = capsys.readouterr().out
    for wanted in SHORT[name]:
        assert re.search(wanted, said), f"nothing like {wanted} in:\n{said}"
    assert not list(tmp_path.iterdir()), "it leaves nothing behind"


@pytest.mark.slow
def test_the_toy_is_compressed(tmp_path):
    said = started(LONG, tmp_path, tmp_path / "toy")
    assert re.search(r"ratio 1\.000: .* SSIM 1\.000 to ratio 1", said) and len(re.findall(r"^ratio ", said, re.M)) == 3
    model = ppcl_rt.load(tmp_path / "toy/checkpoint", 0.5)
    assert model.catalog.ratio(model.plan) <= 0.5


def test_every_program_is_run_and_says_how():
    programs = {path.stem: path.read_text() for path in (ROOT / "examples").glob("*.py")}
    assert programs.keys() == {*SHORT, LONG}
    for name, text in programs.items():
        assert f"\npython examples/{name}.py" in text and len(text.splitlines()) <= 55, name
