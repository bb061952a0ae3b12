"""Random models of Qwen-Image's widths, ours and diffusers', and plans for them.

Six blocks are walked ten times: every weight comes from memory, as in a model of sixty, and starting takes seconds.
"""

from __future__ import annotations

import contextlib
import functools
import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from diffusers import QwenImageTransformer2DModel
from diffusers.models.transformers import transformer_qwenimage
from diffusers.models.transformers.transformer_qwenimage import QwenImageTransformerBlock
from torch import nn

from ppcl_rt.families.qwen_block import LAYOUT, PPCLQwenImageTransformerBlock, as_real
from ppcl_rt.families.qwen_image import PPCLQwenImageTransformer2DModel
from ppcl_rt.ops.qkv_projection import pack
from ppcl_rt.planning.catalog import Catalog, Option, Shape, Student, TextRun, Widths, text_maps
from ppcl_rt.planning.plan import Interval, Plan, Width
from ppcl_rt.planning.planner import Planner

RATIOS = (0.7, 0.5)
# Weights are 1 / sqrt(inputs) times these: each half of a block then adds a tenth of the streams' size, so that they
# stay finite over sixty blocks, and roundings in bf16 make 2 % of the output, where `ways.agree` allows 5 %.
_MODULATION, _MAP = 0.4, 0.2

Levels = tuple[tuple[int, ...], ...]


@dataclass(frozen=True, kw_only=True)
class Preset:
    """Dimensions, shapes and grids.

    Attributes:
        blocks, walks: different blocks, and how often they are walked: the depth is their product.
        sizes: pixels -> rows and columns of image tokens.
        text, short: tokens of a prompt, and of a short one.
        unit: channels of a plan are a multiple of it.
        rank: of modulations in plans of width.
        counts: group of `Width` -> counts below the full one that the sweep visits, coarse levels first.
        still: the same of blocks that leave the text alone.
        offered: group -> counts that the planner's catalog offers.
        compiled: options of ``compile_repeated_blocks``.
    """

    device: str
    dtype: torch.dtype
    heads: int
    head_dim: int
    text_dim: int
    axes: tuple[int, int, int]
    blocks: int
    walks: int
    sizes: dict[int, tuple[int, int]]
    text: int
    short: int
    unit: int
    rank: int
    rounds: int
    repeats: int
    counts: dict[str, Levels]
    still: dict[str, Levels]
    offered: dict[str, tuple[int, ...]]
    compiled: dict[str, Any]

    @property
    def dim(self) -> int:
        return self.heads * self.head_dim

    @property
    def depth(self) -> int:
        return self.blocks * self.walks

    @property
    def full(self) -> Width:
        return Width(self.heads, 4 * self.dim, 4 * self.dim, self.dim)

    @property
    def config(self) -> dict[str, Any]:
        return {
            "num_attention_heads": self.heads,
            "attention_head_dim": self.head_dim,
            "joint_attention_dim": self.text_dim,
            "axes_dims_rope": self.axes,
            "num_layers": 0,
        }


# Counts that fill waves of 132 multiprocessors are among them: 11 and 22 heads, channels in multiples of 2,816.
REAL = Preset(
    device="cuda",
    dtype=torch.bfloat16,
    heads=24,
    head_dim=128,
    text_dim=3584,
    axes=(16, 56, 56),
    blocks=6,
    walks=10,
    sizes={1024: (64, 64), 512: (32, 32)},
    text=512,
    short=64,
    unit=128,
    rank=256,
    rounds=15,
    repeats=7,
    counts={
        "heads": ((12, 2), (22, 18, 16, 11, 6), (23, 20, 14, 10, 8, 4)),
        "image": ((5632, 1024, 0), (11264, 8448, 6144, 2816), (10240, 9216, 8192, 7168, 4096, 2048)),
        "text": ((4096, 1024, 0), (8192, 2816), (11264, 5632)),
        "modulation": ((256, 64), (512,), (128, 1024)),
    },
    still={"heads": ((12, 2), (18, 6), (22, 16, 11)), "image": ((), (5632, 1024, 0), (8448, 2816))},
    offered={
        "heads": (22, 18, 16, 12, 8, 6),
        "image": (11264, 8448, 5632, 2816, 0),
        "text": (8192, 4096, 2048, 0),
        "modulation": (256, 64),
    },
    compiled={"fullgraph": True, "dynamic": False},
)
# The same code in a second on a CPU; figures mean nothing.
TINY = Preset(
    device="cpu",
    dtype=torch.float32,
    heads=4,
    head_dim=16,
    text_dim=24,
    axes=(4, 6, 6),
    blocks=2,
    walks=3,
    sizes={1024: (4, 6), 512: (3, 4)},
    text=7,
    short=3,
    unit=16,
    rank=8,
    rounds=2,
    repeats=1,
    counts={"heads": ((2, 1),), "image": ((128, 16, 0),), "text": ((128, 16, 0),), "modulation": ((8, 4),)},
    still={"heads": ((2, 1),), "image": ((128, 16, 0),)},
    offered={"heads": (2, 1), "image": (128, 0), "text": (128, 0), "modulation": (8, 4)},
    # Inductor takes longer to start than all else together.
    compiled={"fullgraph": True, "dynamic": False, "backend": "eager"},
)


def fill(module: nn.Module, generator: torch.Generator, gain: float = 1.0) -> nn.Module:
    """Draw weights where they lie."""
    for name, parameter in module.named_parameters():
        if parameter.ndim == 2:
            scale = _MODULATION if "_mod." in name else _MAP if "_0.weight" in name else gain
            parameter.normal_(0, scale * parameter.shape[1] ** -0.5, generator=generator)
        else:
            parameter.normal_(1.0 if "norm" in name else 0.0, 0.02, generator=generator)
    return module.requires_grad_(False).eval()


def catalog_of(preset: Preset, outer_params: int) -> Catalog:
    """What the planner chooses from, with synthetic losses: pairs to distil, text runs of three, all widths offered."""
    rng = random.Random(0)
    full, depth = preset.full, preset.depth

    def widths(scale: float) -> Widths:
        groups = {}
        for group, whole in full._asdict().items():
            # Half of a group's units lose a quarter of what all of them would.
            kept = [(count, (1 - count / whole) ** 2) for count in preset.offered[group]]
            weight = scale * {"heads": 1.0, "image": 1.5, "text": 0.4, "modulation": 0.05}[group] * rng.uniform(0.5, 2)
            groups[group] = (Option(whole, 0.0), *(Option(count, weight * loss) for count, loss in kept))
        return Widths(**groups)

    return Catalog(
        family=PPCLQwenImageTransformer2DModel.family,
        shape=Shape(depth=depth, dim=preset.dim, head_dim=preset.head_dim, width=full, outer_params=outer_params),
        blocks=tuple(widths(1.0) for _ in range(depth)),
        students=tuple(
            Student(interval=Interval(n, n + 1), start="first", loss=rng.uniform(0.1, 0.8), widths=widths(2.0))
            for n in range(0, depth - 1, 2)
        ),
        text_runs=tuple(
            TextRun(interval=Interval(n, n + 2), loss=rng.uniform(0.05, 0.6)) for n in range(0, depth - 2, 3)
        ),
    )


class Models:
    """Six random blocks and everything around them, on the device; models of ours and of diffusers over them."""

    def __init__(self, preset: Preset) -> None:
        self.preset = preset
        generator = torch.Generator(preset.device).manual_seed(0)
        torch.manual_seed(0)
        # Its rotations are made on the CPU in float32, so it is built there; it is small without blocks.
        self.outer = PPCLQwenImageTransformer2DModel(**preset.config).to(preset.device, preset.dtype)
        fill(self.outer, generator)
        self.blocks = [self._block(generator) for _ in range(preset.blocks)]
        self.maps = [fill(self._linear(preset.dim, preset.dim), generator, _MAP) for _ in range(preset.blocks)]
        self.catalog = catalog_of(preset, sum(parameter.numel() for parameter in self.outer.parameters()))
        self._plans: dict[str, Planned] = {}

    def plan(self, name: str) -> Planned:
        """One of `PLANS`; the planner takes a second or so for some."""
        if name not in self._plans:
            self._plans[name] = plan_of(name, self.preset, self.catalog)
        return self._plans[name]

    def _linear(self, inputs: int, outputs: int) -> nn.Linear:
        return nn.Linear(inputs, outputs, device=self.preset.device, dtype=self.preset.dtype)

    def _block(self, generator: torch.Generator) -> PPCLQwenImageTransformerBlock:
        preset, dim = self.preset, self.preset.dim
        with torch.device(preset.device), default_dtype(preset.dtype):
            block = PPCLQwenImageTransformerBlock(dim, preset.heads, preset.head_dim)
        rank = max(preset.offered["modulation"])
        for name, outputs, inputs in (
            *((f"mlp_{stream}_0", dim, dim) for stream in ("image", "text")),
            ("modulation_down", rank, dim),
            *((f"modulation_{stream}", 6 * dim, rank) for stream in ("image", "text")),
        ):
            block.narrow[name] = self._linear(inputs, outputs)
        fill(block, generator)
        for stream in ("image", "text"):
            block.narrow[f"modulation_{stream}"].weight.mul_(_MODULATION)
        # As a block is that was loaded or moved.
        for paths in LAYOUT.side_by_side:
            pack(*map(block.get_submodule, paths))
        return block  # type: ignore[return-value]

    def ours(self, plan: Plan, graphs: bool = False) -> Any:
        """One of our models, over the shared blocks."""
        depth = self.preset.depth
        # All that it is built with is replaced.
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
        if hasattr(model, "set_graphs"):
            model.set_graphs(graphs)
        return model

    def stock(self, plan: Plan, real_rope: bool = False) -> QwenImageTransformer2DModel:
        """diffusers' model, its blocks physically as narrow as a plan says; for plans without maps and text runs."""
        with torch.device("meta"):
            model = QwenImageTransformer2DModel(**self.preset.config)
        self._share(model)
        made: dict[tuple[int, Width], QwenImageTransformerBlock] = {}
        for step in plan.steps:
            number = step.blocks.first % len(self.blocks)
            if (number, step.width) not in made:
                made[number, step.width] = self._stock_block(self.blocks[number], step.width)
            model.transformer_blocks.append(made[number, step.width])
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
        counts = {**width._asdict(), "heads": width.heads * self.preset.head_dim}
        state = {}
        for name, tensor in made.state_dict().items():
            group, axis = LAYOUT.axes.get(name, ("", 0))
            state[name] = block.get_parameter(name)
            if group and tensor.shape[axis] != counts[group]:
                state[name] = state[name].narrow(axis, 0, counts[group]).contiguous()
        if width.modulation < self.preset.dim:
            for stream, path in LAYOUT.modulations.items():
                down, up = block.narrow["modulation_down"], block.narrow[f"modulation_{stream}"]
                state[f"{path}.0.weight"] = down.weight[: width.modulation].contiguous()
                state[f"{path}.0.bias"] = down.bias[: width.modulation].contiguous()
                state[f"{path}.1.weight"] = up.weight[:, : width.modulation].contiguous()
                state[f"{path}.1.bias"] = up.bias
                del state[f"{path}.weight"], state[f"{path}.bias"]
                made.set_submodule(path, nn.Sequential(nn.Linear(1, 1, device="meta"), nn.Linear(1, 1, device="meta")))
        for name, tensor in state.items():
            path, _, part = name.rpartition(".")
            layer = made.get_submodule(path)
            setattr(layer, part, nn.Parameter(tensor, requires_grad=False))
            if isinstance(layer, nn.Linear) and part == "weight":
                layer.out_features, layer.in_features = tensor.shape
        return made


class RealRope(nn.Module):
    """Rotations as cosine and sine, for a compiler that leaves complex numbers to eager kernels."""

    def __init__(self, rope: nn.Module) -> None:
        super().__init__()
        self.rope = rope

    def forward(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, ...]:
        return tuple(as_real(rotation).contiguous() for rotation in self.rope(*args, **kwargs))


def rotate(x: torch.Tensor, freqs_cis: torch.Tensor, use_real: bool = False) -> torch.Tensor:
    """diffusers' rotation of ``x [B, S, H, E]``, or the same by real numbers ``[S, E / 2, 2]``."""
    if freqs_cis.is_complex():
        return _STOCK_ROTATE(x, freqs_cis, use_real=use_real)
    a, b = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = freqs_cis[:, None].unbind(-1)
    return torch.stack((a * cos - b * sin, a * sin + b * cos), dim=-1).flatten(-2).type_as(x)


_STOCK_ROTATE = transformer_qwenimage.apply_rotary_emb_qwen


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


class Planned(NamedTuple):
    """A plan, and how it came about.

    ``kind``: ``dense``; ``width``, all blocks equally narrow; ``depth``, evenly spaced blocks left out; ``mixed``, by
    the planner over a catalog with synthetic losses.
    """

    kind: str
    ratio: float
    plan: Plan

    @property
    def name(self) -> str:
        return f"{self.kind} {self.ratio:g}"


PLANS = ("dense 1", *(f"{kind} {ratio:g}" for kind in ("width", "depth", "mixed") for ratio in RATIOS))


def plan_of(name: str, preset: Preset, catalog: Catalog) -> Planned:
    """One of `PLANS`: at most its ratio of parameters, and of FLOPs at the first size."""
    kind, ratio = name.split()[0], float(name.split()[1])
    shape, depth, full = catalog.shape, preset.depth, preset.full
    if kind == "width":
        plan = Plan.dense(catalog.fingerprint, depth, narrowed(preset, ratio))
    elif kind == "depth":
        kept = int((ratio * shape.dense_params - shape.outer_params) / shape.block_params(full))
        plan = Plan.of(catalog.fingerprint, depth, [(n * depth // kept, full) for n in range(kept)])
    elif kind == "mixed":
        plan = plan_within(preset, catalog, ratio)
    else:
        plan = catalog.dense
    return Planned(kind, ratio, plan)


def narrowed(preset: Preset, ratio: float) -> Width:
    """A share of heads and channels, and modulations of a low rank."""
    channels = int(ratio * preset.full.image) // preset.unit * preset.unit
    return Width(int(ratio * preset.heads), channels, channels, preset.rank)


def plan_within(preset: Preset, catalog: Catalog, ratio: float) -> Plan:
    """Plan for ever fewer parameters until the FLOPs are within the ratio too."""
    rows, columns = next(iter(preset.sizes.values()))
    flops = functools.partial(catalog.shape.flops, image_tokens=rows * columns, text_tokens=preset.text)
    # Modulations are a third of the parameters and next to nothing of the FLOPs, and the planner drops them first.
    planner, asked = Planner(catalog), 0.65 * ratio
    while flops(plan := planner.plan(asked)) > ratio * flops(catalog.dense):
        asked *= 0.9
    return plan


def described(planned: Planned, catalog: Catalog) -> dict[str, Any]:
    """What was planned, for whoever reads the figures."""
    plan, shape = planned.plan, catalog.shape
    steps = len(plan.steps)
    mean = {group: round(sum(getattr(s.width, group) for s in plan.steps) / steps, 1) for group in Width._fields}
    return {
        "kind": planned.kind,
        "ratio": planned.ratio,
        "how": "planner, synthetic losses" if planned.kind == "mixed" else "explicit",
        "params": shape.params(plan),
        "params_ratio": round(catalog.ratio(plan), 4),
        "steps": steps,
        "students": sum(step.student for step in plan.steps),
        "text_not_updated": len(plan.still),
        "mean_width": mean,
        "widths": len({step.width for step in plan.steps}),
        "plan": json.loads(plan.model_dump_json(exclude={"checkpoint"})),
    }


def inputs(preset: Preset, size: int, text: int) -> dict[str, Any]:
    """Arguments of a forward, batch 1, without a mask."""
    rows, columns = preset.sizes[size]
    generator = torch.Generator(preset.device).manual_seed(1)
    like: dict[str, Any] = {"device": preset.device, "dtype": preset.dtype, "generator": generator}
    return {
        "hidden_states": torch.randn(1, rows * columns, 64, **like),
        "encoder_hidden_states": torch.randn(1, text, preset.text_dim, **like),
        "timestep": torch.full((1,), 0.5, device=preset.device, dtype=preset.dtype),
        "img_shapes": [[(1, rows, columns)]],
        "return_dict": False,
    }
