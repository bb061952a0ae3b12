"""Modulations of known timesteps: computed once for a sampler's timesteps, then looked up.

A modulation depends on the timestep alone, and a sampler's timesteps are known before it begins. `precompute` makes a
table for each program: a row a timestep, with the embedding of the timestep first and then what every block that the
program runs would compute from it. A forward takes rows: it needs neither the products nor the weights behind them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from ppcl_rt.model.block import PluggableBlock
from ppcl_rt.model.program import BlockCall, Program
from ppcl_rt.model.residency import READING
from ppcl_rt.model.switching import Switching
from ppcl_rt.planning.block_spec import Part
from ppcl_rt.planning.plan import Plan

# Tables that are kept, one a program, the oldest goes first: 50 timesteps of 60 blocks of width 3,072 are 220 MB in
# bfloat16.
_MOST_TABLES = 16


class _Table(NamedTuple):
    """The rows of one program, ``[timesteps, E + modulations of all calls]``; the program, so that its id stays its."""

    program: Program
    rows: torch.Tensor


@dataclass
class Precomputed:
    """What `Modulations.precompute` was asked for, and the tables so far.

    Attributes:
        timesteps: as they were given.
        keep_weights: whether the weights stay.
        tables: by the id of the program.
    """

    timesteps: torch.Tensor
    keep_weights: bool
    tables: dict[int, _Table] = field(default_factory=dict)
    _places: dict[torch.dtype, dict[float, int]] = field(default_factory=dict)

    def place(self, timesteps: torch.Tensor) -> list[int] | None:
        """The rows of some timesteps, None unless all are in the table; both are compared in the model's dtype."""
        known = self._places.get(timesteps.dtype)
        if known is None:
            known = {t: n for n, t in enumerate(self.timesteps.to(timesteps.dtype).tolist())}
            self._places[timesteps.dtype] = known
        asked = [known.get(t, -1) for t in timesteps.tolist()]
        return None if -1 in asked else asked


class Modulations(Switching):
    """Tables of modulations."""

    _precomputed: Precomputed | None

    def embed_timesteps(self, timesteps: torch.Tensor) -> torch.Tensor:
        """What blocks are conditioned on, ``[n, E]``, for timesteps ``[n]``; a family whose modulations depend on
        nothing else provides it.

        Raises:
            ValueError: they depend on something else.
        """
        raise ValueError(f"modulations of the family {self.family} do not come from the timestep alone")

    def every_condition(
        self, timesteps: torch.Tensor, pooled: torch.Tensor | None = None, guidance: Sequence[float] = ()
    ) -> torch.Tensor:
        """All that blocks can be conditioned on at some timesteps, ``[n, E]``.

        Args:
            timesteps: ``[n]`` in [0, 1].
            pooled: ``[N, E']``, pooled text embeddings, for families whose blocks see them.
            guidance: values of the guidance, for models that embed one.

        Raises:
            ValueError: what blocks see is missing, or something else was given.
        """
        if pooled is not None or guidance:
            raise ValueError(f"modulations of the family {self.family} see no prompts and no guidance: leave them out")
        return self.embed_timesteps(timesteps)

    @torch.no_grad()
    def precompute(self, timesteps: torch.Tensor | Sequence[float], *, keep_weights: bool = True) -> None:
        """Compute the modulations of some timesteps now, for what runs now and for whatever is set later.

        From then on a forward in evaluation mode at these timesteps looks them up: the same bits in every batch, within
        1e-6 (float32) of what computing gives. Weights that change afterwards, adapters too, need another
        `precompute`; no timesteps at all end it. Looking up waits for the device once a forward.

        Args:
            timesteps: ``[n]``, as ``forward`` is given them (``scheduler.timesteps.to(dtype) / 1000``).
            keep_weights: False drops the weights of modulations, and reads them from the checkpoint while a plan is set
                that has no table yet. Other timesteps are refused then. ``resident_bytes`` counts tables and what is
                left; parameters and FLOPs of plans go on counting the checkpoint's.

        Raises:
            ValueError: no finite timesteps of one dimension, or modulations that depend on more than the timestep.
        """
        asked = torch.as_tensor(timesteps, dtype=torch.float32, device="cpu").detach().clone()
        if asked.dim() != 1 or not torch.isfinite(asked).all():
            raise ValueError(f"precompute takes finite timesteps [n], not {list(asked.shape)}")
        if not keep_weights and self._source is None:
            raise ValueError("without a checkpoint to read them from again, precompute has to keep the weights")
        with READING:
            plans = self._plans_set or [self.plan]
            precomputed = Precomputed(self._conditions(asked), keep_weights) if len(asked) else None
            if precomputed is not None:
                # Refused before anything changes.
                self.embed_timesteps(precomputed.timesteps.to(next(self.parameters())))
            dropped = self._precomputed is not None and not self._precomputed.keep_weights
            self._precomputed = None
            if dropped:
                # Programs that are remembered have lost weights: they are prepared again, which reads them.
                self._forget()
                if isinstance(self._current, Program):
                    self._current = self.prepare(self._current.plan)
                for plan in plans:
                    self.make_resident(plan)
            self._precomputed = precomputed
            for plan in plans:
                self.prepare(plan)
            self._graphs.drop_all()

    def prepare(self, plan: Plan) -> Program:
        """As `Switching.prepare`, with the table of what was precomputed."""
        program = super().prepare(plan)
        if self._precomputed is not None:
            self._table(program, self._precomputed)
        return program.latest

    def move_to(self, grown: Mapping[PluggableBlock, PluggableBlock]) -> None:
        """As `Switching.move_to`; tables stay: what a timestep gives is the same at any width."""
        super().move_to(grown)
        if self._precomputed is not None:
            tables = [table._replace(program=table.program.latest) for table in self._precomputed.tables.values()]
            self._precomputed.tables = {id(table.program): table for table in tables}

    def _conditions(self, timesteps: torch.Tensor) -> torch.Tensor:
        """The timesteps whose embeddings a forward at these reads: themselves, ``[n]``."""
        return timesteps

    @property
    def resident_bytes(self) -> int:
        """Bytes of all weights and tables that the model holds now."""
        precomputed = self._precomputed
        # A tuple, because another thread may add a table.
        tables = () if precomputed is None else tuple(precomputed.tables.values())
        return super().resident_bytes + sum(table.rows.numel() * table.rows.element_size() for table in tables)

    def _rows(self, program: Program, timestep: torch.Tensor) -> torch.Tensor | None:
        """The rows of a forward's timesteps ``[B]``: ``[1, ...]`` where all are one, ``[B, ...]`` otherwise.

        Returns:
            None where they have to be computed.

        Raises:
            ValueError: one of them is not in the table, and the weights were dropped.
        """
        precomputed = self._precomputed
        if precomputed is None:
            return None
        compiling = torch.compiler.is_compiling()
        if precomputed.keep_weights and (self.training or compiling):
            return None
        if compiling:
            raise ValueError("timesteps are looked up on the host: compile blocks alone, or keep the weights")
        places = precomputed.place(timestep)
        if places is None:
            if precomputed.keep_weights:
                return None
            raise ValueError(f"no modulations of timestep {timestep.tolist()}: precompute it, or keep the weights")
        rows = self._table(program, precomputed).rows
        # Under offload the table was made where the weights rest.
        return (rows[places[0] : places[0] + 1] if len(set(places)) == 1 else rows[places]).to(timestep.device)

    @torch.no_grad()
    def _table(self, program: Program, precomputed: Precomputed) -> _Table:
        """The table of a program; made now if need be, with weights that were dropped read for it and dropped again."""
        program = program.latest
        table = precomputed.tables.get(id(program))
        if table is not None and table.program is program:
            return table
        with READING:
            if not precomputed.keep_weights:
                program = super().prepare(program.plan)
                self.make_resident(program.plan)
                program = program.latest
            condition = self.embed_timesteps(precomputed.timesteps.to(next(self.parameters())))
            columns = [condition]
            for call in program.calls:
                read = call.block.modulation_input(condition)
                columns += [
                    call.block.factored(part.name, read, str(part.factored), call.width[str(part.factored)])
                    for part in _factored_parts(call)
                ]
            while len(precomputed.tables) >= _MOST_TABLES:
                del precomputed.tables[next(iter(precomputed.tables))]
            table = precomputed.tables[id(program)] = _Table(program, torch.cat(columns, dim=1))
            if not precomputed.keep_weights:
                self.drop_factored()
        return table

    @staticmethod
    def _from_rows(program: Program, rows: torch.Tensor) -> tuple[torch.Tensor, list[Mapping[str, torch.Tensor]]]:
        """Take rows apart: the embedding, and for each call its modulations by the name of the part."""
        sizes = [part.rows for call in program.calls for part in _factored_parts(call)]
        condition, *products = rows.split([rows.shape[1] - sum(sizes), *sizes], dim=1)
        each: Iterator[torch.Tensor] = iter(products)
        return condition, [{part.name: next(each) for part in _factored_parts(call)} for call in program.calls]

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """Move or cast as any module does, tables too; with the weights there, tables are made again when needed."""
        super()._apply(fn, recurse)
        if self._precomputed is not None:
            tables = {} if self._precomputed.keep_weights else self._precomputed.tables
            self._precomputed.tables = {key: table._replace(rows=fn(table.rows)) for key, table in tables.items()}
        return self

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Load, as any module; tables of weights that are there are made again when needed."""
        if self._precomputed is not None and self._precomputed.keep_weights:
            self._precomputed.tables = {}
        return super().load_state_dict(*args, **kwargs)

    def trim(self, to_width: bool = False) -> None:
        """As `Switching.trim`; tables of programs that are gone go too."""
        super().trim(to_width)
        if self._precomputed is not None:
            kept = {id(program) for program in (*self._programs.values(), self._current)}
            self._precomputed.tables = {k: t for k, t in self._precomputed.tables.items() if k in kept}


def _factored_parts(call: BlockCall) -> Iterator[Part]:
    """The factored parts that a call reads, in the order of the spec."""
    left = () if call.text_run is None or call.text_run.is_first else ("text",)
    return (part for part in call.block.spec.parts if part.factored and part.updates not in left)
