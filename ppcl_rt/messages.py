"""Messages that fit on a line, whatever they are about."""

from __future__ import annotations

import functools
import logging

# Characters of a message, whatever the file holds that it is about.
MOST_CHARACTERS = 300


def brief(text: str) -> str:
    """One line of at most `MOST_CHARACTERS`, the middle left out; what cannot be printed becomes a space."""
    line = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    if len(line) <= MOST_CHARACTERS:
        return line
    half = (MOST_CHARACTERS - 5) // 2
    return f"{line[:half]} ... {line[-half:]}"


@functools.cache
def say_once(log: logging.Logger, message: str) -> None:
    """Log a warning the first time that a process comes here with it."""
    log.warning(message)
