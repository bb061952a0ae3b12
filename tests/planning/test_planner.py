"""The planner is exact: brute force over every plan of small catalogs finds nothing better."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator

import numpy as np
import pytest
from catalogs import architecture, random_catalog, seeded
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import ppcl_rt
from ppcl_rt import Catalog, Interval, LegalCount, LegalWidths, Planner, Schedule, Student, TextRun, Width
from ppcl_rt.planning.architecture import Tokens
from ppcl_rt.planning.block_spec import ALL_UPDATED, TEXT_NOT_UPDATED, BlockSpec, Group, Part, Segment
from ppcl_rt.planning.budget import Limit
from ppcl_rt.planning.costs import Params


def coverings(catalog: Catalog, block: int = 0) -> Iterator[list[Interval]]:
    """Every set of disjoint students."""
    if block == catalog.architecture.depth:
        yield []
        return
    yield from coverings(catalog, block + 1)
    for student in catalog.students:
        if student.interval.first == block:
            for rest in coverings(catalog, student.interval.last + 1):
                yield [student.interval, *rest]


def runs_beside(catalog: Catalog, students: list[Interval]) -> Iterator[list[TextRun]]:
    """Every set of disjoint text runs over blocks that no student stands in for."""
    covered = {block for interval in students for block in interval}
    free = [run for run in catalog.text_runs if not covered & set(run.interval)]
    for size in range(len(free) + 1):
        for runs in itertools.combinations(free, size):
            blocks = [block for run in runs for block in run.interval]
            if len(blocks) == len(set(blocks)):
                yield list(runs)


def all_plans(catalog: Catalog) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Parameters, FLOPs at the reference shape and predicted loss of every plan there is."""
    whole, found = catalog.architecture, []
    image, text, _ = catalog.reference

    def costs(spec: BlockSpec, not_updated, **counts: int) -> np.ndarray:
        params = spec.fixed_params(not_updated) + sum(spec.group_params(g, n, not_updated) for g, n in counts.items())
        return np.array([params, spec.flops(Width(counts), image, text, not_updated)])

    for students in coverings(catalog):
        kept = [n for n in range(whole.depth) if not any(n in interval for interval in students)]
        for runs in runs_beside(catalog, students):
            skipping = {block for run in runs for block in run.interval if block != run.interval.first}
            runnable = [(catalog.blocks[n], TEXT_NOT_UPDATED if n in skipping else ALL_UPDATED) for n in kept]
            runnable += [(catalog.student(interval).widths, ALL_UPDATED) for interval in students]
            total = np.array([[whole.outer_params + sum(whole.run_params(run.interval) for run in runs)]])
            total = np.append(total, [[sum(whole.run_flops(run.interval, text) for run in runs)]], 0)
            lost = np.array([sum(catalog.student(i).loss for i in students) + sum(run.loss for run in runs)])
            for widths, not_updated in runnable:
                spec = whole.spec(0)
                fixed = costs(spec, not_updated)
                total = total + fixed[:, None]
                for group in spec.groups_without(not_updated):
                    counts = [costs(spec, not_updated, **{group: n}) - fixed for n, *_ in widths.of(group)]
                    total = (total[:, :, None] + np.array(counts).T[:, None]).reshape(2, -1)
                    lost = np.add.outer(lost, [legal.loss for legal in widths.of(group)]).ravel()
            found.append((*total, lost))
    params, flops, losses = (np.concatenate(column) for column in zip(*found, strict=True))
    return params, flops, losses


def check_exact(catalog: Catalog, ratios: np.ndarray) -> None:
    planner, (params, flops, losses) = Planner(catalog), all_plans(catalog)
    dense, dense_flops = catalog.architecture.dense_params, catalog.architecture.dense_flops(catalog.reference)
    full = losses.argmin()
    assert losses.min() == 0 and (params[full], flops[full]) == (dense, dense_flops)
    shares = np.maximum(params / dense, flops / dense_flops)
    assert planner.smallest == shares.min()
    for ratio in map(float, ratios):
        fits = shares <= ratio
        if not fits.any():
            with pytest.raises(ValueError, match="smallest"):
                planner.plan(ratio)
            continue
        plan = planner.plan(ratio)
        assert not plan.skipped and plan.checkpoint == catalog.fingerprint
        assert catalog.ratio(plan) <= ratio
        # Both are sums of the same numbers, perhaps in another order: 16 additions of float64.
        assert catalog.loss(plan) == pytest.approx(losses[fits].min(), rel=1e-14)


@settings(seeded, max_examples=25)
@given(seed=st.integers(0, 10**6), depth=st.integers(3, 4), students=st.integers(0, 3))
def test_exact_against_brute_force(seed, depth, students):
    """No plan within the budget loses less, for random catalogs, students that overlap, and any ratio."""
    rng = np.random.default_rng(seed)
    check_exact(random_catalog(rng, depth, students), rng.uniform(0.3, 1.0, 4))


@settings(seeded, max_examples=15)
@given(seed=st.integers(0, 10**6))
def test_exact_where_losses_differ_by_orders_of_magnitude(seed):
    """Small losses are not lost in the solver's tolerance beside large ones (a student may lose 1e6 times more)."""
    rng = np.random.default_rng(seed)
    check_exact(random_catalog(rng, 3, 2, losses=(1e-7, 10.0)), rng.uniform(0.5, 1.0, 4))


@pytest.mark.parametrize("seed", range(4))
def test_a_plan_is_found_at_its_own_ratio(seed):
    """A budget that a plan just fits is enough for it; one parameter less is not, also at the size of Qwen-Image."""
    rng = np.random.default_rng(seed)
    full = Width(heads=24, image=12288, text=12288, modulation=3072)

    def widths() -> LegalWidths:
        return LegalWidths(
            **{
                group: (
                    LegalCount(n, 0.0),
                    *(LegalCount(c, n / c - 1 + rng.random() / 99) for c in (n * 3 // 4, n // 2 - 3)),
                )
                for group, n in full.items()
            }
        )

    catalog = Catalog(
        family="qwen-image",
        reference=Tokens(16, 7),
        architecture=architecture(4, full, 128, outer_params=10**7),
        blocks=tuple(widths() for _ in range(4)),
        students=(Student(interval=Interval(1, 2), start="first", loss=0.7, widths=widths()),),
    )
    planner, dense = Planner(catalog), catalog.architecture.dense_params
    for ratio in rng.uniform(0.6, 1.0, 5):
        plan = planner.plan(float(ratio))
        params = catalog.architecture.params(plan)
        again = planner.plan((Limit(Params(), params / dense * dense),))
        # The budget is a product of rounded floats, so half a parameter either way is all it can promise.
        assert catalog.architecture.params(again) <= params + 0.5
        assert catalog.loss(again) <= catalog.loss(plan) * (1 + 1e-12)
        assert catalog.architecture.params(planner.plan((Limit(Params(), params - 1),))) <= params - 0.5


@pytest.mark.parametrize("seed", range(8))
def test_whole_ratio_is_dense(seed):
    """Ratio 1 is the teacher, however little the narrower counts lose."""
    for low in (1e-2, 1e-9):
        catalog = random_catalog(np.random.default_rng(seed), 4, 3, losses=(low, 1.0))
        assert Planner(catalog).plan(1.0) == catalog.dense
        assert Planner(catalog).plan(1) == catalog.dense


@pytest.mark.parametrize("seed", range(8))
def test_below_the_smallest(seed):
    """Too small a ratio is refused in one line, which names a ratio that works."""
    planner = Planner(random_catalog(np.random.default_rng(seed), 4, 2))
    smallest = planner.smallest
    assert planner.catalog.ratio(planner.plan(smallest)) == smallest
    for ratio in (smallest * 0.999, smallest / 2, 1e-9):
        with pytest.raises(ValueError, match="smallest") as caught:
            planner.plan(ratio)
        assert "\n" not in str(caught.value)
        named = float(re.findall(r"\d\.\d+", str(caught.value))[-1])
        # The message has four decimals.
        assert named == pytest.approx(smallest, abs=1e-4)
        assert planner.catalog.ratio(planner.plan(named)) == pytest.approx(smallest, abs=1e-4)


def test_loss_falls_with_ratio():
    """A larger budget never loses more."""
    catalog = random_catalog(np.random.default_rng(5), 6, 5)
    planner = Planner(catalog)
    losses = [catalog.loss(planner.plan(float(r))) for r in np.linspace(planner.smallest, 1.0, 30)]
    assert losses == sorted(losses, reverse=True) and losses[-1] == 0 and losses[0] > losses[15] > 0


@pytest.mark.parametrize(
    "ratio", [0, 0.0, -1, -0.5, 1.5, 1 + 1e-9, float("nan"), float("inf"), "half", None, True, [0.5]]
)
def test_no_ratio(made, ratio):
    """What is no number in (0, 1] is refused by type and by value, with the value in the message."""
    planner = Planner(made.catalog)
    # An answer that is remembered for 1.0 is none for True, which equals it.
    planner.plan(1.0)
    for ask in (planner.plan, lambda r: ppcl_rt.load(made.folder, r)):
        with pytest.raises(ValueError) as caught:
            ask(ratio)
        assert repr(ratio) in str(caught.value) and "\n" not in str(caught.value)


def test_dense_params_are_those_of_stock(made):
    """`Architecture.dense_params` counts what the stock model has."""
    count = sum(parameter.numel() for parameter in made.stock.parameters())
    assert made.catalog.architecture.dense_params == count == made.catalog.architecture.params(made.catalog.dense)


@pytest.mark.parametrize("kind", ["made", "compensated"])
def test_params_are_those_resident(kind, request):
    """`Architecture.params` counts what lies in memory after loading at that plan, with fitted layers or without."""
    made = request.getfixturevalue(kind)
    rng = np.random.default_rng(2)
    for n in range(8):
        # A fitted layer takes the place of the full one at its own count.
        plan = made.random_plan(rng, skip=0.1, legal=kind == "compensated" or n % 2 == 0)
        model = ppcl_rt.load(made.folder, plan=plan)
        assert sum(parameter.numel() for parameter in model.parameters()) == made.catalog.architecture.params(plan)
        assert model.resident_bytes == 4 * made.catalog.architecture.params(plan)


@pytest.mark.parametrize("ratio", [0.6, 0.75, 0.9, 1.0])
def test_budget_holds_in_memory(made, ratio):
    """The parameters that `load` leaves in memory are within the ratio that was asked for."""
    model = ppcl_rt.load(made.folder, ratio=ratio)
    held = sum(parameter.numel() for parameter in model.parameters())
    whole = sum(parameter.numel() for parameter in made.stock.parameters())
    assert held <= ratio * whole and held == made.catalog.architecture.params(model.plan)


def test_flops_are_those_counted(made, build_inputs):
    """`Architecture.flops` = what torch counts in the blocks of a forward."""
    rng, inputs = np.random.default_rng(4), build_inputs(mask="none")
    model = ppcl_rt.load(made.folder, resident="all")
    empty = made.plan()
    counts = {}
    for plan in (empty, made.catalog.dense, made.random_plan(rng), made.random_plan(rng, skip=0.5)):
        model.set_plan(plan)
        # torch counts nothing for its fused attention on a CPU.
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            model(**inputs)
        counts[plan] = counter.get_total_flops()
    outside = counts.pop(empty)
    for plan, count in counts.items():
        assert made.catalog.architecture.flops(plan, image_tokens=15, text_tokens=7, batch=3) == count - outside


def test_plans_near_a_timestep_go_by_its_band():
    """What loses nothing at high noise and much at low noise is cut there and not here; a schedule takes both."""
    catalog = random_catalog(np.random.default_rng(3), 4, 0)
    full = catalog.dense.blocks[0].width

    def widths(parts: tuple[float, float]) -> LegalWidths:
        half = (LegalCount(full["image"] // 2, sum(parts), parts),)
        return LegalWidths({**LegalWidths.only(full).root, "image": (LegalCount(full["image"], 0.0), *half)})

    blocks = tuple(widths((1e-6, 0.5) if n % 2 else (0.5, 1e-6)) for n in range(4))
    timed = catalog.model_copy(update={"blocks": blocks, "text_runs": (), "edges": (0.0, 0.5, 1.0)})
    timed = Catalog.model_validate(timed.model_dump())
    planner = Planner(timed)
    cut_width = full.replace(image=full["image"] // 2)
    ratio = timed.ratio(timed.compose([(n, cut_width if n < 2 else full) for n in range(4)]))
    for timestep, cut in ((0.1, [1, 3]), (0.9, [0, 2]), (1.0, [0, 2]), (0.0, [1, 3])):
        plan = planner.plan(ratio, timestep)
        assert [n for n, block in enumerate(plan.blocks) if block.width["image"] < full["image"]] == cut
    schedule = Schedule.near(planner, ratio, [1.0, 0.9, 0.6, 0.3, 0.05])
    assert [begin for begin, _ in schedule.phases] == [0, 3]
    with pytest.raises(ValueError, match="not measured by timestep"):
        Planner(catalog).plan(0.9, 0.5)
    with pytest.raises(ValueError, match="1 is noise"):
        planner.plan(0.9, 1.5)


def test_bands_are_checked():
    catalog = random_catalog(np.random.default_rng(3), 3, 1).model_dump()
    for edges in ((0.0, 0.5, 1.0), (0.0, 1.0), (0.5, 1.0), (0.0, 1.0, 0.5)):
        with pytest.raises(ValueError, match="band"):
            Catalog.model_validate({**catalog, "edges": edges})


def test_spaced_plans_are_the_smallest_and_those_at_every_multiple():
    catalog = random_catalog(np.random.default_rng(3), 3, 3)
    planner = Planner(catalog)
    # A ratio of four digits that can be had, and no more than one unit of the last digit above the smallest.
    named = planner.smallest_in_digits
    assert planner.smallest <= named < planner.smallest + 1e-4 and named == round(named, 4)
    multiples = [n * 0.1 for n in range(1, 11) if named < n * 0.1 <= 1]
    assert planner.plans(0.1) == [planner.plan(ratio) for ratio in (named, *multiples)]
    assert planner.plans(0.1)[-1] == catalog.dense
    assert planner.plans(0.1, least_ratio=0.75) == [planner.plan(ratio) for ratio in (0.75, 8 * 0.1, 9 * 0.1, 1)]
    # Multiples that do not reach 1: the dense plan is not among them.
    assert planner.plans(0.4, least_ratio=0.5) == [planner.plan(ratio) for ratio in (0.5, 0.8)]


def test_groups_that_a_block_does_not_run_cost_nothing():
    """A part may pack the text MLP with q, k and v: where the text is not updated it runs without the MLP."""
    spec = BlockSpec(
        dim=8,
        head_dim=4,
        groups={"heads": Group(count=2), "text": Group(count=6, updates="text")},
        parts=(
            Part(
                path="packed",
                rows=14,
                columns=8,
                axis=0,
                segments=(Segment("heads", 0, 4), Segment("text", 8, 1)),
                stream="text",
            ),
            Part(path="out", name="out", rows=8, columns=8, axis=1, segments=(Segment("heads", 0, 4),), stream="text"),
            Part(
                path="down",
                name="down",
                rows=8,
                columns=6,
                axis=1,
                segments=(Segment("text", 0, 1),),
                stream="text",
                updates="text",
            ),
        ),
        may_leave=("text",),
    )
    width = Width(heads=2)
    attention = 4 * 3**2 * 8
    assert spec.flops(width, 0, 3, TEXT_NOT_UPDATED) == 2 * 3 * (8 * 8 + 8 * 8) + attention
    assert spec.flops(spec.full, 0, 3) == 2 * 3 * (14 * 8 + 8 * 8 + 8 * 6) + attention
    assert spec.params(width, TEXT_NOT_UPDATED) == 8 * 9 + 8 * 8 + 8
