"""``ppcl report``: one page of whatever results lie in a folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def report(
    folder: Annotated[Path, typer.Argument(help="folder of a run, or of results that --json wrote; and below")],
    out: Annotated[Path, typer.Option(help="HTML file to write")] = Path("report.html"),
) -> None:
    """Make one page of the results in a folder: curves, plans, pictures, tables, settings; it needs no network."""
    # Imported here: no other command needs jinja2 and what it draws with.
    from ppcl_rt.report.page import write_report

    print(f"wrote {write_report(folder, out)}")
