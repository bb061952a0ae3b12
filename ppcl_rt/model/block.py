"""What every pluggable block has: its spec, its rank orders, and the layers that stand in for parts of it."""

from __future__ import annotations

import types
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, TypeVar

import torch
import torch.nn.functional as F
from torch import nn

from ppcl_rt import ops
from ppcl_rt.ops.packing import pack
from ppcl_rt.planning.block_spec import BlockSpec, Output, Part
from ppcl_rt.planning.quantisation import Format, Quantisation
from ppcl_rt.planning.width import LINEAR_MAP, Width

M = TypeVar("M", bound=nn.Module)


class NotLoaded(nn.Module):
    """Stands where a part is that no plan has needed so far; it holds nothing and cannot be called."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Raise: there is nothing here."""
        raise RuntimeError("this layer was not loaded: a plan that needs it has to be set first")


class AdaptedNotLoaded(NotLoaded, nn.Linear):
    """`NotLoaded` inside an adapter: of the dense layer's sizes, so that peft takes it for a linear layer."""

    def __init__(self, part: Part, like: torch.Tensor) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = part.columns, part.rows
        # Without a number in it: peft goes by its device and dtype.
        self.register_buffer("weight", like.new_empty(0), persistent=False)
        self.register_parameter("bias", None)


def module_at(home: nn.Module, names: Sequence[str]) -> Any:
    """The module at a path; `get_submodule` takes ten times as long, and forwards ask for six a block."""
    module: Any = home
    for name in names:
        module = module._modules[name]
    return module


def base_of(module: nn.Module) -> nn.Module:
    """The layer inside those that adapters put around it."""
    inner = module._modules.get("base_layer")
    return module if inner is None else base_of(inner)


def without_adapters(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A state dict as it would be without adapters."""
    return {name.replace(".base_layer.", "."): t for name, t in state.items() if ".lora_" not in name}


class PluggableBlock(nn.Module):
    """Mixin for a block that runs at any width.

    A family's block is its diffusers class with this mixin in front. Its ``__init__`` ends with `become_pluggable`. Its
    ``forward`` takes ``width=``, and ``text_input=`` if the block can leave the text stream as it was, next to the
    arguments of the diffusers class; it returns (text, image), as diffusers' blocks do.

    Attributes:
        spec: what the block is made of.
        replacements: layers that run in place of a part at a narrower width, by name (`BlockSpec.replacement`,
            `BlockSpec.shared_factor`, `Part.name`).
        orders: rank order ``[units]`` of each group with one: number of a unit in the dense block.
        held: for each part that is loaded, the counts at which it is.
        quantisation: how weights that are read are held, None for as they were read.
        side_by_side: paths of linear layers of one shape that read the same input. They are kept next to each other in
            memory, so that one batched product makes all of them.
    """

    spec: BlockSpec
    replacements: nn.ModuleDict
    orders: dict[str, torch.Tensor]
    held: dict[str, Width]
    quantisation: Quantisation | None = None
    side_by_side: ClassVar[tuple[tuple[str, ...], ...]] = ()

    def become_pluggable(self, spec: BlockSpec) -> None:
        """Set up, at full width; the last thing that ``__init__`` calls."""
        self.spec = spec
        self.replacements = nn.ModuleDict()
        self.orders = {}
        self.held = {part.path: self.counts_of(part, spec.full) for part in spec.parts}
        self._output_paths = {output.name: output.part.path.split(".") for output in spec.outputs}
        self._factored_paths = {part.name: part.path.split(".") for part in spec.parts if part.factored}

    @staticmethod
    def counts_of(part: Part, width: Width) -> Width:
        """The counts of a width that a part depends on."""
        groups = {segment.group for segment in part.segments} | ({part.factored} if part.factored else set())
        return Width({group: count for group, count in width.items() if group in groups})

    @property
    def width(self) -> Width:
        """The widest that this block can run with what is loaded."""
        counts = dict.fromkeys(self.spec.groups, 0)
        for part in self.spec.parts:
            if part.axis == 0 or part.factored:
                for group, count in self.held.get(part.path, Width()).items():
                    counts[group] = max(counts[group], count)
        for group in self.spec.rank_groups:
            shared = self.spec.shared_factor(group)
            if not counts[group] and shared in self.replacements:
                counts[group] = self.factor(shared).out_features
        return Width(counts)

    def factor(self, name: str) -> nn.Linear:
        """One of the two factors of a modulation."""
        layer = self.replacements[name]
        assert isinstance(layer, nn.Linear), "factors are linear layers"
        return layer

    def output(self, name: str, count: int) -> nn.Module:
        """The layer of an output at a count: its replacement where there is one, else the part itself."""
        replacement = self.replaced(name, count)
        return module_at(self, self._output_paths[name]) if replacement is None else replacement

    def beside(self, name: str, count: int) -> nn.Module | None:
        """The layer whose adapters are added to an output at a count: the part that a replacement stands in for.

        None where the part itself runs, and where a linear map stands in for more than the part.
        """
        if not self.replacements._modules or count == LINEAR_MAP or self.replaced(name, count) is None:
            return None
        part = module_at(self, self._output_paths[name])
        return part if "lora_A" in part._modules else None

    def replaced(self, name: str, count: int) -> nn.Module | None:
        """The layer that stands in for an output at a count, None where there is none."""
        if not torch.compiler.is_compiling():
            return self.replacements._modules.get(self.spec.replacement(name, count))
        # In compiled code a count may be a symbol, of which no name can be made.
        for key, replacement in self.replacements._modules.items():
            of, _, at = key.rpartition("_")
            if of == name and at.isdigit() and int(at) == count:
                return replacement
        return None

    def first_column(self, output: Output) -> int:
        """Where the columns of an output begin in its part, as the part is held: other groups may lie before them."""
        held, first, end = self.held[output.part.path], 0, 0
        for segment in output.part.segments:
            first += segment.offset - end
            if segment == output.segment:
                break
            first += segment.unit * held.get(segment.group, 0)
            end = segment.offset + segment.unit * self.spec.groups[segment.group].count
        return first

    def factored(self, part: str, x: torch.Tensor, group: str, rank: int) -> torch.Tensor:
        """Apply a factored part at a rank of its group: the part itself at full rank, else its two factors.

        Args:
            part: its name.
            x: ``[n, columns]``.
        """
        whole = module_at(self, self._factored_paths[part])
        if rank == self.spec.groups[group].count:
            product: torch.Tensor = whole(x)
            return product
        down, up = self.factor(self.spec.shared_factor(group)), self.factor(part)
        product = ops.linear(up, ops.linear(down, x, rank))
        for branch in ops.adapted(whole)[1]:
            # One vector a sample: it costs nothing.
            product = product + branch(x, product.shape[-1])
        fused = self.replacements._modules.get(f"{part}_fused")
        return product if fused is None else product + fused(x)

    def format_of(self, path: str) -> Format | None:
        """The format in which the weight of a part, or of what stands in for one, is held; None for the model's dtype.

        Args:
            path: of the layer inside the block.
        """
        if self.quantisation is None:
            return None
        of, _, count = path.removeprefix("replacements.").rpartition("_")
        for output in self.spec.outputs:
            if path.startswith("replacements.") and count.isdigit() and of == output.name:
                return self.quantisation.format if self.quantisation.takes(output.part) else None
        part = next((part for part in self.spec.parts if part.path == path), None)
        return self.quantisation.format if part is not None and self.quantisation.takes(part) else None

    def drop_factored(self) -> None:
        """Let go of the weights of factored parts; what needs them has them read again."""
        for part in self.spec.parts:
            if part.factored:
                if self.held.pop(part.path, None) is not None:
                    self._let_go(part)
                for name in (part.name, self.spec.shared_factor(part.factored)):
                    if name in self.replacements:
                        del self.replacements[name]

    def _let_go(self, part: Part) -> None:
        """Hold no weights of a part any more; what adapters add to it stays."""
        parent, _, leaf = part.path.rpartition(".")
        module: Any = self.get_submodule(part.path)
        if base_of(module) is module:
            self.get_submodule(parent)._modules[leaf] = NotLoaded()
            return
        while base_of(module) is not module.base_layer:
            module = module.base_layer
        module._modules["base_layer"] = AdaptedNotLoaded(part, next(module.parameters()))

    def text_input(self, text: torch.Tensor, condition: torch.Tensor, width: Width) -> torch.Tensor:
        """What the block projects the text's q, k and v from, ``[B, S_text, D]``; the blocks after it in a text run
        read a linear map of it. Only for blocks that can leave the text stream as it was (`BlockSpec.may_leave`).
        """
        raise NotImplementedError

    def modulation_input(self, condition: torch.Tensor) -> torch.Tensor:
        """What the factored parts read, given what the block is conditioned on: ``silu`` of it."""
        return F.silu(condition)


def has_forward_around(module: nn.Module) -> bool:
    """Whether others put a forward around that of a module, as diffusers' hooks do."""
    forward = module.__dict__.get("forward")
    return forward is not None and getattr(forward, "__self__", None) is not module


def refuse_layer_skips(block: nn.Module) -> None:
    """Refuse hooks with which diffusers' guiders leave out a block, its attention or its MLPs.

    Raises:
        ValueError: there is one. MLPs are not called here, and blocks would come back with both streams swapped.
    """
    for module in (block, *block._modules.values()):
        registry = None if module is None else module.__dict__.get("_diffusers_hook")
        for hook in () if registry is None else registry.hooks.values():
            if type(hook).__module__ == "diffusers.hooks.layer_skip":
                raise ValueError(
                    "skip-layer guidance by diffusers' hooks (LayerSkipConfig, guiders) does not run here: "
                    "remove them. Pipelines that take skip_guidance_layers can have that"
                )


def is_bound(block: nn.Module) -> bool:
    """Whether others hold on to this very object: they compiled one of its modules or put a forward around it."""
    return any(has_forward_around(module) or "_compiled_call_impl" in module.__dict__ for module in block.modules())


def shared_copy(module: M) -> M:
    """Copy a module and all modules in it, but not their tensors, hooks and other attributes, which both then have.

    A parameter or module that is put into one of the two is not in the other.
    """
    copy = module.__class__.__new__(module.__class__)
    copy.__dict__.update(module.__dict__)
    # diffusers' book of hooks, which are forwards of the module that it is of; one with hooks is bound, and not copied.
    copy.__dict__.pop("_diffusers_hook", None)
    for name, value in module.__dict__.items():
        if isinstance(value, types.MethodType) and value.__self__ is module:
            # diffusers leaves a module's own forward among the attributes.
            copy.__dict__[name] = types.MethodType(value.__func__, copy)
    for tensors in ("_parameters", "_buffers"):
        copy.__dict__[tensors] = dict(module.__dict__[tensors])
    copy.__dict__["_modules"] = {
        name: None if child is None else shared_copy(child) for name, child in module._modules.items()
    }
    if isinstance(copy, PluggableBlock):
        copy.held = dict(copy.held)
    return copy


def lay_side_by_side(block: Any) -> None:
    """Keep next to each other in memory what one batched product makes (`PluggableBlock.side_by_side`)."""
    for paths in block.side_by_side:
        pack(*map(block.get_submodule, paths))
