"""Which way to run an operation: plain torch, our kernels at some tile, or cuBLAS and a small kernel.

A fused kernel that loses is not used: on a GPU every way of an operation is timed once per shape and device, and the
winner remembered in the user's cache folder, in a file of its own for every device, torch, triton and kernel source.
``PPCL_BACKEND`` forces one (``torch`` or ``triton``; ``auto`` measures). Without a GPU, ``auto`` is plain torch.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import math
import os
import statistics
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch.utils._pytree import tree_leaves

import ppcl_kernels

BACKENDS = ("auto", "torch", "triton")
_REPEATS = 10
_choices = 0
_T = TypeVar("_T")
_log = logging.getLogger(__name__)


class Way(NamedTuple):
    """One way to run an operation: ``torch``, ``triton`` or ``cublas``; a kernel's tile as plain numbers, or None."""

    kind: str
    tile: tuple[int, ...] | None = None

    def __str__(self) -> str:
        return self.kind if self.tile is None else f"{self.kind} {'x'.join(map(str, self.tile))}"


TORCH, TRITON, CUBLAS = Way("torch"), Way("triton"), Way("cublas")


def backend() -> str:
    """Read ``PPCL_BACKEND``.

    Raises:
        ValueError: it is none of `BACKENDS`.
    """
    asked = os.environ.get("PPCL_BACKEND", "auto")
    if asked not in BACKENDS:
        raise ValueError(f'PPCL_BACKEND is "{asked}", wanted one of {", ".join(BACKENDS)}')
    return asked


def choices() -> int:
    """Count the keys that this process chose a way for; a forward over which it rose met one for the first time."""
    return _choices


def bucket(tokens: int) -> int:
    """Round a token count up to a quarter of its power of two: prompts of nearly one length share a measurement."""
    if tokens <= 64:
        return 64
    step = 1 << max(math.ceil(math.log2(tokens)) - 3, 0)
    return -(-tokens // step) * step


@dataclass
class Table:
    """The fastest way of each operation and shape, measured when first asked for.

    Args:
        path: where it is kept; written beside and renamed, merged with what another process wrote meanwhile.
        about: what the figures hold for; written along.
        clock: gives the milliseconds that a call takes.
    """

    path: Path
    about: dict[str, str]
    clock: Callable[[Callable[[], Any]], float]
    _chosen: dict[str, Way] = field(default_factory=dict, repr=False)

    def fastest(self, key: str, ways: Callable[[], Iterable[Way]], call: Callable[[Way], Any]) -> Way:
        """Look up, or measure, which of ``ways`` runs ``call`` fastest.

        A way that fails, or whose result is not that of plain torch, is left out, and the log says so.

        Raises:
            RuntimeError: every way failed.
        """
        if (way := self.recall(key, ways)) is not None:
            return way
        by_name = {str(way): way for way in ways()}
        times = dict(self._measure(key, by_name, call))
        if not times:
            raise RuntimeError(f"no way to run {key} works here; the log says what each failed of")
        name = min(times, key=times.__getitem__)
        self._write(key, {"way": name, "milliseconds": {k: round(v, 4) for k, v in times.items()}})
        return self._choose(key, by_name[name])

    def recall(self, key: str, ways: Callable[[], Iterable[Way]]) -> Way | None:
        """Look up without measuring; None where nothing is known."""
        if key not in self._chosen:
            name = self._read().get(key, {}).get("way")
            for way in ways():
                if str(way) == name:
                    self._choose(key, way)
        return self._chosen.get(key)

    def _choose(self, key: str, way: Way) -> Way:
        global _choices
        _choices += key not in self._chosen
        self._chosen[key] = way
        return way

    def _measure(self, key: str, ways: dict[str, Way], call: Callable[[Way], Any]) -> Iterable[tuple[str, float]]:
        wanted = call(TORCH) if TORCH in ways.values() else None
        for name, way in ways.items():
            try:
                if way != TORCH and wanted is not None and not agree(call(way), wanted):
                    raise RuntimeError("its result is not that of plain torch")
                milliseconds = self.clock(functools.partial(call, way))
            except Exception as error:
                # A compiler's or a driver's, of any kind: the other ways can still run.
                _log.warning("%s: %s failed and is left out: %s", key, name, error)
                continue
            _log.info("%s: %s takes %.3f ms", key, name, milliseconds)
            yield name, milliseconds

    def _read(self) -> dict[str, Any]:
        try:
            ways = json.loads(self.path.read_text())["ways"]
            return {k: v for k, v in ways.items() if isinstance(v["way"], str)}
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            # Not there, or damaged: measured again.
            return {}

    def _write(self, key: str, entry: dict[str, Any]) -> None:
        beside = self.path.with_name(f".{self.path.name}.{os.getpid()}")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            beside.write_text(json.dumps({"about": self.about, "ways": {**self._read(), key: entry}}, indent=1))
            beside.replace(self.path)
        except OSError as error:
            _log.warning("cannot keep what was measured in %s (%s): it is measured again next time", self.path, error)


def agree(got: Any, wanted: Any) -> bool:
    """Whether all tensors of two results are the same but for roundings.

    The RMS of the difference stays under 5 % of that of the values: some ten times what a few roundings of bf16 make,
    and a tenth of what a tile in the wrong place does.
    """
    tensors = (
        [t.float() for t in tree_leaves(result) if isinstance(t, torch.Tensor) and t.numel()]
        for result in (got, wanted)
    )
    return all(bool((a - b).square().mean() <= 0.05**2 * b.square().mean()) for a, b in zip(*tensors, strict=True))


def cache_folder() -> Path:
    """The user's cache folder: ``PPCL_CACHE``, else ``ppcl_rt`` under ``XDG_CACHE_HOME`` or ``~/.cache``."""
    if asked := os.environ.get("PPCL_CACHE"):
        return Path(asked)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ppcl_rt"


def source_digest() -> str:
    """Digest of the kernels' source: whoever changes a tile measures anew."""
    digest = hashlib.sha256()
    for path in sorted(Path(ppcl_kernels.__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


@functools.cache
def table_of(device_index: int) -> Table:
    """The table of a CUDA device."""
    import triton

    about = {
        "device": torch.cuda.get_device_name(device_index),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "kernels": source_digest(),
    }
    name = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:16]
    return Table(cache_folder() / f"ways-{name}.json", about, cuda_milliseconds)


def cuda_milliseconds(call: Callable[[], Any]) -> float:
    """Median time of a call on the current CUDA stream, after one that compiles and one that warms up."""
    for _ in range(2):
        call()
    # Larger than any L2: what is timed reads its inputs from memory, as it does in a model.
    filler = torch.empty(2**28, dtype=torch.uint8, device="cuda")
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(_REPEATS)]
    for start, end in events:
        filler.zero_()
        # Half a millisecond on the device, in which python gets ahead: the kernel is timed, not its launch.
        torch.cuda._sleep(1_000_000)
        start.record()
        call()
        end.record()
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in events)


def run(
    operation: str,
    like: torch.Tensor,
    *,
    able: Callable[[], bool],
    shape: Callable[[], tuple[Hashable, ...]],
    others: tuple[Way, ...],
    tiles: Callable[[], Iterable[tuple[int, ...]]],
    call: Callable[[Way], _T],
) -> _T:
    """Run an operation in its fastest way, or in the one that ``PPCL_BACKEND`` asks for.

    Args:
        operation: its name.
        like: a tensor of the device and dtype.
        able: says whether anything but plain torch can run it here.
        shape: gives what the time depends on beside device and dtype; token counts through `bucket`.
        others: the ways beside ``triton``, `TORCH` among them.
        tiles: gives the tiles at which ``triton`` is measured.
        call: runs it one way.

    Raises:
        ValueError: ``PPCL_BACKEND`` is none of `BACKENDS`, or ``triton`` where no kernel can run.
    """
    asked = backend()
    on_gpu = like.device.type == "cuda"
    if asked == "triton" and not (on_gpu or ppcl_kernels.can_run(like)):
        raise ValueError(
            f"PPCL_BACKEND is triton, but the model is on {like.device}: move it to a GPU, or set PPCL_BACKEND=auto "
            "(TRITON_INTERPRET=1 runs kernels on a CPU, slowly)"
        )
    if asked == "torch" or (asked == "auto" and not on_gpu) or not able():
        return call(TORCH)
    # Nothing can be timed while tracing; the kernels' own choosers know a good tile.
    if asked == "triton" or torch.compiler.is_compiling():
        return call(TRITON)
    key = " ".join(map(str, (operation, str(like.dtype).removeprefix("torch."), *shape())))
    table = table_of(like.device.index or 0)

    def ways() -> list[Way]:
        return [*others, *(Way("triton", tuple(tile)) for tile in tiles())]

    if torch.cuda.is_current_stream_capturing():
        return call(table.recall(key, ways) or TRITON)
    return call(table.fastest(key, ways, call))
