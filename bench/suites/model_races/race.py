"""One group of contestants: built, checked, timed in turn, and checked again."""

from __future__ import annotations

import contextlib
import functools
import statistics
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from model_races.contestants import Contestant, Missing, contestants
from model_races.device import CallClock, backend, end_if_lost
from model_races.models import Models
from model_races.presets import inputs
from model_races.report import InjectedFaults, Report, failure
from ppcl_rt.files import one_line
from ppcl_rt.ops.agreement import agree


def difference(got: torch.Tensor, wanted: torch.Tensor) -> float:
    """Return the RMS of the difference over the RMS of the wanted values."""
    return float((got.float() - wanted.float()).square().mean().sqrt() / wanted.float().square().mean().sqrt())


class Race:
    """One group: all contestants are built, checked against eager diffusers, timed in turn, and checked again."""

    def __init__(self, job: dict[str, Any], models: Models, report: Report) -> None:
        kind, size = job["group"].split("-")
        self.models, self.report, self.job = models, report, job
        self.preset, self.faults = models.preset, InjectedFaults(job["inject"])
        self.clock = CallClock(self.preset.device)
        self.size, self.text = int(size), self.preset.short if kind == "short" else self.preset.text
        self.call = inputs(self.preset, self.size, self.text)
        self.all = contestants(kind, self.size, models, self.call)
        self.references: dict[str, torch.Tensor] = {}
        rows, columns = self.preset.sizes[self.size]
        before = {row["key"]: row for row in report.content.get("results", [])}
        architecture = models.catalog.architecture
        for each in self.all:
            planned = models.plan(each.plan)
            flops = architecture.flops(planned.plan, rows * columns, self.text)
            each.row = before.get(each.key) or {
                "key": each.key,
                "group": job["group"],
                "contestant": each.name,
                "size": self.size,
                "image_tokens": rows * columns,
                "text_tokens": self.text,
                "batch": 1,
                "plan": planned.kind,
                "ratio": planned.ratio,
                "flops": flops,
                "flops_ratio": round(flops / architecture.flops(models.catalog.dense, rows * columns, self.text), 4),
                "ms": None,
                "host_ms": None,
                "device_ms": None,
            }
        report.content["results"] = [each.row for each in self.all]
        report.save()

    def run(self, deadline: float) -> None:
        """Build, check and time until the deadline; a contestant that was not reached has no time."""
        ready: list[Contestant] = []
        begun = time.monotonic()
        for each in self.all:
            if "failed" in each.row or "skipped" in each.row:
                continue
            # A third of the time is kept for timing, unless there is no contestant to time yet.
            if ready and time.monotonic() > begun + (deadline - begun) * 0.66:
                break
            with self._watched(each):
                self.faults.meet(each.name)
                self.faults.meet(each.key)
                each.call = each.build()
                begin = time.monotonic()
                self._check(each, "before it was timed")
                # In the first calls graphs are captured and compilers finish.
                for _ in range(3):
                    each.call()
                self.clock.wait()
                each.row["start_s"] = round(time.monotonic() - begin, 1)
                ready.append(each)
                # First figures at once, in case the time ends here.
                for _ in range(2):
                    self._round(ready)
        for each in ready:
            # The final figures come from rounds that all contestants take part in.
            each.times.clear()
        for n in range(self.preset.rounds):
            if n >= 3 and time.monotonic() > deadline:
                break
            self._round(ready)
        for each in ready:
            if "failed" not in each.row:
                with self._watched(each):
                    self._check(each, "after it was timed")
                    if "graphs" in each.name:
                        assert isinstance(each.call, functools.partial), "a model, bound to its inputs"
                        model: Any = each.call.func
                        graphs = model.graphs
                        each.row["graphs"] = str(graphs)[:300]
                        if self.clock.cuda and not graphs.replays:
                            raise RuntimeError(f"no graph was replayed: {graphs}")

    def _round(self, ready: Sequence[Contestant]) -> None:
        for each in ready:
            if "failed" in each.row:
                continue
            assert each.call is not None
            with self._watched(each):
                ms, host_ms = self.clock.timed(each.call)
                device_ms, _ = self.clock.timed(each.call, ahead_ms=1.2 * host_ms)
                each.times.append((ms, host_ms, device_ms))
                for name, values in zip(("ms", "host_ms", "device_ms"), zip(*each.times), strict=True):
                    each.row[name] = round(statistics.median(values), 4)
                each.row["rounds"] = len(each.times)
        self.report.save()

    def _check(self, each: Contestant, when: str) -> None:
        """Compare with eager diffusers, or, for a plan that diffusers cannot run, with ours in plain torch."""
        planned = self.models.plan(each.plan)
        if each.plan not in self.references:
            if planned.kind == "mixed":
                each.row["checked_against"] = "ours, plain torch"
                with backend("torch"):
                    self.references[each.plan] = self.models.ours(planned.plan)(**self.call)[0]
            else:
                each.row["checked_against"] = "diffusers, eager"
                self.references[each.plan] = self.models.stock(planned.plan)(**self.call)[0]
        assert each.call is not None
        got, wanted = each.call()[0].clone(), self.references[each.plan]
        each.row["difference"] = difference(got, wanted)
        each.row["agrees"] = bool(torch.isfinite(wanted).all()) and agree(got, wanted)
        if not each.row["agrees"]:
            raise RuntimeError(f"{when} its output was off by {each.row['difference']:.3g} of the wanted one's size")

    @contextlib.contextmanager
    def _watched(self, each: Contestant) -> Iterator[None]:
        """Record a contestant that fails, and leave it out from then on; end the process if the device is lost."""
        self.report.running(each.key)
        try:
            yield
            # The device reports a fault only here.
            self.clock.wait()
        except Missing as missing:
            each.row["skipped"] = one_line(missing)
        except Exception as error:
            each.row |= failure(f"{type(error).__name__}: {one_line(error)}"[:400])
            self.report.save()
            end_if_lost(self.clock)
        finally:
            self.report.running("")
        self.report.save()
