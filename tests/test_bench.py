"""The benches' grid, what reads their results, and the script that runs them on a GPU; no kernel is timed here."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import typer
from typer.testing import CliRunner

from ppcl_rt import bench_report

ROOT = Path(__file__).parents[1]
MAIN = {"pixels": 1024, "image": 4096, "text": 512, "batch": 1, "width": 100, "masked": False}
H200 = {"device": "NVIDIA H200", "status": 0, "command": "bash bench/gpu.sh kernels"}


def rows_of(op, times, **case):
    """Rows of one race, as bench_kernels writes them."""
    common = {"op": op, **MAIN, "dtype": "torch.bfloat16", **case}
    return [{**common, "contestant": name, "ms": ms, "error_max": 0.01} for name, ms in times.items()]


def write(folder, rows, device="NVIDIA H200"):
    file = folder / bench_report.slug(device) / "kernels.json"
    content = {**H200, "device": device}
    results = [{"name": str(number), "median": row["ms"], "extra_info": row} for number, row in enumerate(rows)]
    bench_report.write_json(file, {**content, "results": results})
    return file


def ask(folder, *arguments):
    done = CliRunner().invoke(bench_report.app, ["report", "--results", str(folder), *arguments])
    if isinstance(done.exception, ValueError):
        raise done.exception
    assert done.exit_code == 0, done.output
    return done.output


def targets(folder):
    (judged,) = json.loads(ask(folder, "--json")).values()
    return judged


def test_report_without_results_has_measured_nothing(tmp_path):
    for folder in (tmp_path, tmp_path / "missing"):
        judged = targets(folder)
        assert len(judged) > 15 and all(goal["value"] is None and goal["met"] is None for goal in judged)
        assert ask(folder).count("not measured") == len(judged)


def test_report_judges_the_worst_case_of_each_target(tmp_path):
    attention = {"triton": 1.0, "sdpa flash": 0.95, "sdpa cudnn": 0.9, "sdpa efficient": 0.1, "eager": 1.0}
    rows = [
        *rows_of("joint_attention", attention),
        # Missed: half as fast as FlashAttention.
        *rows_of("joint_attention", {**attention, "triton": 2.0, "sdpa cudnn": None, "sdpa flash": 1.0}, batch=2),
        *rows_of("joint_attention", {"triton": 0.9}, batch=2, width=50),
        *rows_of("joint_attention", {"triton": 1.0, "triton unmasked": 0.98, "sdpa math": 1.5}, masked=True),
        *rows_of("up_gelu", {"triton": 1.0, "eager": 1.1}),
        *rows_of("up_gelu", {"triton": 1.0, "eager": 1.02}, width=50),
        # Another shape than that of the targets.
        *rows_of("up_gelu", {"triton": 1.0, "eager": 0.5}, image=1024),
    ]
    rows[0]["error_max"] = 0.02
    write(tmp_path, rows)
    found = {goal["target"]: goal for goal in targets(tmp_path)}
    speed = "attention, batch {}, 24 heads: speed to the best of cuDNN and FlashAttention"
    wanted = {
        speed.format(1): (0.9, True),
        speed.format(2): (0.5, False),
        speed.format(2).replace("24", "12"): (None, None),
        "masked attention: speed to unmasked": (0.98, True),
        "masked attention: speed to SDPA with a mask": (1.5, True),
        "up + GELU: speed to cuBLAS + eager": (1.02, False),
        "up_gelu: time at half width to full": (1.0, False),
        "joint_attention, batch 2: time at half width to full": (0.45, True),
        "bf16 error against float64 to that of the stock chain": (2.0, False),
        "grouped q/k/v: speed to the stock chain, compiled": (None, None),
    }
    for name, (value, met) in wanted.items():
        assert (found[name]["value"], found[name]["met"]) == (pytest.approx(value) if value else None, met), name
    assert found["up + GELU: speed to cuBLAS + eager"]["where"].endswith("50 % wide")
    drawn = ask(tmp_path)
    assert "missed" in drawn and "not measured" in drawn and "up_gelu" in drawn


def test_targets_are_for_hopper_alone(tmp_path):
    write(tmp_path, rows_of("up_gelu", {"triton": 1.0, "eager": 2.0}), device="NVIDIA A100-SXM4-80GB")
    assert all(goal["value"] is None for goal in targets(tmp_path))


ROW = json.dumps({"op": "mlp", "contestant": "triton", **MAIN, "ms": "fast"})
BROKEN = (
    *("{", "[]", "{}", "\xff", '{"device": 1, "results": []}', '{"device": "H200", "results": [{"name": "a"}]}'),
    f'{{"device": "H200", "results": [{{"name": "a", "median": 1, "extra_info": {ROW}}}]}}',
)


@pytest.mark.parametrize("text", BROKEN)
def test_broken_results_are_refused_by_name(tmp_path, text):
    file = write(tmp_path, [])
    file.write_text(text, encoding="latin-1")
    with pytest.raises(ValueError, match=r"kernels\.json is no results file") as refused:
        ask(tmp_path)
    assert "\n" not in str(refused.value)


def test_record_keeps_medians_and_outcomes_without_raw_times(tmp_path):
    benchmark = {"name": "a", "stats": {"median": 0.5, "data": [0.5] * 9}, "extra_info": {"op": "mlp"}}
    left = tmp_path / "model.json"
    left.write_text(json.dumps({"benchmarks": [benchmark]}))
    junit = tmp_path / "tests.xml"
    junit.write_text(
        '<testsuites><testsuite><testcase classname="t" name="a" time="1"/><testcase classname="t" name="b" time="2">'
        '<failure message="wrong"/></testcase></testsuite></testsuites>'
    )
    for part, output, status in (("model", left, 0), ("tests", junit, 1), ("kernels", tmp_path / "none.json", 124)):
        bench_report.record(part, status, f"bash bench/gpu.sh {part}", output, tmp_path / "results")
    (parts,) = bench_report.read_results(tmp_path / "results").values()
    assert parts["model"]["results"] == [{"name": "a", "median": 0.5, "extra_info": {"op": "mlp"}}]
    assert parts["tests"]["counts"] == {"failure": 1, "passed": 1} and parts["tests"]["status"] == 1
    assert parts["kernels"]["results"] == [] and parts["kernels"]["status"] == 124
    assert parts["model"]["torch"] == torch.__version__ and parts["model"]["command"] == "bash bench/gpu.sh model"
    assert not list(tmp_path.rglob("*.partial"))
    assert "cut off" in ask(tmp_path / "results")


def script(*arguments, **environment):
    return subprocess.run(
        ["bash", str(ROOT / "bench" / "gpu.sh"), *arguments],
        env={**os.environ, "PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": "", **environment},
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize(("arguments", "said"), [(["kernels", "speed"], "no part speed"), ([], "no CUDA device")])
def test_script_refuses_in_one_line(arguments, said):
    done = script(*arguments)
    assert done.returncode == 2 and said in done.stderr
    assert done.stdout == "" and len(done.stderr.splitlines()) == 1


def test_script_records_every_part_and_goes_on_after_one_that_fails(tmp_path):
    """With a python that says there is a GPU, fails in place of pytest, and prints what it is asked to record."""
    fake = tmp_path / "python"
    fake.write_text(
        """#!/bin/bash
case "$1 $2 $3" in
    -c*) ;;
    "-m pytest bench/bench_model.py") ;;
    "-m pytest"*) echo half >"${PPCL_BENCH_JSON:-/dev/null}"; exit 3 ;;
    *) shift 2; echo "record $*"; cat "${7}" 2>/dev/null; true ;;
esac
"""
    )
    fake.chmod(0o755)
    done = script(PYTHON=str(fake), RESULTS="elsewhere")
    assert done.returncode == 1, done.stderr
    lines = done.stdout.splitlines()
    recorded = [line.split(" --output")[0] for line in lines if line.startswith("record")]
    assert recorded == [
        f"record {part} --status {status} --command bash bench/gpu.sh {part}"
        for part, status in (("tests", 3), ("kernels", 3), ("model", 0))
    ]
    # What was measured before a part ended is there to be recorded.
    assert lines.count("half") == 1 and all(
        "--results elsewhere" in line for line in lines if line.startswith("record")
    )
    assert script("model", PYTHON=str(fake)).returncode == 0


@pytest.fixture(scope="module")
def bench():
    """bench_kernels, with the environment as it was for whoever imports the kernels next."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", os.environ.get("TRITON_INTERPRET", "0"))
        spec = importlib.util.spec_from_file_location("bench_kernels", ROOT / "bench" / "bench_kernels.py")
        module = importlib.util.module_from_spec(spec)
        # Dataclasses look their module up.
        patch.setitem(sys.modules, spec.name, module)
        spec.loader.exec_module(module)
        yield module


def test_grid_is_a_cross_through_the_main_shape(bench):
    preset = bench.PRESETS["production"]
    cases = bench.cases(preset)
    assert len(cases) == len(set(cases)) == len({str(case) for case in cases}) == 85
    # Under five minutes: a case takes a second, what torch compiles 5 to 10.
    names = {case: bench.contestants(case, preset) for case in cases}
    assert sum(len({"compiled", "flex"} & set(contestants)) for contestants in names.values()) <= 20
    main = [case for case in cases if (case.image, case.text) == (4096, 512)]
    assert cases[: len(main)] == main
    for op in bench.PRUNED:
        for batch in (1, 2):
            widths = [c.width for c in main if (c.op, c.batch, c.masked) == (op, batch, False)]
            assert widths == [100, 75, 50, 25]
    assert {case.op for case in main} == {*bench.PRUNED, *bench.WHOLE} == set(bench.CONTESTS)
    assert {case.pixels for case in cases} == {512, 1024, 1328} and {case.text for case in cases} == {32, 512}
    assert {case.op for case in cases if case.masked} == {"joint_attention"}
    for contestants in names.values():
        assert contestants[0] == "triton" and "eager" in contestants
    for preset in bench.PRESETS.values():
        assert all(preset.heads * width % 100 == preset.hidden * width % 100 == 0 for width in preset.widths)


def test_every_target_asks_about_a_case_of_the_grid(bench):
    preset = bench.PRESETS["production"]
    rows = [
        {
            **case._asdict(),
            "contestant": name,
            "ms": 1.0,
            "error_max": 1.0,
            "of_ceiling": 1.0,
            "dtype": "torch.bfloat16",
        }
        for case in bench.cases(preset)
        for name in bench.contestants(case, preset)
    ]
    assert all(goal.measured for goal in bench_report.goals(rows))


def test_contestants_are_timed_in_turn(bench):
    order = []
    ms = bench.paired_ms({name: lambda name=name: order.append(name) for name in "ab"}, 3)
    assert order == list("ababab") and ms.keys() == {"a", "b"} and min(ms.values()) >= 0


def test_errors_are_relative_and_a_nan_is_no_pass(bench):
    exact = [torch.tensor([1.0, 2.0], dtype=torch.float64)]
    largest, rms = bench.errors([torch.tensor([1.0, 2.5])], exact)
    assert largest == pytest.approx(0.25) and rms == pytest.approx((0.125 / 2.5) ** 0.5)
    assert not bench.errors([torch.tensor([1.0, float("nan")])], exact)[0] <= 1


def test_wrong_contestants_fail_and_missing_ones_are_skipped(bench, monkeypatch):
    monkeypatch.setattr(bench, "PRESET", bench.PRESETS["tiny"])
    monkeypatch.setattr(bench, "DEVICE", torch.device("cpu"))
    monkeypatch.setattr(bench, "CUDA", False)
    bench.ceilings.cache_clear()
    bench.cache_filler.cache_clear()

    def missing():
        raise RuntimeError("not on\nthis device")

    def contest(case):
        made = bench.linear_contest(case)
        made.others = {"wrong": lambda: [1.001 * y for y in made.chain(*made.inputs)], "missing": missing}
        return made

    monkeypatch.setitem(bench.CONTESTS, "up_gelu", contest)
    monkeypatch.setattr(bench, "contestants", lambda case, preset: ["eager", "wrong", "missing"])
    (eager, wrong, skipped), calls = bench.measure(bench.Case("up_gelu", 96, 33, 7, 1, 50))
    assert eager["ms"] > 0 and eager["over_eager"] == 1 and eager["error_max"] < 1e-6
    # 40 tokens by 32 x 64.
    assert eager["flops"] == 2 * 40 * 32 * 64 and eager["unit"] == "TFLOP/s" and eager["of_ceiling"] >= 0
    # Inputs 40 x 32, weights 2 x 64 x 32, biases 2 x 64, outputs 40 x 64, in float32.
    assert eager["bytes"] == 4 * (40 * 32 + 2 * 64 * 32 + 2 * 64 + 40 * 64)
    assert wrong["ms"] is None and wrong["failed"].startswith("wrong: error 1.0")
    assert skipped["skipped"] == "RuntimeError: not on this device" and set(calls) == {"eager"}
    assert bench_report.operation_tables([eager, wrong, skipped])


def test_report_is_a_group_of_commands():
    assert isinstance(typer.main.get_command(bench_report.app), typer.core.TyperGroup)
