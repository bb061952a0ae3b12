"""What ``fit`` leaves for the transformer of Qwen-Image at 1024 x 1024 pixels, from sizes alone: nothing is loaded.

python bench/studies/room.py --fit 24GB 32GB 48GB
"""

from __future__ import annotations

import argparse
from types import SimpleNamespace

import torch
from diffusers import AutoencoderKLQwenImage
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

import ppcl_rt
from ppcl_rt.families.qwen_image import PPCLQwenImageTransformer2DModel
from ppcl_rt.model.fitting import room_of

# Qwen2.5-VL-7B-Instruct, the text encoder of Qwen-Image. The VAE and the transformer are diffusers' defaults.
_TEXT = {
    "vocab_size": 152064,
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "tie_word_embeddings": False,
    "rope_parameters": {"rope_type": "default", "mrope_section": [16, 24, 24], "rope_theta": 1e6},
}
_VISION = {"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "out_hidden_size": 3584}


def main() -> None:
    """Print what is left, without offload and with it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--fit", nargs="+", default=["24GB"])
    parser.add_argument("--shape", default="4096+512", help="image + text tokens, x batch")
    args = parser.parse_args()
    with torch.device("meta"):
        text_encoder = Qwen2_5_VLForConditionalGeneration(
            Qwen2_5_VLConfig(text_config=_TEXT, vision_config=_VISION, tie_word_embeddings=False)
        )
        parts = {"text_encoder": text_encoder.to(torch.bfloat16), "vae": AutoencoderKLQwenImage().to(torch.bfloat16)}
        transformer = PPCLQwenImageTransformer2DModel()
    for name, part in {**parts, "transformer": transformer}.items():
        print(f"{name}: {sum(parameter.numel() for parameter in part.parameters()) / 1e9:.3f}e9 parameters")
    for fit in args.fit:
        for offload in (None, "model"):
            budget = ppcl_rt.Budget.of(
                fit=fit, shape=args.shape, pipeline=SimpleNamespace(components=parts), offload=offload
            )
            room = room_of(budget, type(transformer), transformer.config, torch.bfloat16, transformer.reference)
            share = room.left / (2 * sum(parameter.numel() for parameter in transformer.parameters()))
            print(f"offload {offload}: {room}, {share:.2f} of the dense bytes")


if __name__ == "__main__":
    main()
