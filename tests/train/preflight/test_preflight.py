"""What stages take, worked out from shapes: refused before anything is read, and mended by a setting."""

import json
import resource

import pytest
import torch
from tiny import ARCHITECTURE, TINY
from typer.testing import CliRunner

from ppcl_rt import Interval
from ppcl_train.cli import app
from ppcl_train.config.presets import PRESETS
from ppcl_train.config.settings import with_changes
from ppcl_train.engine.live_bytes import LiveBytes
from ppcl_train.preflight import report
from ppcl_train.preflight.needs import STAGES, recover, students, width
from ppcl_train.preflight.report import Machine
from ppcl_train.preflight.sizes import Sizes
from ppcl_train.selectors import selection
from ppcl_train.selectors.selection import Selected

# What a preset is for: GPUs of 80 GB, and hours if no FLOP is lost.
MACHINES = {"qwen-image": (8, 8), "qwen-image-1gpu": (1, 48), "closed-form": (1, 1), "flux-1gpu": (1, 48)}


@pytest.mark.parametrize("preset", MACHINES)
def test_a_preset_fits_the_machine_that_it_is_for(preset):
    gpus, hours = MACHINES[preset]
    rows = report.check(PRESETS[preset], Machine(gpus=gpus))
    assert [row.stage for row in rows] == list(STAGES)
    assert max(row.needs.peak for row in rows) > 40e9
    assert sum(row.hours for row in rows) < hours


def test_what_cannot_fit_is_refused_with_the_setting_that_makes_it_fit():
    run = with_changes(PRESETS["qwen-image-1gpu"], {"width.blocks_at_once": 32})
    with pytest.raises(
        ValueError, match=r"^width takes .* GB .*: it fits with --set width\.blocks_at_once=8$"
    ) as found:
        report.check(run, Machine())
    assert str(found.value).startswith("width takes ") and "\n" not in str(found.value)
    name, _, value = str(found.value).rpartition("--set ")[2].partition("=")
    report.check(with_changes(run, {name: json.loads(value)}), Machine())
    with pytest.raises(ValueError, match=r"take a larger machine$"):
        report.check(PRESETS["qwen-image-1gpu"], Machine(memory=24e9))


def test_other_limits_are_those_of_the_host_and_of_the_disk():
    run = PRESETS["closed-form"]
    with pytest.raises(ValueError, match="on disk"):
        report.check(run, Machine(disk=10e9))
    with pytest.raises(ValueError, match=r"of a host's 1\.0 GB"):
        report.check(run, Machine(host=1e9))


def test_shares_of_what_is_trained_fall_with_the_processes():
    """At 20 billion parameters: what one process holds, and what each of eight and of thirty-two does."""
    sizes = Sizes(PRESETS["qwen-image"])
    held = {n: recover(sizes, n).device["what is trained"] for n in (1, 8, 32)}
    assert held[8] == held[1] / 8 and held[32] == held[1] / 32
    assert recover(sizes, 8).device["teacher"] < recover(sizes, 1).device["teacher"] / 4


@pytest.mark.parametrize("preset", ["qwen-image", "flux", "sd3", "z-image"])
def test_dry_runs_take_no_memory(preset):
    """A block of the real width, forward and backward: bytes grow with the batch, and nothing is allocated."""
    sizes, before = Sizes(PRESETS[preset]), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    one, two = (sizes.backward(batch, "bf16") for batch in (4, 8))
    assert 1e9 < one < two < 2.2 * one
    assert 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) < 0.3 * one


def test_a_dry_run_counts_what_a_real_one_holds():
    run = with_changes(TINY, {"teacher.architecture": {**ARCHITECTURE, "num_attention_heads": 6}})
    sizes = Sizes(run)
    model = run.family.build(run.teacher.architecture)
    block = selection.new_student(model.blocks(), Selected(Interval(0, 1), "first"))
    calls = []
    hook = model.blocks()[0].register_forward_pre_hook(lambda _, __, kwargs: calls.append(kwargs), with_kwargs=True)
    with torch.no_grad():
        model(**model.example(sizes.tokens._replace(batch=3)))
    hook.remove()
    for parameter in block.parameters():
        parameter.register_post_accumulate_grad_hook(lambda of: setattr(of, "grad", None))
    with LiveBytes() as live:
        sum(stream.float().square().sum() for stream in block(**calls[0])).backward()
    # Never less; gradients of a few layers more are alive where tensors are without memory (measured: 8.8 %).
    assert live.peak <= sizes.backward(3, "no") <= 1.1 * live.peak


def test_settings_that_lower_what_a_stage_takes_do():
    run = PRESETS["qwen-image-1gpu"]
    for needs, lower in (
        (width, {"width.blocks_at_once": 1}),
        (students, {"students.at_once": 1}),
        (students, {"students.batch": 1}),
        (recover, {"compress.most_rank": 32}),
        (recover, {"recover.batch": 1}),
    ):
        assert needs(Sizes(with_changes(run, lower)), 1).peak < needs(Sizes(run), 1).peak


def test_the_command_says_what_fits_and_what_does_not():
    told = CliRunner().invoke(app, ["preflight", "--preset", "closed-form", "--json"])
    assert told.exit_code == 0
    rows = json.loads(told.stdout)
    assert [row["stage"] for row in rows] == list(STAGES) and all(row["fits"] for row in rows)
    refused = CliRunner().invoke(app, ["preflight", "--preset", "closed-form", "--memory", "40GB"])
    assert isinstance(refused.exception, ValueError) and "width takes" in str(refused.exception)
