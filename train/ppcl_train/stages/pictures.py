"""The stage *pictures*: fixed prompts, drawn by the teacher and at several ratios from the same noise.

Where nothing can be judged, this is what a run ends with. Pictures are compared with the teacher's by PSNR and SSIM:
how near a smaller plan stays to what the teacher draws, which is not how good it draws.
"""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

import ppcl_rt
from ppcl_rt.files import replacing
from ppcl_rt.pipelines.likeness import pixels_of, psnr, ssim
from ppcl_train.config.settings import RunConfig
from ppcl_train.data.shards import Shards
from ppcl_train.engine.distributed import join
from ppcl_train.engine.files import write_json
from ppcl_train.engine.log import Log
from ppcl_train.families.base import Encoder, Judged

# Written last: the figures, or why there are none. The grid lies in a folder next to it.
OUTPUT = "pictures.json"
GRID, PAGE = Path("pictures", "grid.png"), Path("pictures", "index.html")
# Smaller pictures are enlarged to it, in whole multiples.
_LEAST_SIDE = 96
_GAP = 4


class Drawn(NamedTuple):
    """The pictures of one plan.

    Attributes:
        ratio: of the plan; 1 is the teacher.
        pictures: one a prompt.
        likeness: PSNR in dB and SSIM of each to the teacher's; PSNR is None where both are the same.
    """

    ratio: float
    pictures: list[Image.Image]
    likeness: list[tuple[float | None, float]]


def draw(run: RunConfig, folder: Path) -> None:
    """Draw the grid of a packed checkpoint; writes ``pictures/`` and then ``pictures.json``.

    Without ratios, or a pipeline that can be opened, nothing is drawn: ``pictures.json`` then says why, and that takes
    nothing from the checkpoint. Deleted, it is drawn again.
    """
    log, config = Log(folder, "pictures"), run.pictures
    pipeline = config.pipeline or run.teacher.pretrained
    if not config.ratios:
        return _leave_out(folder, log, "pictures.ratios is empty")
    if pipeline is None and not isinstance(run.family, Judged):
        return _leave_out(folder, log, "latents cannot be decoded without a pipeline: set pictures.pipeline")
    device, dtype = join().device, getattr(torch, run.teacher.dtype)
    try:
        encoder = run.family.open(pipeline or "", device=str(device), dtype=dtype, draws=False)
    except ValueError as error:
        return _leave_out(folder, log, f"{error}; set pictures.pipeline")
    model = ppcl_rt.load(folder / "checkpoint", dtype=dtype, device=device)
    least = model.planner.smallest
    # The teacher first: it is what all are compared with.
    columns = list(dict.fromkeys([1.0, *(max(ratio, least) for ratio in sorted(config.ratios, reverse=True))]))
    found: list[Drawn] = []
    for ratio in columns:
        with model.at(ratio=ratio):
            drawn = encoder.pictures(model, config.prompts, _size(run, encoder), run.seed, run.sampler)
        teacher = found[0].pictures if found else drawn
        pairs = [(pixels_of(one), pixels_of(other)) for one, other in zip(teacher, drawn, strict=True)]
        likeness = [(psnr(*pair), ssim(*pair)) for pair in pairs]
        found.append(Drawn(ratio, drawn, likeness))
        log(drawn=len(found), of=len(columns), ratio=ratio, ssim=float(np.mean([s for _, s in likeness])))
    with replacing(folder / GRID) as temporary:
        grid(found).save(temporary, "PNG")
    with replacing(folder / PAGE) as temporary:
        temporary.write_text(page(found, config.prompts, run.task), encoding="utf-8")
    rows = [{"ratio": each.ratio, "psnr_and_ssim": each.likeness} for each in found[1:]]
    write_json(folder / OUTPUT, {"prompts": config.prompts, "ratios": rows})


def _leave_out(folder: Path, log: Log, because: str) -> None:
    log(left_out=because)
    write_json(folder / OUTPUT, {"left_out": because})


def _size(run: RunConfig, encoder: Encoder) -> tuple[int, int]:
    """Width and height in pixels: as most samples of the run's cache, or the family's own."""
    if run.data.cache is None:
        side = round(encoder.area**0.5)
        return side, side
    buckets = Shards(Path(run.data.cache)).buckets
    _, rows, columns = max(buckets, key=lambda shape: (len(buckets[shape]), shape))
    return columns * encoder.multiple, rows * encoder.multiple


def _enlarged(picture: Image.Image) -> Image.Image:
    times = max(1, _LEAST_SIDE // min(picture.size))
    return picture.convert("RGB").resize((picture.width * times, picture.height * times), Image.Resampling.NEAREST)


def grid(found: Sequence[Drawn]) -> Image.Image:
    """Put pictures of one size together: a row a prompt, a column a plan, on white."""
    cells = [[_enlarged(picture) for picture in each.pictures] for each in found]
    width, height = cells[0][0].size
    whole = Image.new("RGB", (len(cells) * (width + _GAP) - _GAP, len(cells[0]) * (height + _GAP) - _GAP), "white")
    for column, pictures in enumerate(cells):
        for row, picture in enumerate(pictures):
            whole.paste(picture, (column * (width + _GAP), row * (height + _GAP)))
    return whole


def page(found: Sequence[Drawn], prompts: Sequence[str], title: str) -> str:
    """Return one HTML page that holds all pictures itself, with their figures."""
    heads = "".join(f"<th>{'teacher' if each is found[0] else f'ratio {each.ratio:.3g}'}</th>" for each in found)
    rows = []
    for row, prompt in enumerate(prompts):
        cells = "".join(f"<td>{_shown(each, row, each is found[0])}</td>" for each in found)
        rows.append(f"<tr><th>{html.escape(prompt)}</th>{cells}</tr>")
    means = "".join(f"<td>SSIM {np.mean([value for _, value in each.likeness]):.3f}</td>" for each in found[1:])
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(title)}</title>'
        "<style>body{font:14px sans-serif}td,th{padding:4px;vertical-align:top;max-width:20em}"
        "img{image-rendering:pixelated;max-width:20em}</style>"
        "<p>The same noise in each row. PSNR and SSIM are to the teacher's picture: they say how near a plan stays to "
        f"it, not how good it draws.</p><table><tr><th></th>{heads}</tr>{''.join(rows)}"
        f"<tr><th>mean</th><td></td>{means}</tr></table></html>\n"
    )


def _shown(drawn: Drawn, row: int, is_teacher: bool) -> str:
    content = io.BytesIO()
    _enlarged(drawn.pictures[row]).save(content, "PNG")
    image = f'<img src="data:image/png;base64,{base64.b64encode(content.getvalue()).decode()}">'
    if is_teacher:
        return image
    decibels, likeness = drawn.likeness[row]
    said = "the same" if decibels is None else f"{decibels:.1f} dB"
    return f"{image}<br>{said}, SSIM {likeness:.3f}"
