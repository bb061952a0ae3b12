"""What a checkpoint has to hold: the headers of its files against its catalog and the model's class."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from ppcl_rt.checkpoint.reader import Checkpoint
from ppcl_rt.planning.block_spec import BlockSpec
from ppcl_rt.planning.catalog import Catalog
from ppcl_rt.planning.legal import LegalWidths
from ppcl_rt.planning.plan import text_maps
from ppcl_rt.planning.sketch import TENSORS, choices
from ppcl_rt.planning.width import LINEAR_MAP

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
    if catalog.sketch is not None:
        rows = sum(1 for _ in choices(catalog))
        for name in TENSORS:
            _compare(source, name, (rows, catalog.sketch.size))
    for run in (run.interval for run in catalog.text_runs):
        for name in text_maps(run, architecture.depth):
            _compare(source, f"text_runs.{run.key}.{name}.weight", (architecture.dim, architecture.dim))
            _compare(source, f"text_runs.{run.key}.{name}.bias", (architecture.dim,))
    for prefix, number, widths in catalog.prefixed:
        shapes, spec = stock[architecture.kind(number)], architecture.spec(number)
        for name, shape in (*shapes.items(), *_beside(spec, widths, catalog.compensated)):
            _compare(source, prefix + name, shape)


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
                if not output.shared:
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
