"""Part 3 of the GPU run, tiny and on a CPU: failures are named, everything else is written, plans are correct."""

import functools
import importlib
import json
import os
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers.models.transformers import transformer_qwenimage

from ppcl_rt import Width
from ppcl_rt.ops.agreement import agree
from ppcl_rt.planning.milliseconds import TimeRow
from ppcl_rt.planning.time_table import TimeTable

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def modules():
    """The modules of the bench, imported from their folder, as when the script runs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "bench" / "suites")
        names = ("plans", "presets", "models", "contestants", "race", "real_rope", "report", "worker")
        found = {name: importlib.import_module(f"model_races.{name}") for name in names}
        yield SimpleNamespace(bench_gpu_model=importlib.import_module("bench_gpu_model"), **found)


@pytest.fixture
def bench(modules, monkeypatch):
    yield modules.bench_gpu_model
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


@pytest.fixture(scope="module")
def models(modules):
    with torch.no_grad():
        return modules.models.Models(modules.presets.TINY)


class Forked:
    """A forked process with the interface of `subprocess.Popen`, without the seconds that imports take."""

    def __init__(self, run):
        read, write = os.pipe()
        self.returncode, self.pid = None, os.fork()
        if self.pid == 0:
            status = 1
            try:
                os.setsid()
                os.close(write)
                sys.stdin = os.fdopen(read)
                run()
                status = 0
            except SystemExit as end:
                status = end.code
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(status)
        os.close(read)
        self.stdin = os.fdopen(write, "w")

    def poll(self, flags=os.WNOHANG):
        if self.returncode is None and (found := os.waitpid(self.pid, flags))[0]:
            self.returncode = os.waitstatus_to_exitcode(found[1])
        return self.returncode

    def wait(self):
        return self.poll(0)


def read(folder, name="model"):
    return json.loads((folder / f"{name}.json").read_text())


def failures(content):
    return {row["key"]: row["failed"] for row in content["results"] if "failed" in row}


@pytest.fixture
def forked(bench, modules, monkeypatch, tmp_path):
    """Run the bench with processes forked from this one."""

    def start(self):
        child = Forked(modules.worker.main)
        self.children.append(child)
        return child

    monkeypatch.setattr(bench.Bench, "_start", start)

    def run(*arguments):
        status = bench.main(["--tiny", "--out", str(tmp_path), "--seconds", "240", *arguments])
        assert not list(tmp_path.glob(".*")), "nothing but the results is left"
        return status

    return run


def test_everything_is_measured_but_what_fails_and_is_killed(forked, tmp_path):
    injected = ("compiled, width 0.5=raise", "ours, width 0.5=kill", "block 2-256-256-64 at 512=kill")
    faults = [word for each in injected for word in ("--inject", each)]
    assert forked("--only", "short-512", "plans-1024", "sweep", *faults) == 1
    content = read(tmp_path)
    failed = failures(content)
    assert failed == {
        "compiled, width 0.5": "RuntimeError: a fault that was put in",
        "ours, width 0.5": failed["ours, width 0.5"],
    }
    assert failed["ours, width 0.5"].startswith("killed by SIGKILL after")
    assert not content["complete"] and content["tiny"] and content["device"].startswith("CPU")
    assert {name: group["status"] for name, group in content["groups"].items()} == dict.fromkeys(
        ("short-512", "plans-1024", "sweep"), "ended"
    )
    rows = {(row["group"], row["key"]): row for row in content["results"]}
    assert len(rows) == 3 + 9
    for row in rows.values():
        if "failed" in row or "skipped" in row:
            assert row["ms"] is row["host_ms"] is row["device_ms"] is None
        else:
            assert min(row["ms"], row["host_ms"], row["device_ms"]) > 0 and row["rounds"] == 2 and row["agrees"]
            # In float32 only the order of summation differs.
            assert row["difference"] < 1e-5
    measured = {key for key, row in rows.items() if row["ms"]}
    assert {("short-512", f"{name}, dense 1") for name in ("eager", "ours")} <= measured
    assert {("plans-1024", f"{name}, width 0.7") for name in ("ours", "compiled")} <= measured
    assert {("plans-1024", f"ours, mixed {ratio:g}") for ratio in (0.7, 0.5)} <= measured
    graphs = rows["short-512", "ours graphs, dense 1"]
    assert graphs["ms"] or graphs["skipped"] == "set_graphs is not there"
    asked = {(each["what"], each["group"], each["plan"], each["ratio"]) for each in content["ratios"]}
    assert {
        ("speed to eager", "short-512", "dense", 1.0),
        ("speed to compiled", "plans-1024", "width", 0.7),
        ("time ratio over planned ratio", "plans-1024", "mixed", 0.5),
    } <= asked

    table = TimeTable.read(tmp_path / "sweep.json")
    assert list(table.left_out) == ["block 2-256-256-64 at 512"] and "SIGKILL" in table.left_out.popitem()[1]
    assert table.complete and table.device == content["device"] and table.dtype == "float32"
    assert {row.kind for row in table.rows} == {"block", "text_not_updated", "map", "outer"} and all(
        r.agrees for r in table.rows
    )
    for image_tokens in (24, 12):
        costs = table.at(image_tokens, 7).of("two-stream")
        assert (
            costs.counts("image") == [0, 16, 128, 256]
            and costs.ms(Width(heads=4, image=256, text=256, modulation=64)) > 0
        )
    assert set(table.rows[0].operations) <= {"modulation", "ada_layer_norm", *PARTS} and table.specs[
        "two-stream"
    ].full == Width(heads=4, image=256, text=256, modulation=64)


PARTS = {"qkv_projection", "joint_attention", "out", "up", "down", "map"}


def test_fields_are_documented(forked, tmp_path):
    assert forked("--only", "short-512") == 0
    content, said = read(tmp_path), (ROOT / "docs" / "formats.md").read_text()
    names = {*content, *TimeTable.model_fields, *TimeRow.model_fields}
    names |= {name for row in content["results"] for name in row} | {name for row in content["ratios"] for name in row}
    names |= {name for plan in content["planned"].values() for name in plan}
    assert sorted(name for name in names if f"`{name}`" not in said) == []


# Takes the place of the measuring process: of its contestants three end it, each in another way.
FAKE = """
import json, os, pathlib, signal, sys, time
spec = json.loads(sys.stdin.readline())
file = pathlib.Path(spec["file"])
keys = ("killed", "hangs", "faulty", "good", "late")
about = {"group": spec["group"], "plan": "dense", "ratio": 1.0, "size": 512, "text_tokens": 7, "flops_ratio": 1.0}
content = json.loads(file.read_text()) if file.exists() else {
    "results": [{"key": key, "contestant": key, **about, "ms": None} for key in keys], "machine": {"device": "fake"}
}
def save():
    beside = file.with_suffix(".beside")
    beside.write_text(json.dumps(content))
    beside.replace(file)
save()
for row in content["results"]:
    if row["key"] in spec["leave_out"] or "failed" in row:
        continue
    file.with_suffix(".running").write_text(row["key"])
    if row["key"] == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if row["key"] == "hangs":
        time.sleep(60)
    if row["key"] == "faulty":
        row["failed"] = "an illegal memory access"
        save()
        sys.exit(3)
    if row["key"] == "good":
        row["ms"] = 1.0
        save()
        if spec["inject"]:
            os.kill(os.getppid(), signal.SIGTERM)
            time.sleep(60)
"""


@pytest.fixture
def fake(bench, monkeypatch, tmp_path):
    script = tmp_path / "fake.py"
    script.write_text(FAKE)
    monkeypatch.setattr(bench, "WORKER", script)
    return tmp_path / "out"


def test_a_process_that_dies_hangs_or_loses_the_device_is_started_again_without_the_culprit(bench, fake):
    assert bench.main(["--out", str(fake), "--only", "short-512", "--stall", "0.8", "--seconds", "30"]) == 1
    content = read(fake)
    found = failures(content)
    assert found.pop("killed").startswith("killed by SIGKILL")
    assert found == {
        "hangs": "no answer for 1 s",
        "faulty": "an illegal memory access",
        "late": "not reached: no time was left",
    }
    assert [row["ms"] for row in content["results"] if row["key"] == "good"] == [1.0]
    assert content["groups"]["short-512"]["status"] == "ended" and not content["complete"]


def test_a_limit_from_outside_leaves_what_was_measured_and_no_process(bench, fake):
    with pytest.raises(SystemExit) as stopped:
        bench.main(["--out", str(fake), "--only", "short-512", "--stall", "0.8", "--seconds", "30", "--inject", "a=b"])
    assert stopped.value.code == 1
    content = read(fake)
    assert [row["ms"] for row in content["results"] if row["key"] == "good"] == [1.0]
    assert content["groups"]["short-512"]["status"] == "cut off" and not list(fake.glob(".*"))
    fakes = subprocess.run(["pgrep", "-f", str(fake.parent / "fake.py")], capture_output=True, text=True).stdout.split()
    assert fakes == []


def test_a_machine_without_a_device_is_refused_in_one_line(bench, fake, capfd):
    (fake.parent / "fake.py").write_text("import sys; sys.stdin.readline(); sys.exit(2)")
    assert bench.main(["--out", str(fake), "--only", "short-512", "--seconds", "30"]) == 2
    said = capfd.readouterr().err
    assert "no CUDA device" in said and len(said.splitlines()) == 1
    # A process that fails at an import does not lead to an endless loop.
    (fake.parent / "fake.py").write_text("import nothing_of_that_name")
    assert bench.main(["--out", str(fake), "--only", "short-512", "--seconds", "30"]) == 1


def test_ratios_compare_within_a_group_alone(bench):
    def row(group, contestant, ms, plan="dense", ratio=1.0, **more):
        about = {"size": int(group.split("-")[1]), "text_tokens": 512, "flops_ratio": 0.75 if ratio < 1 else 1.0}
        return {"group": group, "contestant": contestant, "plan": plan, "ratio": ratio, "ms": ms, **about, **more}

    rows = [
        row("dense-1024", "eager", 150.0),
        row("dense-1024", "compiled", 104.0),
        row("dense-1024", "ours", 100.0),
        row("dense-512", "eager", 60.0),
        row("dense-512", "compiled", 33.0),
        row("dense-512", "ours", 40.0),
        row("dense-512", "ours graphs", 30.0),
        row("plans-1024", "ours", 110.0),
        row("plans-1024", "ours", 88.0, "width", 0.7),
        row("plans-1024", "compiled", 88.0, "width", 0.7),
        row("plans-1024", "ours", None, "mixed", 0.7),
        # No rival in the same group; and a row that failed.
        row("short-1024", "ours", 50.0),
        row("short-512", "eager", 50.0),
        row("short-512", "ours", 50.0, failed="it was wrong"),
    ]
    made = bench.ratios(rows, {"1024": {"dense 1": 100.0, "width 0.7": 80.0}})
    asked = {(each["what"], each["group"], each["contestant"]): each["value"] for each in made if each["wanted"]}
    assert asked == {
        ("speed to eager", "dense-1024", "ours"): 1.5,
        ("speed to compiled", "dense-1024", "ours"): 1.04,
        ("speed to eager", "dense-512", "ours graphs"): 2.0,
        ("speed to compiled", "dense-512", "ours graphs"): 1.1,
        ("speed to compiled", "plans-1024", "ours"): 1.0,
        ("time ratio over planned ratio", "plans-1024", "ours"): 1.0,
    }
    assert not any(each["group"].startswith("short") for each in made)
    [flops] = [each for each in made if each["what"] == "time ratio over FLOPs ratio"]
    assert flops["value"] == pytest.approx(0.8 / 0.75, abs=1e-4) and flops["time_ratio"] == 0.8


def test_plans_are_within_their_ratio(modules):
    """At the real sizes; no model has to be built for that."""
    preset = modules.presets.REAL
    catalog = modules.plans.catalog_of(preset, 40_000_000)
    architecture = catalog.architecture
    dense = architecture.flops(catalog.dense, 4096, 512)
    for name in modules.plans.PLANS:
        kind, ratio, plan = modules.plans.plan_of(name, preset, catalog)
        assert catalog.check(plan) == plan and catalog.ratio(plan) <= ratio
        assert 0.85 * ratio <= architecture.flops(plan, 4096, 512) / dense <= ratio, name
        assert len(plan.skipped) == (60 - len(plan.blocks) if kind == "depth" else 0)
        assert any(block.student for block in plan.blocks) == (kind == "mixed")


def test_sliced_stock_models_are_as_narrow_as_they_say(modules, models, monkeypatch):
    """The outputs are compared whenever a plan is timed; this test checks that the stock model really is cut."""
    call = modules.presets.inputs(models.preset, 512, models.preset.text)
    with torch.no_grad():
        for name in ("width 0.7", "depth 0.5"):
            plan = models.plan(name).plan
            stock = models.stock(plan)
            params = {id(p): p.numel() for p in stock.transformer_blocks.parameters()}
            # Blocks are walked several times; factors of modulations are shared by streams in ours alone.
            kinds = {(planned.interval.first % models.preset.blocks, planned.width) for planned in plan.blocks}
            width = plan.blocks[0].width
            rank, dim = width["modulation"], models.preset.dim
            shared = rank * (dim + 1) if rank < dim else 0
            assert sum(params.values()) == len(kinds) * (models.preset.spec.params(width) + shared)
            assert torch.allclose(stock(**call)[0], models.ours(plan)(**call)[0], atol=1e-5)
            monkeypatch.setattr(transformer_qwenimage, "apply_rotary_emb_qwen", modules.real_rope.rotate)
            assert torch.allclose(stock(**call)[0], models.stock(plan, real_rope=True)(**call)[0], atol=1e-5)
        dense = models.ours(models.catalog.dense)(**call)[0]
        assert not agree(models.ours(models.plan("depth 0.5").plan)(**call)[0], dense)


def test_a_wrong_contestant_fails_before_and_after_it_is_timed(modules, models, tmp_path, monkeypatch):
    job = {"group": "short-512", "inject": {}, "leave_out": {}}
    calls = []

    def contest(kind, size, of, call):
        def wrong_from(number):
            def run(**given):
                calls.append(number)
                out = right(**given)[0].clone()
                # One token is wrong.
                out[:, -1] *= -1.0 if calls.count(number) > number else 1.0
                return (out,)

            return lambda: functools.partial(run, **call)

        right = of.ours(of.catalog.dense)
        return [
            modules.contestants.Contestant(name, "dense 1", wrong_from(n)) for name, n in (("wrong", 0), ("later", 8))
        ]

    monkeypatch.setattr(modules.race, "contestants", contest)
    with torch.no_grad():
        race = modules.race.Race(job, models, modules.report.Report(tmp_path / "state.json"))
        race.run(time.monotonic() + 60)
    found = failures(json.loads((tmp_path / "state.json").read_text()))
    assert found["wrong, dense 1"].startswith("RuntimeError: before it was timed its output was off by")
    assert found["later, dense 1"].startswith("RuntimeError: after it was timed its output was off by")
