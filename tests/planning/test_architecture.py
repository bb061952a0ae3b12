"""Lists of blocks: several kinds in one module list are several lists in a row."""

from __future__ import annotations

import pytest

from ppcl_rt import Architecture, BlockList, Catalog, Interval, LegalWidths, Plan, Student, TextRun, Tokens
from ppcl_rt.families.qwen_image import block_spec
from ppcl_rt.planning.planner import Planner

KINDS = {"wide": block_spec(32, 4, 8), "thin": block_spec(32, 2, 8), "last": block_spec(32, 4, 8, 64, 64)}


def architecture(*lists):
    return Architecture(
        lists=tuple(BlockList(path=path, kind=kind, depth=depth) for path, kind, depth in lists),
        kinds=KINDS,
        dim=32,
        outer_params=5,
    )


MIXED = architecture(("a", "wide", 2), ("a", "thin", 1), ("a", "wide", 2), ("b", "thin", 1), ("b", "last", 1))


def test_blocks_of_several_kinds_are_numbered_on():
    assert [MIXED.place(n) for n in range(7)] == [*(("a", n) for n in range(5)), ("b", 0), ("b", 1)]
    assert [MIXED.kind(n) for n in range(7)] == ["wide", "wide", "thin", "wide", "wide", "thin", "last"]
    wide, thin, last = (KINDS[kind].params(KINDS[kind].full) for kind in ("wide", "thin", "last"))
    assert MIXED.dense_params == 5 + 4 * wide + 2 * thin + last


@pytest.mark.parametrize(
    ("interval", "one"),
    [
        ((0, 1), True),
        ((1, 2), False),
        ((0, 3), False),
        ((3, 4), True),
        ((4, 5), False),
        ((5, 6), False),
        ((6, 7), False),
    ],
)
def test_intervals_stay_within_one_kind(interval, one):
    """Also where both ends are of one kind, and something else lies between them."""
    interval = Interval(*interval)
    assert MIXED.one_kind(interval) == one
    if interval.last >= MIXED.depth:
        return
    catalog = Catalog.of_dense("qwen-image", MIXED, Tokens(16, 7))
    student = Student(interval=interval, start="first", loss=1, widths=catalog.blocks[interval.first])
    for choices in ({"students": (student,)}, {"text_runs": (TextRun(interval=interval, loss=1),)}):
        content = {**catalog.model_dump(), **choices}
        if one:
            assert Catalog.model_validate(content).dense == catalog.dense
        else:
            with pytest.raises(ValueError, match="more than one list or kind"):
                Catalog.model_validate(content)


def test_a_block_runs_at_the_widths_of_its_kind():
    catalog = Catalog.of_dense("qwen-image", MIXED, Tokens(16, 7))
    assert [block.width["heads"] for block in catalog.dense.blocks] == [4, 4, 2, 4, 4, 2, 4]
    wrong = {**catalog.model_dump(), "blocks": [LegalWidths.only(KINDS["wide"].full)] * 7}
    with pytest.raises(ValueError, match="block 2 starts at"):
        Catalog.model_validate(wrong)
    assert Planner(catalog).plan(1.0) == catalog.dense
    assert isinstance(catalog.check(catalog.dense), Plan)


def test_a_catalog_of_one_kind_reads_as_ever():
    """The form of catalogs that were written before a module list could hold several kinds."""
    lists = [{"path": "transformer_blocks", "kind": "wide", "depth": 3}, {"path": "more", "kind": "thin", "depth": 2}]
    read = Architecture.model_validate({"lists": lists, "kinds": KINDS, "dim": 32, "outer_params": 5})
    assert [read.place(n) for n in (0, 2, 3, 4)] == [
        ("transformer_blocks", 0),
        ("transformer_blocks", 2),
        ("more", 0),
        ("more", 1),
    ]
    assert [each.model_dump() for each in read.lists] == lists
    assert read.one_kind(Interval(0, 2)) and read.one_kind(Interval(3, 4)) and not read.one_kind(Interval(2, 3))


def test_two_lists_that_are_one_are_refused():
    """Otherwise one model had several architectures."""
    with pytest.raises(ValueError, match="a holds two lists of kind wide in a row: join them"):
        architecture(("a", "wide", 2), ("a", "wide", 1))
