"""Races of kernels, the parts of a GPU run, and the report of their results; no kernel is timed here."""

import dataclasses
import functools
import importlib
import json
import os
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import faulty_races
import pytest
import torch
import typer
from faulty_races import FAST, LATE, Faulty
from typer.testing import CliRunner

from ppcl_kernels.launch import TARGETS, Target
from ppcl_kernels.tools import goals, gpu_run, report
from ppcl_kernels.tools.children import Job, run_all
from ppcl_kernels.tools.machine import slug, write_json
from ppcl_rt.ops.agreement import agree
from ppcl_rt.ops.implementation import TORCH, Key
from ppcl_rt.ops.table import ImplementationTable

ROOT = Path(__file__).parents[2]
MAIN = {"pixels": 1024, "image": 4096, "text": 512, "batch": 1, "width": 100, "masked": False}
H200 = {"device": "NVIDIA H200", "status": 0, "command": "bash bench/gpu.sh choose"}


def rows_of(op, times, taken, **case):
    """Rows of one race in the form that bench_kernels writes."""
    about = {"op": op, **MAIN, **case, "dtype": "torch.bfloat16"}
    about["key"] = f"{op} {list(about.values())}"
    return [{**about, "contestant": name, "ms": ms, "taken": name == taken} for name, ms in times.items()]


def write(folder, part, rows, device="NVIDIA H200", **more):
    file = folder / slug(device) / f"{part}.json"
    write_json(file, {**H200, "device": device, **more, "results": rows})
    return file


def ask(folder, *arguments):
    done = CliRunner().invoke(report.app, ["report", "--results", str(folder), *arguments])
    if isinstance(done.exception, ValueError):
        raise done.exception
    assert done.exit_code == 0, done.output
    return done.output


def targets(folder):
    (judged,) = json.loads(ask(folder, "--json")).values()
    return {goal["target"]: goal for goal in judged}


def test_report_without_results_has_measured_nothing(tmp_path):
    for folder in (tmp_path, tmp_path / "missing"):
        judged = targets(folder)
        assert len(judged) > 15 and all(goal["value"] is None and goal["met"] is None for goal in judged.values())
        assert ask(folder).count("not measured") == len(judged)


def test_docs_hold_the_targets_and_what_was_measured():
    """docs/kernels.md holds what ``ppcl bench report --markdown`` prints."""
    for line in ask(ROOT / "bench" / "results", "--markdown").splitlines():
        assert line in (ROOT / "docs" / "kernels.md").read_text().splitlines()


def test_report_judges_the_worst_case_of_each_target(tmp_path):
    attention = {"triton 1": 1.2, "triton 2": 1.5, "flash": 0.95, "cudnn": 0.9, "torch": 0.1}
    rows = [
        *rows_of("joint_attention", attention, "cudnn"),
        # A missed target: FlashAttention was twice as fast as the implementation that was taken.
        *rows_of("joint_attention", {**attention, "cudnn": None, "flash": 0.6}, "triton 1", batch=2),
        *rows_of("joint_attention", {"triton 1": 0.5}, "triton 1", batch=2, width=50),
        *rows_of("joint_attention", {"cudnn": 1.0}, "cudnn", masked=True),
        *rows_of("up_gelu", {"triton 1": 1.0, "cublaslt": 2.0, "torch": 1.1}, "triton 1"),
        *rows_of("up_gelu", {"triton 1": 1.0, "torch": 1.02}, "triton 1", width=50),
        # The targets are not about this shape.
        *rows_of("up_gelu", {"triton 1": 1.0, "torch": 0.5}, "triton 1", image=1024),
        *rows_of("ada_layer_norm", {"triton 1": 1.0, "copy": 0.95, "torch": 5.0}, "triton 1"),
        *rows_of("qkv_projection", {"packed": 1.0, "torch": 9.0}, "packed"),
    ]
    write(tmp_path, "choose", rows)
    fit_row = {"kernel": "linear", "tile": "64x64", "ok": True, "limit": 0.004, "error_max": 0.001}
    errors = [fit_row | {"form": form, "error_rms": rms} for form, rms in (("up", 0.001), ("down", 0.002))]
    # A kernel that died has no error.
    write(tmp_path, "fit", [*errors, fit_row | {"form": "out", "ok": False, "error_rms": None}])
    found = targets(tmp_path)
    wanted = {
        "error of a 64 x 64 tile against float64, to its limit": (0.5, True),
        "attention: speed to the best of cuDNN and FlashAttention, as chosen": (0.5, False),
        "up + GELU: speed to cuBLAS + eager": (1.02, False),
        "down + gate + residual: speed to cuBLAS + eager": (None, None),
        "q/k/v: speed to the stock chain, compiled": (None, None),
        "ada_layer_norm: speed to a copy of the same bytes": (0.95, True),
        "masked attention: speed to unmasked": (0.9, False),
        "up_gelu: time at half width to full": (1.0, False),
        "joint_attention, batch 2: time at half width to full": (0.5 / 1.2, True),
    }
    for name, (value, met) in wanted.items():
        assert (found[name]["value"], found[name]["met"]) == (pytest.approx(value) if value else None, met), name
    where = found["attention: speed to the best of cuDNN and FlashAttention, as chosen"]["where"]
    assert where == "4096 + 512 tokens, batch 2: triton 1 taken, our kernel 0.500"
    assert "50 % wide" in found["up + GELU: speed to cuBLAS + eager"]["where"]
    drawn = ask(tmp_path)
    assert "missed" in drawn and "not measured" in drawn and "up_gelu" in drawn and "linear" in drawn
    assert "| up + GELU: speed to cuBLAS + eager | >= 1.08 | 1.020, missed, " in ask(tmp_path, "--markdown")


def ratio(what, value, contestant="ours", size=1024, plan="dense", share=1.0, group=None):
    return {
        **{"what": what, "value": value, "contestant": contestant, "size": size, "plan": plan, "ratio": share},
        "group": group or f"{'dense' if plan == 'dense' else 'plans'}-{size}",
    }


def test_report_judges_models(tmp_path):
    ratios = [
        ratio("speed to eager", 1.6),
        # No target is about 512 without graphs, 1024 with graphs, or a short text.
        ratio("speed to eager", 0.1, size=512),
        ratio("speed to eager", 0.2, "ours graphs"),
        ratio("speed to eager", 0.3, group="short-1024"),
        ratio("speed to compiled", 1.01),
        ratio("speed to compiled", 1.2, "ours graphs", 512),
        ratio("speed to compiled", 0.97, plan="width", share=0.5),
        ratio("time ratio over planned ratio", 1.01, plan="width", share=0.5),
        ratio("time ratio over planned ratio", 1.04, plan="mixed", share=0.7),
    ]
    row = {"group": "dense-1024", "contestant": "ours", "plan": "dense", "size": 1024, "ms": 3.0, "device_ms": None}
    write(tmp_path, "model", [row], ratios=ratios)
    found = targets(tmp_path)
    for name, value, met in (
        ("whole forward, 1024 x 1024: speed to diffusers", 1.6, True),
        ("whole forward, 1024 x 1024: speed to diffusers compiled", 1.01, False),
        ("whole forward, 512 x 512, graphs: speed to diffusers", None, None),
        ("whole forward, 512 x 512, graphs: speed to diffusers compiled", 1.2, True),
        ("time(r) / time(1), to the ratio that was planned", 1.04, False),
        ("a narrow plan: speed to the physically sliced model, compiled", 0.97, False),
    ):
        assert (found[name]["value"], found[name]["met"]) == (value, met), name
    assert "dense-1024" in ask(tmp_path)


def test_targets_are_for_hopper_alone(tmp_path):
    rows = rows_of("up_gelu", {"triton 1": 1.0, "torch": 2.0}, "triton 1")
    write(tmp_path, "choose", rows, device="NVIDIA A100-SXM4-80GB")
    assert all(goal["value"] is None for goal in targets(tmp_path).values())


ROW = json.dumps(rows_of("up_gelu", {"torch": "fast"}, "torch")[0])
BROKEN = (
    *("{", "[]", "{}", "\xff", '{"device": 1, "results": []}', '{"device": "H200", "results": [{"op": "a"}]}'),
    f'{{"device": "H200", "results": [{ROW}]}}',
)


@pytest.mark.parametrize("text", BROKEN)
def test_broken_results_are_refused_by_name(tmp_path, text):
    file = write(tmp_path, "choose", [])
    file.write_text(text, encoding="latin-1")
    with pytest.raises(ValueError, match=r"choose\.json is no results file") as refused:
        ask(tmp_path)
    assert "\n" not in str(refused.value)


def test_report_is_a_group_of_commands():
    assert isinstance(typer.main.get_command(report.app), typer.core.TyperGroup)


def test_script_runs_the_runner(tmp_path):
    """The script puts the package's folders first on the path, since the package may not be installed."""
    fake = tmp_path / "python"
    fake.write_text('#!/bin/bash\necho "$PYTHONPATH $*"\nexit 7\n')
    fake.chmod(0o755)
    script = ["bash", str(ROOT / "bench" / "gpu.sh"), "1", "tests"]
    done = subprocess.run(script, env={**os.environ, "PYTHON": str(fake)}, capture_output=True, text=True)
    assert done.returncode == 7 and done.stdout.startswith(f"{ROOT}:{ROOT}/kernels:{ROOT}/train")
    assert done.stdout.endswith(" -m ppcl_kernels.tools.gpu_run 1 tests\n")


@pytest.mark.parametrize(
    ("arguments", "said"), [(["fit", "4"], "no part 4; there are: 1, fit, 2"), ([], "no CUDA device")]
)
def test_runner_refuses_in_one_line(arguments, said, monkeypatch, capsys):
    monkeypatch.setattr(gpu_run, "about_device", lambda: None)
    assert gpu_run.main(arguments) == 2
    output = capsys.readouterr()
    assert said in output.err and len(output.err.splitlines()) == 1 and not output.out


def test_device_is_asked_for_in_a_process_of_its_own(monkeypatch, capsys):
    """The script of that process, and how the result of the process is read."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(AssertionError):
        exec(gpu_run._ASK, {})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H200")
    exec(gpu_run._ASK, {})
    said = json.loads(capsys.readouterr().out)
    assert said["device"] == "NVIDIA H200" and {"torch", "triton", "cuda", "cudnn", "driver", "commit"} <= set(said)
    for script, found in (("raise SystemExit(1)", None), ("print('noise')", None), ("print('noise\\n{}')", {})):
        monkeypatch.setattr(gpu_run, "_ASK", script)
        assert gpu_run.about_device() == found


# What part 1 leaves once it has listed the kernels; doubled braces, since it is formatted.
LISTED = '{{"kernels": {{"linear": {{"1": {{"ok": false}}}}}}}}'


@pytest.mark.parametrize("left", ["", '{{"kernels": {{}}}}', "x", LISTED])
def test_no_kernel_runs_after_a_part_1_that_listed_none(tmp_path, monkeypatch, capfd, left):
    """It died early: a missing or an empty list would allow everything, also what hangs."""

    def part(number, script):
        return gpu_run.Part(number, 60, lambda folder, planned: ["-c", script.format(folder=folder)])

    say = "import json, os; asked = [os.environ.get(n) for n in ('PPCL_BACKEND', 'PPCL_ALLOWED')]\n"
    leave = say + "open('{folder}/%s.json', 'w').write(json.dumps(dict(results=asked)))"
    died = f"open('{{folder}}/allowed.json', 'w').write({left!r}); raise SystemExit(9)" if left else "exit(9)"
    parts = {"fit": part("1", died)} | {name: part(name, leave % name) for name in ("choose", "model", "tests")}
    monkeypatch.setattr(gpu_run, "PARTS", parts)
    monkeypatch.setattr(gpu_run, "about_device", lambda: {"device": "NVIDIA H200"})
    for name in ("PPCL_BACKEND", "PPCL_ALLOWED"):
        monkeypatch.delenv(name, raising=False)
    folder = tmp_path / "nvidia-h200"
    folder.mkdir()
    # Of another day.
    (folder / "allowed.json").write_text(LISTED.format())
    assert gpu_run.main(["--results", str(tmp_path), "fit", "choose", "model", "tests"]) == 1
    found = {name: json.loads((folder / f"{name}.json").read_text()) for name in parts}
    said = capfd.readouterr().out
    if left == LISTED:
        assert all(found[name]["results"] == [None, str(folder / "allowed.json")] for name in list(parts)[1:])
        assert all(found[name]["status"] == 0 for name in list(parts)[1:]) and "left out" not in said
        return
    assert [found[name]["status"] for name in parts] == [9, 1, 0, 1]
    assert [found[name]["results"] for name in parts] == [[], [], ["torch", None], []]
    assert all("listed the kernels" in found[name]["without_kernels"] for name in list(parts)[1:])
    assert "choose is left out: part 1 ended" in said and "model runs without our kernels: part 1 ended" in said
    # A list that was never asked for is not missing.
    (folder / "allowed.json").unlink(missing_ok=True)
    assert gpu_run.main(["--results", str(tmp_path), "choose"]) == 0


def test_runner_keeps_what_each_part_left_and_goes_on(tmp_path, monkeypatch, capfd):
    """Parts that fail, hang together with a child, die before they write, and succeed."""

    def part(number, seconds, script):
        return gpu_run.Part(number, seconds, lambda folder, planned: ["-c", script.format(folder=folder)])

    leave = "import json, os, sys, time; open('{folder}/%s.json', 'w').write(json.dumps(dict(results=[1], got=%s)))\n"
    # No signal is sent to the child by name.
    fork = "os.fork() or open('{folder}/child', 'w').write(str(os.getpid())); time.sleep(60)"
    parts = {
        "fit": part(
            "1", 60, leave % ("fit", "1") + f"open('{{folder}}/allowed.json', 'w').write({LISTED!r}); sys.exit(3)"
        ),
        "choose": part("2", 1, leave % ("choose", "os.environ['PPCL_ALLOWED']") + fork),
        "model": part("3", 60, "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"),
        "tests": part("tests", 60, leave % ("tests", "os.environ.get('TRITON_INTERPRET', 'native')")),
    }
    monkeypatch.setattr(gpu_run, "PARTS", parts)
    monkeypatch.setattr(gpu_run, "about_device", lambda: {"device": "NVIDIA H200", "torch": "2.11"})
    monkeypatch.setenv("PPCL_ALLOWED", "of another run")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    folder = tmp_path / "nvidia-h200"
    folder.mkdir()
    (folder / "model.json").write_text('{"results": ["of another day"]}')
    begin = time.monotonic()
    assert gpu_run.main(["--results", str(tmp_path), "1", "2", "3", "tests"]) == 1
    assert time.monotonic() - begin < 20
    found = {name: json.loads((folder / f"{name}.json").read_text()) for name in parts}
    assert {name: content["status"] for name, content in found.items()} == {
        "fit": 3,
        "choose": 124,
        "model": -signal.SIGKILL,
        "tests": 0,
    }
    assert [found[name]["results"] for name in parts] == [[1], [1], [], [1]]
    assert all(content["device"] == "NVIDIA H200" and content["part"] == name for name, content in found.items())
    assert found["model"]["command"] == "bash bench/gpu.sh model"
    child = Path(f"/proc/{(folder / 'child').read_text()}/status")
    assert not child.exists() or "\nState:\tZ" in child.read_text(), "a child outlived its part"
    # The result of part 1 applies to later parts.
    assert found["choose"]["got"] == str(folder / "allowed.json") and found["tests"]["got"] == "native"
    assert capfd.readouterr().out.count(" ended with status ") == 4
    assert gpu_run.main(["--results", str(tmp_path), "tests"]) == 0


def test_gpu_tests_are_named_files(tmp_path):
    """All files with tests for a GPU, and no other: what else cannot be imported there does not end the run."""
    command = gpu_run.PARTS["tests"].command(tmp_path, 1.0)
    assert "--continue-on-collection-errors" in command and "tests" not in command and "-k" not in command
    assert all((ROOT / file).exists() for file in gpu_run.GPU_TESTS) and set(gpu_run.GPU_TESTS) < set(command)
    marked = {str(file.relative_to(ROOT)) for file in (ROOT / "tests").rglob("*.py") if _has_gpu_tests(file)}
    assert marked and marked <= set(gpu_run.GPU_TESTS)


def _has_gpu_tests(file):
    return file != Path(__file__) and "mark.gpu" in file.read_text()


def test_outcomes_of_tests_are_kept_as_they_come(tmp_path, monkeypatch):
    (tmp_path / "test_some.py").write_text(
        """
import os, pytest
def test_passes(): pass
def test_skips(): pytest.skip("no GPU")
def test_fails(): assert 1 == 2
@pytest.fixture
def broken(): raise RuntimeError("cannot")
def test_errs(broken): pass
def test_dies(): os._exit(9)
def test_never_runs(): pass
"""
    )
    monkeypatch.setenv("PPCL_TESTS_JSON", str(tmp_path / "tests.json"))
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)
    # Loaded for other tests; nothing has used CUDA.
    monkeypatch.delitem(sys.modules, "diffusers", raising=False)
    command, ended = ["-p", "ppcl_kernels.tools.pytest_log", f"--rootdir={tmp_path}", str(tmp_path)], []
    # A fork, in which torch is already imported.
    run_all([Job("tests", 60, lambda say: pytest.main(command))], 1, time.monotonic() + 60, ended.append)
    assert ended[0].status == 9, ended
    content = json.loads((tmp_path / "tests.json").read_text())
    rows = {row["name"].split("_")[-1]: row for row in content["results"]}
    assert {name: row["outcome"] for name, row in rows.items()} == {
        "passes": "passed",
        "skips": "skipped",
        "fails": "failed",
        "errs": "failed",
    }
    assert "no GPU" in rows["skips"]["why"] and "1 == 2" in rows["fails"]["why"] and "cannot" in rows["errs"]["why"]
    assert content["counts"] == {"passed": 1, "skipped": 1, "failed": 2}


@pytest.fixture(scope="module")
def bench():
    """bench_kernels and its modules, imported from their folder, as when the script runs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "bench" / "suites")
        names = (
            "bench_kernels",
            *(f"kernel_races.{name}" for name in ("presets", "cases", "rivals", "timing", "race")),
        )
        yield SimpleNamespace(**{name.split(".")[-1]: importlib.import_module(name) for name in names})


@pytest.fixture(autouse=True)
def without_gradients():
    with torch.no_grad():
        yield


@pytest.fixture
def sm90(monkeypatch):
    """The target of an H100, without a device: tensors are meta tensors."""
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: False)
    monkeypatch.setattr(Target, "of", classmethod(lambda cls, device: TARGETS["sm_90"]))


def test_shapes_that_matter_come_first(bench):
    preset = bench.presets.PRESETS["full"]
    made = bench.presets.settings(preset)
    assert len(made) == len(set(made)) > 24
    batches = [setting.batch for setting in made if setting.text == 512]
    assert batches == sorted(batches) and set(batches) == {1, 2}
    for batch in (1, 2):
        pixels = [s.pixels for s in made if (s.batch, s.text) == (batch, 512)]
        assert list(dict.fromkeys(pixels)) == [1024, 512, 1328]
    for image in preset.images.values():
        assert [s.width for s in made if s[1:4] == (image, 512, 1) and s.width and not s.masked] == [100, 50, 75, 25]
    assert {s.width for s in made if s.masked} == {100, 50}
    for preset in bench.presets.PRESETS.values():
        assert all(preset.heads * width % 100 == preset.hidden * width % 100 == 0 for width in preset.widths)


def test_every_target_asks_about_a_case_that_is_raced(bench, sm90):
    """Calls of a block on meta tensors have their real keys, and each key is raced once."""
    preset = dataclasses.replace(bench.presets.PRESETS["full"], device="meta")
    block, rows, keys, compiled = bench.cases.Block(preset), [], set(), 0
    for setting in bench.presets.settings(preset):
        for case in block.cases(setting):
            key = str(case.operation.key(case.call))
            assert Key.parse(key) == case.operation.key(case.call)
            if key in keys:
                continue
            keys.add(key)
            others = bench.rivals.rivals(case, setting, preset)
            compiled += len({"compiled", "flex"} & set(others))
            implementations = {*map(str, case.operation.implementations(case.call)), "cudnn", "flash"}
            times = dict.fromkeys((*implementations, *others), 1.0)
            rows += [row | {"key": key} for row in rows_of(case.op, times, "torch", **setting._asdict())]
            flops, size = bench.cases.work_of(case, [torch.empty(4, device="meta")])
            assert size > 0 and (flops > 0) == (case.operation.name != "ada_layer_norm")
    # A compile takes up to 10 of the 500 s.
    assert 8 <= compiled <= 20 and 100 < len(keys) < 180
    places = {row["op"] for row in rows}
    assert places == {
        *("ada_layer_norm", "ada_layer_norm of text", "qkv_projection", "joint_attention"),
        *("out_gate_residual", "up_gelu", "down_gate_residual", "map_residual"),
    }
    judged = goals._kernel_goals(goals.races(rows))
    assert all(goal.measured for goal in judged), [goal.name for goal in judged if not goal.measured]


def test_work_counts_what_cannot_be_spared(bench):
    preset = bench.presets.PRESETS["tiny"]
    cases = {case.op: case for case in bench.cases.Block(preset).cases(bench.presets.Setting(96, 9, 3, 1, 50))}
    # 12 tokens by 16 x 32 of 64 channels; the weights of both streams and all their biases, in float32.
    flops, size = bench.cases.work_of(cases["up_gelu"], [torch.empty(12, 32)])
    assert flops == 2 * 12 * 16 * 32
    assert size == 4 * (12 * 16 + 2 * 16 * 32 + 2 * 64 + 12 * 32)
    # One of two heads, of 8 channels each.
    flops, size = bench.cases.work_of(cases["joint_attention"], [torch.empty(12, 8)])
    assert flops == 4 * 12 * 12 * 8 and size == 4 * 4 * 12 * 8
    assert bench.cases.work_of(cases["qkv_projection"], [])[0] == 2 * 12 * 16 * 3 * 8
    assert bench.cases.work_of(cases["ada_layer_norm"], [torch.empty(9, 16)]) == (0, 4 * (2 * 9 * 16 + 2 * 16))


def test_contestants_are_timed_in_turn(bench):
    order = []
    clock = bench.timing.RaceClock(bench.presets.PRESETS["tiny"])
    ms = clock.paired_ms({name: functools.partial(order.append, name) for name in "ab"}, 3)
    assert order == list("ababab") and ms.keys() == {"a", "b"} and min(ms.values()) >= 0


def test_stock_chain_compiles_as_one_graph(bench):
    """A compiled chain with a graph break would be slower than it has to be."""
    cases = {
        case.op: case
        for case in bench.cases.Block(bench.presets.PRESETS["tiny"]).cases(bench.presets.Setting(96, 9, 3, 1, 50))
    }
    for case in (cases["qkv_projection"], cases["down_gate_residual"]):
        plain = functools.partial(case.operation.run, implementation=TORCH)
        chain = torch.compile(plain, backend="eager", fullgraph=True)
        assert agree(chain(case.call), case.operation.run(case.call, TORCH))


# Races of `Faulty` in place of a block's calls.
FAULTY_RACES = [str(Path(faulty_races.__file__))]


def test_parent_of_the_races_leaves_cuda_alone(tmp_path):
    """What asks CUDA for its devices cannot fork: it asks nothing, imports no diffusers, and starts a program."""
    script = f"""
import sys, torch
def asked(*_): raise SystemExit("the driver was asked")
torch.cuda.is_available = torch.cuda.device_count = torch.cuda._lazy_init = asked
sys.path.insert(0, {str(ROOT / "bench" / "suites")!r})
import bench_kernels
assert bench_kernels.os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] == "1"
status = bench_kernels.main(["--out", {str(tmp_path)!r}, "--seconds", "120"])
assert "diffusers" not in sys.modules, "diffusers was imported"
sys.exit(status)
"""
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    environment.pop("PYTORCH_NVML_BASED_CUDA_CHECK", None)
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert done.returncode == 2 and "no CUDA device" in done.stderr, done.stderr


def in_the_fork(arguments, program, lines):
    """Run a program in the fork that would become it, without the seconds that its imports take; never returns."""
    sys.argv = [*program, *arguments, str(lines)]
    runpy.run_path(program[0], run_name="__main__")
    sys.stdout.flush()
    os._exit(0)


def test_races_name_and_leave_out_what_fails(bench, tmp_path, monkeypatch, capfd):
    """Wrong results before and after timing, a death, a hang, an exception; the rest is timed, the winner kept."""
    monkeypatch.setattr(bench.bench_kernels, "_program", in_the_fork)
    faulty = Faulty()
    assert bench.bench_kernels.race_all("tiny", tmp_path, 120, 1, "a command", FAULTY_RACES) == 1
    content = json.loads((tmp_path / "choose.json").read_text())
    second = {row["contestant"]: row for row in content["results"] if row["op"] == "second"}
    assert {name: row.get("failed") for name, row in second.items()} == {
        "triton 0": None,
        "triton 1": "RuntimeError: its result is not that of plain torch",
        "triton 2": "RuntimeError: its result is not that of plain torch",
        "triton 3": "killed by SIGKILL",
        "cudnn": "hangs",
        "flash": "RuntimeError: no kernel here",
        "torch": None,
    }
    assert [name for name, row in second.items() if row["taken"]] == ["triton 0"] and second["torch"]["to_torch"] == 1
    assert content["left_out"] == {
        "faulty 1 1x2: triton 3": "killed by SIGKILL",
        "faulty 1 1x2: cudnn": "hangs",
        f"the block at {bench.presets.Setting(96, 9, 3, 1, 25)}": "killed by SIGKILL",
    }
    # The first case was raced once, though two processes ended.
    assert [row["contestant"] for row in content["results"] if row["op"] == "first"] == ["triton 0", "torch"]
    assert content["complete"] and content["command"] == "a command" and content["ceilings"]["gbs"] > 0
    table = ImplementationTable(tmp_path / "implementations.json", {}, lambda call: pytest.fail("timed"))
    for call in (0, 1):
        assert table.look_up(faulty.key(call), lambda: [FAST, TORCH]) == FAST
    assert "failed: second, faulty 1 1x2, cudnn: hangs" in capfd.readouterr().out
    assert report.operation_tables(content["results"])


def one_race(bench, monkeypatch, out, operation, setting=None):
    """A race of one case, in this process."""
    write_json(out / "choose.json", {"left_out": {}, "results": []})
    monkeypatch.setattr(bench.race, "work_of", lambda case, results: (10**6, 10**6))
    races = bench.race.Races(bench.presets.PRESETS["tiny"], out, time.monotonic() + 60, 60)
    races.content["ceilings"] = {"tflops": 1.0, "gbs": 1.0}
    setting = setting or bench.presets.Setting(96, 9, 3, 1, 100)
    return bench.race._Race(races, bench.cases.Case("a place", operation, 0), "faulty 0 1x2", setting)


@pytest.fixture
def no_alarm():
    yield
    signal.alarm(0)


class FailsOnlyInTime(Faulty):
    """One implementation raises while it is timed, not while it is checked."""

    def checked(self, call):
        return "checked"

    def implementations(self, call):
        return [FAST, LATE, TORCH]

    def run(self, call, implementation):
        if implementation == LATE and call != "checked":
            raise RuntimeError("too many at once")
        return torch.ones(1, 128, 128)


def test_an_exception_in_a_joint_timing_costs_one_contestant(bench, tmp_path, monkeypatch, no_alarm):
    race = one_race(bench, monkeypatch, tmp_path, FailsOnlyInTime())
    rows = {row["contestant"]: row for row in race.run()}
    assert {name: row.get("failed") for name, row in rows.items()} == {
        "triton 0": None,
        "triton 2": "RuntimeError: too many at once",
        "torch": None,
    }
    assert rows["triton 0"]["ms"] is not None and rows["torch"]["ms"] is not None and rows["triton 2"]["ms"] is None
    assert sum(row["taken"] for row in rows.values()) == 1


def test_a_device_that_is_lost_in_a_joint_timing_ends_the_process(bench, tmp_path, monkeypatch, no_alarm):
    race = one_race(bench, monkeypatch, tmp_path, FailsOnlyInTime())
    race._start()
    monkeypatch.setattr(race.clock, "wait", mock.Mock(side_effect=RuntimeError("an illegal access")))
    monkeypatch.setattr(os, "_exit", mock.Mock(side_effect=SystemExit))
    with pytest.raises(SystemExit):
        race._time()
    os._exit.assert_called_once_with(bench.race.LOST)


def test_a_setting_that_ended_a_process_is_skipped(bench, tmp_path, monkeypatch, no_alarm):
    """So is a case whose plain torch did; the settings and cases after them are raced."""
    first, second = (bench.presets.Setting(96, 9, 3, 1, width) for width in (100, 50))
    write_json(tmp_path / "choose.json", {"left_out": {}, "results": [], "ceilings": {"tflops": 1.0, "gbs": 1.0}})
    cases = [bench.cases.Case("a place", Faulty(), call) for call in (0, 0.0)]
    block = mock.Mock(cases=lambda setting: iter(cases) if setting == second else pytest.fail("run again"))
    monkeypatch.setattr(bench.race, "Block", lambda preset: block)
    monkeypatch.setattr(bench.race, "settings", lambda preset: [first, second])
    monkeypatch.setattr(bench.race, "work_of", lambda case, results: (10**6, 10**6))
    races = bench.race.Races(bench.presets.PRESETS["tiny"], tmp_path, time.monotonic() + 60, 60)
    races.content["left_out"] |= {
        f"the block at {first}": "killed",
        "faulty 0 1x2: plain torch before the race": "killed",
    }
    assert races.run()
    assert {row["key"] for row in races.rows} == {"faulty 0.0 1x2"}


def test_a_profiler_that_fails_leaves_times_as_they_are(bench, tmp_path, monkeypatch, no_alarm):
    """It raises, or it ended an earlier process: the row says so, and the winner stays one."""
    race = one_race(bench, monkeypatch, tmp_path, Faulty())
    race.run()
    times = {name: row["ms"] for name, row in race.rows.items()}
    monkeypatch.setattr(bench.race, "kernel_names", mock.Mock(side_effect=RuntimeError("CUPTI\nis missing")))
    race._profile("triton 0")
    race.races.content["left_out"]["faulty 0 1x2: profile of torch"] = "killed by SIGSEGV"
    race._profile("torch")
    assert race.rows["triton 0"]["kernels"] == ["not profiled: RuntimeError: CUPTI is missing"]
    assert race.rows["torch"]["kernels"] == ["not profiled: killed by SIGSEGV"]
    assert {name: row["ms"] for name, row in race.rows.items()} == times and race.rows["triton 0"]["taken"]
    assert not any("failed" in row for row in race.rows.values())


def test_races_stop_when_time_is_over(bench, tmp_path, monkeypatch):
    """The file holds what was raced until then, and the exit status says that it is incomplete."""
    script = tmp_path / "sleeps.py"
    script.write_text("import time; time.sleep(60)")
    assert bench.bench_kernels.race_all("tiny", tmp_path, 0.5, 30, "a command", [str(script)]) == 1
    content = json.loads((tmp_path / "choose.json").read_text())
    assert not content["complete"] and content["results"] == [] and content["left_out"] == {}
