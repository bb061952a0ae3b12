"""Weights as blocks run them, out of what a small checkpoint stores: ``base + up @ down``, and maps of text runs once.

In the place of ``X.weight`` ``[rows, columns]`` a file may hold ``X.up`` ``[rows, r]`` and ``X.down`` ``[r, columns]``.
The base is what the catalog says X resembles:

    a compensated output at a count     the first units, in rank order, of the output that it replaces
    a part of a student                 the part of the teacher's block that the student was copied from; the mean of
                                        all blocks of the interval for the start ``average``
    linear maps, maps of text runs      zero

All runs that begin at block 3 read by the same map what block 5 reads: it may lie under ``text_runs.3.z_5``, and the
map from the text after block 3 to that after block 5 under ``text_runs.3.text_5``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch

from ppcl_rt.checkpoint.reader import Checkpoint
from ppcl_rt.planning.block_spec import BlockSpec, Output
from ppcl_rt.planning.catalog import Catalog
from ppcl_rt.planning.interval import Interval
from ppcl_rt.planning.plan import text_maps
from ppcl_rt.planning.width import LINEAR_MAP

# Reads a tensor by its name.
Read = Callable[[str], torch.Tensor]


class Replaced(NamedTuple):
    """A compensated output at a count.

    Attributes:
        prefix: what the names of its block's tensors begin with.
        spec: of the block.
        output: what it replaces.
        units: how many units it reads.
    """

    prefix: str
    spec: BlockSpec
    output: Output
    units: int

    @property
    def part(self) -> str:
        """Path of the part that it replaces."""
        return f"{self.prefix}{self.output.part.path}"

    def first_columns(self, weight: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
        """The columns of the first units in rank order.

        Args:
            weight: of the whole part, ``[rows, columns]``.
            order: rank order of the group ``[units]``.
        """
        _, offset, unit = self.output.segment
        index = offset + order.long()[: self.units, None] * unit + torch.arange(unit)
        return weight.index_select(1, index.reshape(-1))


class Bases:
    """What each weight of a catalog resembles (see the top of this file).

    Attributes:
        replaced: path of a compensated output -> what it replaces.
        copied: path of a student's part -> paths of the teacher's parts that it is near the mean of.
    """

    def __init__(self, catalog: Catalog) -> None:
        self.replaced: dict[str, Replaced] = {}
        self.copied: dict[str, tuple[str, ...]] = {}
        architecture = catalog.architecture
        for prefix, number, widths in catalog.prefixed:
            spec = catalog.spec(number)
            for output in spec.outputs:
                for legal in widths.of(output.segment.group)[1:]:
                    if legal.units != LINEAR_MAP:
                        path = f"{prefix}replacements.{spec.replacement(output.name, legal.units)}"
                        self.replaced[path] = Replaced(prefix, spec, output, legal.units)
        for student in catalog.students:
            prefixes = ["{}.{}.".format(*architecture.place(n)) for n in student.copied_from]
            for part in catalog.spec(student.interval.first).parts:
                path = f"students.{student.interval.key}.{part.path}"
                self.copied[path] = tuple(f"{prefix}{part.path}" for prefix in prefixes)

    def base(self, path: str, read: Read) -> torch.Tensor | None:
        """The base of a weight in float32, None for zero.

        Args:
            path: of the layer.
            read: reads weights as they run, and rank orders.
        """
        if (replaced := self.replaced.get(path)) is not None:
            whole = read(f"{replaced.part}.weight").float()
            return replaced.first_columns(whole, read(f"{replaced.prefix}order.{replaced.output.segment.group}"))
        if path in self.copied:
            return torch.stack([read(f"{part}.weight").float() for part in self.copied[path]]).mean(0)
        return None


def shared_map(run: Interval, name: str) -> str:
    """Where a map of a text run (`text_maps`) lies once for all runs with the same first block."""
    return f"text_runs.{run.first}.{name}" if name != "text" else f"text_runs.{run.first}.text_{run.last}"


def composed(base: torch.Tensor | None, up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
    """``base + up @ down`` in float32."""
    product = up.float() @ down.float()
    return product if base is None else base + product


class ComposedCheckpoint(Checkpoint):
    """A checkpoint folder that reads as if every weight lay in it whole.

    Names, shapes and tensors are those that a model holds. `Checkpoint` reads what the files hold.
    """

    def __init__(self, folder: Path, variant: str | None = None) -> None:
        super().__init__(folder, variant)
        self._compose()

    def _compose(self) -> None:
        """Find out which of the tensors that are stored are factors, and which are maps of several text runs."""
        self._bases = Bases(self.catalog) if self.catalog is not None else None
        # Name that a model knows -> name in the checkpoint, for tensors that lie there as they are.
        self._whole = {name: name for name in self._stored}
        # Name that a model knows -> path of the two factors in the checkpoint.
        self._factored: dict[str, str] = {}
        runs = self.catalog.text_runs if self.catalog is not None else ()
        depth = self.catalog.architecture.depth if self.catalog is not None else 0
        aliases = {
            f"text_runs.{run.interval.key}.{name}": shared_map(run.interval, name)
            for run in runs
            for name in text_maps(run.interval, depth)
        }
        unaliased = {path: path for path in map(self._path, self._whole) if path not in aliases.values()}
        for path, stored in {**unaliased, **aliases}.items():
            if {f"{stored}.up", f"{stored}.down"} <= set(self._stored) and f"{path}.weight" not in self._stored:
                self._factored[f"{path}.weight"] = stored
            for which in ("weight", "bias"):
                if path in aliases and f"{path}.{which}" not in self._stored and f"{stored}.{which}" in self._stored:
                    self._whole[f"{path}.{which}"] = f"{stored}.{which}"
        hidden = {f"{stored}.{which}" for stored in self._factored.values() for which in ("up", "down")}
        hidden |= {f"{stored}.{which}" for stored in aliases.values() for which in ("weight", "bias")}
        self._whole = {name: stored for name, stored in self._whole.items() if name not in hidden}

    @staticmethod
    def _path(name: str) -> str:
        return name.rpartition(".")[0]

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all tensors, as a model holds them."""
        return (*self._whole, *self._factored)

    def __contains__(self, name: str) -> bool:
        return name in self._whole or name in self._factored

    def stored_path(self, path: str) -> str:
        """Where a layer lies in the checkpoint: two maps of text runs that lie in one place are one map."""
        name = f"{path}.weight"
        return self._factored.get(name) or self._path(self._whole.get(name, name))

    def base_of(self, path: str) -> torch.Tensor | None:
        """What the weight of a layer is stored as a difference to, in float32; None for zero."""
        return None if self._bases is None else self._bases.base(path, self.read)

    def replaced_by(self, path: str) -> Replaced | None:
        """What a layer stands in for at a count; None for any other layer."""
        return None if self._bases is None else self._bases.replaced.get(path)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, from the files' headers.

        Raises:
            ValueError: there is no such tensor, or its two factors do not fit each other.
        """
        if name not in self._factored:
            return super().shape(self._whole.get(name, name))
        up, down = (super(ComposedCheckpoint, self).shape(f"{self._factored[name]}.{f}") for f in ("up", "down"))
        if len(up) != 2 or len(down) != 2 or up[1] != down[0]:
            raise ValueError(f"{self.folder}: the factors of {name} are {list(up)} and {list(down)}, no product")
        return up[0], down[1]

    def read(self, name: str) -> torch.Tensor:
        """Read one tensor in the dtype that it is stored in; a composed one in float32.

        Raises:
            ValueError: missing, or altered since the catalog was made.
        """
        if name not in self._factored:
            return super().read(self._whole.get(name, name))
        assert self._bases is not None, "only a checkpoint with a catalog holds factors"
        stored = self._factored[name]
        base = self._bases.base(self._path(name), self.read)
        up, down = (super(ComposedCheckpoint, self).read(f"{stored}.{factor}") for factor in ("up", "down"))
        return composed(base, up, down)

    def as_stored(self, held: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Bring tensors as a model holds them into the form in which this checkpoint stores them.

        Factors and shared maps are kept where they still give exactly what is held, in its dtype; what was trained or
        rounded since is stored whole.

        Args:
            held: a tensor for each of `names`, in stock order of units.
        """
        made: dict[str, torch.Tensor] = {}
        sources: dict[str, list[str]] = {}
        for name in self.names:
            stored = f"{self._factored[name]}.weight" if name in self._factored else self._whole[name]
            sources.setdefault(stored, []).append(name)

        def read(name: str) -> torch.Tensor:
            return self._recomposed(name, made, held) if name in self._factored else held[name]

        # Bases first: students' parts before what replaces them.
        for stored, names in sorted(sources.items(), key=lambda item: "replacements" in item[0]):
            if not all(torch.equal(held[name], held[names[0]]) for name in names):
                # Maps that some runs share in memory are written apart.
                made |= {name: held[name].clone() for name in names}
                continue
            name, path = names[0], self._path(stored)
            if name not in self._factored:
                made[stored] = held[name]
                continue
            factors = {
                f"{path}.{which}": super(ComposedCheckpoint, self).read(f"{path}.{which}").to(held[name].dtype)
                for which in ("up", "down")
            }
            base = self._bases.base(self._path(name), read) if self._bases is not None else None
            weight = composed(base, factors[f"{path}.up"], factors[f"{path}.down"])
            same = torch.equal(weight.to(held[name].dtype), held[name])
            made |= factors if same else {stored: held[name]}
        return made

    def _recomposed(
        self, name: str, made: Mapping[str, torch.Tensor], held: Mapping[str, torch.Tensor]
    ) -> torch.Tensor:
        """A weight as it will be read from what is about to be written."""
        path = self._factored[name]
        if f"{path}.up" not in made:
            return held[name]
        assert self._bases is not None, "only a checkpoint with a catalog holds factors"
        base = self._bases.base(self._path(name), lambda other: held[other])
        return composed(base, made[f"{path}.up"], made[f"{path}.down"])
