"""Pictures: what a plan removes, and grids of samples."""

from __future__ import annotations

from PIL import Image, ImageDraw

from ppcl_rt.planning.catalog import Catalog
from ppcl_rt.planning.plan import Plan

# Pixels that a pixel of a small sample is drawn with.
_ZOOM = 12
_COLUMN, _GAP, _LEFT, _TOP = 46, 6, 86, 26
# About as each counts in parameters.
_HEIGHTS = {"heads": 66, "image": 66, "text": 66, "modulation": 66}
_KEPT, _STUDENT, _REMOVED = (66, 113, 176), (214, 125, 44), (228, 228, 228)
_LABELS = {"heads": "heads", "image": "image MLP", "text": "text MLP", "modulation": "modulation"}


def draw_plan(catalog: Catalog, plan: Plan) -> Image.Image:
    """Draw a plan: a column a block, filled as far as each part is kept; students span their interval."""
    depth = plan.depth
    height = _TOP + sum(_HEIGHTS.values()) + len(_HEIGHTS) * _GAP + 40
    sheet = Image.new("RGB", (_LEFT + depth * (_COLUMN + _GAP) + _GAP, height), "white")
    pen = ImageDraw.Draw(sheet)

    def left(block: int) -> int:
        return _LEFT + block * (_COLUMN + _GAP)

    for block in range(depth):
        pen.text((left(block) + _COLUMN // 2 - 6, 6), str(block), fill="black")
    top = _TOP
    for group, tall in _HEIGHTS.items():
        pen.text((4, top + tall // 2 - 6), _LABELS[group], fill="black")
        for block in range(depth):
            pen.rectangle((left(block), top, left(block) + _COLUMN, top + tall), fill=_REMOVED)
        for step in plan.steps:
            share = getattr(step.width, group) / getattr(catalog.shape.width, group)
            # A student is one block wide; the rest of its interval is what it removes.
            x = left(step.blocks.first)
            box = (x, top + round(tall * (1 - share)), x + _COLUMN, top + tall)
            pen.rectangle(box, fill=_STUDENT if step.student else _KEPT)
            if step.student and group == "heads":
                pen.line((x, _TOP - 4, left(step.blocks.last) + _COLUMN, _TOP - 4), fill=_STUDENT, width=3)
        top += tall + _GAP
    x = _LEFT
    for colour, text in ((_KEPT, "kept"), (_STUDENT, "student of the interval above it"), (_REMOVED, "removed")):
        pen.rectangle((x, top + 8, x + 12, top + 20), fill=colour)
        pen.text((x + 18, top + 8), text, fill="black")
        x += 40 + 7 * len(text)
    return sheet


def grid(rows: list[list[Image.Image]], columns: list[str], labels: list[str]) -> Image.Image:
    """Samples in rows, enlarged pixel by pixel, with a label above each column and left of each row."""
    edge = _ZOOM * rows[0][0].width
    left = 70 if any(labels) else 0
    top = 44 if any(columns) else 0
    sheet = Image.new("RGB", (left + len(rows[0]) * (edge + 8), top + len(rows) * (edge + 8)), "white")
    pen = ImageDraw.Draw(sheet)
    for x, column in enumerate(columns):
        pen.multiline_text((left + x * (edge + 8) + 4, 4), _wrapped(column, edge // 6), fill="black")
    for y, (label, pictures) in enumerate(zip(labels, rows, strict=True)):
        pen.text((4, top + y * (edge + 8) + edge // 2), label, fill="black")
        for x, picture in enumerate(pictures):
            large = picture.resize((edge, edge), Image.Resampling.NEAREST)
            sheet.paste(large, (left + x * (edge + 8) + 4, top + y * (edge + 8) + 4))
    return sheet


def _wrapped(text: str, width: int) -> str:
    lines = [""]
    for word in text.split():
        if lines[-1] and len(lines[-1]) + len(word) >= width:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    return "\n".join(lines)
