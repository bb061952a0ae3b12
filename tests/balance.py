"""Which tests share a worker, and which start first: so that two workers end together.

A file's tests share one worker, because they share fixtures, which each worker makes for itself. The files below have
no costly fixture of their own: there, the cases of one test function share a worker.
"""

from __future__ import annotations

import pytest

APART = ("kernels/test_kernels.py",)
# The groups of more than a few seconds, longest first. The order of all others does not matter.
FIRST: tuple[str, ...] = ()


def group_of(item: pytest.Item) -> str:
    """The tests that share a worker with this one: ``laws/test_laws.py`` or ``kernels/test_kernels.py::test_mlp``."""
    path = item.nodeid.split("::")[0].removeprefix("tests/")
    return f"{path}::{getattr(item, 'originalname', item.name)}" if path in APART else path


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Name each test's group for pytest-xdist, and sort the longest groups to the front."""
    rank = {name: number for number, name in enumerate(FIRST)}
    groups = {item: group_of(item) for item in items}
    for item, group in groups.items():
        item.add_marker(pytest.mark.xdist_group(group))
    # A stable sort: a file's tests stay in their order.
    items.sort(key=lambda item: rank.get(groups[item], len(rank)))
