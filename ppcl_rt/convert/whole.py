"""Plans of whole blocks: those that formats without widths can hold."""

from __future__ import annotations

import math
from collections.abc import Callable

from ppcl_rt.planning.catalog import Catalog
from ppcl_rt.planning.legal import LegalWidths
from ppcl_rt.planning.plan import Plan, PlannedBlock
from ppcl_rt.planning.planner import Planner


def whole_blocks(catalog: Catalog) -> Catalog:
    """The same catalog with whole blocks and students at full width alone: no text runs, no widths, no frontier."""
    blocks = tuple(LegalWidths.only(widths.full) for widths in catalog.blocks)
    students = tuple(
        student.model_copy(update={"widths": LegalWidths.only(student.widths.full)}) for student in catalog.students
    )
    return catalog.model_copy(update={"blocks": blocks, "students": students, "text_runs": (), "frontier": ()})


def obstacle(catalog: Catalog, plan: Plan) -> str:
    """Say what a plan runs that is no whole block; nothing where all are."""
    if plan.text_runs:
        return f"the text stream is not updated over blocks {plan.text_runs[0]}"
    for planned in plan.blocks:
        for group, full in catalog.spec(planned.interval.first).full.items():
            if planned.width[group] != full:
                # As `ppcl plan` shows it.
                return f"{_name(planned)} runs {group} {planned.width[group]}/{full}"
    return ""


def _name(planned: PlannedBlock) -> str:
    return f"the student of {planned.interval}" if planned.student else f"block {planned.interval.first}"


def check_whole(planner: Planner, plan: Plan, within: Callable[[Planner], Plan], what: str) -> None:
    """Refuse a plan that is not of whole blocks.

    Args:
        planner: of the checkpoint.
        within: has a planner make a plan for the budget that ``plan`` was made for.
        what: the format that holds whole blocks alone, for the message.

    Raises:
        ValueError: says what is in the way, and the nearest plan that the format holds: the best within the same
            budget, or else the smallest that there is.
    """
    catalog = planner.catalog
    if not (said := obstacle(catalog, plan)):
        return
    said = f"{said}, {what} holds whole blocks"
    if catalog.only is not None:
        raise ValueError(f"{said}: export the checkpoint that this one was made from with --whole")
    others = planner.among(whole_blocks(catalog))
    try:
        nearest = within(others)
    except ValueError:
        nearest = others.plan(others.smallest_in_digits)
    # Rounded up, so that the plan keeps within it.
    ratio = min(1.0, math.ceil(catalog.ratio(nearest) * 1e4) / 1e4)
    raise ValueError(f"{said}: the nearest plan has ratio {ratio:g}: export it with --ratio {ratio:g} --whole")
