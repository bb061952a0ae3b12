"""Adapters in the weights: in those that are held, and in those that are read from then on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from ppcl_rt.checkpoint.composed import ComposedCheckpoint
from ppcl_rt.model.adapters import Adapters
from ppcl_rt.model.block import AdaptedNotLoaded, PluggableBlock, base_of
from ppcl_rt.model.factors import Factors
from ppcl_rt.model.offloading import refuse_on_disk
from ppcl_rt.model.residency import READING, Home
from ppcl_rt.planning.width import LINEAR_MAP


class Fused(NamedTuple):
    """An adapter that is in the weights.

    Attributes:
        factors: by the path of the layer.
        scale: how much of it.
    """

    factors: Mapping[str, Factors]
    scale: float


class FusedCheckpoint(ComposedCheckpoint):
    """Reads what ``source`` holds with adapters added.

    What is composed of a part of the dense model gets the adapter with it: a compensated output over the units that it
    keeps, a student over the blocks that it was copied from. Linear maps and maps of text runs get nothing. Nor do the
    two factors of modulations: what an adapter adds to these goes beside them (`Fusing.fuse_lora`).

    Args:
        adapters: what is added.
    """

    def __init__(self, source: ComposedCheckpoint, adapters: Sequence[Fused]) -> None:
        self.__dict__.update(source.__dict__)
        self._unfused = source
        self._adapters = tuple(adapters)

    @property
    def unfused(self) -> ComposedCheckpoint:
        """The checkpoint as it lies on disk."""
        return self._unfused

    def read(self, name: str) -> torch.Tensor:
        """See `ComposedCheckpoint.read`."""
        tensor = super().read(name)
        path, _, which = name.rpartition(".")
        # The base of a composed weight was read here, adapters added.
        delta = None if which != "weight" or name in self._factored else self.added_to(path)
        return tensor if delta is None else (tensor.float() + delta).to(tensor.dtype)

    def added_to(self, path: str) -> torch.Tensor | None:
        """What the adapters add to the weight of a layer as the checkpoint stores it, None for nothing."""
        bases = self._bases
        if bases is not None and path in bases.replaced:
            replaced = bases.replaced[path]
            delta = self.added_to(replaced.part)
            if delta is None:
                return None
            return replaced.first_columns(delta, self.read(f"{replaced.prefix}order.{replaced.output.segment.group}"))
        origins = (path,) if bases is None else bases.copied.get(path, (path,))
        total = None
        for factors, scale in self._adapters:
            found = [factors[origin].delta() for origin in origins if origin in factors]
            if found:
                delta = scale * torch.stack(found).sum(0) / len(origins)
                total = delta if total is None else total + delta
        return total


class Fusing(Adapters):
    """Adding adapters to the weights of a model, and taking them out again."""

    # Of adapters that are loaded, by name; and of those that were unloaded since, which stay.
    _fused: dict[str, Fused]
    _fused_for_good: tuple[Fused, ...]

    def fuse_lora(
        self, lora_scale: float = 1.0, safe_fusing: bool = False, adapter_names: Sequence[str] | None = None
    ) -> None:
        """Add adapters to the weights, also to those that are read later; arguments as diffusers' class takes them."""
        theirs: Any = super()
        if not self.cuts_adapters:
            theirs.fuse_lora(lora_scale=lora_scale, safe_fusing=safe_fusing, adapter_names=adapter_names)
            return
        if self._quantisation is not None:
            raise ValueError(
                f"weights held as {self._quantisation.format} cannot take adapters in: leave them beside, or load "
                "without quantize, fuse, save_pretrained, and load that with quantize"
            )
        with READING:
            layer: Any = next((m for m in self.modules() if hasattr(m, "lora_A")), None)
            fused = [] if layer is None else list(adapter_names or layer.active_adapters)
            theirs.fuse_lora(lora_scale=lora_scale, safe_fusing=safe_fusing, adapter_names=adapter_names)
            for name in fused:
                if name not in self._adapters or name in self._fused:
                    continue
                of = self._layer_with(name)
                scale = 1.0 if of is None else of.scaling[name] * of.r[name] / of.lora_alpha[name]
                self._fused[name] = Fused(dict(self._adapters[name]), scale)
                for block, prefix in self._homes():
                    self._add_beside(block, prefix, self._adapters[name], scale)
            self._fused_changed()

    def unfuse_lora(self) -> None:
        """Take adapters out of the weights again; those that were unloaded meanwhile stay in."""
        theirs: Any = super()
        with READING:
            theirs.unfuse_lora()
            fused, self._fused = self._fused, {}
            for factors, scale in fused.values():
                for block, prefix in self._homes():
                    self._add_beside(block, prefix, factors, -scale)
            self._fused_changed()

    def unload_lora(self) -> None:
        """Let go of all adapters; what is fused stays in the weights."""
        super().unload_lora()
        self._fused_for_good, self._fused = self._all_fused, {}

    def delete_adapters(self, adapter_names: Sequence[str] | str) -> None:
        """Let go of some adapters.

        Raises:
            ValueError: one of them is fused.
        """
        names = [adapter_names] if isinstance(adapter_names, str) else adapter_names
        if fused := next((name for name in names if name in self._fused), None):
            raise ValueError(
                f"adapter {fused} is fused: unfuse_lora takes it out, unload_lora leaves it in the weights"
            )
        super().delete_adapters(adapter_names)

    @property
    def _all_fused(self) -> tuple[Fused, ...]:
        return (*self._fused_for_good, *self._fused.values())

    def complete(self, block: PluggableBlock, home: Home) -> None:
        """See `Residency.complete`; all else that was read holds what is fused."""
        super().complete(block, home)
        self._put_beside_factors(block, home.prefix)

    def check_saved_whole(self) -> None:
        """Refuse to save what a checkpoint has no room for.

        Raises:
            ValueError: adapters are fused into modulations of a low rank, or weights lie in files of group offload.
        """
        refuse_on_disk(self, "be saved")
        if any(name.endswith("_fused") for block in self.resident_blocks() for name in block.replacements):
            raise ValueError(
                "adapters are fused into modulations of a low rank, and a checkpoint has no place for that: call "
                "unfuse_lora, or merge them into the base model with `ppcl convert --fuse` and compress that"
            )

    def _fused_changed(self) -> None:
        """Read from now on with what is fused, and nothing else, added."""
        for block, prefix in self._homes():
            self._put_beside_factors(block, prefix)
        source = self._source.unfused if isinstance(self._source, FusedCheckpoint) else self._source
        # In a checkpoint of one plan weights lie as they run, and all of them were read.
        reads = source is not None and self.catalog.only is None and bool(self._all_fused)
        self._source = FusedCheckpoint(source, self._all_fused) if source and reads else source
        self._adapters_changed()

    def _fuse_lora_apply(self, module: nn.Module, adapter_names: Sequence[str] | None = None) -> None:
        """As diffusers' class does to one layer; where the layer is not loaded there is nothing to add to."""
        layer: Any = module
        if not hasattr(module, "lora_A") or not isinstance(base_of(module), AdaptedNotLoaded):
            theirs: Any = super()
            theirs._fuse_lora_apply(module, adapter_names=adapter_names)
            return
        layer.scale_layer(self.lora_scale)
        names = adapter_names or layer.active_adapters
        layer.merged_adapters += [n for n in names if n in layer.lora_A and n not in layer.merged_adapters]

    def _unfuse_lora_apply(self, module: nn.Module) -> None:
        """As diffusers' class does to one layer."""
        layer: Any = module
        if not hasattr(module, "lora_A") or not isinstance(base_of(module), AdaptedNotLoaded):
            theirs: Any = super()
            theirs._unfuse_lora_apply(module)
            return
        layer.merged_adapters.clear()

    @torch.no_grad()
    def _add_beside(self, block: PluggableBlock, prefix: str, factors: Mapping[str, Factors], scale: float) -> None:
        """Add to the layers that stand in for outputs, over the units that they read."""
        of = {part.path: each for part, each in self._on(block, prefix, factors)}
        for output in block.spec.outputs:
            group, offset, unit = output.segment
            for name, layer in block.replacements.items():
                count = name.removeprefix(f"{output.name}_")
                if output.part.path not in of or not count.isdigit() or int(count) == LINEAR_MAP:
                    continue
                kept = offset + block.orders[group][: int(count), None] * unit + torch.arange(unit)
                weight: torch.Tensor = layer.get_parameter("weight")
                weight.add_(of[output.part.path].delta()[:, kept.reshape(-1)].to(weight), alpha=scale)

    def _put_beside_factors(self, block: PluggableBlock, prefix: str) -> None:
        """Hold what is fused into modulations as a product beside their two factors, where there are such."""
        like, found = next(self.parameters()), dict[str, list[Factors]]()
        legal = next((widths for path, _, widths in self.catalog.prefixed if path == prefix), None)
        for fused in self._all_fused:
            for part, each in self._on(block, prefix, fused.factors):
                group = part.factored
                if not group:
                    continue
                if block.spec.shared_factor(group) in block.replacements or (legal and legal.highest_rank(group)):
                    found.setdefault(part.name, []).append(each.times(fused.scale))
        for part in block.spec.parts:
            block.replacements._modules.pop(f"{part.name}_fused", None)
        for name, products in found.items():
            down = torch.cat([each.down for each in products])
            up = torch.cat([each.scale * each.up for each in products], dim=1)
            layers = [nn.Linear(f.shape[1], f.shape[0], bias=False, device="meta") for f in (down, up)]
            for layer, factor in zip(layers, (down, up), strict=True):
                layer.weight = nn.Parameter(factor.to(like), requires_grad=False)
            block.replacements[f"{name}_fused"] = nn.Sequential(*layers)
