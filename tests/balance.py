"""Which tests share a worker, which start first, and which `make quick` runs.

A file's tests share one worker, because they share fixtures, which each worker makes for itself. The files in `APART`
have no costly fixture of their own: there, the cases of one test function share a worker.
"""

from __future__ import annotations

from typing import Any

import pytest

APART = ("kernels/test_aot.py", "kernels/test_kernels.py", "laws/test_backends.py")
# Groups of ten seconds and more on one core, longest first, so that two workers end together: a long group that starts
# last runs while the other worker has nothing left. The order of all other groups does not matter.
FIRST = (
    "laws/test_laws.py",
    "train/engine/test_distributed.py",
    "train/engine/test_trust.py",
    "train/compare/test_compare.py",
    "train/families/test_qwen_run.py",
    "kernels/test_fit.py",
    "kernels/test_aot.py::test_every_kernel_compiles",
    "kernels/test_aot.py::test_finds_fault",
    "cli/test_cli.py",
    "laws/test_backends.py::test_compiles_without_a_break",
    "laws/test_backends.py::test_scenes",
    "train/test_train.py",
)
# What `make quick` leaves out: two seconds and more for one case on one core, or a run in processes of its own. All of
# these run in `make test`.
NOT_QUICK = frozenset(
    {
        "test_a_comparison_goes_on_where_it_was_killed",
        "test_compiles_without_a_break",
        "test_every_kernel_compiles",
        "test_every_kernel_is_checked_and_is_fit",
        "test_everything_is_measured_but_what_fails_and_is_killed",
        "test_faults_are_named_and_left_out",
        "test_finds_fault",
        "test_kills_leave_the_bytes_of_a_run_that_nothing_disturbed",
        "test_killed_midway_leaves_what_it_has",
        "test_no_driver_without_a_gpu",
        "test_ours_runs_the_pipeline_with_the_steps_of_all",
        "test_random_plans_with_maps_grow_and_count_what_they_hold",
        "test_the_installed_program_runs",
        "test_the_shipped_checkpoint",
        "test_trouble_of_the_sanitizer_is_laid_to_no_kernel",
        "test_two_hundred_plans_from_one_model",
    }
)
# The same for whole files, whose tests share a run that takes longer than they do.
NOT_QUICK_FILES = (
    "train/engine/test_distributed.py",
    "train/families/test_qwen_run.py",
    "kernels/test_prepared.py",
)


def place_of(nodeid: str) -> tuple[str, str]:
    """The file of a test, from the folder of the tests, and its name without its case."""
    path, _, name = nodeid.removeprefix("tests/").partition("::")
    return path, name.partition("[")[0]


def group_of(nodeid: str) -> str:
    """The tests that share a worker with this one: ``laws/test_laws.py`` or ``kernels/test_kernels.py::test_mlp``."""
    path, function = place_of(nodeid)
    return f"{path}::{function}" if path in APART else path


def pytest_addoption(parser: pytest.Parser) -> None:
    """``--quick``: one case of each test function that takes less than two seconds."""
    parser.addoption("--quick", action="store_true", help="one case of each test function, without the long ones")


def _leave_out_long(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keep the first case of each test function that is quick."""
    kept, left_out, begun = [], [], set()
    for item in items:
        path, function = place_of(item.nodeid)
        long = path in NOT_QUICK_FILES or function in NOT_QUICK or item.get_closest_marker("slow")
        (left_out if long or (path, function) in begun else kept).append(item)
        begun.add((path, function))
    config.hook.pytest_deselected(items=left_out)
    items[:] = kept


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Sort the longest groups to the front."""
    if config.getoption("--quick"):
        _leave_out_long(config, items)
    rank = {name: number for number, name in enumerate(FIRST)}
    # A stable sort: a file's tests stay in their order.
    items.sort(key=lambda item: rank.get(group_of(item.nodeid), len(rank)))


# Optional: a python without pytest-xdist (a GPU run's) does not know this hook.
@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Send the groups to the workers in this order, each as soon as a worker is nearly done with its last.

    ``--dist loadgroup`` is meant for this, but pytest-xdist 3.8.0 under pytest 9.2.0 ignores the marks of groups.
    """
    if config.getvalue("dist") != "loadscope":
        return None
    from xdist.scheduler import LoadScopeScheduling

    class Groups(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return group_of(nodeid)

    return Groups(config, log)
