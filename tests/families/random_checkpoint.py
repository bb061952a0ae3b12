"""A random pluggable checkpoint of any family, from its specs, and diffusers' model for a plan of it, by the law."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import ppcl_rt
from ppcl_rt import Interval, LegalCount, LegalWidths, PlannedBlock, Student, TextRun, Tokens, Width
from ppcl_rt.planning.plan import text_maps

# kind of block -> group -> narrower counts, widest first
Counts = Mapping[str, Mapping[str, Sequence[int]]]


def roughen(module: nn.Module, seed: int) -> None:
    """Move every parameter, also those that start at 0 or 1, far enough that leaving one out shows in the output."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.15)


@dataclass
class RandomCheckpoint:
    """A checkpoint on disk, and what it was made of.

    Attributes:
        stock: diffusers' model.
        catalog: as written.
        tensors: all tensors by name.
    """

    folder: Path
    stock: Any
    catalog: ppcl_rt.Catalog
    tensors: dict[str, torch.Tensor]

    @classmethod
    def make(
        cls,
        folder: Path,
        model: Any,
        stock: Any,
        counts: Counts,
        students: Sequence[tuple[int, int]] = (),
        text_runs: Sequence[tuple[int, int]] = (),
        compensated: bool = False,
        seed: int = 0,
        reference: tuple[int, int] = (16, 7),
    ) -> RandomCheckpoint:
        """Write one; ``model`` is the pluggable class, and students are random."""
        rng, generator = np.random.default_rng(seed), torch.Generator().manual_seed(seed)
        lists = tuple(f"{path}." for path in model.block_lists)
        outer = sum(tensor.numel() for n, tensor in stock.state_dict().items() if not n.startswith(lists))
        architecture = model.architecture_of(stock.config, outer)

        def widths(block: int) -> LegalWidths:
            spec = architecture.spec(block)
            narrower = counts[architecture.kind(block)]
            losses = {group: np.cumsum(rng.uniform(0.01, 1.0, len(narrower.get(group, ())))) for group in spec.groups}
            return LegalWidths(
                {
                    group: (LegalCount(full, 0.0), *map(LegalCount, narrower.get(group, ()), map(float, losses[group])))
                    for group, full in spec.full.items()
                }
            )

        catalog = ppcl_rt.Catalog(
            family=model.family,
            reference=Tokens(*reference),
            architecture=architecture,
            blocks=tuple(map(widths, range(architecture.depth))),
            students=tuple(
                Student(
                    interval=Interval(*pair), start="first", loss=float(rng.uniform(0.5, 2)), widths=widths(pair[0])
                )
                for pair in students
            ),
            text_runs=tuple(
                TextRun(interval=Interval(*pair), loss=float(rng.uniform(0.01, 0.5))) for pair in text_runs
            ),
            compensated=compensated,
        )
        tensors = {name: tensor.detach().clone() for name, tensor in stock.state_dict().items()}

        def rough(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=generator) * 0.2

        for number, student in enumerate(catalog.students):
            block = cls._block_like(stock, catalog, student.interval.first)
            roughen(block, 100 * seed + number)
            tensors |= {f"students.{student.interval.key}.{name}": t for name, t in block.state_dict().items()}
        for run in catalog.text_runs:
            for name in text_maps(run.interval, architecture.depth):
                tensors[f"text_runs.{run.interval.key}.{name}.weight"] = rough(architecture.dim, architecture.dim)
                tensors[f"text_runs.{run.interval.key}.{name}.bias"] = rough(architecture.dim)
        for prefix, number, legal in catalog.prefixed:
            spec = architecture.spec(number)
            for group in spec.unit_groups:
                tensors[f"{prefix}order.{group}"] = torch.randperm(spec.full[group], generator=generator)
            for output in spec.outputs:
                for count in (each.units for each in legal.of(output.segment.group)[1:]):
                    if compensated or count == ppcl_rt.LINEAR_MAP:
                        path = f"{prefix}replacements.{spec.replacement(output.name, count)}"
                        columns = count * output.segment.unit or spec.dim
                        tensors[f"{path}.weight"] = rough(output.part.rows, columns)
                        if output.biased:
                            tensors[f"{path}.bias"] = rough(output.part.rows)
            for group in spec.rank_groups:
                if rank := legal.highest_rank(group):
                    down = f"{prefix}replacements.{spec.shared_factor(group)}"
                    parts = spec.factored_by(group)
                    tensors |= {f"{down}.weight": rough(rank, parts[0].columns), f"{down}.bias": rough(rank)}
                    for part in parts:
                        tensors[f"{prefix}replacements.{part.name}.weight"] = rough(part.rows, rank)
                        tensors[f"{prefix}replacements.{part.name}.bias"] = rough(part.rows)
        config = {**dict(stock.config), "_class_name": type(stock).__name__}
        config.pop("_name_or_path", None)
        catalog = ppcl_rt.write_checkpoint(folder, config, catalog, tensors)
        return cls(folder, stock, catalog, tensors)

    @staticmethod
    def _block_like(stock: Any, catalog: ppcl_rt.Catalog, number: int) -> Any:
        path, place = catalog.architecture.place(number)
        return copy.deepcopy(stock.get_submodule(path)[place])

    def prefix(self, planned: PlannedBlock) -> str:
        if planned.student:
            return f"students.{planned.interval.key}."
        return "{}.{}.".format(*self.catalog.architecture.place(planned.interval.first))

    def block(self, planned: PlannedBlock) -> Any:
        """diffusers' block with the weights that a planned block names: what it leaves out is zero in its output
        layers, what replaces some columns stands in their place, and two factors are their product.

        Linear maps and text that is not updated are not among this.
        """
        block, prefix = self._block_like(self.stock, self.catalog, planned.interval.first), self.prefix(planned)
        spec = self.catalog.spec(planned.interval.first)
        block.load_state_dict({name: self.tensors[prefix + name] for name in block.state_dict()})
        with torch.no_grad():
            for output in spec.outputs:
                self._zero(block.get_submodule(output.part.path), spec, output, planned, prefix)
            for group in spec.rank_groups:
                if (rank := planned.width[group]) < spec.full[group]:
                    self._lower(block, spec, group, rank, prefix)
        return block

    def _zero(self, layer: nn.Linear, spec: Any, output: Any, planned: PlannedBlock, prefix: str) -> None:
        group, offset, unit = output.segment
        if group not in planned.width:
            return
        count = planned.width[group]
        order = self.tensors[f"{prefix}order.{group}"]
        columns = (offset + order[:, None] * unit + torch.arange(unit)).reshape(-1)
        kept, left_out = columns[: count * unit], columns[count * unit :]
        layer.weight[:, left_out] = 0
        path = f"{prefix}replacements.{spec.replacement(output.name, count)}"
        if count and f"{path}.weight" in self.tensors:
            layer.weight[:, kept] = self.tensors[f"{path}.weight"]
            if output.biased:
                layer.bias.copy_(self.tensors[f"{path}.bias"])

    def _lower(self, block: Any, spec: Any, group: str, rank: int, prefix: str) -> None:
        down = f"{prefix}replacements.{spec.shared_factor(group)}"
        weight, bias = self.tensors[f"{down}.weight"][:rank], self.tensors[f"{down}.bias"][:rank]
        for part in spec.factored_by(group):
            up = self.tensors[f"{prefix}replacements.{part.name}.weight"][:, :rank]
            layer = block.get_submodule(part.path)
            layer.weight.copy_(up @ weight)
            layer.bias.copy_(up @ bias + self.tensors[f"{prefix}replacements.{part.name}.bias"])

    def reference(self, plan: ppcl_rt.Plan) -> Any:
        """diffusers' model for a plan without linear maps and text runs."""
        model = copy.deepcopy(self.stock)
        for each in self.catalog.architecture.lists:
            blocks = [
                self.block(planned)
                for planned in plan.blocks
                if self.catalog.architecture.place(planned.interval.first).path == each.path
            ]
            model.set_submodule(each.path, nn.ModuleList(blocks))
        return model.eval()

    def plan(self, *blocks: PlannedBlock, text_runs: Sequence[tuple[int, int]] = ()) -> ppcl_rt.Plan:
        """A plan of some blocks; all others are skipped."""
        kept = [(each.interval.first, each.width) for each in blocks if not each.student]
        runs = [Interval(*pair) for pair in text_runs]
        return self.catalog.compose(kept, [each for each in blocks if each.student], runs)

    def dense_but(self, *blocks: PlannedBlock, text_runs: Sequence[tuple[int, int]] = ()) -> ppcl_rt.Plan:
        """The dense plan with some blocks, or students, in place of its own."""
        covered = {n for each in blocks for n in each.interval}
        others = [
            PlannedBlock(interval=Interval(n, n), width=self.catalog.spec(n).full)
            for n in range(self.catalog.architecture.depth)
            if n not in covered
        ]
        return self.plan(*others, *blocks, text_runs=text_runs)

    def random_plan(self, rng: np.random.Generator, skip: float = 0.2, maps: bool = True) -> ppcl_rt.Plan:
        """A plan with random students, skipped blocks, text runs, and counts of which half are legal ones."""

        def width(block: int, widths: LegalWidths) -> Width:
            spec, chosen = self.catalog.spec(block), {}
            for group, full in spec.full.items():
                counts = [each.units for each in widths.of(group) if maps or each.units]
                if group not in spec.rank_groups:
                    counts += [int(n) for n in rng.integers(1, full + 1, len(counts))]
                chosen[group] = int(rng.choice(counts))
            return Width(chosen)

        planned, block, depth = [], 0, self.catalog.architecture.depth
        while block < depth:
            here = [student for student in self.catalog.students if student.interval.first == block]
            if here and rng.random() < 0.5:
                student = here[int(rng.integers(len(here)))]
                chosen = width(block, student.widths)
                planned.append(PlannedBlock(interval=student.interval, width=chosen, student=True))
                block = student.interval.last + 1
                continue
            if rng.random() >= skip:
                interval = Interval(block, block)
                planned.append(PlannedBlock(interval=interval, width=width(block, self.catalog.blocks[block])))
            block += 1
        kept = {each.interval.first for each in planned if not each.student}
        runs: list[tuple[int, int]] = []
        for n in rng.permutation(len(self.catalog.text_runs)) if maps else ():
            run = self.catalog.text_runs[n].interval
            apart = all(run.last < first or run.first > last for first, last in runs)
            if kept.issuperset(run) and apart and rng.random() < 0.7:
                runs.append((run.first, run.last))
        return self.plan(*planned, text_runs=runs)
