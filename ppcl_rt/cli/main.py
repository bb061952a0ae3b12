"""The program ``ppcl``: its commands, and what happens when one fails.

Bad input ends in one line on standard error and exit status 2.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any

import typer

from ppcl_rt.cli.output import our_standard_output
from ppcl_rt.cli.starting import without_collector
from ppcl_rt.messages import brief

# Where each command is defined, below this folder.
_COMMANDS = {
    "info": "inspect:info",
    "plan": "inspect:plan",
    "sample": "sample:sample",
    "eval": "sample:evaluate",
    "demo": "sample:demo",
    "import": "convert_authors:import_",
    "export": "export:export",
    "convert": "convert:convert",
    "slim": "slim:slim",
    "report": "report:report",
    "web": "web:web",
}

# Newer versions of typer carry a click of their own. The base class of click's errors is therefore found through typer.
_ClickException: Any = typer.BadParameter.__mro__[2]

# The exit status of a shell's command that was interrupted: 128 + SIGINT.
_INTERRUPTED = 130
_BAD_INPUT = 2


def program(arguments: Sequence[str] = ()) -> typer.Typer:
    """The program with the command that some arguments ask for, or with all of them.

    All of them import torch, diffusers and training, which takes seconds.
    """
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.callback()(_about)
    groups = {entry.name: entry for entry in entry_points(group="ppcl.commands")}
    asked = arguments[0] if arguments else ""
    everything = asked not in {*_COMMANDS, *groups}
    for name, place in _COMMANDS.items():
        if everything or name == asked:
            module, _, function = place.partition(":")
            app.command(name)(getattr(import_module(f"ppcl_rt.cli.{module}"), function))
    for name, entry in groups.items():
        if everything or name == asked:
            app.add_typer(entry.load(), name=name)
    return app


def _about() -> None:
    """One checkpoint of a diffusion transformer, at any ratio."""


def main() -> None:
    """Run the program; the entry point of ``ppcl``."""
    try:
        with our_standard_output():
            with without_collector():
                app = program(sys.argv[1:])
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
