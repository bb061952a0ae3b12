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
    import json

    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import (
        CLIPTextConfig,
        CLIPTextModel,
        CLIPTokenizer,
        PreTrainedTokenizerFast,
        T5Config,
        T5EncoderModel,
    )

    # One token a byte and no merges: all that a tokenizer needs in order to read any prompt.
    letters = sorted(ByteLevel.alphabet())
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({word: n for n, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    clip = CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=77)
    of_bytes = Tokenizer(models.BPE({"<pad>": 0, "</s>": 1, **{c: n for n, c in enumerate(letters, 2)}}, []))
    of_bytes.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    of_bytes.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    t5 = PreTrainedTokenizerFast(tokenizer_object=of_bytes, pad_token="<pad>", eos_token="</s>", model_max_length=512)
    torch.manual_seed(0)
    small = {"intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": len(words)}
    text = CLIPTextConfig(hidden_size=768, **small, eos_token_id=len(words) - 1, bos_token_id=len(words) - 2)
    t5_config = T5Config(vocab_size=300, d_model=20, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    channels = {"block_out_channels": (4, 4), "norm_num_groups": 2, "latent_channels": 4, "layers_per_block": 1}
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    vae = AutoencoderKL(
        **channels, **blocks, use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.1, scaling_factor=0.4
    )
    return {
        "scheduler": FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        "vae": vae.eval(),
        "text_encoder": CLIPTextModel(text).eval(),
        "tokenizer": clip,
        "text_encoder_2": T5EncoderModel(t5_config).eval(),
        "tokenizer_2": t5,
    }
