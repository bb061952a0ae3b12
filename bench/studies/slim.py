"""What `ppcl slim` takes at real widths: minutes, memory and the error at 10,000 timesteps, of a few blocks.

    python bench/studies/slim.py FOLDER --blocks 4

Writes a Qwen-Image transformer of real widths (3,072, 24 heads) with random weights in bfloat16, makes it slim in a
process of its own, and prints what that took, extrapolated to 60 blocks, next to the error by hand. Weights are drawn
as torch initialises linear layers, but for two things that make modulations look trained: the first layer of the
timestep's embedding is four times as large, so that the embedding bends as it does after training (with weights as
initialised it hardly leaves a plane), and modulations have a spectrum that falls as 1 / n ** 0.5 over the directions of
the embedding.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import torch
import torch.nn.functional as F
import typer

import ppcl_rt
from ppcl_rt.checkpoint.card import Origin
from ppcl_rt.checkpoint.writer import write_plain
from ppcl_rt.families import registry

_PUBLISHED_BLOCKS = 60


def random_model(folder: Path, blocks: int) -> None:
    """Write the model, one block in memory at a time."""
    family = registry.model_class("qwen-image")
    outer = family(num_layers=1)
    block = outer.transformer_blocks[0]
    del outer.transformer_blocks[0]
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        embedder = outer.time_text_embed.timestep_embedder
        embedder.linear_1.weight.mul_(4)
        curve = F.silu(outer.embed_timesteps(torch.linspace(0, 1, 2001)))
        _, _, directions = torch.linalg.svd(curve - curve.mean(0), full_matrices=False)
    falling = torch.arange(1, len(directions) + 1) ** -0.5

    def shards() -> Iterator[dict[str, torch.Tensor]]:
        yield {name: tensor.detach().bfloat16() for name, tensor in outer.state_dict().items()}
        for number in range(blocks):
            made = {}
            for name, tensor in block.state_dict().items():
                if name.endswith("_mod.1.weight"):
                    weight = torch.randn(len(tensor), len(directions), generator=generator) * falling @ directions
                else:
                    weight = torch.empty_like(tensor).uniform_(-1, 1, generator=generator) * tensor.shape[-1] ** -0.5
                made[f"transformer_blocks.{number}.{name}"] = weight.bfloat16()
            yield made

    config = {**outer.stock_config, "num_layers": blocks}
    write_plain(folder, config, shards(), Origin(), "A random model of real widths")


def largest_error(stock: Path, made: Path) -> float:
    """The largest relative squared error of a modulation layer at 10,000 random timesteps, in float32."""
    source, slimmed = ppcl_rt.Checkpoint(stock), ppcl_rt.Checkpoint(made)
    family = registry.model_class("qwen-image")
    outer = family.without_blocks(family.opened(stock), torch.float32)
    errors = []
    with torch.no_grad():
        x = F.silu(outer.embed_timesteps(torch.rand(10_000, generator=torch.Generator().manual_seed(1))))
        for planned in slimmed.catalog.only.blocks:
            prefix = f"transformer_blocks.{planned.interval.first}."
            read = [slimmed.read(f"{prefix}replacements.modulation_down.{each}").float() for each in ("weight", "bias")]
            shared = F.linear(x, *read)
            for stream, path in (("image", "img_mod.1"), ("text", "txt_mod.1")):
                wanted = F.linear(x, *(source.read(f"{prefix}{path}.{each}").float() for each in ("weight", "bias")))
                name = f"{prefix}replacements.modulation_{stream}"
                got = F.linear(shared, *(slimmed.read(f"{name}.{each}").float() for each in ("weight", "bias")))
                errors.append(((got - wanted).square().sum() / wanted.square().sum()).item())
    return max(errors)


def main(
    folder: Path,
    blocks: Annotated[int, typer.Option(min=1)] = 4,
    error: float = 1e-6,
) -> None:
    """Build, make slim, measure."""
    stock, made = folder / "stock", folder / "slim"
    random_model(stock, blocks)
    command = [sys.executable, "-m", "ppcl_rt.cli", "slim", str(stock), str(made), "--error", str(error), "--json"]
    said = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    minutes = said["seconds"] / 60
    print(f"{blocks} blocks of real widths, bfloat16, {torch.get_num_threads()} CPU threads, factors in float32")
    print(f"{said['params_before']:,} parameters before, {said['params']:,} now, ranks {said['ranks']}")
    print(f"{said['bytes_before'] / 1e9:.3f} GB before, {said['bytes'] / 1e9:.3f} GB now")
    print(f"{minutes:.2f} minutes, {said['peak_bytes'] / 1e9:.2f} GB of memory at most")
    print(
        f"{_PUBLISHED_BLOCKS} blocks, extrapolated: {minutes * _PUBLISHED_BLOCKS / blocks:.1f} minutes, the same memory"
    )
    print(f"error asked {error:g}, found between the grid's timesteps {said['error']:.3g}", flush=True)
    print(f"largest error at 10,000 random timesteps {largest_error(stock, made):.3g}")


if __name__ == "__main__":
    typer.run(main)
