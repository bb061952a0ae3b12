"""The order of the tests names tests that exist: one that was renamed would start late, or join `make quick`."""

import re
from pathlib import Path

import balance

TESTS = Path(__file__).parents[1]


def functions(path: str) -> set[str]:
    return set(re.findall(r"^def (test_\w+)", (TESTS / path).read_text(), re.MULTILINE))


def test_groups_are_files_or_functions_of_files_that_are_split():
    assert len(set(balance.FIRST)) == len(balance.FIRST)
    for group in (*balance.FIRST, *balance.LAST):
        path, _, function = group.partition("::")
        assert bool(function) == (path in balance.APART) and (not function or function in functions(path)), group


def test_what_is_not_quick_exists():
    assert all((TESTS / path).exists() for path in (*balance.APART, *balance.NOT_QUICK_FILES))
    every = set().union(*(functions(str(path.relative_to(TESTS))) for path in TESTS.rglob("test_*.py")))
    assert every >= balance.NOT_QUICK
