"""What becomes of an adapter of the dense model under a plan."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Literal, NamedTuple

from ppcl_rt.planning.catalog import Catalog
from ppcl_rt.planning.plan import Plan, PlannedBlock
from ppcl_rt.planning.width import LINEAR_MAP

Way = Literal["exactly", "approximately", "left out"]


class Taken(NamedTuple):
    """How many layers of an adapter a plan takes, and why not all.

    Attributes:
        exactly: as the dense model with the same heads, channels and blocks left out would take it.
        approximately, left_out: layers by reason.
    """

    exactly: int
    approximately: dict[str, int]
    left_out: dict[str, int]

    def __str__(self) -> str:
        lines = [f"{self.exactly} layers exactly"]
        for way, reasons in (("approximately", self.approximately), ("left out", self.left_out)):
            lines += [f"{count} layers {way}: {reason}" for reason, count in reasons.items()]
        return "\n".join(lines)


def taken(catalog: Catalog, plan: Plan, layers: Iterable[str]) -> Taken:
    """Count what a plan takes of an adapter.

    Args:
        layers: paths in the dense model of the layers that the adapter is for.
    """
    ways = {path: way for path, *way in _in_blocks(catalog, plan)}
    architecture = catalog.architecture
    lists = tuple(f"{blocks.path}." for blocks in architecture.lists)
    counts: Counter[tuple[str, str]] = Counter()
    for path in layers:
        way, reason = ways.get(path, ("left out", "block not run") if path.startswith(lists) else ("exactly", ""))
        counts[way, reason] += 1
    by_way = {
        each: {reason: count for (way, reason), count in sorted(counts.items()) if way == each}
        for each in ("approximately", "left out")
    }
    return Taken(counts["exactly", ""], by_way["approximately"], by_way["left out"])


def _in_blocks(catalog: Catalog, plan: Plan) -> Iterator[tuple[str, Way, str]]:
    """For each layer of the dense model that something in the plan stands for: how, and why not exactly."""
    students = {student.interval: student for student in catalog.students}
    for planned in plan.blocks:
        if planned.student:
            # A checkpoint of one plan does not say what its students were copied from.
            student = students.get(planned.interval)
            origins = (planned.interval.first,) if student is None else student.copied_from
            for block in planned.interval:
                for path, way, reason in _of_block(catalog, plan, planned, block):
                    if block not in origins:
                        yield path, "left out", "a student runs that was not copied from this block"
                    elif way == "left out":
                        yield path, way, reason
                    else:
                        yield path, "approximately", "a student that was copied from this block runs"
        else:
            yield from _of_block(catalog, plan, planned, planned.interval.first)


def _of_block(catalog: Catalog, plan: Plan, planned: PlannedBlock, block: int) -> Iterator[tuple[str, Way, str]]:
    spec, (home, number) = catalog.spec(block), catalog.architecture.place(block)
    not_updated = plan.not_updated(planned)
    for part in spec.parts:
        path = f"{home}.{number}.{part.path}"
        counts = {segment.group: planned.width.get(segment.group, 0) for segment in part.segments}
        if not spec.runs(part, not_updated):
            yield path, "left out", "the text stream is not updated"
        elif counts and not any(counts.values()):
            yield path, "left out", "a linear map runs in place of the MLP"
        elif LINEAR_MAP in counts.values():
            yield path, "approximately", "a linear map runs in place of the MLP, and the rest of the layer"
        elif part.axis == 1 and catalog.compensated and any(n < spec.groups[g].count for g, n in counts.items()):
            yield path, "approximately", "over the heads and channels that are kept; the layer makes up for the others"
        else:
            yield path, "exactly", ""
