"""Sheets of samples: a row a plan, a column a prompt; and what a PNG says of how it was made."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import NamedTuple

from PIL import Image, ImageDraw
from PIL.PngImagePlugin import PngInfo

from ppcl_rt.planning.plan import Plan

# Smaller samples are enlarged to about this many pixels of a side, pixel by pixel.
_SIDE = 192
_GAP = 8


class Made(NamedTuple):
    """What a row of pictures was drawn with.

    Attributes:
        asked: the budget, as people read it.
        ratio: of the plan.
        plan: what ran.
    """

    asked: str
    ratio: float
    plan: Plan


def described(checkpoint: str, prompts: Sequence[str], seed: int, made: Sequence[Made]) -> PngInfo:
    """What the PNG of some rows says: text chunks ``prompt``, ``seed``, ``ratio``, ``plan`` and ``checkpoint``.

    Several prompts are lines, several rows have ratios with commas between and a JSON list of plans. Prompt ``i`` has
    the noise of ``seed + i``.
    """
    info = PngInfo()
    plans = [each.plan.model_dump(mode="json") for each in made]
    for name, text in {
        "prompt": "\n".join(prompts),
        "seed": str(seed),
        "ratio": ", ".join(f"{each.ratio:.6g}" for each in made),
        "plan": json.dumps(plans[0] if len(plans) == 1 else plans),
        "checkpoint": checkpoint,
    }.items():
        info.add_itxt(name, text)
    return info


def enlarged(picture: Image.Image) -> Image.Image:
    """Enlarge a small picture in whole multiples."""
    times = max(1, _SIDE // picture.width)
    return picture.resize((picture.width * times, picture.height * times), Image.Resampling.NEAREST)


def grid(rows: Sequence[Sequence[Image.Image]], columns: Sequence[str], labels: Sequence[str]) -> Image.Image:
    """Put pictures of one size in rows, with a label above each column and left of each row, where there are any."""
    cells = [[enlarged(picture) for picture in row] for row in rows]
    width, height = cells[0][0].size
    left = 70 if any(labels) else 0
    heads = [_wrapped(column, width // 6) for column in columns]
    top = 14 + 15 * max(head.count("\n") + 1 for head in heads) if any(columns) else 0
    size = (left + len(cells[0]) * (width + _GAP), top + len(cells) * (height + _GAP))
    sheet = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(sheet)
    for x, head in enumerate(heads):
        pen.multiline_text((left + x * (width + _GAP) + 4, 4), head, fill="black")
    for y, (label, pictures) in enumerate(zip(labels, cells, strict=True)):
        pen.text((4, top + y * (height + _GAP) + height // 2), label, fill="black")
        for x, picture in enumerate(pictures):
            sheet.paste(picture, (left + x * (width + _GAP) + 4, top + y * (height + _GAP) + 4))
    return sheet


def _wrapped(text: str, width: int) -> str:
    lines = [""]
    for word in text.split():
        if lines[-1] and len(lines[-1]) + len(word) >= width:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    return "\n".join(lines)
