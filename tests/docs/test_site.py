"""The docs build without a warning, have every public name, and ask nothing of other hosts.

The site is built once, in this process, in some seconds. Where mkdocs is not installed, these tests are skipped.
"""

import logging
import re
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

import ppcl_kernels
import ppcl_rt
from ppcl_rt.families import registry

ROOT = Path(__file__).parents[2]
WHY = "the docs need the extra docs: pip install .[docs]"
for package in ("mkdocs", "material", "mkdocstrings"):
    pytest.importorskip(package, reason=WHY)

# Attributes by which a page has a browser fetch something. `href` of `a` is fetched when a reader clicks.
FETCHED = {"src", "srcset", "poster", "data", "action"}
FOREIGN = re.compile(r"\s*(https?:)?//")
IN_STYLES = re.compile(r"(?:url\(\s*['\"]?|@import\s+['\"])\s*((?:https?:)?//[^'\")]*)")


class Page(HTMLParser):
    """What a page fetches, what it links to, and its anchors."""

    def __init__(self, text):
        super().__init__()
        self.fetched, self.links, self.anchors, self.classes = [], [], set(), set()
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        for name, value in attrs:
            if name in FETCHED or (name == "href" and tag != "a"):
                self.fetched.append(value or "")
            elif name == "href":
                self.links.append(value or "")
            elif name == "style":
                self.fetched += IN_STYLES.findall(value or "")
            elif name == "class":
                self.classes |= set((value or "").split())
            elif name in ("id", "name"):
                self.anchors.add(value)


class Warnings(logging.Handler):
    def __init__(self):
        super().__init__(logging.WARNING)
        self.messages = []

    def emit(self, record):
        self.messages.append(record.getMessage())


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The folder of the site, and the warnings of its build."""
    patch = pytest.MonkeyPatch()
    # The theme's authors have an advertisement for what they make now.
    patch.setenv("NO_MKDOCS_2_WARNING", "1")
    from mkdocs.commands.build import build
    from mkdocs.config import load_config

    out, warnings = tmp_path_factory.mktemp("site"), Warnings()
    logging.getLogger("mkdocs").addHandler(warnings)
    try:
        config = load_config(str(ROOT / "mkdocs.yml"), site_dir=str(out))
        config.plugins.on_startup(command="build", dirty=False)
        build(config)
        config.plugins.on_shutdown()
    finally:
        logging.getLogger("mkdocs").removeHandler(warnings)
        patch.undo()
    return out, warnings.messages


@pytest.fixture(scope="module")
def pages(site):
    return {path.relative_to(site[0]).as_posix(): Page(path.read_text()) for path in sorted(site[0].rglob("*.html"))}


def test_there_are_no_warnings(site):
    assert not site[1]


def test_every_document_is_a_page(pages):
    written = {path.relative_to(ROOT / "docs").with_suffix(".html").as_posix() for path in ROOT.glob("docs/**/*.md")}
    assert set(pages) == written | {"404.html", "overview.html", "contributing.html", "changelog.html", "scenes.html"}


def test_nothing_is_fetched_from_other_hosts(site, pages):
    """Readers' browsers ask the host of the site and no other."""
    fetched = {name: list(filter(FOREIGN.match, page.fetched)) for name, page in pages.items()}
    styles = {
        path.relative_to(site[0]).as_posix(): IN_STYLES.findall(path.read_text())
        for pattern in ("*.css", "*.svg", "*.html")
        for path in site[0].rglob(pattern)
    }
    assert not {name: found for each in (fetched, styles) for name, found in each.items() if found}
    # The theme's script fetches these two from other hosts, on pages that have them: diagrams, figures of a repository.
    assert not {name for name, page in pages.items() if page.classes & {"mermaid", "md-source"}}


def test_the_check_of_hosts_finds_them():
    foreign = (
        '<script src="https://a.example/x.js"></script><link href="//a.example/x.css" rel="stylesheet">'
        '<img srcset="https://a.example/1.png 2x"><p style="background: url(https://a.example/2.png)">'
        '<a href="https://a.example">here</a>'
    )
    assert len([each for each in Page(foreign).fetched if FOREIGN.match(each)]) == 4
    assert IN_STYLES.findall("@import 'https://a.example/x.css'; b { c: url(data:1) }") == ["https://a.example/x.css"]


def test_links_of_the_site_lead_somewhere(site, pages):
    for name, page in pages.items():
        # The page of errors is shown under any address, so its links begin at the root.
        for link in page.links if name != "404.html" else ():
            if not (parts := urlsplit(link)).scheme and not parts.netloc:
                target = (site[0] / name).parent / unquote(parts.path) if parts.path else site[0] / name
                target = target / "index.html" if target.is_dir() else target
                assert target.is_file(), f"{name} links to {link}"
                if parts.fragment and target.suffix == ".html":
                    anchors = pages[target.resolve().relative_to(site[0].resolve()).as_posix()].anchors
                    assert unquote(parts.fragment) in anchors | {"__skip", "__toc"}, f"{name} links to {link}"


def test_the_reference_has_every_public_name(site, pages):
    anchors, text = pages["reference/python.html"].anchors, (site[0] / "reference/python.html").read_text()
    classes = registry.class_names()
    missing = {name for name in ppcl_rt.__all__ if f"ppcl_rt.{name}" not in anchors} - {*classes, "__version__"}
    assert not missing and all(f"ppcl_rt.{name}" in text for name in classes)
    assert {f"ppcl_kernels.{name}" for name in ppcl_kernels.__all__} <= pages["reference/kernels.html"].anchors


def test_the_reference_has_the_methods_that_it_chooses(pages):
    import ppcl_reference  # the hooks of the build put it there

    anchors = pages["reference/python.html"].anchors
    assert not {name for name in ppcl_reference.MEMBERS if f"ppcl_rt.Pluggable.{name}" not in anchors}


def test_the_reference_has_every_command(pages):
    import ppcl_reference

    def names(command, path):
        for name, each in command.commands.items():
            yield (*path, name)
            yield from names(each, (*path, name)) if hasattr(each, "commands") else ()

    wanted = {"-".join(path) for path in names(ppcl_reference.program(), ("ppcl",))}
    assert {"ppcl-plan", "ppcl-train-run", "ppcl-bench-report"} <= wanted <= pages["reference/cli.html"].anchors
