"""Which implementation of an operation is the fastest at a shape: looked up, or measured once and kept on disk.

A kernel that loses is not used. The fastest implementation is taken from the first of these that knows it:

1. what was measured on this machine at this shape: a file in the user's cache folder, one file for each combination of
   device, torch, triton and kernel sources;
2. the table that the package ships for the device, at this shape;
3. the closest neighbouring shape in either (`Key.distance`); at equal distance what was measured on this machine;
4. a measurement, whose result is kept in that file.

What was measured elsewhere (2 and 3) is compared with plain torch before it is taken.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import math
import os
import re
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import ppcl_kernels
from ppcl_rt.files import replacing
from ppcl_rt.ops.agreement import agree
from ppcl_rt.ops.implementation import TORCH, Implementation, Key
from ppcl_rt.ops.timing import cuda_milliseconds

# Tables of the devices that have been measured.
SHIPPED = Path(__file__).parent / "tables"
_log = logging.getLogger(__name__)

# Runs a call with one implementation of its operation.
Run = Callable[[Implementation], Any]
# Lists the implementations of an operation. It is a function, because a table that knows the answer needs no list.
Listing = Callable[[], Iterable[Implementation]]
# What a file holds of one key: the name of the fastest implementation, and milliseconds by name.
Entry = dict[str, Any]

_choices_made = 0
# Held while an implementation is chosen: of two threads at one shape one measures, with the device to itself.
_CHOOSING = threading.RLock()


def choices_made() -> int:
    """Count the implementations that this process has chosen so far.

    A forward during which the count does not rise has run only implementations that were chosen before.
    """
    return _choices_made


@dataclass
class ImplementationTable:
    """The fastest implementation of each operation and shape.

    Args:
        path: the file that measurements are kept in. A write merges what other processes have written meanwhile, and
            replaces the file as a whole.
        about: the device and the versions that the measurements hold for; written into the file.
        clock: measures the milliseconds that a call takes.
        shipped: the file that the package ships for this device, or None. It may be missing.
    """

    path: Path
    about: dict[str, str]
    clock: Callable[[Callable[[], Any]], float]
    shipped: Path | None = None
    _chosen: dict[Key, Implementation] = field(default_factory=dict, repr=False)

    def fastest(self, key: Key, implementations: Listing, run: Run, run_checked: Run | None = None) -> Implementation:
        """Look up which implementation is the fastest, or measure all of them.

        An implementation that raises, or whose result differs from that of plain torch, is left out; the log says so.

        Args:
            key: what the time depends on.
            implementations: lists what could run.
            run: runs the call with one implementation; this is timed.
            run_checked: runs what is compared with plain torch (`Operation.checked`); None for ``run``.

        Raises:
            RuntimeError: every implementation failed, or memory ran out (`ran_out_of_memory`). Nothing is kept then.
        """
        if key not in self._chosen:
            with _CHOOSING:
                if key not in self._chosen:
                    self._chosen[key] = self._choose(key, implementations, run, run_checked or run)
        return self._chosen[key]

    def _choose(self, key: Key, implementations: Listing, run: Run, run_checked: Run) -> Implementation:
        global _choices_made
        _choices_made += 1
        available = {str(each): each for each in implementations()}
        chosen = _fastest_at(key, available, self._read(self.path))
        if chosen is None:
            chosen = self.look_up(key, available.values)
            if chosen is not None and not self._agrees_with_torch(key, chosen, available, run_checked):
                chosen = None
        if chosen is None:
            times = self.measure(key, available.values(), run, run_checked)
            if not times:
                raise RuntimeError(f"no implementation of {key} works here: the log says why each of them failed")
            chosen = available[min(times, key=times.__getitem__)]
        return chosen

    def look_up(self, key: Key, implementations: Listing) -> Implementation | None:
        """Look up the fastest implementation without running any; None if no table knows the shape or a neighbour."""
        if key in self._chosen:
            return self._chosen[key]
        available = {str(each): each for each in implementations()}
        tables = [self._read(self.path), self._read(self.shipped)]
        for table in tables:
            if (found := _fastest_at(key, available, table)) is not None:
                return found
        return _fastest_near(key, available, tables)

    def measure(
        self, key: Key, implementations: Iterable[Implementation], run: Run, run_checked: Run | None = None
    ) -> dict[str, float]:
        """Time the implementations that agree with plain torch, and keep the times; arguments are as in `fastest`.

        Returns:
            Milliseconds by the name of the implementation.
        """
        times = dict(self._times(key, {str(each): each for each in implementations}, run, run_checked or run))
        if times:
            self.keep(key, min(times, key=times.__getitem__), times)
        return times

    def keep(self, key: Key, fastest: str, times: Mapping[str, float]) -> None:
        """Write the name of the fastest implementation, and the milliseconds of each by name."""
        self._write(key, {"fastest": fastest, "milliseconds": {name: round(ms, 4) for name, ms in times.items()}})

    def _agrees_with_torch(
        self, key: Key, chosen: Implementation, available: Mapping[str, Implementation], run_checked: Run
    ) -> bool:
        """Compare, on this machine, an implementation that was measured elsewhere with plain torch."""
        if chosen == TORCH or TORCH not in available.values():
            return True
        try:
            if agree(run_checked(chosen), run_checked(TORCH)):
                return True
            reason: object = "its result is not that of plain torch"
        except Exception as error:
            if ran_out_of_memory(error):
                raise
            reason = error
        _log.warning("%s: %s, measured elsewhere, failed and is left out: %s", key, chosen, reason)
        return False

    def _times(
        self, key: Key, available: Mapping[str, Implementation], run: Run, run_checked: Run
    ) -> Iterator[tuple[str, float]]:
        wanted = run_checked(TORCH) if TORCH in available.values() else None

        def check(implementation: Implementation) -> None:
            if implementation != TORCH and wanted is not None and not agree(run_checked(implementation), wanted):
                raise RuntimeError("its result is not that of plain torch")

        for name, implementation in available.items():
            try:
                check(implementation)
                milliseconds = self.clock(functools.partial(run, implementation))
                # Checked again, because a race may show only when the device is busy.
                check(implementation)
            except Exception as error:
                if ran_out_of_memory(error):
                    # No verdict: timing takes a filler of 256 MB, a comparison takes float32 copies of results.
                    raise
                # Compilers and drivers raise exceptions of many types. The other implementations can still run.
                _log.warning("%s: %s failed and is left out: %s", key, name, error)
                continue
            _log.info("%s: %s takes %.3f ms", key, name, milliseconds)
            yield name, milliseconds

    @staticmethod
    def _read(path: Path | None) -> dict[Key, Entry]:
        """Read the entries of a file; none if the file is missing or damaged, so that all is measured again."""
        try:
            entries = json.loads(path.read_text())["implementations"] if path is not None else {}
            return {Key.parse(key): entry for key, entry in entries.items() if isinstance(entry["fastest"], str)}
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return {}

    def _write(self, key: Key, entry: Entry) -> None:
        entries = {**self._read(self.path), key: entry}
        content = {"about": self.about, "implementations": {str(k): v for k, v in entries.items()}}
        try:
            with replacing(self.path, many_writers=True) as temporary:
                temporary.write_text(json.dumps(content, indent=1))
        except ValueError as error:
            _log.warning("cannot keep measurements, they are measured again next time: %s", error)


def ran_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that the memory of the device is full: torch's own, or the driver's in its text."""
    return isinstance(error, torch.OutOfMemoryError) or "out of memory" in str(error)


def _fastest_at(key: Key, available: Mapping[str, Implementation], table: Mapping[Key, Entry]) -> Implementation | None:
    """Return the fastest implementation at a key; None if the table has no such key, or what it names cannot run."""
    return available.get(table[key]["fastest"]) if key in table else None


def _fastest_near(
    key: Key, available: Mapping[str, Implementation], tables: Sequence[Mapping[Key, Entry]]
) -> Implementation | None:
    """Return the fastest implementation of the closest neighbour for which it can run here; None if there is none.

    Neighbours of all tables are compared; of two at the same distance, that of the earlier table is taken.
    """
    neighbours = ((key.distance(other), place, other) for place, table in enumerate(tables) for other in table)
    for distance, place, neighbour in sorted(neighbours):
        found = available.get(tables[place][neighbour]["fastest"])
        if distance < math.inf and found is not None:
            return found
    return None


def cache_folder() -> Path:
    """Give the user's cache folder: ``PPCL_CACHE``, else ``ppcl_rt`` in ``XDG_CACHE_HOME`` or in ``~/.cache``."""
    if asked := os.environ.get("PPCL_CACHE"):
        return Path(asked)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ppcl_rt"


def source_digest() -> str:
    """Hash the sources of the kernels: after a change of any kernel, all implementations are measured again."""
    digest = hashlib.sha256()
    for path in sorted(Path(ppcl_kernels.__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def shipped_table(device: str) -> Path:
    """Give the file of a device in the package: ``NVIDIA H200`` -> ``tables/nvidia-h200.json``."""
    return SHIPPED / f"{re.sub(r'[^a-z0-9]+', '-', device.lower()).strip('-')}.json"


@functools.cache
def table_of(device_index: int) -> ImplementationTable:
    """Give the table of a CUDA device, one a process."""
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
    return ImplementationTable(
        cache_folder() / f"implementations-{name}.json", about, clock, shipped_table(about["device"])
    )
