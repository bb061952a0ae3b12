"""The public API: every name of `ppcl_rt`, its methods, and their signatures.

The table is `public_api.txt`, next to this file. A change of the public API changes the table, in the same commit, by

    python tests/house/test_public_api.py --write

and gets a line in CHANGELOG.md.
"""

from __future__ import annotations

import ast
import inspect
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

import ppcl_rt

TABLE = Path(__file__).with_name("public_api.txt")


class Written(str):
    """An annotation as it is written in the source, which `inspect` prints without quotes."""

    __slots__ = ()
    __repr__ = str.__str__


def signature(what: Any) -> str:
    """A signature as it is written in the source, whatever the versions of python and pydantic."""
    found = inspect.signature(what)
    written = annotations(what) if inspect.isclass(what) else {}

    def text(name: str, annotation: Any) -> Any:
        annotation = written.get(name, annotation)
        annotation = getattr(annotation, "__forward_arg__", annotation)
        return Written(annotation) if isinstance(annotation, str) else annotation

    parameters = [each.replace(annotation=text(each.name, each.annotation)) for each in found.parameters.values()]
    returns = inspect.Signature.empty if inspect.isclass(what) else text("return", found.return_annotation)
    return str(found.replace(parameters=parameters, return_annotation=returns))


def annotations(kind: type) -> dict[str, Any]:
    """The annotations of a class's fields."""
    found: dict[str, Any] = {}
    for base in reversed(kind.__mro__):
        if base.__module__.startswith("ppcl_"):
            found |= vars(base).get("__annotations__", {})
    return found


def members(kind: type) -> Iterator[str]:
    """Public methods and properties of a class that this project defines, inherited ones too."""
    seen: dict[str, Any] = {}
    for base in reversed(kind.__mro__):
        if base.__module__.startswith("ppcl_"):
            seen |= {name: value for name, value in vars(base).items() if not name.startswith("_")}
    for name, value in sorted(seen.items()):
        if isinstance(value, classmethod | staticmethod):
            yield f"{type(value).__name__} {name}{signature(value.__func__)}"
        elif isinstance(value, property) or type(value).__name__ == "cached_property":
            getter = value.fget if isinstance(value, property) else value.func
            yield f"property {name}{signature(getter)}"
        elif inspect.isfunction(value):
            yield f"{name}{signature(value)}"


def constructor(kind: type) -> str:
    """The arguments of a class that users make themselves: plain data, or one with an `__init__` of this project."""
    is_data = any(hasattr(kind, mark) for mark in ("model_fields", "__dataclass_fields__", "_fields"))
    return signature(kind) if is_data or kind.__init__.__module__.startswith("ppcl_") else ""


def surface() -> str:
    """The whole public API, a line each name, method and property."""
    lines = []
    for name in sorted(ppcl_rt.__all__):
        value = getattr(ppcl_rt, name)
        if inspect.isclass(value):
            lines += [f"class {name}{constructor(value)}", *(f"    {line}" for line in members(value))]
        elif callable(value):
            lines.append(f"{name}{signature(value)}")
        else:
            lines.append(f"{name}: {type(value).__name__}")
    return "\n".join(lines) + "\n"


def test_the_public_api_is_what_the_table_says():
    assert surface() == TABLE.read_text(), f"after a change of the public API: python {__file__} --write"


def test_every_name_is_found_where_type_checkers_look():
    """Types come from imports that only they read, values from a table: both name the same module."""
    tree = ast.parse(Path(ppcl_rt.__file__).read_text())
    typed = {
        each.asname: statement.module.removeprefix("ppcl_rt.")
        for block in tree.body
        if isinstance(block, ast.If)
        for statement in block.body
        if isinstance(statement, ast.ImportFrom) and statement.module
        for each in statement.names
        if each.asname
    }
    assert typed == ppcl_rt._PLACES
    assert set(dir(ppcl_rt)) == set(ppcl_rt.__all__)
    assert inspect.ismodule(ppcl_rt.planning) and inspect.ismodule(ppcl_rt.ops)
    with pytest.raises(AttributeError, match="Nothing"):
        _ = ppcl_rt.Nothing


def test_the_version_is_the_package_s():
    assert ppcl_rt.__version__ == version("ppcl-rt")


if __name__ == "__main__":
    if "--write" in sys.argv:
        TABLE.write_text(surface())
    else:
        print(surface(), end="")
