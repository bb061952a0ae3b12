"""``ppcl import``: checkpoints of the method's authors become checkpoints of one plan."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, cast

import typer

from ppcl_rt.cli.options import AsJson
from ppcl_rt.convert.authors import import_packaged, import_training
from ppcl_rt.planning.interval import Interval

_DIALECTS, _EXITS = ("newer", "older"), ("published", "intended")
_Text = str | None


def import_(
    source: Annotated[str, typer.Argument(help="packaged folder or hub id, or a .bin that training wrote")],
    out: Annotated[Path, typer.Argument(help="folder to write")],
    dialect: Annotated[_Text, typer.Option(help="newer or older, where files leave it open")] = None,
    base: Annotated[_Text, typer.Option(help="for a .bin: the stock checkpoint that training began with")] = None,
    intervals: Annotated[_Text, typer.Option(help="for a .bin: what each student stands for: 3-5,9-12")] = None,
    text_runs: Annotated[
        _Text, typer.Option(help="for a .bin: blocks after the first do not update the text: 3-8,20-24")
    ] = None,
    ehs: Annotated[
        _Text, typer.Option(help="for a .bin: published: the first map after every text run; intended: its own")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Read a checkpoint of the authors of PPCL; writes one that holds its plan and runs here."""
    _one_of("--dialect", dialect, _DIALECTS)
    _one_of("--ehs", ehs, _EXITS)
    given: dict[str, Any] = {"--base": base, "--intervals": intervals, "--text-runs": text_runs, "--ehs": ehs}
    # Of the names that were just checked: the types of what is called know no other.
    if Path(source).is_file():
        if base is None or intervals is None:
            raise ValueError(f"{source} is a training file: say --base STOCK and --intervals FIRST-LAST,...")
        made = import_training(
            source,
            out,
            base,
            _intervals("--intervals", intervals),
            _intervals("--text-runs", text_runs),
            cast(Any, ehs),
            cast(Any, dialect),
        )
    elif needless := next((option for option, value in given.items() if value is not None), None):
        raise ValueError(f"{needless} goes with a .bin of a training run, and {source} is no file")
    else:
        made = import_packaged(source, out, cast(Any, dialect))
    catalog = made.catalog
    assert catalog is not None and catalog.only is not None, "a converted checkpoint has one plan"
    params = catalog.architecture.params(catalog.largest)
    if as_json:
        only = catalog.only.model_dump(mode="json")
        print(json.dumps({"family": catalog.family, "params": params, "notes": made.notes, **only}, indent=1))
        return
    runs = ", ".join(map(str, catalog.only.text_runs)) or "none"
    print(f"{out}: {catalog.family}, {len(catalog.only.blocks)} blocks, {params:,} parameters; text runs: {runs}")
    for note in made.notes:
        print(note)


def _one_of(option: str, value: str | None, known: tuple[str, ...]) -> None:
    if value is not None and value not in known:
        raise ValueError(f"{option} is {' or '.join(known)}, not {value}")


def _intervals(option: str, text: str | None) -> list[Interval]:
    """Read ``3-5,9-12``; one number is an interval of one block."""
    found = []
    for part in (text or "").split(","):
        first, _, last = part.strip().partition("-")
        if part.strip() and not (first.isdecimal() and (last or first).isdecimal()):
            raise ValueError(f"{option} takes FIRST-LAST with commas between, not {part.strip()}")
        if part.strip():
            found.append(Interval(int(first), int(last or first)))
    return found
