"""Checkpoint folders in and out of a model: `load`, ``from_pretrained``, ``save_pretrained``."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch

from ppcl_rt.checkpoint.composed import ComposedCheckpoint
from ppcl_rt.checkpoint.places import locate
from ppcl_rt.checkpoint.writer import write_checkpoint
from ppcl_rt.files import refusing_briefly
from ppcl_rt.messages import say_once
from ppcl_rt.model.block import PluggableBlock, without_adapters
from ppcl_rt.model.graphs import Graphs, Mode, check_mode
from ppcl_rt.model.offloading import is_cast, like, one_device, weights_at_hand
from ppcl_rt.model.opening import Opening
from ppcl_rt.model.program import Program
from ppcl_rt.model.quantising import check_device, quantised_names, understood
from ppcl_rt.model.residency import READING
from ppcl_rt.model.tensors import held_at, restore
from ppcl_rt.planning import sketch
from ppcl_rt.planning.budget import Budget, check_ratio
from ppcl_rt.planning.catalog import Catalog
from ppcl_rt.planning.interval import Interval
from ppcl_rt.planning.plan import OnePlan, Plan, PlannedBlock
from ppcl_rt.planning.quantisation import Quantisation
from ppcl_rt.planning.width import Width

_log = logging.getLogger(__name__)
HUB_ARGUMENTS = frozenset({"cache_dir", "force_download", "local_files_only", "revision", "token"})
# Of `load`, beside those of the hub: what ``from_pretrained`` passes on.
_LOAD_ARGUMENTS = (
    "ratio",
    "params",
    "flops",
    "memory",
    "latency",
    "fit",
    "pipeline",
    "offload",
    "shape",
    "plan",
    "device",
    "resident",
    "graphs",
    "quantize",
    "subfolder",
    "variant",
)

Self = TypeVar("Self", bound="CheckpointFolder")


class CheckpointFolder(Opening):
    """Loading and saving."""

    @classmethod
    def load(
        cls: type[Self],
        path: str | Path,
        ratio: float = 1.0,
        *,
        plan: Plan | None = None,
        dtype: torch.dtype | None = None,
        device: str | torch.device | None = None,
        resident: Literal["plan", "all"] = "plan",
        graphs: Mode = "auto",
        subfolder: str | None = None,
        variant: str | None = None,
        params: float | str | None = None,
        flops: float | str | None = None,
        memory: float | str | None = None,
        latency: float | str | None = None,
        fit: float | str | None = None,
        pipeline: Any = None,
        offload: Literal["model"] | None = None,
        shape: Any = None,
        quantize: Quantisation | str | None = None,
        **hub: Any,
    ) -> Self:
        """Load a checkpoint at a ratio or within other budgets; see `ppcl_rt.load`."""
        check_ratio(ratio)
        fitting = {"fit": fit, "pipeline": pipeline, "offload": offload, "shape": shape}
        budget = Budget.of(ratio, params=params, flops=flops, memory=memory, latency=latency, **fitting)
        if resident not in ("plan", "all"):
            raise ValueError(f'resident is "plan" or "all", not {resident!r}')
        check_mode(graphs)
        quantisation = Quantisation.of(quantize)
        if unknown := sorted(set(hub) - HUB_ARGUMENTS):
            raise ValueError(f"load takes no {unknown[0]}; see help(ppcl_rt.load)")
        with refusing_briefly():
            model = cls.without_blocks(cls.opened(locate(path, subfolder, variant, **hub), variant), dtype, device)
        model.set_graphs(graphs)
        model.quantise_what_is_read(quantisation)
        model.set_plan(plan if plan is not None else model.plan_of(budget))
        if resident == "all":
            model.hold_everything()
        return model.eval()

    @classmethod
    def of_source(
        cls: type[Self],
        source: ComposedCheckpoint,
        dtype: torch.dtype,
        device: str | torch.device | None = None,
        held: Callable[[str, PluggableBlock], None] | None = None,
    ) -> Self:
        """Make a model that holds everything of an opened checkpoint, frozen; its largest plan is set.

        Args:
            source: opened, or in memory (`ConvertedCheckpoint`).
            dtype, device: of the weights.
            held: as in `hold_everything`.
        """
        model = cls.without_blocks(source, dtype, device).requires_grad_(False)
        model.hold_everything(held)
        model.set_plan(model.catalog.largest)
        return model.eval()

    def hold_everything(self, held: Callable[[str, PluggableBlock], None] | None = None) -> None:
        """Read every block, student and text run at each of its counts.

        Args:
            held: called with each block and student as soon as it holds all that it ever will, and with what the names
                of its tensors begin with. Processes that share a model let go there of what others hold, so that one
                block at a time is whole.
        """
        catalog, depth = self.catalog, self.catalog.architecture.depth
        if catalog.only is not None:
            self.prepare(catalog.largest)
            return
        blocks = [(Interval(n, n), widths, False) for n, widths in enumerate(catalog.blocks)]
        blocks += [(student.interval, student.widths, True) for student in catalog.students]
        for interval, widths, student in blocks:
            for nth in range(max(len(widths.of(group)) for group in widths.groups)):
                width = Width({g: widths.of(g)[min(nth, len(widths.of(g)) - 1)].units for g in widths.groups})
                planned = PlannedBlock(interval=interval, width=width, student=student)
                self.prepare(Plan(checkpoint=catalog.fingerprint, depth=depth, blocks=(planned,)))
            home = self.home(planned)
            if held is not None:
                held(home.prefix, home.block)
        for run in catalog.text_runs:
            self.prepare(catalog.compose([(n, catalog.spec(n).full) for n in run.interval], text_runs=[run.interval]))

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

    @classmethod
    def from_pretrained(cls: type[Self], pretrained_model_name_or_path: str | Path, **kwargs: Any) -> Self:
        """Load as diffusers does, so that pipelines find their way here; takes the arguments of `load` as well.

        Raises:
            ValueError: also where an argument asks for what this class cannot do.
        """
        if (device := one_device(kwargs)) is not None:
            kwargs = {**kwargs, "device": device}
        if kwargs.get("quantization_config") is not None:
            if kwargs.get("quantize") is not None:
                raise ValueError("quantize and quantization_config say the same: give one of them")
            kwargs = {**kwargs, "quantize": understood(kwargs["quantization_config"])}
        ours = {name: kwargs[name] for name in _LOAD_ARGUMENTS if name in kwargs}
        hub = {name: kwargs[name] for name in HUB_ARGUMENTS if kwargs.get(name) is not None}
        dtype = kwargs.get("torch_dtype", kwargs.get("dtype"))
        return cls.load(pretrained_model_name_or_path, dtype=dtype, **ours, **hub)

    def save_pretrained(
        self,
        save_directory: str | Path,
        max_shard_size: int | str = "10GB",
        safe_serialization: bool = True,
        variant: str | None = None,
        **_: Any,
    ) -> None:
        """Write the whole pluggable checkpoint: what is resident as it is now, all else from where it was loaded.

        Tensors are written in the model's dtype, heads and channels in stock order. Weights that are held quantised are
        written as they were before: loading what was written with the same ``quantize`` gives this model again.

        Args:
            save_directory, max_shard_size, variant: as diffusers takes them.
            safe_serialization: safetensors are written without it, too; the log says so once.

        Raises:
            ValueError: the folder holds weights of another variant.
        """
        if not safe_serialization:
            say_once(_log, "safe_serialization=False would write pickle: safetensors are written all the same")
        config = self.stock_config if self.catalog.only is None else self.one_plan_config
        catalog = write_checkpoint(save_directory, config, self.catalog, self.stored_state(), max_shard_size, variant)
        if self._source is not None and Path(save_directory).resolve() == self._source.folder.resolve():
            self._reopen(self._source.folder, catalog, variant)

    def save_plan(self, save_directory: str | Path, max_shard_size: int | str = "10GB") -> Catalog:
        """Write the plan that runs now as a checkpoint of its own, with what it runs and nothing else.

        Rank orders of narrower groups go with it: they say which heads and channels of the base model are left.

        Returns:
            Its catalog, which has the one plan (`Catalog.only`).

        Raises:
            ValueError: the weights are quantised.
        """
        self.check_saved_whole()
        if self._quantisation is not None:
            raise ValueError(
                f"weights held as {self._quantisation.format} cannot be saved as a plan: load without quantize, save "
                "the plan, and load that with quantize"
            )
        if self._casting is not None:
            raise ValueError("weights cast for storage cannot be saved as a plan: load without layerwise casting")
        plan, whole = self.plan, self.catalog
        loss = self.planner.loss(plan)
        only = OnePlan(blocks=plan.blocks, text_runs=plan.text_runs, loss=loss if math.isfinite(loss) else None)
        with READING, weights_at_hand(self):
            program = self.prepare(plan)
            held = {name: tensor.detach().cpu() for name, tensor in self._of_program(program)}
        origin = {"base_model": whole.base_model, "license": whole.license}
        catalog = Catalog.of_dense(self.family, whole.architecture, whole.reference, **origin)
        catalog = catalog.model_copy(update={"only": only, "task": whole.task})
        return write_checkpoint(save_directory, self.one_plan_config, catalog, held, max_shard_size)

    def _of_program(self, program: Program) -> Iterator[tuple[str, torch.Tensor]]:
        """What a program reads, by its names in a checkpoint of one plan."""
        homes = (*self.block_lists, "students", "text_runs")
        for name, tensor in without_adapters(self.state_dict()).items():
            if not name.startswith(tuple(f"{home}." for home in homes)):
                yield name, tensor
        for call, planned in zip(program.calls, program.plan.blocks, strict=True):
            prefix, width = self.home(planned).prefix, planned.width
            not_updated = program.plan.not_updated(planned)
            for name, tensor in held_at(call.block, width, not_updated):
                yield prefix + name, tensor
        for run in program.plan.text_runs:
            for name, tensor in self.text_runs[run.key].state_dict().items():
                yield f"text_runs.{run.key}.{name}", tensor

    def quantise_what_is_read(self, quantisation: Quantisation | None) -> None:
        """Hold weights of blocks that are read from now on in eight bits; before any are.

        Raises:
            ValueError: the device cannot compute in that format, or no block has a part that is to be kept.
        """
        if quantisation is not None:
            quantisation.check(self.catalog.architecture)
            check_device(quantisation, next(self.parameters()).device)
        self._quantisation = quantisation

    @property
    def one_plan_config(self) -> dict[str, Any]:
        """`stock_config` of a checkpoint of one plan: diffusers' own class, which cannot run it, has another name."""
        return {**self.stock_config, "_class_name": type(self).__name__}

    def _reopen(self, folder: Path, catalog: Catalog, variant: str | None) -> None:
        """Go on with the checkpoint that was just written over the one that this model was loaded from."""
        plan = self.plan.model_copy(update={"checkpoint": catalog.fingerprint})
        with READING:
            self._source, self._catalog, self._planner = ComposedCheckpoint(folder, variant), catalog, None
            self._programs.clear()
            self._graphs.drop_all()
        self.set_plan(plan)

    @property
    def stock_config(self) -> dict[str, Any]:
        """What diffusers' class is built from, as ``config.json`` has it."""
        # diffusers keeps notes of its own under private names: where it was loaded from, a set in no fixed order.
        public = {key: value for key, value in self.config.items() if not key.startswith("_")}
        return {"_class_name": self.stock_name, **public}

    def full_state(self) -> dict[str, torch.Tensor]:
        """All tensors of the checkpoint, heads and channels in stock order, in the model's dtype, on the CPU.

        Sketches, which are no weights, keep theirs.
        """
        self.check_saved_whole()
        rounded = quantised_names(self) if self._source is None else quantised_names(self) | self._cast_names()
        with weights_at_hand(self):
            held = {
                name: tensor.detach().cpu()
                for name, tensor in without_adapters(self.state_dict()).items()
                if name not in rounded
            }
        if self._source is None:
            return held
        dtype = like(self).dtype
        blocks = self._blocks_by_prefix()

        def now(name: str, tensor: torch.Tensor) -> torch.Tensor:
            tensor = tensor.to(dtype) if tensor.is_floating_point() and name not in sketch.TENSORS else tensor
            if name not in held:
                return tensor
            prefix = next((prefix for prefix in blocks if name.startswith(prefix)), "")
            if self.catalog.only is not None or not prefix:
                return held[name]
            return restore(tensor, held[name], name.removeprefix(prefix), blocks[prefix])

        with self._source.kept_open():
            return {name: now(name, self._source.read(name)) for name in self._source.names}

    def _cast_names(self) -> set[str]:
        """Names, as without adapters, of what layerwise casting holds rounded."""
        cast = {path: layer for path, layer in self.named_modules() if is_cast(layer)}
        names = (f"{path}.{name}" for path, layer in cast.items() for name, _ in layer.named_parameters())
        return {name.replace(".base_layer.", ".") for name in names}

    def stored_state(self) -> dict[str, torch.Tensor]:
        """`full_state` as the checkpoint stores it: factors in the place of weights that they still give."""
        if self._source is None:
            return self.full_state()
        with self._source.kept_open():
            return self._source.as_stored(self.full_state())

    def _blocks_by_prefix(self) -> Mapping[str, Any]:
        """The resident blocks and students by what their tensors' names begin with."""
        homes = {path: self.get_submodule(path) for path in (*self.block_lists, "students")}
        return {f"{path}.{key}.": block for path, home in homes.items() for key, block in home._modules.items()}
