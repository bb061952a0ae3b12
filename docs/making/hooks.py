"""Hooks of mkdocs: pages that lie outside of this folder, and references that are made from the code.

The README, CONTRIBUTING, CHANGELOG and the card of the shipped checkpoint become pages, and links lead to them: a link
is written as a hub reads it, from file to file of the repository. A line ``<!-- made here: cli -->`` is replaced by
what `ppcl_reference` makes of the code that is installed.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

import ppcl_reference
from mkdocs.structure.files import File

ROOT = Path(__file__).parents[2]
# Files of the repository that are pages, and the names of the pages.
PAGES = {
    "README.md": "overview.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "examples/scenes/README.md": "scenes.md",
}
_FILES = {page: file for file, page in PAGES.items()}
_LINK = re.compile(r"\]\(([^)\s#]+)(#[^)\s]*)?\)")
_FENCED = re.compile(r"(^```.*?^```$)", re.DOTALL | re.MULTILINE)
_MADE = re.compile(r"^<!-- made here: (\w+) -->$", re.MULTILINE)


def on_files(files: Any, config: Any) -> Any:
    """Add the pages from outside of this folder."""
    for file, page in PAGES.items():
        files.append(File.generated(config, page, content=(ROOT / file).read_text()))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Make the references, and point links at pages."""
    name = page.file.src_uri
    # Every second piece is a block of code.
    pieces = _FENCED.split(_MADE.sub(lambda found: ppcl_reference.MADE[found[1]](), markdown))
    pieces[::2] = [_LINK.sub(lambda found: f"]({_target(name, found[1])}{found[2] or ''})", p) for p in pieces[::2]]
    return "".join(pieces)


def _target(page: str, link: str) -> str:
    """Where a link of a page leads on the site; what is no file of the repository stays as it is."""
    if "://" in link:
        return link
    file = posixpath.normpath(posixpath.join(posixpath.dirname(_FILES.get(page, f"docs/{page}")), link))
    if file.startswith("docs/"):
        target = file.removeprefix("docs/")
    elif file in PAGES:
        target = PAGES[file]
    else:
        return link
    return posixpath.relpath(target, posixpath.dirname(page) or ".")
