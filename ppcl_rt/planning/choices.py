"""The choices that make up a plan, as the binary variables of a linear program. No torch.

For every group of every block one of its counts is taken, unless a student stands in for the block. A student that is
taken has counts of its own, and so has a block that does not update the text stream.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import cache, cached_property
from typing import Literal, NamedTuple

import numpy as np
from scipy.optimize import LinearConstraint
from scipy.sparse import csr_array

from ppcl_rt.planning import sketch
from ppcl_rt.planning.block_spec import ALL_UPDATED, TEXT_NOT_UPDATED, Stream
from ppcl_rt.planning.catalog import Catalog
from ppcl_rt.planning.costs import Cost
from ppcl_rt.planning.interval import Interval
from ppcl_rt.planning.legal import LegalWidths
from ppcl_rt.planning.plan import Plan, PlannedBlock
from ppcl_rt.planning.width import Width

Kind = Literal["block", "text not updated", "student", "run"]
_KINDS: tuple[Kind, ...] = ("block", "text not updated", "student", "run")
_BLOCK, _NOT_UPDATED, _STUDENT, _RUN = range(4)


class Owner(NamedTuple):
    """What a choice is about: a block, a block that does not update the text, a student or a text run."""

    kind: Kind
    blocks: Interval

    @property
    def not_updated(self) -> frozenset[Stream]:
        """The streams that the block leaves as they were."""
        return TEXT_NOT_UPDATED if self.kind == "text not updated" else ALL_UPDATED


class Choice(NamedTuple):
    """A binary variable: ``owner`` runs a group at a count; or (``group`` is empty) a student or text run is taken."""

    owner: Owner
    group: str
    units: int
    loss: float


class Choices:
    """All choices of a catalog, the rules that make a set of them a plan, and what each costs.

    A set of choices is an array of their numbers, ascending.
    """

    def __init__(self, catalog: Catalog) -> None:
        self.catalog = catalog
        self.all = list(self._list())
        self.losses = np.array([choice.loss for choice in self.all])
        # Of each choice: its number among those that change the prediction, -1 for full counts, which do not.
        self.rows = self._rows()
        self.rules = self._one_of_each()
        self.costs = cache(self._costs)

    def __len__(self) -> int:
        return len(self.all)

    def _costs(self, cost: Cost) -> np.ndarray:
        """What each choice costs; all that is outside of blocks (`Cost.outer`) comes on top."""
        architecture = self.catalog.architecture
        # Blocks of one kind cost the same.
        fixed = cache(lambda kind, not_updated: cost.fixed(architecture, firsts[kind], not_updated))
        group = cache(lambda kind, name, n, not_updated: cost.group(architecture, firsts[kind], name, n, not_updated))
        firsts = {architecture.kind(n): n for n in reversed(range(architecture.depth))}
        found = []
        for owner, name, units, _ in self.all:
            if owner.kind == "run":
                found.append(cost.run(architecture, owner.blocks))
                continue
            # What a block costs at no width at all is counted with its first group, of which one count is taken; a
            # student's is counted where it is taken.
            kind = architecture.kind(owner.blocks.first)
            first = name == ("" if owner.kind == "student" else self._groups(owner)[0])
            total = fixed(kind, owner.not_updated) if first else 0.0
            found.append(total + (group(kind, name, units, owner.not_updated) if name else 0.0))
        return np.array(found, dtype=float)

    def _list(self) -> Iterator[Choice]:
        catalog = self.catalog

        def counts(owner: Owner, widths: LegalWidths) -> Iterator[Choice]:
            for group in self._groups(owner):
                for units, loss, _ in widths.of(group):
                    yield Choice(owner, group, units, loss)

        for n, widths in enumerate(catalog.blocks):
            yield from counts(Owner("block", Interval(n, n)), widths)
        for n in sorted({n for run in catalog.text_runs for n in run.interval if n != run.interval.first}):
            yield from counts(Owner("text not updated", Interval(n, n)), catalog.blocks[n])
        for student in catalog.students:
            owner = Owner("student", student.interval)
            yield Choice(owner, "", 0, student.loss)
            yield from counts(owner, student.widths)
        for run in catalog.text_runs:
            yield Choice(Owner("run", run.interval), "", 0, run.loss)

    def _rows(self) -> np.ndarray:
        number = {choice: n for n, choice in enumerate(sketch.choices(self.catalog))}
        kinds: dict[Kind, Literal["block", "student", "text_run"]] = {"student": "student", "run": "text_run"}
        return np.array(
            [
                number.get(sketch.Choice(kinds.get(owner.kind, "block"), owner.blocks, group, units), -1)
                for owner, group, units, _ in self.all
            ]
        )

    def _groups(self, owner: Owner) -> tuple[str, ...]:
        return self.catalog.spec(owner.blocks.first).groups_without(owner.not_updated)

    @cached_property
    def _numbers(self) -> dict[tuple[Owner, str], list[int]]:
        """The choices of each group of each owner."""
        numbers: dict[tuple[Owner, str], list[int]] = {}
        for n, choice in enumerate(self.all):
            numbers.setdefault((choice.owner, choice.group), []).append(n)
        return numbers

    @property
    def groups(self) -> list[list[int]]:
        """The choices of each group of each owner: those that exclude one another as its counts."""
        return list(self._numbers.values())

    @cached_property
    def places(self) -> np.ndarray:
        """The place of each choice in its group."""
        found = np.zeros(len(self.all), dtype=int)
        for numbers in self.groups:
            found[numbers] = range(len(numbers))
        return found

    def _over(self, kind: str, block: int) -> list[int]:
        """Students or runs that a block is part of; of runs, those in which it does not update the text."""
        return [
            numbers[0]
            for (owner, group), numbers in self._numbers.items()
            if not group
            and owner.kind == kind
            and block in owner.blocks
            and (kind == "student" or block != owner.blocks.first)
        ]

    def _one_of_each(self) -> LinearConstraint:
        """Rows ``low <= sum of choices <= high`` that make a set of choices a plan."""
        rows: list[list[tuple[int, float]]] = []
        bounds: list[tuple[float, float]] = []
        for (owner, group), numbers in self._numbers.items():
            if not group:
                continue
            row, block = [(n, 1.0) for n in numbers], owner.blocks.first
            if owner.kind == "block":
                # It runs at one count, unless a student stands in for it or it does not update the text.
                row += [(n, 1.0) for n in (*self._over("student", block), *self._over("run", block))]
            elif owner.kind == "text not updated":
                row += [(n, -1.0) for n in self._over("run", block)]
            else:
                row.append((self._numbers[owner, ""][0], -1.0))
            rows.append(row)
            bounds.append((1.0, 1.0) if owner.kind == "block" else (0.0, 0.0))
        for run in self.catalog.text_runs:
            # The block that a run begins with computes its text: no student, and no other run over it.
            block, me = run.interval.first, self._numbers[Owner("run", run.interval), ""][0]
            others = [*self._over("student", block), *self._over("run", block)]
            others += [
                self._numbers[Owner("run", other.interval), ""][0]
                for other in self.catalog.text_runs
                if other.interval.first == block and other.interval > run.interval
            ]
            rows += [[(me, 1.0), (other, 1.0)] for other in others]
            bounds += [(0.0, 1.0)] * len(others)
        entries = [(i, column, value) for i, row in enumerate(rows) for column, value in row]
        i, columns, values = zip(*entries, strict=True)
        matrix = csr_array((values, (i, columns)), shape=(len(rows), len(self.all)))
        return LinearConstraint(matrix, *map(np.array, zip(*bounds, strict=True)))

    def plan(self, taken: Iterable[int]) -> Plan:
        """The plan that a set of choices makes."""
        widths: dict[Owner, dict[str, int]] = {}
        runs = []
        for number in taken:
            choice = self.all[number]
            if choice.group:
                widths.setdefault(choice.owner, {})[choice.group] = choice.units
            elif choice.owner.kind == "run":
                runs.append(choice.owner.blocks)
        blocks = [
            PlannedBlock(interval=owner.blocks, width=Width(counts), student=owner.kind == "student")
            for owner, counts in widths.items()
        ]
        catalog = self.catalog
        return catalog.check(Plan.of(catalog.fingerprint, catalog.architecture.depth, (), blocks, runs))

    def of_rows(self, rows: Iterable[int]) -> Plan:
        """The plan that makes these changes and no others (`rows`)."""
        listed = list(sketch.choices(self.catalog))
        chosen = [listed[row] for row in rows]
        catalog, covered = self.catalog, set[int]()
        counts: dict[tuple[str, Interval], dict[str, int]] = {}
        for choice in chosen:
            narrowed = counts.setdefault((choice.kind, choice.interval), {})
            if choice.group:
                narrowed[choice.group] = choice.units
        students = []
        for (kind, interval), narrower in counts.items():
            if kind == "student":
                width = catalog.student(interval).widths.full.replace(**narrower)
                students.append(PlannedBlock(interval=interval, width=width, student=True))
                covered |= set(interval)
        kept = [
            (n, catalog.spec(n).full.replace(**counts.get(("block", Interval(n, n)), {})))
            for n in range(catalog.architecture.depth)
            if n not in covered
        ]
        return catalog.check(catalog.compose(kept, students, [i for kind, i in counts if kind == "text_run"]))

    def moves(self, taken: np.ndarray) -> np.ndarray:
        """Every exchange of one count of a set for another of the same group, ``[moves, 2]``: before, after."""
        pairs = [
            (number, other)
            for number in map(int, taken)
            if (choice := self.all[number]).group
            for other in self._numbers[choice.owner, choice.group]
            if other != number
        ]
        return np.array(pairs, dtype=int).reshape(-1, 2)

    def excluded(self, taken: np.ndarray) -> np.ndarray:
        """Which members of a set each choice excludes, ``[choices, members]``, itself among them."""
        kinds, firsts, lasts, groups, serves_text = self._fields
        is_block = (kinds == _BLOCK) | (kinds == _NOT_UPDATED)
        student, run = kinds == _STUDENT, kinds == _RUN

        def outer(of: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            return of[:, None], of[None, taken]

        (first, its_first), (last, its_last) = outer(firsts), outer(lasts)
        overlap = (first <= its_last) & (its_first <= last)
        same = (kinds[:, None] == kinds[taken]) & (first == its_first) & (last == its_last)
        both_blocks = is_block[:, None] & is_block[taken] & overlap
        same_group = groups[:, None] == groups[taken]
        found = (same | both_blocks) & same_group
        # A student and what it stands in for; but a student's counts belong to itself.
        found |= (student[:, None] | student[taken]) & overlap & ~(same & student[:, None])
        found |= run[:, None] & run[taken] & overlap
        # Blocks of a text run, but for the first, do not run what serves the text alone.
        in_run = run[:, None] & (kinds[taken] == _BLOCK) & serves_text[taken] & (its_first > first) & overlap
        has_run = run[taken] & (kinds == _BLOCK)[:, None] & serves_text[:, None] & (first > its_first) & overlap
        return found | in_run | has_run

    @cached_property
    def _fields(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Of each choice: kind and interval of its owner, number of its group, whether it serves the text alone."""
        names = {name: n for n, name in enumerate(dict.fromkeys(choice.group for choice in self.all))}
        serves_text = [
            bool(c.group) and c.group not in self.catalog.spec(c.owner.blocks.first).groups_without(TEXT_NOT_UPDATED)
            for c in self.all
        ]
        return (
            np.array([_KINDS.index(choice.owner.kind) for choice in self.all]),
            np.array([choice.owner.blocks.first for choice in self.all]),
            np.array([choice.owner.blocks.last for choice in self.all]),
            np.array([names[choice.group] for choice in self.all]),
            np.array(serves_text),
        )
