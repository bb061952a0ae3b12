"""Random models of Qwen-Image's sizes over shared blocks, ours and diffusers'.

Six blocks are walked ten times. Every weight then comes from memory, as in a model of sixty blocks, and starting takes
seconds.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from diffusers import QwenImageTransformer2DModel
from diffusers.models.transformers.transformer_qwenimage import QwenImageTransformerBlock
from torch import nn

from model_races.plans import Planned, catalog_of, plan_of
from model_races.presets import Preset
from model_races.real_rope import RealRope
from ppcl_rt.families.qwen_image import PPCLQwenImageTransformer2DModel, PPCLQwenImageTransformerBlock
from ppcl_rt.model.block import lay_side_by_side
from ppcl_rt.model.tensors import has_units
from ppcl_rt.planning.plan import Plan, text_maps
from ppcl_rt.planning.width import LINEAR_MAP, Width

# Weights are 1 / sqrt(inputs) times these factors. Each half of a block then adds a tenth of the size of the streams:
# the streams stay finite over sixty blocks, and bf16 roundings change the output by 2 %, where
# `ppcl_rt.ops.agreement.agree` allows 5 %.
_MODULATION, _MAP = 0.4, 0.2


def fill(module: nn.Module, generator: torch.Generator, gain: float = 1.0) -> nn.Module:
    """Draw random weights in place."""
    for name, parameter in module.named_parameters():
        if parameter.ndim == 2:
            scale = _MODULATION if "_mod." in name else _MAP if "_0.weight" in name else gain
            parameter.normal_(0, scale * parameter.shape[1] ** -0.5, generator=generator)
        else:
            parameter.normal_(1.0 if "norm" in name else 0.0, 0.02, generator=generator)
    return module.requires_grad_(False).eval()


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


class Models:
    """Random blocks and everything around them, on the device; makes our models and diffusers' models over them."""

    def __init__(self, preset: Preset) -> None:
        self.preset = preset
        generator = torch.Generator(preset.device).manual_seed(0)
        torch.manual_seed(0)
        # Built on the CPU, since the model makes its rotations there in float32; without blocks it is small.
        self.outer = PPCLQwenImageTransformer2DModel(**preset.config).to(preset.device, preset.dtype)
        fill(self.outer, generator)
        self.blocks = [self._block(generator) for _ in range(preset.blocks)]
        self.maps = [fill(self._linear(preset.dim, preset.dim), generator, _MAP) for _ in range(preset.blocks)]
        self.catalog = catalog_of(preset, sum(parameter.numel() for parameter in self.outer.parameters()))
        self._plans: dict[str, Planned] = {}

    def plan(self, name: str) -> Planned:
        """Return one of `model_races.plans.PLANS`; the planner takes about a second for some of them."""
        if name not in self._plans:
            self._plans[name] = plan_of(name, self.preset, self.catalog)
        return self._plans[name]

    def _linear(self, inputs: int, outputs: int) -> nn.Linear:
        return nn.Linear(inputs, outputs, device=self.preset.device, dtype=self.preset.dtype)

    def _block(self, generator: torch.Generator) -> PPCLQwenImageTransformerBlock:
        preset, dim = self.preset, self.preset.dim
        with torch.device(preset.device), default_dtype(preset.dtype):
            block = PPCLQwenImageTransformerBlock(dim, preset.heads, preset.head_dim)
        spec, rank = block.spec, max(preset.offered["modulation"])
        factored = spec.factored_by("modulation")
        for output in spec.outputs:
            if spec.groups[output.segment.group].mappable:
                block.replacements[spec.replacement(output.name, LINEAR_MAP)] = self._linear(dim, dim)
        block.replacements[spec.shared_factor("modulation")] = self._linear(dim, rank)
        for part in factored:
            block.replacements[part.name] = self._linear(rank, part.rows)
        fill(block, generator)
        for part in factored:
            block.factor(part.name).weight.mul_(_MODULATION)
        # A block that was loaded or moved has its q, k and v weights packed too.
        lay_side_by_side(block)
        return block

    def ours(self, plan: Plan, graphs: bool = False) -> Any:
        """Make one of our models over the shared blocks."""
        depth = self.preset.depth
        # Every tensor of the new model is replaced below.
        with torch.device("meta"):
            model: Any = PPCLQwenImageTransformer2DModel(**self.preset.config)
        self._share(model)
        model.register_to_config(num_layers=depth)
        model.transformer_blocks.extend(self.blocks[n % len(self.blocks)] for n in range(depth))
        for student in self.catalog.students:
            model.students[student.interval.key] = self.blocks[student.interval.first % len(self.blocks)]
        for run in self.catalog.text_runs:
            names = text_maps(run.interval, depth)
            model.text_runs[run.interval.key] = nn.ModuleDict(
                {name: self.maps[n % len(self.maps)] for n, name in enumerate(names, run.interval.first)}
            )
        model._catalog = self.catalog
        model.requires_grad_(False).eval()
        model.set_plan(plan)
        model.set_graphs(graphs)
        return model

    def stock(self, plan: Plan, real_rope: bool = False) -> QwenImageTransformer2DModel:
        """Make diffusers' model, blocks physically cut to the widths of a plan without linear maps and text runs."""
        with torch.device("meta"):
            model = QwenImageTransformer2DModel(**self.preset.config)
        self._share(model)
        made: dict[tuple[int, Width], QwenImageTransformerBlock] = {}
        for planned in plan.blocks:
            number = planned.interval.first % len(self.blocks)
            if (number, planned.width) not in made:
                made[number, planned.width] = self._stock_block(self.blocks[number], planned.width)
            model.transformer_blocks.append(made[number, planned.width])
        if real_rope:
            model.pos_embed = RealRope(model.pos_embed)
        return model.requires_grad_(False).eval()

    def _share(self, model: nn.Module) -> None:
        for name, module in self.outer.named_children():
            if name not in ("transformer_blocks", "students", "text_runs"):
                setattr(model, name, module)

    def _stock_block(self, block: PPCLQwenImageTransformerBlock, width: Width) -> QwenImageTransformerBlock:
        with torch.device("meta"):
            made = QwenImageTransformerBlock(self.preset.dim, self.preset.heads, self.preset.head_dim)
        spec, rank = block.spec, width["modulation"]
        parts = {part.path: part for part in spec.parts}
        state: dict[str, torch.Tensor] = {}
        for name in made.state_dict():
            state[name] = block.get_parameter(name)
            part = parts.get(name.rpartition(".")[0])
            if part is None or part.axis is None or not has_units(part, name):
                continue
            # A part of a Qwen-Image block holds one group, from its first row or column on.
            [segment] = part.segments
            units = width[segment.group]
            if units != spec.groups[segment.group].count:
                state[name] = state[name].narrow(part.axis, 0, units * segment.unit).contiguous()
        if rank < spec.groups["modulation"].count:
            down = block.factor(spec.shared_factor("modulation"))
            for part in spec.factored_by("modulation"):
                path, up = part.path, block.factor(part.name)
                state[f"{path}.0.weight"] = down.weight[:rank].contiguous()
                state[f"{path}.0.bias"] = down.bias[:rank].contiguous()
                state[f"{path}.1.weight"] = up.weight[:, :rank].contiguous()
                state[f"{path}.1.bias"] = up.bias
                del state[f"{path}.weight"], state[f"{path}.bias"]
                made.set_submodule(path, nn.Sequential(nn.Linear(1, 1, device="meta"), nn.Linear(1, 1, device="meta")))
        for name, tensor in state.items():
            path, _, which = name.rpartition(".")
            layer = made.get_submodule(path)
            setattr(layer, which, nn.Parameter(tensor, requires_grad=False))
            if isinstance(layer, nn.Linear) and which == "weight":
                layer.out_features, layer.in_features = tensor.shape
        return made
