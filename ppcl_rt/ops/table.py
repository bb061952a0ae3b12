"""Which implementation runs an operation: plain torch, our kernels at some tile, cuBLAS and a small kernel, cuDNN.

A fused kernel that loses is not used. The fastest implementation of an operation at a shape is looked up: in what was
measured on this machine before (the user's cache folder, one file for every device, torch, triton and kernel source),
in the table that the package ships for the device, and among the neighbours of the shape in either. Only what has no
neighbour is timed. ``PPCL_BACKEND`` forces one (``torch`` or ``triton``; ``auto`` chooses). Without a GPU, ``auto`` is
plain torch.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import math
import os
import re
import statistics
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch.utils._pytree import tree_leaves

import ppcl_kernels

BACKENDS = ("auto", "torch", "triton")
# Tables of devices that we measured on.
SHIPPED = Path(__file__).parent / "tables"
_REPEATS = 10
# Sizes may differ by this factor for one shape to stand in for another: half a wave to two.
_NEAR = 2.0
_log = logging.getLogger(__name__)


class Way(NamedTuple):
    """One implementation of an operation: its kind, and a kernel's tile as plain numbers, or None.

    Kinds: ``torch`` (plain), ``triton`` (our kernel), ``cublas`` (torch's product and a small kernel of ours),
    ``cublaslt`` (a product with the GELU in its epilogue), ``packed`` (q, k and v in one batched product, and a small
    kernel), ``cudnn`` and ``flash`` (torch's attention by name).
    """

    kind: str
    tile: tuple[int, ...] | None = None

    def __str__(self) -> str:
        return self.kind if self.tile is None else f"{self.kind} {'x'.join(map(str, self.tile))}"


TORCH, TRITON = Way("torch"), Way("triton")
CUBLAS, CUBLASLT, PACKED = Way("cublas"), Way("cublaslt"), Way("packed")
CUDNN, FLASH = Way("cudnn"), Way("flash")


class Key(NamedTuple):
    """What the time of an operation depends on, beside the device.

    Attributes:
        form: what has to be the same: operation, dtype, what follows a product, whether there is a bias or a mask.
        sizes: what a neighbour may differ in: batch, tokens, widths.
    """

    form: str
    sizes: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.form} {'x'.join(map(str, self.sizes))}"

    @classmethod
    def parse(cls, text: str) -> Key:
        """Read what `str` wrote.

        Raises:
            ValueError: it did not.
        """
        form, _, sizes = text.rpartition(" ")
        return cls(form, tuple(map(int, sizes.split("x"))))

    def distance(self, other: Key) -> float:
        """Sum over sizes of the logarithm of their ratio; infinite where forms differ or a size is too far off."""
        if self.form != other.form or len(self.sizes) != len(other.sizes):
            return math.inf
        ratios = [abs(math.log((a + 1) / (b + 1))) for a, b in zip(self.sizes, other.sizes)]
        return math.inf if max(ratios, default=0.0) > math.log(_NEAR) else sum(ratios)


def backend() -> str:
    """Read ``PPCL_BACKEND``.

    Raises:
        ValueError: it is none of `BACKENDS`.
    """
    asked = os.environ.get("PPCL_BACKEND", "auto")
    if asked not in BACKENDS:
        raise ValueError(f'PPCL_BACKEND is "{asked}", wanted one of {", ".join(BACKENDS)}')
    return asked


_choices = 0


def choices() -> int:
    """Count the choices made in this process: a forward during which it did not rise ran known implementations."""
    return _choices


@dataclass
class Table:
    """The fastest implementation of each operation and shape.

    Args:
        path: where it is kept; written beside and renamed, merged with what another process wrote meanwhile.
        about: what the figures hold for; written along.
        clock: gives the milliseconds that a call takes.
        shipped: a table of the package for this device, or None.
    """

    path: Path
    about: dict[str, str]
    clock: Callable[[Callable[[], Any]], float]
    shipped: Path | None = None
    _chosen: dict[Key, Way] = field(default_factory=dict, repr=False)

    def fastest(self, key: Key, ways: Callable[[], Iterable[Way]], call: Callable[[Way], Any]) -> Way:
        """Look up, or measure, which of ``ways`` runs ``call`` fastest.

        What was measured elsewhere (a neighbour, the shipped table) is checked against plain torch before it is taken;
        what was not measured near here is timed. An implementation that fails, or whose result is not that of plain
        torch, is left out, and the log says so.

        Raises:
            RuntimeError: every implementation failed.
        """
        global _choices
        if key in self._chosen:
            return self._chosen[key]
        _choices += 1
        by_name = {str(way): way for way in ways()}
        way = self._known(key, by_name, self._read(self.path), near=False)
        if way is None:
            way = self.recall(key, by_name.values)
            if way is not None and not self._holds(key, way, by_name, call):
                way = None
        if way is None:
            times = self.measure(key, by_name.values(), call)
            if not times:
                raise RuntimeError(f"no implementation of {key} works here; the log says what each failed of")
            way = by_name[min(times, key=times.__getitem__)]
        self._chosen[key] = way
        return way

    def recall(self, key: Key, ways: Callable[[], Iterable[Way]]) -> Way | None:
        """Look up without running anything; None where nothing is known of the shape and its neighbours."""
        if key in self._chosen:
            return self._chosen[key]
        by_name = {str(way): way for way in ways()}
        tables = [self._read(self.path), self._read(self.shipped)]
        for near in (False, True):
            for table in tables:
                if (way := self._known(key, by_name, table, near)) is not None:
                    return way
        return None

    def measure(self, key: Key, ways: Iterable[Way], call: Callable[[Way], Any]) -> dict[str, float]:
        """Time every implementation that gives what plain torch gives, keep the figures; milliseconds by name."""
        by_name = {str(way): way for way in ways}
        times = dict(self._timed(key, by_name, call))
        if times:
            self.keep(key, min(times, key=times.__getitem__), times)
        return times

    def keep(self, key: Key, winner: str, times: Mapping[str, float]) -> None:
        """Write which implementation is the fastest, and the milliseconds of each by name."""
        self._write(key, {"way": winner, "milliseconds": {k: round(v, 4) for k, v in times.items()}})

    def _known(
        self, key: Key, ways: Mapping[str, Way], table: Mapping[Key, Mapping[str, Any]], near: bool
    ) -> Way | None:
        """Return the winner at a key, or (``near``) at the closest key of its form; None where it cannot run here."""
        candidates = sorted((key.distance(other), other) for other in table) if near else [(0.0, key)]
        for distance, other in candidates:
            way = ways.get(table.get(other, {}).get("way", ""))
            if distance < math.inf and way is not None:
                return way
        return None

    def _holds(self, key: Key, way: Way, ways: Mapping[str, Way], call: Callable[[Way], Any]) -> bool:
        """Whether an implementation that was measured elsewhere gives here what plain torch gives."""
        if way == TORCH or TORCH not in ways.values():
            return True
        try:
            if agree(call(way), call(TORCH)):
                return True
            reason: object = "its result is not that of plain torch"
        except Exception as error:
            reason = error
        _log.warning("%s: %s, known from elsewhere, failed and is left out: %s", key, way, reason)
        return False

    def _timed(self, key: Key, ways: Mapping[str, Way], call: Callable[[Way], Any]) -> Iterable[tuple[str, float]]:
        wanted = call(TORCH) if TORCH in ways.values() else None

        def check(way: Way) -> None:
            if way != TORCH and wanted is not None and not agree(call(way), wanted):
                raise RuntimeError("its result is not that of plain torch")

        for name, way in ways.items():
            try:
                check(way)
                milliseconds = self.clock(functools.partial(call, way))
                # Once more: a race may show only when the device is busy.
                check(way)
            except Exception as error:
                # A compiler's or a driver's, of any kind: the others can still run.
                _log.warning("%s: %s failed and is left out: %s", key, name, error)
                continue
            _log.info("%s: %s takes %.3f ms", key, name, milliseconds)
            yield name, milliseconds

    @staticmethod
    def _read(path: Path | None) -> dict[Key, dict[str, Any]]:
        try:
            ways = json.loads(path.read_text())["ways"] if path is not None else {}
            return {Key.parse(k): v for k, v in ways.items() if isinstance(v["way"], str)}
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            # Not there, or damaged: measured again.
            return {}

    def _write(self, key: Key, entry: dict[str, Any]) -> None:
        beside = self.path.with_name(f".{self.path.name}.{os.getpid()}")
        entries = {**self._read(self.path), key: entry}
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            written = {"about": self.about, "ways": {str(k): v for k, v in entries.items()}}
            beside.write_text(json.dumps(written, indent=1))
            beside.replace(self.path)
        except OSError as error:
            _log.warning("cannot keep what was measured in %s (%s): it is measured again next time", self.path, error)


# Side of the tiles that `agree` judges one by one: no kernel writes a smaller one.
TILE = 64
# Of a tile's RMS: ten times what a few roundings of bf16 make, and a tenth of what a wrong tile is off by.
TOLERANCE = 0.05


def agree(got: Any, wanted: Any) -> bool:
    """Whether all tensors of two results are the same but for roundings, in every tile of `TILE` x `TILE`.

    The RMS of a tile's difference stays under `TOLERANCE` of the RMS of its values (of a quarter of the median tile's,
    where a tile's own values all but cancel out).
    """
    tensors = ([t for t in tree_leaves(result) if isinstance(t, torch.Tensor)] for result in (got, wanted))
    return all(_tiles_agree(a, b) for a, b in zip(*tensors, strict=True) if b.numel())


def _tiles_agree(got: torch.Tensor, wanted: torch.Tensor) -> bool:
    if got.shape != wanted.shape:
        return False
    off = _tile_means((got.float() - wanted.float()).square())
    size = _tile_means(wanted.float().square())
    # Comparisons with NaN are false: a result that holds one never agrees.
    return bool((off <= TOLERANCE**2 * torch.maximum(size, size.median() / 16)).all())


def _tile_means(x: torch.Tensor) -> torch.Tensor:
    """Means over tiles of tokens and features: ``[B, S, D]``, ``[B, S, H, E]`` (H E features) or ``[S, D]``."""
    x = x.reshape(1, *x.shape) if x.dim() < 3 else x
    rows = x.shape[1] if x.dim() > 2 else 1
    return F.avg_pool2d(
        x.reshape(x.shape[0], 1, rows, -1), (min(TILE, rows), TILE), TILE, ceil_mode=True, count_include_pad=False
    )


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


def shipped_table(device: str) -> Path:
    """Where the package keeps the table of a device: ``NVIDIA H200`` -> ``tables/nvidia-h200.json``."""
    return SHIPPED / f"{re.sub(r'[^a-z0-9]+', '-', device.lower()).strip('-')}.json"


@functools.cache
def table_of(device_index: int) -> Table:
    """The table of a CUDA device."""
    import triton

    about = {
        "device": torch.cuda.get_device_name(device_index),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cudnn": str(torch.backends.cudnn.version()),
        "kernels": source_digest(),
    }
    name = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:16]
    clock = functools.partial(cuda_milliseconds, device=torch.device("cuda", device_index))
    return Table(cache_folder() / f"ways-{name}.json", about, clock, shipped_table(about["device"]))


def cuda_milliseconds(call: Callable[[], Any], device: torch.device) -> float:
    """Median time of a call on a device's current stream, after one that compiles and one that warms up."""
    with torch.cuda.device(device):
        for _ in range(2):
            call()
        # Larger than any L2, and read, not written: what is timed finds its inputs in memory, as in a model, and writes
        # back no line but its own.
        filler = torch.ones(2**26, dtype=torch.int32, device=device)
        events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(_REPEATS)]
        for start, end in events:
            filler.max()
            # Half a millisecond on the device, in which python gets ahead: the kernel is timed, not its launch.
            torch.cuda._sleep(1_000_000)
            start.record()
            call()
            end.record()
        torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in events)
