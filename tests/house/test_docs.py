"""README and docs are true: their code runs, their commands exist, their links, trees and variables are right.

What a reader's machine may not have is named in an HTML comment before the block, with the reason:

    <!-- not run: needs a GPU -->

Such a block of python is compiled, and nothing more. All other blocks of python of a document run one after the other
in one namespace, in an empty folder in which `examples/` lies.
"""

from __future__ import annotations

import importlib.util
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import typer.main

import ppcl_rt.cli.main

ROOT = Path(__file__).parents[2]
DOCUMENTS = sorted(
    path.relative_to(ROOT)
    for pattern in ("*.md", "docs/**/*.md", "examples/*/*.md", "ppcl_rt/**/*.md")
    for path in ROOT.glob(pattern)
)
BLOCK = re.compile(
    r"(?:<!-- not run: (?P<why>.+?) -->\n+)?^```(?P<kind>\w*)\n(?P<text>.*?)^```$", re.DOTALL | re.MULTILINE
)
# A path that docs name because it must not exist.
FORBIDDEN = ("kernels/__init__.py",)
# The commands of the documents that take under a second each; the others are parsed.
CHEAP = (("info",), ("plan",), ("train", "config"))


class Block(NamedTuple):
    """A fenced block of a document: its first line of text, what it is written in, and why it is not run."""

    document: Path
    line: int
    kind: str
    text: str
    why: str | None

    def __str__(self) -> str:
        return f"{self.document}:{self.line}"


def blocks(document: Path) -> Iterator[Block]:
    text = (ROOT / document).read_text()
    for found in BLOCK.finditer(text):
        line = text.count("\n", 0, found.start("text")) + 1
        yield Block(document, line, found["kind"], found["text"], found["why"])


def commands(document: Path) -> Iterator[tuple[int, list[str]]]:
    """The command lines of a document: in blocks without a language, and between backticks."""
    for block in blocks(document):
        if block.kind in ("", "sh", "bash", "console"):
            for number, line in enumerate(block.text.splitlines(), block.line):
                words = shlex.split(line, comments=True)
                if words and re.fullmatch(r"ppcl|make|python|torchrun", words[0]):
                    yield number, [word for word in words if word != "..."]


def inline_commands(document: Path) -> Iterator[tuple[int, list[str]]]:
    """Commands that prose names between backticks; arguments may be left out there."""
    text = (ROOT / document).read_text()
    text = BLOCK.sub(lambda block: "\n" * block[0].count("\n"), text)
    for found in re.finditer(r"`((?:ppcl|make) [^`]+)`", text):
        yield text.count("\n", 0, found.start()) + 1, shlex.split(found[1])


def ids(value: Any) -> str:
    return str(value)


@pytest.fixture(scope="module")
def program() -> Any:
    """The program with all its groups, as click commands."""
    return typer.main.get_command(ppcl_rt.cli.main.program())


@pytest.mark.parametrize("document", DOCUMENTS, ids=ids)
def test_python_of_the_documents_runs(document, tmp_path, monkeypatch):
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, Any] = {"__name__": document.stem}
    for block in blocks(document):
        if block.kind == "python":
            # Line numbers of errors are those of the document.
            code = compile("\n" * (block.line - 1) + block.text, str(document), "exec")
            if block.why is None:
                exec(code, namespace)


def parse(program: Any, words: list[str], complete: bool) -> list[str]:
    """Check a command of `ppcl`; returns the names of its group and itself.

    Args:
        complete: whether all arguments must be there, and right; else whether the named options exist.
    """
    command, names, context = program, [], None
    while hasattr(command, "commands"):
        if not words:
            assert not complete, f"{' '.join(['ppcl', *names])} needs a command"
            return names
        # Prose may name several: info|plan|sample.
        name, words = words[0], words[1:]
        assert name in command.commands, f"there is no command {' '.join(['ppcl', *names, name])}"
        command = command.commands[name]
        names.append(name)
    if complete:
        context = command.make_context(names[-1], list(words))
        assert context is not None
    else:
        options = {option for each in command.params for option in each.opts + each.secondary_opts}
        for word in words:
            assert not word.startswith("--") or word in options, f"ppcl {' '.join(names)} has no option {word}"
    return names


def check_python(words: list[str]) -> None:
    """Check `python -m module` or `python script`: it is there, and its source names every option."""
    if words[0] == "-m":
        spec = importlib.util.find_spec(words[1])
        assert spec is not None and spec.origin is not None, f"there is no module {words[1]}"
        path, words = Path(spec.origin), words[2:]
    else:
        path, words = ROOT / words[0], words[1:]
        assert path.is_file(), f"there is no {path}"
    # The project's own: what is installed lies in the checkout too, in `.venv`.
    if path.is_relative_to(ROOT) and "site-packages" not in path.parts:
        source = path.read_text()
        for word in words:
            assert not word.startswith("--") or f'"{word}"' in source, f"{path} has no option {word}"


def targets() -> set[str]:
    """Targets of the Makefile."""
    return set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


@pytest.mark.parametrize("document", DOCUMENTS, ids=ids)
def test_commands_of_the_documents_exist(program, document):
    cases = [(*each, True) for each in commands(document)] + [(*each, False) for each in inline_commands(document)]
    for line, words, complete in cases:
        try:
            if words[0] == "ppcl":
                parse(program, words[1:], complete)
            elif words[0] == "torchrun":
                parse(program, words[words.index("ppcl_rt.cli") + 1 :], complete)
            elif words[0] == "python":
                check_python(words[1:])
            else:
                unknown = {word for word in words[1:] if "=" not in word} - targets()
                assert not unknown, f"the Makefile has no target {unknown}"
        except Exception as error:
            # Errors of click's say what is wrong, but not where.
            message = error.format_message() if hasattr(error, "format_message") else str(error)
            pytest.fail(f"{document}:{line}: {shlex.join(words)}: {message}")


def cheap_commands() -> Iterator[Any]:
    seen = set()
    for document in DOCUMENTS:
        for line, words in commands(document):
            if words[0] == "ppcl" and any(tuple(words[1 : 1 + len(each)]) == each for each in CHEAP):
                if tuple(words) not in seen:
                    yield pytest.param(words[1:], id=f"{document}:{line}")
                seen.add(tuple(words))


@pytest.mark.parametrize("words", cheap_commands())
def test_cheap_commands_run(ppcl, words, tmp_path, monkeypatch):
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    status, _, err = ppcl(*words)
    assert status == 0, err


def anchors(document: Path) -> set[str]:
    """Anchors of a document's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", BLOCK.sub("", (ROOT / document).read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", DOCUMENTS, ids=ids)
def test_links_lead_somewhere(document):
    for target in re.findall(r"\]\(([^)\s]+)\)", BLOCK.sub("", (ROOT / document).read_text())):
        if "://" not in target:
            path, _, anchor = target.partition("#")
            found = (ROOT / document.parent / path).resolve() if path else ROOT / document
            assert found.exists(), f"{document} links to {target}: there is no such file"
            if anchor:
                assert anchor in anchors(found.relative_to(ROOT)), f"{document} links to {target}: no such heading"


@pytest.mark.parametrize("document", DOCUMENTS, ids=ids)
def test_paths_between_backticks_exist(document):
    """Paths of this project that prose names, such as `ppcl_rt/planning/plan.py` and `ppcl_kernels.tools.aot`."""
    text = BLOCK.sub("", (ROOT / document).read_text())
    roots = ("ppcl_rt", "kernels", "train", "tests", "bench", "docs", "examples")
    for path in re.findall(r"`([\w./-]+)`", text):
        if "/" in path and path.split("/")[0] in roots and "*" not in path and path not in FORBIDDEN:
            assert (ROOT / path).exists() or path.startswith("bench/results"), f"{document}: there is no {path}"
    for dotted in re.findall(r"`(ppcl_(?:rt|kernels|train)(?:\.\w+)+)(?:\(.*?\))?`", text):
        assert importable(dotted), f"{document}: there is no {dotted}"


@pytest.mark.parametrize("document", DOCUMENTS, ids=ids)
def test_tests_that_prose_names_exist(document):
    """Tests such as `tests/model/test_compile.py::test_export`; in tables the folder `tests` may be left out."""
    for path, function in re.findall(r"`(?:tests/)?([\w/]+\.py)::(test_\w+)`", (ROOT / document).read_text()):
        file = ROOT / "tests" / path
        # Some prose names a file without its folder, after another of the same folder.
        found = [file] if file.exists() else list((ROOT / "tests").glob(f"*/{path}"))
        assert len(found) == 1, f"{document}: there is no {path}, or more than one"
        assert f"def {function}(" in found[0].read_text(), f"{document}: {path} has no {function}"


def importable(dotted: str) -> bool:
    """Whether a dotted name is a module, or an attribute of one."""
    parts = dotted.split(".")
    for end in range(len(parts), 0, -1):
        try:
            value: Any = importlib.import_module(".".join(parts[:end]))
        except ModuleNotFoundError:
            continue
        try:
            for name in parts[end:]:
                value = getattr(value, name)
        except AttributeError:
            return False
        return True
    return False


def tree_paths(block: Block) -> Iterator[Path]:
    """The paths that a commented tree lists; two spaces a level, the comment after two spaces or more."""
    stack: list[str] = []
    for line in block.text.splitlines():
        if line.strip():
            depth = (len(line) - len(line.lstrip())) // 2
            names = re.split(r" {2,}", line.strip())[0]
            for name in names.split(", "):
                stack[depth:] = [name]
                yield Path(*stack)


TREES = [block for document in DOCUMENTS for block in blocks(document) if block.kind == "tree"]


@pytest.mark.parametrize("block", TREES, ids=ids)
def test_trees_list_what_is_there(block):
    listed = set(tree_paths(block))
    missing = sorted(str(path) for path in listed if not (ROOT / path).exists())
    assert not missing, f"{block} lists what is not there: {missing}"


def test_the_architecture_lists_every_folder_of_code():
    listed = {path for block in TREES if block.document.name == "architecture.md" for path in tree_paths(block)}
    assert listed, "docs/architecture.md has no tree"
    folders = {
        path.parent.relative_to(ROOT)
        for package in ("ppcl_rt", "kernels/ppcl_kernels", "train/ppcl_train")
        for path in (ROOT / package).rglob("__init__.py")
    }
    assert folders <= listed, f"not in the tree of docs/architecture.md: {sorted(map(str, folders - listed))}"


def test_every_environment_variable_is_documented():
    read = set()
    for folder in ("ppcl_rt", "kernels", "train", "bench"):
        for path in (ROOT / folder).rglob("*.py"):
            source = path.read_text()
            read |= set(re.findall(r"""environ(?:\.get|\.pop|\.setdefault)?[\[(]\s*["'](\w+)["']""", source))
            read |= set(re.findall(r"""["'](PPCL_[A-Z_]+)["']""", source))
    documented = set(re.findall(r"^\| `(\w+)`", (ROOT / "docs/environment.md").read_text(), re.MULTILINE))
    assert read == documented, f"docs/environment.md: missing {read - documented}, not read {documented - read}"
