"""Part 2 of ``make gpu``: which implementation of each operation is fastest, at the shapes that a model asks for.

    python bench/suites/bench_kernels.py --out bench/results/nvidia-h200 --seconds 500
    python bench/suites/bench_kernels.py --tiny            (on a CPU, in triton's interpreter: those times say nothing)

What is raced is what a block of Qwen-Image asks its operations for: a random block of the real widths is run, its calls
are kept, and each call is a case. Its contestants are all implementations that `ppcl_rt.ops` has for it, and rivals:
the chain of plain torch compiled, FlexAttention, for products the product alone, for a norm a copy of the same bytes.
Every result is compared with plain torch's before it is timed and after, tile by tile
(`ppcl_rt.ops.implementations.agree`). All of a
case are timed in turn, round by round; before each call a quarter of a gigabyte is read, so that inputs come from
memory and no line that somebody else wrote is written back meanwhile, and the device waits until python is ahead.
Milliseconds are medians. FLOPs and bytes are those that cannot be spared: inputs read once, outputs written once.

``choose.json`` holds every time, ``ways.json`` the winners, as `ppcl_rt.ops.implementations` reads them: a copy of it
in ``ppcl_rt/ops/tables/<device>.json`` is what the package ships. Both are rewritten after each case. The races run in
a process of their own, which a contestant may take down or hang in: it is named, and the next process goes on without it.

Exit status: 0 all was measured, 1 something failed or was not reached, 2 bad usage or no device.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

if "--tiny" in sys.argv:
    # Read when a kernel is defined: before the imports below.
    os.environ.setdefault("TRITON_INTERPRET", "1")

import torch
import torch.nn.functional as F
from torch.utils._pytree import tree_leaves

from ppcl_kernels.tools.children import Job, Outcome, Say, run_all, terminated_as_exit
from ppcl_kernels.tools.machine import machine, write_json
from ppcl_rt.families.qwen_block import LAYOUT, PPCLQwenImageTransformerBlock
from ppcl_rt.ops import implementations as ways
from ppcl_rt.ops.implementations import TORCH, Table, agree
from ppcl_rt.ops.operation import Operation
from ppcl_rt.ops.qkv_projection import pack
from ppcl_rt.planning.plan import Width

Call = Callable[[], Any]
Row = dict[str, Any]

_LOST = 3
_ENDS = {_LOST: "a fault of the device", -signal.SIGALRM: "hangs"}


@dataclass(frozen=True)
class Preset:
    """Sizes of the block and of a race.

    Attributes:
        images: pixels a side -> image tokens; the first is the main one.
        texts: text tokens; the first is the main one.
        widths: per cent of heads and channels that are kept.
        compiled: widths at which what torch.compile makes takes part (5 to 10 s each), at the main shape and batch 1.
        rounds: timed, of the best implementation of each kind and the rivals; screening: of all.
        flush: bytes that are read before each call, more than any L2; ahead: cycles that the device then waits.
        matrix, copied: of the two ceilings: side of a square product, bytes of a copy.
    """

    heads: int
    head_dim: int
    hidden: int
    images: dict[int, int]
    texts: tuple[int, ...]
    widths: tuple[int, ...]
    batches: tuple[int, ...]
    compiled: tuple[int, ...]
    device: str
    dtype: torch.dtype
    rounds: int
    screening: int
    flush: int
    ahead: int
    matrix: int
    copied: int


PRESETS = {
    # Qwen-Image; FLUX has the same widths.
    "full": Preset(
        heads=24,
        head_dim=128,
        hidden=12288,
        images={1024: 4096, 512: 1024, 1328: 6889},
        texts=(512, 64),
        widths=(100, 50, 75, 25),
        batches=(1, 2),
        compiled=(100, 50),
        device="cuda",
        dtype=torch.bfloat16,
        rounds=20,
        screening=5,
        flush=2**28,
        ahead=500_000,
        matrix=8192,
        copied=2**30,
    ),
    "tiny": Preset(
        heads=2,
        head_dim=8,
        hidden=64,
        images={96: 9},
        texts=(3,),
        widths=(100, 50),
        batches=(1,),
        compiled=(),
        device="cpu",
        dtype=torch.float32,
        rounds=2,
        screening=1,
        flush=2**10,
        ahead=0,
        matrix=64,
        copied=2**10,
    ),
}


class Setting(NamedTuple):
    """What a block is called with; ``width`` in per cent, 0 for linear maps in place of its MLPs (PPCL eq. 9)."""

    pixels: int
    image: int
    text: int
    batch: int
    width: int
    masked: bool = False


class Case(NamedTuple):
    """One call of one operation; ``op`` is its place in a block."""

    op: str
    operation: Operation[Any, Any]
    call: Any


def settings(preset: Preset) -> list[Setting]:
    """Not the product of all axes: the main image first, batch 1 before 2, since time may run out."""
    (main, tokens), *_ = preset.images.items()
    text, *texts = preset.texts
    full, half = preset.widths[0], 50
    made = []
    for batch in preset.batches:
        for pixels, image in preset.images.items():
            made += [Setting(pixels, image, text, batch, width) for width in preset.widths]
            if pixels == main:
                made += [Setting(pixels, image, text, batch, width, True) for width in (full, half)]
                made += [Setting(pixels, image, text, batch, 0)]
    return made + [Setting(main, tokens, short, 1, width) for short in texts for width in (full, half)]


class Block:
    """A random block, and the calls that it makes."""

    def __init__(self, preset: Preset) -> None:
        self.preset = preset
        dim = preset.heads * preset.head_dim
        torch.manual_seed(0)
        with torch.device(preset.device):
            self.block = PPCLQwenImageTransformerBlock(dim, preset.heads, preset.head_dim)
            for output in ("mlp_image", "mlp_text"):
                self.block.narrow[LAYOUT.narrow_name(output, 0)] = torch.nn.Linear(dim, dim)
        self.block.to(preset.dtype).requires_grad_(False)
        for names in LAYOUT.side_by_side:
            pack(*map(self.block.get_submodule, names))

    def cases(self, setting: Setting) -> Iterator[Case]:
        """Run it once, in plain torch, and give its calls in order."""
        preset, made = self.preset, list[tuple[Operation[Any, Any], Any]]()

        def record(operation: Operation[Any, Any], call: Any) -> Any:
            made.append((operation, call))
            return operation.run(call, TORCH)

        torch.manual_seed(1)
        dim = preset.heads * preset.head_dim
        like = {"device": preset.device, "dtype": preset.dtype}
        image, text = (torch.randn(setting.batch, count, dim, **like) for count in (setting.image, setting.text))
        angles = [
            torch.rand(n, preset.head_dim // 2, device=preset.device) * 6.28 for n in (setting.image, setting.text)
        ]
        mask = torch.rand(setting.batch, setting.text, device=preset.device) < 0.6 if setting.masked else None
        kept = preset.hidden * setting.width // 100
        heads = preset.heads * (setting.width or 100) // 100
        with mock.patch.object(Operation, "__call__", record):
            self.block(
                image,
                text,
                mask,
                torch.randn(setting.batch, dim, **like),
                tuple(torch.stack((a.cos(), a.sin()), dim=-1) for a in angles),
                width=Width(heads, kept, kept, dim),
            )
        before_up = True
        for operation, call in made:
            yield Case(_place(operation, call, before_up, setting), operation, call)
            before_up = before_up and not getattr(call, "gelu", False)


def _place(operation: Operation[Any, Any], call: Any, before_up: bool, setting: Setting) -> str:
    """What an operation is there for."""
    if operation.name == "ada_layer_norm":
        return operation.name if call.x.shape[1] == setting.image else f"{operation.name} of text"
    if operation.name != "linear":
        return operation.name
    if call.gelu:
        return "up_gelu"
    if call.groups[0].gate is None:
        return "map_residual"
    return "out_gate_residual" if before_up else "down_gate_residual"


def work_of(case: Case, results: Sequence[torch.Tensor]) -> tuple[int, int]:
    """FLOPs, 0 where memory is the limit, and bytes, of inputs read once and outputs written once."""
    call, name = case.call, case.operation.name
    written = sum(t.numel() * t.itemsize for t in results)
    if name == "joint_attention":
        batch, tokens, heads, head_dim = call.q.shape
        read = sum(t.numel() * t.itemsize for t in call[:3])
        return 4 * batch * heads * tokens * call.k.shape[1] * head_dim, read + written
    if name == "ada_layer_norm":
        return 0, sum(t.numel() * t.itemsize for t in call[:3]) + written
    read = flops = 0
    if name == "linear":
        for g in call.groups:
            weights = g.x.shape[2] * (g.out_features or g.weight.shape[0])
            flops += 2 * g.x.shape[:2].numel() * weights
            others = sum(t.numel() for t in (g.x, g.bias, g.gate, g.residual) if t is not None)
            read += (weights + others) * g.x.itemsize
    else:
        for s in call.streams:
            weights = (3 if s.queries else 2) * call.heads * call.head_dim * s.x.shape[2]
            flops += 2 * s.x.shape[:2].numel() * weights
            read += (weights + s.x.numel()) * s.x.itemsize
            read += 0 if s.rope is None else sum(t.numel() * t.itemsize for t in tree_leaves(s.rope))
    return flops, read + written


def rivals(case: Case, setting: Setting, preset: Preset) -> dict[str, Callable[[], Call]]:
    """Who else takes part: name -> what makes the call."""
    call, operation = case.call, case.operation
    main = setting[:4] == (*next(iter(preset.images.items())), preset.texts[0], 1)
    compiles = main and setting.width in preset.compiled
    made: dict[str, Callable[[], Call]] = {}
    if operation.name == "joint_attention":
        if compiles:
            made["flex"] = functools.partial(_flex, call)
        return made
    if compiles:
        made["compiled"] = lambda: functools.partial(_compiled(functools.partial(operation.run, way=TORCH)), call)
    if operation.name == "ada_layer_norm":
        copy = torch.empty_like(call.x)
        made["copy"] = lambda: lambda: copy.copy_(call.x)
    elif operation.name == "linear":
        weights = [g.weight[: g.out_features, : g.x.shape[2]] for g in call.groups]
        made["product alone"] = lambda: lambda: [F.linear(g.x, w) for g, w in zip(call.groups, weights)]
    return made


# They compute something else.
UNCHECKED = ("copy", "product alone")


def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile for one shape, with nothing left of the shapes before it: they count towards a limit."""
    torch.compiler.reset()
    return torch.compile(function, dynamic=False)


def _flex(call: Any) -> Call:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    q, k, v = (t.transpose(1, 2) for t in call[:3])
    blocks = None
    if (mask := call.key_mask) is not None:
        blocks = create_block_mask(
            lambda b, h, i, j: mask[b, j], q.shape[0], None, q.shape[2], k.shape[2], device=q.device.type
        )
    attend = _compiled(flex_attention)
    return lambda: attend(q, k, v, block_mask=blocks).transpose(1, 2)


class Clock:
    """Times calls on a preset's device."""

    def __init__(self, preset: Preset) -> None:
        self.preset, self.cuda = preset, preset.device == "cuda"
        self.filler = torch.ones(preset.flush // 4, dtype=torch.int32, device=preset.device)

    def paired_ms(self, calls: dict[str, Call], rounds: int) -> dict[str, float]:
        """Median milliseconds of each call; all are timed in turn, round by round."""
        marks: dict[str, list[tuple[Any, Any]]] = {name: [] for name in calls}
        for _ in range(rounds):
            for name, call in calls.items():
                self.filler.max()
                if self.cuda:
                    torch.cuda._sleep(self.preset.ahead)
                start = self._mark()
                call()
                marks[name].append((start, self._mark()))
        self.wait()
        return {name: statistics.median(self._between(*pair) for pair in pairs) for name, pairs in marks.items()}

    def wait(self) -> None:
        """Wait for the device; raises what went wrong there."""
        if self.cuda:
            torch.cuda.synchronize()

    def _mark(self) -> Any:
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _between(self, start: Any, end: Any) -> float:
        return start.elapsed_time(end) if self.cuda else 1e3 * (end - start)

    def ceilings(self) -> dict[str, float]:
        """What the device reaches today: TFLOP/s of a large product, GB/s of a large copy; three inputs that rotate."""
        side, like = self.preset.matrix, {"device": self.preset.device, "dtype": self.preset.dtype}
        pairs = [(torch.randn(side, side, **like), torch.randn(side, side, **like)) for _ in range(3)]
        sources = [torch.ones(self.preset.copied // 4, dtype=torch.int32, device=self.preset.device) for _ in range(3)]
        target = torch.empty_like(sources[0])
        calls: dict[str, Call] = {f"product {n}": functools.partial(torch.mm, *pair) for n, pair in enumerate(pairs)}
        calls |= {f"copy {n}": functools.partial(target.copy_, source) for n, source in enumerate(sources)}
        self.paired_ms(calls, 2)
        ms = self.paired_ms(calls, self.preset.rounds)
        product, copy = (
            statistics.median(value for name, value in ms.items() if name.startswith(kind))
            for kind in ("product", "copy")
        )
        return {"tflops": 2 * side**3 / product / 1e9, "gbs": 2 * self.preset.copied / copy / 1e6}


def kernel_names(call: Call) -> list[str]:
    """Names of the kernels that a call launches on a GPU."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as run:
        call()
        torch.cuda.synchronize()
    return sorted({event.name for event in run.events() if event.device_type == torch.autograd.DeviceType.CUDA})


class Races:
    """All cases, one after the other; goes on where a process before it ended."""

    def __init__(self, preset: Preset, out: Path, deadline: float, stall: int, say: Say) -> None:
        self.preset, self.out, self.deadline, self.stall = preset, out, deadline, stall
        self.content = json.loads((out / "choose.json").read_text())
        self.content |= {name: value for name, value in machine().items() if name != "date"}
        self.rows: list[Row] = self.content["results"]
        self.done = {row["key"] for row in self.rows}
        self.clock = Clock(preset)
        about = {"device": self.content["device"], "torch": torch.__version__}
        self.tables = [Table(out / "ways.json", about, lambda call: 0.0)]
        if self.clock.cuda:
            # Where the part after this one looks.
            known = ways.table_of(torch.cuda.current_device())
            self.tables = [Table(out / "ways.json", known.about, known.clock), known]

    def run(self) -> bool:
        """Race; says whether everything was reached."""
        self._alive("ceilings")
        if "ceilings" not in self.content:
            self.content["ceilings"] = self.clock.ceilings()
            print("ceilings: product {tflops:.0f} TFLOP/s, copy {gbs:.0f} GB/s".format(**self.content["ceilings"]))
        block = Block(self.preset)
        for setting in settings(self.preset):
            self._alive(f"the block at {setting}")
            for case in block.cases(setting):
                key = str(case.operation.key(case.call))
                if key in self.done:
                    continue
                if time.monotonic() > self.deadline:
                    return False
                self.done.add(key)
                rows = self._race(case, key, setting)
                self.rows += rows
                write_json(self.out / "choose.json", self.content)
                print(_line(rows), flush=True)
        self._alive("")
        return True

    def _alive(self, running: str) -> None:
        """Say what runs from now on, should it be the last that is heard; whoever hangs ends the process."""
        (self.out / ".choose.running").write_text(running)
        signal.alarm(self.stall if running else 0)

    def _race(self, case: Case, key: str, setting: Setting) -> list[Row]:
        operation, call = case.operation, case.call
        self._alive(f"{key}: torch")
        wanted = operation.run(call, TORCH)
        flops, size = work_of(case, tree_leaves(wanted))
        about: Row = {"op": case.op, "key": key, **setting._asdict(), "dtype": str(self.preset.dtype)}
        about |= {"flops": flops, "bytes": size, "device": self.content["device"]}
        listed = {str(way): functools.partial(operation.run, call, way) for way in operation.implementations(call)}
        rows: dict[str, Row] = {}
        calls: dict[str, Call] = {}

        def check(name: str) -> None:
            self._alive(f"{key}: {name}")
            got = calls[name]()
            if name not in UNCHECKED and not agree(got, wanted):
                raise RuntimeError("its result is not that of plain torch")
            self.clock.wait()

        def guarded(name: str, what: Callable[[], Any]) -> Any:
            """Do something for a contestant; what it raises is its result."""
            try:
                return what()
            except Exception as error:
                rows[name]["failed"] = f"{type(error).__name__}: {' '.join(str(error).split())}"[:200]
                calls.pop(name, None)
            try:
                self.clock.wait()
            except Exception:
                # A fault on a device is sticky: nothing can run in this process any more.
                os._exit(_LOST)

        for name, make in {
            **{n: lambda c=c: c for n, c in listed.items()},
            **rivals(case, setting, self.preset),
        }.items():
            rows[name] = {**about, "contestant": name, "implementation": name in listed, "ms": None, "taken": False}
            if why := self.content["left_out"].get(f"{key}: {name}"):
                rows[name]["failed"] = why
                continue
            self._alive(f"{key}: {name}")
            if (made := guarded(name, make)) is not None:
                calls[name] = made
                guarded(name, functools.partial(check, name))

        def timed(names: Sequence[str], rounds: int) -> dict[str, float]:
            self._alive(f"{key}: {', '.join(names)}")
            return self.clock.paired_ms({name: calls[name] for name in names}, rounds)

        timed(list(calls), 1)
        screened = timed(list(calls), self.preset.screening)
        final: dict[str, float] = {}
        while True:
            best: dict[str, str] = {}
            for name in sorted(calls, key=screened.__getitem__):
                best.setdefault(name.split()[0] if name in listed else name, name)
            if set(best.values()) <= set(final):
                break
            final = timed(list(best.values()), self.preset.rounds)
            # Once more: a race may show only when the device is busy. Who fails makes room for the next of its kind.
            for name in list(calls):
                guarded(name, functools.partial(check, name))
        for name in calls:
            rows[name]["ms"] = round(final.get(name, screened[name]), 5)
            rows[name]["rounds"] = self.preset.rounds if name in final else self.preset.screening
        self._choose(operation.key(call), [name for name in listed if name in calls], rows)
        self._rate(rows, flops, size)
        if self.clock.cuda and operation.name == "joint_attention" and setting == settings(self.preset)[0]:
            for name in list(calls):
                self._alive(f"{key}: {name}, profiled")
                guarded(name, lambda name=name: rows[name].update(kernels=kernel_names(calls[name])))
        return list(rows.values())

    def _choose(self, key: Any, names: Sequence[str], rows: dict[str, Row]) -> None:
        """Mark the fastest implementation, and keep it in the tables."""
        times = {name: rows[name]["ms"] for name in names}
        if finals := [name for name in names if rows[name]["rounds"] == self.preset.rounds]:
            winner = min(finals, key=times.__getitem__)
            rows[winner]["taken"] = True
            for table in self.tables:
                table.keep(key, winner, times)

    def _rate(self, rows: dict[str, Row], flops: int, size: int) -> None:
        work, unit, scale = (flops, "tflops", 1e9) if flops else (size, "gbs", 1e6)
        plain = rows.get(str(TORCH), {}).get("ms")
        for row in rows.values():
            if row["ms"]:
                rate = work / row["ms"] / scale
                row |= {"rate": round(rate, 2), "unit": {"tflops": "TFLOP/s", "gbs": "GB/s"}[unit]}
                row["of_ceiling"] = round(rate / self.content["ceilings"][unit], 4)
                row["to_torch"] = round(plain / row["ms"], 4) if plain else None


def _line(rows: Sequence[Row]) -> str:
    """A case in one line."""
    told = []
    for row in rows:
        mark = "*" if row["taken"] else ""
        told.append(f"{row['contestant']}{mark} {row['ms']:.4g}" if row["ms"] else f"{row['contestant']} failed")
    return f"{rows[0]['op']} {rows[0]['key'].split()[-1]}, ms: {', '.join(told)}"


def _raced(preset: Preset, out: Path, deadline: float, stall: int, say: Say) -> None:
    """In a child: race what is left."""
    if preset.device == "cuda" and not torch.cuda.is_available():
        say({"no_device": True})
        return
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    with torch.no_grad():
        say({"complete": Races(preset, out, deadline, stall, say).run()})


def race_all(preset: Preset, out: Path, seconds: float, stall: int, command: str) -> int:
    """Race in processes, each without what ended the one before it; returns the exit status."""
    deadline = time.monotonic() + seconds
    out.mkdir(parents=True, exist_ok=True)
    content: dict[str, Any] = {"part": "choose", "device": None, "status": None, "command": command}
    write_json(out / "choose.json", content | {"complete": False, "left_out": {}, "results": []})
    (out / "ways.json").unlink(missing_ok=True)
    running = out / ".choose.running"
    while True:
        ended: list[Outcome] = []
        work = functools.partial(_raced, preset, out, deadline - 2, stall)
        running.write_text("")
        # Its output is ours: a line a case.
        run_all([Job("races", seconds, work, prints=True)], 1, deadline, ended.append)
        (outcome,) = ended
        said: dict[str, Any] = {}
        for row in outcome.said:
            said |= row
        if "no_device" in said:
            print("bench_kernels: no CUDA device: run on a machine with one, or with --tiny", file=sys.stderr)
            return 2
        culprit = running.read_text()
        running.unlink()
        content = json.loads((out / "choose.json").read_text())
        if "complete" in said or outcome.late or not culprit or culprit in content["left_out"]:
            break
        how = _ENDS.get(outcome.status, outcome.how)
        key, _, names = culprit.partition(": ")
        # Which of those that are timed in turn it was is not known: all are out.
        content["left_out"] |= {culprit: how, **{f"{key}: {name}": how for name in names.split(", ")}}
        write_json(out / "choose.json", content)
        print(f"left out: {culprit}: {how}", flush=True)
    failed = [row for row in content["results"] if "failed" in row and row["implementation"]]
    content["complete"] = said.get("complete", False)
    write_json(out / "choose.json", content)
    for row in failed:
        print(f"failed: {row['op']}, {row['key']}, {row['contestant']}: {row['failed']}")
    winners = sum(row["taken"] for row in content["results"])
    print(f"{winners} winners in {out / 'ways.json'}", flush=True)
    return 0 if content["complete"] and not failed and not content["left_out"] else 1


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    assert __doc__
    parser = argparse.ArgumentParser(prog="python bench/suites/bench_kernels.py", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="folder of choose.json and ways.json (a temporary one)")
    parser.add_argument("--seconds", type=float, default=500, help="for everything (%(default)s)")
    parser.add_argument("--stall", type=int, default=60, help="seconds that one contestant may take (%(default)s)")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes on a CPU")
    options = parser.parse_args(arguments)
    command = " ".join(["python bench/suites/bench_kernels.py", *(sys.argv[1:] if arguments is None else arguments)])
    preset = PRESETS["tiny" if options.tiny else "full"]
    with terminated_as_exit(), tempfile.TemporaryDirectory() as folder:
        return race_all(preset, options.out or Path(folder), options.seconds, options.stall, command)


if __name__ == "__main__":
    sys.exit(main())
