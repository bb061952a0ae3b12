"""What an adapter costs a forward on this machine.

    python bench/suites/bench_adapters.py [--rank 16] [--pairs 31] [--computed]

Medians of paired turns over 12 random blocks of width 512, 256 image and 32 text tokens: a forward with an adapter, and
with the adapter fused, over one without, for ours and for the class of diffusers with peft. Adapters are on q, k, v and
output of both streams (``attention``), on the MLPs too (``all layers``), and on modulations besides.

With ``--computed``, what an adapter adds to the FLOPs of a block of width 3,072 on an H100, where nothing is run: in
kernels, each of whose tiles computes ``x down^T`` of its rows, and in plain torch, which computes it once, in launches
of their own.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from bench_widths import MEDIUM, forward, paired
from diffusers import QwenImageTransformer2DModel
from model_races.models import fill
from model_races.presets import TINY, Preset, inputs

import ppcl_rt
from ppcl_kernels.launch import TARGETS
from ppcl_kernels.matmul import Tile, padded_rank
from ppcl_kernels.qkv_projection import choose_tile
from ppcl_kernels.tools.cases import FULL

_ATTENTION = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
_MLPS = tuple(f"{stream}_mlp.net.{layer}" for stream in ("img", "txt") for layer in ("0.proj", "2"))
LAYERS = {
    "attention": tuple(f"attn.{layer}" for layer in _ATTENTION),
    "all layers": (*(f"attn.{layer}" for layer in _ATTENTION), *_MLPS),
    "modulations too": (*(f"attn.{layer}" for layer in _ATTENTION), *_MLPS, "img_mod.1", "txt_mod.1"),
}


def adapter(model: Any, layers: tuple[str, ...], rank: int) -> dict[str, torch.Tensor]:
    """Random factors, by the names that a file has."""
    generator, state = torch.Generator().manual_seed(0), {}
    for n, block in enumerate(model.transformer_blocks):
        for layer in layers:
            rows, columns = block.get_submodule(layer).weight.shape
            path = f"transformer.transformer_blocks.{n}.{layer}"
            state[f"{path}.lora_A.weight"] = torch.randn(rank, columns, generator=generator) * columns**-0.5
            state[f"{path}.lora_B.weight"] = torch.randn(rows, rank, generator=generator) * 0.1
    return state


def race(preset: Preset, pairs: int, rank: int) -> None:
    """Print ratios for each set of layers."""
    [size] = list(preset.sizes)[:1]
    call = inputs(preset, size, preset.text)
    config = {**preset.config, "num_layers": preset.blocks}
    for name, layers in LAYERS.items():
        for about, family in (
            ("ours", ppcl_rt.PPCLQwenImageTransformer2DModel),
            ("diffusers with peft", QwenImageTransformer2DModel),
        ):
            plain, adapted = (fill(family(**config), torch.Generator().manual_seed(0)) for _ in range(2))
            adapted.load_lora_adapter(adapter(adapted, layers, rank), adapter_name="adapter")
            took = paired(forward(adapted, call), forward(plain, call), pairs)
            adapted.fuse_lora()
            fused = paired(forward(adapted, call), forward(plain, call), pairs)
            print(f"{name}, rank {rank}, {about}: {took:.3f} of a forward without; fused {fused:.3f}", flush=True)


def computed(rank: int) -> None:
    """Print the share that an adapter adds to the FLOPs of a block."""
    shape, target, dtype = FULL, TARGETS["sm_90"], torch.bfloat16
    tokens, padded = [shape.image, shape.text], padded_rank(rank)
    head_cols = choose_tile(target, dtype, tokens, 1, shape.heads, shape.head_dim, padded).cols
    # Name, how many, inputs, outputs, columns of a tile.
    layers = [("q, k, v", 3, shape.dim, shape.dim, head_cols)]
    for name, k, n in (
        ("output", shape.dim, shape.dim),
        ("up", shape.dim, shape.hidden),
        ("down", shape.hidden, shape.dim),
    ):
        layers.append((name, 1, k, n, Tile.choose(target, dtype, tokens, 1, n, rank=padded).cols))
    # Of each token; attention is two products over all tokens.
    block = sum(2 * count * k * n for _, count, k, n, _ in layers) + 4 * sum(tokens) * shape.dim
    added = {"kernels": [], "plain torch": []}
    for name, count, k, n, cols in layers:
        print(f"{name}: {100 * (padded / cols + padded / k):.1f} % more FLOPs in tiles of {cols} columns")
        added["kernels"].append(2 * count * padded * (-(-n // cols) * k + n))
        added["plain torch"].append(2 * count * rank * (k + n))
    for how, each in added.items():
        shares = (1 + sum(each[:2]) / block, 1 + sum(each) / block)
        print(f"{how}: {shares[0]:.3f} of a block without, on attention; {shares[1]:.3f} on all layers")


def main() -> None:
    """Print all ratios."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--pairs", type=int, default=31, help="turns of each pair")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--tiny", action="store_true", help="a tiny model; its figures mean nothing")
    parser.add_argument("--computed", action="store_true", help="FLOPs of kernels at width 3,072; runs nothing")
    arguments = parser.parse_args()
    if arguments.computed:
        computed(arguments.rank)
        return
    print(f"CPU, {torch.get_num_threads()} threads, float32, torch {torch.__version__}, medians of {arguments.pairs}")
    with torch.no_grad():
        race(TINY if arguments.tiny else MEDIUM, arguments.pairs, arguments.rank)


if __name__ == "__main__":
    main()
