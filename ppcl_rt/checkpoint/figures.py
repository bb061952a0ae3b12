"""Figures of a model card: what a checkpoint runs at a few ratios, from its catalog alone."""

from __future__ import annotations

import math
from collections.abc import Iterator

from ppcl_rt.planning.catalog import Catalog
from ppcl_rt.planning.costs import Bytes, Flops
from ppcl_rt.planning.plan import Plan
from ppcl_rt.planning.planner import Planner

RATIOS = (1.0, 0.7, 0.5, 0.35)
# Bytes of a number in bfloat16.
_EACH = 2
_PREFIXES = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def figures(catalog: Catalog) -> list[str]:
    """Lines of Markdown: a table of ratios with what each costs and loses, and what the figures count."""
    image, text, batch = catalog.reference
    rows = list(_rows(catalog))
    return [
        "| ratio | parameters | FLOPs | bytes in bfloat16 | loss |",
        "|---|---|---|---|---|",
        *rows,
        "",
        "A ratio bounds the share of the dense parameters and that of the dense FLOPs. FLOPs count 2 for a "
        f"multiply-add, in the blocks of one forward of {batch} sample{'' if batch == 1 else 's'}, "
        f"{image} image and {text} text tokens. Loss is the velocity error, squared and over the dense model's signal. "
        "Measured: of the whole plan. Predicted: from what single choices lose. It is no score of pictures.",
    ]


def _rows(catalog: Catalog) -> Iterator[str]:
    if catalog.only is not None:
        loss = catalog.loss(catalog.largest)
        yield _row(catalog, catalog.ratio(catalog.largest), catalog.largest, f"{loss:.2g}" if loss == loss else "")
        return
    planner, seen = Planner(catalog), set[Plan]()
    for ratio in RATIOS:
        try:
            plan = planner.plan(ratio)
        except ValueError:
            # None is that small.
            return
        measured = planner.measured_loss(plan)
        if measured is None and catalog.sketch is not None:
            # The runtime plans by the sketches, which lie among the tensors: this plan is another.
            return
        if plan in seen:
            continue
        seen.add(plan)
        yield _row(catalog, ratio, plan, _loss(planner, plan, measured))


def _loss(planner: Planner, plan: Plan, measured: float | None) -> str:
    if plan == planner.catalog.dense:
        return "0: the dense model"
    loss = planner.loss(plan) if measured is None else measured
    return "" if math.isnan(loss) else f"{loss:.2g}, {'predicted' if measured is None else 'measured'}"


def _row(catalog: Catalog, ratio: float, plan: Plan, loss: str) -> str:
    architecture = catalog.architecture
    params, flops = architecture.params(plan), Flops(catalog.reference).of(architecture, plan)
    held = Bytes(_EACH, compensated=catalog.compensated).of(architecture, plan)
    share = flops / architecture.dense_flops(catalog.reference)
    return (
        f"| {ratio:.3g} | {params:,} ({params / architecture.dense_params:.2f}) | {_short(flops)}FLOPs ({share:.2f}) "
        f"| {_short(held)}B | {loss or 'not known'} |"
    )


def _short(amount: float) -> str:
    """An amount in three digits and the prefix of its unit: ``33.1 M``."""
    for size, prefix in _PREFIXES:
        if amount >= size:
            return f"{amount / size:.3g} {prefix}"
    return f"{amount:.3g} "
