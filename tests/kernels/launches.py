"""Check what triton's C launcher receives from prepared launches; a program of its own, as triton must not interpret.

Prints a JSON object with an error, or "", for each check; `test_prepared` reads it. Set PYTHONPATH to try another
triton.
"""

from __future__ import annotations

import contextlib
import gc
import json
import sys
import threading
import traceback
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "bench" / "suites"))
import fake_driver
import triton
from triton.knobs import HookChain

import ppcl_kernels as pk
from ppcl_kernels._triton import TensorDescriptor
from ppcl_kernels.ada_layer_norm import prepare_ada_layer_norm
from ppcl_kernels.gated_residual import prepare_gated_residual
from ppcl_kernels.joint_attention import prepare_joint_attention
from ppcl_kernels.launch import TARGETS, Launch, Target
from ppcl_kernels.linear import prepare_linear
from ppcl_kernels.norm_rope import prepare_norm_rope
from ppcl_kernels.prepared import Bound
from ppcl_kernels.qkv_projection import prepare_qkv_projection
from ppcl_kernels.tools import aot

BF16 = torch.bfloat16
calls: list[tuple] = []
# Arguments are copied when they are recorded, since a list may be overwritten later.
driver = fake_driver.install(
    lambda *taken: calls.append(tuple(list(part) if isinstance(part, list) else part for part in taken)),
    lambda *about: ("descriptor", about),
)
checks: dict[str, Callable[[], None]] = {}


def check(function: Callable[[], None]) -> Callable[[], None]:
    checks[function.__name__] = function
    return function


def make(*shape: int, dtype: torch.dtype = BF16) -> torch.Tensor:
    # The memory is never touched, so it is never paged in.
    return torch.empty(*shape, dtype=dtype)


def plain(value: Any) -> Any:
    """Return an argument as the device would see it: an address for a tensor, None for an empty chain of hooks."""
    if isinstance(value, torch.Tensor):
        return value.data_ptr()
    if isinstance(value, HookChain) and not value.calls:
        return None
    if type(value).__name__ == "LazyDict":
        return None
    return [plain(part) for part in value] if isinstance(value, list | tuple) else value


def taken() -> tuple:
    """Return the one call of the C function since the last `taken`."""
    assert len(calls) == 1, f"{len(calls)} launches"
    return calls.pop()


def leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, list | tuple):
        for part in value:
            yield from leaves(part)
    else:
        yield value


def with_tensors(launch: Launch, tensors: dict[str, torch.Tensor]) -> Launch:
    arguments = dict(launch.arguments)
    for name, tensor in tensors.items():
        d = arguments[name]
        whole = isinstance(d, TensorDescriptor)
        arguments[name] = TensorDescriptor(tensor, d.shape, d.strides, d.block_shape) if whole else tensor
    return replace(launch, arguments=arguments)


def fresh(launch: Launch, names: list[str]) -> list[torch.Tensor]:
    bases = [getattr(launch.arguments[name], "base", launch.arguments[name]) for name in names]
    return [torch.empty_strided(t.shape, t.stride(), dtype=t.dtype) for t in bases]


def bind(launch: Launch, names: list[str]) -> Callable[..., None]:
    """Return a function that launches with other tensors under these names; its ``bound`` is tested."""
    bound = Bound([(name,) for name in names])

    def call(*tensors: torch.Tensor) -> None:
        bound(tensors, lambda: with_tensors(launch, dict(zip(names, tensors))))

    call.bound = bound
    return call


def bound_linear() -> tuple[Launch, list[str], Callable[..., None]]:
    target = TARGETS["sm_90"]
    case = next(c for c in aot.cases(target) if c.kernel == "linear" and "residual" in c.shape)
    launch = case.launch()
    names = [name for name in ("x0", "gate0", "residual0", "y0") if launch.arguments[name] is not None]
    bound = bind(launch, names)
    bound(*fresh(launch, names))
    taken()
    return launch, names, bound


@check
def every_case():
    """Every launch that is compiled for sm_90 passes the same arguments as the JIT would, at other addresses."""
    kernels = set()
    for case in aot.cases(TARGETS["sm_90"]):
        launch = case.launch()
        given = [n for n, v in launch.arguments.items() if isinstance(v, torch.Tensor | TensorDescriptor)]
        names = [n for n in given if not n.startswith(("w", "bias", "norm"))]
        bound = bind(launch, names)
        first, second = fresh(launch, names), fresh(launch, names)
        bound(*first)
        before = taken()
        assert not bound.bound.detour, (case, bound.bound.detour)
        bound(*second)
        direct = taken()
        with_tensors(launch, dict(zip(names, second))).run()
        assert plain(direct) == plain(taken()), case
        assert plain(direct) != plain(before), case
        addresses = set(leaves(plain(direct)))
        assert {t.data_ptr() for t in second} <= addresses and not {t.data_ptr() for t in first} & addresses, case
        # No tensors, about which the C function would ask CUDA, and no hooks.
        assert not any(isinstance(leaf, torch.Tensor | HookChain) for leaf in leaves(direct)), case
        kernels.add(case.kernel)
    assert kernels >= {"linear", "qkv_projection", "joint_attention", "key_ranges", "norm_rope", "ada_layer_norm"}


def linear_groups(w: Any, bias: Any, gate: bool, index: bool, tokens: tuple[int, ...]) -> list[pk.Linear]:
    gates = [make(2 if not index else 4, 64) if gate else None for _ in tokens]
    indexes = [torch.zeros(2, t, dtype=torch.int64) if index else None for t in tokens]
    residuals = [make(2, t, 64) if gate else None for t in tokens]
    xs = [make(2, t, 32) for t in tokens]
    return [pk.Linear(x, w, bias, None, *more) for x, *more in zip(xs, gates, indexes, residuals)]


def rope(kind: str, tokens: int) -> Any:
    if kind == "pairs":
        return torch.empty(tokens, 16), torch.empty(tokens, 16)
    if kind == "twice":
        return torch.empty(tokens, 32), torch.empty(tokens, 32)
    return torch.empty(tokens, 16, 2) if kind == "complex" else None


def operations() -> Iterator[tuple[str, Any, Callable[[], tuple]]]:
    """Yield name, prepared operation, and a function that makes arguments for it."""
    w, bias = make(64, 32), make(64)
    for gate, index, tokens in (
        (False, False, (24, 5)),
        (True, False, (24, 5)),
        (True, True, (24, 0)),
        (False, False, (7,)),
    ):

        def call(gate: bool = gate, index: bool = index, tokens: tuple[int, ...] = tokens) -> tuple:
            return (linear_groups(w, bias, gate, index, tokens),)

        yield f"linear {gate} {index} {tokens}", prepare_linear(*call(), activation="gelu"), call
    weights, biases, norms = (
        (make(64, 32), make(64, 32), make(64, 32)),
        (make(64), None, make(64)),
        (make(32), make(32)),
    )
    for kind, queries, chosen in (
        ("complex", True, None),
        ("pairs", False, None),
        ("twice", True, 1),
        ("none", True, None),
    ):
        heads = 2 if chosen is None else torch.zeros(1, dtype=torch.int32)

        def call(kind: str = kind, queries: bool = queries, heads: Any = heads) -> tuple:
            xs, ropes = [make(2, 5, 32), make(2, 24, 32)], [rope(kind, 5), rope(kind, 24)]
            asked = (queries, True)
            return [pk.Stream(x, weights, biases, norms, r, q) for x, r, q in zip(xs, ropes, asked)], heads

        yield f"qkv_projection {kind}", prepare_qkv_projection(*call(), 32), call

        def call(kind: str = kind, queries: bool = queries) -> tuple:
            raw = [tuple(make(2, t, 2, 32) for _ in range(3)) for t in (5, 24)]
            raw = [raw[0] if queries else (None, *raw[0][1:]), raw[1]]
            return raw, [norms] * 2, [rope(kind, 5), rope(kind, 24)], [biases] * 2

        raw, *others, added = call()
        yield f"norm_rope {kind}", prepare_norm_rope(raw, *others, 1e-6, added), call
    for masked in (False, True):

        def call(masked: bool = masked) -> tuple:
            q, k, v = make(2, 24, 2, 32), make(2, 29, 2, 32), make(2, 29, 2, 32)
            return q, k, v, torch.ones(2, 29, dtype=torch.bool) if masked else None

        yield f"joint_attention {masked}", prepare_joint_attention(*call()), call
    for index in (False, True):

        def call(index: bool = index) -> tuple:
            scale, shift = make(4 if index else 2, 64).chunk(2, 1)
            return make(2, 24, 32), scale, shift, torch.zeros(2, 24, dtype=torch.int64) if index else None

        def gated(index: bool = index) -> tuple:
            x, gate, _, token = call(index)
            return x, gate, make(2, 24, 32), token

        yield f"ada_layer_norm {index}", prepare_ada_layer_norm(*call()), call
        yield f"gated_residual {index}", prepare_gated_residual(*gated()), gated


@check
def every_operation():
    """Every launch of every prepared operation equals the launch that the JIT makes of the same tensors."""
    seen: list[tuple] = []
    through = Bound.__call__

    def spy(self: Bound, tensors: tuple, describe: Callable[[], Launch]) -> None:
        was_direct = not self.detour
        through(self, tensors, describe)
        direct = taken()
        assert not self.detour, self.detour
        describe().run()
        assert plain(direct) == plain(taken())
        addresses = {t.data_ptr() for t, names in zip(tensors, self._moving) if t is not None and names}
        seen.append((was_direct, addresses, set(leaves(plain(direct)))))

    with mock.patch.object(Bound, "__call__", spy):
        for name, prepared, call in operations():
            for turn in range(3):
                arguments, seen[:] = call(), []
                prepared(*arguments)
                assert seen and all(direct == (turn > 0) for direct, _, _ in seen), (name, turn)
                assert all(addresses <= passed for _, addresses, passed in seen), (name, turn)


@check
def memory():
    """A prepared operation keeps no tensor alive."""
    w, bias, x = make(64, 32), make(64), make(1, 8, 32)
    prepared = prepare_linear([pk.Linear(x, w[:48], bias[:48], 40)])
    outputs = [prepared([pk.Linear(make(1, 8, 32), w[:48], bias[:48], 40)]) for _ in range(3)]
    calls.clear()
    dead = [weakref.ref(t) for t in (w, bias, x, *(y for ys in outputs for y in ys))]
    del w, bias, x, outputs
    gc.collect()
    assert all(ref() is None for ref in dead)


@check
def alignment():
    """A tensor that no longer starts at a multiple of 16 bytes goes through the JIT, to a kernel for such addresses."""
    launch, names, bound = bound_linear()
    for strayed in ("gate0", "y0"):
        tensors = fresh(launch, names)
        at = names.index(strayed)
        tensors[at] = torch.empty(tensors[at].numel() + 1, dtype=BF16)[1:].view(tensors[at].shape)
        assert tensors[at].data_ptr() % 16 == 2
        bound(*fresh(launch, names))
        usual = plain(taken())
        bound(*tensors)
        detoured = plain(taken())
        with_tensors(launch, dict(zip(names, tensors))).run()
        # The handle of the kernel differs, since another kernel was compiled.
        assert detoured == plain(taken()) and detoured[4] != usual[4]
    # A kernel compiled for any address takes any.
    bound = bind(launch, names)
    bound(*tensors)
    for moved in (tensors, fresh(launch, names)):
        taken()
        bound(*moved)
        assert plain(calls[0])[4] == detoured[4]
        assert not any(isinstance(leaf, torch.Tensor) for leaf in leaves(calls[0]))
    taken()
    # A descriptor has to start at a multiple of 16 bytes; else the operation takes the kernel that uses pointers.
    w = make(64, 32)
    prepared = prepare_linear([pk.Linear(make(1, 8, 32), w)])
    strayed = torch.empty(8 * 32 + 1, dtype=BF16)[1:].view(1, 8, 32)
    for x in (make(1, 8, 32), strayed, make(1, 8, 32)):
        prepared([pk.Linear(x, w)])
        passed = list(leaves(plain(taken())))
        assert x.data_ptr() in passed and ("descriptor" in passed) == (x is not strayed)


@check
def presence():
    """A gate where there was none is another launch; no gate where there was one is an error."""
    w, x, gate = make(64, 32), make(1, 8, 32), make(1, 64)
    prepared = prepare_linear([pk.Linear(x, w)])
    for given in (None, None, gate, None):
        prepared([pk.Linear(x, w, None, None, given)])
        assert (gate.data_ptr() in leaves(plain(taken()))) == (given is gate)
    prepared = prepare_linear([pk.Linear(x, w, None, None, gate)])
    for _ in range(2):
        prepared([pk.Linear(x, w, None, None, gate)])
        taken()
    try:
        prepared([pk.Linear(x, w)])
    except AttributeError:
        assert not calls
    else:
        raise AssertionError("a launch with a gate ran without")


@check
def hooks():
    """Hooks around launches are called, and slow launches down only while they are installed."""
    launch, names, bound = bound_linear()

    def hook(metadata: Any) -> None: ...

    runtime = triton.knobs.runtime
    for chain in (runtime.launch_enter_hook, runtime.launch_exit_hook):
        chain.add(hook)
        bound(*fresh(launch, names))
        assert any(leaf is chain for leaf in leaves(taken()))
        chain.remove(hook)
        bound(*fresh(launch, names))
        assert not any(isinstance(leaf, HookChain) for leaf in leaves(taken()))
    seen = []
    launch.kernel.add_pre_run_hook(lambda *args, **kwargs: seen.append(kwargs))
    bound(*fresh(launch, names))
    taken()
    launch.kernel.pre_run_hooks.clear()
    assert len(seen) == 1


@check
def fallbacks():
    """With an unknown launcher, or one that needs more, every launch goes through the JIT with the same result."""
    usual = driver.launcher_cls

    class Scratch(usual):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            self.global_scratch_size, self.global_scratch_align = 64, 16

    class Renamed(usual):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            self.launch_it = self.__dict__.pop("launch")

        def __call__(self, *args: Any) -> None:
            self.launch = self.launch_it
            super().__call__(*args)
            del self.launch

    class Other(usual):
        def __call__(self, *args: Any) -> None:
            super().__call__(*args[:-1], "another")

    class Streams(usual):
        def __call__(self, x: int, y: int, z: int, stream: int, *args: Any) -> None:
            super().__call__(x, y, z, stream + 0, *args)

    class Twice(usual):
        def __call__(self, *args: Any) -> None:
            super().__call__(*args)
            super().__call__(*args)

    def run(bound: Callable[..., None], launch: Launch, names: list[str]) -> None:
        for _ in range(2):
            tensors = fresh(launch, names)
            calls.clear()
            bound(*tensors)
            bound_calls = [plain(call) for call in calls]
            calls.clear()
            with_tensors(launch, dict(zip(names, tensors))).run()
            assert bound_calls == [plain(call) for call in calls] and bound_calls

    launch, names, _ = bound_linear()
    allocator = mock.patch("triton.runtime._allocation._allocator", mock.Mock(get=lambda: lambda *_: 4096))
    for launcher, backend, why in (
        (Scratch, "cuda", "scratch"),
        (Renamed, "cuda", "launch"),
        (Other, "cuda", "passes"),
        (Streams, "cuda", "stream"),
        (Twice, "cuda", "once"),
        (usual, "hip", "backend"),
    ):
        driver.launcher_cls, driver.backend = launcher, backend
        launch.kernel.device_caches.clear()
        bound = bind(launch, names)
        with allocator:
            run(bound, launch, names)
        assert why in bound.bound.detour, (launcher, bound.bound.detour)
    driver.launcher_cls, driver.backend = usual, "cuda"
    launch.kernel.device_caches.clear()
    calls.clear()
    bound = bind(launch, names)
    with mock.patch.object(triton.knobs.compilation, "instrumentation_mode", "something"):
        run(bound, launch, names)
    assert "instrumented" in bound.bound.detour


@check
def devices():
    """A launch goes to the device of its tensors, current or not, and to the current stream of that device."""
    launch, names, bound = bound_linear()
    driver.device, driver.stream = 1, 9
    entered = []

    @contextlib.contextmanager
    def device(index: int) -> Iterator[None]:
        entered.append(index)
        driver.device, before = index, driver.device
        yield
        driver.device = before

    with mock.patch("torch.cuda.device", device):
        bound(*fresh(launch, names))
    assert entered == [0] and driver.device == 1 and plain(taken())[3] == 9
    driver.device, driver.stream = 0, 7
    bound(*fresh(launch, names))
    assert plain(taken())[3] == 7 and entered == [0]


@check
def threads():
    """Threads that call one prepared launch do not mix their tensors, from the first call on."""
    launch, names, _ = bound_linear()
    bound, errors = bind(launch, names), []
    sys.setswitchinterval(1e-6)
    own = [fresh(launch, names) for _ in range(4)]
    fill = driver.utils.fill_tma_descriptor

    def work(tensors: list[torch.Tensor]) -> None:
        try:
            for _ in range(200):
                bound(*tensors)
        except BaseException as error:  # reported to the test
            errors.append(error)

    workers = [threading.Thread(target=work, args=(tensors,)) for tensors in own]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not errors and not bound.bound.detour and len(calls) == 800 and fill is driver.utils.fill_tma_descriptor
    sets = [{t.data_ptr() for t in tensors} for tensors in own]
    everyone = set.union(*sets)
    launched = [set(leaves(plain(call))) & everyone for call in calls]
    assert [launched.count(addresses) for addresses in sets] == [200] * 4
    calls.clear()


@check
def bench():
    """`bench_host` measures nine launches and their sum, and fails if one does not go straight to the kernel."""
    import bench_host

    # A kernel compiled for this file's driver would be launched by this file's driver.
    for module in [m for name, m in sys.modules.items() if name.startswith("ppcl_kernels.")]:
        for kernel in vars(module).values():
            if isinstance(kernel, triton.runtime.JITFunction):
                kernel.device_caches.clear()
    with mock.patch.multiple(bench_host, ROUNDS=2, ROUND_SECONDS=1e-4):
        results = bench_host.work(public=False)
    block = results.pop("block")
    assert {"qkv_projection", "joint_attention", "out", "up", "down"} < set(results) and len(results) == 9
    assert all(us > 0 for us in results.values()) and block > max(results.values())


def main() -> None:
    Target.of = classmethod(lambda cls, device: TARGETS["sm_90"])
    aot._meta = make
    results = {}
    for name, function in checks.items():
        calls.clear()
        try:
            function()
            results[name] = ""
        except Exception:  # reported to the test
            results[name] = traceback.format_exc()
    print(json.dumps({"triton": triton.__version__, "results": results}, indent=1))


if __name__ == "__main__":
    main()
