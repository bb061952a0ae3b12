"""Sizes of the models, and the widths that are swept."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from ppcl_rt.families.qwen_image import block_spec
from ppcl_rt.planning.block_spec import BlockSpec
from ppcl_rt.planning.width import Width

RATIOS = (0.7, 0.5)

Levels = tuple[tuple[int, ...], ...]


@dataclass(frozen=True, kw_only=True)
class Preset:
    """Sizes of a model, of its inputs, and of the sweep.

    Attributes:
        text_dim: size of a text token before the first block.
        axes: channels of a head that RoPE rotates by frame, row and column.
        blocks: different blocks that are held.
        walks: how often a forward runs them; the depth is ``blocks * walks``.
        sizes: pixels a side -> rows and columns of image tokens.
        text, short: text tokens of a usual prompt, and of a short one.
        unit: channels of a plan are a multiple of it.
        rank: of the modulations in plans of the kind ``width``.
        rounds: timed rounds of a race.
        repeats: timed repeats of a row of the sweep.
        counts: group -> counts below the full one that the sweep visits, coarse levels first.
        text_not_updated: the same for blocks that do not update the text.
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
    text_not_updated: dict[str, Levels]
    offered: dict[str, tuple[int, ...]]
    compiled: dict[str, Any]

    @property
    def dim(self) -> int:
        return self.heads * self.head_dim

    @property
    def depth(self) -> int:
        return self.blocks * self.walks

    @cached_property
    def spec(self) -> BlockSpec:
        """What a block is made of."""
        return block_spec(self.dim, self.heads, self.head_dim)

    @property
    def full(self) -> Width:
        """The width of the full block."""
        return self.spec.full

    @property
    def config(self) -> dict[str, Any]:
        return {
            "num_attention_heads": self.heads,
            "attention_head_dim": self.head_dim,
            "joint_attention_dim": self.text_dim,
            "axes_dims_rope": self.axes,
            "num_layers": 0,
        }


# Qwen-Image. The counts include those that fill waves of 132 multiprocessors: 11 and 22 heads, multiples of 2,816
# channels.
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
    text_not_updated={"heads": ((12, 2), (18, 6), (22, 16, 11)), "image": ((), (5632, 1024, 0), (8448, 2816))},
    offered={
        "heads": (22, 18, 16, 12, 8, 6),
        "image": (11264, 8448, 5632, 2816, 0),
        "text": (8192, 4096, 2048, 0),
        "modulation": (256, 64),
    },
    compiled={"fullgraph": True, "dynamic": False},
)
# Runs the same code on a CPU in a second; its figures mean nothing.
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
    text_not_updated={"heads": ((2, 1),), "image": ((128, 16, 0),)},
    offered={"heads": (2, 1), "image": (128, 0), "text": (128, 0), "modulation": (8, 4)},
    # Inductor would take longer to start than everything else together.
    compiled={"fullgraph": True, "dynamic": False, "backend": "eager"},
)


def inputs(preset: Preset, size: int, text: int) -> dict[str, Any]:
    """Make the arguments of a forward: batch 1, no mask."""
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
