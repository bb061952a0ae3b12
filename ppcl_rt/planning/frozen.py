"""Immutable, validated data with JSON both ways: what plans, catalogs and settings are made of."""

from __future__ import annotations

from typing import TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from ppcl_rt.messages import brief


class Frozen(BaseModel):
    """Immutable, validated, JSON both ways; unknown keys are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")


Model = TypeVar("Model", bound=BaseModel)


def read_json(kind: type[Model], text: str | bytes, what: str) -> Model:
    """Parse and validate JSON.

    Raises:
        ValueError: one line with the first thing that is wrong, ``what`` in front.
    """
    try:
        return kind.model_validate_json(text)
    except ValidationError as error:
        raise ValueError(first_error(error, what)) from None


def first_error(error: ValidationError, what: str) -> str:
    """Say in one line what is wrong first, ``what`` in front."""
    # Without what was given: of a list of millions, millions are wrong.
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    where = ".".join(map(str, first["loc"]))
    more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
    message = first["msg"].removeprefix("Value error, ")
    return brief(f"{what}: {where + ': ' if where else ''}{message}{more}")
