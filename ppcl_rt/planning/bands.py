"""A catalog as it is near a timestep."""

from __future__ import annotations

from typing import Any, TypeVar

from ppcl_rt.planning.catalog import Catalog
from ppcl_rt.planning.legal import LegalWidths, Student, TextRun

Chosen = TypeVar("Chosen", Student, TextRun)
# A loss is above nothing.
_LEAST = 1e-12


def near(catalog: Catalog, band: int) -> Catalog:
    """The same catalog with losses as they are in a band of the timestep: what a denoising step there goes by."""

    def widths_there(widths: LegalWidths) -> LegalWidths:
        return LegalWidths(
            {
                group: (legal[0], *(c._replace(loss=max(c.bands[band], _LEAST)) for c in legal[1:]))
                for group, legal in widths.root.items()
            }
        )

    def there(choice: Chosen) -> Chosen:
        moved: dict[str, Any] = {"loss": max(choice.bands[band], _LEAST)}
        if isinstance(choice, Student):
            moved["widths"] = widths_there(choice.widths)
        return choice.model_copy(update=moved)

    return catalog.model_copy(
        update={
            "blocks": tuple(map(widths_there, catalog.blocks)),
            "students": tuple(map(there, catalog.students)),
            "text_runs": tuple(map(there, catalog.text_runs)),
            "frontier": tuple(p.model_copy(update={"loss": p.bands[band]}) for p in catalog.frontier),
        }
    )
