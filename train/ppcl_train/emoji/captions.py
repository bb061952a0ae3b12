"""Names of emoji as captions: what they are made of, and which are held out.

Names are compositional (``woman firefighter: medium-dark skin tone``). One in ten of those with one skin tone is held
out by hash, so that its role, gender and tone were each seen in training, and never together.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass

# Longer ones first: "light" is a part of "medium-light".
TONES = ("medium-light", "medium-dark", "light", "medium", "dark")
_TONE = re.compile(rf"\b({'|'.join(TONES)}) skin tone")
_GENDERS = {"woman": "woman", "women": "woman", "man": "man", "men": "man", "person": "person", "people": "person"}
# One in so many.
_HELD_OUT = 10


@dataclass(frozen=True)
class Caption:
    """The name of an emoji.

    Attributes:
        text: as people write it: ``woman firefighter: medium-dark skin tone``.
    """

    text: str

    @property
    def tones(self) -> tuple[str, ...]:
        """Its skin tones, in order."""
        return tuple(_TONE.findall(self.text))

    @property
    def role(self) -> str:
        """The name without tones and genders: what is shown, whoever it is."""
        words = re.findall(r"[^\s:,]+", _TONE.sub("", self.text))
        return " ".join(word for word in words if word not in _GENDERS)

    @property
    def gender(self) -> tuple[str, ...]:
        """The genders that the name says, in order."""
        return tuple(_GENDERS[word] for word in re.findall(r"[^\s:,]+", self.text) if word in _GENDERS)

    @property
    def held_out(self) -> bool:
        """Whether training never sees it: one in ten of those with one skin tone."""
        return len(self.tones) == 1 and hashlib.sha256(self.text.encode()).digest()[0] % _HELD_OUT == 0

    @classmethod
    def of(cls, name: str) -> Caption:
        """Read a name as the package ``emoji`` writes it: ``:woman_firefighter_medium-dark_skin_tone:``."""
        text = name.strip(":").replace("_", " ")
        tones, rest = _TONE.findall(text), " ".join(_TONE.sub("", text).split())
        # Tones come last, after a colon, with commas between, as in most names of Unicode.
        return cls(f"{rest}: {', '.join(f'{tone} skin tone' for tone in tones)}" if tones and rest else text)
