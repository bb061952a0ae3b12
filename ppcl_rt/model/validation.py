"""What a checkpoint has to hold: the headers of its files against its catalog and the model's class."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from ppcl_rt.checkpoint.reader import Checkpoint
from ppcl_rt.planning.block_spec import BlockSpec, Part
from ppcl_rt.planning.catalog import Catalog
from ppcl_rt.planning.interval import Interval
from ppcl_rt.planning.legal import LegalWidths
from ppcl_rt.planning.plan import text_maps
from ppcl_rt.planning.sketch import TENSORS, choices
from ppcl_rt.planning.width import LINEAR_MAP, Width

Shapes = Mapping[str, tuple[int, ...]]


def check_tensors(source: Checkpoint, catalog: Catalog, stock: Mapping[str, Shapes]) -> None:
    """Compare the shapes of all tensors inside blocks, and of sketches, with what the catalog promises.

    Nothing is read but headers.

    Args:
        stock: shapes of a dense block's tensors by name, for each kind of block.

    Raises:
        ValueError: one is missing or has another shape.
    """
    architecture = catalog.architecture
    if catalog.only is not None:
        _check_one_plan(source, catalog, stock)
        return
    if catalog.sketch is not None:
        rows = sum(1 for _ in choices(catalog))
        for name in TENSORS:
            _compare(source, name, (rows, catalog.sketch.size))
    for run in catalog.text_runs:
        _check_maps(source, catalog, run.interval)
    for prefix, number, widths in catalog.prefixed:
        shapes, spec = stock[architecture.kind(number)], architecture.spec(number)
        for name, shape in (*shapes.items(), *_beside(spec, widths, catalog.compensated)):
            _compare(source, prefix + name, shape)


def _check_maps(source: Checkpoint, catalog: Catalog, run: Interval) -> None:
    dim = catalog.architecture.dim
    for name in text_maps(run, catalog.architecture.depth):
        _compare(source, f"text_runs.{run.key}.{name}.weight", (dim, dim))
        _compare(source, f"text_runs.{run.key}.{name}.bias", (dim,))


def _check_one_plan(source: Checkpoint, catalog: Catalog, stock: Mapping[str, Shapes]) -> None:
    """Compare the tensors of a checkpoint of one plan with what the plan runs."""
    architecture, plan = catalog.architecture, catalog.largest
    for run in plan.text_runs:
        _check_maps(source, catalog, run)
    for planned in plan.blocks:
        first, width = planned.interval.first, planned.width
        prefix = f"students.{planned.interval.key}." if planned.student else "{}.{}.".format(*architecture.place(first))
        spec, shapes = architecture.spec(first), dict(stock[architecture.kind(first)])
        parts = {part.path: shapes.pop(f"{part.path}.weight") for part in spec.parts}
        shapes = {name: shape for name, shape in shapes.items() if name.rpartition(".")[0] not in parts}
        for part in spec.parts:
            if spec.runs(part, plan.not_updated(planned)):
                shapes |= _of_part(source, prefix, spec, part, width)
        for name, shape in shapes.items():
            _compare(source, prefix + name, shape)
        for group in spec.unit_groups:
            if f"{prefix}order.{group}" in source:
                _compare(source, f"{prefix}order.{group}", (spec.groups[group].count,))


def _of_part(source: Checkpoint, prefix: str, spec: BlockSpec, part: Part, width: Width) -> dict[str, tuple[int, ...]]:
    """Shapes of what runs of a part at a width, or in its place."""
    if part.factored and (rank := width[part.factored]) < spec.groups[part.factored].count:
        down, up = f"replacements.{spec.shared_factor(part.factored)}", f"replacements.{part.name}"
        down_shapes = {f"{down}.weight": (rank, part.columns), f"{down}.bias": (rank,)}
        return down_shapes | {f"{up}.weight": (part.rows, rank), f"{up}.bias": (part.rows,)}
    shapes: dict[str, tuple[int, ...]] = {}
    outputs = [output for output in spec.outputs if output.part is part]
    for output in outputs:
        count = width[output.segment.group]
        path = f"replacements.{spec.replacement(output.name, count)}"
        if f"{prefix}{path}.weight" in source or count == LINEAR_MAP:
            columns = spec.dim if count == LINEAR_MAP else count * output.segment.unit
            shapes[f"{path}.weight"] = (part.rows, columns)
            if not output.shared:
                shapes[f"{path}.bias"] = (part.rows,)
    counts = [width[segment.group] for segment in part.segments]
    if (outputs and not outputs[0].shared and shapes) or (part.axis == 0 and counts and not any(counts)):
        return shapes
    less = sum((spec.groups[s.group].count - width[s.group]) * s.unit for s in part.segments)
    rows, columns = part.rows - less * (part.axis == 0), part.columns - less * (part.axis == 1)
    shapes[f"{part.path}.weight"] = (rows, columns)
    if part.bias:
        shapes[f"{part.path}.bias"] = (rows,)
    return shapes


def _beside(spec: BlockSpec, widths: LegalWidths, compensated: bool) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Shapes of what a checkpoint holds for a block next to its stock tensors: rank orders and replacements."""
    for group in spec.unit_groups:
        if len(widths.of(group)) > 1:
            yield f"order.{group}", (spec.groups[group].count,)
    for output in spec.outputs:
        rows = output.part.rows
        for count in (legal.units for legal in widths.of(output.segment.group)[1:]):
            if compensated or count == LINEAR_MAP:
                path = f"replacements.{spec.replacement(output.name, count)}"
                yield f"{path}.weight", (rows, spec.dim if count == LINEAR_MAP else count * output.segment.unit)
                if output.biased:
                    yield f"{path}.bias", (rows,)
    for group in spec.rank_groups:
        rank = widths.highest_rank(group)
        parts = spec.factored_by(group)
        if rank:
            down = f"replacements.{spec.shared_factor(group)}"
            yield from ((f"{down}.weight", (rank, parts[0].columns)), (f"{down}.bias", (rank,)))
            for part in parts:
                up = f"replacements.{part.name}"
                yield from ((f"{up}.weight", (part.rows, rank)), (f"{up}.bias", (part.rows,)))


def _compare(source: Checkpoint, name: str, shape: tuple[int, ...]) -> None:
    if source.shape(name) != shape:
        raise ValueError(f"{source.folder}: {name} is {list(source.shape(name))}, the catalog asks for {list(shape)}")
