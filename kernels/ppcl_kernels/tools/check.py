"""Check one case: against float64, for writes outside its results, for repeatability, prepared, and in a graph."""

from __future__ import annotations

import contextlib
import time
import zlib
from collections.abc import Iterator, Sequence
from typing import Any
from unittest import mock

import torch

from ppcl_kernels.prepared import Bound
from ppcl_kernels.tools.cases import Case, Prepared
from ppcl_kernels.tools.children import Say
from ppcl_kernels.tools.judge import Limit, judge

# Elements before and after each result: 128 bytes in bf16, so that results are aligned as in a model.
_MARGIN = 64
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def poison(dtype: torch.dtype) -> float:
    """Return a value that no kernel computes by accident."""
    return float("nan") if dtype.is_floating_point else torch.iinfo(dtype).min


@contextlib.contextmanager
def poisoned() -> Iterator[list[torch.Tensor]]:
    """Fill what ``new_empty`` and ``empty_like`` return with poison, and put poison around it.

    Yields:
        All buffers, margins included.
    """
    original, buffers = torch.Tensor.new_empty, list[torch.Tensor]()

    def amid(self: torch.Tensor, *shape: Any, **options: Any) -> torch.Tensor:
        size = torch.Size(shape[0] if len(shape) == 1 and not isinstance(shape[0], int) else shape)
        buffer = original(self, size.numel() + 2 * _MARGIN, **options)
        buffers.append(buffer.fill_(poison(buffer.dtype)))
        return buffer[_MARGIN : _MARGIN + size.numel()].view(size)

    def like(x: torch.Tensor) -> torch.Tensor:
        return amid(x, x.shape)

    with mock.patch.object(torch.Tensor, "new_empty", amid), mock.patch.object(torch, "empty_like", like):
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
    """Return whether two tensors are equal bit by bit."""
    return torch.equal(_bits(a), _bits(b))


def check(case: Case, device: torch.device, repeats: int, say: Say) -> None:
    """Check one case; ``say`` receives the name of each stage before it begins, and the result at the end.

    The result has ``ok``, and ``why`` where ``ok`` is False.

    Args:
        case: the case.
        device: of its tensors; on a GPU the call is also captured in a graph and replayed.
        repeats: runs that have to return the same bits.
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
    """Fill ``row`` in; returns what is wrong, empty if nothing is."""
    stage("its inputs")
    torch.manual_seed(zlib.crc32(f"{case.kernel} {case.form}".encode()))
    work = case.make()
    stage("its first run")
    with poisoned() as buffers:
        first = list(work.call())
    stage("float64")
    if not buffers:
        return "no result was allocated by new_empty or empty_like: none was poisoned"
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
    call = work.call
    if work.prepare is not None:
        stage("prepared launches")
        prepared = work.prepare()
        row["detours"] = detours = list[str]()
        if why := _repeated(prepared, first, detours, interpreted=device.type == "cpu"):
            return why
        call = prepared.call
    if device.type == "cuda":
        stage("capture and replay")
        return _captured(call, first)
    return ""


def _repeated(prepared: Prepared, first: Sequence[torch.Tensor], detours: list[str], interpreted: bool) -> str:
    """Check prepared launches; ``detours`` receives why some go through triton's JIT, which is slower but not wrong."""
    # The first call goes through triton's JIT and is recorded; the other calls repeat it.
    calls = {"first": prepared.call, "second": prepared.call, "moved": prepared.elsewhere, "last": prepared.call}
    for name in ("moved",) if interpreted else calls:
        with poisoned() as buffers:
            results = calls[name]()
        if not (all(map(same, results, first)) and _margins_left_alone(buffers)):
            return f"the {name} prepared launch differs from a plain run"
    for part in () if interpreted else vars(prepared.launch).values():
        detours += [part.detour for part in (part if isinstance(part, list) else [part]) if isinstance(part, Bound)]
    detours[:] = sorted(set(filter(None, detours)))
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
