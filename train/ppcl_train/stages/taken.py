"""Which choices of a catalog are worth their bytes and their training: those that some plan takes."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

from ppcl_rt import Catalog, Interval, LegalWidths, Plan


def taken(catalog: Catalog, plans: Sequence[Plan], neighbours: int) -> Catalog:
    """Return a catalog without the choices that none of some plans takes.

    Args:
        neighbours: legal counts to keep on either side of one that a plan takes, so that other budgets have a choice.
            Ranks are all kept: they are prefixes of one pair of factors.
    """
    students = {planned.interval for plan in plans for planned in plan.blocks if planned.student}
    runs = {run for plan in plans for run in plan.text_runs}
    counts: dict[tuple[Interval, bool], dict[str, set[int]]] = {}
    for planned in (planned for plan in plans for planned in plan.blocks):
        for group, count in planned.width.items():
            counts.setdefault((planned.interval, planned.student), {}).setdefault(group, set()).add(count)

    def narrowed(widths: LegalWidths, block: int, counts_of: dict[str, set[int]]) -> LegalWidths:
        groups = catalog.spec(block).groups
        return LegalWidths(
            {
                group: tuple(
                    legal
                    for n, legal in enumerate(widths.of(group))
                    if groups[group].is_rank or n in _near(widths, group, counts_of.get(group, ()), neighbours)
                )
                for group in widths.groups
            }
        )

    return catalog.model_copy(
        update={
            "blocks": tuple(
                narrowed(widths, n, counts.get((Interval(n, n), False), {})) for n, widths in enumerate(catalog.blocks)
            ),
            "students": tuple(
                student.model_copy(
                    update={"widths": narrowed(student.widths, student.interval.first, counts[student.interval, True])}
                )
                for student in catalog.students
                if student.interval in students
            ),
            "text_runs": tuple(run for run in catalog.text_runs if run.interval in runs),
        }
    )


def _near(widths: LegalWidths, group: str, wanted: Collection[int], neighbours: int) -> set[int]:
    """Places in the list of a group's legal counts that are kept; the full count always is."""
    places = [n for n, legal in enumerate(widths.of(group)) if legal.units in wanted]
    return {0} | {m for n in places for m in range(n - neighbours, n + neighbours + 1)}


def listed(catalog: Catalog, names: Iterable[str]) -> list[str]:
    """Leave out the names of tensors of students, text runs and replacements that a catalog does not list."""
    students = {student.interval.key for student in catalog.students}
    runs = [run.interval for run in catalog.text_runs]
    maps = {f"{run.first}.z_{n}" for run in runs for n in run if n != run.first}
    maps |= {f"{run.first}.text_{run.last}" for run in runs}
    unlisted = set()
    for prefix, number, widths in catalog.prefixed:
        spec = catalog.spec(number)
        for output in spec.outputs:
            group = output.segment.group
            gone = (count for count in range(spec.groups[group].count) if not widths.has(group, count))
            unlisted |= {f"{prefix}replacements.{spec.replacement(output.name, count)}" for count in gone}

    def is_listed(name: str) -> bool:
        path = name.split(".")
        if path[0] == "text_runs":
            return ".".join(path[1:3]) in maps
        return (path[0] != "students" or path[1] in students) and name.rpartition(".")[0] not in unlisted

    return [name for name in names if is_listed(name)]
