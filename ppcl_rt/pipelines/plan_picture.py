"""A picture of what a plan removes."""

from __future__ import annotations

from PIL import Image, ImageDraw

from ppcl_rt.planning.catalog import Catalog
from ppcl_rt.planning.plan import Plan

_COLUMN, _GAP, _LEFT, _TOP = 46, 6, 86, 26
# Pixels of the row of a group.
_ROW = 66
_KEPT, _STUDENT, _REMOVED = (66, 113, 176), (214, 125, 44), (228, 228, 228)


def groups_of(catalog: Catalog) -> tuple[str, ...]:
    """The groups of all kinds of blocks, in the order in which they are shown."""
    return tuple(dict.fromkeys(group for spec in catalog.architecture.kinds.values() for group in spec.groups))


def draw_plan(catalog: Catalog, plan: Plan) -> Image.Image:
    """Draw a plan: a column a block, a row a group, filled as far as it is kept; students span their interval."""
    depth, groups = plan.depth, groups_of(catalog)
    height = _TOP + len(groups) * (_ROW + _GAP) + 40
    sheet = Image.new("RGB", (_LEFT + depth * (_COLUMN + _GAP) + _GAP, height), "white")
    pen = ImageDraw.Draw(sheet)
    for block in range(depth):
        pen.text((_left(block) + _COLUMN // 2 - 6, 6), str(block), fill="black")
    top = _TOP
    for group in groups:
        pen.text((4, top + _ROW // 2 - 6), _label(catalog, group), fill="black")
        for block in range(depth):
            if group in catalog.spec(block).groups:
                pen.rectangle((_left(block), top, _left(block) + _COLUMN, top + _ROW), fill=_REMOVED)
        for planned in plan.blocks:
            if group in (full := catalog.spec(planned.interval.first).full):
                share = planned.width.get(group, 0) / full[group]
                # A student is one block wide; the rest of its interval is what it removes.
                x = _left(planned.interval.first)
                box = (x, top + round(_ROW * (1 - share)), x + _COLUMN, top + _ROW)
                pen.rectangle(box, fill=_STUDENT if planned.student else _KEPT)
        top += _ROW + _GAP
    for planned in plan.blocks:
        if planned.student:
            ends = _left(planned.interval.first), _left(planned.interval.last) + _COLUMN
            pen.line((ends[0], _TOP - 4, ends[1], _TOP - 4), fill=_STUDENT, width=3)
    _legend(pen, top)
    return sheet


def _left(block: int) -> int:
    return _LEFT + block * (_COLUMN + _GAP)


def _label(catalog: Catalog, group: str) -> str:
    """How a group is called in a picture: the channels of an MLP by its stream."""
    channels = any(
        group in spec.unit_groups and group not in spec.head_groups for spec in catalog.architecture.kinds.values()
    )
    return f"{group} MLP" if channels else group


def _legend(pen: ImageDraw.ImageDraw, top: int) -> None:
    x = _LEFT
    for colour, text in ((_KEPT, "kept"), (_STUDENT, "student of the interval above it"), (_REMOVED, "removed")):
        pen.rectangle((x, top + 8, x + 12, top + 20), fill=colour)
        pen.text((x + 18, top + 8), text, fill="black")
        x += 40 + 7 * len(text)
