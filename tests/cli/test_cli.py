"""The program: what it writes, and that bad input ends in one line and status 2 with nothing half-written."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

import ppcl_rt
from ppcl_rt import Plan
from ppcl_rt.cli import main as cli

CHECKPOINT = Path(__file__).parents[2] / "examples" / "scenes"


def test_info_plan_and_json(ppcl, tmp_path):
    status, out, _ = ppcl("info", CHECKPOINT)
    assert status == 0 and "students" in out
    status, out, _ = ppcl("info", CHECKPOINT, "--json")
    assert status == 0 and json.loads(out)["family"] == "qwen-image"
    file = tmp_path / "plan.json"
    status, out, _ = ppcl("plan", CHECKPOINT, "--ratio", 0.6, "--out", file, "--json")
    catalog = ppcl_rt.load(CHECKPOINT).catalog
    plan = Plan.read(file)
    said = json.loads(out)
    assert status == 0 and Plan.model_validate(said["plan"]) == plan and said["asked"] == {"ratio": 0.6}
    assert catalog.check(plan) and catalog.ratio(plan) == said["granted"]["ratio"] <= 0.6


def test_plan_within_other_budgets(ppcl):
    """Every word of `Budget` is an option; what is granted is said in each currency, whichever was asked for."""
    architecture = ppcl_rt.load(CHECKPOINT).catalog.architecture
    for options, asked in (
        (("--memory", "6MB", "--dtype", "float32"), {"memory": 6e6}),
        (("--flops", "20M"), {"flops": 20e6}),
        (("--params", "1m", "--ratio", 0.9), {"params": 1e6, "ratio": 0.9}),
        (("--flops", "40M", "--shape", "32+7x1"), {"flops": 40e6, "shape": [32, 7, 1]}),
    ):
        status, out, err = ppcl("plan", CHECKPOINT, *options, "--json")
        assert status == 0, err
        said = json.loads(out)
        assert said["asked"] == asked
        plan, granted = Plan.model_validate(said["plan"]), said["granted"]
        assert all(granted[name] <= most for name, most in asked.items() if name != "shape")
        assert granted["params"] == architecture.params(plan)
        assert granted["memory"] == (4 if "--dtype" in options else 2) * granted["params"]
        tokens = asked.get("shape", [16, 7, 1])
        assert granted["flops"] == architecture.flops(plan, *tokens)
    status, out, _ = ppcl("plan", CHECKPOINT, "--params", "1m")
    assert status == 0 and "asked: params 1,000,000" in out and "granted: ratio " in out


def test_sample_is_fixed_by_its_seed_and_differs_with_the_ratio(ppcl, tmp_path):
    def draw(name, *more):
        status, _, err = ppcl("sample", CHECKPOINT, "--prompt", "two red squares", "--out", tmp_path / name, *more)
        assert status == 0, err
        return Image.open(tmp_path / name).convert("RGB").tobytes()

    once, again = draw("a.png", "--seed", 0), draw("b.png", "--seed", 0)
    assert once == again != draw("c.png", "--seed", 1)
    smallest = str(ppcl_rt.Planner(ppcl_rt.load(CHECKPOINT).catalog).smallest + 0.01)
    assert draw("d.png", "--ratio", smallest) != once
    # A schedule that is dense for longer than there are steps is the dense model.
    assert draw("e.png", "--ratio", smallest, "--dense-steps", 1000) == once


def test_sample_takes_a_plan(ppcl, tmp_path):
    ppcl("plan", CHECKPOINT, "--ratio", 0.6, "--out", tmp_path / "p.json")
    status, out, err = ppcl(
        "sample", CHECKPOINT, "--plan", tmp_path / "p.json", "--prompt", "a red ring", "--out", tmp_path / "x.png"
    )
    planned = Plan.read(tmp_path / "p.json")
    ratio = ppcl_rt.load(CHECKPOINT).catalog.ratio(planned)
    assert status == 0 and f"at ratio {ratio:.3f}" in out and ratio <= 0.6, err


def test_eval_writes_what_it_promises(ppcl, tmp_path):
    file = tmp_path / "out.json"
    status, _, err = ppcl("eval", CHECKPOINT, "--ratios", "1,0.6", "--prompts", 5, "--seed", 1, "--json", file)
    assert status == 0, err
    results = json.loads(file.read_text())
    assert [row["asked"] for row in results] == [{"ratio": 1.0}, {"ratio": 0.6}]
    assert results[0]["ratio"] == 1 and results[1]["ratio"] <= 0.6
    scores = {"strict", "strict_ci", "soft", "soft_ci"}
    for row in results:
        assert set(row) == {"asked", "ratio", "params", "flops", "bytes", "ms", "batch", "kinds"} | scores
        assert set(row["kinds"]) == {"object", "count", "groups", "relation", "text"}
        assert all(set(kind) == scores for kind in row["kinds"].values())
    for cost in ("params", "flops", "bytes"):
        assert results[1][cost] < results[0][cost]


BAD = {
    "ratio 0": ("sample", CHECKPOINT, "--ratio", "0", "--prompt", "a red ring"),
    "ratio 1.5": ("sample", CHECKPOINT, "--ratio", "1.5", "--prompt", "a red ring"),
    "ratio -1": ("plan", CHECKPOINT, "--ratio", "-1"),
    "ratio nan": ("plan", CHECKPOINT, "--ratio", "nan"),
    "ratio half": ("sample", CHECKPOINT, "--ratio", "half", "--prompt", "a red ring"),
    "ratio below the smallest": ("plan", CHECKPOINT, "--ratio", "0.001"),
    "ratios half": ("eval", CHECKPOINT, "--ratios", "1,half"),
    "ratios empty": ("eval", CHECKPOINT, "--ratios", ""),
    "one ratio of many too small": ("eval", CHECKPOINT, "--ratios", "1,0.001"),
    "memory lots": ("plan", CHECKPOINT, "--memory", "lots"),
    "latency in bytes": ("plan", CHECKPOINT, "--latency", "3GB"),
    "shape of one number": ("plan", CHECKPOINT, "--flops", "20M", "--shape", "16"),
    "too few parameters": ("sample", CHECKPOINT, "--params", "1k", "--prompt", "a red ring"),
    "no such dtype": ("plan", CHECKPOINT, "--memory", "6MB", "--dtype", "int8"),
    # Found before the first is judged.
    "one budget of many too small": ("eval", CHECKPOINT, "--params", "1m,1k"),
    "unknown word": ("sample", CHECKPOINT, "--prompt", "two red dogs"),
    "no scene": ("sample", CHECKPOINT, "--prompt", "red red red"),
    "no prompt": ("sample", CHECKPOINT),
    "prompts not even": ("eval", CHECKPOINT, "--prompts", "7"),
    "too many prompts": ("eval", CHECKPOINT, "--prompts", "1000000"),
    "no checkpoint": ("info", "/nowhere/at/all"),
    "a file as a checkpoint": ("info", __file__),
    "no such command": ("frobnicate",),
    "no such option": ("info", CHECKPOINT, "--frobnicate"),
    "no plan file": ("sample", CHECKPOINT, "--plan", "/nowhere/plan.json", "--prompt", "a red ring"),
    "no device": ("sample", CHECKPOINT, "--device", "warp", "--prompt", "a red ring"),
    "no preset": ("train", "run", "--preset", "nothing", "--out", "run"),
    "no setting": ("train", "run", "--set", "students.stepz=1", "--out", "run"),
    "bad setting": ("train", "run", "--set", "students.steps=many", "--out", "run"),
    "setting without value": ("train", "run", "--set", "students.steps", "--out", "run"),
    "no teacher": ("train", "run", "--teacher", "/nowhere/teacher.safetensors", "--out", "run"),
    "a plan beside a picture that cannot be": ("plan", CHECKPOINT, "--out", "p.json", "--picture", "/nowhere/x.png"),
    "a folder as a picture": ("sample", CHECKPOINT, "--prompt", "a red ring", "--out", "/tmp"),
    "no whole teacher": ("train", "run", "--teacher", __file__, "--out", "run"),
    "shares that do not sum to 1": (
        *("train", "run", "--out", "run", "--set"),
        'teacher.phases=[{"until": 1, "horizon": 1, "shares": [1, 1, 1, 1, 1]}]',
    ),
    "an architecture of nothing": ("train", "run", "--set", 'teacher.architecture={"foo": 1}', "--out", "run"),
    "more than all channels": ("train", "run", "--set", "width.channels=[1.5]", "--out", "run"),
    "no run": ("train", "status", "--out", "run"),
    "no folder to write to": ("sample", CHECKPOINT, "--prompt", "a red ring", "--out", "/nowhere/x.png"),
    "json into no folder": ("eval", CHECKPOINT, "--prompts", "10", "--json", "/nowhere/out.json"),
}


@pytest.mark.parametrize("arguments", BAD.values(), ids=BAD)
def test_bad_input_is_one_line_and_status_2(ppcl, arguments, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    status, _, err = ppcl(*arguments)
    assert status == 2
    assert err.startswith("ppcl: ") and err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def copy_of(tmp_path: Path) -> Path:
    folder = tmp_path / "copy"
    folder.mkdir()
    for path in CHECKPOINT.glob("*.safetensors"):
        (folder / path.name).write_bytes(path.read_bytes())
    (folder / "config.json").write_bytes((CHECKPOINT / "config.json").read_bytes())
    return folder


def truncate(folder: Path) -> None:
    file = folder / "diffusion_pytorch_model.safetensors"
    os.truncate(file, file.stat().st_size // 2)


def alter(folder: Path) -> None:
    file = folder / "diffusion_pytorch_model.safetensors"
    content = bytearray(file.read_bytes())
    content[-100_000:-99_000] = bytes(1000)
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def lose(folder: Path) -> None:
    (folder / "diffusion_pytorch_model.safetensors").unlink()


def contradict(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["num_layers"] += 1
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("damage", [truncate, alter, lose, contradict])
def test_damaged_checkpoints_are_refused_in_one_line(ppcl, damage, tmp_path):
    folder = copy_of(tmp_path)
    damage(folder)
    out = tmp_path / "x.png"
    status, _, err = ppcl("sample", folder, "--prompt", "a red ring", "--out", out)
    assert status == 2 and err.count("\n") == 1
    assert not out.exists() and {path.name for path in tmp_path.iterdir()} == {"copy"}


def test_a_plan_for_another_checkpoint_is_refused(ppcl, tmp_path):
    plan = ppcl_rt.load(CHECKPOINT).plan.model_copy(update={"checkpoint": "0" * 16})
    (tmp_path / "plan.json").write_text(plan.to_json())
    status, _, err = ppcl(
        "sample", CHECKPOINT, "--plan", tmp_path / "plan.json", "--prompt", "a red ring", "--out", tmp_path / "x.png"
    )
    assert status == 2 and "made for checkpoint 0000" in err


def test_the_installed_program_runs():
    """The entry point and its plug-ins, in a process of its own."""
    program = Path(sys.executable).with_name("ppcl")
    done = subprocess.run([program, "train", "config"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["task"] == "scenes"


def test_only_what_is_asked_for_is_imported():
    """Help and the page do not wait for torch."""
    for argument in ("web", "info"):
        app = cli.program([argument])
        assert [each.name for each in app.registered_commands] == [argument] and not app.registered_groups
    assert [each.name for each in cli.program(["train", "config"]).registered_groups] == ["train"]
    for arguments in ([], ["--help"], ["unknown"]):
        app = cli.program(arguments)
        assert len(app.registered_commands) > 10 and len(app.registered_groups) > 1
    code = "import sys, ppcl_rt.cli.main as cli; cli.program(['web']); import ppcl_rt.web.asking, ppcl_rt.planning.plan"
    code += "; print([each for each in ('torch', 'diffusers', 'scipy', 'gradio') if each in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
