"""What somebody asks of a page, read from its fields. No torch: a page is there before the model is."""

from __future__ import annotations

from typing import NamedTuple

from ppcl_rt.messages import brief
from ppcl_rt.planning.budget import Budget
from ppcl_rt.planning.plan import Plan

# Characters; text encoders of pipelines read a thousand tokens.
LONGEST_PROMPT = 8_000
LARGEST_SEED = 2**63 - 1
MOST_STEPS = 1_000


class Ask(NamedTuple):
    """What somebody asks for.

    Attributes:
        prompt: what to draw.
        choice: a budget, or a plan itself.
        seed: of the noise.
        steps: denoising steps; None for the checkpoint's own.
    """

    prompt: str
    choice: Budget | Plan
    seed: int = 0
    steps: int | None = None

    @classmethod
    def read(
        cls, prompt: str, seed: str = "0", steps: str = "", ratio: str = "", memory: str = "", latency: str = ""
    ) -> Ask:
        """Read what was typed into fields; an empty field asks for nothing.

        Args:
            memory: bytes of weights, such as ``6MB``.
            latency: milliseconds of a forward.

        Raises:
            ValueError: one of them cannot be read; one line says what was wanted.
        """
        if not prompt.strip():
            raise ValueError("the prompt is empty: say what to draw")
        if len(prompt) > LONGEST_PROMPT:
            raise ValueError(f"a prompt has at most {LONGEST_PROMPT:,} characters, not {len(prompt):,}")
        limits = {"memory": memory.strip(), "latency": latency.strip()}
        share = _ratio(ratio.strip()) if ratio.strip() else None
        budget = Budget.of(share, **{name: given for name, given in limits.items() if given})
        count = _whole("the number of steps", steps, 1, MOST_STEPS) if steps.strip() else None
        return cls(prompt.strip(), budget, _whole("a seed", seed, 0, LARGEST_SEED), count)


def _ratio(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ValueError(f'a ratio is a number above 0 and up to 1, not "{brief(text)}"') from None


def _whole(name: str, text: str, least: int, most: int) -> int:
    """Read a whole number between two others."""
    digits = text.strip()
    # Digits alone, and few: what else python takes for a number ("1_000", "٣") nobody means, and long ones take time.
    if digits.isascii() and digits.isdigit() and len(digits) <= len(str(LARGEST_SEED)) and least <= int(digits) <= most:
        return int(digits)
    raise ValueError(f'{name} is a whole number from {least} to {most}, not "{brief(text)}"')
