"""Adapters of the base model (LoRA) at any width: loaded, set, fused and unloaded through diffusers' own calls.

peft puts its layers around linear layers, and so it does here. What it puts there is cut as the weights are: rows and
columns of the heads and channels that a block holds, in rank order. The adapter as it was loaded, of the dense model's
sizes and in stock order, is kept on the host: a block that grows, or joins later, gets its part of that.

Where another layer runs in place of the one that an adapter is for:

- below the full rank of modulations, whose two factors read what the dense layer reads, it is a branch beside them:
  exact, and one vector a sample;
- beside a compensated output layer it is a branch over the heads or channels that are kept;
- a student gets that of the block which it was copied from, or the mean of those that it is the mean of;
- a linear map, and a text stream that is not updated, get nothing.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from ppcl_rt import ops
from ppcl_rt.files import replacing
from ppcl_rt.model.adapted_layers import adapts_modulations, cut_to, put_back, set_as, set_scale
from ppcl_rt.model.block import AdaptedNotLoaded, NotLoaded, PluggableBlock, base_of
from ppcl_rt.model.factors import DOWN, UP, Factors, fetched, mean_of, named_by_peft, paired
from ppcl_rt.model.modulations import Modulations
from ppcl_rt.model.offloading import like, refuse_on_disk
from ppcl_rt.model.program import Program
from ppcl_rt.model.residency import READING, Home
from ppcl_rt.planning.adapted import Taken, taken
from ppcl_rt.planning.block_spec import Part

# What diffusers calls the file of an adapter.
_FILE = "pytorch_lora_weights.safetensors"
_log = logging.getLogger(__name__)


class Adapters(Modulations):
    """LoRA on a model that was loaded from a checkpoint.

    A model that was built by hand has every layer as diffusers' class has it: there it is peft alone.

    Call these while nothing samples: they change the layers that forwards read.
    """

    # By adapter, then by path: of the dense model, or of a student that was trained apart from it.
    _adapters: dict[str, dict[str, Factors]]
    # Of diffusers' classes.
    peft_config: dict[str, Any]

    @property
    def cuts_adapters(self) -> bool:
        """Whether adapters are cut here: the model was loaded from a checkpoint, and layers may be narrow."""
        return self._source is not None

    # Loading.

    def load_lora_adapter(
        self, pretrained_model_name_or_path_or_dict: Any, prefix: str | None = "transformer", **kwargs: Any
    ) -> None:
        """Load an adapter of the base model; arguments as diffusers' class takes them.

        Raises:
            ValueError: it is more than products of two factors, or adds to layers that the dense model has not.
        """
        refuse_on_disk(self, "take adapters")
        theirs: Any = super()
        if not self.cuts_adapters:
            theirs.load_lora_adapter(pretrained_model_name_or_path_or_dict, prefix=prefix, **kwargs)
            ops.let_go(self.modules())
            return
        state, settings = fetched(pretrained_model_name_or_path_or_dict, kwargs)
        start = f"{prefix}." if prefix else ""
        state = {name.removeprefix(start): t for name, t in state.items() if name.startswith(start)}
        settings = {name.removeprefix(start): value for name, value in settings.items() if name.startswith(start)}
        alphas = kwargs.pop("network_alphas", None) or {}
        alphas = {name.removeprefix(start).removesuffix(".alpha"): alpha for name, alpha in alphas.items()}
        factors = paired(named_by_peft(state), alphas, settings)
        self._check(factors)
        name = kwargs.pop("adapter_name", None) or f"default_{len(getattr(self, 'peft_config', None) or {})}"
        with READING:
            for block, at in self._homes():
                self._make_room(block, [part for part, _ in self._on(block, at, factors)])
            cut = {f"{start}{path}": tensor for path, tensor in self._resident(factors).items()}
            theirs.load_lora_adapter(cut, prefix=prefix, adapter_name=name, **kwargs)
            if factors:
                self._adapters[name] = factors
                for block, at in self._homes():
                    for part, each in self._on(block, at, factors):
                        layer: Any = block.get_submodule(part.path)
                        set_scale(layer, name, each.scale)
                        # peft goes by the weight's dtype, which in eight bits is none to compute in.
                        for factor in (layer.lora_A[name], layer.lora_B[name]):
                            factor.to(like(self).dtype)
                for path, each in factors.items():
                    if not self._in_blocks(path):
                        set_scale(self.get_submodule(path), name, each.scale)
        self._adapters_changed()

    def _check(self, factors: Mapping[str, Factors]) -> None:
        """Refuse what the dense model has no layer for."""
        architecture, wanted = self.catalog.architecture, dict[str, list[int]]()
        for n in range(architecture.depth):
            at = "{}.{}.".format(*architecture.place(n))
            wanted |= {at + part.path: [part.rows, part.columns] for part in architecture.spec(n).parts}
        for path, module in self.named_modules():
            base = base_of(module)
            if isinstance(base, nn.Linear) and not self._in_blocks(path):
                wanted[path] = list(base.weight.shape)
        for path, each in factors.items():
            adds = [len(each.up), each.down.shape[1]]
            if path not in wanted:
                raise ValueError(f"the adapter is for another model: {self.stock_name} has no layer {path}")
            if adds != wanted[path]:
                raise ValueError(f"the adapter adds {adds} to {path}, which is {wanted[path]}: for another model")

    def add_adapter(self, adapter_config: Any, adapter_name: str = "default") -> None:
        """Add a new adapter, to train it; as diffusers' class does, on the layers of the plan that is set."""
        refuse_on_disk(self, "take adapters")
        if self.cuts_adapters:
            for block, _ in self._homes():
                self._make_room(block, block.spec.parts)
        theirs: Any = super()
        theirs.add_adapter(adapter_config, adapter_name)
        self._adapters_changed()

    def _adapters_changed(self) -> None:
        """Forget what was made of the layers as they were: graphs, factors for kernels, tables of modulations."""
        self._graphs.drop_all()
        ops.let_go(self.modules())
        if self._precomputed is not None:
            self._precomputed.tables = {}

    def _rows(self, program: Program, timestep: torch.Tensor) -> torch.Tensor | None:
        """See `Modulations._rows`; with adapters on modulations, whose scale may change from call to call, none.

        Raises:
            ValueError: the weights were dropped.
        """
        if self._precomputed is not None and any(map(adapts_modulations, program.calls)):
            if not self._precomputed.keep_weights:
                raise ValueError(
                    "adapters on modulations need their weights: fuse them, or precompute(keep_weights=True)"
                )
            return None
        return super()._rows(program, timestep)

    # Where a part of an adapter goes.

    def _in_blocks(self, path: str) -> bool:
        return path.startswith(tuple(f"{home}." for home in (*self.block_lists, "students", "text_runs")))

    def _homes(self) -> Iterator[tuple[PluggableBlock, str]]:
        """The resident blocks and students, and what the names of their tensors begin with."""
        for path in (*self.block_lists, "students"):
            for key, block in self.get_submodule(path)._modules.items():
                assert isinstance(block, PluggableBlock), "lists hold blocks"
                yield block, f"{path}.{key}."

    def _origins(self, prefix: str) -> tuple[str, ...]:
        """What the names begin with of the dense model's blocks that a student was copied from; of a block its own."""
        if not prefix.startswith("students."):
            return (prefix,)
        key = prefix.split(".")[1]
        # A checkpoint of one plan does not say what its students were copied from.
        blocks = next(
            (s.copied_from for s in self.catalog.students if s.interval.key == key), (int(key.split("-")[0]),)
        )
        return tuple("{}.{}.".format(*self.catalog.architecture.place(n)) for n in blocks)

    def _on(self, block: PluggableBlock, prefix: str, factors: Mapping[str, Factors]) -> Iterator[tuple[Part, Factors]]:
        """The parts of a block that an adapter is for."""
        origins = self._origins(prefix)
        for part in block.spec.parts:
            found = [factors[origin + part.path] for origin in origins if origin + part.path in factors]
            if prefix + part.path in factors:
                yield part, factors[prefix + part.path]
            elif found:
                yield part, mean_of(found, len(origins))

    def _resident(self, factors: Mapping[str, Factors]) -> dict[str, torch.Tensor]:
        """The adapter of what is resident, cut, by peft's names."""
        cut = {path: (each.down, each.up) for path, each in factors.items() if not self._in_blocks(path)}
        for block, prefix in self._homes():
            cut |= {prefix + part.path: cut_to(block, part, each) for part, each in self._on(block, prefix, factors)}
        to = like(self)
        state = {path + DOWN: down for path, (down, _) in cut.items()}
        state |= {path + UP: up for path, (_, up) in cut.items()}
        return {name: tensor.to(to.device, to.dtype) for name, tensor in state.items()}

    def _make_room(self, block: PluggableBlock, parts: Iterable[Part]) -> None:
        """Put what peft takes for a linear layer where a part is not loaded."""
        for part in parts:
            if type(block.get_submodule(part.path)) is NotLoaded:
                block.set_submodule(part.path, AdaptedNotLoaded(part, next(self.parameters())))

    # Blocks that grow or come later.

    def complete(self, block: PluggableBlock, home: Home) -> None:
        """See `Residency.complete`: the adapters' part of what was read."""
        super().complete(block, home)
        if home.block is not None:
            self._write_back(home.block, block, home.prefix)
        new = [
            (layer, name)
            for name, factors in self._adapters.items()
            for layer in self._adapt(block, home.prefix, name, factors)
        ]
        # Only now: peft takes what is fused out of a layer that gets another adapter.
        for layer, name in new:
            set_as(layer, self._layer_with(name), name)

    def _write_back(self, before: PluggableBlock, block: PluggableBlock, prefix: str) -> None:
        """Keep what was trained, or put in by others, of layers that are to be cut anew."""
        for part in block.spec.parts:
            layer: Any = before.get_submodule(part.path)
            if "lora_A" in layer._modules and before.held.get(part.path) != block.held.get(part.path):
                for name in layer.lora_A:
                    factors = self._adapters.setdefault(name, {})
                    whole = dict(self._on(block, prefix, factors)).get(part)
                    factors[prefix + part.path] = put_back(before, part, whole, layer, name)

    def _adapt(self, block: PluggableBlock, prefix: str, name: str, factors: Mapping[str, Factors]) -> list[Any]:
        """Put an adapter into a block that is not in the model yet; returns the layers that did not have it."""
        from peft import LoraConfig, inject_adapter_in_model

        to, new, mine = like(self), [], list(self._on(block, prefix, factors))
        self._make_room(block, [part for part, _ in mine])
        for part, each in mine:
            layer: Any = block.get_submodule(part.path)
            down, up = (factor.to(to.device, to.dtype) for factor in cut_to(block, part, each))
            is_new = name not in getattr(layer, "lora_A", ())
            if is_new:
                config = LoraConfig(r=len(down), target_modules=[part.path], init_lora_weights=False)
                state = {part.path + DOWN: down, part.path + UP: up}
                inject_adapter_in_model(config, block, name, state_dict=state)
                del block.peft_config
                layer = block.get_submodule(part.path)
                set_scale(layer, name, each.scale)
                new.append(layer)
            base: Any = base_of(layer)
            layer.in_features, layer.out_features = base.in_features, base.out_features
            for factor, tensor in ((layer.lora_A[name], down), (layer.lora_B[name], up)):
                if is_new or factor.weight.shape != tensor.shape:
                    factor.weight = nn.Parameter(tensor, requires_grad=factor.weight.requires_grad)
                    factor.out_features, factor.in_features = tensor.shape
        return new

    def _layer_with(self, name: str) -> Any:
        """A layer in the model that has an adapter."""
        return next((m for m in self.modules() if name in getattr(m, "lora_A", ())), None)

    # Looking, saving, letting go.

    def adapter_report(self, adapter_name: str) -> Taken:
        """What the plan that runs now takes of an adapter, and why not all.

        Raises:
            ValueError: no adapter of this name was loaded into this model.
        """
        if adapter_name not in self._adapters:
            raise ValueError(f"no adapter {adapter_name} was loaded; there are {', '.join(self._adapters) or 'none'}")
        students = [path for path in self._adapters[adapter_name] if path.startswith("students.")]
        return taken(self.catalog, self.plan, self._adapters[adapter_name].keys() - students)

    def save_lora_adapter(self, save_directory: Any, adapter_name: str = "default", **kwargs: Any) -> None:
        """Write an adapter as one of the dense model, in stock order; arguments as diffusers' class takes them.

        What was trained on what is resident is in it; of layers that were never resident, what was loaded.
        """
        if not self.cuts_adapters:
            theirs: Any = super()
            theirs.save_lora_adapter(save_directory, adapter_name, **kwargs)
            return
        whole = self._whole(adapter_name)
        if any(path.startswith("students.") for path in whole):
            _log.warning("adapter %s was trained on students: the file holds what is of the dense model", adapter_name)
        tensors: dict[str, torch.Tensor] = {}
        for path, each in whole.items():
            if not path.startswith("students."):
                tensors |= {path + DOWN: each.down.contiguous(), path + UP: (each.scale * each.up).contiguous()}
        with replacing(Path(save_directory) / (kwargs.get("weight_name") or _FILE)) as temporary:
            save_file(tensors, temporary, {"format": "pt"})

    def _whole(self, name: str) -> dict[str, Factors]:
        """An adapter as it was loaded, with what is resident of it as it is now."""
        whole = dict(self._adapters.get(name, {}))
        for path, module in self.named_modules():
            layer: Any = module
            if name in getattr(module, "lora_A", ()) and not self._in_blocks(path):
                down, up = (factor[name].weight.detach().cpu() for factor in (layer.lora_A, layer.lora_B))
                whole[path] = Factors(down, up, layer.lora_alpha[name] / layer.r[name])
        for block, prefix in self._homes():
            for part in block.spec.parts:
                layer = block.get_submodule(part.path)
                if name not in layer._modules.get("lora_A", ()):
                    continue
                before = dict(self._on(block, prefix, self._adapters.get(name, {}))).get(part)
                now = put_back(block, part, before, layer, name)
                is_new = before is None or not (torch.equal(now.down, before.down) and torch.equal(now.up, before.up))
                if is_new or not prefix.startswith("students."):
                    whole[prefix + part.path] = now
        return whole

    def unload_lora(self) -> None:
        """Let go of all adapters; what is fused stays in the weights."""
        theirs: Any = super()
        theirs.unload_lora()
        self._adapters.clear()
        self._adapters_changed()

    def delete_adapters(self, adapter_names: Sequence[str] | str) -> None:
        """Let go of some adapters."""
        theirs: Any = super()
        theirs.delete_adapters(adapter_names)
        for name in [adapter_names] if isinstance(adapter_names, str) else adapter_names:
            self._adapters.pop(name, None)
        self._adapters_changed()
