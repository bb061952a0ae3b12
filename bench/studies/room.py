"""What ``fit`` leaves for a transformer at 1024 x 1024 pixels, from sizes alone: nothing is loaded.

python bench/studies/room.py --pipeline qwen-image --fit 24GB 32GB 48GB
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
import transformers as hf
from diffusers import AutoencoderKL, AutoencoderKLQwenImage

import ppcl_rt
from ppcl_rt.families.qwen_image import PPCLQwenImageTransformer2DModel
from ppcl_rt.families.sd3 import PPCLSD3Transformer2DModel
from ppcl_rt.families.z_image import PPCLZImageTransformer2DModel
from ppcl_rt.model.fitting import room_of
from ppcl_rt.planning.costs import Bytes


class _Pipeline(NamedTuple):
    """The parts of a published pipeline, built without memory, as their configs say."""

    transformer: Callable[[], Any]
    vae: Callable[[], Any]
    text_encoders: tuple[Callable[[], Any], ...]


def _vae_of_16_channels() -> AutoencoderKL:
    """That of SD3 and, with other numbers in it, of FLUX.1 and Z-Image."""
    return AutoencoderKL(
        block_out_channels=(128, 256, 512, 512),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        latent_channels=16,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


def _qwen2_5_vl_7b() -> Any:
    text = {
        "vocab_size": 152064,
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "tie_word_embeddings": False,
        "rope_parameters": {"rope_type": "default", "mrope_section": [16, 24, 24], "rope_theta": 1e6},
    }
    vision = {"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "out_hidden_size": 3584}
    config = hf.Qwen2_5_VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=False)
    return hf.Qwen2_5_VLForConditionalGeneration(config)


def _qwen3_4b() -> Any:
    return hf.Qwen3Model(
        hf.Qwen3Config(
            vocab_size=151936,
            hidden_size=2560,
            intermediate_size=9728,
            num_hidden_layers=36,
            num_attention_heads=32,
            num_key_value_heads=8,
            head_dim=128,
        )
    )


def _clip(width: int, layers: int, heads: int) -> Any:
    sizes = {"hidden_size": width, "intermediate_size": 4 * width, "projection_dim": width}
    config = hf.CLIPTextConfig(**sizes, num_hidden_layers=layers, num_attention_heads=heads)
    return hf.CLIPTextModelWithProjection(config)


def _t5_xxl() -> Any:
    sizes = {"d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64}
    return hf.T5EncoderModel(hf.T5Config(**sizes, feed_forward_proj="gated-gelu"))


_PIPELINES = {
    "qwen-image": _Pipeline(PPCLQwenImageTransformer2DModel, AutoencoderKLQwenImage, (_qwen2_5_vl_7b,)),
    "sd3.5-large": _Pipeline(
        lambda: PPCLSD3Transformer2DModel(
            num_layers=38,
            num_attention_heads=38,
            caption_projection_dim=2432,
            pos_embed_max_size=192,
            qk_norm="rms_norm",
        ),
        _vae_of_16_channels,
        (lambda: _clip(768, 12, 12), lambda: _clip(1280, 32, 20), _t5_xxl),
    ),
    "z-image": _Pipeline(PPCLZImageTransformer2DModel, _vae_of_16_channels, (_qwen3_4b,)),
}


def main() -> None:
    """Print what is left, without offload and with it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pipeline", choices=list(_PIPELINES), default="qwen-image")
    parser.add_argument("--fit", nargs="+", default=["24GB"])
    parser.add_argument("--shape", help="image + text tokens, x batch; that of the family's ratios if left out")
    args = parser.parse_args()
    made = _PIPELINES[args.pipeline]
    with torch.device("meta"):
        encoders = {f"text_encoder_{n}" if n > 1 else "text_encoder": e() for n, e in enumerate(made.text_encoders, 1)}
        parts = {name: part.to(torch.bfloat16) for name, part in {**encoders, "vae": made.vae()}.items()}
        transformer = made.transformer()
    for name, part in {**parts, "transformer": transformer}.items():
        print(f"{name}: {sum(parameter.numel() for parameter in part.parameters()) / 1e9:.3f}e9 parameters")
    catalog = transformer.catalog
    eight = ppcl_rt.Quantisation(format="int8")
    for said, weights in (("bfloat16", Bytes(2)), ("int8", Bytes(2, eight))):
        print(f"dense transformer in {said}: {weights.of(catalog.architecture, catalog.largest) / 1e9:.3g} GB")
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
