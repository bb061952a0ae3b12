"""What every results file is read as: content that is checked before anything is drawn from it."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from ppcl_rt.planning.frozen import first_error

Kept = TypeVar("Kept", bound="Stored")


class Stored(BaseModel):
    """The content of one kind of results file.

    Keys that are not named here are passed over: a newer program may write more.

    Attributes:
        suffix: how names of such files end.
    """

    model_config = ConfigDict(frozen=True, extra="ignore", allow_inf_nan=False, arbitrary_types_allowed=True)
    suffix: ClassVar[str] = ".json"

    @classmethod
    def fits(cls, path: Path, content: Any) -> bool:
        """Whether a file is meant as one of these; whether it is whole is for `read` to say."""
        raise NotImplementedError

    @classmethod
    def read(cls: type[Kept], path: Path, content: Any) -> Kept:
        """Check content that fits.

        Raises:
            ValueError: one line says what is wrong.
        """
        try:
            return cls.model_validate(content)
        except ValidationError as error:
            raise ValueError(first_error(error, "wrong content")) from None


def rows_of(content: Any) -> list[dict[str, Any]]:
    """Return the objects under ``rows``, or of a list; none where there are none."""
    rows = content.get("rows") if isinstance(content, dict) else content
    return rows if isinstance(rows, list) and all(isinstance(row, dict) for row in rows) else []
