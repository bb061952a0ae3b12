"""The program ``ppcl``: its commands, and what happens when one fails.

Bad input ends in one line on standard error and exit status 2.
"""

from __future__ import annotations

import sys
from importlib.metadata import entry_points
from typing import Any

import typer

from ppcl_rt.cli import convert, convert_authors, export, inspect, report, sample, slim, web
from ppcl_rt.cli.output import our_standard_output
from ppcl_rt.messages import brief

app = typer.Typer(
    help="One checkpoint of a diffusion transformer, at any ratio.",
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command()(inspect.info)
app.command()(inspect.plan)
app.command()(sample.sample)
app.command("eval")(sample.evaluate)
app.command()(sample.demo)
app.command("import")(convert_authors.import_)
app.command()(export.export)
app.command()(convert.convert)
app.command()(slim.slim)
app.command()(report.report)
app.command()(web.web)

# Newer versions of typer carry a click of their own. The base class of click's errors is therefore found through typer.
_ClickException: Any = typer.BadParameter.__mro__[2]

# The exit status of a shell's command that was interrupted: 128 + SIGINT.
_INTERRUPTED = 130
_BAD_INPUT = 2


def main() -> None:
    """Run the program; the entry point of ``ppcl``."""
    for entry in entry_points(group="ppcl.commands"):
        app.add_typer(entry.load(), name=entry.name)
    try:
        with our_standard_output():
            status = app(standalone_mode=False)
    except _ClickException as error:
        status = _complain(error.format_message())
    except typer.Abort:
        status = _INTERRUPTED
    except (ValueError, OSError) as error:
        status = _complain(str(error))
    sys.exit(status if isinstance(status, int) else 0)


def _complain(message: str) -> int:
    print(f"ppcl: {brief(message)}", file=sys.stderr)
    return _BAD_INPUT


if __name__ == "__main__":
    main()
