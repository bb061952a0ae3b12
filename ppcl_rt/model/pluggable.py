"""What makes a diffusers transformer run at any ratio.

A family mixes `Pluggable` into diffusers' own class and says what its blocks are made of; nothing here knows which
family it serves. The jobs lie in files of their own: `residency` holds weights, `switching` chooses what runs, `folder`
loads and saves; this file runs a program: it replays a CUDA graph, or calls the family's `_walk`.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Hashable, Iterable, Iterator
from typing import Any, ClassVar, NamedTuple

import torch
from torch import nn

from ppcl_rt.model.block import PluggableBlock, refuse_layer_skips
from ppcl_rt.model.borrowed import are_borrowed
from ppcl_rt.model.caching import Caching
from ppcl_rt.model.exchange import Exchange
from ppcl_rt.model.graphs import Graphs
from ppcl_rt.model.offloadable import Offloadable
from ppcl_rt.model.parallel import ContextParallel
from ppcl_rt.model.program import BlockCall, Program
from ppcl_rt.model.residency import Home
from ppcl_rt.ops.implementation import backend

# Graphs that a compiled block may have, one for each width: what torch allows all functions together.
_MOST_GRAPHS = 256


class _ByPlace(NamedTuple):
    """A block call that takes its arguments by place, as checkpointing passes them.

    Not a function in a function: diffusers asks for its ``__call__``, which Dynamo finds on objects alone.
    """

    call: BlockCall
    names: tuple[str, ...]

    def __call__(self, *values: Any) -> tuple[torch.Tensor, torch.Tensor]:
        output: tuple[torch.Tensor, torch.Tensor] = self.call.block(
            **dict(zip(self.names, values, strict=True)), width=self.call.width
        )
        return output


class Pluggable(Caching, ContextParallel, Offloadable, Exchange):
    """Mixin for a transformer whose blocks can be left out, stood in for and narrowed.

    The family's class comes first, then this mixin, then diffusers' class. It sets the class attributes below and
    ``block_lists``, ``depth_settings``, ``stock_name``, ``family``; implements `make_block`, `architecture_of`, `_walk`
    and a ``forward`` that calls `_program` and `_run`; and ends its ``__init__`` with `become_pluggable`.

    Attributes:
        condition: keyword under which blocks are given what their modulations depend on, the timestep embedding.
        after_blocks: path of the module that follows the last block.
    """

    # Of diffusers' classes.
    _gradient_checkpointing_func: Any
    gradient_checkpointing: bool
    # How blocks are compiled, None where they are not.
    _compiling: tuple[tuple[Any, ...], dict[str, Any]] | None
    condition: ClassVar[str] = "temb"
    after_blocks: ClassVar[str] = "norm_out"

    def fill_lists(self, **kinds: Iterable[str]) -> None:
        """Have lists of blocks filled as diffusers' ``__init__``, which is told of no blocks, makes them.

        So random weights are drawn in the order in which diffusers' class draws them.

        Args:
            kinds: path of a list -> the kind of each of its blocks.
        """
        self._to_fill = {path: tuple(of_list) for path, of_list in kinds.items()}

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an attribute as any module does; an empty list of blocks is filled (`fill_lists`)."""
        super().__setattr__(name, value)
        if name in self.block_lists:
            for kind in self.__dict__.get("_to_fill", {}).pop(name, ()):
                value.append(self.make_block(self.config, kind))

    def become_pluggable(self) -> None:
        """Set up; the last thing that the family's ``__init__`` calls."""
        self._catalog = self._source = self._planner = self._current = self._precomputed = None
        self._quantisation = self._casting = self._compiling = None
        self._programs, self._times, self._adapters, self._fused = {}, {}, {}, {}
        self._fused_for_good = ()
        self._followed = None
        self._graphs = Graphs()
        self._lists = {path: getattr(self, path) for path in self.block_lists}
        self.students = nn.ModuleDict()
        self.text_runs = nn.ModuleDict()
        if self.resident_blocks():
            # Built by hand: it runs all of them. Compiled code could not look that up in its first forward.
            self.set_plan(self.catalog.largest)

    def compile_repeated_blocks(self, *args: Any, **kwargs: Any) -> None:
        """Compile each block, as diffusers does, now and when it is read.

        Args:
            args, kwargs: of ``torch.compile``. Blocks of another width are another graph, of which torch allows 8 for a
                function: here 256 unless ``recompile_limit`` says otherwise, where ``torch.compile`` has it.
        """
        if "recompile_limit" in inspect.signature(torch.compile).parameters:
            kwargs = {"recompile_limit": _MOST_GRAPHS, **kwargs}
        theirs: Any = super()
        theirs.compile_repeated_blocks(*args, **kwargs)
        self._compiling = (args, kwargs)

    def complete(self, block: PluggableBlock, home: Home) -> None:
        """As `Residency.complete`; a block that is new, or has grown to another object, is compiled as the others."""
        super().complete(block, home)
        if self._compiling is not None and "_compiled_call_impl" not in block.__dict__:
            args, kwargs = self._compiling
            block.compile(*args, **kwargs)

    def _walk(self, program: Program, **inputs: Any) -> torch.Tensor:
        """Run a program; all that it reads is in ``inputs``, in `_reads` and in `_graph_settings`."""
        raise NotImplementedError

    def _graph_settings(self, program: Program) -> Hashable:
        """What a program's kernels depend on besides weights and inputs."""
        return (backend(), self.training)

    @property
    def graphs(self) -> Graphs:
        """The CUDA graphs of this model: what is captured, and why the last forward was not replayed."""
        return self._graphs

    def _run(self, program: Program, **inputs: Any) -> torch.Tensor:
        """Walk a program, or replay the graph of an earlier walk."""
        if torch.compiler.is_compiling():
            return self._walk(program, **inputs)
        tracing = self.follow(program)
        output: torch.Tensor = self._graphs.run(
            functools.partial(self._walk, program),
            inputs,
            program=program,
            model=self,
            modules=lambda: self._reads(program),
            conditions=lambda: self._graph_settings(program),
            obstacle=functools.partial(self._obstacle, program),
        )
        if tracing is not None:
            tracing.post_forward(self, None)
        return output

    def _call_block(self, call: BlockCall, **arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Run a block, with gradient checkpointing where that is on."""
        if not torch.compiler.is_compiling():
            refuse_layer_skips(call.block)
        if not (torch.is_grad_enabled() and self.gradient_checkpointing):
            return call.block(**arguments, width=call.width)
        return self._gradient_checkpointing_func(_ByPlace(call, tuple(arguments)), *arguments.values())

    def _reads(self, program: Program) -> Iterator[nn.Module]:
        """The modules that a program reads: its own, and those outside the blocks."""
        homes = [*self._lists.values(), self.students, self.text_runs]
        yield from (child for child in self.children() if all(child is not home for home in homes))
        for call in program.calls:
            yield call.block
            if call.text_run is not None:
                yield from (m for m in (call.text_run.input_map, call.text_run.exit_map) if m is not None)

    def _obstacle(self, program: Program) -> str:
        """Say why there can be no graph of a program as this model is set up; nothing where there can."""
        if program.dropped or program.later is not None:
            # A graph would keep its weights alive after the last forward.
            return "what it runs was dropped or has grown since"
        if self.is_cache_enabled:
            return "a cache of diffusers"
        if are_borrowed(self):
            return "others call its blocks"
        if self._parallel_config is not None:
            return "context parallel"
        if torch.is_grad_enabled() and getattr(self, "gradient_checkpointing", False):
            return "gradient checkpointing"
        return ""
