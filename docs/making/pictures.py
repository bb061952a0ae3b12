"""Draw the pictures of docs/how-it-works.md into docs/pictures, from the code and the shipped checkpoint.

    python docs/making/pictures.py

``tests/docs/test_pictures.py`` draws them again and compares.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from ppcl_rt.checkpoint.reader import Checkpoint
from ppcl_rt.planning.catalog import Catalog
from ppcl_rt.planning.interval import Interval
from ppcl_rt.planning.plan import Plan, text_maps
from ppcl_rt.planning.planner import Planner
from ppcl_rt.planning.width import Width

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "docs" / "pictures"
# As in `ppcl_rt.pipelines.plan_picture`: kept, a student, removed.
_KEPT, _STUDENT, _REMOVED = "#4271b0", "#d67d2c", "#e4e4e4"
_LINE, _TEXT = "#555555", "#222222"
_LEFT, _CELL, _GAP, _HIGH = 150, 44, 6, 34


class Shape(NamedTuple):
    """Elements of SVG, and how far they reach."""

    elements: tuple[str, ...]
    right: int
    bottom: int


def box(x: int, y: int, wide: int, high: int, fill: str, says: object = "", dashed: bool = False) -> Shape:
    """A box with a word in it."""
    border = f' stroke="{_LINE}" stroke-dasharray="4 3"' if dashed else ""
    found = [f'<rect x="{x}" y="{y}" width="{wide}" height="{high}" fill="{fill}"{border}/>']
    if says != "":
        dark = fill in (_KEPT, _STUDENT)
        found += says_at(x + wide // 2, y + high // 2 + 5, says, "white" if dark else _TEXT, "middle").elements
    return Shape(tuple(found), x + wide, y + high)


def says_at(x: int, y: int, text: object, fill: str = _TEXT, anchor: str = "start") -> Shape:
    """A line of text."""
    return Shape((f'<text x="{x}" y="{y}" fill="{fill}" text-anchor="{anchor}">{text}</text>',), x, y + 4)


def line(x: int, y: int, to_x: int, to_y: int) -> Shape:
    """A straight line."""
    found = f'<line x1="{x}" y1="{y}" x2="{to_x}" y2="{to_y}" stroke="{_LINE}" stroke-width="2"/>'
    return Shape((found,), max(x, to_x), max(y, to_y))


def left(block: int) -> int:
    """Where the column of a block begins."""
    return _LEFT + block * (_CELL + _GAP)


def sheet(title: str, shapes: Sequence[Shape], least_width: int = 0) -> str:
    """The shapes on white paper."""
    wide = max(least_width, max(shape.right for shape in shapes) + 16)
    high = max(shape.bottom for shape in shapes) + 12
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {wide} {high}" width="{wide}" height="{high}" '
        'font-family="sans-serif" font-size="13">',
        f"<title>{title}</title>",
        f'<rect width="{wide}" height="{high}" fill="white"/>',
        *(element for shape in shapes for element in shape.elements),
        "</svg>",
    ]
    return "\n".join(lines) + "\n"


def legend(y: int, *entries: tuple[str, str]) -> list[Shape]:
    """What the colours mean."""
    shapes, x = [], _LEFT
    for fill, text in entries:
        shapes += [box(x, y, 13, 13, fill, dashed=fill == "white"), says_at(x + 19, y + 11, text)]
        x += 40 + 7 * len(text)
    return [*shapes, Shape((), x, y + 13)]


def text_run(depth: int, run: Interval) -> str:
    """The two streams through a model of ``depth`` blocks with one text run, as a plan says it."""
    plan = Plan.of("", depth, [(n, Width()) for n in range(depth)], text_runs=[run])
    maps = set(text_maps(run, depth))
    image, text = 40, 110
    shapes = [says_at(8, image + 22, "image stream"), says_at(8, text + 22, "text stream")]
    shapes += [line(left(0), y + _HIGH // 2, left(depth) - _GAP, y + _HIGH // 2) for y in (image, text)]
    for planned in plan.blocks:
        block = planned.interval.first
        reads = f"z_{block}"
        shapes.append(says_at(left(block) + _CELL // 2, 26, block, anchor="middle"))
        shapes.append(box(left(block), image, _CELL, _HIGH, _KEPT))
        if "text" in plan.not_updated(planned):
            assert reads in maps, f"block {block} reads no map"
            shapes.append(box(left(block), text, _CELL, _HIGH, "white", reads, dashed=True))
        else:
            shapes.append(box(left(block), text, _CELL, _HIGH, _KEPT))
    if "text" in maps:
        x = left(run.last) + _CELL + _GAP // 2
        shapes += [
            line(x, text + _HIGH // 2, x, text + _HIGH + 14),
            says_at(x, text + _HIGH + 28, "text", anchor="middle"),
        ]
    shapes += legend(
        text + _HIGH + 42, (_KEPT, "updated by the block"), ("white", "read through a linear map, not updated")
    )
    return sheet(f"Text run {run.first}..{run.last} of {depth} blocks", shapes)


def students(catalog: Catalog, plan: Plan) -> str:
    """The students that a checkpoint holds, over the blocks that each stands in for, and which of them a plan takes."""
    taken = {planned.interval for planned in plan.blocks if planned.student}
    kept = {planned.interval.first for planned in plan.blocks if not planned.student}
    shapes = [says_at(8, 42, "blocks")]
    for block in range(plan.depth):
        shapes.append(box(left(block), 20, _CELL, _HIGH, _KEPT if block in kept else _REMOVED, block))
    y = 20 + _HIGH + 10
    for student in catalog.students:
        interval = student.interval
        wide = left(interval.last) + _CELL - left(interval.first)
        fill = _STUDENT if interval in taken else "white"
        shapes.append(says_at(8, y + 17, f"students.{interval.key}"))
        shapes.append(box(left(interval.first), y, wide, 24, fill, f"{student.loss:.1e}", dashed=fill == "white"))
        y += 30
    entries = ((_KEPT, "block runs"), (_STUDENT, "student runs"), ("white", "student of other plans"))
    return sheet(f"Students at ratio {catalog.ratio(plan):.2f}", [*shapes, *legend(y + 6, *entries)])


def strips(units: Sequence[int], width: int, y: int, high: int) -> Shape:
    """One thin strip for each unit, of ``width`` thousandths of a pixel, as one path."""
    found = "".join(f"M{_LEFT + (unit + 0.5) * width / 1000:.1f} {y}v{high}" for unit in sorted(units))
    path = f'<path d="{found}" stroke="{_KEPT}" stroke-width="{width / 1000:.2f}"/>'
    return Shape((path,), _LEFT, y + high)


def width(catalog: Catalog, plan: Plan, source: Checkpoint, block: int) -> str:
    """What a plan keeps of a block: of each group the first units in rank order, which lie anywhere in stock order."""
    planned = next(each for each in plan.blocks if each.interval.first == block and not each.student)
    spec, long = catalog.spec(block), 480
    place = catalog.architecture.place(block)
    shapes, y = [says_at(8, 20, f"block {block}: {', '.join(f'{g} {n}' for g, n in planned.width.items())}")], 36
    for group in spec.groups:
        full, kept = spec.full[group], planned.width.get(group, 0)
        name = f"{place.path}.{place.number}.order.{group}"
        shapes.append(says_at(8, y + 16, group))
        each = 1000 * long // full
        if name in source.names:
            order = source.read(name).tolist()
            shapes += [box(_LEFT, y, long, 20, _REMOVED), strips(order[:kept], each, y, 20)]
            shapes.append(says_at(_LEFT + long + 8, y + 15, "stock order"))
            y += 24
        shapes += [box(_LEFT, y, long, 20, _REMOVED), box(_LEFT, y, long * kept // full, 20, _KEPT)]
        shapes.append(says_at(_LEFT + long + 8, y + 15, f"first {kept} of {full}"))
        y += 34
    return sheet(f"Width of block {block} at ratio {catalog.ratio(plan):.2f}", shapes, _LEFT + long + 130)


def drawn() -> dict[str, str]:
    """Every picture by its name."""
    source = Checkpoint(ROOT / "examples" / "scenes")
    assert source.catalog is not None
    planner = Planner(source.catalog, source.sketches)
    return {
        "text-run.svg": text_run(8, Interval(2, 5)),
        "students.svg": students(source.catalog, planner.plan(0.2)),
        "width.svg": width(source.catalog, planner.plan(0.35), source, 3),
    }


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for name, text in drawn().items():
        (FOLDER / name).write_text(text)
