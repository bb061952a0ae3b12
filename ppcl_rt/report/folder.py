"""The results files of a folder and below, each read by the first kind that it fits."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from ppcl_rt.files import one_line
from ppcl_rt.report.comparisons import Comparison, Rows, Subsets
from ppcl_rt.report.evaluations import Evaluation
from ppcl_rt.report.gpu import Part, Sweep
from ppcl_rt.report.plans import Planned
from ppcl_rt.report.runs import Pictures, RunLog, Settings
from ppcl_rt.report.sheets import Sheet
from ppcl_rt.report.stored import Stored

# In this order; the last one takes what no other knows.
KINDS: tuple[type[Stored], ...] = (
    *(Evaluation, Comparison, Subsets, Planned, Settings, Pictures, Part, Sweep, RunLog, Sheet),
    Rows,
)
# What a folder of results holds besides results, and nobody expects on the page.
_NO_RESULTS = (".safetensors", ".html", ".md")
# Who made what pictures show, and under which license: text that has to go along.
NOTICE = "NOTICE"
# No results file is nearly as large.
_MOST_BYTES = 256_000_000
# Sheets that one page holds; a folder of samples has thousands.
_MOST_SHEETS = 60

Kept = TypeVar("Kept", bound=Stored)


class Results(NamedTuple):
    """What a folder holds.

    Attributes:
        found: name of a file, relative to the folder -> its content.
        notices: name of a file -> its text.
        damaged: name of a file -> why it cannot be read.
        unknown: names of files that are no results, as far as this program knows.
    """

    found: dict[str, Stored]
    notices: dict[str, str]
    damaged: dict[str, str]
    unknown: list[str]

    def of(self, kind: type[Kept]) -> Iterator[tuple[str, Kept]]:
        """Yield the files of a kind."""
        for name, content in self.found.items():
            if isinstance(content, kind):
                yield name, content


def read_folder(folder: Path) -> Results:
    """Read all results files; one that is damaged does not keep others from being read.

    Raises:
        ValueError: there is no such folder.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder} is no folder: give one that holds results")
    results = Results({}, {}, {}, [])
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        hidden = any(part.startswith(".") or part.endswith(".partial") for part in name.parts)
        if hidden or not path.is_file() or path.suffix in _NO_RESULTS:
            continue
        try:
            _read(path, name.as_posix(), results)
        except (OSError, ValueError, RecursionError) as error:
            # The name is said already.
            results.damaged[name.as_posix()] = one_line(error).removeprefix(f"{path} ").removeprefix(f"{path}: ")
    return results


def _read(path: Path, name: str, results: Results) -> None:
    kinds = [kind for kind in KINDS if kind.suffix == path.suffix]
    many = path.suffix == Sheet.suffix and sum(1 for _ in results.of(Sheet)) >= _MOST_SHEETS
    if path.name == NOTICE:
        results.notices[name] = path.read_text(encoding="utf-8")
        return
    if not kinds or many:
        results.unknown.append(name)
        return
    content = _content(path)
    for kind in kinds:
        if kind.fits(path, content):
            results.found[name] = kind.read(path, content)
            return
    results.unknown.append(name)


def _content(path: Path) -> Any:
    """The bytes of a picture, the text of lines, or what JSON holds."""
    if path.stat().st_size > _MOST_BYTES:
        raise ValueError(f"it has more than {_MOST_BYTES} bytes")
    data = path.read_bytes()
    if path.suffix == Sheet.suffix:
        return data
    if path.suffix == RunLog.suffix:
        # A kill may have cut a character.
        return data.decode("utf-8", errors="replace")
    try:
        return json.loads(data)
    except ValueError as error:
        raise ValueError(f"it is no JSON: {error}") from None
