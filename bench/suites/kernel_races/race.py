"""The races: every case in turn, its contestants checked, timed, and checked again."""

from __future__ import annotations

import functools
import json
import os
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from kernel_races import LOST
from kernel_races.cases import Block, Case, work_of
from kernel_races.presets import Preset, Setting, settings
from kernel_races.rivals import UNCHECKED, Contestant, rivals
from kernel_races.timing import RaceClock, kernel_names
from ppcl_kernels.tools.machine import machine, write_json
from ppcl_rt.ops.agreement import agree
from ppcl_rt.ops.implementation import TORCH
from ppcl_rt.ops.table import ImplementationTable, table_of

Call = Callable[[], Any]
Row = dict[str, Any]

# What runs while the result is made that all others are compared with.
_PLAIN = "plain torch before the race"


class Races:
    """All cases, one after the other; continues where an earlier process ended."""

    def __init__(self, preset: Preset, out: Path, deadline: float, stall: int) -> None:
        self.preset, self.out, self.deadline, self.stall = preset, out, deadline, stall
        self.content = json.loads((out / "choose.json").read_text())
        self.content |= {name: value for name, value in machine().items() if name != "date"}
        self.rows: list[Row] = self.content["results"]
        self.done = {row["key"] for row in self.rows}
        self.clock = RaceClock(preset)
        about = {"device": self.content["device"], "torch": torch.__version__}
        self.tables = [ImplementationTable(out / "implementations.json", about, lambda call: 0.0)]
        if self.clock.cuda:
            # The table that part 3 reads.
            known = table_of(torch.cuda.current_device())
            self.tables = [ImplementationTable(out / "implementations.json", known.about, known.clock), known]

    def run(self) -> bool:
        """Race; returns whether every case was reached."""
        self.alive("ceilings")
        if "ceilings" not in self.content:
            self.content["ceilings"] = self.clock.ceilings()
            print("ceilings: product {tflops:.0f} TFLOP/s, copy {gbs:.0f} GB/s".format(**self.content["ceilings"]))
        block = Block(self.preset)
        for setting in settings(self.preset):
            if (running := f"the block at {setting}") in self.content["left_out"]:
                # It ended an earlier process.
                continue
            self.alive(running)
            for case in block.cases(setting):
                key = str(case.operation.key(case.call))
                if key in self.done or f"{key}: {_PLAIN}" in self.content["left_out"]:
                    continue
                if time.monotonic() > self.deadline:
                    return False
                self.done.add(key)
                rows = _Race(self, case, key, setting).run()
                self.rows += rows
                write_json(self.out / "choose.json", self.content)
                print(_line(rows), flush=True)
        self.alive("")
        return True

    def alive(self, running: str) -> None:
        """Note what runs from now on, so that it can be named if this process dies, and restart the alarm.

        The alarm ends the process when one contestant takes longer than ``stall`` seconds.
        """
        (self.out / ".choose.running").write_text(running)
        signal.alarm(self.stall if running else 0)


class _Race:
    """One case.

    Attributes:
        checked: the call whose results are compared (`Operation.checked`); ``wanted`` is its result in plain torch.
        listed: implementations that the runtime chooses from: name -> contestant.
        contestants: those that have not failed, by name.
        rows: what is known of each contestant.
    """

    def __init__(self, races: Races, case: Case, key: str, setting: Setting) -> None:
        self.races, self.case, self.key, self.setting = races, case, key, setting
        self.preset, self.clock = races.preset, races.clock
        operation, call = case.operation, case.call
        races.alive(f"{key}: {_PLAIN}")
        self.checked = operation.checked(call)
        self.wanted = operation.run(self.checked, TORCH)
        self.flops, self.bytes = work_of(case, tree_leaves(self.wanted))
        self.listed: dict[str, Contestant] = {
            str(each): functools.partial(operation.run, implementation=each) for each in operation.implementations(call)
        }
        self.rows: dict[str, Row] = {}
        self.contestants: dict[str, Contestant] = {}

    def run(self) -> list[Row]:
        """Race; returns the rows."""
        self._start()
        self._time()
        self._choose([name for name in self.listed if name in self.contestants])
        self._rate()
        if (
            self.clock.cuda
            and self.case.operation.name == "joint_attention"
            and self.setting == settings(self.preset)[0]
        ):
            for name in list(self.contestants):
                self._profile(name)
        return list(self.rows.values())

    def _start(self) -> None:
        """Make each contestant, and check its first result."""
        content, setting = self.races.content, self.setting
        about: Row = {"op": self.case.op, "key": self.key, **setting._asdict(), "dtype": str(self.preset.dtype)}
        about |= {"flops": self.flops, "bytes": self.bytes, "device": content["device"]}
        makers: dict[str, Callable[[], Contestant]] = {
            name: functools.partial(_as_it_is, contestant) for name, contestant in self.listed.items()
        }
        for name, make in (makers | rivals(self.case, setting, self.preset)).items():
            implementation = name in self.listed
            self.rows[name] = {
                **about,
                "contestant": name,
                "implementation": implementation,
                "ms": None,
                "taken": False,
            }
            if why := content["left_out"].get(f"{self.key}: {name}"):
                self.rows[name]["failed"] = why
                continue
            self.races.alive(f"{self.key}: {name}")
            if (made := self._guarded(name, make)) is not None:
                self.contestants[name] = made
                self._guarded(name, functools.partial(self._check, name))

    def _check(self, name: str) -> None:
        self.races.alive(f"{self.key}: {name}")
        got = self.contestants[name](self.checked)
        if name not in UNCHECKED and not agree(got, self.wanted):
            raise RuntimeError("its result is not that of plain torch")
        self.clock.wait()

    def _guarded(self, name: str, what: Callable[[], Any]) -> Any:
        """Call ``what`` for a contestant; an exception becomes the contestant's result."""
        try:
            return what()
        except Exception as error:
            self.rows[name]["failed"] = _in_words(error)
            self.contestants.pop(name, None)
        self._end_if_lost()

    def _end_if_lost(self) -> None:
        """Wait for the device, and end the process if nothing can run there any more."""
        try:
            self.clock.wait()
        except Exception:
            # A fault of a CUDA device is sticky: nothing can run in this process any more.
            os._exit(LOST)

    def _call(self, name: str) -> Call:
        """Return the call of a contestant that is timed."""
        return functools.partial(self.contestants[name], self.case.call)

    def _timed(self, names: Sequence[str], rounds: int) -> dict[str, float]:
        """Time contestants in turn; if one raises there, one after the other, so that only that one fails."""
        self.races.alive(f"{self.key}: {', '.join(names)}")
        try:
            return self.clock.paired_ms({name: self._call(name) for name in names}, rounds)
        except Exception as error:
            print(f"{self.key}: timed one by one: {_in_words(error)}", flush=True)
        self._end_if_lost()
        times: dict[str, float] = {}
        for name in names:
            self.races.alive(f"{self.key}: {name}")
            alone = {name: self._call(name)}
            times |= self._guarded(name, functools.partial(self.clock.paired_ms, alone, rounds)) or {}
        return times

    def _time(self) -> None:
        """Time all contestants for a few rounds, then the best of each kind for many, and check them again."""
        self._timed(list(self.contestants), 1)
        screened = self._timed(list(self.contestants), self.preset.screening)
        final: dict[str, float] = {}
        while True:
            best: dict[str, str] = {}
            for name in sorted(self.contestants, key=screened.__getitem__):
                best.setdefault(name.split()[0] if name in self.listed else name, name)
            if set(best.values()) <= set(final):
                break
            final = self._timed(list(best.values()), self.preset.rounds)
            # A data race may show only on a busy device, so all are checked again. When one fails, the next of its
            # kind is timed in its place.
            for name in list(self.contestants):
                self._guarded(name, functools.partial(self._check, name))
        for name in self.contestants:
            self.rows[name]["ms"] = round(final.get(name, screened[name]), 5)
            self.rows[name]["rounds"] = self.preset.rounds if name in final else self.preset.screening

    def _choose(self, names: Sequence[str]) -> None:
        """Mark the fastest implementation, and keep it in the tables."""
        times = {name: self.rows[name]["ms"] for name in names}
        if finals := [name for name in names if self.rows[name]["rounds"] == self.preset.rounds]:
            winner = min(finals, key=times.__getitem__)
            self.rows[winner]["taken"] = True
            for table in self.races.tables:
                table.keep(self.case.operation.key(self.case.call), winner, times)

    def _rate(self) -> None:
        """Add TFLOP/s or GB/s, their share of the ceiling, and the speed relative to plain torch."""
        work, unit, scale = (self.flops, "tflops", 1e9) if self.flops else (self.bytes, "gbs", 1e6)
        plain = self.rows.get(str(TORCH), {}).get("ms")
        for row in self.rows.values():
            if row["ms"]:
                rate = work / row["ms"] / scale
                row |= {"rate": round(rate, 2), "unit": {"tflops": "TFLOP/s", "gbs": "GB/s"}[unit]}
                row["of_ceiling"] = round(rate / self.races.content["ceilings"][unit], 4)
                row["to_torch"] = round(plain / row["ms"], 4) if plain else None

    def _profile(self, name: str) -> None:
        """Add the names of the kernels that a contestant launches, or why they are not known: its times stand."""
        running = f"{self.key}: profile of {name}"
        why = self.races.content["left_out"].get(running)
        if why is None:
            self.races.alive(running)
            try:
                self.rows[name]["kernels"] = kernel_names(self._call(name))
                return
            except Exception as error:
                why = _in_words(error)
            self._end_if_lost()
        self.rows[name]["kernels"] = [f"not profiled: {why}"]


def _in_words(error: Exception) -> str:
    """Name an exception in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:200]


def _as_it_is(contestant: Contestant) -> Contestant:
    """Return a contestant that needs no making."""
    return contestant


def _line(rows: Sequence[Row]) -> str:
    """Write a case in one line."""
    told = []
    for row in rows:
        mark = "*" if row["taken"] else ""
        told.append(f"{row['contestant']}{mark} {row['ms']:.4g}" if row["ms"] else f"{row['contestant']} failed")
    return f"{rows[0]['op']} {rows[0]['key'].split()[-1]}, ms: {', '.join(told)}"
