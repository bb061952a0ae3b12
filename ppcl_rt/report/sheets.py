"""Contact sheets and other PNG files, as a page embeds them."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any, ClassVar

from PIL import Image, PngImagePlugin

from ppcl_rt.messages import brief
from ppcl_rt.report.parts import Picture, Section
from ppcl_rt.report.stored import Stored

# A larger file is embedded smaller, and a larger picture is not read at all: it may be a few bytes of file.
_MOST_BYTES, _MOST_PIXELS = 3_000_000, 200_000_000
# Pixels of the longer side of a picture that is embedded smaller.
_SIDE = 2000
# What `ppcl sample` and `ppcl demo` say in their files.
_SAID = ("prompt", "ratio", "seed", "checkpoint")


class Sheet(Stored):
    """A PNG file: its bytes and their type, what it says of itself, and whether it was made smaller."""

    suffix: ClassVar[str] = ".png"
    data: bytes
    mime: str
    said: dict[str, str]
    smaller: bool

    @classmethod
    def fits(cls, path: Path, content: Any) -> bool:
        """Any PNG file."""
        return True

    @classmethod
    def read(cls, path: Path, content: Any) -> Sheet:
        """Read the whole picture, which finds files that are cut."""
        data, mime = content, "image/png"
        try:
            with Image.open(io.BytesIO(data), formats=("PNG",)) as image:
                if image.width * image.height > _MOST_PIXELS:
                    raise ValueError(f"it has {image.width} x {image.height} pixels")
                image.load()
                said = _said(image)
                smaller = len(data) > _MOST_BYTES
                if smaller:
                    image.thumbnail((_SIDE, _SIDE))
                    file = io.BytesIO()
                    image.convert("RGB").save(file, format="JPEG", quality=85)
                    data, mime = file.getvalue(), "image/jpeg"
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise ValueError(f"it is no whole PNG file: {error}") from None
        return super().read(path, {"data": data, "mime": mime, "said": said, "smaller": smaller})


def _said(image: Image.Image) -> dict[str, str]:
    text = image.text if isinstance(image, PngImagePlugin.PngImageFile) else {}
    return {name: brief(", ".join(str(text[name]).splitlines())) for name in _SAID if name in text}


def section(sheet: Sheet, file: str) -> Section:
    """Show a sheet, with the prompts, ratios and seed that its file holds."""
    notes = [f"{name}: {value}" for name, value in sheet.said.items()]
    if sheet.smaller:
        notes.append("Shown smaller than it is.")
    title = "Contact sheet" if sheet.said else "Picture"
    return Section(title, [Picture(Path(file).stem, sheet.data, sheet.mime)], file, "", notes)
