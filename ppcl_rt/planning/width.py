"""Widths: how much of a block runs. Plain data, no torch."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any

from pydantic import GetCoreSchemaHandler
from pydantic_core import CoreSchema, core_schema

# The count of a group of MLP channels when a linear map stands in for the MLP (PPCL eq. 9).
LINEAR_MAP = 0


class Width(Mapping[str, int]):
    """How much of a block runs: for each group of units, the first so many in rank order.

    The groups are those of the block's kind (`ppcl_rt.planning.block_spec.BlockSpec`). A count of `LINEAR_MAP` is a
    linear map in place of an MLP. A group is absent where the block does not run it at all: the text MLP of a block
    that does not update the text stream (PPCL eq. 8).
    """

    __slots__ = ("_counts",)

    def __init__(self, counts: Mapping[str, int] | None = None, /, **more: int) -> None:
        self._counts = {**(counts or {}), **more}

    def __getitem__(self, group: str) -> int:
        return self._counts[group]

    def __iter__(self) -> Iterator[str]:
        return iter(self._counts)

    def __len__(self) -> int:
        return len(self._counts)

    def __hash__(self) -> int:
        return hash(frozenset(self._counts.items()))

    def __repr__(self) -> str:
        return f"Width({', '.join(f'{group}={count}' for group, count in self._counts.items())})"

    def within(self, other: Width) -> bool:
        """Whether no group has more units than in ``other``; a group that is absent there is one too many."""
        return all(group in other and count <= other[group] for group, count in self._counts.items())

    def union(self, other: Width) -> Width:
        """The narrowest width that both are within."""
        return Width({group: max(self.get(group, 0), other.get(group, 0)) for group in {**self, **other}})

    def replace(self, **counts: int) -> Width:
        """The same with other counts for some groups."""
        return Width(self._counts, **counts)

    def without(self, groups: Collection[str]) -> Width:
        """The same without some groups."""
        return Width({group: count for group, count in self._counts.items() if group not in groups})

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        """JSON both ways: an object from group to count."""
        read = core_schema.no_info_after_validator_function(
            cls,
            core_schema.dict_schema(
                # Names without line ends or quotes, since messages hold them.
                core_schema.str_schema(pattern=r"^[A-Za-z0-9_]+$"),
                core_schema.int_schema(ge=0, strict=True),
            ),
        )
        return core_schema.json_or_python_schema(
            json_schema=read,
            python_schema=core_schema.union_schema([core_schema.is_instance_schema(cls), read]),
            serialization=core_schema.plain_serializer_function_ser_schema(dict),
        )
