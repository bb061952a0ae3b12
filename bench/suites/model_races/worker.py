"""One group of contestants of ``bench_gpu_model.py``, in a process of its own: a fault of the device ends a process.

Imports, then waits for a line of JSON on its standard input. What it finds out is written to the file named there after
every step, and the name of what it is about to run to the file next to it. Exit status: 0 when it got to the end, 3
after a fault of the device, 2 where there is no device.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import signal
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import diffusers
import torch
import torch._dynamo
from diffusers.models.transformers import transformer_qwenimage
from random_models import PLANS, RATIOS, REAL, TINY, Models, Preset, described, inputs, narrowed, rotate

from ppcl_kernels.tools import machine as runner
from ppcl_kernels.tools.machine import write_json
from ppcl_rt.checkpoint.reader import line
from ppcl_rt.families import qwen_block
from ppcl_rt.families.qwen_block import PPCLQwenImageTransformerBlock
from ppcl_rt.families.qwen_image import PPCLQwenImageTransformer2DModel
from ppcl_rt.ops import implementations as ways
from ppcl_rt.planning.milliseconds import CostRow, CostTable
from ppcl_rt.planning.plan import Plan, Width

FAULT = 3
# Milliseconds that python is let ahead at most.
_AHEAD_MS = 100.0

Call = Callable[[], Any]


class Clock:
    """Times on a CUDA stream, or on a CPU."""

    def __init__(self, device: str) -> None:
        self.cuda = device == "cuda"

    def wait(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()

    def stamp(self) -> Any:
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def between(self, start: Any, end: Any) -> float:
        return start.elapsed_time(end) if self.cuda else (end - start) * 1e3

    def timed(self, call: Call, ahead_ms: float = 0.0) -> tuple[float, float]:
        """Milliseconds of a call on the device, and until it returned.

        ``ahead_ms`` keeps the device busy before it, so that python is ahead and is not timed.
        """
        self.wait()
        if self.cuda and ahead_ms:
            # Hopper runs at up to 1.98 GHz.
            torch.cuda._sleep(int(min(ahead_ms, _AHEAD_MS) * 1.98e6))
        begin = time.perf_counter()
        start = self.stamp()
        call()
        end = self.stamp()
        host_ms = (time.perf_counter() - begin) * 1e3
        self.wait()
        return self.between(start, end), host_ms


@contextlib.contextmanager
def backend(name: str) -> Iterator[None]:
    """``PPCL_BACKEND`` inside a ``with``."""
    before = os.environ.get("PPCL_BACKEND")
    os.environ["PPCL_BACKEND"] = name
    try:
        yield
    finally:
        del os.environ["PPCL_BACKEND"]
        if before is not None:
            os.environ["PPCL_BACKEND"] = before


# Groups of contestants.


@dataclass
class Report:
    """What a process has found out so far; read by others while it runs, and by itself when it is started again."""

    path: Path
    content: dict[str, Any] = field(default_factory=dict)

    def save(self) -> None:
        write_json(self.path, self.content)

    def running(self, name: str) -> None:
        """Say what runs from now on, so that it can be named if this process dies of it."""
        self.path.with_suffix(".running").write_text(name)


class Broken:
    """Faults put in by tests: name of a contestant or row -> ``raise``, ``kill`` or ``hang``."""

    def __init__(self, faults: dict[str, str]) -> None:
        self.faults = faults

    def meet(self, name: str) -> None:
        how = self.faults.get(name)
        if how == "raise":
            raise RuntimeError("a fault that was put in")
        if how == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        while how == "hang":
            time.sleep(1)


class Missing(Exception):
    """A contestant is not there; no fault."""


@dataclass
class Contestant:
    """``build`` makes what is timed; ``plan`` is one of `PLANS`."""

    name: str
    plan: str
    build: Callable[[], Call]
    call: Call | None = None
    row: dict[str, Any] = field(default_factory=dict)
    times: list[tuple[float, float, float]] = field(default_factory=list)

    @property
    def key(self) -> str:
        return f"{self.name}, {self.plan}"


def compiled(model: Any, preset: Preset, **options: Any) -> Any:
    model.compile_repeated_blocks(**preset.compiled, **options)
    return model


def graphed(models: Models, plan: Plan) -> Any:
    if not hasattr(PPCLQwenImageTransformer2DModel, "set_graphs"):
        raise Missing("set_graphs is not there")
    return models.ours(plan, graphs=True)


def reduced(model: Any, preset: Preset) -> Call:
    if preset.device != "cuda":
        raise Missing("CUDA graphs need a CUDA device")
    compiled(model, preset, mode="reduce-overhead")

    def step(**call: Any) -> Any:
        # One step for all blocks: by itself every block would begin one, and end the life of what it reads.
        torch.compiler.cudagraph_mark_step_begin()
        return model(**call)

    return step


def contestants(kind: str, size: int, models: Models, call: dict[str, Any]) -> list[Contestant]:
    """Who takes part in a group, the most useful first."""
    preset = models.preset

    def entry(name: str, plan: str, make: Callable[[Plan], Any]) -> Contestant:
        return Contestant(name, plan, lambda: functools.partial(make(models.plan(plan).plan), **call))

    def eager(plan: str) -> Contestant:
        return entry("eager", plan, models.stock)

    def ours(plan: str) -> Contestant:
        return entry("ours", plan, models.ours)

    def graphs(plan: str) -> Contestant:
        return entry("ours graphs", plan, lambda p: graphed(models, p))

    def sliced(plan: str) -> Contestant:
        return entry("compiled", plan, lambda p: compiled(models.stock(p), preset))

    dense = "dense 1"
    if kind == "dense":
        entries = [eager(dense), ours(dense), sliced(dense), graphs(dense)]
        if size == min(preset.sizes):
            entries.append(entry("reduce-overhead", dense, lambda p: reduced(models.stock(p), preset)))
        else:
            entries.append(
                entry("compiled real RoPE", dense, lambda p: compiled(models.stock(p, real_rope=True), preset))
            )
        return entries
    if kind == "short":
        return [eager(dense), ours(dense), graphs(dense)]
    # Compiled models take longest to start; those that are there before them are timed if they do not get ready.
    plans = [f"{kind} {ratio:g}" for kind in ("width", "mixed", "depth") for ratio in RATIOS]
    entries = [*map(ours, (dense, *plans)), *map(sliced, plans[: len(RATIOS)])]
    if size == min(preset.sizes):
        entries[1 + len(plans) : 1 + len(plans)] = map(graphs, (dense, *plans))
    return entries


def difference(got: torch.Tensor, wanted: torch.Tensor) -> float:
    """RMS of the difference to that of the values."""
    return float((got.float() - wanted.float()).square().mean().sqrt() / wanted.float().square().mean().sqrt())


class Race:
    """One group: all are built and checked against diffusers in eager mode, timed in turn, and checked again."""

    def __init__(self, spec: dict[str, Any], models: Models, report: Report) -> None:
        kind, size = spec["group"].split("-")
        self.models, self.report, self.spec = models, report, spec
        self.preset, self.broken = models.preset, Broken(spec["inject"])
        self.clock = Clock(self.preset.device)
        self.size, self.text = int(size), self.preset.short if kind == "short" else self.preset.text
        self.call = inputs(self.preset, self.size, self.text)
        self.all = contestants(kind, self.size, models, self.call)
        self.references: dict[str, torch.Tensor] = {}
        rows, columns = self.preset.sizes[self.size]
        before = {row["key"]: row for row in report.content.get("results", [])}
        shape = models.catalog.shape
        for each in self.all:
            planned = models.plan(each.plan)
            flops = shape.flops(planned.plan, rows * columns, self.text)
            each.row = before.get(each.key) or {
                "key": each.key,
                "group": spec["group"],
                "contestant": each.name,
                "size": self.size,
                "image_tokens": rows * columns,
                "text_tokens": self.text,
                "batch": 1,
                "plan": planned.kind,
                "ratio": planned.ratio,
                "flops": flops,
                "flops_ratio": round(flops / shape.flops(models.catalog.dense, rows * columns, self.text), 4),
                "ms": None,
                "host_ms": None,
                "device_ms": None,
            }
        report.content["results"] = [each.row for each in self.all]
        report.save()

    def run(self, deadline: float) -> None:
        """Build, check and time until the deadline; what was not reached stays without a time."""
        ready: list[Contestant] = []
        begun = time.monotonic()
        for each in self.all:
            if "failed" in each.row or "skipped" in each.row:
                continue
            # A third of the time is for timing; without anybody to time, it is not needed.
            if ready and time.monotonic() > begun + (deadline - begun) * 0.66:
                break
            with self._watched(each):
                self.broken.meet(each.name)
                self.broken.meet(each.key)
                each.call = each.build()
                begin = time.monotonic()
                self._check(each, "before it was timed")
                # Graphs are captured, and compilers settle, in the first calls.
                for _ in range(3):
                    each.call()
                self.clock.wait()
                each.row["start_s"] = round(time.monotonic() - begin, 1)
                ready.append(each)
                # First figures at once, should the time end here.
                for _ in range(2):
                    self._round(ready)
        for each in ready:
            # Of one run alone: everybody in turn.
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
                        graphs = each.call.func.graphs  # type: ignore[union-attr]
                        each.row["graphs"] = str(graphs)[:300]
                        if self.clock.cuda and not graphs.hits:
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
        """Compare with diffusers' class in eager mode, or, where it cannot run a plan, with ours in plain torch."""
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
        each.row["agrees"] = bool(torch.isfinite(wanted).all()) and ways.agree(got, wanted)
        if not each.row["agrees"]:
            raise RuntimeError(f"{when} its output was off by {each.row['difference']:.3g} of the wanted one's size")

    @contextlib.contextmanager
    def _watched(self, each: Contestant) -> Iterator[None]:
        """Name a contestant that fails, and leave it out from then on; end where the device is lost."""
        self.report.running(each.key)
        try:
            yield
            # A fault shows only now.
            self.clock.wait()
        except Missing as missing:
            each.row["skipped"] = line(missing)
        except Exception as error:
            each.row |= {
                "failed": f"{type(error).__name__}: {line(error)}"[:400],
                "ms": None,
                "host_ms": None,
                "device_ms": None,
            }
            self.report.save()
            end_if_lost(self.clock)
        finally:
            self.report.running("")
        self.report.save()


def failure(why: str) -> dict[str, Any]:
    """Fields of a row that failed: a time that was taken before is worth nothing."""
    return {"failed": why, "ms": None, "host_ms": None, "device_ms": None}


def end_if_lost(clock: Clock) -> None:
    """End this process where nothing more can run on the device."""
    try:
        clock.wait()
    except RuntimeError:
        # Without python's clean-up, which would wait for the device.
        os._exit(FAULT)


# The sweep.


class Point(NamedTuple):
    """A row to be measured; ``level`` 0 comes first, at every size."""

    level: int
    size: int
    kind: str
    width: Width | None

    @property
    def name(self) -> str:
        return f"{self.kind} {'-'.join(map(str, self.width or ()))} at {self.size}".replace("  ", " ")


def points(preset: Preset) -> list[Point]:
    """All rows of the sweep: each group of `Width` alone, and a few widths that test whether groups add up."""
    full, made = preset.full, []
    for size in preset.sizes:
        made += [Point(0, size, kind, None) for kind in ("outer", "map")]
        for kind, base, levels in (
            ("block", full, preset.counts),
            ("still", full._replace(text=0), preset.still),
        ):
            made.append(Point(0, size, kind, base))
            made += [
                Point(level, size, kind, base._replace(**{group: count}))
                for group, by_level in levels.items()
                for level, counts in enumerate(by_level)
                for count in counts
            ]
        for ratio in RATIOS:
            narrow = narrowed(preset, ratio)
            made += [Point(1, size, "block", narrow), Point(1, size, "still", narrow._replace(text=0))]
    # Python's sort keeps the order within a level; the full block of a size comes before what is compared with it.
    return sorted(
        made, key=lambda point: (point.level, point.width not in (None, full), point.size != max(preset.sizes))
    )


class Sweep:
    """Milliseconds of blocks by kind, width and shape, as `ppcl_rt.planning.milliseconds.CostTable`."""

    def __init__(self, spec: dict[str, Any], models: Models, report: Report) -> None:
        self.spec, self.models, self.report, self.preset = spec, models, report, models.preset
        self.clock, self.broken = Clock(self.preset.device), Broken(spec["inject"])
        self.call = {size: inputs(self.preset, size, self.preset.text) for size in self.preset.sizes}
        self.block_call = {size: self._block_call(call) for size, call in self.call.items()}
        about = machine()
        self.table: dict[str, Any] = report.content.get("table") or {
            "format": 1,
            **{name: about[name] for name in ("device", "versions", "commit", "dirty", "date")},
            "command": spec["command"],
            "dtype": str(self.preset.dtype).removeprefix("torch."),
            "backend": ways.backend(),
            "dim": self.preset.dim,
            "head_dim": self.preset.head_dim,
            "full": self.preset.full,
            "blocks": self.preset.blocks,
            "complete": False,
            "left_out": {},
            "rows": [],
        }
        report.content["table"] = self.table

    def run(self, deadline: float) -> None:
        """Measure what is not there yet until the deadline."""
        done = {name_of(row, self.preset) for row in self.table["rows"]}
        self.table["left_out"] |= self.spec["leave_out"]
        for point in points(self.preset):
            if point.name in done or point.name in self.table["left_out"]:
                continue
            if time.monotonic() > deadline:
                break
            self.report.running(point.name)
            try:
                self.broken.meet(point.name)
                self.table["rows"].append(self._measure(point).model_dump(mode="json"))
                self.clock.wait()
            except Exception as error:
                self.table["left_out"][point.name] = f"{type(error).__name__}: {line(error)}"[:400]
                self.report.save()
                end_if_lost(self.clock)
            self.report.running("")
            self.report.save()
        else:
            self.table["complete"] = True
        self.report.content["predicted"] = self._predicted()
        self.report.save()

    def _predicted(self) -> dict[str, dict[str, float]]:
        """Milliseconds of each plan by the table: size -> plan -> ms, where the table says it."""
        table, predicted = CostTable.model_validate(self.table), {}
        for size, (rows, columns) in self.preset.sizes.items():
            predicted[str(size)] = of_size = {}
            for name in PLANS:
                # A plan may need what there was no time for.
                with contextlib.suppress(ValueError):
                    plan = self.models.plan(name).plan
                    of_size[name] = round(table.at(rows * columns, self.preset.text).plan_ms(plan), 4)
        return predicted

    def _block_call(self, call: dict[str, Any]) -> dict[str, Any]:
        """What the first block is called with in a forward."""
        caught: dict[str, Any] = {}
        model = self.models.ours(self.models.catalog.dense)
        hook = self.models.blocks[0].register_forward_pre_hook(
            lambda _, __, kwargs: caught.update(kwargs) if not caught else None, with_kwargs=True
        )
        with backend("torch"):
            model(**call)
        hook.remove()
        return caught

    def _chain(self, point: Point) -> Call:
        """A call that runs every block, map or forward once."""
        models, call = self.models, self.block_call[point.size]
        if point.kind == "outer":
            empty = Plan.of(models.catalog.fingerprint, self.preset.depth, ())
            return functools.partial(models.ours(empty), **self.call[point.size])
        text, more = call["encoder_hidden_states"], {}
        if point.kind == "map":
            return lambda: [text + layer(text) for layer in models.maps]
        assert point.width is not None
        if point.kind == "still":
            more["text_input"] = models.blocks[0].text_input(text, call["temb"], self.preset.full)

        def chain() -> tuple[torch.Tensor, ...]:
            streams = text, call["hidden_states"]
            for block in models.blocks:
                moving = {"encoder_hidden_states": streams[0], "hidden_states": streams[1], "width": point.width}
                streams = block(**{**call, **moving, **more})
            return streams

        return chain

    def _measure(self, point: Point) -> CostRow:
        chain, full = self._chain(point), self._chain(point._replace(kind="block", width=self.preset.full))
        with backend("torch"):
            wanted = chain()
        agrees = ways.agree(chain(), wanted)
        full()
        _, host_ms = self.clock.timed(chain)
        _, full_host_ms = self.clock.timed(full)
        pairs = [
            (self.clock.timed(chain, 1.2 * host_ms)[0], self.clock.timed(full, 1.2 * full_host_ms)[0])
            for _ in range(self.preset.repeats)
        ]
        ms, full_ms = map(statistics.median, zip(*pairs, strict=True))
        agrees = agrees and ways.agree(chain(), wanted)
        units = {"outer": 1, "map": len(self.models.maps)}.get(point.kind, self.preset.blocks)
        rows, columns = self.preset.sizes[point.size]
        return CostRow(
            kind=point.kind,
            image_tokens=rows * columns,
            text_tokens=self.preset.text,
            batch=1,
            width=point.width,
            ms=ms / units,
            full_ms=full_ms / self.preset.blocks,
            host_ms=host_ms / units,
            repeats=len(pairs),
            operations=self._operations(chain, 1.5 * host_ms) if point.width else {},
            agrees=agrees,
        )

    def _operations(self, chain: Call, ahead_ms: float) -> dict[str, float]:
        """Milliseconds of each operation of a block, by events around them."""
        found: dict[str, list[float]] = {}
        for _ in range(min(3, self.preset.repeats)):
            with instrumented(self.clock) as seen:
                self.clock.timed(chain, ahead_ms)
            sums: dict[str, float] = {}
            for name, start, end in seen:
                sums[name] = sums.get(name, 0.0) + self.clock.between(start, end) / self.preset.blocks
            for name, value in sums.items():
                found.setdefault(name, []).append(value)
        return {name: round(statistics.median(values), 5) for name, values in found.items()}


def name_of(row: dict[str, Any], preset: Preset) -> str:
    """Name of the point that a row was measured for."""
    [size] = (size for size, (rows, columns) in preset.sizes.items() if rows * columns == row["image_tokens"])
    return Point(0, size, row["kind"], row["width"] and Width(*row["width"])).name


@contextlib.contextmanager
def instrumented(clock: Clock) -> Iterator[list[tuple[str, Any, Any]]]:
    """Stamps before and after every operation of a block inside the ``with``."""
    seen: list[tuple[str, Any, Any]] = []
    homes = [(qwen_block.ops, name) for name in ("ada_layer_norm", "qkv_projection", "joint_attention", "linears")]
    homes.append((PPCLQwenImageTransformerBlock, "_modulation"))

    def stamped(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            start = clock.stamp()
            result = call(*args, **kwargs)
            seen.append((part(name, args, kwargs, seen), start, clock.stamp()))
            return result

        return run

    with contextlib.ExitStack() as stack:
        for home, name in homes:
            call = getattr(home, name)
            setattr(home, name, stamped(name, call))
            stack.callback(setattr, home, name, call)
        yield seen


def part(name: str, args: Sequence[Any], kwargs: dict[str, Any], seen: Sequence[tuple[str, Any, Any]]) -> str:
    """Say which part of a block a call is: of linear layers, ``out``, ``up``, ``down`` or ``map``."""
    if name != "linears":
        return name.strip("_")
    if kwargs.get("gelu"):
        return "up"
    if args[0][0].gate is None:
        return "map"
    return "down" if seen and seen[-1][0] == "up" else "out"


def machine() -> dict[str, Any]:
    """Say what runs here."""
    about = runner.machine()
    versions = {name: about.pop(name) for name in ("torch", "triton", "cuda", "cudnn", "driver", "python")}
    return {**about, "versions": {**versions, "diffusers": diffusers.__version__}}


def work(spec: dict[str, Any]) -> None:
    """Run one group.

    Args:
        spec: ``group``; ``file`` to write; ``tiny``; ``seconds`` after which nothing new is begun; ``leave_out``, what
            failed before, name -> why; ``inject``, faults put in by tests; ``command``.
    """
    deadline = time.monotonic() + spec["seconds"]
    preset = TINY if spec["tiny"] else REAL
    report = Report(Path(spec["file"]))
    if report.path.exists():
        # What a process before this one measured until it died.
        report.content = json.loads(report.path.read_text())
    report.running("")
    with torch.no_grad():
        models = Models(preset)
        report.content |= {
            "machine": machine(),
            "preset": {
                "heads": preset.heads,
                "head_dim": preset.head_dim,
                "blocks": preset.blocks,
                "walks": preset.walks,
                "dtype": str(preset.dtype).removeprefix("torch."),
            },
        }
        report.save()
        if spec["group"] == "sweep":
            Sweep(spec, models, report).run(deadline)
        else:
            for row in report.content.get("results", []):
                if row["key"] in spec["leave_out"]:
                    row |= failure(spec["leave_out"][row["key"]])
            race = Race(spec, models, report)
            names = dict.fromkeys(each.plan for each in race.all)
            report.content["planned"] = {name: described(models.plan(name), models.catalog) for name in names}
            race.run(deadline)
    report.save()


def main() -> None:
    """Wait for the group to run."""
    diffusers.utils.logging.set_verbosity_error()
    transformer_qwenimage.apply_rotary_emb_qwen = rotate
    torch._dynamo.config.recompile_limit = 64
    given = sys.stdin.readline()
    if not given:
        return
    spec = json.loads(given)
    # Should whoever started this be gone when it hangs.
    signal.alarm(int(spec["limit"]) + 5)
    if not spec["tiny"] and not torch.cuda.is_available():
        sys.exit(2)
    work(spec)


if __name__ == "__main__":
    main()
