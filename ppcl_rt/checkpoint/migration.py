"""Catalogs of older formats, brought up to the current one.

The policy: `ppcl_rt.planning.catalog.FORMAT` rises when an older reader would misread a catalog, and every older format
keeps loading. Files are never rewritten for it: a catalog is migrated as it is read, and tensors keep the names that
they have in their files (`current_name` says what they are called now).

Format 1 (until 2026-11) knew one family. Its catalog held ``shape`` (depth, dim, head_dim, width, outer_params) where
format 2 holds ``architecture``, and widths as lists of four counts. Format 2 named no reference shape, and its
checksums were of bytes alone.
"""

from __future__ import annotations

import re
from typing import Any

from pydantic import Field, ValidationError

from ppcl_rt.families import registry
from ppcl_rt.files import one_line
from ppcl_rt.planning.architecture import MOST_BLOCKS
from ppcl_rt.planning.block_spec import LARGEST
from ppcl_rt.planning.catalog import FORMAT
from ppcl_rt.planning.frozen import Frozen, first_error

# Replacements were called "narrow" in format 1.
_FORMAT_1 = re.compile(r"^(transformer_blocks\.\d+|students\.\d+-\d+)\.narrow\.")


class _Shape(Frozen):
    """The ``shape`` of a catalog of format 1; ``width`` is heads, image channels, text channels, rank."""

    depth: int = Field(ge=1, le=MOST_BLOCKS)
    dim: int = Field(ge=1, lt=LARGEST)
    head_dim: int = Field(ge=1, lt=LARGEST)
    width: tuple[int, int, int, int]
    outer_params: int = Field(ge=0, lt=2**60)


def up_to_date(catalog: Any, broken: str) -> tuple[int, dict[str, Any]]:
    """Bring the JSON of a catalog to the current format.

    Args:
        catalog: as it stands in ``config.json``.
        broken: how a message begins that says what is wrong with it.

    Returns:
        The format that it was written in, and its content in the current one.

    Raises:
        ValueError: it is no catalog, or one of a format that is newer than this program.
    """
    if not isinstance(catalog, dict):
        raise ValueError(f"{broken}: it is no JSON object")
    written = catalog.get("format", 1)
    if not isinstance(written, int) or isinstance(written, bool) or not 1 <= written <= FORMAT:
        raise ValueError(f"{broken}: format: this program reads formats 1 to {FORMAT}, not {written!r}")
    if written == FORMAT:
        return written, catalog
    family = catalog.get("family")
    if not isinstance(family, str) or family not in registry.names():
        raise ValueError(f"{broken}: family: wanted one of {', '.join(registry.names())}, not {family!r}")
    content = _from_format_1(catalog, family, broken) if written == 1 else catalog
    task = catalog.get("task")
    name = task.get("name") if isinstance(task, dict) else None
    reference = registry.reference(name if isinstance(name, str) and name in registry.names() else family)
    return written, {**content, "format": FORMAT, "reference": reference, "checksums_of": "bytes"}


def current_name(stored: str, written: int) -> str:
    """What a tensor is called now that lies under ``stored`` in a file of a format."""
    return _FORMAT_1.sub(r"\1.replacements.", stored) if written == 1 else stored


def _from_format_1(catalog: dict[str, Any], family: str, broken: str) -> dict[str, Any]:
    content = dict(catalog)
    shape = content.pop("shape", None)
    in_format_1 = getattr(registry.model_class(family), "architecture_of_format_1", None)
    if in_format_1 is None:
        raise ValueError(f"{broken}: format: the family {family} is younger than format 1")
    try:
        architecture = in_format_1(_Shape.model_validate(shape).model_dump())
    except ValidationError as error:
        raise ValueError(first_error(error, f"{broken}: shape")) from None
    except ValueError as error:
        raise ValueError(f"{broken}: shape: {one_line(error)}") from None
    return {**content, "architecture": architecture.model_dump(mode="json")}
