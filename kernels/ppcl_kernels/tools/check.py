"""One case, checked: against float64, for what it writes where it should not, run after run, captured and replayed."""

from __future__ import annotations

import contextlib
import time
import zlib
from collections.abc import Iterator, Sequence
from typing import Any
from unittest import mock

import torch

from ppcl_kernels.tools.cases import Case
from ppcl_kernels.tools.children import Say
from ppcl_kernels.tools.judge import Limit, judge

# Elements around each result: 128 bytes of bf16, so that alignment stays what it is in a model.
_MARGIN = 64
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def poison(dtype: torch.dtype) -> float:
    """The value that nobody computes by accident."""
    return float("nan") if dtype.is_floating_point else torch.iinfo(dtype).min


@contextlib.contextmanager
def poisoned() -> Iterator[list[torch.Tensor]]:
    """Let ``new_empty`` give poison amid poison; the list holds what was allocated, margins included."""
    original, buffers = torch.Tensor.new_empty, list[torch.Tensor]()

    def amid(self: torch.Tensor, *shape: Any, **options: Any) -> torch.Tensor:
        size = torch.Size(shape[0] if len(shape) == 1 and not isinstance(shape[0], int) else shape)
        buffer = original(self, size.numel() + 2 * _MARGIN, **options)
        buffers.append(buffer.fill_(poison(buffer.dtype)))
        return buffer[_MARGIN : _MARGIN + size.numel()].view(size)

    with mock.patch.object(torch.Tensor, "new_empty", amid):
        yield buffers


def _margins_left_alone(buffers: Sequence[torch.Tensor]) -> bool:
    return all(
        same(margin, torch.full_like(margin, poison(margin.dtype)))
        for buffer in buffers
        for margin in (buffer[:_MARGIN], buffer[-_MARGIN:])
    )


def _bits(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous().view(_BITS[x.itemsize])


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors are equal bit by bit."""
    return torch.equal(_bits(a), _bits(b))


def check(case: Case, device: torch.device, repeats: int, say: Say) -> None:
    """Check one case; ``say`` is told each stage before it begins, and at the end what was found.

    What is said at the end has ``ok``, and ``why`` where it is false.

    Args:
        case: which.
        device: of its tensors; on a GPU the call is captured and replayed too.
        repeats: runs that have to give the same bits.
        say: see `ppcl_kernels.tools.children`.
    """
    started = time.monotonic()
    row: dict[str, Any] = {"form": case.form}

    def stage(name: str) -> None:
        if device.type == "cuda":
            torch.cuda.synchronize()
        say({**row, "stage": name})

    try:
        why = _check(case, device, repeats, stage, row)
    except Exception as error:
        why = f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]
        row["raised"] = True
    say({**row, "ok": not why, "why": why, "seconds": round(time.monotonic() - started, 2)})


def _check(case: Case, device: torch.device, repeats: int, stage: Any, row: dict[str, Any]) -> str:
    """Fill ``row`` in; returns what is wrong, empty where nothing is."""
    stage("its inputs")
    torch.manual_seed(zlib.crc32(f"{case.kernel} {case.form}".encode()))
    work = case.make()
    stage("its first run")
    with poisoned() as buffers:
        first = list(work.call())
    stage("float64")
    if not buffers:
        return "no result came from new_empty: it was not poisoned"
    if not _margins_left_alone(buffers):
        return "writes beyond its results"
    limit = Limit(first[0].dtype, work.roundings, work.terms)
    exact = list(work.exact())
    assert len(exact) == len(first), f"{len(first)} results, {len(exact)} in float64"
    found = [judge(got, wanted, limit) for got, wanted in zip(first, exact, strict=True)]
    del exact
    row |= {"limit": limit.value, "tiles": sum(f["tiles"] for f in found)}
    row |= {name: max(f.get(name, float("inf")) for f in found) for name in ("error_rms", "error_max")}
    if wrong := sum(f["wrong"] for f in found):
        number, worst = max(enumerate(found), key=lambda item: item[1].get("error_rms", float("inf")))
        return (
            f"{wrong} of {row['tiles']} tiles of 64 x 64 are wrong; worst at {worst['where']} of result {number}: "
            f"RMS error {row['error_rms']:.1e}, largest {row['error_max']:.1e}, limit {limit}"
        )
    stage("its repeats")
    for number in range(2, repeats + 1):
        if not all(map(same, work.call(), first)):
            return f"run {number} of {repeats} differs from the first"
    row["repeats"] = repeats
    if device.type == "cuda":
        stage("capture and replay")
        return _captured(work.call, first)
    return ""


def _captured(call: Any, first: Sequence[torch.Tensor]) -> str:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = call()
    for number in (1, 2):
        for result in results:
            result.fill_(poison(result.dtype))
        graph.replay()
        torch.cuda.synchronize()
        if not all(map(same, results, first)):
            return f"replay {number} of a captured graph differs from a plain run"
    return ""
