"""An adapter of the base model at several ratios; it is random, so only that it acts is to be seen.

python examples/lora.py (needs peft)
"""

from pathlib import Path

import torch

import ppcl_rt
from ppcl_rt.pipelines.likeness import likeness_of
from ppcl_rt.pipelines.task import task_of

SCENES = Path(__file__).parent / "scenes"
PROMPTS = ["two red squares", "a yellow triangle above a cyan stripe"]
LAYERS = ("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0", "img_mlp.net.0.proj", "img_mlp.net.2")
RANK, SIZE = 4, 0.4


def random_adapter(model: ppcl_rt.Pluggable) -> dict[str, torch.Tensor]:
    """Two factors a layer, by the names that a file of a LoRA has; the model holds all blocks whole."""
    generator, state = torch.Generator().manual_seed(0), {}
    for name, layer in model.named_modules():
        if name.startswith("transformer_blocks.") and name.endswith(LAYERS):
            rows, columns = layer.weight.shape
            state[f"transformer.{name}.lora_A.weight"] = SIZE * torch.randn(RANK, columns, generator=generator)
            state[f"transformer.{name}.lora_B.weight"] = SIZE * torch.randn(rows, RANK, generator=generator)
    return state


def main() -> None:
    """Print what of an adapter each ratio takes, and what the adapter changes."""
    model = ppcl_rt.load(SCENES, ratio=1.0, dtype=torch.float32)
    task = task_of(model.catalog)
    # A pipeline does the same by `pipe.load_lora_weights(FILE)` and `pipe.set_adapters`.
    model.load_lora_adapter(random_adapter(model), adapter_name="random")
    for ratio in (1.0, 0.5):
        model.set_ratio(ratio)
        print(f"ratio {ratio}: {model.adapter_report('random')}")
        model.disable_lora()
        without = task.sample(model, PROMPTS, seed=0)
        model.enable_lora()
        for scale in (0.5, 1.0):
            model.set_adapters(["random"], [scale])
            ssim = likeness_of(without, task.sample(model, PROMPTS, seed=0))["ssim"]
            print(f"  at scale {scale}: SSIM {ssim:.3f} to the pictures without it")


if __name__ == "__main__":
    main()
