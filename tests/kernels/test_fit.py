"""Fit runs: kernels with faults are named and left out, everything else is written, and diffusers is not needed."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import faulty_kernels
import pytest
import torch

from ppcl_kernels.joint_attention import launch_key_ranges
from ppcl_kernels.launch import TARGETS, Target
from ppcl_kernels.tools import aot, fit
from ppcl_kernels.tools.cases import FULL, TINY, Setting, _ranges, all_cases
from ppcl_kernels.tools.check import check, poisoned, same
from ppcl_kernels.tools.children import NOT_REACHED, Job, Outcome, run_all
from ppcl_kernels.tools.judge import SIDE, Limit, judge

# Without a CUDA device, fit runs use triton's interpreter.
ENVIRONMENT = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
HIDDEN = ("diffusers", "pydantic", "pydantic_core", "annotated_types", "typing_inspection", "importlib_metadata")
HIDE = f"""
import sys
class Hidden:
    def find_spec(name, path=None, target=None):
        if name.partition(".")[0] in {HIDDEN!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}} here", name=name)
sys.meta_path.insert(0, Hidden)
"""


@pytest.fixture
def start(tmp_path):
    """Start a fit run into ``tmp_path / "out"``, in which packages that a GPU machine lacks cannot be imported."""
    (tmp_path / "site").mkdir()
    # Every python process with this path runs it first, children included.
    (tmp_path / "site" / "sitecustomize.py").write_text(HIDE)
    path = [str(tmp_path / "site"), str(Path(__file__).parent), *filter(None, sys.path)]

    def run(*arguments, **environment):
        return subprocess.Popen(
            [sys.executable, "-m", "ppcl_kernels.tools.fit", "--out", str(tmp_path / "out"), *arguments],
            env={**ENVIRONMENT, "PYTHONPATH": os.pathsep.join(path), **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    return run


def read(folder, name):
    return json.loads((folder / "out" / name).read_text())


def test_faults_are_named_and_left_out(start, tmp_path):
    """Kernels that hang, die, get one tile of four wrong, differ from run to run, or write outside their results."""
    sanitizer = tmp_path / "compute-sanitizer"
    # Replaces the real tool; it finds an error in the last tile.
    sanitizer.write_text(
        """#!/bin/bash
while [ "$1" != --lines ]; do shift; done
echo '{"tile": "7", "form": "fine too"}' >>"$2"
echo "========= COMPUTE-SANITIZER"
echo "========= Invalid __global__ write of size 4 bytes"
exit 99
"""
    )
    sanitizer.chmod(0o755)
    arguments = ("--cases", "faulty_kernels:cases", "--unit-seconds", "3", "--sanitizer", str(sanitizer))
    done = start(*arguments)
    output, errors = done.communicate(timeout=120)
    assert done.returncode == 1, output + errors
    (tiles,) = read(tmp_path, "allowed.json")["kernels"].values()
    verdicts = {faulty_kernels.FAULTS[int(tile)]: verdict for tile, verdict in tiles.items()}
    assert set(verdicts) == set(faulty_kernels.FAULTS)
    assert {name for name, verdict in verdicts.items() if verdict["ok"]} == {"fine"}
    for name, why in (
        ("hangs", "hangs: no result after 3 s: killed in its first run"),
        ("dies", "dies: killed by SIGSEGV in its first run"),
        ("garbage", "1 of 4 tiles of 64 x 64 are wrong; worst at sample 0, rows from 64, columns from 64 of result 0"),
        ("flaky", "run 2 of 2 differs from the first"),
        ("spills over", "writes beyond its results"),
        ("writes nothing when prepared", "the moved prepared launch differs from a plain run"),
        ("fine too", "compute-sanitizer: Invalid __global__ write of size 4 bytes"),
    ):
        assert why in verdicts[name]["why"], name
        assert f"left out: double {faulty_kernels.FAULTS.index(name)}: {name}: " in output
    content = read(tmp_path, "fit.json")
    # Every kernel that ended by itself has a row.
    rows = {row["form"]: row["ok"] for row in content["results"]}
    assert rows == {name: name.startswith("fine") for name in faulty_kernels.FAULTS if name not in ("hangs", "dies")}
    assert content["status"] == 1 and content["command"].endswith(" ".join(arguments))
    # Modules of later parts that are missing are reported.
    assert content["imports"]["diffusers"].startswith("missing: No module named 'diffusers' here")
    assert content["imports"][fit.RUNTIME].startswith("missing") and content["imports"]["torch"] == torch.__version__
    assert content["torch"] == torch.__version__ and content["device"].startswith("CPU")


def test_nothing_waits_for_the_imports_of_later_parts(tmp_path, monkeypatch):
    """A slow or missing import costs the compile stage one process of many, and the device is looked at before it."""
    stages = []

    def run_all(jobs, at_once, deadline, done):
        stages.append([job.name for job in jobs])
        target = TARGETS["sm_90"]
        limits = (target.arch, target.shared_bytes, target.multiprocessors)
        said = {"kind": "cuda", "target": limits, "units": [], "machine": dict.fromkeys(("torch", "device"))}
        for job in jobs:
            found = {"imports": {"ppcl_rt": "there", "diffusers": "missing: no"}}.get(job.name, said | {"why": ""})
            done(Outcome(job, [found], 0))

    monkeypatch.setattr(fit, "run_all", run_all)
    run = fit._Fit(fit._parser().parse_args(["--out", str(tmp_path)]), faulty_kernels.cases, "")
    run.findings.content |= dict.fromkeys(("torch", "triton", "cuda", "cudnn", "driver", "python"))
    assert run.look() == "" and stages == [["device"]]
    run.compile()
    first, *compiled = stages[1]
    assert first == "imports" and len(compiled) > 10
    imports = run.findings.content["imports"]
    assert imports["ppcl_rt"] == "there" and imports["diffusers"] == "missing: no"
    assert set(fit.LATER) <= set(imports) and len(run.findings.content["compiled"]) == len(compiled)


def test_a_compile_that_is_not_reached_is_no_verdict(tmp_path):
    """Without time to compile everything first, the rest is compiled when it is checked."""
    run = fit._Fit(fit._parser().parse_args(["--out", str(tmp_path), "--seconds", "0"]), faulty_kernels.cases, "")
    run.target = TARGETS["sm_90"]
    units = dict.fromkeys((case.kernel, case.tile) for case in aot.cases(run.target))
    run.forms = dict.fromkeys(units, 1)
    run.findings.expect(list(units))
    run.compile()
    assert len(run.findings.content["compiled"]) > len(units) > 10
    assert {verdict["why"] for verdict in run.findings.units.values()} == {NOT_REACHED}


def test_trouble_of_the_sanitizer_is_laid_to_no_kernel(start, tmp_path):
    """Errors outside kernels, and a tool that cannot run here, change no verdict."""
    sanitizer = tmp_path / "compute-sanitizer"
    # By default the tool reports what libraries ask of the driver in vain; and this one does not know the device.
    sanitizer.write_text(
        """#!/bin/bash
[[ "$*" == *"--report-api-errors no"* ]] && asked=1
while [ "$1" != --lines ]; do shift; done
echo '{"tile": "0", "form": "fine"}' >>"$2"
[ "$asked" ] || { echo "========= Program hit CUDA_ERROR_NOT_FOUND on CUDA API call"; exit 99; }
echo "RuntimeError: CUDA error: unknown error"
exit 1
"""
    )
    sanitizer.chmod(0o755)
    done = start("--cases", "faulty_kernels:fine", "--sanitizer", str(sanitizer))
    output, errors = done.communicate(timeout=60)
    assert done.returncode == 0, output + errors
    assert read(tmp_path, "allowed.json")["kernels"] == {"double": {"0": {"ok": True}}}
    assert [row["ok"] for row in read(tmp_path, "fit.json")["sanitized"]] == [None]
    assert "double: not finished, exit status 1" in output


def test_killed_midway_leaves_what_it_has(start, tmp_path):
    """After SIGKILL the files are valid, the checked tile is fit, the other may not run, and no child is left."""
    run = start("--cases", "faulty_kernels:one_that_hangs", "--at-once", "1")
    found = tmp_path / "out" / "allowed.json"
    give_up = time.monotonic() + 60
    while not (
        found.exists()
        and any(v["ok"] for tiles in json.loads(found.read_text())["kernels"].values() for v in tiles.values())
    ):
        assert time.monotonic() < give_up and run.poll() is None, run.communicate()
        time.sleep(0.02)
    children = Path(f"/proc/{run.pid}/task/{run.pid}/children")
    while not (pids := children.read_text().split()):
        assert time.monotonic() < give_up
        time.sleep(0.02)
    run.send_signal(signal.SIGKILL)
    run.communicate()
    assert read(tmp_path, "allowed.json")["kernels"] == {
        "double": {"0": {"ok": True}, "1": {"ok": False, "why": NOT_REACHED}}
    }
    content = read(tmp_path, "fit.json")
    assert content["status"] is None and [row["form"] for row in content["results"]] == ["fine"]
    while any(_runs(pid) for pid in pids):
        assert time.monotonic() < give_up, "a child outlived its parent"
        time.sleep(0.02)


def _runs(pid):
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


@pytest.fixture
def may_fork(monkeypatch):
    """Other tests of this process load diffusers; nothing has used CUDA."""
    monkeypatch.delitem(sys.modules, "diffusers", raising=False)


def test_no_fork_after_cuda(monkeypatch, may_fork):
    """A process that has used CUDA, or may have, starts programs and refuses to fork."""
    fork = Job("a fork", 60, lambda say: None)
    program = Job(
        "a program", 60, command=lambda lines: [sys.executable, "-c", f"open({str(lines)!r}, 'w').write('1')"]
    )
    for change, why in (
        (lambda patch: patch.setitem(sys.modules, "diffusers", torch), "has imported diffusers"),
        (lambda patch: patch.setattr(torch.cuda, "is_initialized", lambda: True), "has used CUDA"),
    ):
        with monkeypatch.context() as patch:
            change(patch)
            with pytest.raises(RuntimeError, match=f"cannot fork for a fork: this process {why}"):
                run_all([fork], 1, time.monotonic() + 60, lambda outcome: None)
            ended = []
            run_all([program], 1, time.monotonic() + 60, ended.append)
            assert ended[0].status == 0 and ended[0].said == [1]
    ended = []
    run_all([fork], 1, time.monotonic() + 60, ended.append)
    assert ended[0].status == 0


def test_bad_usage(monkeypatch, tmp_path, capsys, may_fork):
    with pytest.raises(SystemExit) as left:
        fit.main(["--out", str(tmp_path), "--cases", "faulty_kernels:nothing"])
    assert left.value.code == 2 and "wanted module:function" in capsys.readouterr().err
    parent = os.getpid()

    def asks_the_driver():
        assert os.getpid() != parent, "CUDA does not survive a fork"
        return False

    monkeypatch.setattr(torch.cuda, "is_available", asks_the_driver)
    monkeypatch.setattr(fit, "INTERPRETED", False)
    monkeypatch.setattr(fit, "LATER", ())
    for device, said in (("cpu", "set TRITON_INTERPRET=1"), ("cuda", "torch sees no CUDA device"), ("auto", "no CUDA")):
        assert fit.main(["--out", str(tmp_path), "--device", device]) == 2
        assert said in capsys.readouterr().err
    assert json.loads((tmp_path / "fit.json").read_text())["status"] == 2


def tiny(dtype=torch.float32):
    return Setting(torch.device("cpu"), dtype, TINY)


@pytest.fixture(scope="module")
def best_tiles():
    """Cases of the first tile of each kernel."""
    cases, first = all_cases(tiny()), {}
    return [case for case in cases if first.setdefault(case.kernel, case.tile) == case.tile]


def test_every_kernel_is_checked_and_is_fit(best_tiles):
    """Every form of every kernel passes, in the interpreter."""
    kernels = {
        "linear",
        "qkv_projection",
        "joint_attention",
        "key_ranges",
        "ada_layer_norm",
        "gated_residual",
        "norm_rope",
    }
    assert {case.kernel for case in best_tiles} == kernels
    assert len({(case.kernel, case.form) for case in best_tiles}) == len(best_tiles) > 20
    for case in best_tiles:
        rows = []
        with torch.no_grad():
            check(case, torch.device("cpu"), 1, rows.append)
        assert rows[-1]["ok"], (case.kernel, case.form, rows[-1]["why"])
        assert all("stage" in row for row in rows[:-1])


def test_key_ranges_are_those_of_the_kernel():
    """The expected ranges of a fit run, on masks with several runs of whole tiles, with none, and without any key."""
    generator = torch.Generator().manual_seed(0)
    mask = torch.rand(7, 37, generator=generator) < torch.tensor([0.2, 0.6, 0.8, 0.9, 0.95, 1.0, 0.0])[:, None]
    ranges = torch.empty(len(mask), 4, dtype=torch.int32)
    launch_key_ranges(mask.view(torch.uint8), ranges, 4).run()
    assert ranges.tolist() == [_ranges(row, 4) for row in mask.tolist()]
    assert len({end - begin for _, begin, end, _ in ranges.tolist()}) > 3


def test_one_rounding_is_within_every_limit_and_none_is_loose(best_tiles):
    """One bf16 rounding is 0.15 to 0.7 of every limit: 0.4 of a limit for one rounding, 0.2 of a limit for two."""
    for case in best_tiles:
        work = case.make()
        if work.roundings == 0:
            continue
        for exact in work.exact():
            found = judge(exact.bfloat16(), exact, Limit(torch.bfloat16, work.roundings, work.terms))
            assert found["wrong"] == 0 and 0.15 < found["error_rms"] / found["limit"] < 0.7, (
                case.kernel,
                case.form,
                found,
            )


EXACT = torch.randn(2, 130, 200, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
BF16 = Limit(torch.bfloat16, 1, 12288)


def zeros(tile):
    tile.zero_()


def nan(tile):
    tile[0, 0] = float("nan")


def one_value(tile):
    tile[-1, -1] += 0.2


def short_sum(tile):
    """Add the error of a sum that misses 64 of 12,288 terms: a variance of 1 / 192."""
    tile += torch.randn(tile.shape, generator=torch.Generator().manual_seed(1)) * 192**-0.5


@pytest.mark.parametrize("damage", [zeros, nan, one_value, short_sum], ids=lambda damage: damage.__name__)
@pytest.mark.parametrize("at", [(0, 0, 0), (1, 64, 128), (1, 128, 192)], ids=str)
def test_judge_finds_one_wrong_tile(at, damage):
    """A wrong tile in a corner, in the middle, and at the edge, where a tile is 2 x 8."""
    sample, row, col = at
    got = EXACT.bfloat16()
    assert judge(got, EXACT, BF16)["wrong"] == 0
    damage(got[sample, row : row + SIDE, col : col + SIDE])
    found = judge(got, EXACT, BF16)
    assert found["tiles"] == 2 * 3 * 4 and found["wrong"] == 1
    if damage is not one_value:
        assert found["where"] == f"sample {sample}, rows from {row}, columns from {col}"


def test_judge_takes_zeros_integers_and_wrong_shapes():
    zero = torch.zeros(2, 5, dtype=torch.float64)
    assert judge(zero.bfloat16(), zero, BF16)["wrong"] == 0 and judge(zero.bfloat16() + 1e-3, zero, BF16)["wrong"] == 1
    counts, equal = torch.tensor([[1, 2], [3, 4]]), Limit(torch.int64, 0, 0)
    assert (
        judge(counts, counts, equal)["wrong"] == 0 and judge(counts + torch.eye(2).long(), counts, equal)["wrong"] == 1
    )
    assert judge(zero[:1], zero, BF16)["wrong"] == 1


def test_results_are_poisoned_amid_poison():
    x = torch.zeros(3)
    with poisoned() as buffers:
        parts = x.new_empty(2, 3), x.new_empty((4,)), x.new_empty(5, dtype=torch.int32)
    assert [tuple(part.shape) for part in parts] == [(2, 3), (4,), (5,)] and len(buffers) == 3
    assert parts[0].isnan().all() and parts[1].isnan().all() and parts[2].unique().tolist() == [-(2**31)]
    for buffer, part in zip(buffers, parts):
        part.zero_()
        # The poison around the result is unchanged.
        assert buffer.count_nonzero() == buffer.numel() - part.numel() >= 100


def test_equal_means_bit_by_bit():
    zero, nan = torch.zeros(1), torch.full((1,), float("nan"))
    assert same(nan, nan) and not same(zero, -zero) and not same(zero.bfloat16(), zero.bfloat16() + 1e-30)


def test_time_that_is_over_leaves_jobs_out(may_fork):
    """At the deadline the running job is killed, and the others are not started."""
    ended = []
    jobs = [Job(name, 60, lambda say: time.sleep(60)) for name in ("first", "second")]
    started = time.monotonic()
    run_all(jobs, 1, started + 0.3, ended.append)
    assert time.monotonic() - started < 20
    assert sorted((outcome.job.name, outcome.status) for outcome in ended) == [("first", -9), ("second", None)]
    assert {outcome.job.name: outcome.how for outcome in ended}["second"] == NOT_REACHED


def test_first_the_best_guess_of_each_kernel(monkeypatch):
    """A tile that is not reached may not run, so the least likely winners come last."""
    monkeypatch.setattr(Target, "of", classmethod(lambda cls, device: TARGETS["sm_90"]))
    cases = all_cases(Setting(torch.device("cuda"), torch.bfloat16, FULL))
    units = list(dict.fromkeys(map(fit._unit, cases)))
    order = fit._in_turn(units)
    kernels = list(dict.fromkeys(kernel for kernel, _ in units))
    assert [kernel for kernel, _ in order[: len(kernels)]] == kernels and sorted(order) == sorted(units)
    # Everything that is checked is compiled before, and all checks fit the time even if each takes all of its own.
    assert set(units) <= {(case.kernel, case.tile) for case in aot.cases(TARGETS["sm_90"])}
    assert -(-len(units) // 4) * 25 <= 0.65 * 240
