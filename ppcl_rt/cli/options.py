"""Options and arguments that several commands share. Nothing here imports torch: a command may begin without it."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, NamedTuple, get_type_hints

import typer

Checkpoint = Annotated[str, typer.Argument(help="checkpoint folder or hub id")]
Ratio = Annotated[float | None, typer.Option(help="share of the dense parameters and FLOPs, in (0, 1]")]
Ratios = Annotated[str | None, typer.Option(help="ratios, with commas between")]
PlanFile = Annotated[Path | None, typer.Option(help="a plan written by `ppcl plan --out`, instead of a ratio")]
AsJson = Annotated[bool, typer.Option("--json", help="print JSON")]
Device = Annotated[str, typer.Option(help="torch device")]
DType = Annotated[str | None, typer.Option(help="of the weights, for --memory: float32; else as they are stored")]
Transformer = Annotated[
    str | None, typer.Option(help="checkpoint to draw with, where CHECKPOINT is the folder of a pipeline without one")
]
Quantize = Annotated[str | None, typer.Option(help="weights of blocks in eight bits: int8, float8, float8-dynamic")]

# Of `Amounts`: what a limit is of.
_HOW = ("shape", "pipeline", "offload")


class Amounts(NamedTuple):
    """Budgets other than a ratio, as they were typed; None where they were not."""

    params: str | None = None
    flops: str | None = None
    memory: str | None = None
    latency: str | None = None
    fit: str | None = None
    shape: str | None = None
    pipeline: str | None = None
    offload: str | None = None

    @property
    def limits(self) -> dict[str, str]:
        """Those that limit something; the others say how."""
        return {name: given for name, given in self._asdict().items() if name not in _HOW and given is not None}

    @property
    def how(self) -> dict[str, str | None]:
        """Those that say how something is limited."""
        return {name: getattr(self, name) for name in _HOW}


NO_AMOUNTS = Amounts()
_HELP = Amounts(
    params="at most so many parameters: 10B",
    flops="at most so many FLOPs a forward at --shape: 40T",
    memory="at most so many bytes of weights, GB is 1e9: 12GB",
    latency="at most so many ms a forward at --shape on --device: 400",
    fit="memory of the device that the whole --pipeline runs on: 24GB",
    shape="image + text tokens, x batch: 4096+512x2; else the reference shape",
    pipeline="for --fit: folder of a diffusers pipeline; else the transformer alone",
    offload="for --fit: model, where one part at a time is on the device",
)


def with_amounts(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command an option for each of `Amounts`, in the place of its parameter ``amounts``."""

    @functools.wraps(command)
    def run(**given: Any) -> None:
        command(amounts=Amounts(**{name: given.pop(name) for name in Amounts._fields}), **given)

    options = {name: Annotated[str | None, typer.Option(help=said)] for name, said in _HELP._asdict().items()}
    hints = {**get_type_hints(command, include_extras=True), **options}
    parameters: list[inspect.Parameter] = []
    for parameter in inspect.signature(command).parameters.values():
        more = [parameter.replace(name=name, default=None) for name in options]
        parameters += more if parameter.name == "amounts" else [parameter]
    named = {p.name: p.replace(kind=p.KEYWORD_ONLY, annotation=hints[p.name]) for p in parameters}
    # What typer reads.
    run.__signature__ = inspect.Signature(list(named.values()))  # type: ignore[attr-defined]  # functions take any
    run.__annotations__ = {name: hints[name] for name in named}
    return run
