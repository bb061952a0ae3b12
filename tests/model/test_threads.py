"""One model in several threads and tasks: budgets, shapes, schedules at once; what is set while others sample."""

from __future__ import annotations

import asyncio
import gc
import itertools
import sys
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from recorder import Recorder

import ppcl_rt
from ppcl_rt import Interval, PlannedBlock, Schedule, Width
from ppcl_rt.families.qwen_image import PPCLQwenImageTransformerBlock
from ppcl_rt.model import residency, switching
from ppcl_rt.model.graphs import Graphs
from ppcl_rt.ops.implementation import TORCH, Key
from ppcl_rt.ops.table import ImplementationTable

SHAPES = (
    {"batch": 1, "text": 5, "images": ((1, 2, 3),)},
    {"batch": 2, "text": 7, "images": ((1, 3, 5),)},
    {"batch": 3, "text": 1, "images": ((1, 4, 4),), "mask": "none"},
)
TIMESTEPS = (0.9, 0.3)
NARROW = Width(heads=2, image=50, text=64, modulation=32)
MIDDLE = Width(heads=3, image=96, text=64, modulation=5)
THREADS = 8


@pytest.fixture(autouse=True)
def switch_often():
    """Threads take turns fifty times as often: what can come in between does."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-4)
    yield
    sys.setswitchinterval(before)


def together(*works):
    """Run these at once, each in a thread; raise what one of them raises."""
    start = threading.Barrier(len(works))

    def begin(work):
        start.wait(timeout=30)
        return work()

    with ThreadPoolExecutor(len(works)) as pool:
        return [future.result(timeout=120) for future in [pool.submit(begin, work) for work in works]]


def of_width(catalog, width):
    """The plan with all blocks at a width."""
    return catalog.compose((n, width) for n in range(catalog.architecture.depth))


def one_block(made, n):
    """The plan of a single narrow block."""
    return made.plan(PlannedBlock(interval=Interval(n, n), width=NARROW))


def runs_what_it_holds(model):
    """Whether the blocks that run now are in the model."""
    held = {id(module) for module in model.modules()}
    return all(id(call.block) in held for call in model._program().calls)


# Everything at once.


class Told:
    """What was set when, by tickets: which choices may have been current during a call."""

    def __init__(self, first):
        self.tickets, self.sets = itertools.count(1), [[0, 0, first]]

    def set(self, choice, call):
        entry = [next(self.tickets), float("inf"), choice]
        self.sets.append(entry)
        call()
        entry[1] = next(self.tickets)

    def current(self, begin, end):
        """What was set during a call, or before it and not replaced by what was set afterwards and before the call."""
        sets = [entry for entry in self.sets if entry[0] < end]
        last = [s[2] for s in sets if not any(s[1] < later[0] and later[1] < begin for later in sets)]
        return list(itertools.chain(*last))


def everything(made, build_inputs, run, calls):
    """8 threads that sample, set and trim at random: shape, timestep, output and the plans that it may be of."""
    model = ppcl_rt.load(made.folder, 0.7)
    whole, shape = made.catalog.architecture.dense_params, ppcl_rt.Tokens(image=15, text=7, batch=2)
    budgets = [{"ratio": ratio} for ratio in (0.6, 0.75, 0.9, 1.0)]
    flops = made.catalog.architecture.dense_flops(shape)
    budgets += [{"params": 0.65 * whole}, {"params": 0.8 * whole}, {"flops": 0.7 * flops, "shape": shape}]
    budgets += [{"memory": int(2.8 * whole)}, {"memory": int(3.5 * whole)}]
    schedules = [Schedule.warm(1, 0.6), Schedule(phases=((0, of_width(made.catalog, NARROW)), (1, 0.9)))]
    told, outputs = Told([model.plan]), []

    def forward(rng, plans=None):
        n, t = int(rng.integers(len(SHAPES))), TIMESTEPS[rng.integers(len(TIMESTEPS))]
        inputs = {**build_inputs(**SHAPES[n]), "timestep": torch.full((SHAPES[n]["batch"],), t)}
        begin = next(told.tickets)
        output = run(model, inputs)
        outputs.append((n, t, output, plans, begin, next(told.tickets)))

    def work(seed):
        rng = np.random.default_rng(seed)
        for _ in range(calls):
            budget, draw = budgets[rng.integers(len(budgets))], rng.random()
            plan = model.plan_of(ppcl_rt.Budget.of(**budget))
            if draw < 0.45:
                with model.at(**budget):
                    forward(rng, [plan])
                continue
            if draw < 0.6:
                told.set([plan], lambda budget=budget: model.set_budget(**budget))
            elif draw < 0.7:
                schedule = schedules[rng.integers(len(schedules))]
                plans = [model.plan_of(choice) for _, choice in schedule.phases]
                told.set(plans, lambda schedule=schedule: model.set_schedule(schedule))
            elif draw < 0.8:
                model.trim()
            forward(rng)

    together(*(lambda seed=seed: work(seed) for seed in range(THREADS)))
    assert len(outputs) == THREADS * calls and runs_what_it_holds(model)
    return [(n, t, output, plans or told.current(begin, end)) for n, t, output, plans, begin, end in outputs]


@pytest.mark.parametrize(
    ("checkpoint", "calls"),
    [("made", 15), *(pytest.param(name, 50, marks=pytest.mark.slow) for name in ("made", "mapped"))],
)
def test_everything_at_once(request, checkpoint, calls, build_inputs, run):
    """8 threads x some calls: each output is that of one of the budgets set during the call, made alone."""
    made, alone = request.getfixturevalue(checkpoint), {}
    models: dict[ppcl_rt.Plan, object] = {}

    def wanted(plan, n, t):
        if plan not in models:
            models[plan] = ppcl_rt.load(made.folder, plan=plan)
        if (plan, n, t) not in alone:
            inputs = {**build_inputs(**SHAPES[n]), "timestep": torch.full((SHAPES[n]["batch"],), t)}
            alone[plan, n, t] = run(models[plan], inputs)
        return alone[plan, n, t]

    for n, t, output, plans in everything(made, build_inputs, run, calls):
        # Rounding: see the fixture `same`.
        assert any((output - wanted(plan, n, t)).abs().max() <= 1e-5 for plan in dict.fromkeys(plans))
    # No two alike: a wrong one would show.
    for n, t in itertools.product(range(len(SHAPES)), TIMESTEPS):
        of = [output for (_, m, u), output in alone.items() if (m, u) == (n, t)]
        assert all((a - b).abs().max() > 1e-4 for a, b in itertools.combinations(of, 2))


# What a forward began with.


@pytest.mark.parametrize("width", [MIDDLE, pytest.param(NARROW, marks=pytest.mark.slow)])
def test_a_block_that_grows_is_whole(mapped, build_inputs, run, monkeypatch, width):
    """Forwards of a narrow plan come between any two tensors that a wide plan reads, and are right."""
    narrow = of_width(mapped.catalog, width)
    model, inputs = ppcl_rt.load(mapped.folder, plan=narrow), build_inputs()
    wanted, assign, wrong = run(model, inputs), residency.assign, []

    def between(block, missing, tensor):
        assign(block, missing, tensor)
        try:
            # A thread of its own is not let in where another reads: this plan is resident and needs no lock.
            with ThreadPoolExecutor(1) as pool:
                assert torch.equal(pool.submit(run, model, inputs).result(30), wanted)
        except Exception as error:
            wrong.append((missing.name, error))

    monkeypatch.setattr(residency, "assign", between)
    model.set_plan(mapped.catalog.dense)
    assert not wrong


def test_a_forward_keeps_its_blocks(made, build_inputs, run, same, monkeypatch):
    """Growth and `trim` in the middle of a forward change nothing of it; what it ran on is freed when it has ended."""
    narrow = of_width(made.catalog, NARROW)
    model, inputs = ppcl_rt.load(made.folder, plan=narrow), build_inputs()
    wanted, before = run(model, inputs), weakref.ref(model.transformer_blocks[2])
    weight = weakref.ref(before().attn.to_q.weight)
    reached, go_on, attention = threading.Event(), threading.Event(), PPCLQwenImageTransformerBlock.attention

    def paused(block, *args):
        if not reached.is_set():
            reached.set()
            assert go_on.wait(30)
        return attention(block, *args)

    with monkeypatch.context() as patched, ThreadPoolExecutor(1) as pool:
        patched.setattr(PPCLQwenImageTransformerBlock, "attention", paused)
        output = pool.submit(run, model, inputs)
        assert reached.wait(30)
        try:
            model.set_plan(made.catalog.dense)
            assert model.transformer_blocks[2] is not before() and before().width == NARROW
            model.set_plan(one_block(made, 0))
            model.trim()
            gc.collect()
            assert before() is not None and list(model.transformer_blocks._modules) == ["0"]
        finally:
            go_on.set()
        assert torch.equal(output.result(30), wanted)
    gc.collect()
    assert before() is None and weight() is None
    model.set_plan(narrow)
    same(run(model, inputs), wanted)


def test_growth_shares_and_follows(made, build_inputs, run, same):
    """A block that grew shares what it held already, frees the rest, and is what narrower plans train and run."""
    narrow, inputs = of_width(made.catalog, NARROW), build_inputs()
    model = ppcl_rt.load(made.folder, plan=narrow)
    old = model.transformer_blocks[1]
    norm, gone, hooked = old.attn.norm_q.weight, weakref.ref(old.attn.to_q.weight), []
    handle = old.register_forward_hook(lambda *_: hooked.append(1))
    wanted = run(model, inputs)
    with model.at(plan=narrow):
        model.set_plan(made.catalog.dense)
        grown = model.transformer_blocks[1]
        assert grown.attn.norm_q.weight is norm and grown is not old
        assert model.resident_bytes == 4 * made.catalog.architecture.dense_params
        same(run(model, inputs), wanted)
        with torch.no_grad():
            grown.attn.to_q.weight *= 2
        assert (run(model, inputs) - wanted).abs().max() > 1e-3
    model.set_plan(narrow)
    assert (run(model, inputs) - wanted).abs().max() > 1e-3
    del old
    gc.collect()
    assert gone() is None and len(hooked) == 4
    handle.remove()
    run(model, inputs)
    assert len(hooked) == 4


def test_a_block_that_others_hold_on_to_grows_itself(made, build_inputs, run):
    """A forward that was put around a block stays around it: such a block grows in place."""
    model, calls = ppcl_rt.load(made.folder, plan=of_width(made.catalog, NARROW)), []
    block = model.transformer_blocks[1]
    forward = block.forward
    block.forward = lambda *args, **kwargs: calls.append(1) or forward(*args, **kwargs)
    model.set_plan(made.catalog.dense)
    run(model, build_inputs())
    assert model.transformer_blocks[1] is block and calls


@pytest.mark.parametrize("scheduled", [False, True])
def test_a_forward_sees_the_old_or_the_new(made, scheduled):
    """Something is set between any two lines of the choice of a program: no error, no plan that nobody set."""
    model = ppcl_rt.load(made.folder, resident="all")
    plan, other = model.planner.plan(0.6), model.planner.plan(0.75)
    sets = [lambda: model.set_plan(plan), lambda: model.set_schedule(Schedule.constant(other))]

    def line(frame, event, _):
        if event == "line":
            sets[next(turns) % 2]()
        return line

    for turns in (itertools.count(), itertools.count(1)):
        sets[scheduled]()
        before = sys.gettrace()
        sys.settrace(lambda frame, *_: line if frame.f_code.co_name == "_program" else None)
        try:
            program = model._program(torch.ones(1))
        finally:
            sys.settrace(before)
        assert program.plan in (plan, other) and next(turns) > 2


def test_trim_against_set(made, monkeypatch):
    """What is set while another thread trims stays in the model."""
    model = ppcl_rt.load(made.folder, 1.0)
    plan_of, trimming = type(model).plan_of, []

    def slow(self, choice):
        # Whatever `trim` asks for before it drops blocks, a thread that sets comes in between.
        if trimming == [threading.current_thread()]:
            time.sleep(0.05)
        return plan_of(self, choice)

    monkeypatch.setattr(type(model), "plan_of", slow)

    def trim():
        trimming[:] = [threading.current_thread()]
        model.trim()

    def set_plan(plan):
        time.sleep(0.02)
        model.set_plan(plan)

    for n in range(6):
        together(trim, lambda n=n: set_plan(one_block(made, 3 * (n % 2))))
        assert runs_what_it_holds(model)


def test_walking_the_model_while_it_changes(made):
    """Parameters can be counted, and modules listed, while blocks come and go."""
    model, end = ppcl_rt.load(made.folder, 0.6), time.monotonic() + 0.5

    def setting():
        while time.monotonic() < end:
            model.set_ratio(1.0)
            model.set_budget(memory=int(2.6 * made.catalog.architecture.dense_params))

    def counting():
        while time.monotonic() < end:
            assert model.resident_bytes > 0 and list(model.named_modules())

    together(setting, counting, counting)


def test_graphs_let_go(make_checkpoint, tmp_path, build_inputs, run):
    """What runs on after its blocks were dropped makes no graph, which would keep them."""
    made = make_checkpoint(tmp_path / "checkpoint", students=((0, 1),), num_layers=2)
    model, inputs = ppcl_rt.load(made.folder), build_inputs()
    model._graphs = Graphs(True, backend=Recorder())
    dropped = weakref.ref(model.transformer_blocks[1])
    with model.at(ratio=1.0):
        wanted = run(model, inputs)
        together(lambda: (model.set_plan(one_block(made, 0)), model.trim()))
        for _ in range(3):
            assert torch.equal(run(model, inputs), wanted)
    gc.collect()
    assert dropped() is None


# Schedules, threads and tasks.


def seen(model, plans, timesteps):
    """The numbers of the plans that run at each timestep."""
    return [plans.index(model._program(torch.tensor([t])).plan) for t in timesteps]


def test_tasks_have_their_own_clocks(made):
    """Tasks of one thread, by turns, each count their own steps, also those made in the middle of a sampling."""
    model = ppcl_rt.load(made.folder, resident="all")
    plans = [model.planner.plan(ratio) for ratio in (1.0, 0.75, 0.6)]
    model.set_schedule(Schedule(phases=tuple(enumerate(plans))))

    async def sample(timesteps):
        found = []
        for t in timesteps:
            found += seen(model, plans, [t])
            await asyncio.sleep(0)
        return found

    async def main():
        own = seen(model, plans, [1.0])
        tasks = [asyncio.create_task(sample(timesteps)) for timesteps in ((0.9, 0.6, 0.3), (0.8, 0.5, 0.2))]
        await asyncio.sleep(0)
        own += seen(model, plans, [0.4])
        late = asyncio.create_task(sample((0.3, 0.1)))
        return [*await asyncio.gather(*tasks, late), own + seen(model, plans, [0.1])]

    assert asyncio.run(main()) == [[0, 1, 2], [0, 1, 2], [0, 1], [0, 1, 2]]


def test_clocks_end_with_their_threads(made):
    """Threads and tasks that have ended leave nothing in the model, and no later one goes on with their count."""
    model = ppcl_rt.load(made.folder, resident="all")
    plans = [model.planner.plan(ratio) for ratio in (1.0, 0.6)]
    model.set_schedule(Schedule(phases=tuple(enumerate(plans))))

    def size():
        return sum(len(value) for value in vars(model).values() if isinstance(value, dict))

    before, ended = size(), []

    def work(t):
        ended.append(weakref.ref(threading.current_thread()))
        assert seen(model, plans, [t]) == [0]

    async def task(t):
        ended.append(weakref.ref(asyncio.current_task()))
        assert seen(model, plans, [t]) == [0]

    for n in range(20):
        # Lower and lower: a clock that was kept would count on.
        together(lambda n=n: work(0.9 - n / 40))
        asyncio.run(task(0.89 - n / 40))
    gc.collect()
    assert size() == before and not any(runner() for runner in ended)


def test_at_wins(made):
    """`at` wins over what other threads set meanwhile, a schedule too, also in tasks made inside the ``with``."""
    model = ppcl_rt.load(made.folder, resident="all")
    plan, other, third = (model.planner.plan(ratio) for ratio in (0.6, 0.75, 1.0))

    async def inside(wanted):
        assert model.plan == wanted
        with model.at(plan=third):
            await asyncio.sleep(0)
            assert model._program(torch.ones(1)).plan == third
        assert model.plan == wanted

    async def main():
        with model.at(plan=plan):
            tasks = [asyncio.create_task(inside(plan)) for _ in range(3)]
            await asyncio.to_thread(model.set_schedule, Schedule.constant(other))
            await asyncio.to_thread(model.trim)
            assert model._program(torch.ones(1)).plan == plan == await asyncio.to_thread(lambda: model.plan)
        await asyncio.gather(*tasks, asyncio.create_task(inside(other)))

    asyncio.run(main())
    assert model.plan == other


# What is found once.


def test_measured_once(made, monkeypatch):
    """Threads that ask for the milliseconds of a shape at once measure them once."""
    model, calls = ppcl_rt.load(made.folder), []

    def measure(*_):
        calls.append(1)
        time.sleep(0.05)
        return object()

    monkeypatch.setattr(switching, "block_times", measure)
    assert len(set(together(*[model.times] * 4))) == len(calls) == 1


def test_chosen_once(tmp_path):
    """Threads that meet a shape at once choose its implementation once, and no other is measured meanwhile."""
    busy, calls = [], []

    def clock(_):
        busy.append(1)
        most = len(busy)
        time.sleep(0.02)
        busy.pop()
        calls.append(most)
        return 1.0

    table, keys = ImplementationTable(tmp_path / "table.json", {}, clock), [Key("a", (1,)), Key("b", (1,))]
    together(*(lambda n=n: table.fastest(keys[n % 2], lambda: [TORCH], lambda _: torch.ones(1)) for n in range(6)))
    assert calls == [1, 1] and set(table._read(table.path)) == set(keys)
