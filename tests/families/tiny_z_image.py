"""Tiny random models and checkpoints of Z-Image, and what a plan of theirs computes, by diffusers' own blocks."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import ZImageTransformer2DModel
from random_checkpoint import RandomCheckpoint, roughen
from torch import nn

import ppcl_rt
from ppcl_rt.families.z_image import PPCLZImageTransformer2DModel

HEADS, HEAD_DIM = 4, 8
DIM, CHANNELS = 32, 85
# Two refiners of the image, two of the text, then the layers.
LISTS = {"noise_refiner": 2, "context_refiner": 2, "layers": 4}
DEPTH = sum(LISTS.values())
CONFIG = {
    "in_channels": 4,
    "dim": DIM,
    "n_layers": LISTS["layers"],
    "n_refiner_layers": LISTS["noise_refiner"],
    "n_heads": HEADS,
    "n_kv_heads": HEADS,
    "cap_feat_dim": 16,
    "axes_dims": (4, 2, 2),
    "axes_lens": (256, 32, 32),
}
# Counts that no tile divides, and linear maps.
NARROWER = {"heads": (3, 1), "mlp": (50, 17, 0)}
STUDENTS = ((0, 1), (2, 3), (4, 5), (5, 7), (7, 7))
# (words, rows and columns of patches) of each sample: more and less than a multiple of 32, and exactly that.
RAGGED = ((7, (3, 5)), (40, (8, 7)), (64, (8, 8)))


def build_stock(seed: int = 0, **changes: Any) -> ZImageTransformer2DModel:
    """diffusers' model with random weights everywhere, also where training begins with zeros."""
    torch.manual_seed(seed)
    model = ZImageTransformer2DModel(**{**CONFIG, **changes})
    roughen(model, seed)
    with torch.no_grad():
        # Outputs of size 1.
        for final in model.all_final_layer.values():
            final.linear.weight *= 0.1
            final.linear.bias *= 0.1
    return model.eval()


def build_inputs(samples: Sequence[tuple[int, tuple[int, int]]] = RAGGED, seed: int = 0) -> dict[str, Any]:
    """Arguments of a forward."""
    generator = torch.Generator().manual_seed(seed)
    return {
        "x": [torch.randn(4, 1, 2 * rows, 2 * columns, generator=generator) for _, (rows, columns) in samples],
        "t": torch.rand(len(samples), generator=generator),
        "cap_feats": [torch.randn(words, CONFIG["cap_feat_dim"], generator=generator) for words, _ in samples],
    }


def residuals(inputs: dict[str, Any], numbers: Sequence[int]) -> dict[int, torch.Tensor]:
    """ControlNet residuals of some layers, over the tokens of diffusers' joint stream."""

    def padded(count: int) -> int:
        return -(-count // 32) * 32

    lengths = [padded(x.shape[2] * x.shape[3] // 4) + padded(len(c)) for x, c in zip(inputs["x"], inputs["cap_feats"])]
    generator = torch.Generator().manual_seed(len(numbers))
    return {n: torch.randn(len(lengths), max(lengths), DIM, generator=generator) for n in numbers}


class _Skipped(nn.Module):
    """In the place of a block that is not there."""

    def forward(self, x: torch.Tensor, *_: Any) -> torch.Tensor:
        return x


class _Mapped(nn.Module):
    """A stock block with a linear map in place of its MLP: ``g + l(g)``."""

    def __init__(self, block: Any, weight: torch.Tensor) -> None:
        super().__init__()
        self.block, self.weight = block, weight

    def forward(self, x: torch.Tensor, mask: Any, rope: Any, temb: Any = None, *_: Any) -> torch.Tensor:
        block, scale, gate = self.block, 1.0, 1.0
        if block.modulation:
            scale, gate, _, _ = block.adaLN_modulation(temb).unsqueeze(1).chunk(4, dim=2)
            scale, gate = 1 + scale, gate.tanh()
        attended = block.attention(block.attention_norm1(x) * scale, attention_mask=mask, freqs_cis=rope)
        x = x + gate * block.attention_norm2(attended)
        return x + F.linear(x, self.weight)


class Made(RandomCheckpoint):
    """A checkpoint on disk, and what it was made of."""

    def reference(self, plan: ppcl_rt.Plan) -> ZImageTransformer2DModel:
        """diffusers' model for a plan; with blocks that do nothing where it has none, since residuals count them."""
        model = copy.deepcopy(self.stock)
        blocks = {planned.interval.first: planned for planned in plan.blocks}
        for n in range(DEPTH):
            path, number = self.catalog.architecture.place(n)
            model.get_submodule(path)[number] = self.reference_block(blocks[n]) if n in blocks else _Skipped()
        return model

    def reference_block(self, planned: ppcl_rt.PlannedBlock) -> nn.Module:
        """diffusers' block with output columns zeroed or fitted, or with a map in place of its MLP."""
        block = self.block(planned)
        if planned.width["mlp"] == ppcl_rt.LINEAR_MAP:
            return _Mapped(block, self.tensors[f"{self.prefix(planned)}replacements.mlp_0.weight"])
        return block


def make_checkpoint(folder: Path, seed: int = 0, compensated: bool = True) -> Made:
    """Write a pluggable checkpoint with everything: students, maps, rank orders, compensated outputs if asked for."""
    counts = dict.fromkeys(("image", "text", "joint"), NARROWER)
    more = {"students": STUDENTS, "compensated": compensated, "seed": seed, "reference": (64, 32)}
    return Made.make(folder, PPCLZImageTransformer2DModel, build_stock(seed), counts, **more)


def pipeline_parts(folder: Path) -> dict[str, Any]:
    """Everything of a `ZImagePipeline` but its transformer, made without a network; its tokenizer in ``folder``."""
    from diffusers import FlowMatchEulerDiscreteScheduler
    from tiny_pipelines import LETTERS, vae, write_words
    from transformers import Qwen2Tokenizer, Qwen3Config, Qwen3Model

    tokenizer = Qwen2Tokenizer(*write_words(folder, LETTERS))
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}:"
    torch.manual_seed(0)
    text = Qwen3Config(
        vocab_size=300,
        hidden_size=CONFIG["cap_feat_dim"],
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=8,
    )
    return {
        "tokenizer": tokenizer,
        "text_encoder": Qwen3Model(text).eval(),
        "vae": vae(CONFIG["in_channels"], block_out_channels=(4, 8), sample_size=32),
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=3.0),
    }
