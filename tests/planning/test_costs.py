"""The table of what blocks cost: what it refuses, and what it says between the counts that were measured."""

import json

import pytest

from ppcl_rt import Architecture, BlockList, Interval, Plan, PlannedBlock, Width
from ppcl_rt.families.qwen_image import block_spec
from ppcl_rt.planning.costs import Milliseconds
from ppcl_rt.planning.milliseconds import TimeRow
from ppcl_rt.planning.time_table import TimeTable

SPEC = block_spec(dim=3072, heads=24, head_dim=128)
FULL = SPEC.full
# Of a block that does not update the text stream.
SKIPPING = FULL.without({"text"})
# Six blocks of one kind.
BLOCKS = Architecture(
    lists=(BlockList(path="transformer_blocks", kind="two-stream", depth=6),),
    kinds={"two-stream": SPEC},
    dim=3072,
    outer_params=0,
)
SHAPE = {"image_tokens": 4096, "text_tokens": 512, "batch": 1}


def row(kind, ms, width=None, full_ms=2.0, **more):
    more = {"block_kind": None if width is None else "two-stream", **more}
    timed = {"ms": ms, "full_ms": full_ms, "host_ms": 0.1, "repeats": 7, "agrees": True}
    return {"kind": kind, **SHAPE, "width": None if width is None else dict(width), **timed, **more}


ROWS = [
    row("block", 2.0, FULL),
    row("block", 1.4, FULL.replace(heads=12)),
    # Its clock ran at half the speed.
    row("block", 2.4, FULL.replace(heads=6), full_ms=4.0),
    row("block", 1.5, FULL.replace(image=6144)),
    row("block", 1.2, FULL.replace(image=2048)),
    row("block", 1.1, FULL.replace(image=0)),
    row("block", 1.9, FULL.replace(text=4096)),
    row("block", 1.95, FULL.replace(modulation=256)),
    row("block", 1.93, FULL.replace(modulation=64)),
    row("text_not_updated", 1.7, SKIPPING),
    row("text_not_updated", 1.2, SKIPPING.replace(heads=12)),
    row("map", 0.05),
    row("outer", 0.3),
    row("block", 0.001, FULL.replace(heads=18), agrees=False),
]
TABLE = {
    "format": 3,
    "device": "NVIDIA H100 80GB HBM3",
    "versions": {"torch": "2.11.0", "cudnn": None},
    "commit": None,
    "dirty": None,
    "date": "2026-01-01T00:00:00Z",
    "command": "python bench/suites/bench_gpu_model.py",
    "dtype": "bfloat16",
    "backend": "auto",
    "specs": {"two-stream": SPEC.model_dump()},
    "blocks": 6,
    "complete": True,
    "left_out": {"block 2-12288-12288-3072 at 512": "RuntimeError: out of memory"},
    "rows": ROWS,
}


@pytest.fixture
def read(tmp_path):
    """Read a table from a file with changes."""

    def _read(**changes):
        path = tmp_path / "sweep.json"
        path.write_text(json.dumps({**TABLE, **changes}))
        return TimeTable.read(path)

    return _read


@pytest.fixture
def times(read):
    return read().at(4096, 512)


@pytest.fixture
def costs(times):
    return times.of("two-stream")


def plan_ms(times, plan):
    return Milliseconds(times).of(BLOCKS, plan)


@pytest.mark.parametrize(
    ("width", "ms"),
    [
        (FULL, 2.0),
        (FULL.replace(heads=12), 1.4),
        (FULL.replace(heads=6), 1.2),
        # Halfway; the row between them is not that of plain torch.
        (FULL.replace(heads=18), 1.7),
        (FULL.replace(image=4096), 1.35),
        (FULL.replace(image=0), 1.1),
        (FULL.replace(modulation=128), 1.93 + 0.02 / 3),
        # Groups add up.
        (Width(heads=12, image=6144, text=4096, modulation=256), 2.0 - 0.6 - 0.5 - 0.1 - 0.05),
    ],
)
def test_costs_are_linear_between_counts_and_add_up_over_groups(costs, width, ms):
    assert costs.ms(width) == pytest.approx(ms)


def test_a_block_that_does_not_update_the_text_goes_by_its_own_rows_where_it_has_them(costs):
    assert costs.ms(SKIPPING, not_updated={"text"}) == pytest.approx(1.7)
    assert costs.ms(SKIPPING.replace(heads=18), not_updated={"text"}) == pytest.approx(1.45)
    assert costs.ms(SKIPPING.replace(image=6144), not_updated={"text"}) == pytest.approx(1.7 - 0.5)
    assert costs.counts("image") == [0, 2048, 6144, 12288]


@pytest.mark.parametrize(
    "width",
    [
        # Below what was measured; between a linear map and the narrowest MLP; between the factors and the stock layers.
        FULL.replace(heads=5),
        FULL.replace(image=1024),
        FULL.replace(text=0),
        FULL.replace(modulation=512),
        FULL.replace(heads=25),
    ],
)
def test_nothing_is_said_outside_of_what_was_measured(costs, width):
    with pytest.raises(ValueError, match="lies outside of what was measured") as refused:
        costs.ms(width)
    assert "\n" not in str(refused.value)


def test_a_plan_costs_its_blocks_its_maps_and_what_is_around_them(times):
    half = FULL.replace(heads=12)
    runs = [Interval(1, 3)]
    # Blocks 0 to 4 of 6, of which 2 and 3 do not update the text; maps for those, and one for how the text goes on.
    kept = [(n, half.without({"text"}) if n in (2, 3) else half) for n in range(5)]
    plan = Plan.of("", 6, kept, [PlannedBlock(interval=Interval(5, 5), width=FULL, student=True)], runs)
    assert plan_ms(times, plan) == pytest.approx(0.3 + 3 * 1.4 + 2 * 1.2 + 2.0 + 3 * 0.05)


def test_parts_add_up_and_each_is_scaled_by_its_factor(times):
    half = FULL.replace(heads=12)
    planned = [(0, half), *((n, SKIPPING if n > 1 else half.replace(image=4096)) for n in range(1, 4))]
    blocks = tuple(PlannedBlock(interval=Interval(n, n), width=width) for n, width in planned)
    plan = Plan(checkpoint="", depth=6, blocks=blocks, text_runs=(Interval(1, 3),))
    parts = times.parts(BLOCKS, plan)
    assert sum(parts.values()) == pytest.approx(plan_ms(times, plan))
    of_blocks = {name: ms for (kind, name), ms in parts.items() if kind}
    assert of_blocks["full"] == pytest.approx(4 * 2.0) and of_blocks["still"] == pytest.approx(2 * (1.7 - 2.0))
    assert of_blocks["heads"] == pytest.approx(2 * -0.6) and of_blocks["text"] == 0
    factors = {name: 1 + n / 10 for n, name in enumerate(parts)}
    scaled = times.scaled(factors)
    assert scaled.parts(BLOCKS, plan) == pytest.approx({name: factors[name] * ms for name, ms in parts.items()})
    # Where timings are off, a part may explain nothing.
    nothing = times.scaled(dict.fromkeys(parts, 0.0))
    assert plan_ms(nothing, plan) == pytest.approx(0, abs=1e-4)
    same = times.scaled(dict.fromkeys(parts, 1.0))
    assert plan_ms(same, plan) == pytest.approx(plan_ms(times, plan))


def test_a_shape_that_was_not_measured_is_refused(read):
    with pytest.raises(
        ValueError, match=r"no full block of kind two-stream was measured at \(1024, 512, 1\).*\(4096, 512, 1\)"
    ):
        read().at(1024, 512)
    table = read(rows=[each for each in ROWS if each["kind"] in ("block", "map")])
    with pytest.raises(ValueError, match="no row of kind outer"):
        plan_ms(table.at(4096, 512), Plan.of("", 2, ()))
    with pytest.raises(ValueError, match="no full row of kind text_not_updated"):
        table.at(4096, 512).of("two-stream").ms(SKIPPING, not_updated={"text"})


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"format": 2}, "format"),
        ({"rows": [row("block", -1.0, FULL)]}, "rows.0.ms"),
        ({"rows": [row("block", 1.0)]}, "rows of blocks have a width"),
        ({"rows": [row("block", 1.0, FULL, block_kind=None)]}, "and a kind of block"),
        ({"rows": [row("map", 1.0, block_kind="two-stream")]}, "others have none"),
        ({"rows": [row("block", 1.0, FULL, block_kind="single")]}, "of a block of kind single; there are: two-stream"),
        ({"rows": [row("map", 1.0, FULL)]}, "others have none"),
        ({"rows": [row("text_not_updated", 1.0, FULL)]}, "names the groups"),
        ({"rows": [row("block", 1.0, FULL.replace(heads=0))]}, "heads is 1 or more"),
        ({"rows": [row("block", 1.0, FULL.replace(heads=25))]}, "wider than the full block"),
        ({"rows": [row("block", 1.0, FULL)] * 2}, "listed twice"),
        ({"rows": [row("norm", 1.0)]}, "rows.0.kind"),
        ({"watts": 700}, "watts"),
        ({"specs": None}, "specs"),
        ({"specs": {}}, "specs"),
    ],
)
def test_bad_tables_are_refused_in_one_line(read, changes, said):
    with pytest.raises(ValueError, match=r"sweep\.json is not a table of costs") as refused:
        read(**changes)
    assert said in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.parametrize("text", ["", "{", "[]", "NaN", '{"format": 2}'])
def test_what_is_no_table_is_refused_in_one_line(tmp_path, text):
    path = tmp_path / "sweep.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"sweep\.json is not a table of costs") as refused:
        TimeTable.read(path)
    assert "\n" not in str(refused.value)


def test_rows_go_to_json_and_back(read):
    table = read()
    assert TimeTable.model_validate_json(table.model_dump_json()) == table
    assert TimeRow.model_validate(ROWS[1]).width == FULL.replace(heads=12)
