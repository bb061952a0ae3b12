"""What makes a diffusers transformer run at any ratio: weights that come and go with plans, and programs over them.

A family mixes `Pluggable` into diffusers' own class and says how its blocks are laid out (`BlockLayout`); nothing here
knows which family it serves.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Hashable, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar, Literal

import torch
from torch import nn

from ppcl_rt.checkpoint.reader import Checkpoint, line, locate, write_checkpoint
from ppcl_rt.model.graphs import Graphs, Mode, check_mode
from ppcl_rt.model.program import Program, ProgramStep, Still
from ppcl_rt.ops.implementation import backend
from ppcl_rt.ops.packing import pack
from ppcl_rt.planning.catalog import Catalog, Shape, text_maps
from ppcl_rt.planning.plan import Interval, Plan, Step, Width
from ppcl_rt.planning.planner import Planner, check_ratio
from ppcl_rt.planning.schedule import Schedule

# Programs chosen by `at`, per model; a context variable, so that threads and tasks do not see each other's.
_CHOSEN: ContextVar[Mapping[int, Program]] = ContextVar("ppcl_chosen", default=MappingProxyType({}))
# Held while weights are read into a model. One for all: reading is rare, and a lock in a model could not be copied.
_READING = threading.RLock()
# Programs that are remembered; one is a tuple of references, a few kilobytes.
_MOST_PROGRAMS = 256
# Names of the layers that stand in for modulations below the full rank.
DOWN, UP = "modulation_down", {"image": "modulation_image", "text": "modulation_text"}
HUB_ARGUMENTS = frozenset({"cache_dir", "force_download", "local_files_only", "revision", "token"})


@dataclass(frozen=True)
class BlockLayout:
    """How a family's block is made of heads and channels.

    Attributes:
        axes: parameter name -> (group of `Width`, axis that the group's units lie along).
        outputs: name -> (path of a linear layer that reads a group's units, the group). These are the layers that
            least squares compensates. Names end in the stream that they write to.
        inputs: stream -> path of the linear layer that makes its MLP's units: not there where a linear map stands in.
        side_by_side: paths of linear layers of one shape that read the same input: they are kept next to each other in
            memory, so that one batched product makes all of them.
        modulations: stream -> path of the linear layer ``[P, D]`` that makes its modulations, all of the same input.
            Below the full rank layers in ``narrow`` stand in for them: `DOWN`, ``[rank, D]``, which the streams share,
            and `UP` of each, ``[P, rank]``. A lower rank is a prefix of a higher one.
    """

    axes: Mapping[str, tuple[str, int]]
    outputs: Mapping[str, tuple[str, str]]
    inputs: Mapping[str, str]
    modulations: Mapping[str, str]
    side_by_side: tuple[tuple[str, ...], ...] = ()

    def __post_init__(self) -> None:
        factors = {f"narrow.{DOWN}.weight": 0, f"narrow.{DOWN}.bias": 0}
        factors |= {f"narrow.{up}.weight": 1 for up in UP.values()}
        axes = {**self.axes, **{name: ("modulation", axis) for name, axis in factors.items()}}
        object.__setattr__(self, "axes", MappingProxyType(axes))

    def narrow_name(self, output: str, count: int) -> str:
        """Name of an output's compensated layer at a count; at 0, of the linear map that stands in for the MLP."""
        return f"{output}_{count}"

    @property
    def on_demand(self) -> tuple[str, ...]:
        """Paths of the layers that a step may do without."""
        return (*(path for path, _ in self.outputs.values()), *self.inputs.values(), *self.modulations.values())

    @property
    def of_text(self) -> frozenset[str]:
        """Of these, the ones that a block does without that leaves the text stream alone; and names of `UP`."""
        outputs = {path for name, (path, _) in self.outputs.items() if name.endswith("_text")}
        return frozenset({*outputs, self.inputs["text"], self.modulations["text"], UP["text"]})


class Absent(nn.Module):
    """Stands where a layer is that no plan has needed so far; it holds nothing and cannot be called."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Raise: there is nothing here."""
        raise RuntimeError("this layer was not loaded: a plan that needs it has to be set first")


class Pluggable:
    """Mixin for a transformer whose blocks can be left out, stood in for and narrowed.

    The family's class sets `family`, `layout`, and `make_block`; blocks live in ``transformer_blocks`` under their
    original numbers (with holes where a block is not resident), students in ``students`` and the maps of text runs in
    ``text_runs``, both keyed ``"3-5"``. A block has a property ``width``, a ``ModuleDict`` ``narrow``, takes ``width=``
    and ``text_input=`` when called, and computes the latter (`text_input`) for the blocks behind it.
    """

    family: ClassVar[str]
    layout: ClassVar[BlockLayout]
    # Of the family's diffusers class: stock tools read the teacher out of a checkpoint under this name.
    stock_name: ClassVar[str]

    transformer_blocks: nn.ModuleList
    students: nn.ModuleDict
    text_runs: nn.ModuleDict

    def _become_pluggable(self) -> None:
        """Set up; the last thing that the family's ``__init__`` calls."""
        self._catalog: Catalog | None = None
        self._source: Checkpoint | None = None
        self._planner: Planner | None = None
        self._active: Program | None = None
        self._schedule: Schedule | None = None
        self._programs: dict[Plan, Program] = {}
        self._clocks: dict[int, tuple[float, int]] = {}
        self._graphs = Graphs()
        self.students = nn.ModuleDict()
        self.text_runs = nn.ModuleDict()

    # What a family provides.

    @classmethod
    def make_block(cls, config: Mapping[str, Any]) -> nn.Module:
        """Build one block at full width."""
        raise NotImplementedError

    @classmethod
    def shape_of(cls, config: Mapping[str, Any], outer_params: int) -> Shape:
        """Dimensions of the dense model."""
        raise NotImplementedError

    def adopt(self, block: Any) -> None:
        """Give a block that joins the model what callers have set on the others."""

    def _walk(self, program: Program, **inputs: Any) -> torch.Tensor:
        """Run a program; all that it reads is in ``inputs``, in `_reads` and in `_conditions`."""
        raise NotImplementedError

    def _conditions(self, program: Program) -> Hashable:
        """What a program's kernels depend on besides weights and inputs."""
        return (backend(), self.training)  # type: ignore[attr-defined]

    # Choosing what runs.

    @property
    def catalog(self) -> Catalog:
        """What this model can do."""
        if self._catalog is None:
            blocks = {id(p) for p in [*self.transformer_blocks.parameters(), *self.students.parameters()]}
            outer = sum(p.numel() for p in self.parameters() if id(p) not in blocks)  # type: ignore[attr-defined]
            self._catalog = Catalog.of_dense(self.family, self.shape_of(self.config, outer))  # type: ignore[attr-defined]
        return self._catalog

    @property
    def planner(self) -> Planner:
        """Plans for this model's catalog."""
        if self._planner is None:
            self._planner = Planner(self.catalog)
        return self._planner

    @property
    def plan(self) -> Plan:
        """The plan that runs now; with a schedule, that of the step that ran last."""
        return self._program().plan

    def set_ratio(self, ratio: float) -> None:
        """Run at most ``ratio`` times the dense parameters from now on.

        The first visit of a ratio plans (milliseconds to tenths of a second) and reads what is not resident yet; from
        then on it is a look-up.

        Raises:
            ValueError: not in (0, 1], or below the smallest plan.
        """
        self.set_plan(self.planner.plan(ratio))

    def set_plan(self, plan: Plan) -> None:
        """Run a plan from now on.

        Raises:
            ValueError: the plan is for another checkpoint or asks for what it does not hold.
        """
        self._active, self._schedule = self._prepare(plan), None

    def set_schedule(self, schedule: Schedule) -> None:
        """Choose by denoising step from now on; everything that the schedule names becomes resident now.

        A step is counted each time the timestep changes, and counting starts again when it rises; calls at one timestep
        (the two halves of guidance) are one step. Counts are kept per thread.
        """
        for _, choice in schedule.phases:
            self._prepare(self._plan_of(choice))
        self._schedule, self._active = schedule, None
        self._clocks.clear()

    @contextlib.contextmanager
    def at(self, ratio: float | None = None, *, plan: Plan | None = None) -> Iterator[Any]:
        """Run at a ratio or plan inside a ``with``, in this thread or task alone.

        Raises:
            ValueError: as `set_ratio` and `set_plan`, or not exactly one of the two was given.
        """
        choice = ratio if plan is None else plan
        if choice is None or (ratio is not None and plan is not None):
            raise ValueError("at() takes a ratio or a plan: give one of them")
        program = self._prepare(self._plan_of(choice))
        token = _CHOSEN.set({**_CHOSEN.get(), id(self): program})
        try:
            yield self
        finally:
            _CHOSEN.reset(token)

    def _plan_of(self, choice: float | Plan) -> Plan:
        return choice if isinstance(choice, Plan) else self.planner.plan(choice)

    def _program(self, timestep: torch.Tensor | None = None) -> Program:
        """The program that runs now; ``timestep`` moves the clock of a schedule on."""
        chosen = _CHOSEN.get().get(id(self))
        if chosen is not None:
            return chosen
        if self._schedule is not None:
            return self._prepare(self._plan_of(self._schedule.at(self._tick(timestep))))
        if self._active is None:
            self._active = self._prepare(self.catalog.dense)
        return self._active

    def _tick(self, timestep: torch.Tensor | None) -> int:
        me = threading.get_ident()
        last, step = self._clocks.get(me, (float("inf"), -1))
        if timestep is None:
            return max(step, 0)
        # Reading the timestep waits for the device, once a forward, and only where a schedule is set.
        now = float(timestep.reshape(-1)[0])
        if now != last:
            step = step + 1 if now < last else 0
            self._clocks[me] = (now, step)
        return step

    def _prepare(self, plan: Plan) -> Program:
        """The program of a plan, its weights resident."""
        program = self._programs.get(plan)
        if program is None:
            self.catalog.check(plan)
            with _READING:
                self._make_resident(plan)
                steps = tuple(
                    ProgramStep(self._module(step), step.width, step.blocks, self._still(plan, step))
                    for step in plan.steps
                )
            program = self._programs[plan] = Program(plan, steps)
            while len(self._programs) > _MOST_PROGRAMS:
                del self._programs[next(iter(self._programs))]
        return program

    # Running.

    @property
    def graphs(self) -> Graphs:
        """The CUDA graphs of this model: what is captured, and why the last forward was not replayed."""
        return self._graphs

    def set_graphs(self, mode: Mode) -> None:
        """Replay forwards as CUDA graphs from now on.

        Args:
            mode: ``"auto"`` where a forward waits for the host, True wherever it can be done, False never.

        Raises:
            ValueError: any other mode.
        """
        check_mode(mode)
        self._graphs.drop_all()
        self._graphs = Graphs(mode)

    def _run(self, program: Program, **inputs: Any) -> torch.Tensor:
        """Walk a program, or replay the graph of an earlier walk."""
        if torch.compiler.is_compiling():
            return self._walk(program, **inputs)
        output: torch.Tensor = self._graphs.run(
            functools.partial(self._walk, program),
            inputs,
            program=program,
            model=self,  # type: ignore[arg-type]
            modules=lambda: self._reads(program),
            conditions=lambda: self._conditions(program),
            obstacle=self._obstacle,
        )
        return output

    def _reads(self, program: Program) -> Iterator[nn.Module]:
        """The modules that a program reads: its own, and those outside the blocks."""
        homes = (self.transformer_blocks, self.students, self.text_runs)
        yield from (child for child in self.children() if all(child is not home for home in homes))  # type: ignore[attr-defined]
        for step in program.steps:
            yield step.module
            if step.text is not None:
                yield from (each for each in (step.text.reads, step.text.moves_on) if each is not None)

    def _obstacle(self) -> str:
        """Say why there can be no graph as this model is set up; nothing where there can."""
        if getattr(self, "is_cache_enabled", False):
            return "a cache of diffusers"
        if torch.is_grad_enabled() and getattr(self, "gradient_checkpointing", False):
            return "gradient checkpointing"
        return ""

    # Weights.

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Load, as any module; captured graphs go."""
        self._graphs.drop_all()
        return super().load_state_dict(*args, **kwargs)  # type: ignore[misc]

    def _home(self, step: Step) -> tuple[nn.ModuleList | nn.ModuleDict, str]:
        if step.student:
            return self.students, step.blocks.key
        return self.transformer_blocks, str(step.blocks.first)

    def _module(self, step: Step) -> nn.Module:
        home, key = self._home(step)
        module = home._modules[key]
        assert module is not None, "a program is made of resident blocks"
        return module

    def _still(self, plan: Plan, step: Step) -> Still | None:
        """A step's part in the text run that it is in, None where it is in none."""
        block = step.blocks.first
        for run in plan.text_runs:
            if block in run:
                maps: Any = self.text_runs[run.key]
                if block == run.first:
                    return Still(begins=True)
                ends = block == run.last and "text" in maps
                return Still(begins=False, reads=maps[f"z_{block}"], moves_on=maps["text"] if ends else None)
        return None

    def _make_resident(self, plan: Plan) -> None:
        for run in plan.text_runs:
            if run.key not in self.text_runs:
                self._graphs.drop_all()
                self.text_runs[run.key] = self._read_text_run(run)
        for step in plan.steps:
            home, key = self._home(step)
            if self._source is not None:
                self._read_block(home, key, step, step.blocks.first in plan.still)
            elif key not in home._modules:
                raise ValueError(f"block {step.blocks} was dropped and there is no checkpoint to read it from")

    def _read_block(self, home: nn.ModuleList | nn.ModuleDict, key: str, step: Step, still: bool) -> None:
        """Read what a step needs and the model does not hold yet; ``still`` as in `Plan.still`."""
        assert self._source is not None
        prefix = f"{'students' if step.student else 'transformer_blocks'}.{key}."
        like = next(self.parameters())  # type: ignore[attr-defined]
        block: Any = home._modules.get(key)
        if block is None:
            with torch.device("meta"):
                block = self.make_block(self.config)  # type: ignore[attr-defined]
            for path in self.layout.on_demand:
                block.set_submodule(path, Absent())
            block.orders = self._read_orders(prefix)
            self.adopt(block)
        layout, full, first = self.layout, self.catalog.shape.width, block is not home._modules.get(key)
        held = Width(0, 0, 0, 0) if first else block.width
        width = step.width.union(held)

        def read(name: str, count: int) -> torch.Tensor:
            assert self._source is not None
            tensor = _prefix(self._source.read(prefix + name), self.layout.axes.get(name), block.orders, count)
            return tensor.to(device=like.device, dtype=like.dtype)

        # A width is given by what the block holds, so what it reads comes in first and the block is grown at the end.
        fresh: dict[str, torch.Tensor] = {}

        def bring(path: str, count: int = 0) -> None:
            fresh.update({f"{path}.{part}": read(f"{path}.{part}", count) for part in ("weight", "bias")})

        apart = {path for path, _ in layout.outputs.values()} | {*layout.modulations.values()}
        unread = layout.of_text if still else frozenset()
        for name in self._block_names:
            group, _ = layout.axes.get(name, ("", 0))
            wider = getattr(width, group) > getattr(held, group) if group else first
            if wider and name.rpartition(".")[0] not in apart:
                fresh[name] = read(name, getattr(width, group) if group else 0)
        for output, (path, group) in layout.outputs.items():
            count = getattr(step.width, group)
            narrow = layout.narrow_name(output, count)
            if path in unread:
                continue
            if count < getattr(full, group) and f"{prefix}narrow.{narrow}.weight" in self._source:
                if narrow not in block.narrow:
                    bring(f"narrow.{narrow}")
            elif getattr(block.get_submodule(path), "in_features", 0) < count * block.orders[group].shape[1]:
                bring(path, count)
        rank = step.width.modulation
        if rank < full.modulation:
            if DOWN not in block.narrow or block.narrow[DOWN].out_features < rank:
                bring(f"narrow.{DOWN}", rank)
            for up in UP.values():
                if up not in unread and (up not in block.narrow or block.narrow[up].in_features < rank):
                    bring(f"narrow.{up}", rank)
        else:
            for path in layout.modulations.values():
                if path not in unread and isinstance(block.get_submodule(path), Absent):
                    bring(path)
        if fresh:
            self._graphs.drop_all()
        for name, tensor in fresh.items():
            _assign(block, name, tensor.requires_grad_(like.requires_grad))
        self._lay_side_by_side(block)
        block.train(self.training)  # type: ignore[attr-defined]
        home._modules[key] = block
        ordered = sorted(home._modules.items(), key=lambda item: int(item[0].split("-")[0]))
        home._modules.clear()
        home._modules.update(ordered)

    def _read_text_run(self, run: Interval) -> nn.ModuleDict:
        if self._source is None:
            raise ValueError(f"text run {run} was dropped and there is no checkpoint to read it from")
        like, maps = next(self.parameters()), nn.ModuleDict()  # type: ignore[attr-defined]
        for name in text_maps(run, self.catalog.shape.depth):
            for part in ("weight", "bias"):
                tensor = self._source.read(f"text_runs.{run.key}.{name}.{part}").to(
                    device=like.device, dtype=like.dtype
                )
                _assign(maps, f"{name}.{part}", tensor.requires_grad_(like.requires_grad))
        return maps.train(self.training)  # type: ignore[attr-defined]

    def _read_orders(self, prefix: str) -> dict[str, torch.Tensor]:
        """Rank order of each group ``[units, indices of a unit]``: where they lie along the stock tensors' axis."""
        assert self._source is not None
        orders = {}
        for group, count in self.catalog.shape.width._asdict().items():
            name = f"{prefix}order.{group}"
            # The rank order of modulations is that of their factors as they lie.
            order = self._source.read(name) if name in self._source else torch.arange(count)
            if order.is_floating_point() or not torch.equal(order.long().sort().values, torch.arange(count)):
                raise ValueError(f"{self._source.folder}: {name} is no permutation of 0..{count - 1}")
            unit = self.catalog.shape.head_dim if group == "heads" else 1
            orders[group] = order.long()[:, None] * unit + torch.arange(unit)
        return orders

    @property
    def _block_names(self) -> tuple[str, ...]:
        with torch.device("meta"):
            return tuple(self.make_block(self.config).state_dict())  # type: ignore[attr-defined]

    @property
    def resident_bytes(self) -> int:
        """Bytes of all weights that the model holds now."""
        tensors = [*self.parameters(), *self.buffers()]  # type: ignore[attr-defined]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def _lay_side_by_side(self, block: Any) -> None:
        """Keep next to each other in memory what one batched product makes (`BlockLayout.side_by_side`)."""
        for paths in self.layout.side_by_side:
            pack(*map(block.get_submodule, paths))

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """Move or cast as any module does, then lay side by side again what that took apart; captured graphs go."""
        self._graphs.drop_all()
        super()._apply(fn, recurse)  # type: ignore[misc]
        for block in (*self.transformer_blocks, *self.students.values()):
            self._lay_side_by_side(block)
        return self

    def trim(self) -> None:
        """Drop blocks and students that neither the plan or schedule set nor an enclosing `at` runs."""
        choices: list[float | Plan] = [self.plan]
        if self._schedule is not None:
            choices += [choice for _, choice in self._schedule.phases]
        elif self._active is not None:
            choices.append(self._active.plan)
        steps = [step for choice in choices for step in self._plan_of(choice).steps]
        with _READING:
            wanted = {(id(home), key) for home, key in map(self._home, steps)}
            for home in (self.transformer_blocks, self.students):
                for key in [key for key in home._modules if (id(home), key) not in wanted]:
                    del home._modules[key]
            runs = {run.key for choice in choices for run in self._plan_of(choice).text_runs}
            for key in [key for key in self.text_runs if key not in runs]:
                del self.text_runs[key]
            kept = {
                id(module) for home in (self.transformer_blocks, self.students) for module in home._modules.values()
            }
            self._programs = {
                plan: program
                for plan, program in self._programs.items()
                if all(id(step.module) in kept for step in program.steps) and {r.key for r in plan.text_runs} <= runs
            }
            self._graphs.drop_all()

    # Files.

    @classmethod
    def load(
        cls,
        path: str | Path,
        ratio: float = 1.0,
        *,
        plan: Plan | None = None,
        dtype: torch.dtype | None = None,
        device: str | torch.device | None = None,
        resident: Literal["plan", "all"] = "plan",
        graphs: Mode = "auto",
        subfolder: str | None = None,
        **hub: Any,
    ) -> Any:
        """Load a checkpoint at a ratio; see `ppcl_rt.load`."""
        check_ratio(ratio)
        if resident not in ("plan", "all"):
            raise ValueError(f'resident is "plan" or "all", not {resident!r}')
        check_mode(graphs)
        if unknown := sorted(set(hub) - HUB_ARGUMENTS):
            raise ValueError(f"load takes no {unknown[0]}; see help(ppcl_rt.load)")
        source = Checkpoint(locate(path, subfolder, **hub))
        model = cls._from_checkpoint(source, dtype, device)
        model.set_graphs(graphs)
        model.set_plan(plan if plan is not None else model.planner.plan(ratio))
        if resident == "all":
            for every in model._everything():
                model._prepare(every)
        return model.eval()

    @classmethod
    def _from_checkpoint(cls, source: Checkpoint, dtype: torch.dtype | None, device: Any) -> Any:
        """Build the model with everything outside the blocks, and no block."""
        init, _, _ = cls.extract_init_dict(dict(source.config))  # type: ignore[attr-defined]
        depth = init.get("num_layers")
        if not isinstance(depth, int) or depth < 1:
            raise ValueError(f'{source.folder}: config.json has no "num_layers" of 1 or more')
        try:
            model: Any = cls(**{**init, "num_layers": 0})
        except Exception as error:
            # Whatever a constructor that checks nothing trips over, it is the config that makes no sense.
            raise ValueError(f"{source.folder}: config.json describes no {cls.stock_name}: {line(error)}") from None
        model.register_to_config(num_layers=depth, _name_or_path=str(source.folder))
        outer = model.state_dict()
        for name, tensor in outer.items():
            if source.shape(name) != tuple(tensor.shape):
                raise ValueError(
                    f"{source.folder}: {name} is {list(source.shape(name))}, config.json asks for {list(tensor.shape)}"
                )
        shape = cls.shape_of(model.config, sum(tensor.numel() for tensor in outer.values()))
        catalog = source.catalog or Catalog.of_dense(cls.family, shape)
        if catalog.family != cls.family:
            raise ValueError(f"{source.folder} is of family {catalog.family}, not {cls.family}")
        if catalog.shape != shape:
            raise ValueError(f"{source.folder}: the catalog says {catalog.shape}, the weights are {shape}")
        model._catalog, model._source = catalog, source
        model._check_blocks()
        held = {name: source.read(name) for name in outer}
        dtype = dtype or next(iter(held.values())).dtype
        model.load_state_dict(
            {name: tensor.to(device=device, dtype=dtype) for name, tensor in held.items()}, assign=True
        )
        return model

    def _check_blocks(self) -> None:
        """Compare the headers of all files with what catalog and config promise."""
        assert self._source is not None
        with torch.device("meta"):
            expected = {name: tuple(t.shape) for name, t in self.make_block(self.config).state_dict().items()}  # type: ignore[attr-defined]
        full, head_dim, catalog = self.catalog.shape.width, self.catalog.shape.head_dim, self.catalog
        runnable = {f"transformer_blocks.{n}": widths for n, widths in enumerate(catalog.blocks)}
        runnable |= {f"students.{student.interval.key}": student.widths for student in catalog.students}
        dim = catalog.shape.dim
        for run in (run.interval for run in catalog.text_runs):
            maps = {f"text_runs.{run.key}.{name}" for name in text_maps(run, catalog.shape.depth)}
            self._compare_shapes(
                {f"{name}.weight": (dim, dim) for name in maps} | {f"{name}.bias": (dim,) for name in maps}
            )
        for prefix, widths in runnable.items():
            wanted = dict(expected)
            for group, count in full._asdict().items():
                if len(widths.of(group)) > 1 and group != "modulation":
                    wanted[f"order.{group}"] = (count,)
            for output, (path, group) in self.layout.outputs.items():
                rows, unit = expected[f"{path}.weight"][0], head_dim if group == "heads" else 1
                for option in widths.of(group)[1:]:
                    narrow = f"narrow.{self.layout.narrow_name(output, option.count)}"
                    if catalog.compensated or option.count == 0:
                        columns = option.count * unit or catalog.shape.dim
                        wanted |= {f"{narrow}.weight": (rows, columns), f"{narrow}.bias": (rows,)}
            if widths.rank:
                wanted |= {f"narrow.{DOWN}.weight": (widths.rank, dim), f"narrow.{DOWN}.bias": (widths.rank,)}
                for stream, path in self.layout.modulations.items():
                    [rows] = expected[f"{path}.bias"]
                    wanted |= {f"narrow.{UP[stream]}.weight": (rows, widths.rank), f"narrow.{UP[stream]}.bias": (rows,)}
            self._compare_shapes({f"{prefix}.{name}": shape for name, shape in wanted.items()})

    def _compare_shapes(self, wanted: Mapping[str, tuple[int, ...]]) -> None:
        assert self._source is not None
        for name, shape in wanted.items():
            if self._source.shape(name) != shape:
                raise ValueError(
                    f"{self._source.folder}: {name} is {list(self._source.shape(name))}, "
                    f"the catalog asks for {list(shape)}"
                )

    def _everything(self) -> Iterator[Plan]:
        """Plans that between them need every tensor: each block and student at each of its counts."""
        catalog, depth = self.catalog, self.catalog.shape.depth
        yield catalog.dense
        for blocks, widths, student in [
            *((Interval(n, n), widths, False) for n, widths in enumerate(catalog.blocks)),
            *((student.interval, student.widths, True) for student in catalog.students),
        ]:
            for rank in range(max(len(widths.of(group)) for group in Width._fields)):
                counts = (widths.of(group)[min(rank, len(widths.of(group)) - 1)].count for group in Width._fields)
                step = Step(blocks=blocks, width=Width(*counts), student=student)
                yield Plan(checkpoint=catalog.fingerprint, depth=depth, steps=(step,))
        for run in catalog.text_runs:
            kept = [(n, catalog.shape.width) for n in run.interval]
            yield Plan.of(catalog.fingerprint, depth, kept, text_runs=[run.interval])

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **kwargs: Any) -> Any:
        """Load as diffusers does, so that pipelines find their way here; takes the arguments of `load` as well.

        Raises:
            ValueError: also where an argument asks for what this class cannot do.
        """
        for name in ("quantization_config", "device_map"):
            if kwargs.get(name) is not None:
                raise ValueError(f"from_pretrained here takes no {name}: load first, then place or quantise the model")
        names = ("ratio", "plan", "device", "resident", "graphs", "subfolder")
        ours = {name: kwargs[name] for name in names if name in kwargs}
        hub = {name: kwargs[name] for name in HUB_ARGUMENTS if kwargs.get(name) is not None}
        dtype = kwargs.get("torch_dtype", kwargs.get("dtype"))
        return cls.load(pretrained_model_name_or_path, dtype=dtype, **ours, **hub)

    def save_pretrained(
        self, save_directory: str | Path, max_shard_size: int | str = "10GB", safe_serialization: bool = True, **_: Any
    ) -> None:
        """Write the whole pluggable checkpoint: what is resident as it is now, all else from where it was loaded.

        Tensors are written in the model's dtype, heads and channels in stock order.

        Raises:
            ValueError: ``safe_serialization=False``: checkpoints here are safetensors, never pickle.
        """
        if not safe_serialization:
            raise ValueError("safe_serialization=False would write pickle: checkpoints here are safetensors only")
        catalog = write_checkpoint(save_directory, self.stock_config, self.catalog, self.full_state(), max_shard_size)
        if self._source is not None and Path(save_directory).resolve() == self._source.folder.resolve():
            self._reopen(catalog)

    def _reopen(self, catalog: Catalog) -> None:
        """Go on with the checkpoint that was just written over the one that this model was loaded from."""
        assert self._source is not None
        plan = self.plan.model_copy(update={"checkpoint": catalog.fingerprint})
        self._source, self._catalog, self._planner = Checkpoint(self._source.folder), catalog, None
        self._programs.clear()
        self._graphs.drop_all()
        self.set_plan(plan)

    @property
    def stock_config(self) -> dict[str, Any]:
        """What diffusers' class is built from, as ``config.json`` has it."""
        # diffusers keeps notes of its own under private names: where it was loaded from, a set in no fixed order.
        public = {key: value for key, value in self.config.items() if not key.startswith("_")}  # type: ignore[attr-defined]
        return {"_class_name": self.stock_name, **public}

    def full_state(self) -> dict[str, torch.Tensor]:
        """All tensors of the checkpoint, heads and channels in stock order, in the model's dtype, on the CPU."""
        held: dict[str, torch.Tensor] = {n: t.detach().cpu() for n, t in self.state_dict().items()}  # type: ignore[attr-defined]
        if self._source is None:
            return held
        dtype = next(iter(held.values())).dtype
        state = {}
        for name in self._source.names:
            tensor = self._source.read(name)
            state[name] = tensor.to(dtype) if tensor.is_floating_point() else tensor
            if name in held:
                parts = name.split(".", 2)
                home = getattr(self, parts[0], None) if parts[0] in ("transformer_blocks", "students") else None
                block = home._modules.get(parts[1]) if home is not None else None
                layout = self.layout.axes.get(parts[2]) if block is not None else None
                state[name] = _restore(state[name], held[name], layout, getattr(block, "orders", {}))
        return state


def _prefix(
    tensor: torch.Tensor, layout: tuple[str, int] | None, orders: Mapping[str, torch.Tensor], count: int
) -> torch.Tensor:
    """The first ``count`` units of a stock tensor in rank order; the tensor itself where it has no units."""
    if layout is None:
        return tensor
    group, axis = layout
    return tensor.index_select(axis, orders[group][:count].reshape(-1))


def _restore(
    stock: torch.Tensor, held: torch.Tensor, layout: tuple[str, int] | None, orders: Mapping[str, torch.Tensor]
) -> torch.Tensor:
    """``stock`` with what is resident put back into its place."""
    if layout is None:
        return held
    group, axis = layout
    return stock.to(held.dtype, copy=True).index_copy_(axis, orders[group].reshape(-1)[: held.shape[axis]], held)


def _assign(block: nn.Module, name: str, tensor: torch.Tensor) -> None:
    """Put a tensor into a block, making or resizing its linear layer."""
    path, _, part = name.rpartition(".")
    parent, _, leaf = path.rpartition(".")
    home = block.get_submodule(parent)
    old = getattr(home._modules.get(leaf), part, None) if leaf else None
    if isinstance(old, nn.Parameter) and not old.is_meta:
        # What is resident may have been trained since: a block grows around it.
        with torch.no_grad():
            tensor[tuple(slice(size) for size in old.shape)] = old
    if part == "weight" and tensor.ndim == 2 and (leaf not in home._modules or isinstance(home._modules[leaf], Absent)):
        home.add_module(leaf, nn.Linear(tensor.shape[1], tensor.shape[0], device="meta"))
    module = block.get_submodule(path)
    setattr(module, part, nn.Parameter(tensor, requires_grad=tensor.requires_grad))
    if isinstance(module, nn.Linear) and part == "weight":
        module.out_features, module.in_features = tensor.shape
