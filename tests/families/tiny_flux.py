"""A tiny random FLUX.1: its transformer, inputs, and the rest of its pipeline."""

from __future__ import annotations

import torch
from diffusers import FluxTransformer2DModel
from random_checkpoint import roughen

from ppcl_rt.families.flux import positions

HEADS, HEAD_DIM, DOUBLE, SINGLE = 4, 8, 3, 3
DIM = HEADS * HEAD_DIM
CONFIG = {
    "in_channels": 16,
    "num_layers": DOUBLE,
    "num_single_layers": SINGLE,
    "attention_head_dim": HEAD_DIM,
    "num_attention_heads": HEADS,
    "joint_attention_dim": 20,
    "pooled_projection_dim": 12,
    "guidance_embeds": True,
    "axes_dims_rope": (2, 2, 4),
}


def build_stock(seed=0, **changes):
    """diffusers' model."""
    torch.manual_seed(seed)
    model = FluxTransformer2DModel(**{**CONFIG, **changes})
    roughen(model, seed)
    return model.eval()


def build_inputs(seed=0, batch=2, text=7, rows=3, columns=5, guidance=True):
    """Arguments of a forward; odd token counts."""
    generator = torch.Generator().manual_seed(seed)

    def noise(*shape):
        return torch.randn(shape, generator=generator)

    return {
        "hidden_states": noise(batch, rows * columns, CONFIG["in_channels"]),
        "encoder_hidden_states": noise(batch, text, CONFIG["joint_attention_dim"]),
        "pooled_projections": noise(batch, CONFIG["pooled_projection_dim"]),
        "timestep": torch.rand(batch, generator=generator),
        "img_ids": positions(rows, columns),
        "txt_ids": torch.zeros(text, 3),
        "guidance": torch.full((batch,), 3.5) if guidance else None,
    }


def pipeline_parts(folder):
    """Everything of a `FluxPipeline` but its transformer, made without a network; tokenizers lie in ``folder``.

    Pooled text has the 768 channels of the published models.
    """
    from diffusers import FlowMatchEulerDiscreteScheduler
    from tiny_pipelines import CLIP_WORDS, clip_tokenizer, t5, vae
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(0)
    small = {"hidden_size": 768, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = CLIPTextModel(CLIPTextConfig(**small, **CLIP_WORDS)).eval()
    tokenizer, encoder = t5(CONFIG["joint_attention_dim"])
    return {
        "scheduler": FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        "vae": vae(),
        "text_encoder": text,
        "tokenizer": clip_tokenizer(folder, 77),
        "text_encoder_2": encoder,
        "tokenizer_2": tokenizer,
    }
