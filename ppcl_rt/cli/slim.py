"""``ppcl slim``: a dense model with its modulations at a low rank."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import track
from safetensors import SafetensorError
from safetensors.torch import load_file

from ppcl_rt.cli.options import AsJson, Checkpoint
from ppcl_rt.cli.values import float_of
from ppcl_rt.convert import slim as slimming
from ppcl_rt.files import one_line

# Of `--prompts`.
_POOLED = "pooled"


def slim(
    source: Checkpoint,
    out: Annotated[Path, typer.Argument(help="folder to write")],
    error: Annotated[float | None, typer.Option(help="relative squared error of a block's modulations")] = None,
    factors: Annotated[str, typer.Option(help="what factors are stored in: float32 or bfloat16")] = "float32",
    prompts: Annotated[
        Path | None, typer.Option(help="safetensors file: pooled [N, E], where modulations see it")
    ] = None,
    guidance: Annotated[str | None, typer.Option(help="values with commas between, for models that embed one")] = None,
    subfolder: Annotated[str | None, typer.Option(help="of a pipeline: transformer")] = None,
    as_json: AsJson = False,
) -> None:
    """Make a model a third smaller without data or training: its modulations become two thin layers each."""
    begun, dtype = time.perf_counter(), float_of(factors)
    assert dtype is not None, "there is a default"
    how = slimming.Slimming(
        error=slimming.DEFAULT_ERRORS.get(dtype, 0.0) if error is None else error,
        factors=dtype,
        pooled=None if prompts is None else _pooled(prompts),
        guidance=_numbers(guidance),
    )

    def shown(blocks: Sequence[int]) -> Iterable[int]:
        return track(blocks, "blocks", console=Console(stderr=True), transient=True)

    made = slimming.slim(source, out, how, shown, subfolder)
    catalog, done, architecture = made.catalog, made.blocks, made.catalog.architecture
    dense, left = architecture.dense_params, architecture.params(catalog.largest)
    said: dict[str, Any] = {
        "family": catalog.family,
        "params_before": dense,
        "params": left,
        "bytes_before": made.bytes_before,
        "bytes": made.bytes_after,
        "error_asked": how.error,
        "error": max(block.error for block in done),
        "error_at_worst": max(block.worst for block in done),
        "ranks": [block.rank for block in done],
        "prompts": 0 if how.pooled is None else len(how.pooled),
        "guidance": list(how.guidance),
        "seconds": time.perf_counter() - begun,
        "peak_bytes": _peak_bytes(),
    }
    if as_json:
        print(json.dumps({"out": str(out), **said}, indent=1))
        return
    print(f"{out}: {dense:,} parameters before, {left:,} now: {1 - left / dense:.1%} less")
    print(f"{made.bytes_before / 1e9:.4g} GB before, {made.bytes_after / 1e9:.4g} GB now")
    print(f"ranks by block: {', '.join(map(str, said['ranks']))}")
    worst = f"{said['error_at_worst']:.2g} where it is largest"
    print(f"error {said['error']:.2g}, asked {how.error:g}, mean over timesteps between those fitted; {worst}")
    print(_covered(said))
    peak = f", {said['peak_bytes'] / 1e9:.2f} GB of memory at most" if said["peak_bytes"] is not None else ""
    print(f"{said['seconds'] / 60:.1f} minutes{peak}")


def _covered(said: dict[str, Any]) -> str:
    if not said["prompts"]:
        return "covered: every timestep"
    values = f" and guidances {', '.join(map(str, said['guidance']))}" if said["guidance"] else ""
    return (
        f"covered: every timestep with {said['prompts']} prompts{values}, half of them held out for the error; "
        "not covered: prompts that are unlike all of these, other guidances"
    )


def _peak_bytes() -> int | None:
    """The most memory that this process has held; None where the system does not say."""
    try:
        import resource
    except ImportError:
        return None
    # On Linux in kilobytes, on macOS in bytes.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _pooled(path: Path) -> torch.Tensor:
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path} is no safetensors file: {one_line(error)}") from None
    if _POOLED not in tensors:
        raise ValueError(f"{path} holds no tensor {_POOLED} [N, E]: pooled text embeddings of N prompts")
    return tensors[_POOLED].float()


def _numbers(values: str | None) -> tuple[float, ...]:
    try:
        return tuple(map(float, values.split(","))) if values else ()
    except ValueError:
        raise ValueError(f'guidances are numbers with commas between, not "{values}"') from None
