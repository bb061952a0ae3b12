"""Limits that no linter checks: sizes of files and functions, silenced types, where a family may be named."""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("ppcl_rt", "kernels", "train")
# A kernel is one file, and its body one function, so kernels/ has limits of its own: what a person can still read.
LIMITED = ("ppcl_rt", "train", "bench", "docs")

FILE_LINES = 350
# A family is one file: its specs, its layout of tensors, its block and its model.
FAMILY_LINES = 700
FUNCTION_LINES = 60
SILENCED_TYPES = 10

FAMILY_FOLDERS = ("ppcl_rt/families", "train/ppcl_train/families")
NO_CODE = frozenset(
    {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
)


def sources(*folders: str) -> Iterator[Path]:
    """Python files of some folders, as paths from the repository's root."""
    for folder in folders:
        for path in sorted((ROOT / folder).rglob("*.py")):
            yield path.relative_to(ROOT)


def code_lines(source: str) -> set[int]:
    """Numbers of the lines that hold code: not blank, not only a comment, not part of a docstring."""
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in NO_CODE:
            lines.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Module):
            first = node.body[0] if node.body else None
            if (
                isinstance(first, ast.Expr)
                and isinstance(first.value, ast.Constant)
                and isinstance(first.value.value, str)
            ):
                lines.difference_update(range(first.lineno, (first.end_lineno or first.lineno) + 1))
    return lines


def function_sizes(source: str) -> dict[str, int]:
    """Function -> lines of code from its `def` to its end; functions inside it count as part of it."""
    lines = code_lines(source)
    return {
        f"{node.name} (line {node.lineno})": sum(node.lineno <= line <= (node.end_lineno or 0) for line in lines)
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    }


def test_files_are_short():
    long = {}
    for path in sources(*LIMITED):
        limit = FAMILY_LINES if path.as_posix().startswith(FAMILY_FOLDERS) else FILE_LINES
        if (count := len((ROOT / path).read_text().splitlines())) > limit:
            long[str(path)] = count
    assert not long, f"split these files (lines): {long}"


def test_functions_are_short():
    long = {}
    for path in sources(*LIMITED):
        for function, count in function_sizes((ROOT / path).read_text()).items():
            if count > FUNCTION_LINES:
                long[f"{path}: {function}"] = count
    assert not long, f"split these functions (lines of code): {long}"


def silenced(path: Path) -> Iterator[tuple[int, str]]:
    """Line and reason of each `type: ignore`; the reason is what is written after it."""
    for token in tokenize.generate_tokens(io.StringIO((ROOT / path).read_text()).readline):
        if token.type == tokenize.COMMENT and (found := re.search(r"type:\s*ignore(\[[\w, -]+\])?(.*)", token.string)):
            yield token.start[0], found.group(2).strip(" #-:")


def test_silenced_types_are_few_and_say_why():
    found = {f"{path}:{line}": reason for path in sources(*LIMITED, "kernels") for line, reason in silenced(path)}
    assert len(found) <= SILENCED_TYPES, f"{len(found)} times `type: ignore`: {sorted(found)}"
    mute = [place for place, reason in found.items() if not reason]
    assert not mute, f"write the reason after these `type: ignore[...]`: {mute}"


def test_families_are_named_in_their_own_files_alone():
    named = [
        f"{path}:{number}"
        for path in sources(*PACKAGES)
        if "families" not in path.parts and "preset" not in path.stem
        for number, line in enumerate((ROOT / path).read_text().splitlines(), 1)
        if "qwen" in line.lower()
    ]
    assert not named, f"these lines name a family outside families/ and presets: {named}"


@pytest.mark.parametrize("folder", ["kernels", "train", "tests/kernels"])
def test_source_roots_are_no_packages(folder):
    """`kernels/__init__.py` would shadow the Hugging Face package `kernels`, which diffusers imports."""
    assert not (ROOT / folder / "__init__.py").exists()


def test_the_counts_are_right():
    source = '''"""Module."""

def one():
    """Doc
    string."""
    # comment

    return """a
    b"""


class Two:
    """Doc."""

    def two(
        self,
    ):
        def inner():
            return 1  # code and a comment
        return inner
'''
    assert function_sizes(source) == {"one (line 3)": 3, "two (line 15)": 6, "inner (line 18)": 2}
