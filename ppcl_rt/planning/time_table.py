"""The file of what blocks take, as it was measured on one device. Plain data, no torch.

``bench/suites/bench_gpu_model.py`` writes one (``sweep.json``, docs/formats.md), `ppcl_rt.model.times` another.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from ppcl_rt.planning.block_spec import BlockSpec
from ppcl_rt.planning.frozen import Frozen, read_json
from ppcl_rt.planning.milliseconds import TimeRow, Times
from ppcl_rt.planning.width import LINEAR_MAP


class TimeTable(Frozen):
    """What was measured on a device.

    Attributes:
        format: version of this schema.
        device, versions, commit, dirty, date, command: where the figures come from.
        dtype: of weights and activations.
        backend: ``PPCL_BACKEND`` as it was.
        specs: what the blocks of each kind are made of.
        blocks: different blocks that were run in turn, so that no weight is read from a cache.
        complete: whether every row that was meant to be measured is there, or in ``left_out``.
        left_out: what failed, and why.
    """

    format: Literal[3]
    device: str
    versions: dict[str, str | None]
    commit: str | None
    dirty: bool | None
    date: str
    command: str
    dtype: str
    backend: str
    specs: dict[str, BlockSpec] = Field(min_length=1)
    blocks: int = Field(ge=1)
    complete: bool
    left_out: dict[str, str] = Field(default_factory=dict)
    rows: tuple[TimeRow, ...]

    @model_validator(mode="after")
    def _once(self) -> TimeTable:
        seen = set()
        for row in self.rows:
            key = (row.kind, row.block_kind, row.image_tokens, row.text_tokens, row.batch, row.width)
            if key in seen:
                raise ValueError(f"{row.kind} {row.width} at {row.image_tokens} tokens is listed twice: drop one")
            seen.add(key)
            if row.width is None or row.block_kind is None:
                continue
            if row.block_kind not in self.specs:
                raise ValueError(f"a row is of a block of kind {row.block_kind}; there are: {', '.join(self.specs)}")
            spec = self.specs[row.block_kind]
            if set(row.width) != set(spec.groups_without(row.not_updated)):
                raise ValueError(f"a row of kind {row.kind} names the groups {', '.join(row.width)}")
            if not row.width.within(spec.full):
                raise ValueError(f"a row is wider than the full block: {row.width}, {spec.full}")
            for group, count in row.width.items():
                if count == LINEAR_MAP and not spec.groups[group].mappable:
                    raise ValueError(f"{group} is 1 or more, not 0: {row.width}")
        return self

    @classmethod
    def read(cls, path: str | Path) -> TimeTable:
        """Read a file.

        Raises:
            ValueError: not a table of costs; one line says why.
            FileNotFoundError: no such file.
        """
        return read_json(cls, Path(path).read_bytes(), f"{path} is not a table of costs")

    def at(self, image_tokens: int, text_tokens: int, batch: int = 1) -> Times:
        """Return the costs at one shape.

        Raises:
            ValueError: of some kind no full block that agrees with plain torch was measured there.
        """
        shape = (image_tokens, text_tokens, batch)
        rows = [row for row in self.rows if row.agrees]
        here = tuple(row for row in rows if (row.image_tokens, row.text_tokens, row.batch) == shape)
        for kind, spec in self.specs.items():
            if not any((row.kind, row.block_kind, row.width) == ("block", kind, spec.full) for row in here):
                there = sorted({(row.image_tokens, row.text_tokens, row.batch) for row in rows})
                raise ValueError(
                    f"no full block of kind {kind} was measured at {shape} (image tokens, text tokens, batch); "
                    f"there are: {there}"
                )
        return Times.of_rows(self.specs, here, shape)
